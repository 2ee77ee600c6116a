//! What several benches need.

use std::sync::Arc;
use std::time::Duration;

use criterion::Criterion;
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;
use tower_memcached::testing::Memcached;
use tower_memcached::{Client, Executor, Key};

pub(crate) const KEYS: usize = 10_000;

/// Few samples, each of many operations: enough to compare by, and `cargo bench` ends within minutes.
pub(crate) fn settings(measurement: Duration) -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(measurement / 4)
        .measurement_time(measurement)
}

pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) fn keys() -> Arc<[Key]> {
    (0..KEYS)
        .map(|n| Key::new(format!("benchmark:{n:08}")).unwrap())
        .collect()
}

/// Real ones, of one thread each. They end when they are dropped.
pub(crate) fn servers(count: usize) -> Vec<Memcached> {
    (0..count)
        .map(|_| Memcached::spawn(&["-t", "1", "-m", "256"]).unwrap())
        .collect()
}

pub(crate) fn client(servers: &[Memcached], executor: Executor) -> Client {
    Client::builder()
        .nodes(servers.iter().map(Memcached::address))
        .executor(executor)
        // Speed is measured here, not time-outs.
        .timeout(Duration::from_secs(10))
        .attempt_timeout(Duration::from_secs(5))
        .build()
        .unwrap()
}

/// Runs `iterations` operations on `tasks` tasks, each with one at a time, and times them all. An
/// operation is told a number under [`KEYS`].
pub(crate) fn closed_loop<F, Fut>(
    runtime: &Runtime,
    tasks: usize,
    iterations: u64,
    operation: F,
) -> Duration
where
    F: Fn(usize) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    let rounds = iterations.div_ceil(tasks as u64) as usize;
    runtime.block_on(async {
        let started = Instant::now();
        let count = tasks;
        let tasks: Vec<_> = (0..count)
            .map(|task| {
                let operation = operation.clone();
                tokio::spawn(async move {
                    for round in 0..rounds {
                        operation((task * 7919 + round * 31) % KEYS).await;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        // Rounds are rounded up, so a little more was done than asked for.
        started
            .elapsed()
            .mul_f64(iterations as f64 / (rounds * count) as f64)
    })
}
