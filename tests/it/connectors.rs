//! How a memcached is reached: options of sockets, Unix sockets.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use futures::future::join_all;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tower_memcached::testing::{Memcached, Server};
use tower_memcached::{
    BreakerState, Client, ClientBuilder, ErrorKind, Executor, Outcome, ProbeSettings,
    SocketSettings, SystemConnector, Ttl,
};

use crate::support::{PATIENCE, until_closed, until_open};

/// A client whose timeouts a busy machine does not reach by itself.
pub(crate) fn patient(node: impl AsRef<str>) -> ClientBuilder {
    Client::builder()
        .nodes([node])
        .executor(Executor::current())
        .timeout(Duration::from_secs(5))
        .attempt_timeout(Duration::from_secs(2))
}

/// A server that tells where its connections come from.
async fn asked_from(server: Server) -> (SocketAddr, mpsc::UnboundedReceiver<IpAddr>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let (address, (tell, told)) = (listener.local_addr().unwrap(), mpsc::unbounded_channel());
    tokio::spawn(async move {
        while let Ok((stream, peer)) = listener.accept().await {
            let _ = tell.send(peer.ip());
            tokio::spawn(server.serve(stream));
        }
    });
    (address, told)
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn connections_come_from_the_address_they_are_bound_to() {
    let bind = IpAddr::from([127, 0, 0, 2]);
    let (address, mut asked_from) = asked_from(Server::new()).await;
    let client = patient(address.to_string())
        .socket(SocketSettings::default().bind(bind))
        .build()
        .unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    assert_eq!(asked_from.recv().await, Some(bind));
}

/// One that cannot be bound to is our mistake, and says nothing about nodes.
#[tokio::test]
async fn an_address_that_is_not_ours_ejects_nobody() {
    let (address, _asked_from) = asked_from(Server::new()).await;
    let client = patient(address.to_string())
        .socket(SocketSettings::default().bind([192, 0, 2, 1].into()))
        .build()
        .unwrap();
    let error = client.get("k").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionFailed, "{error}");
    assert_eq!(client.nodes()[0].state, BreakerState::Closed);
}

#[tokio::test]
async fn a_node_without_an_address_of_the_bound_ones_family_cannot_be_connected_to() {
    let client = patient("127.0.0.1:1")
        .socket(SocketSettings::default().bind([0, 0, 0, 0, 0, 0, 0, 1].into()))
        .build()
        .unwrap();
    assert!(client.get("k").await.is_err());
    let error = client.nodes()[0].last_cause.clone().unwrap();
    assert_eq!(error.kind(), ErrorKind::ConnectionFailed);
    assert!(error.to_string().contains("is IPv6, as ::1 is"), "{error}");
}

#[test]
fn options_of_sockets_and_a_connector_of_ones_own_exclude_each_other() {
    let built = patient("127.0.0.1:1")
        .socket(SocketSettings::default().nodelay(false))
        .connector(SystemConnector::new())
        .build();
    let error = built.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    assert!(error.to_string().contains("socket: "), "{error}");
}

/// Reads, writes, large and many of them: what any connection has to carry.
pub(crate) async fn is_of_use(client: &Client) {
    let small: Vec<_> = (0..200).map(|n| format!("key-{n}")).collect();
    for key in &small {
        client.set(key, key.clone(), Ttl::NEVER).await.unwrap();
    }
    let many = client.get_many(&small).await;
    for (key, outcome) in small.iter().zip(many.outcomes()) {
        assert!(
            matches!(outcome, Outcome::Hit(value) if *value == key.as_str()),
            "{key}: {outcome:?}"
        );
    }
    let large: Vec<_> = (0..8_u8)
        .map(|n| vec![n; (1 << 20) - 1000 * usize::from(n) - 512])
        .collect();
    let keys: Vec<_> = (0..large.len()).map(|n| format!("large-{n}")).collect();
    let sets = keys.iter().zip(&large);
    let sets = sets.map(|(key, value)| client.set(key, value.clone(), Ttl::NEVER));
    for stored in join_all(sets).await {
        stored.unwrap();
    }
    let gets = keys.iter().map(|key| client.get(key));
    for (value, read) in large.iter().zip(join_all(gets).await) {
        assert!(read.unwrap().as_deref() == Some(&**value), "not as written");
    }
    assert_eq!(client.increment("none", 1).await.unwrap(), None);
    assert_eq!(client.nodes()[0].state, BreakerState::Closed);
}

/// Sets `k`, however long a busy machine takes to connect.
pub(crate) async fn eventually_set(client: &Client, value: &'static str) {
    let until = Instant::now() + PATIENCE;
    while let Err(error) = client.set("k", value, Ttl::NEVER).await {
        assert!(Instant::now() < until, "{error}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A node that hangs goes, and comes back by probes that are made as its other connections are.
pub(crate) async fn hangs_and_comes_back(client: &Client, node: &Memcached) {
    eventually_set(client, "v").await;
    node.stop().unwrap();
    until_open(client, 0).await;
    node.cont().unwrap();
    until_closed(client, 0).await;
    // What was in doubt while it hung is over first.
    let until = Instant::now() + PATIENCE;
    while client.get("k").await.ok().flatten().is_none() {
        assert!(Instant::now() < until, "{:?}", client.nodes());
        sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn hasty(node: impl AsRef<str>) -> ClientBuilder {
    let probe = ProbeSettings::default()
        .period(Duration::from_millis(100))
        .initial_delay(Duration::from_millis(10));
    patient(node)
        .attempt_timeout(Duration::from_millis(200))
        .connect_timeout(Duration::from_millis(400))
        .probe(probe)
}

#[tokio::test]
async fn a_unix_socket_is_as_good_as_a_port() {
    let mut node = Memcached::builder().unix_socket().spawn().unwrap();
    let client = patient(node.address()).build().unwrap();
    is_of_use(&client).await;
    node.kill().unwrap();
    until_open(&client, 0).await;
    node.restart().unwrap();
    until_closed(&client, 0).await;
    let client = hasty(node.address()).build().unwrap();
    hangs_and_comes_back(&client, &node).await;
}
