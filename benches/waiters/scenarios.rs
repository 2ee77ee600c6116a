//! What many who wait at the same time have to live through.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tower_memcached::testing::Memcached;
use tower_memcached::{
    Address, BoxStream, Client, ClientBuilder, Connecting, Connector, ErrorKind, Executor,
    FailureMode, GroupSettings, Key, ProbeSettings, ReadThroughSettings, Ttl,
};

/// Nothing here is to end by a time-out that is not meant.
const LONG: Duration = Duration::from_secs(600);

/// The processor time of this process, on all of its threads, so far.
pub(crate) fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .unwrap()
        .into()
}

pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Time passes at once when there is nothing else to do.
fn timeless_runtime() -> Runtime {
    let mut builder = Builder::new_current_thread();
    builder.enable_all().start_paused(true).build().unwrap()
}

pub(crate) fn memcached() -> Memcached {
    Memcached::spawn(&["-t", "1", "-m", "64"]).unwrap()
}

/// Takes bytes, and never answers.
struct Silence;

impl Connector for Silence {
    fn connect(&self, _: &Address) -> Connecting {
        Box::pin(async {
            let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
                let mut question = [0; 1024];
                // What every connection begins with.
                for answer in ["VERSION 1.6.18\r\n", "MN\r\n"] {
                    let asked = theirs.read(&mut question).await;
                    if asked.is_err() || theirs.write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
                std::future::pending::<()>().await;
            });
            Ok(Box::new(ours) as BoxStream)
        })
    }
}

/// A client of one node at which so many may wait for long.
pub(crate) fn roomy(node: &str, most: usize) -> ClientBuilder {
    Client::builder()
        .nodes([node])
        .executor(Executor::current())
        .max_in_flight(2 * most)
        .timeout(LONG)
        .attempt_timeout(LONG)
        .probe(
            ProbeSettings::default()
                .initial_delay(LONG * 9)
                .period(LONG * 9),
        )
}

fn keys() -> Vec<Key> {
    (0..1_000)
        .map(|n| Key::new(format!("key-{n}")).unwrap())
        .collect()
}

/// Starts so many gets, each in a task of its own, and returns once all wait at the node.
async fn all_wait(client: &Client, many: usize) -> JoinSet<Option<ErrorKind>> {
    let keys = keys();
    connected(client).await;
    let mut tasks = JoinSet::new();
    for n in 0..many {
        let (client, key) = (client.clone(), keys[n % keys.len()].clone());
        tasks.spawn(async move { client.get(key).await.err().map(|error| error.kind()) });
    }
    while client.nodes()[0].in_flight < many {
        tokio::task::yield_now().await;
    }
    tasks
}

/// Connects, by a first request whose answer is not waited for.
async fn connected(client: &Client) {
    let first = client.get("first");
    tokio::pin!(first);
    while client.nodes()[0].connections == 0 {
        assert!(futures::poll!(first.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }
}

async fn all_end(mut tasks: JoinSet<Option<ErrorKind>>, with: Option<ErrorKind>) {
    while let Some(ended) = tasks.join_next().await {
        assert_eq!(ended.unwrap(), with);
    }
}

/// All wait for one server that does not answer for a while, and then does.
pub(crate) fn answered_at_last(many: usize) {
    let server = memcached();
    runtime().block_on(async {
        let client = roomy(&server.address(), many).build().unwrap();
        client.get("first").await.unwrap();
        server.stop().unwrap();
        let tasks = all_wait(&client, many).await;
        server.cont().unwrap();
        all_end(tasks, None).await;
    });
}

/// The time of all runs out at the same moment.
pub(crate) fn timed_out_at_once(many: usize) {
    timeless_runtime().block_on(async {
        let client = roomy("silence", many).connector(Silence);
        let client = client.timeout(LONG / 2).build().unwrap();
        let tasks = all_wait(&client, many).await;
        all_end(tasks, Some(ErrorKind::Timeout)).await;
    });
}

/// The connection of all is given up, and the breaker opens.
pub(crate) fn cut_off_at_once(many: usize) {
    timeless_runtime().block_on(async {
        let client = roomy("silence", many).connector(Silence);
        let client = client
            .stall_timeout(LONG / 2)
            .failure_mode(FailureMode::Cancel);
        let client = client.build().unwrap();
        let mut tasks = all_wait(&client, many).await;
        while let Some(ended) = tasks.join_next().await {
            assert!(ended.unwrap().is_some());
        }
    });
}

/// All leave at the same moment.
pub(crate) fn dropped_at_once(many: usize) {
    timeless_runtime().block_on(async {
        let client = roomy("silence", many).connector(Silence).build().unwrap();
        let mut tasks = all_wait(&client, many).await;
        tasks.shutdown().await;
        assert!(client.nodes()[0].in_flight <= 1);
    });
}

/// All but a few wait in the queue of a group.
pub(crate) fn in_a_groups_queue(many: usize) {
    let server = memcached();
    let group = GroupSettings::default()
        .max_in_flight(64)
        .max_queue(many)
        .max_wait(LONG);
    runtime().block_on(async {
        let client = roomy(&server.address(), many).group("group", group);
        let client = client.build().unwrap();
        let (keys, mut tasks) = (keys(), JoinSet::new());
        for n in 0..many {
            let (group, key) = (client.group("group").unwrap(), keys[n % keys.len()].clone());
            tasks.spawn(async move { group.get(key).await.err().map(|error| error.kind()) });
        }
        all_end(tasks, None).await;
    });
}

/// All want what one of them loads.
pub(crate) fn on_one_flight(many: usize) {
    let server = memcached();
    runtime().block_on(async {
        let settings = ReadThroughSettings::default().load_timeout(LONG);
        let client = roomy(&server.address(), many).read_through(settings);
        let client = client.build().unwrap();
        let loaded = std::sync::Arc::new(Semaphore::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..many {
            let (client, loaded) = (client.clone(), loaded.clone());
            tasks.spawn(async move {
                let load = || async move {
                    let _permit = loaded.acquire().await;
                    Ok::<_, std::io::Error>(Some("loaded"))
                };
                let value = client.get_or_load("key", Ttl::secs(60), load).await;
                value.err().map(|error| error.kind())
            });
        }
        // All have looked, and found nothing, once nobody is at the node any more.
        let until = Instant::now() + LONG;
        tokio::task::yield_now().await;
        while client.nodes()[0].in_flight > 0 {
            assert!(Instant::now() < until, "they look for ever");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        loaded.add_permits(many);
        all_end(tasks, None).await;
    });
}

/// What is run with how many.
pub(crate) type Scenario = fn(usize);

pub(crate) const SCENARIOS: [(&str, Scenario); 6] = [
    ("answered at last", answered_at_last),
    ("timed out at once", timed_out_at_once),
    ("cut off at once", cut_off_at_once),
    ("dropped at once", dropped_at_once),
    ("in a group's queue", in_a_groups_queue),
    ("on one flight", on_one_flight),
];
