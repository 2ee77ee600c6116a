//! How a memcached is reached: options of sockets.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tower_memcached::testing::Server;
use tower_memcached::{
    BreakerState, Client, ClientBuilder, ErrorKind, Executor, SocketSettings, SystemConnector, Ttl,
};

use std::time::Duration;

/// A client whose timeouts a busy machine does not reach by itself.
fn patient(node: impl AsRef<str>) -> ClientBuilder {
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
