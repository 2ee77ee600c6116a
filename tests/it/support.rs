//! What the tests share.

use std::time::Duration;

use tokio::time::Instant;
use tower_memcached::testing::Server;
use tower_memcached::{
    Address, BoxStream, BreakerState, Client, ClientBuilder, Connecting, Connector, Executor, Key,
    NodeSpec, Ring,
};

/// Far more than anything here takes on a busy machine; a test that gets there has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until a condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// So many in-process servers, listening.
pub(crate) async fn servers(count: usize) -> Vec<Server> {
    let mut servers = Vec::new();
    for _ in 0..count {
        let server = Server::new();
        server.listen().await.unwrap();
        servers.push(server);
    }
    servers
}

pub(crate) async fn server() -> Server {
    servers(1).await.remove(0)
}

pub(crate) fn addresses(servers: &[Server]) -> Vec<String> {
    let address = |server: &Server| server.address().unwrap().to_string();
    servers.iter().map(address).collect()
}

/// A client of these servers, on the test's own runtime, whose timeouts a busy machine does not
/// reach by itself.
pub(crate) fn patient(servers: &[Server]) -> ClientBuilder {
    Client::builder()
        .nodes(addresses(servers))
        .executor(Executor::current())
        .timeout(Duration::from_secs(5))
        .attempt_timeout(Duration::from_secs(2))
}

/// Keys that belong to the server with that index, as the default ring lays them out.
pub(crate) fn keys_of(servers: &[Server], index: usize, count: usize) -> Vec<Key> {
    let specs: Vec<_> = addresses(servers)
        .iter()
        .map(|address| NodeSpec::new(address).unwrap())
        .collect();
    let mut candidates = (0..).map(|n| Key::new(format!("key-{n}")).unwrap());
    std::iter::from_fn(|| {
        candidates.find(|key| Ring::default().node_of(&specs, key) == Some(index))
    })
    .take(count)
    .collect()
}

pub(crate) fn state<S>(client: &Client<S>, index: usize) -> BreakerState {
    client.nodes()[index].state
}

pub(crate) async fn until_open<S>(client: &Client<S>, index: usize) {
    let until = Instant::now() + PATIENCE;
    while state(client, index) != BreakerState::Open {
        assert!(Instant::now() < until, "never open: {:?}", client.nodes());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub(crate) async fn until_closed<S>(client: &Client<S>, index: usize) {
    let until = Instant::now() + PATIENCE;
    while state(client, index) != BreakerState::Closed {
        assert!(Instant::now() < until, "never closed: {:?}", client.nodes());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Connects to servers in this process without sockets, so that paused time works: `node-0`,
/// `node-1` and so on are their places in the list.
pub(crate) struct InMemory(pub(crate) Vec<Server>);

impl Connector for InMemory {
    fn connect(&self, address: &Address) -> Connecting {
        let (host, _) = address.host_and_port().unwrap();
        let place: usize = host.strip_prefix("node-").unwrap().parse().unwrap();
        let server = self.0[place].clone();
        Box::pin(async move {
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            tokio::spawn(server.serve(theirs));
            Ok(Box::new(ours) as BoxStream)
        })
    }
}

/// A client of these servers in this process, on the test's own runtime.
pub(crate) fn in_memory(servers: &[Server]) -> ClientBuilder {
    let nodes = (0..servers.len()).map(|place| format!("node-{place}"));
    Client::builder()
        .nodes(nodes)
        .connector(InMemory(servers.to_vec()))
        .executor(Executor::current())
}
