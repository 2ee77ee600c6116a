//! The allocator that counts, and what is counted with it.

use std::alloc::System;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, SharedString, Unit};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;
use tower_memcached::testing::Memcached;
use tower_memcached::{Client, ClientBuilder, Executor, ProbeSettings};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Far more than anything here takes on a busy machine; a test that gets there has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What is counted, of all threads.
pub(crate) struct Count(Region<'static, System>);

impl Count {
    pub(crate) fn begin() -> Self {
        Self(Region::new(ALLOCATOR))
    }

    /// How often memory was asked for, or moved, since it began.
    pub(crate) fn allocations(&self) -> usize {
        let change = self.0.change();
        change.allocations + change.reallocations
    }

    /// How many bytes more are held than when it began.
    pub(crate) fn bytes(&self) -> isize {
        let change = self.0.change();
        change.bytes_allocated as isize - change.bytes_deallocated as isize
    }
}

/// How many bytes this process holds.
pub(crate) fn held() -> isize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated as isize - stats.bytes_deallocated as isize
}

/// The right to count, which one test has at a time.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    // A test that has failed does not make the others fail.
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Both places where connections may be served.
pub(crate) fn executors() -> Vec<(&'static str, Executor)> {
    vec![
        ("current", Executor::current()),
        ("dedicated", Executor::dedicated("io", 1)),
    ]
}

pub(crate) fn memcached(count: usize) -> Vec<Memcached> {
    (0..count)
        .map(|_| Memcached::spawn(&["-t", "1"]).unwrap())
        .collect()
}

/// Longer than any test.
const NEVER: Duration = Duration::from_secs(3_600);

/// What [`Client::builder`] gives, with timeouts that a busy machine does not reach by itself, and somebody who wants
/// the metrics. Nobody is probed: what a probe allocates is no operation's, and on a slow machine many come beside a few.
pub(crate) fn patient(servers: &[Memcached], executor: &Executor) -> ClientBuilder {
    record();
    Client::builder()
        .nodes(servers.iter().map(Memcached::address))
        .executor(executor.clone())
        .timeout(PATIENCE)
        .attempt_timeout(PATIENCE / 2)
        .probe(ProbeSettings::default().initial_delay(NEVER).period(NEVER))
}

/// Installs a recorder that takes everything, as a service has one.
fn record() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| metrics::set_global_recorder(Taker).unwrap());
}

struct Taker;

struct Sum(AtomicU64);

impl HistogramFn for Sum {
    fn record(&self, value: f64) {
        self.0.fetch_add(value.to_bits(), Ordering::Relaxed);
    }
}

impl metrics::Recorder for Taker {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(Arc::new(AtomicU64::default()))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(Arc::new(AtomicU64::default()))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Arc::new(Sum(AtomicU64::default())))
    }
}
