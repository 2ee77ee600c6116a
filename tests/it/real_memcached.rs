//! What only a real memcached does.

use std::time::Duration;

use futures::future::join_all;
use tower_memcached::testing::Memcached;
use tower_memcached::{BreakerState, CasOutcome, Client, ErrorKind, Executor, Outcome, Ttl};

use crate::support::{PATIENCE, eventually};

fn value_of(key: &str) -> String {
    format!("value of {key}")
}

/// 2 of FAULTS: SIGSTOP, a storm of requests, SIGCONT. What the node answers late belongs to
/// requests that have long ended.
#[tokio::test]
async fn late_replies_after_sigcont_are_never_matched() {
    let node = Memcached::spawn(&[]).unwrap();
    let client = Client::builder()
        .nodes([node.address()])
        .executor(Executor::current())
        .build()
        .unwrap();
    let keys: Vec<String> = (0..200).map(|n| format!("key-{n}")).collect();
    for key in &keys {
        // A busy machine may time a set out; they must all be there for what follows.
        let until = tokio::time::Instant::now() + PATIENCE;
        while client.set(key, value_of(key), Ttl::NEVER).await.is_err() {
            assert!(tokio::time::Instant::now() < until);
        }
    }
    for _ in 0..3 {
        node.stop().unwrap();
        let gets = keys.iter().map(|key| client.get(key));
        for outcome in join_all(gets).await {
            assert!(outcome.is_err(), "a stopped node answered");
        }
        eventually("its breaker opens", || {
            client.nodes()[0].state != BreakerState::Closed
        })
        .await;
        node.cont().unwrap();
        let mut hits = 0;
        let until = tokio::time::Instant::now() + PATIENCE;
        while hits < 500 {
            assert!(tokio::time::Instant::now() < until, "it never came back");
            for key in &keys {
                match client.get(key).await {
                    Ok(Some(value)) => {
                        assert_eq!(value, value_of(key).as_str());
                        hits += 1;
                    }
                    Ok(None) => panic!("a value is gone"),
                    Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
        }
    }
}

/// 6 of FAULTS: CAS tokens start again at 1 after a restart, and an old one matches by luck.
#[tokio::test]
async fn a_cas_token_from_before_a_restart_is_refused_unsent() {
    let mut node = Memcached::spawn(&[]).unwrap();
    let client = Client::builder()
        .nodes([node.address()])
        .executor(Executor::current())
        .timeout(Duration::from_secs(2))
        .attempt_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    client.set("k", "old", Ttl::NEVER).await.unwrap();
    let token = client.gets("k").await.unwrap().unwrap().cas().unwrap();
    node.restart().unwrap();
    let until = tokio::time::Instant::now() + PATIENCE;
    while client.set("k", "new", Ttl::NEVER).await.is_err() {
        assert!(tokio::time::Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // A first try may be in doubt, and then is a miss until that is over.
    while client.nodes()[0].journal > 0 {
        assert!(tokio::time::Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    client.set("k", "new", Ttl::NEVER).await.unwrap();
    // The server's number for it is the same as the old one's was.
    let outcome = client.cas("k", "stale", Ttl::NEVER, token).await.unwrap();
    assert_eq!(outcome, CasOutcome::Exists);
    let fresh = client.gets("k").await.unwrap().unwrap();
    assert_eq!(fresh, "new");
    let outcome = client
        .cas("k", "next", Ttl::NEVER, fresh.cas().unwrap())
        .await
        .unwrap();
    assert_eq!(outcome, CasOutcome::Stored);
    // Another node's token is not this one's, whatever its number.
    let other = Memcached::spawn(&[]).unwrap();
    let elsewhere = Client::builder().nodes([other.address()]).build().unwrap();
    elsewhere.set("k", "v", Ttl::NEVER).await.unwrap();
    let foreign = elsewhere.gets("k").await.unwrap().unwrap().cas().unwrap();
    let outcome = client.cas("k", "stale", Ttl::NEVER, foreign).await.unwrap();
    assert_eq!(outcome, CasOutcome::Exists);
}

/// 3 and 4 of FAULTS: killed, a node is known to be gone before anybody asks it; restarted, it is
/// back empty.
#[tokio::test]
async fn a_killed_node_is_out_at_once_and_back_after_probes() {
    let mut nodes: Vec<_> = (0..3).map(|_| Memcached::spawn(&[]).unwrap()).collect();
    let client = Client::builder()
        .nodes(nodes.iter().map(Memcached::address))
        .executor(Executor::current())
        .timeout(Duration::from_secs(2))
        .attempt_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    let keys: Vec<String> = (0..300).map(|n| format!("key-{n}")).collect();
    for key in &keys {
        client.set(key, value_of(key), Ttl::NEVER).await.unwrap();
    }
    nodes[1].kill().unwrap();
    eventually("its breaker opens", || {
        client.nodes()[1].state != BreakerState::Closed
    })
    .await;
    let mut misses = 0;
    for key in &keys {
        match client.get(key).await.unwrap() {
            Some(value) => assert_eq!(value, value_of(key).as_str()),
            None => misses += 1,
        }
    }
    assert!(
        (30..200).contains(&misses),
        "one node's share misses: {misses}"
    );
    nodes[1].restart().unwrap();
    eventually("its breaker closes", || {
        client.nodes()[1].state == BreakerState::Closed
    })
    .await;
    for key in &keys {
        client.set(key, value_of(key), Ttl::NEVER).await.unwrap();
    }
    let many = client.get_many(&keys).await;
    assert!(
        many.outcomes()
            .iter()
            .all(|outcome| matches!(outcome, Outcome::Hit(_)))
    );
}

/// 14 of FAULTS: a node without memory refuses writes, answers reads, and is not to blame.
#[tokio::test]
async fn a_full_node_refuses_writes_and_serves_reads() {
    let node = Memcached::spawn(&["-M", "-m", "8"]).unwrap();
    let client = Client::builder()
        .nodes([node.address()])
        .executor(Executor::current())
        .timeout(Duration::from_secs(2))
        .attempt_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    client.set("small", "v", Ttl::NEVER).await.unwrap();
    let mut refusals = 0;
    for n in 0..200 {
        let stored = client
            .set(format!("k{n}"), vec![b'x'; 100_000], Ttl::NEVER)
            .await;
        if let Err(error) = stored {
            assert_eq!(error.kind(), ErrorKind::Server, "{error}");
            refusals += 1;
        }
    }
    assert!(refusals > 0);
    assert_eq!(client.get("small").await.unwrap().unwrap(), "v");
    assert_eq!(client.nodes()[0].state, BreakerState::Closed);
    // Over the server's limit on items: it says so, and has deleted the old value.
    let client = Client::builder()
        .nodes([node.address()])
        .max_value_size(8 << 20)
        .timeout(Duration::from_secs(2))
        .attempt_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    let error = client
        .set("small", vec![b'x'; 2 << 20], Ttl::NEVER)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ValueTooLarge);
    assert_eq!(client.get("small").await.unwrap(), None);
}

/// 10 of FAULTS: a node with all the connections it can take says so; that is not death.
#[tokio::test]
async fn a_node_at_its_connection_limit_is_not_condemned() {
    let node = Memcached::spawn(&["-c", "40", "-t", "1"]).unwrap();
    let mut held = Vec::new();
    loop {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(node.socket_address())
            .await
            .unwrap();
        let _ = stream.write_all(b"version\r\n").await;
        let mut reply = [0; 64];
        match stream.read(&mut reply).await {
            Ok(length) if reply[..length].starts_with(b"VERSION") => held.push(stream),
            _ => break,
        }
    }
    let client = Client::builder()
        .nodes([node.address()])
        .timeout(Duration::from_secs(2))
        .attempt_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    let error = client.get("k").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionFailed, "{error}");
    assert_eq!(client.nodes()[0].state, BreakerState::Closed);
    held.clear();
    let until = tokio::time::Instant::now() + PATIENCE;
    while client.get("k").await.is_err() {
        assert!(tokio::time::Instant::now() < until);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
