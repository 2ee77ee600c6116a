//! Sockets that are full, buffer, break, or go and come: what the connection's task makes of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufWriter, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tower_memcached::testing::{Memcached, Server};
use tower_memcached::{
    Address, BoxStream, Client, Connecting, Connector, ErrorKind, Executor, FailureMode, Protocol,
    Sent, Ttl,
};

use crate::support::{PATIENCE, eventually, patient, server, until_closed, until_open};

/// Connects to pipes of a few kilobytes. It greets for the server, and hands the server's end to
/// the test, which may read it when it likes, or not.
struct Pipe(mpsc::UnboundedSender<DuplexStream>);

impl Connector for Pipe {
    fn connect(&self, _: &Address) -> Connecting {
        let ends = self.0.clone();
        Box::pin(async move {
            let (ours, mut theirs) = tokio::io::duplex(4096);
            tokio::spawn(async move {
                let mut greeting = [0; 9];
                theirs.read_exact(&mut greeting).await.unwrap();
                theirs.write_all(b"VERSION 1.6.18\r\n").await.unwrap();
                let _ = ends.send(theirs);
            });
            Ok(Box::new(ours) as BoxStream)
        })
    }
}

fn piped(attempt: Duration) -> (Client, mpsc::UnboundedReceiver<DuplexStream>) {
    let (sender, ends) = mpsc::unbounded_channel();
    let client = Client::builder()
        .nodes(["piped"])
        .connector(Pipe(sender))
        .protocol(Protocol::Meta)
        .executor(Executor::current())
        .max_attempts(1)
        .timeout(Duration::from_secs(5))
        .attempt_timeout(attempt)
        .stall_timeout(Duration::from_secs(4))
        .build()
        .unwrap();
    (client, ends)
}

#[tokio::test]
async fn what_waits_behind_a_full_socket_ends_in_time_and_is_never_sent() {
    let (client, mut ends) = piped(Duration::from_millis(100));
    let large = vec![b'x'; 500_000];
    let set = client.set("large", large, Ttl::NEVER);
    let behind = async {
        sleep(Duration::from_millis(30)).await;
        let started = Instant::now();
        let error = client.increment("n", 1).await.unwrap_err();
        assert!(
            started.elapsed() < Duration::from_secs(2),
            "{:?}",
            started.elapsed()
        );
        error
    };
    let (set, error) = tokio::join!(set, behind);
    assert_eq!(set.unwrap_err().sent(), Sent::Maybe, "half of it has left");
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::Timeout, Sent::No),
        "{error}"
    );
    // The socket drains; what was said to be unsent must not be in it.
    let server = Server::new();
    server.insert("n", "1");
    tokio::spawn(server.serve(ends.recv().await.unwrap()));
    // Its doubt is removed with it; but it has come.
    let arrived = || {
        let requests = server.requests();
        requests.iter().any(|line| line.starts_with(b"ms large"))
    };
    eventually("the large value arrives", arrived).await;
    client.get("k").await.unwrap();
    assert_eq!(server.peek("n").unwrap(), "1");
}

#[tokio::test]
async fn dropping_the_client_closes_a_full_socket() {
    let (client, mut ends) = piped(Duration::from_millis(100));
    assert!(
        client
            .set("k", vec![b'x'; 500_000], Ttl::NEVER)
            .await
            .is_err()
    );
    let mut end = ends.recv().await.unwrap();
    let started = Instant::now();
    drop(client);
    let mut rest = Vec::new();
    end.read_to_end(&mut rest).await.unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn a_stream_that_buffers_is_flushed() {
    struct Buffered(Server);
    impl Connector for Buffered {
        fn connect(&self, _: &Address) -> Connecting {
            let server = self.0.clone();
            Box::pin(async move {
                let (ours, theirs) = tokio::io::duplex(4096);
                tokio::spawn(server.serve(theirs));
                Ok(Box::new(BufWriter::new(ours)) as BoxStream)
            })
        }
    }
    let client = Client::builder()
        .nodes(["buffered"])
        .connector(Buffered(Server::new()))
        .timeout(Duration::from_secs(5))
        .attempt_timeout(Duration::from_secs(2))
        .build()
        .unwrap();
    for size in [10, 5_000, 100_000] {
        let value = vec![b'x'; size];
        client.set("k", value.clone(), Ttl::NEVER).await.unwrap();
        assert_eq!(client.get("k").await.unwrap().unwrap(), &value[..]);
    }
}

#[tokio::test]
async fn a_server_that_greets_and_hangs_up_is_not_dialled_without_end() {
    struct HangsUp(Arc<AtomicUsize>);
    impl Connector for HangsUp {
        fn connect(&self, _: &Address) -> Connecting {
            self.0.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                let (ours, mut theirs) = tokio::io::duplex(4096);
                tokio::spawn(async move {
                    let mut greeting = [0; 9];
                    let _ = theirs.read_exact(&mut greeting).await;
                    let _ = theirs.write_all(b"VERSION 1.6.18\r\n").await;
                });
                Ok(Box::new(ours) as BoxStream)
            })
        }
    }
    let dials = Arc::new(AtomicUsize::new(0));
    let client = Client::builder()
        .nodes(["hangs-up"])
        .connector(HangsUp(dials.clone()))
        .executor(Executor::current())
        .build()
        .unwrap();
    let until = Instant::now() + Duration::from_millis(500);
    while Instant::now() < until {
        let _ = client.get("k").await;
        sleep(Duration::from_millis(1)).await;
    }
    // Half a second of backoff from 50 ms is a handful; without it there are hundreds.
    let dials = dials.load(Ordering::Relaxed);
    assert!(dials < 40, "{dials} dials");
}

#[tokio::test]
async fn all_connections_come_back_after_an_outage() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .connections(4)
        .build()
        .unwrap();
    let all_up = async || {
        let until = Instant::now() + PATIENCE;
        while client.nodes()[0].connections < 4 {
            assert!(Instant::now() < until, "{:?}", client.nodes());
            let _ = client.get("k").await;
            sleep(Duration::from_millis(1)).await;
        }
    };
    all_up().await;
    server.refuse();
    until_open(&client, 0).await;
    server.accept().unwrap();
    until_closed(&client, 0).await;
    all_up().await;
}

/// A stall shorter than any time-out, while the socket is full: what waits in our buffers goes out
/// when it is over, so nothing of it may be called unsent and sent again.
#[tokio::test]
async fn an_increment_behind_a_full_socket_is_never_counted_twice() {
    let node = Memcached::spawn(&["-m", "256"]).unwrap();
    let client = Client::builder()
        .nodes([node.address()])
        .failure_mode(FailureMode::Retry)
        .timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    let value = vec![b'x'; 1_000_000];
    for round in 0..10 {
        let counter = format!("n{round}");
        eventually_set(&client, &counter).await;
        node.stop().unwrap();
        let sets = (0..12).map(|n| client.set(format!("k{n}"), value.clone(), Ttl::secs(60)));
        let resume = async {
            sleep(Duration::from_millis(45)).await;
            node.cont().unwrap();
        };
        let increment = client.increment(&counter, 1);
        let (_, counted, ()) = tokio::join!(join_all(sets), increment, resume);
        let until = Instant::now() + PATIENCE;
        let now = loop {
            assert!(Instant::now() < until);
            if let Ok(Some(value)) = client.get(&counter).await {
                break value;
            }
        };
        let most = if counted.is_ok() {
            &["1"][..]
        } else {
            &["0", "1"]
        };
        assert!(
            most.iter().any(|value| now == *value),
            "{counted:?} and {now:?}"
        );
    }
}

async fn eventually_set(client: &Client, key: &str) {
    let until = Instant::now() + PATIENCE;
    while client.set(key, "0", Ttl::secs(60)).await.is_err() {
        assert!(Instant::now() < until);
    }
}
