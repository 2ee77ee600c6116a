//! memcached that wants to know who asks (`-Y`).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tower_memcached::testing::{Memcached, Server};
use tower_memcached::{
    Address, BoxStream, Client, Config, Connecting, Connector, Credentials, Error, ErrorKind,
    Executor, NodeConfig, Ttl,
};

use crate::connectors::{hangs_and_comes_back, hasty, is_of_use, patient};
use crate::support::{addresses, server, until_closed, until_open};

fn demanding() -> Memcached {
    let builder = Memcached::builder().authentication("other", "password");
    builder.authentication("user", "secret").spawn().unwrap()
}

fn right() -> Credentials {
    Credentials::new("user", "secret")
}

#[tokio::test]
async fn with_the_right_password_it_is_a_memcached_like_any_other() {
    let node = demanding();
    let client = patient(node.address())
        .credentials(right())
        .connections(3)
        .build()
        .unwrap();
    is_of_use(&client).await;
    // They were shown, and not stored.
    assert_eq!(client.get("credentials").await.unwrap(), None);
    let client = hasty(node.address()).credentials(right()).build().unwrap();
    hangs_and_comes_back(&client, &node).await;
}

/// In the old protocol, too, on each connection of its pool, and encrypted.
#[cfg(all(feature = "classic", feature = "tls"))]
#[tokio::test]
async fn classic_connections_are_authenticated_and_encrypted_as_well() {
    let authority = crate::tls::Authority::new("ours");
    let server = authority.server();
    let builder = Memcached::builder().authentication("user", "secret");
    let node = builder
        .tls(&server.certificate, &server.key)
        .spawn()
        .unwrap();
    let client = patient(node.address())
        .protocol(tower_memcached::Protocol::Classic)
        .tls(authority.trusted())
        .credentials(right())
        .build()
        .unwrap();
    is_of_use(&client).await;
    for protocol in [
        tower_memcached::Protocol::Classic,
        tower_memcached::Protocol::Auto,
    ] {
        let client = patient(node.address())
            .protocol(protocol)
            .tls(authority.trusted())
            .build()
            .unwrap();
        assert!(client.get("k").await.is_err());
        until_open(&client, 0).await;
        let error = client.nodes()[0].last_cause.clone().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
    }
}

/// Why the only node of a client is out.
async fn refusal(node: &Memcached, credentials: Option<Credentials>) -> Error {
    let mut builder = patient(node.address());
    if let Some(credentials) = credentials {
        builder = builder.credentials(credentials);
    }
    let client = builder.build().unwrap();
    let error = client.get("k").await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    until_open(&client, 0).await;
    client.nodes()[0].last_cause.clone().unwrap()
}

#[tokio::test]
async fn a_wrong_password_ejects_the_node_and_says_why() {
    let node = demanding();
    for wrong in [
        Credentials::new("user", "hunter2"),
        Credentials::new("nobody", "secret"),
        Credentials::new("other", "secret"),
    ] {
        let error = refusal(&node, Some(wrong)).await;
        assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
        let shown = format!("{error} {error:?}");
        assert!(shown.contains("refuses the credentials"), "{shown}");
        assert!(
            !shown.contains("hunter2") && !shown.contains("secret"),
            "{shown}"
        );
    }
}

#[tokio::test]
async fn no_password_where_one_is_demanded_ejects_the_node_and_says_why() {
    let error = refusal(&demanding(), None).await;
    assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
    assert!(error.to_string().contains("there are none"), "{error}");
}

/// It would store them, and give them to whoever asks.
#[tokio::test]
async fn a_server_that_does_not_ask_is_not_told() {
    let node = Memcached::spawn(&[]).unwrap();
    let client = patient(node.address())
        .credentials(right())
        .build()
        .unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    assert_eq!(client.get("credentials").await.unwrap(), None);
    // This one counts what it is asked; our own writes are none of these.
    let server = server().await;
    let told = patient(addresses(std::slice::from_ref(&server)).remove(0));
    let told = told.credentials(right()).build().unwrap();
    assert_eq!(told.get("k").await.unwrap(), None);
    assert!(server.commands_named("version") > 0);
    assert_eq!(server.commands_named("set"), 0);
}

/// A node that refuses is a node that is out: the others stand in, and it comes back once it is asked
/// with what it wants to hear.
#[tokio::test]
async fn credentials_can_be_changed_while_the_client_runs() {
    let (node, other) = (demanding(), Memcached::spawn(&[]).unwrap());
    let mut config = Config::default();
    let nodes = [&node, &other].map(|node| NodeConfig::new(node.address()));
    config.nodes = nodes.into();
    config.credentials = Some(Credentials::new("user", "outdated"));
    config.timeout = Duration::from_secs(5);
    config.attempt_timeout = Duration::from_secs(2);
    let client = Client::builder().config(config.clone()).build().unwrap();
    for n in 0..50 {
        client.set(format!("k{n}"), "v", Ttl::NEVER).await.unwrap();
    }
    until_open(&client, 0).await;
    config.credentials = Some(right());
    client.reconfigure(config).unwrap();
    until_closed(&client, 0).await;
    for n in 0..50 {
        client.set(format!("k{n}"), "v", Ttl::NEVER).await.unwrap();
    }
    assert!(client.nodes().iter().all(|node| node.connections > 0));
}

/// Ends the first connection upon its first question, as a server does that is just then being restarted.
struct EndsTheFirst(Server, AtomicBool);

impl Connector for EndsTheFirst {
    fn connect(&self, _: &Address) -> Connecting {
        let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
        match self.1.swap(true, Ordering::Relaxed) {
            true => drop(tokio::spawn(self.0.clone().serve(theirs))),
            false => drop(tokio::spawn(async move {
                let _asked = theirs.read(&mut [0; 64]).await;
            })),
        }
        Box::pin(async { Ok(Box::new(ours) as BoxStream) })
    }
}

/// It is not taken for a proxy, whose connection would be of use to nobody for as long as it is open.
#[cfg(feature = "classic")]
#[tokio::test(start_paused = true)]
async fn a_server_that_comes_back_between_two_questions_is_told_who_asks() {
    for protocol in [
        tower_memcached::Protocol::Auto,
        tower_memcached::Protocol::Classic,
    ] {
        let server = Server::new();
        server.require_authentication("user", "secret");
        let client = Client::builder()
            .nodes(["node"])
            .connector(EndsTheFirst(server, AtomicBool::new(false)))
            .executor(Executor::current())
            .protocol(protocol)
            .credentials(right())
            .build()
            .unwrap();
        let until = tokio::time::Instant::now() + Duration::from_secs(10);
        while let Err(error) = client.set("k", "v", Ttl::NEVER).await {
            assert!(tokio::time::Instant::now() < until, "{protocol:?}: {error}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(client.get("k").await.unwrap().unwrap(), "v");
    }
}

#[cfg(feature = "serde")]
#[test]
fn a_password_that_is_no_text_is_not_repeated() {
    let config = r#"{"credentials": {"user": "user", "password": 73577357}}"#;
    let error = serde_json::from_str::<Config>(config).unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains("password is no text") && !said.contains("7357"),
        "{said}"
    );
}
