//! Where two parts meet and each is right by itself: found by reading, kept by these.

use std::future::Future as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Waker};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tower::{Service as _, service_fn};
use tower_memcached::{
    BreakerSettings, BreakerState, Client, Cluster, ClusterSettings, Direction, ErrorKind,
    Executor, FailureMode, GroupLayer, Key, Node, NodeSettings, NodeSpec, Operation, ProbeSettings,
    Request, Response, Sent, Ttl, Value,
};

use crate::support::{
    PATIENCE, addresses, eventually, keys_of, patient, server, servers, state, until_closed,
    until_open,
};

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

#[tokio::test]
async fn the_same_key_in_two_groups_is_loaded_for_each() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server)).build().unwrap();
    let users = client.layer(GroupLayer::new("users").prefix("u:"));
    let prices = client.layer(GroupLayer::new("prices").prefix("p:"));
    let slow = |value: &'static str| {
        move || async move {
            sleep(ms(50)).await;
            Ok::<_, std::io::Error>(Some(value))
        }
    };
    let (user, price) = tokio::join!(
        users.get_or_load("42", Ttl::secs(60), slow("a user")),
        prices.get_or_load("42", Ttl::secs(60), slow("a price")),
    );
    assert_eq!(user.unwrap().unwrap(), "a user");
    assert_eq!(price.unwrap().unwrap(), "a price");
}

#[tokio::test]
async fn what_one_attempt_may_have_done_is_not_forgotten_by_the_next() {
    // Repeated at the same node.
    let one = server().await;
    let client = patient(std::slice::from_ref(&one))
        .failure_mode(FailureMode::Retry)
        .attempt_timeout(ms(30))
        .timeout(ms(300))
        .build()
        .unwrap();
    client.set("k", "old", Ttl::NEVER).await.unwrap();
    one.stall();
    let error = client.set("k", "new", Ttl::NEVER).await.unwrap_err();
    assert_eq!(error.sent(), Sent::Maybe, "{error}");
    one.resume();
    eventually("it is executed after all", || {
        one.peek("k").unwrap() == "new"
    })
    .await;

    // Moved to a node that never got it.
    let two = servers(2).await;
    let client = patient(&two).attempt_timeout(ms(50)).build().unwrap();
    let key = keys_of(&two, 0, 1).remove(0);
    client.set(&key, "old", Ttl::NEVER).await.unwrap();
    two[0].stall();
    two[1].refuse();
    let error = client.set(&key, "new", Ttl::NEVER).await.unwrap_err();
    assert_eq!(error.sent(), Sent::Maybe, "{error}");
}

async fn comes_back(client: &Client, server: &tower_memcached::testing::Server) {
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    server.refuse();
    until_open(client, 0).await;
    server.accept().unwrap();
    until_closed(client, 0).await;
}

#[tokio::test]
async fn a_node_is_readmitted_whatever_the_clients_limits_and_timeouts_are() {
    let server = server().await;
    let node = || {
        let probe = ProbeSettings::default().period(ms(100));
        patient(std::slice::from_ref(&server)).probe(probe)
    };
    comes_back(&node().max_value_size(100).build().unwrap(), &server).await;
    // Four round trips of 40 ms each take longer than many a fixed probe timeout.
    server.delay(ms(40));
    comes_back(&node().attempt_timeout(ms(300)).build().unwrap(), &server).await;
}

#[tokio::test]
async fn a_probe_that_panics_is_followed_by_another() {
    let probes = Arc::new(AtomicUsize::new(0));
    let service = service_fn({
        let probes = probes.clone();
        move |request: Request| {
            let probes = probes.clone();
            async move {
                match request.into_operation() {
                    Operation::Store { .. } => {
                        let probe = probes.fetch_add(1, Ordering::Relaxed);
                        assert!(probe > 0, "the first probe panics");
                        Err(tower::BoxError::from("and the others fail"))
                    }
                    _ => std::future::pending::<Result<Response, _>>().await,
                }
            }
        }
    });
    let settings = NodeSettings::default()
        .attempt_timeout(ms(5))
        .probe(ProbeSettings::default().period(ms(20)));
    let specs = vec![NodeSpec::new("mock").unwrap()];
    let cluster = Cluster::new(
        ClusterSettings::default(),
        specs,
        &Executor::current(),
        move |spec| {
            let name = spec.name().clone();
            Node::new(
                name,
                service.clone(),
                settings.clone(),
                &Executor::current(),
            )
            .unwrap()
        },
    )
    .unwrap();
    let client = Client::from_service(cluster.clone());
    while cluster.nodes()[0].state == BreakerState::Closed {
        assert!(client.get("k").await.is_err());
    }
    // Nobody asks for the node meanwhile.
    eventually("it is probed again", || probes.load(Ordering::Relaxed) >= 3).await;
}

#[tokio::test]
async fn callers_in_a_hurry_do_not_condemn_a_node_that_answers_in_time() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .attempt_timeout(ms(500))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.delay(ms(20));
    let hasty = client.layer(GroupLayer::new("hasty").timeout(ms(3)));
    let until = Instant::now() + ms(1500);
    while Instant::now() < until {
        let error = hasty.get("k").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
    }
    assert_eq!(state(&client, 0), BreakerState::Closed);
    assert_eq!(server.connections_accepted(), 1);
}

#[tokio::test]
async fn waiting_in_a_users_node_layer_is_unsent_and_not_the_nodes_fault() {
    let server = server().await;
    let places = Arc::new(tokio::sync::Semaphore::new(1));
    let limit = tower::limit::GlobalConcurrencyLimitLayer::with_semaphore(places.clone());
    let client = patient(std::slice::from_ref(&server))
        .node_layer(limit)
        .attempt_timeout(ms(30))
        .max_attempts(1)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    let before = server.commands();
    let taken = places.acquire_owned().await.unwrap();
    for _ in 0..5 {
        let error = client.increment("k", 1).await.unwrap_err();
        assert_eq!((error.kind(), error.sent()), (ErrorKind::Timeout, Sent::No));
    }
    assert_eq!(client.nodes()[0].state, BreakerState::Closed);
    assert_eq!(server.commands(), before);
    drop(taken);
    client.get("k").await.unwrap();
}

#[tokio::test]
async fn a_service_that_panics_is_not_asked_again_by_who_polls_on() {
    let calls = Arc::new(AtomicUsize::new(0));
    let service = service_fn({
        let calls = calls.clone();
        move |request: Request| {
            if let Operation::Arithmetic { .. } = request.operation() {
                calls.fetch_add(1, Ordering::Relaxed);
                panic!("it may have been sent by now");
            }
            std::future::pending::<Result<Response, tower::BoxError>>()
        }
    });
    let settings = NodeSettings::default();
    let mut node = Node::new("mock", service, settings, &Executor::current()).unwrap();
    let mut increment = Box::pin(node.call(Request::new(Operation::Arithmetic {
        key: Key::new("k").unwrap(),
        delta: 1,
        direction: Direction::Up,
    })));
    for _ in 0..2 {
        let mut cx = Context::from_waker(Waker::noop());
        let poll = AssertUnwindSafe(|| increment.as_mut().poll(&mut cx).is_ready());
        assert!(catch_unwind(poll).is_err());
    }
    assert_eq!(calls.load(Ordering::Relaxed), 1);
    assert_eq!(node.status().in_flight, 1);
    drop(increment);
    assert_eq!(node.status().in_flight, 0, "its place is given back");
}

#[tokio::test]
async fn a_request_moved_while_the_nodes_change_goes_to_its_keys_new_home() {
    let servers = servers(3).await;
    let client = patient(&servers[..2])
        .attempt_timeout(ms(300))
        .build()
        .unwrap();
    let with_third = [servers[1].clone(), servers[2].clone()];
    let key = keys_of(&servers[..2], 0, 200)
        .into_iter()
        .find(|key| {
            let specs: Vec<_> = addresses(&with_third)
                .iter()
                .map(|address| NodeSpec::new(address).unwrap())
                .collect();
            tower_memcached::Ring::default().node_of(&specs, key) == Some(0)
        })
        .unwrap();
    client.get(&key).await.unwrap();
    servers[0].stall();
    let set = tokio::spawn({
        let (client, key) = (client.clone(), key.clone());
        async move { client.set(&key, "new", Ttl::NEVER).await }
    });
    eventually("it is under way", || client.nodes()[0].in_flight == 1).await;
    client.set_nodes(addresses(&with_third)).unwrap();
    set.await.unwrap().unwrap();
    assert_eq!(client.get(&key).await.unwrap().unwrap(), "new");
    assert_eq!(servers[1].peek(key.as_bytes()).unwrap(), "new");
}

#[tokio::test]
async fn retries_that_are_never_made_cost_nothing() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .attempt_timeout(ms(20))
        // However busy the machine is, it is connected again.
        .connect_timeout(PATIENCE)
        // However many fail, it stays in.
        .breaker(
            BreakerSettings::default()
                .consecutive_timeouts(u32::MAX)
                .failure_rate(101)
                .slow_call_rate(101),
        )
        .probe(ProbeSettings::default().initial_delay(PATIENCE))
        .stall_timeout(PATIENCE)
        .retry_budget(tower_memcached::RetryBudget::new(0, 0))
        .build()
        .unwrap();
    eventually_answers(&client).await;
    server.delay(ms(500));
    // Nowhere to go: not one of these may be paid for.
    for _ in 0..150 {
        let _ = client.get("k").await;
    }
    server.heal().unwrap();
    let client = client.with_timeout(PATIENCE).unwrap();
    eventually_answers(&client).await;
    let mut lost = 0;
    for _ in 0..50 {
        // One that is closed before it has greeted was never made, and the next waits for a while.
        eventually_answers(&client).await;
        server.close_connections();
        if let Err(error) = client.get("k").await {
            lost += u32::from(error.kind() == ErrorKind::ConnectionLost);
        }
    }
    assert_eq!(
        lost, 0,
        "a lost connection is mended while the budget lasts"
    );
}

async fn eventually_answers(client: &Client) {
    let until = Instant::now() + PATIENCE;
    while client.get("k").await.is_err() {
        assert!(Instant::now() < until);
    }
}

#[tokio::test]
async fn a_groups_deadline_holds_over_a_layer_that_does_not_keep_to_it() {
    let hangs =
        service_fn(|_: Request| std::future::pending::<Result<Response, tower::BoxError>>());
    let client = Client::from_service(hangs).with_timeout(PATIENCE).unwrap();
    let group = client.layer(GroupLayer::new("quick").timeout(ms(20)));
    let started = Instant::now();
    assert_eq!(group.get("k").await.unwrap_err().kind(), ErrorKind::Timeout);
    assert!(started.elapsed() < PATIENCE / 2);
}

#[tokio::test]
async fn a_value_on_its_way_to_the_cache_is_not_loaded_again() {
    let loads = Arc::new(AtomicUsize::new(0));
    let slow_writes = service_fn(|request: Request| async move {
        Ok::<_, tower::BoxError>(match request.into_operation() {
            Operation::Store { .. } => {
                sleep(ms(200)).await;
                Response::Stored(true)
            }
            _ => Response::Value(None::<Value>),
        })
    });
    let client = Client::from_service(slow_writes)
        .with_timeout(PATIENCE)
        .unwrap();
    let get = || {
        let (client, loads) = (client.clone(), loads.clone());
        tokio::spawn(async move {
            let load = || async {
                loads.fetch_add(1, Ordering::Relaxed);
                sleep(ms(50)).await;
                Ok::<_, std::io::Error>(Some("v"))
            };
            client.get_or_load("k", Ttl::NEVER, load).await
        })
    };
    let (leader, waiter) = (get(), get());
    assert_eq!(waiter.await.unwrap().unwrap().unwrap(), "v");
    // The waiter has left, and the value is still being written.
    assert_eq!(get().await.unwrap().unwrap().unwrap(), "v");
    assert_eq!(leader.await.unwrap().unwrap().unwrap(), "v");
    assert_eq!(loads.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn shutdown_ends_the_probes_too() {
    let server = server().await;
    let probe = ProbeSettings::default().period(ms(50));
    let client = patient(std::slice::from_ref(&server))
        .probe(probe)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.refuse();
    until_open(&client, 0).await;
    client.shutdown(Duration::ZERO).await;
    server.accept().unwrap();
    let before = server.connections_accepted();
    // Several periods in which a probe would have come.
    sleep(ms(500)).await;
    assert_eq!(server.connections_accepted(), before);
    let error = client.set_nodes(["127.0.0.1"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shutdown);
}

#[test]
fn endless_timeouts_and_no_runtime_are_no_reason_to_panic() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(server());
    let client = Client::builder()
        .nodes([server.address().unwrap().to_string()])
        .timeout(Duration::MAX)
        .attempt_timeout(Duration::MAX)
        .load_timeout(Duration::MAX)
        .build()
        .unwrap();
    futures::executor::block_on(async {
        let load = || async { Ok::<_, std::io::Error>(Some("v")) };
        let value = client.get_or_load("k", Ttl::secs(60), load).await.unwrap();
        assert_eq!(value.unwrap(), "v");
        client.shutdown(Duration::MAX).await;
    });
}
