//! The end of a client: what is under way ends by itself, what does not is ended and reported, and
//! nothing is left.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use tower::limit::ConcurrencyLimitLayer;
use tower::{Layer as _, Service, ServiceExt as _, service_fn};
use tower_memcached::testing::{Flow, Memcached, Proxy, Server, Toxics};
use tower_memcached::{
    Address, BreakerSettings, BreakerState, Client, ClientBuilder, Cluster, ClusterSettings,
    Connecting, Connector, Error, ErrorKind, Executor, FailureMode, GroupLayer, JournalSettings,
    Key, LoadGuard, LoadLimits, Loader, MultiGet, Node, NodeSettings, NodeSpec, Operation, Payload,
    ProbeSettings, ReadThroughLayer, Request, Response, Sent, ShutdownReport, SystemConnector, Ttl,
};

use crate::read_through::{BoxError, TTL, Table, client, exact, ms, secs};
use crate::support::{
    PATIENCE, eventually, in_memory, keys_of, patient, server, servers, state, until_open,
};

/// In this process, whose time-outs nothing here reaches by itself.
fn unhurried(servers: &[Server]) -> ClientBuilder {
    in_memory(servers)
        .timeout(secs(60))
        .attempt_timeout(secs(50))
        .stall_timeout(secs(50))
        .read_through(exact())
}

fn one(server: &Server) -> &[Server] {
    std::slice::from_ref(server)
}

fn kinds<T>(outcome: Result<T, Error>) -> Option<ErrorKind> {
    outcome.err().map(|error| error.kind())
}

fn all_shut_down(many: &MultiGet, count: usize) {
    assert_eq!(many.errors().count(), count);
    for (_, error) in many.errors() {
        assert_eq!(error.kind(), ErrorKind::Shutdown, "{error}");
    }
}

/// A clean report, but for what is said here.
fn report(of: impl FnOnce(&mut ShutdownReport)) -> ShutdownReport {
    let mut report = ShutdownReport::default();
    of(&mut report);
    report
}

async fn never() -> Result<Option<&'static str>, BoxError> {
    std::future::pending().await
}

#[tokio::test(start_paused = true)]
async fn nothing_new_begins_and_what_is_under_way_goes_on() {
    let server = Server::new();
    server.insert("k", "v");
    let client = unhurried(one(&server)).build().unwrap();
    client.get("k").await.unwrap();
    let derived = client.layer(GroupLayer::new("group").prefix("g:"));
    let others = [
        client.clone(),
        client.clone().with_timeout(secs(1)).unwrap(),
        client.clone().with_read_through(exact()).unwrap(),
    ];
    server.delay(ms(500));
    let table = Table::new("loaded", ms(1));
    let late = async {
        sleep(ms(10)).await;
        let begun = Instant::now();
        let sent = server.commands();
        for client in &others {
            let error = client.get("k").await.unwrap_err();
            assert_eq!(
                (error.kind(), error.sent()),
                (ErrorKind::Shutdown, Sent::No)
            );
            assert_eq!(kinds(table.get(client).await), Some(ErrorKind::Shutdown));
            all_shut_down(&client.get_many(["k", "l"]).await, 2);
        }
        assert_eq!(
            kinds(derived.set("k", "v", TTL).await),
            Some(ErrorKind::Shutdown)
        );
        assert_eq!(
            kinds(derived.boxed().get("k").await),
            Some(ErrorKind::Shutdown)
        );
        assert_eq!(
            kinds(client.invalidate("k").await),
            Some(ErrorKind::Shutdown)
        );
        assert_eq!(kinds(client.version().await), Some(ErrorKind::Shutdown));
        assert_eq!(
            kinds(client.set_nodes(["other"])),
            Some(ErrorKind::Shutdown)
        );
        let missing = |_: Vec<Key>| async { Ok::<Vec<(Key, &str)>, BoxError>(Vec::new()) };
        all_shut_down(&client.get_many_or_load(["k"], TTL, missing).await, 1);
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert_eq!((server.commands(), table.loads()), (sent, 0));
    };
    let begun = Instant::now();
    let (value, report, ()) = tokio::join!(client.get("k"), client.shutdown(secs(10)), late);
    assert_eq!(value.unwrap().unwrap(), "v");
    assert!(report.is_clean(), "{report}");
    // When the last has ended, and not at the deadline.
    assert!(begun.elapsed() < secs(1), "{:?}", begun.elapsed());
    eventually("it is closed", || server.open_connections() == 0).await;
}

/// One that a layer holds back, one that waits for its node, a batch to several nodes, and one at a
/// node.
#[tokio::test(start_paused = true)]
async fn what_is_still_under_way_at_the_deadline_fails_then_and_is_counted_once() {
    let servers = [Server::new(), Server::new(), Server::new()];
    let client = unhurried(&servers)
        .connections(2)
        .failure_mode(FailureMode::Retry)
        .build()
        .unwrap();
    let limited = client.layer(ConcurrencyLimitLayer::new(1));
    let keys = ["a", "b", "c", "d", "e", "f", "g", "h"];
    assert_eq!(client.get_many(keys).await.errors().count(), 0);
    for server in &servers {
        server.stall();
    }
    let begun = Instant::now();
    let requests = async {
        let (first, held_back, many, set) = tokio::join!(
            limited.get("a"),
            limited.get("b"),
            client.get_many(keys),
            client.set("c", "v", TTL)
        );
        assert_eq!(begun.elapsed(), secs(1), "at the deadline");
        all_shut_down(&many, keys.len());
        for outcome in [first.map(drop), held_back.map(drop), set] {
            assert_eq!(kinds(outcome), Some(ErrorKind::Shutdown));
        }
    };
    let ((), abandoned) = tokio::join!(requests, async {
        sleep(Duration::ZERO).await;
        client.shutdown(secs(1)).await
    });
    assert_eq!(abandoned, report(|of| of.requests = 4));
    assert_eq!(abandoned.to_string(), "abandoned 4 requests");
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_node_waits_no_longer_than_the_deadline() {
    let server = Server::new();
    let client = unhurried(one(&server))
        .failure_mode(FailureMode::Retry)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.refuse();
    until_open(&client, 0).await;
    let begun = Instant::now();
    let (read, many, abandoned) = tokio::join!(
        client.get("k"),
        client.get_many(["k", "l"]),
        client.shutdown(ms(300))
    );
    assert_eq!(begun.elapsed(), ms(300));
    assert_eq!(kinds(read), Some(ErrorKind::Shutdown));
    all_shut_down(&many, 2);
    assert_eq!(abandoned, report(|of| of.requests = 2));
}

#[tokio::test(start_paused = true)]
async fn what_is_being_loaded_is_in_the_cache_afterwards() {
    let server = Server::new();
    let table = Table::new("v", ms(300));
    // By a caller of a group, a caller who waits for it, and a task whose caller has left.
    let client = unhurried(one(&server)).build().unwrap();
    let group = client.layer(GroupLayer::new("group").prefix("g:"));
    let shared = client.layer(
        ReadThroughLayer::new(table.clone(), TTL)
            .settings(exact())
            .unwrap(),
    );
    let leaves = timeout(ms(50), shared.get("left"));
    let (left, one_of_two, other, report, ()) = tokio::join!(
        leaves,
        group.get_or_load("k", TTL, || table.read()),
        group.get_or_load("k", TTL, || table.read()),
        async {
            sleep(ms(10)).await;
            // What is written and what is claimed from now on takes its time.
            server.delay(ms(20));
            client.shutdown(secs(5)).await
        },
        async {
            sleep(ms(100)).await;
            assert!(server.peek("g:k").is_none_or(|value| value != "v"));
        }
    );
    assert!(left.is_err());
    assert_eq!(one_of_two.unwrap().unwrap(), "v");
    assert_eq!(other.unwrap().unwrap(), "v");
    assert!(report.is_clean(), "{report}");
    assert_eq!(table.loads(), 2);
    assert_eq!(server.peek("g:k").unwrap(), "v");
    assert_eq!(server.peek("left").unwrap(), "v");
}

/// The database hangs. Nobody waits beyond the deadline: who loads, who waits for that, for a place at
/// the database, or for another process.
#[tokio::test(start_paused = true)]
async fn loads_that_do_not_end_are_ended_with_all_who_wait_for_them() {
    let server = Server::new();
    let elsewhere = client(&server, exact());
    let guard = LoadGuard::new(
        "items",
        LoadLimits::default().max_concurrent(1).max_wait(secs(20)),
    )
    .unwrap();
    let settings = exact().load_timeout(secs(30)).guard(guard.clone());
    let settings = settings.lease(secs(20)).lease_wait(secs(20));
    let client = unhurried(one(&server))
        .read_through(settings)
        .build()
        .unwrap();
    client.version().await.unwrap();
    let other = tokio::spawn(async move { elsewhere.get_or_load("other", TTL, never).await });
    eventually("it is taken", || server.peek("other").is_some()).await;
    let begun = Instant::now();
    let get = |key| {
        let get = client.get_or_load(key, TTL, never);
        async move {
            let outcome = get.await;
            (kinds(outcome), begun.elapsed())
        }
    };
    let gets = ["k", "k", "k", "waits", "other"].map(get);
    let (outcomes, abandoned) = tokio::join!(join_all(gets), async {
        sleep(ms(100)).await;
        client.shutdown(ms(200)).await
    });
    for outcome in outcomes {
        assert_eq!(outcome, (Some(ErrorKind::Shutdown), ms(300)));
    }
    // Its own leases are those of `k` and `waits`.
    let expected = report(|of| (of.requests, of.loads, of.leases) = (4, 1, 2));
    assert_eq!(abandoned, expected);
    assert_eq!(
        abandoned.to_string(),
        "abandoned 4 requests, 1 load, 2 leases"
    );
    assert_eq!(guard.status().running, 0);
    assert_eq!(guard.status().queued, 0);
    other.abort();
}

struct Hangs(Arc<AtomicUsize>);

impl Loader for Hangs {
    async fn load(&self, _: &Key) -> Result<Option<Payload>, BoxError> {
        struct Ends<'a>(&'a AtomicUsize);
        impl Drop for Ends<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.0.fetch_add(1, Ordering::Relaxed);
        let _running = Ends(&self.0);
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_shared_loaders_tasks_end_at_the_deadline() {
    let server = Server::new();
    let running = Arc::new(AtomicUsize::new(0));
    let settings = exact().load_timeout(secs(30));
    let layer = ReadThroughLayer::new(Hangs(running.clone()), TTL);
    let client = unhurried(one(&server))
        .layer(layer.settings(settings).unwrap())
        .build()
        .unwrap();
    let tasks = tokio::runtime::Handle::current().metrics();
    let before = tasks.num_alive_tasks();
    // One whose caller has left.
    assert!(timeout(ms(10), client.get("left")).await.is_err());
    let (waits, abandoned) = tokio::join!(client.get("k"), async {
        sleep(ms(10)).await;
        assert_eq!(running.load(Ordering::Relaxed), 2);
        client.shutdown(ms(100)).await
    });
    assert_eq!(kinds(waits), Some(ErrorKind::Shutdown));
    // The caller who waits, two tasks, and what they hold.
    let expected = report(|of| (of.requests, of.loads, of.leases) = (1, 2, 2));
    assert_eq!(abandoned, expected);
    eventually("they have ended", || running.load(Ordering::Relaxed) == 0).await;
    drop(client);
    eventually("no task is left", || tasks.num_alive_tasks() <= before).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_not_put_back_by_the_deadline_is_reported() {
    for (limit, refills) in [(256, 3), (1, 3)] {
        let server = Server::new();
        let table = Table::new("v", ms(100));
        let settings = exact().max_refills(limit);
        let client = unhurried(one(&server))
            .read_through(settings)
            .build()
            .unwrap();
        client.version().await.unwrap();
        let gets = ["a", "b", "c"].map(|key| client.get_or_load(key, TTL, || table.read()));
        let (values, abandoned) = tokio::join!(join_all(gets), async {
            sleep(ms(50)).await;
            server.stall();
            client.shutdown(ms(500)).await
        });
        assert!(values.into_iter().all(|value| value.is_ok()));
        // Where there was no room for it the lease could not be given up, either.
        let expected = report(|of| (of.refills, of.leases) = (refills, 3));
        assert_eq!(abandoned, expected, "of {limit}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_cannot_be_given_up_is_reported() {
    let server = Server::new();
    let client = unhurried(one(&server)).build().unwrap();
    client.version().await.unwrap();
    let fails = || async {
        sleep(ms(100)).await;
        Err::<Option<&str>, _>("down")
    };
    let (error, abandoned) = tokio::join!(client.get_or_load("k", TTL, fails), async {
        sleep(ms(50)).await;
        server.stall();
        client.shutdown(ms(500)).await
    });
    assert_eq!(kinds(error), Some(ErrorKind::Load));
    assert_eq!(abandoned, report(|of| of.leases = 1));
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_given_up_on_the_way_out() {
    let server = Server::new();
    let client = unhurried(one(&server)).build().unwrap();
    client.version().await.unwrap();
    server.delay(ms(50));
    let fails = || async { Err::<Option<&str>, _>("down") };
    let (error, report) = tokio::join!(client.get_or_load("k", TTL, fails), async {
        sleep(ms(10)).await;
        client.shutdown(secs(5)).await
    });
    assert_eq!(kinds(error), Some(ErrorKind::Load));
    assert!(report.is_clean(), "{report}");
    assert_eq!(server.peek("k"), None);
}

fn quick(builder: ClientBuilder) -> ClientBuilder {
    builder
        .attempt_timeout(ms(150))
        .breaker(BreakerSettings::default().reopening(ms(100), ms(100)))
}

#[tokio::test(start_paused = true)]
async fn a_journal_of_a_node_that_is_back_is_worked_off() {
    let servers = [Server::new(), Server::new()];
    let client = quick(in_memory(&servers)).build().unwrap();
    let keys: Vec<_> = (0..2000)
        .map(|n| Key::new(format!("k{n}")).unwrap())
        .collect();
    for key in &keys {
        client.set(key, "old", Ttl::NEVER).await.unwrap();
    }
    servers[0].refuse();
    until_open(&client, 0).await;
    for key in &keys {
        client.set(key, "new", Ttl::NEVER).await.unwrap();
    }
    let owed = client.nodes()[0].journal;
    assert!(owed > 600, "{owed}");
    let its_own: Vec<_> = keys
        .iter()
        .filter(|key| servers[0].peek(key.as_bytes()).is_some())
        .collect();
    servers[0].accept().unwrap();
    // Deletions take their time, and the first thing the node is asked for is none.
    servers[0].delay(ms(10));
    eventually("it is tested", || state(&client, 0) != BreakerState::Open).await;
    let report = client.shutdown(secs(20)).await;
    assert!(report.is_clean(), "{report}");
    for key in its_own {
        assert_eq!(servers[0].peek(key.as_bytes()), None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_journal_of_a_node_that_is_out_is_reported_and_not_waited_for() {
    let servers = [Server::new(), Server::new()];
    let client = quick(in_memory(&servers))
        .journal(JournalSettings::default().capacity(5))
        .build()
        .unwrap();
    let keys: Vec<_> = (0..100)
        .map(|n| Key::new(format!("k{n}")).unwrap())
        .collect();
    client.get_many(&keys).await;
    servers[0].refuse();
    until_open(&client, 0).await;
    let mut owed = 0;
    for key in &keys {
        client.set(key, "new", Ttl::NEVER).await.unwrap();
        owed = client.nodes()[0].journal;
        if owed == 3 {
            break;
        }
    }
    let derived = client.clone();
    let begun = Instant::now();
    let report = client.shutdown(secs(20)).await;
    assert!(begun.elapsed() < secs(1), "{:?}", begun.elapsed());
    assert_eq!((report.requests, report.journals.len()), (0, 1), "{report}");
    let journal = &report.journals[0];
    assert_eq!((&*journal.node, journal.keys, owed), ("node-0", 3, 3));
    assert!(!journal.overflowed && !journal.owes_a_flush);
    assert_eq!(report.to_string(), "not deleted: 3 keys at node-0");
    assert_eq!(derived.shutdown(secs(20)).await, report);

    let client = quick(in_memory(&servers))
        .journal(JournalSettings::default().capacity(5))
        .build()
        .unwrap();
    client.get_many(&keys).await;
    until_open(&client, 0).await;
    for key in &keys {
        client.set(key, "new", Ttl::NEVER).await.unwrap();
    }
    client.flush_all().await.unwrap();
    let report = client.shutdown(secs(20)).await;
    let journal = &report.journals[0];
    assert_eq!(journal.keys, 5);
    assert!(journal.overflowed && journal.owes_a_flush);
}

/// A cluster of one node, which is this service, and is not probed.
fn by_hand<S>(service: S, attempt: Duration) -> Cluster<S>
where
    S: Service<Request, Response = Response, Error = BoxError> + Clone + Send + Sync + 'static,
    S::Future: Send,
{
    let specs = vec![NodeSpec::new("node").unwrap()];
    let executor = Executor::current();
    let probe = ProbeSettings::default().initial_delay(secs(100_000));
    let settings = NodeSettings::default()
        .probe(probe)
        .attempt_timeout(attempt);
    let node = move |spec: &NodeSpec| {
        let (name, executor) = (spec.name().clone(), Executor::current());
        Node::new(name, service.clone(), settings.clone(), &executor).unwrap()
    };
    Cluster::new(ClusterSettings::default(), specs, &executor, node).unwrap()
}

/// What may still be executed is deleted again two seconds later; with less time than that, at once.
#[tokio::test(start_paused = true)]
async fn a_write_in_doubt_is_deleted_again_if_there_is_time_and_reported_otherwise() {
    for (deadline, clean) in [(secs(10), true), (secs(1), false)] {
        let late = Arc::new(AtomicUsize::new(0));
        let counted = late.clone();
        // A service of which nobody is told what becomes of what it was given.
        let service = service_fn(move |request: Request| {
            let late = counted.clone();
            async move {
                Ok::<_, BoxError>(match request.into_operation() {
                    Operation::Store { .. } => std::future::pending().await,
                    Operation::Delete { .. } => {
                        late.fetch_add(1, Ordering::Relaxed);
                        Response::Deleted(true)
                    }
                    _ => Response::Value(None),
                })
            }
        });
        let cluster = by_hand(service, ms(30));
        let client = Client::from_service(cluster.clone());
        let error = client.set("k", "late", TTL).await.unwrap_err();
        assert_eq!(error.sent(), Sent::Maybe);
        eventually("it is deleted once", || late.load(Ordering::Relaxed) == 1).await;
        let begun = Instant::now();
        let report = cluster.shutdown(deadline).await;
        assert_eq!(report.is_clean(), clean, "{report}");
        assert_eq!(late.load(Ordering::Relaxed), 2, "and once more");
        if clean {
            assert!(begun.elapsed() > ms(1900) && begun.elapsed() < ms(2500));
        } else {
            assert!(begun.elapsed() < ms(100), "{:?}", begun.elapsed());
            assert_eq!(report.journals[0].keys, 1);
        }
    }
}

/// A connection is given up with a write on it, and the server does not know. The node stays in.
#[tokio::test]
async fn a_connection_given_up_has_as_long_as_a_doubt_and_no_longer() {
    let server = server().await;
    let upstream = server.address().unwrap();
    let sleeps = Proxy::listen(upstream).await.unwrap();
    let awake = Proxy::listen(upstream).await.unwrap();
    let client = Client::builder()
        .nodes([sleeps.address().to_string()])
        .executor(Executor::current())
        // So long that the connection that is made anew answers in time on a busy machine, too.
        .timeout(secs(4))
        .attempt_timeout(ms(450))
        .stall_timeout(ms(225))
        .connector(Parted {
            dialled: AtomicUsize::new(0),
            others: awake.address().to_string().parse().unwrap(),
        })
        .build()
        .unwrap();
    client.set("k", "old", Ttl::NEVER).await.unwrap();
    sleeps.set(Flow::Both, Toxics::new().blackhole());
    let _late = client.set("k", "late", Ttl::NEVER).await;
    eventually("it is made anew", || awake.open_connections() > 0).await;
    assert_eq!(state(&client, 0), BreakerState::Closed);
    assert_eq!(client.nodes()[0].journal, 1);
    let begun = Instant::now();
    let report = client.shutdown(secs(60)).await;
    let waited = begun.elapsed();
    assert!(waited >= ms(1900) && waited < secs(20), "{waited:?}");
    assert_eq!(report.journals.len(), 1, "{report}");
    assert_eq!(report.journals[0].keys, 1);
    assert_eq!(server.peek("k"), None, "it was deleted all the same");
}

/// The first connection goes to the address, all others elsewhere.
struct Parted {
    dialled: AtomicUsize,
    others: Address,
}

impl Connector for Parted {
    fn connect(&self, address: &Address) -> Connecting {
        let first = self.dialled.fetch_add(1, Ordering::Relaxed) == 0;
        SystemConnector::new().connect(if first { address } else { &self.others })
    }
}

#[tokio::test(start_paused = true)]
async fn several_shutdowns_end_by_their_own_deadlines_and_say_the_same() {
    let server = Server::new();
    let client = unhurried(one(&server)).build().unwrap();
    client.get("k").await.unwrap();
    server.stall();
    let begun = Instant::now();
    let ending = |deadline: Duration| {
        let client = client.clone();
        async move { (client.shutdown(deadline).await, begun.elapsed()) }
    };
    let (read, patient, hasty, later) =
        tokio::join!(client.get("k"), ending(secs(10)), ending(ms(200)), async {
            sleep(ms(100)).await;
            ending(secs(10)).await
        });
    assert_eq!(kinds(read), Some(ErrorKind::Shutdown));
    let expected = (report(|of| of.requests = 1), ms(200));
    assert_eq!([&patient, &hasty, &later], [&expected; 3]);
    assert_eq!(ending(secs(10)).await, expected, "at once, and the same");
}

#[tokio::test]
async fn an_operation_that_is_dropped_is_under_way_until_all_of_it_is_gone() {
    type Probe = Box<dyn Fn() -> bool + Send + Sync>;
    struct Dropped(Arc<OnceLock<Probe>>, Arc<AtomicUsize>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            let ends_at_once = self.0.get().unwrap()();
            self.1.store(1 + usize::from(ends_at_once), Relaxed);
        }
    }
    let (probe, seen) = (
        Arc::new(OnceLock::<Probe>::new()),
        Arc::<AtomicUsize>::default(),
    );
    let service = service_fn({
        let (probe, seen) = (probe.clone(), Arc::clone(&seen));
        move |_: Request| {
            let dropped = Dropped(probe.clone(), seen.clone());
            async move {
                let _dropped = dropped;
                std::future::pending::<Result<Response, BoxError>>().await
            }
        }
    });
    let client = Client::from_service(service);
    let same = client.clone();
    let shuts_down = move || same.shutdown(secs(1)).now_or_never().is_some();
    assert!(probe.set(Box::new(shuts_down)).is_ok());
    // What its drop has to say (a write in doubt) is for whoever waits for it to end.
    assert!(client.get("k").now_or_never().is_none());
    assert_eq!(seen.load(Relaxed), 1, "nothing was under way any more");
    assert!(client.shutdown(secs(1)).await.is_clean());
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_that_is_dropped_refuses_what_is_new_and_ends_nothing() {
    let server = Server::new();
    let client = unhurried(one(&server)).build().unwrap();
    client.get("k").await.unwrap();
    let tasks = tokio::runtime::Handle::current().metrics();
    server.delay(secs(1));
    let (read, ()) = tokio::join!(client.get("k"), async {
        sleep(ms(1)).await;
        assert!(timeout(ms(100), client.shutdown(secs(10))).await.is_err());
        assert_eq!(kinds(client.get("k").await), Some(ErrorKind::Shutdown));
    });
    assert_eq!(read.unwrap(), None);
    assert_eq!(client.nodes()[0].connections, 1);
    // A later call finishes it; so does the drop of the last handle.
    let again = client.clone();
    assert!(again.shutdown(ms(1)).await.is_clean());
    eventually("it is closed", || server.open_connections() == 0).await;
    drop((client, again));
    let client = unhurried(one(&server)).build().unwrap();
    client.get("k").await.unwrap();
    assert!(
        client.shutdown(secs(1)).now_or_never().is_some(),
        "there is nothing to wait for"
    );
    let client = unhurried(one(&server)).build().unwrap();
    client.get("k").await.unwrap();
    let before = tasks.num_alive_tasks();
    let mut read = Box::pin(client.get("k"));
    assert!((&mut read).now_or_never().is_none());
    assert!(client.shutdown(secs(1)).now_or_never().is_none());
    drop(read);
    drop(client);
    eventually("it is closed", || server.open_connections() == 0).await;
    eventually("its tasks end", || tasks.num_alive_tasks() < before).await;
}

#[test]
fn a_client_is_shut_down_outside_of_every_runtime() {
    let never_used = Client::builder()
        .nodes(["127.0.0.1"])
        .executor(Executor::current());
    let never_used = never_used.build().unwrap();
    assert!(futures::executor::block_on(never_used.shutdown(Duration::MAX)).is_clean());
    let error = futures::executor::block_on(never_used.get("k")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shutdown);

    let runtime = tokio::runtime::Runtime::new().unwrap();
    let servers = runtime.block_on(servers(2));
    let builder = || {
        patient(&servers)
            .executor(Executor::dedicated("shutdown", 1))
            .breaker(BreakerSettings::default().reopening(ms(100), ms(100)))
    };
    futures::executor::block_on(async {
        let client = builder().build().unwrap();
        client.set("k", "v", Ttl::NEVER).await.unwrap();
        for server in &servers {
            server.stall();
        }
        let begun = Instant::now();
        let read = client.get("k");
        let (read, report) = futures::join!(read, client.shutdown(ms(200)));
        assert_eq!(kinds(read), Some(ErrorKind::Shutdown));
        assert_eq!(report.requests, 1);
        assert!(begun.elapsed() >= ms(190) && begun.elapsed() < secs(2));
        for server in &servers {
            server.resume();
        }
        drop(client);
        #[cfg(target_os = "linux")]
        until_gone("shutdown");

        // With something to be deleted at the last moment.
        let client = builder().build().unwrap();
        let keys = keys_of(&servers, 0, 2);
        for key in &keys {
            client.set(key, "old", Ttl::NEVER).await.unwrap();
        }
        servers[0].refuse();
        while state(&client, 0) != BreakerState::Open {
            let _ = client.get(&keys[0]).await;
        }
        client.set(&keys[0], "new", Ttl::NEVER).await.unwrap();
        servers[0].accept().unwrap();
        while state(&client, 0) == BreakerState::Open {
            let _ = client.get(&keys[1]).await;
        }
        let report = client.shutdown(secs(20)).await;
        assert!(report.is_clean(), "{report}");
        assert_eq!(servers[0].peek(keys[0].as_bytes()), None);
    });
}

/// Threads of that name. Linux keeps 15 bytes of one.
#[cfg(target_os = "linux")]
fn until_gone(name: &str) {
    let begun = Instant::now();
    let is_left = || {
        let mut tasks = std::fs::read_dir("/proc/self/task").unwrap();
        tasks.any(|task| {
            let comm = task.and_then(|task| std::fs::read_to_string(task.path().join("comm")));
            comm.is_ok_and(|comm| comm.trim_end() == name)
        })
    };
    while is_left() {
        assert!(begun.elapsed() < PATIENCE, "{name} runs");
        std::thread::park_timeout(ms(2));
    }
}

#[tokio::test(start_paused = true)]
async fn without_time_nothing_is_waited_for() {
    let server = Server::new();
    let idle = unhurried(one(&server)).build().unwrap();
    idle.get("k").await.unwrap();
    let begun = Instant::now();
    assert!(idle.shutdown(Duration::ZERO).await.is_clean());
    assert_eq!(begun.elapsed(), Duration::ZERO);
    let client = unhurried(one(&server)).build().unwrap();
    client.get("k").await.unwrap();
    server.stall();
    let (read, abandoned) = tokio::join!(client.get("k"), client.shutdown(Duration::ZERO));
    assert_eq!(kinds(read), Some(ErrorKind::Shutdown));
    assert_eq!(abandoned, report(|of| of.requests = 1));
    assert!(begun.elapsed() < ms(10));
}

#[tokio::test(start_paused = true)]
async fn a_client_of_a_users_service_finishes_what_is_its_own() {
    let writes = Arc::new(AtomicUsize::new(0));
    let counted = writes.clone();
    let service = service_fn(move |request: Request| {
        let writes = counted.clone();
        async move {
            Ok::<_, BoxError>(match request.into_operation() {
                Operation::Store { .. } => {
                    sleep(ms(80)).await;
                    writes.fetch_add(1, Ordering::Relaxed);
                    Response::Stored(true)
                }
                _ => Response::Value(None),
            })
        }
    });
    let client = Client::from_service(service.clone());
    let (loaded, report) = tokio::join!(
        client.get_or_load("k", TTL, || async {
            sleep(ms(100)).await;
            Ok::<_, BoxError>(Some("v"))
        }),
        client.shutdown(secs(10))
    );
    assert_eq!(loaded.unwrap().unwrap(), "v");
    assert!(report.is_clean(), "{report}");
    assert_eq!(writes.load(Ordering::Relaxed), 1, "it is put back");
    assert_eq!(kinds(client.get("k").await), Some(ErrorKind::Shutdown));
    // Its service is not ours to end.
    let other = Client::from_service(service);
    assert_eq!(other.get("k").await.unwrap(), None);
}

/// A stack built by hand: what the loader above has loaded is put back while the cluster drains.
#[tokio::test(start_paused = true)]
async fn a_cluster_takes_what_is_put_back_while_it_drains_and_nothing_else() {
    let server = Server::new();
    let service = {
        let server = server.clone();
        service_fn(move |request: Request| {
            let server = server.clone();
            async move {
                sleep(ms(100)).await;
                Ok::<_, BoxError>(match request.into_operation() {
                    Operation::Store { key, payload, .. } => {
                        let value = tower_memcached::Value::from(payload);
                        server.insert(key.as_bytes(), value.to_vec());
                        Response::Stored(true)
                    }
                    Operation::Delete { .. } => Response::Deleted(true),
                    _ => Response::Value(None),
                })
            }
        })
    };
    let cluster = by_hand(service, secs(5));
    let table = Table::new("v", ms(50));
    let layer = ReadThroughLayer::new(table, TTL).settings(exact()).unwrap();
    let client = Client::from_service(layer.layer(cluster.clone()));
    let client = client.with_timeout(secs(2)).unwrap();
    let busy = async {
        sleep(ms(120)).await;
        client.delete("other").await
    };
    let late = async {
        sleep(ms(160)).await;
        client.delete("late").await
    };
    let (loaded, busy, late, report) = tokio::join!(client.get("k"), busy, late, async {
        sleep(ms(140)).await;
        cluster.shutdown(secs(10)).await
    });
    assert_eq!(loaded.unwrap().unwrap(), "v");
    assert!(busy.unwrap());
    assert_eq!(kinds(late), Some(ErrorKind::Shutdown));
    assert!(report.is_clean(), "{report}");
    assert_eq!(server.peek("k").unwrap(), "v");
    assert!(cluster.shutdown(secs(10)).await.is_clean());
    let get = Request::new(Operation::Get {
        key: Key::new("k").unwrap(),
        with_cas: false,
    });
    let error = cluster.oneshot(get).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shutdown);
}

/// 2 of FAULTS: SIGSTOP, with requests and a load on the way.
#[tokio::test]
async fn with_a_stopped_memcached_it_ends_by_the_deadline_and_leaves_nothing() {
    let nodes = [
        Memcached::spawn(&[]).unwrap(),
        Memcached::spawn(&[]).unwrap(),
    ];
    let builder = || {
        Client::builder()
            .nodes(nodes.iter().map(Memcached::address))
            .timeout(secs(30))
            .attempt_timeout(secs(20))
            .load_timeout(secs(30))
            .read_through(exact())
    };
    let tasks = tokio::runtime::Handle::current().metrics();
    let before = tasks.num_alive_tasks();
    let client = builder().executor(Executor::current()).build().unwrap();
    let keys: Vec<_> = (0..20)
        .map(|n| Key::new(format!("k{n}")).unwrap())
        .collect();
    for key in &keys {
        client.set(key, "v", TTL).await.unwrap();
    }
    // All is well: what is loaded meanwhile is there afterwards.
    let load = || async {
        sleep(ms(200)).await;
        Ok::<_, BoxError>(Some("loaded"))
    };
    let (loaded, report) = tokio::join!(client.get_or_load("loaded", TTL, load), async {
        sleep(ms(50)).await;
        client.shutdown(secs(20)).await
    });
    assert_eq!(loaded.unwrap().unwrap(), "loaded");
    assert!(report.is_clean(), "{report}");
    let client = builder().executor(Executor::current()).build().unwrap();
    assert_eq!(client.get("loaded").await.unwrap().unwrap(), "loaded");
    client.get_many(&keys).await;
    nodes[0].stop().unwrap();
    let begun = Instant::now();
    let gets = keys.iter().map(|key| client.get(key));
    let (reads, report) = tokio::join!(join_all(gets), async {
        sleep(ms(50)).await;
        client.shutdown(ms(500)).await
    });
    assert!(begun.elapsed() >= ms(500) && begun.elapsed() < secs(10));
    let failed: Vec<_> = reads.into_iter().filter_map(Result::err).collect();
    assert!(!failed.is_empty());
    for error in &failed {
        assert_eq!(error.kind(), ErrorKind::Shutdown, "{error}");
    }
    assert_eq!(report.requests, failed.len());
    drop(client);
    eventually("no task is left", || tasks.num_alive_tasks() <= before).await;
    nodes[0].cont().unwrap();
    let looks = builder().build().unwrap();
    eventually("it goes on", || nodes[0].pid() > 0).await;
    let connections = || async {
        let stats = looks.stats().await.unwrap();
        let of = |stats: &std::collections::BTreeMap<String, String>| {
            stats["curr_connections"].parse::<usize>().unwrap()
        };
        stats
            .iter()
            .map(|node| of(node.result.as_ref().unwrap()))
            .collect::<Vec<_>>()
    };
    let alone = connections().await;
    let until = Instant::now() + PATIENCE;
    // This client's own, and what memcached itself counts.
    while connections().await.iter().any(|&count| count > 3) {
        assert!(Instant::now() < until, "{alone:?}");
        sleep(ms(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_at_a_removed_node_ends_with_the_client() {
    let servers = [Server::new(), Server::new()];
    let client = unhurried(&servers).build().unwrap();
    client.set_nodes(["node-0"]).unwrap();
    client.get("k").await.unwrap();
    servers[0].stall();
    let begun = Instant::now();
    let under_way = tokio::spawn({
        let client = client.clone();
        async move { client.get("k").await }
    });
    sleep(ms(10)).await;
    client.set_nodes(["node-1"]).unwrap();
    let report = client.shutdown(ms(100)).await;
    assert_eq!(report.requests, 1, "{report}");
    let error = under_way.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shutdown);
    assert!(begun.elapsed() < secs(1), "{:?}", begun.elapsed());
    servers[0].resume();
    eventually("its connection is closed", || {
        servers[0].open_connections() == 0
    })
    .await;
}
