//! Any tower layer fits: around the client, around a node, or in a stack built by hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt as _;
use tokio::time::Instant;
use tower::limit::ConcurrencyLimitLayer;
use tower::load_shed::LoadShedLayer;
use tower::timeout::TimeoutLayer;
use tower::util::MapRequestLayer;
use tower::{BoxError, Layer as _, ServiceBuilder, ServiceExt as _, service_fn};
use tower_memcached::{
    BoxedService, BreakerState, BulkheadLayer, Client, Cluster, ClusterSettings, Error, ErrorKind,
    Executor, FailureMode, GroupLayer, Key, KillSwitch, Loader, Node, NodeLayer, NodeSettings,
    NodeSpec, Operation, Payload, Pipelined, PipelinedSettings, ReadThroughLayer, Request,
    Response, Sent, SystemConnector, Ttl, Value,
};

use crate::support::{addresses, eventually, keys_of, patient, server, servers, state};

fn is_send_and_sync<T: Clone + Send + Sync + 'static>(_: &T) {}

#[tokio::test]
async fn towers_own_layers_fit_around_the_client_and_around_a_node() {
    let servers = servers(2).await;
    let client = patient(&servers)
        .layer(LoadShedLayer::new())
        .layer(ConcurrencyLimitLayer::new(100))
        .layer(TimeoutLayer::new(Duration::from_secs(1)))
        .node_layer(ConcurrencyLimitLayer::new(10))
        .node_layer(TimeoutLayer::new(Duration::from_secs(1)))
        .build()
        .unwrap();
    is_send_and_sync(&client);
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    let spawned = tokio::spawn({
        let client = client.clone();
        async move { client.get("k").await }
    });
    assert_eq!(spawned.await.unwrap().unwrap().unwrap(), "v");
    assert_eq!(client.get_many(["k", "l"]).await.into_hits().len(), 1);
    let boxed: Client<BoxedService> = client.boxed();
    is_send_and_sync(&boxed);
    assert_eq!(boxed.get("k").await.unwrap().unwrap(), "v");
    assert_eq!(boxed.nodes().len(), 2);
}

#[tokio::test]
async fn the_layer_added_first_is_the_outermost() {
    let server = server().await;
    let rename = |from: &'static str, to: &'static str| {
        MapRequestLayer::new(move |mut request: Request| {
            if let Operation::Get { key, .. } = request.operation_mut()
                && key.as_bytes() == from.as_bytes()
            {
                *key = Key::new(to).unwrap();
            }
            request
        })
    };
    server.insert("third", "found");
    let client = patient(std::slice::from_ref(&server))
        .layer(rename("first", "second"))
        .node_layer(rename("second", "third"))
        .build()
        .unwrap();
    assert_eq!(client.get("first").await.unwrap().unwrap(), "found");
    let client = patient(std::slice::from_ref(&server))
        .layer(rename("first", "second"))
        .layer(rename("second", "third"))
        .build()
        .unwrap();
    assert_eq!(client.get("first").await.unwrap().unwrap(), "found");
}

#[tokio::test]
async fn a_layers_own_error_keeps_its_source_and_ours_stay_ours() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .layer(
            ServiceBuilder::new().map_result(|outcome: Result<Response, Error>| match outcome {
                Ok(_) => Err::<Response, BoxError>("forbidden".into()),
                Err(error) => Err(error.into()),
            }),
        )
        .build()
        .unwrap();
    let error = client.get("k").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Layer);
    assert_eq!(
        std::error::Error::source(&error).unwrap().to_string(),
        "forbidden"
    );
    let large = vec![0; 2 << 20];
    let error = client.set("k", large, Ttl::NEVER).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ValueTooLarge);
}

#[tokio::test]
async fn a_response_that_does_not_fit_is_an_error() {
    let odd = service_fn(|_: Request| async { Ok::<_, Error>(Response::Stored(true)) });
    let client = Client::from_service(odd);
    assert_eq!(client.get("k").await.unwrap_err().kind(), ErrorKind::Layer);
    let many = client.get_many(["a", "b"]).await;
    assert_eq!(many.errors().count(), 2);
    assert!(client.nodes().is_empty());
}

#[tokio::test]
async fn a_stack_can_be_built_by_hand() {
    let servers = servers(2).await;
    let executor = Executor::current();
    let transport = |spec: &NodeSpec| {
        Pipelined::new(
            spec_address(spec),
            PipelinedSettings::default().attempt_timeout(Duration::from_secs(1)),
            Arc::new(SystemConnector::new()),
            &Executor::current(),
        )
        .unwrap()
    };
    let settings = NodeSettings::default().attempt_timeout(Duration::from_secs(1));
    let specs: Vec<_> = addresses(&servers)
        .iter()
        .map(|address| NodeSpec::new(address).unwrap())
        .collect();
    let cluster = Cluster::new(
        ClusterSettings::default().failure_mode(FailureMode::Cancel),
        specs,
        &executor,
        move |spec| {
            let name = spec.name().clone();
            Node::new(
                name,
                transport(spec),
                settings.clone(),
                &Executor::current(),
            )
            .unwrap()
        },
    )
    .unwrap();
    let client = Client::from_service(cluster)
        .with_timeout(Duration::from_secs(5))
        .unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    assert_eq!(client.get("k").await.unwrap().unwrap(), "v");
    assert_eq!(client.version().await.unwrap().len(), 2);

    // A single node without a cluster is a client, too.
    let transport = Pipelined::new(
        addresses(&servers)[0].parse().unwrap(),
        PipelinedSettings::default().attempt_timeout(Duration::from_secs(1)),
        Arc::new(SystemConnector::new()),
        &executor,
    )
    .unwrap();
    let layer = NodeLayer::new("only", NodeSettings::default(), executor).unwrap();
    let node = ServiceBuilder::new().layer(layer).service(transport);
    let client = Client::from_service(node);
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    assert_eq!(
        client.version().await.unwrap()[0].result.as_ref().unwrap(),
        "1.6.18"
    );
}

fn spec_address(spec: &NodeSpec) -> tower_memcached::Address {
    spec.address().clone()
}

/// A node around any service is timed, judged and probed through it.
#[tokio::test(start_paused = true)]
async fn a_node_around_any_service_opens_on_its_timeouts_and_closes_by_probes() {
    let hangs = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let stored = Arc::new(std::sync::Mutex::new(None::<Payload>));
    let service = service_fn({
        let (hangs, stored) = (hangs.clone(), stored.clone());
        move |request: Request| {
            let (hangs, stored) = (hangs.clone(), stored.clone());
            async move {
                if hangs.load(Ordering::Relaxed) {
                    std::future::pending::<()>().await;
                }
                Ok::<_, BoxError>(match request.into_operation() {
                    Operation::Store { payload, .. } => {
                        *stored.lock().unwrap() = Some(payload);
                        Response::Stored(true)
                    }
                    _ => Response::Value(stored.lock().unwrap().clone().map(Value::from)),
                })
            }
        }
    });
    let settings = NodeSettings::default();
    let node = Node::new("mock", service, settings, &Executor::current()).unwrap();
    let get = || {
        let operation = Operation::Get {
            key: Key::new("k").unwrap(),
            with_cas: false,
        };
        node.clone().oneshot(Request::new(operation))
    };
    for _ in 0..3 {
        let error = get().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    }
    assert!(node.is_open());
    assert_eq!(get().await.unwrap_err().kind(), ErrorKind::NodeUnavailable);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(node.is_open(), "its probes hang, too");
    hangs.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!node.is_open());
    assert!(get().await.is_ok());
    assert_eq!(node.status().in_flight, 0);
}

#[tokio::test]
async fn a_group_has_its_own_keys_limit_and_kill_switch() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server)).build().unwrap();
    let switch = KillSwitch::default();
    let group = |name: &'static str| {
        GroupLayer::new(name)
            .prefix(format!("{name}:"))
            .max_in_flight(2)
            .kill_switch(switch.clone())
    };
    let (users, carts) = (
        client.layer(group("users")),
        client.layer(GroupLayer::new("carts")),
    );
    users.set("1", "ada", Ttl::NEVER).await.unwrap();
    assert_eq!(server.peek("users:1").unwrap(), "ada");
    let long = "k".repeat(248);
    let many = users.get_many(["1", &long, "2"]).await;
    assert_eq!(many.outcomes()[0].value().unwrap(), &"ada");
    assert_eq!(
        many.errors().map(|(place, _)| place).collect::<Vec<_>>(),
        [1]
    );
    assert_eq!(
        users.get(&long).await.unwrap_err().kind(),
        ErrorKind::InvalidKey
    );

    server.stall();
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            tokio::spawn({
                let users = users.clone();
                async move { users.get("1").await }
            })
        })
        .collect();
    let mut shed = 0;
    crate::support::eventually("the third is shed", || {
        shed = waiting.iter().filter(|task| task.is_finished()).count();
        shed == 1
    })
    .await;
    server.resume();
    let mut outcomes = Vec::new();
    for task in waiting {
        outcomes.push(task.await.unwrap());
    }
    let refused: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    assert_eq!(refused.len(), 1);
    assert!(refused[0].is_overloaded() && refused[0].to_string().contains("users"));

    switch.throw();
    assert_eq!(users.get("1").await.unwrap(), None);
    assert_eq!(carts.get("1").await.unwrap(), None, "another group goes on");
    let load = || async { Ok::<_, BoxError>(Some("from the database")) };
    let value = users
        .get_or_load("1", Ttl::NEVER, load)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(value, "from the database");
    switch.reset();
    assert_eq!(users.get("1").await.unwrap().unwrap(), "ada");
}

struct Database(Arc<AtomicUsize>);

impl Loader for Database {
    async fn load(&self, key: &Key) -> Result<Option<Payload>, BoxError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(5)).await;
        match key.as_bytes() {
            b"broken" => Err("no such table".into()),
            b"none" => Ok(None),
            key => Ok(Some(key.into())),
        }
    }
}

#[tokio::test]
async fn a_shared_loader_under_a_whole_stack() {
    let server = server().await;
    let loads = Arc::new(AtomicUsize::new(0));
    // A look-up that ran out of time would be no reason to put anything back.
    let layer = ReadThroughLayer::new(Database(loads.clone()), Ttl::secs(60));
    let layer = layer.timeout(Duration::from_secs(5)).unwrap();
    let client = patient(std::slice::from_ref(&server))
        .layer(layer)
        .build()
        .unwrap();
    let gets = futures::future::join_all((0..100).map(|_| client.get("k")));
    assert!(
        gets.await
            .into_iter()
            .all(|value| value.unwrap().unwrap() == "k")
    );
    assert_eq!(loads.load(Ordering::Relaxed), 1);
    eventually("it is put back", || {
        server.peek("k").is_some_and(|value| value == "k")
    })
    .await;
    assert_eq!(client.get("none").await.unwrap(), None);
    let error = client.get("broken").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Load);
    assert_eq!(
        std::error::Error::source(&error).unwrap().to_string(),
        "no such table"
    );
}

/// A service that answers each request once it is told to.
#[derive(Clone, Default)]
struct OneByOne {
    asked: Arc<AtomicUsize>,
    may_answer: Arc<tokio::sync::Notify>,
}

impl tower::Service<Request> for OneByOne {
    type Response = Response;
    type Error = Error;
    type Future = futures::future::BoxFuture<'static, Result<Response, Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request) -> Self::Future {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let may_answer = self.may_answer.clone();
        Box::pin(async move {
            may_answer.notified().await;
            Ok(Response::Value(None))
        })
    }
}

fn get() -> Request {
    Request::new(Operation::Get {
        key: Key::new("k").unwrap(),
        with_cas: false,
    })
}

#[tokio::test(start_paused = true)]
async fn a_groups_requests_wait_in_its_queue_within_its_deadline_and_their_own() {
    let below = OneByOne::default();
    let limits = GroupLayer::new("users").max_in_flight(1).max_queue(2);
    let group = limits.clone().layer(below.clone());
    let call = |request| tokio::spawn(group.clone().oneshot(request));

    // They have their turn one after the other.
    let calls = [call(get()), call(get()), call(get())];
    tokio::task::yield_now().await;
    let error = call(get()).await.unwrap().unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::Overloaded, Sent::No)
    );
    assert_eq!(
        error.to_string(),
        "overloaded: the group \"users\" has all the requests it may have"
    );
    for (answered, call) in calls.into_iter().enumerate() {
        assert_eq!(below.asked.load(Ordering::Relaxed), answered + 1);
        below.may_answer.notify_one();
        assert!(call.await.unwrap().is_ok());
        tokio::task::yield_now().await;
    }

    // Until the bound of the queue, the group's deadline, or the request's.
    let ms = Duration::from_millis;
    let patient = limits.clone().max_wait(Duration::MAX);
    let far = Duration::from_secs(3600);
    for (group, time_left, bound) in [
        (limits.clone(), far, ms(50)),
        (limits.clone().max_wait(ms(7)), far, ms(7)),
        (patient.clone().timeout(ms(20)), far, ms(20)),
        (patient, ms(30), ms(30)),
    ] {
        let group = group.layer(below.clone());
        let mut inside = Box::pin(group.clone().oneshot(get()));
        assert!((&mut inside).now_or_never().is_none());
        let begun = Instant::now();
        let request = get().with_deadline(begun + time_left);
        let error = group.oneshot(request).await.unwrap_err();
        assert_eq!(begun.elapsed(), bound);
        assert_eq!(
            (error.kind(), error.sent()),
            (ErrorKind::Overloaded, Sent::No)
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_waits_in_a_groups_queue_is_not_sent_once_the_kill_switch_is_thrown() {
    let below = OneByOne::default();
    let switch = KillSwitch::default();
    let group = GroupLayer::new("users")
        .max_in_flight(1)
        .max_queue(9)
        .kill_switch(switch.clone())
        .layer(below.clone());
    let call = |request| tokio::spawn(group.clone().oneshot(request));
    let inside = call(get());
    let waits = [call(get()), call(get())];
    tokio::task::yield_now().await;
    switch.throw();
    below.may_answer.notify_one();
    assert!(inside.await.unwrap().is_ok(), "it was sent before");
    for call in waits {
        let answer = call.await.unwrap().unwrap();
        assert!(matches!(answer, Response::Value(None)), "{answer:?}");
    }
    assert_eq!(below.asked.load(Ordering::Relaxed), 1);
    switch.reset();
    below.may_answer.notify_one();
    assert!(call(get()).await.unwrap().is_ok(), "the place came back");
}

#[tokio::test]
async fn a_bulkhead_fits_around_the_client_and_around_a_node() {
    let servers = servers(2).await;
    let client = patient(&servers)
        .layer(BulkheadLayer::new(2).name("all"))
        .node_layer(BulkheadLayer::new(1).name("one node"))
        .build()
        .unwrap();
    is_send_and_sync(&client);
    let keys = keys_of(&servers, 0, 2);
    client.set(&keys[0], "v", Ttl::NEVER).await.unwrap();
    assert_eq!(client.get(&keys[0]).await.unwrap().unwrap(), "v");

    servers[0].stall();
    let get = |key: &Key| {
        let (client, key) = (client.clone(), key.clone());
        tokio::spawn(async move { client.get(&key).await })
    };
    let first = get(&keys[0]);
    eventually("it has been asked", || client.nodes()[0].in_flight == 1).await;
    let error = get(&keys[1]).await.unwrap().unwrap_err();
    assert!(error.is_overloaded(), "{error}");
    assert!(error.to_string().contains("the bulkhead \"one node\""));
    assert_eq!(state(&client, 0), BreakerState::Closed);
    servers[0].resume();
    assert_eq!(first.await.unwrap().unwrap().unwrap(), "v");
}
