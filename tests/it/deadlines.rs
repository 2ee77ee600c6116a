//! Every call ends by its deadline, whoever is late.

use std::future::pending;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use tokio::time::Instant;
use tower::ServiceBuilder;
use tower::service_fn;
use tower_memcached::{
    Address, Client, Connecting, Connector, ErrorKind, Executor, Request, Response, Result, Sent,
    SystemConnector, Ttl,
};

use crate::support::{addresses, servers};

const TIMEOUT: Duration = Duration::from_millis(100);

/// Honest slack for a busy machine, and far below what would be noticed as a hang.
const SLACK: Duration = Duration::from_secs(2);

async fn ends_in_time<T>(call: impl Future<Output = Result<T>>) -> tower_memcached::Error {
    let started = Instant::now();
    let error = match call.await {
        Ok(_) => panic!("it succeeded"),
        Err(error) => error,
    };
    let took = started.elapsed();
    assert!(took < TIMEOUT + SLACK, "{took:?}: {error}");
    error
}

#[tokio::test]
async fn with_a_server_that_never_answers() {
    let servers = servers(1).await;
    for executor in [Executor::current(), Executor::default()] {
        let client = Client::builder()
            .nodes(addresses(&servers))
            .executor(executor)
            .build()
            .unwrap();
        servers[0].stall();
        ends_in_time(client.get("k")).await;
        ends_in_time(client.set("k", "v", Ttl::NEVER)).await;
        ends_in_time(client.increment("k", 1)).await;
        let many = client.get_many(["a", "b"]).await;
        assert_eq!(many.errors().count(), 2);
        let answers = client.stats().await.unwrap();
        assert!(answers[0].result.is_err());
        servers[0].resume();
    }
}

#[tokio::test]
async fn with_replies_that_drip_in_byte_by_byte() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut request = [0; 1024];
                let mut replies = 0;
                while let Ok(1..) = stream.read(&mut request).await {
                    replies += 1;
                    if replies == 1 {
                        let _ = stream.write_all(b"VERSION 1.6.18\r\n").await;
                        continue;
                    }
                    // A byte each 20 ms: never silent long enough to be stalled.
                    for byte in b"VA 100 f0 O1\r\n".iter().chain([b'x'; 100].iter()) {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        if stream.write_all(&[*byte]).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    let client = Client::builder()
        .nodes([address.to_string()])
        .build()
        .unwrap();
    let error = ends_in_time(client.get("k")).await;
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
}

#[tokio::test]
async fn with_a_layer_that_is_never_ready_or_never_answers() {
    let never_ready = ServiceBuilder::new()
        .concurrency_limit(0)
        .service(service_fn(|_: Request| async {
            Ok::<_, tower::BoxError>(Response::Flushed)
        }));
    let client = Client::from_service(never_ready);
    let error = ends_in_time(client.get("k")).await;
    assert_eq!((error.kind(), error.sent()), (ErrorKind::Timeout, Sent::No));
    let never_answers =
        service_fn(|_: Request| async { pending::<Result<Response, tower::BoxError>>().await });
    let client = Client::from_service(never_answers);
    let error = ends_in_time(client.get("k")).await;
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::Timeout, Sent::Maybe)
    );
}

#[tokio::test]
async fn with_a_node_layer_that_never_answers() {
    let servers = servers(1).await;
    let client = Client::builder()
        .nodes(addresses(&servers))
        .node_layer(tower::layer::layer_fn(|_| {
            service_fn(|_: Request| async { pending::<Result<Response, tower::BoxError>>().await })
        }))
        .build()
        .unwrap();
    let error = ends_in_time(client.get("k")).await;
    assert_eq!(error.kind(), ErrorKind::Timeout);
}

/// Blocks the thread that it is called on, which no connector should.
struct Blocking;

impl Connector for Blocking {
    fn connect(&self, address: &Address) -> Connecting {
        let connecting = SystemConnector::new().connect(address);
        Box::pin(async move {
            let (_never, blocked) = std::sync::mpsc::channel::<()>();
            let _ = blocked.recv_timeout(Duration::from_secs(5));
            connecting.await
        })
    }
}

#[tokio::test]
async fn with_a_blocked_io_thread() {
    let servers = servers(1).await;
    let client = Client::builder()
        .nodes(addresses(&servers))
        .connector(Blocking)
        .executor(Executor::dedicated("blocked-io", 1))
        .build()
        .unwrap();
    let error = ends_in_time(client.get("k")).await;
    assert_eq!((error.kind(), error.sent()), (ErrorKind::Timeout, Sent::No));
}

#[tokio::test]
async fn with_a_blocked_io_thread_beside_one_that_finds_the_queue_full() {
    let servers = servers(1).await;
    let client = Client::builder()
        .nodes(addresses(&servers))
        .connector(Blocking)
        .executor(Executor::dedicated("blocked-io", 1))
        .max_value_size(64 << 20)
        .build()
        .unwrap();
    // Two of these are more than a connection's queue takes.
    let large = || vec![0; 40 << 20];
    let first = tokio::spawn({
        let (client, value) = (client.clone(), large());
        async move { ends_in_time(client.set("k", value, Ttl::NEVER)).await }
    });
    tokio::task::yield_now().await;
    // It would have been the first to be released, and does not wait.
    let hurried = client.clone().with_timeout(TIMEOUT / 10).unwrap();
    let error = ends_in_time(hurried.set("k", large(), Ttl::NEVER)).await;
    assert_eq!(error.kind(), ErrorKind::Overloaded, "{error}");
    let error = first.await.unwrap();
    assert_eq!((error.kind(), error.sent()), (ErrorKind::Timeout, Sent::No));
    let error = ends_in_time(client.get("k")).await;
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
}

#[test]
fn with_a_blocked_io_thread_in_a_runtime_that_keeps_no_time() {
    let client = Client::builder()
        .nodes(["127.0.0.1:1"])
        .connector(Blocking)
        .executor(Executor::dedicated("blocked-io", 1))
        .build()
        .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let runtime = runtime.unwrap();
    for _ in 0..2 {
        let started = Instant::now();
        let get = AssertUnwindSafe(|| runtime.block_on(client.get("k")));
        assert!(catch_unwind(get).is_err(), "tokio panics there");
        assert!(started.elapsed() < TIMEOUT + SLACK);
    }
}

#[tokio::test]
async fn with_a_name_that_resolves_to_nothing_that_answers() {
    // 192.0.2.0/24 is reserved for documentation; nothing is sent beyond this machine when the
    // connector never dials.
    struct Nowhere;
    impl Connector for Nowhere {
        fn connect(&self, _: &Address) -> Connecting {
            Box::pin(pending())
        }
    }
    let client = Client::builder()
        .nodes(["192.0.2.1"])
        .connector(Nowhere)
        .build()
        .unwrap();
    let error = ends_in_time(client.get("k")).await;
    assert_eq!(error.sent(), Sent::No);
}

#[tokio::test]
async fn get_many_returns_what_has_come_by_then() {
    let servers = servers(2).await;
    let client = Client::builder()
        .nodes(addresses(&servers))
        .executor(Executor::current())
        .failure_mode(tower_memcached::FailureMode::Cancel)
        .timeout(Duration::from_millis(300))
        .attempt_timeout(Duration::from_millis(300))
        .stall_timeout(Duration::from_secs(5))
        .build()
        .unwrap();
    let good = crate::support::keys_of(&servers, 0, 10);
    let bad = crate::support::keys_of(&servers, 1, 10);
    for server in &servers {
        for key in good.iter().chain(&bad) {
            server.insert(key.as_bytes(), "v");
        }
    }
    client.get_many(good.iter().chain(&bad)).await;
    servers[1].stall();
    let many = client.get_many(good.iter().chain(&bad)).await;
    let errors: Vec<_> = many.errors().map(|(place, _)| place).collect();
    assert_eq!(
        errors,
        (10..20).collect::<Vec<_>>(),
        "the stalled node's keys, and only those"
    );
}
