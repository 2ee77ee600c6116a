//! A cluster of a hundred nodes that nobody asks anything.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::time::{Instant, sleep};
use tower_memcached::testing::Memcached;
use tower_memcached::{Client, Executor};

pub(crate) const NODES: usize = 100;

/// For everything to come up, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// What it costs.
pub(crate) struct Idle {
    /// Bytes for each node, by what the allocator has given.
    pub(crate) allocated: f64,
    /// Bytes for each node, by what the operating system has given: 0 if there was room before.
    pub(crate) resident: f64,
    /// Of one core.
    pub(crate) processor: f64,
}

/// One process that listens at a hundred loopback addresses: each of them is a node.
pub(crate) fn servers() -> (Memcached, Vec<String>) {
    let addresses: Vec<_> = (1..=NODES).map(|n| format!("127.0.0.{n}")).collect();
    let memcached = Memcached::spawn(&["-t", "1", "-l", &addresses.join(",")]).unwrap();
    let port = memcached.socket_address().port();
    let nodes = addresses.iter().map(|address| format!("{address}:{port}"));
    let nodes = nodes.collect();
    (memcached, nodes)
}

fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .unwrap()
        .into()
}

fn resident() -> f64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages = pages.split(' ').nth(1).unwrap();
    pages.parse::<f64>().unwrap() * 4096.0
}

/// Connects to all nodes, lets a first round of probes pass, and looks on for so long. `allocated` says how many bytes
/// are.
pub(crate) async fn measure(
    nodes: &[String],
    executor: Executor,
    time: Duration,
    allocated: impl Fn() -> f64,
) -> Idle {
    let (allocated_before, resident_before) = (allocated(), resident());
    let client = Client::builder()
        .nodes(nodes)
        .executor(executor)
        .timeout(PATIENCE)
        .attempt_timeout(PATIENCE / 2)
        .build()
        .unwrap();
    // The first request of each node connects, the others go over that connection.
    let until = Instant::now() + PATIENCE;
    while client.nodes().iter().any(|node| node.connections == 0) {
        assert!(Instant::now() < until, "{:?}", client.nodes());
        client.version().await.unwrap();
    }
    // Probes begin after a second, and come each second.
    sleep(Duration::from_millis(2_500)).await;
    let (began, spent) = (Instant::now(), processor_time());
    sleep(time).await;
    let processor = (processor_time() - spent).as_secs_f64() / began.elapsed().as_secs_f64();
    let each = |after: f64, before: f64| (after - before) / nodes.len() as f64;
    let idle = Idle {
        allocated: each(allocated(), allocated_before),
        resident: each(resident(), resident_before),
        processor,
    };
    assert!(client.nodes().iter().all(|node| node.connections == 1));
    idle
}
