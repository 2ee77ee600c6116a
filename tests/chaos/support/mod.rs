//! What the scenarios share.

pub(crate) mod calls;
pub(crate) mod freezer;
pub(crate) mod incident;
pub(crate) mod lateness;
pub(crate) mod load;
pub(crate) mod netns;
pub(crate) mod raw;
pub(crate) mod remains;
pub(crate) mod report;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::time::Instant;
use tower_memcached::testing::Memcached;
use tower_memcached::{BreakerState, Client, Key, NodeSpec, Payload, Ring, Ttl};

/// Far more than anything here takes on a busy machine; a test that gets there has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test with no other of this suite beside it: what it measures would be the other's doing, too. (With nextest
/// each is a process of its own, and its configuration sees to that; with `cargo test` all are threads of one.) When it is
/// over its client has stopped its threads, and no thread, socket or other file descriptor is left of it.
pub(crate) fn alone<T>(test: impl Future<Output = T>) -> T {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let runtime = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    // With the runtime, since the first one leaves its sockets for signals to all that follow.
    let before = remains::Before::note();
    let result = runtime.block_on(async {
        let result = test.await;
        remains::client_is_gone().await;
        result
    });
    drop(runtime);
    before.is_restored();
    result
}

/// Whether the user has switched off what this environment variable names; says so if it is.
pub(crate) fn switched_off(variable: &str) -> bool {
    let off = std::env::var(variable).is_ok_and(|value| value == "off");
    if off {
        println!("not run: switched off by the user with {variable}=off");
    }
    off
}

/// So many memcached processes.
pub(crate) fn memcacheds(count: usize) -> Vec<Memcached> {
    (0..count).map(|_| Memcached::spawn(&[]).unwrap()).collect()
}

pub(crate) fn addresses(nodes: &[Memcached]) -> Vec<String> {
    nodes.iter().map(Memcached::address).collect()
}

/// A client with all the defaults.
pub(crate) fn client(nodes: &[String]) -> Client {
    Client::builder().nodes(nodes).build().unwrap()
}

/// Waits until a condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub(crate) fn state(client: &Client, index: usize) -> BreakerState {
    client.nodes()[index].state
}

pub(crate) async fn until_closed(client: &Client, index: usize) {
    eventually("the breaker closes", || {
        state(client, index) == BreakerState::Closed
    })
    .await;
}

pub(crate) async fn until_open(client: &Client, index: usize) {
    eventually("the breaker opens", || {
        state(client, index) != BreakerState::Closed
    })
    .await;
}

/// Stores a value, however often a busy machine makes that fail.
pub(crate) async fn store_patiently(
    client: &Client,
    key: &Key,
    value: impl Into<Payload> + Clone,
    ttl: Ttl,
) {
    let until = Instant::now() + PATIENCE;
    while let Err(error) = client.set(key, value.clone(), ttl).await {
        assert!(Instant::now() < until, "{key:?} cannot be stored: {error}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Keys that belong to the node with that index.
pub(crate) fn keys_of(nodes: &[String], index: usize, count: usize) -> Vec<Key> {
    let specs: Vec<_> = nodes
        .iter()
        .map(|node| NodeSpec::new(node).unwrap())
        .collect();
    (0..)
        .map(|number| Key::new(format!("key-{number}")).unwrap())
        .filter(|key| Ring::default().node_of(&specs, key) == Some(index))
        .take(count)
        .collect()
}
