//! Servers, and callers, that do what they must not: never a wrong value, never a hang.

use std::time::Duration;

use futures::FutureExt as _;
use futures::future::join_all;
use tower_memcached::testing::Server;
use tower_memcached::{Client, ErrorKind, Key, Sent, Ttl};

use crate::support::{eventually, patient, server};

/// A client that makes one attempt, and a server that holds a value for each key.
async fn pair() -> (Client, Server) {
    let server = server().await;
    for key in ["a", "b", "c"] {
        server.insert(key, format!("value of {key}"));
    }
    let client = patient(std::slice::from_ref(&server))
        .max_attempts(1)
        .build()
        .unwrap();
    assert_eq!(client.get("a").await.unwrap().unwrap(), "value of a");
    (client, server)
}

/// A reply that must not be taken: the caller gets a protocol error, the connection is replaced,
/// and the next request gets its own value.
async fn refuses(rewrite: impl Fn(&[u8], Vec<u8>) -> Vec<u8> + Send + Sync + 'static) {
    let (client, server) = pair().await;
    let connections = server.connections_accepted();
    // `version` greets each new connection; it is left alone.
    server.rewrite_replies(move |line, reply| match line.starts_with(b"mg") {
        true => rewrite(line, reply),
        false => reply,
    });
    let error = client.get("b").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    assert_eq!(error.sent(), Sent::Maybe);
    assert!(error.node().is_some());
    server.heal().unwrap();
    eventually("a new connection", || {
        server.connections_accepted() > connections
    })
    .await;
    // The replaced connection may be waiting out its backoff.
    loop {
        match client.get("c").await {
            Ok(value) => {
                assert_eq!(value.unwrap(), "value of c");
                break;
            }
            Err(error) => {
                assert_ne!(error.kind(), ErrorKind::Timeout, "{error}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

#[tokio::test]
async fn a_reply_for_another_request_is_refused() {
    refuses(|_, reply| {
        let text = String::from_utf8(reply).unwrap();
        let (before, after) = text.split_once(" O").unwrap();
        let rest = after.split_once('\r').unwrap().1;
        format!("{before} O4000\r{rest}").into_bytes()
    })
    .await;
}

#[tokio::test]
async fn a_reply_for_another_key_is_refused() {
    refuses(|line, _| {
        let line = String::from_utf8_lossy(line).into_owned();
        let opaque = line.rsplit_once(" O").unwrap().1;
        format!("VA 10 f0 kother O{opaque}\r\nvalue of x\r\n").into_bytes()
    })
    .await;
}

#[tokio::test]
async fn a_reply_without_its_opaque_is_refused() {
    refuses(|_, _| b"VA 10 f0\r\nvalue of x\r\n".to_vec()).await;
}

#[tokio::test]
async fn a_value_of_2_to_the_31_is_refused_before_it_is_allocated() {
    refuses(|_, _| b"VA 2147483648 f0 O2\r\n".to_vec()).await;
}

#[tokio::test]
async fn a_line_without_end_is_refused() {
    refuses(|_, _| vec![b'x'; 100_000]).await;
}

#[tokio::test]
async fn something_that_is_not_memcached_is_refused() {
    refuses(|_, _| b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n\r\n".to_vec()).await;
}

#[tokio::test]
async fn a_double_reply_ends_the_connection_and_not_the_answer() {
    let (client, server) = pair().await;
    server.rewrite_replies(|line, reply| match line.starts_with(b"mg") {
        true => reply.repeat(2),
        false => reply,
    });
    let connections = server.connections_accepted();
    assert_eq!(client.get("b").await.unwrap().unwrap(), "value of b");
    eventually("it is replaced", || {
        server.connections_accepted() > connections
    })
    .await;
}

#[tokio::test]
async fn a_reply_nobody_asked_for_ends_the_connection() {
    let (client, server) = pair().await;
    for unsolicited in [
        "VA 10 f0 O2\r\nvalue of x\r\n",
        "EN\r\n",
        "ERROR\r\n",
        "garbage",
    ] {
        let connections = server.connections_accepted();
        let bytes = format!("{unsolicited}\r\n");
        server.unsolicited(bytes);
        eventually("it is replaced", || {
            server.connections_accepted() > connections
        })
        .await;
        eventually("it is up", || client.nodes()[0].connections == 1).await;
        assert_eq!(client.get("b").await.unwrap().unwrap(), "value of b");
    }
}

#[tokio::test]
async fn a_connection_closed_at_any_byte_of_a_reply_never_gives_half_a_value() {
    let whole = "VA 10 f0 O1\r\nvalue of b\r\n".len() + 4;
    for bytes in 0..whole {
        let (client, server) = pair().await;
        server.close_after_bytes(bytes);
        match client.get("b").await {
            Ok(value) => assert_eq!(value.unwrap(), "value of b", "{bytes}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionLost, "{bytes}: {error}");
                assert_eq!(error.sent(), Sent::Maybe);
            }
        }
    }
}

#[tokio::test]
async fn a_server_that_closes_after_its_reply_costs_nothing() {
    let (client, server) = pair().await;
    for _ in 0..20 {
        assert_eq!(client.get("b").await.unwrap().unwrap(), "value of b");
        let connections = server.connections_accepted();
        server.close_connections();
        eventually("it is replaced", || {
            server.connections_accepted() > connections
        })
        .await;
        eventually("it is up", || client.nodes()[0].connections == 1).await;
    }
}

#[tokio::test]
async fn a_dropped_get_does_not_shift_the_replies_of_those_behind_it() {
    let (client, server) = pair().await;
    for round in 0..50 {
        server.stall();
        // Written, then dropped; and dropped before it is even written.
        let mut written = Box::pin(client.get("a"));
        assert!(written.as_mut().now_or_never().is_none());
        for _ in 0..round % 5 {
            tokio::task::yield_now().await;
        }
        drop(written);
        assert!(client.get("a").now_or_never().is_none());
        server.resume();
        let (b, c) = tokio::join!(client.get("b"), client.get("c"));
        assert_eq!(b.unwrap().unwrap(), "value of b");
        assert_eq!(c.unwrap().unwrap(), "value of c");
    }
    assert_eq!(server.connections_accepted(), 1, "over the same connection");
    eventually("nothing is left behind", || {
        client.nodes()[0].in_flight == 0
    })
    .await;
}

#[tokio::test]
async fn a_get_dropped_in_the_queue_is_never_sent() {
    let (client, server) = pair().await;
    let before = server.commands();
    for _ in 0..100 {
        assert!(client.get("a").now_or_never().is_none());
    }
    client.get("b").await.unwrap();
    assert_eq!(server.commands(), before + 1);
}

#[tokio::test]
async fn invalid_keys_never_open_a_socket() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server)).build().unwrap();
    let long = "k".repeat(251);
    for key in ["", "a b", "a\r\nflush_all", "a\0", "tab\t", &long] {
        for error in [
            client.get(key).await.unwrap_err(),
            client.set(key, "v", Ttl::NEVER).await.unwrap_err(),
            client.delete(key).await.unwrap_err(),
            client.increment(key, 1).await.unwrap_err(),
        ] {
            assert_eq!(
                (error.kind(), error.sent()),
                (ErrorKind::InvalidKey, Sent::No)
            );
        }
    }
    let large = vec![b'v'; (1 << 20) + 1];
    let error = client.set("k", large, Ttl::NEVER).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::ValueTooLarge, Sent::No)
    );
    assert!(error.to_string().contains("1048577"), "{error}");
    assert_eq!(server.connections_accepted(), 0);
}

#[tokio::test]
async fn a_stored_value_over_the_limit_is_an_error_and_leaves_the_others_alone() {
    let server = server().await;
    server.insert("large", vec![b'x'; 500_000]);
    server.insert("small", "s");
    let client = patient(std::slice::from_ref(&server))
        .max_value_size(1000)
        .build()
        .unwrap();
    let (large, small) = tokio::join!(client.get("large"), client.get("small"));
    assert_eq!(large.unwrap_err().kind(), ErrorKind::ValueTooLarge);
    assert_eq!(small.unwrap().unwrap(), "s");
    let many = client.get_many(["large", "small"]).await;
    assert_eq!(many.errors().count(), 1);
    assert_eq!(many.get("small").unwrap().value().unwrap(), &"s");
    assert_eq!(server.connections_accepted(), 1);
}

#[tokio::test]
async fn a_full_queue_is_an_immediate_error_and_all_is_well_after() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .max_in_flight(10)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.stall();
    let mut waiting: Vec<_> = (0..10).map(|_| Box::pin(client.get("k"))).collect();
    for get in &mut waiting {
        assert!(get.as_mut().now_or_never().is_none());
    }
    let error = client.get("k").now_or_never().unwrap().unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::Overloaded, Sent::No)
    );
    server.resume();
    for get in join_all(waiting).await {
        assert_eq!(get.unwrap(), None);
    }
    assert_eq!(client.get("k").await.unwrap(), None);
}

#[tokio::test]
async fn writes_larger_than_any_buffer_pass_while_large_replies_come_in() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server)).build().unwrap();
    let value = |n: usize| vec![b'a' + (n % 26) as u8; 900_000];
    for n in 0..8 {
        client
            .set(format!("r{n}"), value(n), Ttl::NEVER)
            .await
            .unwrap();
    }
    // Both directions at once: neither may wait for the other.
    let traffic = (0..8).map(|n| {
        let client = client.clone();
        async move {
            let set = client.set(format!("w{n}"), value(n), Ttl::NEVER);
            let (set, get) = tokio::join!(set, client.get(format!("r{n}")));
            set.unwrap();
            assert_eq!(get.unwrap().unwrap(), &value(n)[..]);
        }
    });
    join_all(traffic).await;
    assert_eq!(
        server
            .peek(Key::new("w7").unwrap().as_bytes())
            .unwrap()
            .len(),
        900_000
    );
}
