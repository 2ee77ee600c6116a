//! What a hostile reading of reads that load looked for: old values that come back, waits and loads
//! that need not be, and loaders that misbehave. Under paused time, but for one.

use std::collections::HashMap;
use std::future::{Ready, pending, poll_fn, ready};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use fastrand::Rng;
use futures::future::join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, sleep, timeout};
use tower_memcached::testing::Server;
use tower_memcached::{
    Address, BoxStream, BreakerState, Client, Connecting, Connector, Error, ErrorKind, Executor,
    GroupLayer, Key, KillSwitch, LoadGuard, LoadLimits, Loader, Payload, Protocol,
    ReadThroughLayer, ReadThroughSettings, Ttl, Value,
};

use crate::read_through::{
    BoxError, PROTOCOLS, TTL, Table, client, client_by, exact, ms, secs, some,
};
use crate::storms;
use crate::support::{eventually, in_memory, patient, state};

#[tokio::test(start_paused = true)]
async fn what_a_successor_loads_is_not_given_to_who_asks_after_an_invalidation() {
    let server = Server::new();
    let table = Table::new("old", ms(5));
    let (reads, writes) = (client(&server, exact()), client(&server, exact()));
    // It leaves when the time for its own work on the cache has long passed.
    let leader = timeout(ms(150), table.get_in(secs(5), &reads));
    let successor = async {
        sleep(ms(10)).await;
        table.get_in(ms(300), &reads).await
    };
    let writer = async {
        sleep(ms(250)).await;
        table.update("new");
        writes.invalidate("k").await.unwrap();
        table.get(&reads).await
    };
    let (left, old, new) = tokio::join!(leader, successor, writer);
    assert!(left.is_err());
    assert_eq!(old.unwrap(), some("old"), "it began before");
    assert_eq!(new.unwrap(), some("new"));
}

#[tokio::test(start_paused = true)]
async fn what_a_successor_loads_is_put_back() {
    let server = Server::new();
    let table = Table::new("v", ms(20));
    let client = client(&server, exact());
    let leader = timeout(ms(150), table.get_in(secs(5), &client));
    let successor = async {
        sleep(ms(10)).await;
        table.get(&client).await
    };
    let (left, value) = tokio::join!(leader, successor);
    assert!(left.is_err());
    assert_eq!(value.unwrap(), some("v"));
    eventually("it is put back", || {
        server.peek("k").is_some_and(|value| value == "v")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_load_after_a_lookup_that_timed_out_is_not_shared_after_an_invalidation() {
    let server = Server::new();
    let table = Table::new("old", ms(5));
    let (reads, writes) = (client(&server, exact()), client(&server, exact()));
    reads.version().await.unwrap();
    writes.version().await.unwrap();
    server.delay(ms(31));
    let heal = async {
        sleep(ms(20)).await;
        server.delay(Duration::ZERO);
    };
    let reader = table.get_in(ms(300), &reads);
    let writer = async {
        sleep(ms(200)).await;
        table.update("new");
        writes.invalidate("k").await.unwrap();
        table.get(&reads).await
    };
    let ((), old, new) = tokio::join!(heal, reader, writer);
    assert_eq!(old.unwrap(), some("old"), "it began before");
    assert_eq!(new.unwrap(), some("new"));
}

#[tokio::test(start_paused = true)]
async fn where_there_is_no_room_for_a_lease_an_invalidation_counts_all_the_same() {
    let server = Server::builder().evictions(false).memory_limit(1).build();
    let table = Table::new("old", ms(5));
    let (reads, writes) = (client(&server, exact()), client(&server, exact()));
    let reader = table.get_in(ms(300), &reads);
    let writer = async {
        sleep(ms(50)).await;
        assert!(server.is_empty());
        table.update("new");
        writes.invalidate("k").await.unwrap();
        table.get(&reads).await
    };
    let (old, new) = tokio::join!(reader, writer);
    assert_eq!(old.unwrap(), some("old"), "it began before");
    assert_eq!(new.unwrap(), some("new"));
}

#[tokio::test(start_paused = true)]
async fn who_cannot_look_does_not_share_what_may_be_old() {
    let server = Server::new();
    let table = Table::new("old", ms(5));
    let (reads, writes) = (client(&server, exact()), client(&server, exact()));
    let reader = table.get_in(ms(300), &reads);
    let writer = async {
        sleep(ms(50)).await;
        table.update("new");
        writes.invalidate("k").await.unwrap();
        server.delay(ms(40));
        table.get(&reads).await
    };
    let (old, new) = tokio::join!(reader, writer);
    assert_eq!(old.unwrap(), some("old"), "it began before");
    assert_eq!(new.unwrap(), some("new"));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_put_back_for_the_limit_keeps_nobody_waiting() {
    let server = Server::new();
    let client = client(&server, exact().max_refills(1));
    let table = Table::new("v", ms(5));
    client.version().await.unwrap();
    for _ in 0..2 {
        let begun = Instant::now();
        let gets = (0..10).map(|n| client.get_or_load(format!("k{n}"), TTL, || table.read()));
        for value in join_all(gets).await {
            assert_eq!(value.unwrap().unwrap(), "v");
        }
        assert!(begun.elapsed() < ms(100), "{:?}", begun.elapsed());
        sleep(ms(20)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn values_at_a_failover_node_are_fresh_though_the_grace_exceeds_their_ttl_there() {
    let servers = [Server::new(), Server::new(), Server::new()];
    let table = Table::new("v", ms(5));
    let settings = exact().stale_if_error(secs(600));
    let client = in_memory(&servers).read_through(settings).build().unwrap();
    let home = |server: &Server| server.peek("k").is_some_and(|value| value == "v");
    table.get(&client).await.unwrap();
    eventually("it is put back", || servers.iter().any(home)).await;
    let home = servers.iter().position(home).unwrap();
    servers[home].shutdown();
    eventually("open", || state(&client, home) == BreakerState::Open).await;
    let before = table.loads();
    for _ in 0..20 {
        assert_eq!(table.get(&client).await.unwrap(), some("v"));
        sleep(ms(50)).await;
    }
    let loads = table.loads() - before;
    assert!(loads <= 3, "{loads}");
}

#[tokio::test(start_paused = true)]
async fn callers_that_give_up_do_not_each_load() {
    let server = Server::new();
    let client = client(&server, exact());
    let loads = AtomicUsize::new(0);
    let hangs = || {
        loads.fetch_add(1, Ordering::Relaxed);
        pending::<Result<Option<&str>, BoxError>>()
    };
    let gets = (0..2_000).map(|n| {
        let get = client.get_or_load("k", TTL, hangs);
        async move {
            sleep(ms(n)).await;
            timeout(ms(200), get).await
        }
    });
    join_all(gets).await;
    let loads = loads.into_inner();
    assert!(loads < 40, "{loads} in 2 s");
}

#[tokio::test(start_paused = true)]
async fn a_database_that_begins_to_hang_is_noticed_though_callers_give_up_soon() {
    let server = Server::new();
    let guard = LoadGuard::new("database", LoadLimits::default()).unwrap();
    let client = client(&server, exact().guard(guard.clone()));
    let table = Table::new("v", ms(1));
    for n in 0..300 {
        let get = client.get_or_load(format!("before-{n}"), TTL, || table.read());
        get.await.unwrap();
    }
    assert_eq!(guard.status().rejection_probability, 0.0);
    let gets = (0..3_000).map(|n| {
        let hangs = pending::<Result<Option<&str>, BoxError>>;
        let get = client.get_or_load(format!("k{n}"), TTL, hangs);
        async move {
            sleep(ms(n)).await;
            timeout(ms(50), get).await
        }
    });
    join_all(gets).await;
    let status = guard.status();
    assert!(status.rejection_probability > 0.5, "{status:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_missing_and_what_is_old_share_the_time_to_load() {
    let server = Server::new();
    let client = client(&server, exact().stale_while_revalidate(secs(600)));
    let table = Table::new("v", ms(5));
    let get = client.get_or_load("old", Ttl::secs(1), || table.read());
    get.await.unwrap();
    sleep(secs(3)).await;
    let begun = Instant::now();
    let hangs = |_: Vec<Key>| pending::<Result<HashMap<Key, &str>, BoxError>>();
    let many = client.get_many_or_load(["old", "missing"], TTL, hangs);
    let many = many.await;
    assert!(begun.elapsed() < ms(1_110), "{:?}", begun.elapsed());
    let [old, missing] = many.outcomes() else {
        panic!("{many:?}");
    };
    assert!(old.value().is_some_and(Value::is_stale));
    assert!(missing.value().is_none());
}

#[tokio::test(start_paused = true)]
async fn clients_derived_from_each_other_see_each_others_invalidations() {
    for derived_reads in [true, false] {
        let server = Server::new();
        let table = Table::new("old", ms(5));
        let first = client(&server, exact());
        let derived = first.clone();
        let derived = derived.with_read_through(exact().leases(false)).unwrap();
        let (reads, writes) = match derived_reads {
            true => (derived, first),
            false => (first, derived),
        };
        let reader = table.get_in(ms(50), &reads);
        let writer = async {
            sleep(ms(10)).await;
            table.update("new");
            writes.invalidate("k").await.unwrap();
            tokio::join!(table.get(&reads), table.get(&writes))
        };
        let (_, (one, other)) = tokio::join!(reader, writer);
        assert_eq!(one.unwrap(), some("new"));
        assert_eq!(other.unwrap(), some("new"));
        sleep(ms(50)).await;
        assert_eq!(server.peek("k").unwrap(), "new");
    }
}

/// Connects to a server to which all that is stored comes late, and nothing else.
struct LateStores(Server);

impl Connector for LateStores {
    fn connect(&self, _: &Address) -> Connecting {
        let server = self.0.clone();
        Box::pin(async move {
            let (ours, near) = tokio::io::duplex(64 * 1024);
            let (far, theirs) = tokio::io::duplex(64 * 1024);
            tokio::spawn(server.serve(theirs));
            let (mut requests, mut to_us) = tokio::io::split(near);
            let (mut replies, mut to_them) = tokio::io::split(far);
            tokio::spawn(async move { tokio::io::copy(&mut replies, &mut to_us).await });
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 * 1024];
                while let Ok(read @ 1..) = requests.read(&mut buffer).await {
                    if buffer.starts_with(b"ms ") || buffer.starts_with(b"add ") {
                        sleep(ms(10)).await;
                    }
                    to_them.write_all(&buffer[..read]).await?;
                }
                Ok::<_, std::io::Error>(())
            });
            Ok(Box::new(ours) as BoxStream)
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_delete_is_not_undone_by_what_is_being_put_back() {
    for &protocol in PROTOCOLS {
        a_delete_behind_a_fill(protocol).await;
    }
}

async fn a_delete_behind_a_fill(protocol: Protocol) {
    let server = Server::new();
    let table = Table::new("old", ms(5));
    let builder = Client::builder().nodes(["late"]).connections(2);
    let builder = builder.protocol(protocol);
    let builder = builder.connector(LateStores(server.clone()));
    let builder = builder.executor(Executor::current());
    let client = builder.read_through(exact().leases(false)).build().unwrap();
    join_all((0..20).map(|_| client.version())).await;
    assert_eq!(table.get(&client).await.unwrap(), some("old"));
    // It is on its way to the server now.
    sleep(ms(1)).await;
    assert!(server.is_empty());
    client.delete("k").await.unwrap();
    sleep(ms(50)).await;
    assert_eq!(client.get("k").await.unwrap(), None);
}

#[test]
fn a_layer_with_an_executor_works_outside_of_every_runtime() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = Server::new();
    runtime.block_on(server.listen()).unwrap();
    let layer = ReadThroughLayer::new(Table::new("v", ms(5)), TTL);
    let layer = layer.timeout(secs(2)).unwrap();
    let layer = layer.executor(&Executor::dedicated("loads", 1)).unwrap();
    let builder = patient(std::slice::from_ref(&server)).executor(Executor::dedicated("io", 1));
    let client = builder.layer(layer).build().unwrap();
    let value = futures::executor::block_on(client.get("k"));
    assert_eq!(value.unwrap().unwrap(), "v");
    runtime.block_on(eventually("it is put back", || {
        server.peek("k").is_some_and(|value| value == "v")
    }));
}

/// Puts so many keys into the cache.
fn fill(server: &Server, count: usize) -> Vec<String> {
    let keys: Vec<_> = (0..count).map(|n| format!("k{n}")).collect();
    for key in &keys {
        server.insert(key, "cached");
    }
    keys
}

/// A loader of what should not be loaded.
fn unexpected(keys: Vec<Key>) -> Ready<Result<HashMap<Key, &'static str>, BoxError>> {
    let loaded = keys.into_iter().map(|key| (key, "loaded"));
    ready(Ok(loaded.collect()))
}

#[tokio::test(start_paused = true)]
async fn more_cached_keys_than_a_group_may_have_in_flight_are_not_loaded() {
    let server = Server::new();
    let keys = fill(&server, 1_000);
    let client = client(&server, exact());
    let group = client.layer(GroupLayer::new("group").max_in_flight(200));
    let many = group.get_many_or_load(&keys, TTL, unexpected).await;
    let hits = many.into_hits();
    assert_eq!(hits.len(), keys.len());
    assert!(hits.iter().all(|(_, value)| *value == "cached"));
}

#[tokio::test(start_paused = true)]
async fn very_many_cached_keys_are_not_loaded() {
    let server = Server::new();
    let keys = fill(&server, 20_000);
    let builder = in_memory(std::slice::from_ref(&server));
    let builder = builder.timeout(secs(20)).attempt_timeout(secs(10));
    let client = builder.read_through(exact()).build().unwrap();
    let many = client.get_many_or_load(&keys, TTL, unexpected).await;
    let hits = many.into_hits();
    assert_eq!(hits.len(), keys.len());
    assert!(hits.iter().all(|(_, value)| *value == "cached"));
}

#[tokio::test(start_paused = true)]
async fn refills_may_have_no_limit() {
    let server = Server::new();
    let table = Table::new("v", ms(5));
    let client = client(&server, exact().max_refills(usize::MAX));
    assert_eq!(table.get(&client).await.unwrap(), some("v"));
    eventually("it is put back", || {
        server.peek("k").is_some_and(|value| value == "v")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_write_withheld_above_a_layer_is_noted() {
    let server = Server::new();
    let switch = KillSwitch::default();
    let layer = ReadThroughLayer::new(Table::new("loaded", ms(5)), TTL);
    let builder = in_memory(std::slice::from_ref(&server)).layer(layer);
    let group = GroupLayer::new("group").kill_switch(switch.clone());
    let client = builder.build().unwrap().layer(group);
    client.set("k", "old", TTL).await.unwrap();
    switch.throw();
    client.set("k", "new", TTL).await.unwrap();
    switch.reset();
    assert_eq!(client.gets("k").await.unwrap(), None);
}

struct PanicsWhenDropped;

impl Drop for PanicsWhenDropped {
    fn drop(&mut self) {
        panic!("a bug in the loader");
    }
}

#[tokio::test(start_paused = true)]
async fn a_loader_may_panic_when_called_when_polled_and_when_dropped() {
    let server = Server::new();
    let client = client(&server, exact());
    let called = || -> Ready<Result<Option<&str>, BoxError>> { panic!("a bug in the loader") };
    let error = client.get_or_load("called", TTL, called).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Load);
    let polled =
        || poll_fn(|_| -> Poll<Result<Option<&str>, BoxError>> { panic!("a bug in the loader") });
    let error = client.get_or_load("polled", TTL, polled).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Load);
    let dropped = || async {
        let _panics = PanicsWhenDropped;
        pending::<Result<Option<&str>, BoxError>>().await
    };
    let get = client.get_or_load("dropped", TTL, dropped);
    assert_eq!(get.await.unwrap_err().kind(), ErrorKind::Load);
}

/// A client that knows of a key that there is nothing, as the cache does.
async fn knowing_of_nothing(server: &Server, key: &str) -> Client {
    let client = client(server, exact().negative_ttl(secs(60)));
    let absent = || ready(Ok::<_, BoxError>(None::<&str>));
    assert_eq!(client.get_or_load(key, TTL, absent).await.unwrap(), None);
    eventually("that is kept", || {
        server.peek(key).is_some_and(|value| !value.is_empty())
    })
    .await;
    client
}

#[tokio::test(start_paused = true)]
async fn what_is_appended_or_prepended_to_nothing_makes_no_value() {
    let server = Server::new();
    let client = knowing_of_nothing(&server, "k").await;
    // Whatever these say.
    let _ = client.append("k", "tail").await;
    assert_eq!(client.get("k").await.unwrap(), None);
    let _ = client.prepend("k", "head").await;
    assert_eq!(client.get("k").await.unwrap(), None);
}

/// Rows that are only ever counted up.
#[derive(Clone)]
struct Rows(Arc<[Row]>);

#[derive(Default)]
struct Row {
    version: AtomicUsize,
    /// The newest version of which an invalidation has told everybody.
    invalidated: AtomicUsize,
}

impl Rows {
    fn new(count: usize) -> Self {
        Self((0..count).map(|_| Row::default()).collect())
    }

    fn any_key(&self, random: &mut Rng) -> Key {
        Key::new(random.usize(..self.0.len()).to_string()).unwrap()
    }

    fn of(&self, key: &Key) -> &Row {
        let place: usize = key.to_string().parse().unwrap();
        &self.0[place]
    }

    /// As old as it may be.
    async fn load(&self, key: &Key, takes: Duration) -> Result<Option<String>, BoxError> {
        let version = self.of(key).version.load(Ordering::Relaxed);
        sleep(takes).await;
        Ok(Some(version.to_string()))
    }

    async fn update(&self, key: &Key, invalidate: impl Future<Output = Result<(), Error>>) {
        let row = self.of(key);
        let version = row.version.fetch_add(1, Ordering::Relaxed) + 1;
        if invalidate.await.is_ok() {
            row.invalidated.fetch_max(version, Ordering::Relaxed);
        }
    }

    /// A read, of a caller who may lose patience, gives nothing older than what was invalidated
    /// when it began.
    async fn read(
        &self,
        key: &Key,
        patience: Duration,
        get: impl Future<Output = Result<Option<Value>, Error>>,
    ) {
        let begun = Instant::now();
        let least = self.of(key).invalidated.load(Ordering::Relaxed);
        let read = timeout(patience, get).await;
        assert!(begun.elapsed() < ms(1_300), "{:?}", begun.elapsed());
        if let Ok(Ok(value)) = read {
            let value = value.expect("no row is ever removed");
            let version = std::str::from_utf8(&value).unwrap();
            let version: usize = version.parse().unwrap();
            let age = value.is_stale().then_some("stale");
            assert!(version >= least, "{key}: {version} < {least} {age:?}");
        }
    }
}

impl Loader for Rows {
    async fn load(&self, key: &Key) -> Result<Option<Payload>, BoxError> {
        let takes = ms(fastrand::u64(..150));
        Ok(self.load(key, takes).await?.map(Payload::from))
    }
}

/// Most loads are quick, and some take most of their time.
fn load_time(random: &mut Rng) -> Duration {
    let longest = if random.bool() { 20 } else { 700 };
    ms(random.u64(..longest))
}

/// Half of the callers wait for as long as it takes.
fn patience(random: &mut Rng) -> Duration {
    match random.bool() {
        true => secs(100),
        false => ms(random.u64(1..400)),
    }
}

/// Runs it with a few seeds that are always the same, and another.
fn with_seeds<F: Future<Output = ()>>(run: impl Fn(u64) -> F) {
    for seed in [0, 1, 2, 3, storms::seed()] {
        fastrand::seed(seed);
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().start_paused(true).build().unwrap();
        let ended = catch_unwind(AssertUnwindSafe(|| runtime.block_on(run(seed))));
        assert!(ended.is_ok(), "with SEED={seed}");
    }
}

/// Three clients of one server that is slow, restarted and cut off, with loaders that fail and panic.
async fn many_clients(seed: u64, protocols: [Protocol; 3]) {
    const SHORT: Ttl = Ttl::secs(2);
    let (gives_old_values, restarts) = (seed & 1 == 0, seed & 2 == 0);
    let mut random = Rng::with_seed(seed);
    let server = Server::new();
    let rows = Rows::new(2);
    let settings = || {
        let guard = LoadGuard::new("rows", LoadLimits::default().without_throttle());
        let settings = ReadThroughSettings::default().guard(guard.unwrap());
        let settings = settings.ttl_jitter(0.5).early_refresh(2.0);
        let settings = settings.negative_ttl(secs(2));
        match gives_old_values {
            true => settings
                .stale_while_revalidate(secs(2))
                .stale_if_error(secs(4)),
            false => settings,
        }
    };
    let clients = protocols.map(|protocol| {
        let layer = ReadThroughLayer::new(rows.clone(), SHORT);
        let layer = layer.settings(settings()).unwrap();
        let client = client_by(protocol, &server, settings());
        (client.layer(layer), client)
    });
    let ends = Instant::now() + secs(7);
    let (rows, clients) = (&rows, &clients);
    let mut randoms = std::iter::repeat_with(|| random.fork());
    let readers = randoms.by_ref().take(24).map(|mut random| async move {
        while Instant::now() < ends {
            sleep(ms(random.u64(..60))).await;
            let key = &rows.any_key(&mut random);
            let (layered, client) = &clients[random.usize(..3)];
            let (takes, patience) = (load_time(&mut random), patience(&mut random));
            let ending = random.u8(..10);
            let load = || async move {
                let loaded = rows.load(key, takes).await;
                match ending {
                    0 => Err("down".into()),
                    1 => resume_unwind(Box::new("a bug in the loader")),
                    _ => loaded,
                }
            };
            match random.u8(..4) {
                0 => rows.read(key, patience, layered.get(key)).await,
                1 => {
                    let load = |_: Vec<Key>| async move {
                        let loaded = load().await?;
                        Ok::<_, BoxError>(loaded.map(|value| (key.clone(), value)))
                    };
                    let get = async {
                        let many = client.get_many_or_load([key], SHORT, load).await;
                        many.into_outcomes().remove(0).into_result()
                    };
                    rows.read(key, patience, get).await;
                }
                _ => {
                    let get = client.get_or_load(key, SHORT, load);
                    rows.read(key, patience, get).await;
                }
            }
        }
    });
    let readers = join_all(readers);
    let writers = randoms.take(2).map(|mut random| async move {
        while Instant::now() < ends {
            sleep(ms(random.u64(..400))).await;
            let key = &rows.any_key(&mut random);
            let (layered, client) = &clients[random.usize(..3)];
            match random.bool() {
                true => rows.update(key, layered.invalidate(key)).await,
                false => rows.update(key, client.invalidate(key)).await,
            }
        }
    });
    let writers = join_all(writers);
    let faults = async {
        while Instant::now() < ends {
            sleep(ms(random.u64(50..600))).await;
            match random.u8(..6) {
                0 => server.delay_every(2, ms(random.u64(1..40))),
                1 => server.delay(ms(random.u64(1..33))),
                2 if restarts => server.close_connections(),
                3 if restarts => server.restart_empty(),
                _ => server.delay(Duration::ZERO),
            }
        }
    };
    tokio::join!(readers, writers, faults);
}

#[test]
fn many_clients_never_read_what_was_invalidated() {
    with_seeds(|seed| many_clients(seed, [Protocol::Meta; 3]));
}

#[cfg(feature = "classic")]
#[test]
fn many_clients_of_the_classic_protocol_never_read_what_was_invalidated() {
    with_seeds(|seed| many_clients(seed, [Protocol::Classic; 3]));
}

#[cfg(feature = "classic")]
#[test]
fn many_clients_of_either_protocol_never_read_what_was_invalidated() {
    use Protocol::{Classic, Meta};
    with_seeds(|seed| many_clients(seed, [Classic, Meta, Classic]));
}

/// A client of three servers that stall, so that others have to stand in for them.
async fn one_client(seed: u64) {
    const SHORT: Ttl = Ttl::secs(3);
    let (gives_old_values, leases) = (seed & 1 == 0, seed & 2 == 0);
    let mut random = Rng::with_seed(seed);
    let servers = [Server::new(), Server::new(), Server::new()];
    let rows = Rows::new(6);
    let guard = LoadGuard::new("rows", LoadLimits::default().without_throttle());
    let settings = ReadThroughSettings::default().guard(guard.unwrap());
    let settings = settings.early_refresh(2.0).leases(leases);
    let settings = match gives_old_values {
        true => settings
            .stale_while_revalidate(secs(2))
            .stale_if_error(secs(4)),
        false => settings,
    };
    let client = in_memory(&servers).read_through(settings).build().unwrap();
    let ends = Instant::now() + secs(14);
    let (rows, client) = (&rows, &client);
    let mut randoms = std::iter::repeat_with(|| random.fork());
    let readers = randoms.by_ref().take(16).map(|mut random| async move {
        while Instant::now() < ends {
            sleep(ms(random.u64(..60))).await;
            let key = &rows.any_key(&mut random);
            let (takes, patience) = (load_time(&mut random), patience(&mut random));
            let get = client.get_or_load(key, SHORT, || rows.load(key, takes));
            rows.read(key, patience, get).await;
        }
    });
    let readers = join_all(readers);
    let writers = randoms.take(3).map(|mut random| async move {
        while Instant::now() < ends {
            sleep(ms(random.u64(..300))).await;
            let key = &rows.any_key(&mut random);
            rows.update(key, client.invalidate(key)).await;
        }
    });
    let writers = join_all(writers);
    let faults = async {
        while Instant::now() < ends {
            sleep(ms(random.u64(50..2_500))).await;
            let server = &servers[random.usize(..3)];
            match random.u8(..6) {
                0 | 1 => server.stall(),
                2 => server.close_connections(),
                3 => server.delay_every(2, ms(random.u64(1..40))),
                _ => servers.iter().for_each(|server| {
                    server.resume();
                    server.delay(Duration::ZERO);
                }),
            }
        }
    };
    tokio::join!(readers, writers, faults);
}

#[test]
fn one_client_never_reads_what_it_has_invalidated_though_its_nodes_fail() {
    with_seeds(one_client);
}
