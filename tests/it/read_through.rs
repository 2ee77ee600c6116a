//! Reads that load what the cache does not have, under paused time: one load for many, leases
//! between clients, old values, and what must not be put back.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Notify;
use tokio::time::{Instant, advance, sleep};
use tower_memcached::testing::Server;
use tower_memcached::{
    BlockingLoader, Client, Error, ErrorKind, GroupLayer, Key, LoadGuard, LoadLimits, Loader,
    Operation, Payload, Protocol, ReadThroughLayer, ReadThroughSettings, Request, Ttl,
};

use crate::support::{eventually, in_memory};

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

pub(crate) const TTL: Ttl = Ttl::secs(60);

pub(crate) const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

pub(crate) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Exact TTLs, and nothing refreshed by chance.
pub(crate) fn exact() -> ReadThroughSettings {
    let settings = ReadThroughSettings::default();
    settings.ttl_jitter(0.0).early_refresh(0.0)
}

pub(crate) fn client(server: &Server, settings: ReadThroughSettings) -> Client {
    let builder = in_memory(std::slice::from_ref(server));
    builder.read_through(settings).build().unwrap()
}

pub(crate) fn client_by(
    protocol: Protocol,
    server: &Server,
    settings: ReadThroughSettings,
) -> Client {
    let builder = in_memory(std::slice::from_ref(server)).protocol(protocol);
    builder.read_through(settings).build().unwrap()
}

#[cfg(not(feature = "classic"))]
pub(crate) const PROTOCOLS: &[Protocol] = &[Protocol::Meta];
#[cfg(feature = "classic")]
pub(crate) const PROTOCOLS: &[Protocol] = &[Protocol::Meta, Protocol::Classic];

/// What two clients of one server may speak.
#[cfg(not(feature = "classic"))]
pub(crate) const PAIRS: &[[Protocol; 2]] = &[[Protocol::Meta; 2]];
#[cfg(feature = "classic")]
pub(crate) const PAIRS: &[[Protocol; 2]] = &[
    [Protocol::Meta; 2],
    [Protocol::Classic; 2],
    [Protocol::Meta, Protocol::Classic],
    [Protocol::Classic, Protocol::Meta],
];

/// A table of one row, whose loads take a while and are counted.
#[derive(Clone)]
pub(crate) struct Table(Arc<Inner>);

struct Inner {
    value: std::sync::Mutex<Result<Option<String>, String>>,
    loads: AtomicUsize,
    running: AtomicUsize,
    most: AtomicUsize,
    takes: Duration,
}

impl Table {
    pub(crate) fn new(value: &str, takes: Duration) -> Self {
        Self(Arc::new(Inner {
            value: std::sync::Mutex::new(Ok(Some(value.into()))),
            loads: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            takes,
        }))
    }

    pub(crate) fn update(&self, value: &str) {
        *self.0.value.lock().unwrap() = Ok(Some(value.into()));
    }

    fn remove(&self) {
        *self.0.value.lock().unwrap() = Ok(None);
    }

    fn fail(&self) {
        *self.0.value.lock().unwrap() = Err("down".into());
    }

    pub(crate) fn loads(&self) -> usize {
        self.0.loads.load(Ordering::Relaxed)
    }

    /// Reads the row at once and then takes its time: what it returns is as old as it may be.
    pub(crate) async fn read(&self) -> Result<Option<String>, BoxError> {
        self.read_in(self.0.takes).await
    }

    async fn read_in(&self, takes: Duration) -> Result<Option<String>, BoxError> {
        let value = self.0.value.lock().unwrap().clone();
        self.0.loads.fetch_add(1, Ordering::Relaxed);
        let running = self.0.running.fetch_add(1, Ordering::Relaxed) + 1;
        self.0.most.fetch_max(running, Ordering::Relaxed);
        sleep(takes).await;
        self.0.running.fetch_sub(1, Ordering::Relaxed);
        Ok(value?)
    }

    pub(crate) async fn get(&self, client: &Client) -> Result<Option<String>, Error> {
        self.get_in(self.0.takes, client).await
    }

    /// The same with a load that takes so long.
    pub(crate) async fn get_in(
        &self,
        takes: Duration,
        client: &Client,
    ) -> Result<Option<String>, Error> {
        let load = || self.read_in(takes);
        let value = client.get_or_load("k", TTL, load).await?;
        Ok(value.map(|value| String::from_utf8(value.to_vec()).unwrap()))
    }
}

impl Loader for Table {
    async fn load(&self, _: &Key) -> Result<Option<Payload>, BoxError> {
        Ok(self.read().await?.map(Payload::from))
    }
}

pub(crate) fn some(value: &str) -> Option<String> {
    Some(value.into())
}

#[tokio::test(start_paused = true)]
async fn a_thousand_misses_in_each_of_two_clients_are_one_load_in_all() {
    for &protocol in PROTOCOLS {
        let server = Server::new();
        let table = Table::new("v", ms(50));
        let clients = [(); 2].map(|()| client_by(protocol, &server, exact()));
        let gets = (0..2000).map(|n| table.get(&clients[n % 2]));
        for value in join_all(gets).await {
            assert_eq!(value.unwrap(), some("v"));
        }
        assert_eq!(table.loads(), 1, "{protocol}");
        // And none at all now.
        assert_eq!(table.get(&clients[1]).await.unwrap(), some("v"));
        assert_eq!(table.loads(), 1, "{protocol}");
    }
}

#[tokio::test(start_paused = true)]
async fn without_leases_each_client_loads_once() {
    let server = Server::new();
    let table = Table::new("v", ms(50));
    let settings = || exact().leases(false);
    let clients = [client(&server, settings()), client(&server, settings())];
    let gets = (0..2000).map(|n| table.get(&clients[n % 2]));
    for value in join_all(gets).await {
        assert_eq!(value.unwrap(), some("v"));
    }
    assert_eq!(table.loads(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_answer_does_not_wait_for_what_is_put_back() {
    let server = Server::new();
    let table = Table::new("v", ms(5));
    let client = client(&server, exact());
    client.version().await.unwrap();
    let begun = Instant::now();
    let get = table.get(&client);
    let slow_down = async {
        sleep(ms(2)).await;
        server.delay(ms(25));
    };
    assert_eq!(tokio::join!(get, slow_down).0.unwrap(), some("v"));
    assert!(begun.elapsed() < ms(20), "{:?}", begun.elapsed());
    eventually("it is put back", || {
        server.peek("k").is_some_and(|value| value == "v")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn what_was_invalidated_during_its_load_is_not_put_back() {
    for leases in [true, false] {
        let server = Server::new();
        let table = Table::new("old", ms(50));
        let client = client(&server, exact().leases(leases));
        let reader = table.get(&client);
        let writer = async {
            sleep(ms(10)).await;
            table.update("new");
            client.invalidate("k").await.unwrap();
            // A read that begins now gets the new value, though the old one is still being loaded.
            assert_eq!(table.get(&client).await.unwrap(), some("new"));
        };
        let (old, ()) = tokio::join!(reader, writer);
        assert_eq!(old.unwrap(), some("old"), "it began before");
        sleep(ms(100)).await;
        assert_eq!(table.get(&client).await.unwrap(), some("new"));
        assert_eq!(server.peek("k").unwrap(), "new");
    }
}

#[tokio::test(start_paused = true)]
async fn what_another_client_invalidated_is_neither_put_back_nor_shared() {
    for pair in PAIRS {
        let server = Server::new();
        let table = Table::new("old", ms(50));
        let [reads, writes] = pair.map(|protocol| client_by(protocol, &server, exact()));
        let reader = table.get(&reads);
        let writer = async {
            sleep(ms(10)).await;
            table.update("new");
            writes.invalidate("k").await.unwrap();
            // The reader's client has not heard of it, but the lease has gone.
            assert_eq!(table.get(&reads).await.unwrap(), some("new"));
        };
        let (old, ()) = tokio::join!(reader, writer);
        assert_eq!(old.unwrap(), some("old"), "it began before");
        sleep(ms(100)).await;
        assert_eq!(server.peek("k").unwrap(), "new", "{pair:?}");
    }
}

#[cfg(feature = "classic")]
#[tokio::test(start_paused = true)]
async fn what_is_put_back_finds_a_connection_that_its_token_fits_among_newer_ones() {
    let server = Server::new();
    let builder = in_memory(std::slice::from_ref(&server)).protocol(Protocol::Classic);
    let client = builder.read_through(exact()).build().unwrap();
    client.set("other", "v", TTL).await.unwrap();
    let token = client.gets("other").await.unwrap().unwrap().cas().unwrap();
    let table = Table::new("v", ms(50));
    let others = async {
        sleep(ms(10)).await;
        // There is one connection. Now there are as many as may be.
        server.delay(ms(1));
        for value in join_all((0..200).map(|_| client.get("other"))).await {
            assert_eq!(value.unwrap().unwrap(), "v");
        }
        // And all are busy.
        sleep(ms(39)).await;
        join_all((0..100).map(|_| client.get("other"))).await;
    };
    let (loaded, _) = tokio::join!(table.get(&client), others);
    assert_eq!(loaded.unwrap(), some("v"));
    eventually("it is put back", || {
        server.peek("k").is_some_and(|value| value == "v")
    })
    .await;
    let swapped = client.cas("other", "w", TTL, token).await.unwrap();
    assert_eq!(swapped, tower_memcached::CasOutcome::Stored);
    // Of the server as it is now, the token says nothing.
    server.close_connections();
    client.get("other").await.unwrap();
    let swapped = client.cas("other", "x", TTL, token).await.unwrap();
    assert_eq!(swapped, tower_memcached::CasOutcome::Exists);
}

#[tokio::test(start_paused = true)]
async fn a_set_during_a_load_stays() {
    for leases in [true, false] {
        let server = Server::new();
        let table = Table::new("loaded", ms(50));
        let client = client(&server, exact().leases(leases));
        let writer = async {
            sleep(ms(10)).await;
            client.set("k", "set", TTL).await.unwrap();
        };
        let (loaded, ()) = tokio::join!(table.get(&client), writer);
        assert_eq!(loaded.unwrap(), some("loaded"));
        sleep(ms(100)).await;
        assert_eq!(server.peek("k").unwrap(), "set");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_winner_costs_others_a_wait_and_no_more() {
    for &pair in PAIRS {
        a_winner_dies(pair).await;
    }
}

async fn a_winner_dies(pair: [Protocol; 2]) {
    let server = Server::new();
    let table = Table::new("v", ms(5));
    let clients = pair.map(|protocol| client_by(protocol, &server, exact()));
    let winner = tokio::spawn({
        let client = clients[0].clone();
        async move {
            let hangs = || std::future::pending::<Result<Option<&str>, BoxError>>();
            client.get_or_load("k", TTL, hangs).await
        }
    });
    eventually("it has the lease", || server.peek("k").is_some()).await;
    let begun = Instant::now();
    assert_eq!(table.get(&clients[1]).await.unwrap(), some("v"));
    let waited = begun.elapsed();
    // Whose the placeholder is that the meta protocol leaves cannot be told in the classic one.
    let waits = pair != [Protocol::Meta, Protocol::Classic];
    assert_eq!(waited >= ms(500), waits, "{pair:?}: {waited:?}");
    assert!(waited < ms(600), "{pair:?}: {waited:?}");
    eventually("it is put back", || {
        server.peek("k").is_some_and(|value| value == "v")
    })
    .await;
    // The winner is not dead, only slow: what it had is void.
    let error = winner.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Load);
    assert_eq!(server.peek("k").unwrap(), "v");
}

#[tokio::test(start_paused = true)]
async fn a_winner_that_leaves_fails_or_finds_nothing_gives_its_lease_up() {
    let server = Server::new();
    let clients = [client(&server, exact()), client(&server, exact())];
    let table = Table::new("v", ms(5));
    let begun = Instant::now();
    for round in 0..3 {
        let key = format!("k{round}");
        let winner = async {
            let load = || async {
                sleep(ms(10)).await;
                match round {
                    0 => std::future::pending().await,
                    1 => Err("no"),
                    _ => Ok(None::<&str>),
                }
            };
            let get = clients[0].get_or_load(&key, TTL, load);
            let _ = tokio::time::timeout(ms(20), get).await;
        };
        let other = async {
            sleep(ms(5)).await;
            clients[1].get_or_load(&key, TTL, || table.read()).await
        };
        let ((), value) = tokio::join!(winner, other);
        assert_eq!(value.unwrap().unwrap(), "v");
    }
    assert!(begun.elapsed() < ms(400), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_dropped_panics_or_hangs_hands_over() {
    let server = Server::new();
    let client = client(&server, exact());
    for round in 0..3 {
        let key = format!("k{round}");
        let (started, table) = (Notify::new(), Table::new("v", ms(5)));
        let leader = async {
            let load = || async {
                started.notify_one();
                sleep(ms(600)).await;
                match round {
                    0 => panic!("a bug in the loader"),
                    _ => std::future::pending::<Result<Option<&str>, BoxError>>().await,
                }
            };
            let get = client.get_or_load(&key, TTL, load);
            match round {
                1 => assert!(tokio::time::timeout(ms(600), get).await.is_err()),
                _ => assert_eq!(get.await.unwrap_err().kind(), ErrorKind::Load),
            }
        };
        let waiters = async {
            started.notified().await;
            // Who began with the leader has no more time than that.
            sleep(ms(500)).await;
            join_all((0..100).map(|_| client.get_or_load(&key, TTL, || table.read()))).await
        };
        let ((), values) = tokio::join!(leader, waiters);
        for value in values {
            assert_eq!(value.unwrap().unwrap(), "v", "round {round}");
        }
        assert_eq!(table.loads(), 1, "round {round}");
    }
}

#[tokio::test(start_paused = true)]
async fn loads_that_all_panic_are_few() {
    let server = Server::new();
    let client = client(&server, exact());
    let loads = AtomicUsize::new(0);
    let load = || async {
        loads.fetch_add(1, Ordering::Relaxed);
        sleep(ms(1)).await;
        if loads.load(Ordering::Relaxed) > 0 {
            panic!("a bug in the loader");
        }
        Ok::<_, BoxError>(None::<&str>)
    };
    for result in join_all((0..1000).map(|_| client.get_or_load("k", TTL, load))).await {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Load);
    }
    assert!(loads.load(Ordering::Relaxed) <= 3, "{loads:?}");
}

#[tokio::test(start_paused = true)]
async fn a_loaders_error_reaches_all_typed_and_is_not_kept() {
    let server = Server::new();
    let client = client(&server, exact());
    let fail = || async {
        sleep(ms(1)).await;
        Err::<Option<&str>, _>(std::io::Error::other("no such table"))
    };
    for result in join_all((0..10).map(|_| client.get_or_load("k", TTL, fail))).await {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Load);
        let source = std::error::Error::source(&error).unwrap();
        assert!(source.is::<std::io::Error>());
    }
    let table = Table::new("v", ms(1));
    assert_eq!(table.get(&client).await.unwrap(), some("v"));
}

#[tokio::test(start_paused = true)]
async fn old_values_are_given_while_one_loads_them_anew_behind_the_answer() {
    let server = Server::new();
    let table = Table::new("old", ms(50));
    let settings = exact().stale_while_revalidate(secs(30));
    let layer = ReadThroughLayer::new(table.clone(), Ttl::secs(10));
    let layer = layer.settings(settings).unwrap();
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let builder = in_memory(std::slice::from_ref(&server)).layer(layer.clone());
            builder.timeout(secs(1)).build().unwrap()
        })
        .collect();
    assert_eq!(clients[0].get("k").await.unwrap().unwrap(), "old");
    sleep(secs(9)).await;
    assert!(!clients[0].get("k").await.unwrap().unwrap().is_stale());
    table.update("new");
    sleep(secs(2)).await;
    let begun = Instant::now();
    for value in join_all((0..1000).map(|n| clients[n % 2].get("k"))).await {
        let value = value.unwrap().unwrap();
        assert_eq!(value, "old");
        assert!(value.is_stale());
    }
    assert!(begun.elapsed() < ms(40), "nobody has waited for the load");
    sleep(ms(100)).await;
    assert_eq!(table.loads(), 2, "one of the two clients loaded it anew");
    for client in &clients {
        let value = client.get("k").await.unwrap().unwrap();
        assert_eq!(value, "new");
        assert!(!value.is_stale());
    }
    // Beyond that they are not given.
    table.update("newer");
    sleep(secs(41)).await;
    assert_eq!(clients[0].get("k").await.unwrap().unwrap(), "newer");
}

#[tokio::test(start_paused = true)]
async fn with_a_closure_one_caller_loads_an_old_value_and_the_others_get_it() {
    let server = Server::new();
    let table = Table::new("old", ms(50));
    let settings = || exact().stale_while_revalidate(secs(600));
    let clients = [client(&server, settings()), client(&server, settings())];
    assert_eq!(table.get(&clients[0]).await.unwrap(), some("old"));
    table.update("new");
    sleep(secs(61)).await;
    let values = join_all((0..100).map(|n| table.get(&clients[n % 2]))).await;
    let new = values
        .iter()
        .filter(|value| *value.as_ref().unwrap() == some("new"));
    assert_eq!(new.count(), 1);
    assert_eq!(table.loads(), 2);
}

#[tokio::test(start_paused = true)]
async fn who_was_to_load_an_old_value_and_died_is_replaced_after_a_lease() {
    let server = Server::new();
    let table = Table::new("old", ms(5));
    let settings = || exact().stale_while_revalidate(secs(600));
    let clients = [client(&server, settings()), client(&server, settings())];
    table.get(&clients[0]).await.unwrap();
    table.update("new");
    sleep(secs(61)).await;
    // It wins, and is never heard of again.
    let hangs = || std::future::pending::<Result<Option<&str>, BoxError>>();
    let winner = clients[0].get_or_load("k", TTL, hangs);
    assert!(tokio::time::timeout(ms(50), winner).await.is_err());
    assert_eq!(table.get(&clients[1]).await.unwrap(), some("old"));
    sleep(ms(1_900)).await;
    assert_eq!(table.get(&clients[1]).await.unwrap(), some("old"));
    sleep(ms(200)).await;
    assert_eq!(table.get(&clients[1]).await.unwrap(), some("new"));
    sleep(ms(10)).await;
    assert_eq!(table.get(&clients[0]).await.unwrap(), some("new"));
}

#[tokio::test(start_paused = true)]
async fn old_values_stand_in_when_the_database_fails_or_sheds_for_so_long_and_no_longer() {
    for sheds in [false, true] {
        let server = Server::new();
        let table = Table::new("v", ms(5));
        let limits = LoadLimits::default()
            .rate(1)
            .burst(1)
            .max_queue(0)
            .without_throttle();
        let guard = match sheds {
            true => LoadGuard::new("shedding", limits).unwrap(),
            false => LoadGuard::default(),
        };
        let settings = exact().guard(guard.clone()).stale_if_error(secs(30));
        let client = client(&server, settings);
        assert_eq!(table.get(&client).await.unwrap(), some("v"));
        sleep(secs(70)).await;
        table.fail();
        // What the guard has left is used up.
        let _ = guard.run(async { Ok::<_, BoxError>(()) }).await;
        let value = client.get_or_load("k", TTL, || table.read()).await;
        let value = value.unwrap().unwrap();
        assert!(value.is_stale());
        assert_eq!(value, "v");
        sleep(secs(30)).await;
        let _ = guard.run(async { Ok::<_, BoxError>(()) }).await;
        let error = table.get(&client).await.unwrap_err();
        let expected = match sheds {
            true => ErrorKind::LoadShed,
            false => ErrorKind::Load,
        };
        assert_eq!(error.kind(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn a_failing_database_is_not_asked_for_an_old_value_at_every_read() {
    let server = Server::new();
    let table = Table::new("v", ms(5));
    let client = client(&server, exact().stale_if_error(secs(600)));
    table.get(&client).await.unwrap();
    sleep(secs(61)).await;
    table.fail();
    for _ in 0..100 {
        assert_eq!(table.get(&client).await.unwrap(), some("v"));
    }
    assert_eq!(table.loads(), 2);
    sleep(secs(2)).await;
    table.update("new");
    assert_eq!(table.get(&client).await.unwrap(), some("new"));
}

#[tokio::test(start_paused = true)]
async fn that_there_is_nothing_is_kept_if_it_is_to_be() {
    let server = Server::new();
    let table = Table::new("v", ms(5));
    table.remove();
    let caching = client(&server, exact().negative_ttl(secs(5)));
    let plain = client(&server, exact());
    for _ in 0..10 {
        assert_eq!(table.get(&caching).await.unwrap(), None);
        sleep(ms(1)).await;
    }
    assert_eq!(table.loads(), 1);
    // Whoever reads it: it is no value.
    assert_eq!(table.get(&plain).await.unwrap(), None);
    assert_eq!(plain.get("k").await.unwrap(), None);
    let many = plain.get_many(["k"]).await;
    assert!(many.into_hits().is_empty());
    assert_eq!(table.loads(), 1);
    table.update("new");
    caching.invalidate("k").await.unwrap();
    assert_eq!(table.get(&caching).await.unwrap(), some("new"));
    // It ends by itself, too.
    table.remove();
    caching.invalidate("k").await.unwrap();
    assert_eq!(table.get(&caching).await.unwrap(), None);
    table.update("newer");
    sleep(secs(6)).await;
    assert_eq!(table.get(&caching).await.unwrap(), some("newer"));
}

#[tokio::test(start_paused = true)]
async fn a_row_that_is_gone_takes_its_old_value_with_it() {
    let server = Server::new();
    let table = Table::new("v", ms(5));
    let client = client(&server, exact().stale_while_revalidate(secs(600)));
    table.get(&client).await.unwrap();
    table.remove();
    sleep(secs(61)).await;
    assert_eq!(table.get(&client).await.unwrap(), None);
    assert_eq!(table.get(&client).await.unwrap(), None);
    sleep(ms(10)).await;
    assert_eq!(server.peek("k"), None);
}

#[tokio::test(start_paused = true)]
async fn values_are_loaded_anew_before_they_expire_by_one_client() {
    let server = Server::new();
    let table = Table::new("v", ms(900));
    let eager = || exact().early_refresh(20.0);
    let clients = [client(&server, eager()), client(&server, eager())];
    for client in &clients {
        // Each knows what a load costs.
        client.delete("k").await.unwrap();
        table.get(client).await.unwrap();
    }
    let mut refreshed = 0;
    for second in 0..120 {
        sleep(ms(1_000)).await;
        let before = table.loads();
        join_all((0..20).map(|n| table.get(&clients[n % 2]))).await;
        let loads = table.loads() - before;
        assert!(loads <= 1, "{loads} at once in second {second}");
        refreshed += loads;
    }
    // Each lives for 60 s: had none been refreshed early there would have been two misses.
    assert!(refreshed >= 3, "{refreshed}");
    assert_eq!(table.0.most.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn ttls_are_scattered() {
    let server = Server::new();
    let client = client(&server, ReadThroughSettings::default().ttl_jitter(0.5));
    for n in 0..50 {
        let load = || async { Ok::<_, BoxError>(Some("v")) };
        let ttl = Ttl::secs(1000);
        client
            .get_or_load(format!("k{n}"), ttl, load)
            .await
            .unwrap();
    }
    sleep(ms(10)).await;
    let line = |line: bytes::Bytes| String::from_utf8_lossy(&line).into_owned();
    let lines = server.requests().into_iter().map(line);
    let ttls: Vec<u64> = lines
        .filter(|line| line.starts_with("ms k"))
        .map(|line| {
            let ttl = line.split(' ').find_map(|word| word.strip_prefix('T'));
            ttl.unwrap().parse().unwrap()
        })
        .collect();
    assert_eq!(ttls.len(), 50);
    assert!(
        ttls.iter().all(|ttl| (500..=1000).contains(ttl)),
        "{ttls:?}"
    );
    let (least, most) = (ttls.iter().min().unwrap(), ttls.iter().max().unwrap());
    assert!(most - least > 250, "{ttls:?}");
}

#[tokio::test(start_paused = true)]
async fn all_that_is_missing_is_loaded_in_one_call() {
    let server = Server::new();
    let client = client(&server, exact());
    client.set("a", "cached", TTL).await.unwrap();
    let calls = std::sync::Mutex::new(Vec::new());
    let load = |missing: Vec<Key>| {
        let mut names: Vec<_> = missing.iter().map(ToString::to_string).collect();
        names.sort();
        calls.lock().unwrap().push(names);
        async move {
            let found = missing.into_iter().filter(|key| key.as_bytes() != b"none");
            let found: HashMap<Key, &str> = found.map(|key| (key, "loaded")).collect();
            Ok::<_, BoxError>(found)
        }
    };
    let keys = ["a", "b", "none", "c", "not a key", "b"];
    let many = client.get_many_or_load(keys, TTL, load).await;
    let values: Vec<_> = many
        .into_outcomes()
        .into_iter()
        .map(|outcome| outcome.into_result().map(|value| value.map(|v| v.to_vec())))
        .collect();
    let loaded = Some(b"loaded".to_vec());
    assert_eq!(values[0].as_ref().unwrap(), &Some(b"cached".to_vec()));
    assert_eq!(values[1].as_ref().unwrap(), &loaded);
    assert_eq!(values[2].as_ref().unwrap(), &None);
    assert_eq!(values[3].as_ref().unwrap(), &loaded);
    let invalid = values[4].as_ref().unwrap_err();
    assert_eq!(invalid.kind(), ErrorKind::InvalidKey);
    assert_eq!(values[5].as_ref().unwrap(), &loaded);
    assert_eq!(*calls.lock().unwrap(), [["b", "c", "none"]]);
    sleep(ms(10)).await;
    let again = client.get_many_or_load(["a", "b", "c"], TTL, load).await;
    assert!(
        again
            .outcomes()
            .iter()
            .all(|outcome| outcome.value().is_some())
    );
    assert_eq!(calls.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn many_keys_and_single_ones_share_their_loads() {
    let server = Server::new();
    let client = client(&server, exact());
    let loads = AtomicUsize::new(0);
    let slow = |missing: Vec<Key>| {
        loads.fetch_add(missing.len(), Ordering::Relaxed);
        async move {
            sleep(ms(20)).await;
            let found: Vec<(Key, &str)> = missing.into_iter().map(|key| (key, "v")).collect();
            Ok::<_, BoxError>(found)
        }
    };
    let one = |key: &'static str| {
        let (client, loads) = (&client, &loads);
        async move {
            let load = || async {
                loads.fetch_add(1, Ordering::Relaxed);
                sleep(ms(20)).await;
                Ok::<_, BoxError>(Some("v"))
            };
            client.get_or_load(key, TTL, load).await.unwrap().unwrap()
        }
    };
    let (first, second, a, d) = tokio::join!(
        client.get_many_or_load(["a", "b", "c"], TTL, slow),
        client.get_many_or_load(["c", "d", "b"], TTL, slow),
        one("a"),
        one("d"),
    );
    for (_, outcome) in first.iter().chain(second.iter()) {
        assert_eq!(*outcome.value().unwrap(), "v");
    }
    assert_eq!((&a[..], &d[..]), (&b"v"[..], &b"v"[..]));
    assert_eq!(loads.load(Ordering::Relaxed), 4);
}

#[tokio::test(start_paused = true)]
async fn a_shared_load_outlives_its_caller() {
    let server = Server::new();
    let table = Table::new("v", ms(200));
    let layer = ReadThroughLayer::new(table.clone(), TTL);
    let builder = in_memory(std::slice::from_ref(&server)).layer(layer);
    // The client's time is up before the load's.
    let client = builder.timeout(ms(50)).build().unwrap();
    for _ in 0..3 {
        let error = client.get("k").await.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Load | ErrorKind::Timeout));
    }
    sleep(ms(200)).await;
    assert_eq!(client.get("k").await.unwrap().unwrap(), "v");
    assert_eq!(table.loads(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_dead_cache_is_a_guarded_database() {
    let server = Server::new();
    let table = Table::new("v", ms(10));
    let limits = LoadLimits::default().max_concurrent(4).max_queue(8);
    let limits = limits.max_wait(ms(50)).without_throttle();
    let guard = LoadGuard::new("table", limits).unwrap();
    let client = client(&server, exact().guard(guard.clone()));
    server.shutdown();
    let gets = (0..100).map(|n| {
        let (client, table) = (client.clone(), table.clone());
        async move {
            let key = format!("k{n}");
            client.get_or_load(key, TTL, || table.read()).await
        }
    });
    let (mut loaded, mut shed) = (0, 0);
    for result in join_all(gets).await {
        match result {
            Ok(Some(_)) => loaded += 1,
            Err(error) if error.kind() == ErrorKind::LoadShed => shed += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((loaded, shed), (12, 88));
    assert!(table.0.most.load(Ordering::Relaxed) <= 4);
}

#[tokio::test(start_paused = true)]
async fn a_groups_limits_are_within_those_of_the_database() {
    let server = Server::new();
    let table = Table::new("v", ms(10));
    let limits = LoadLimits::default().max_queue(0).without_throttle();
    let database = LoadGuard::new("table", limits.clone().max_concurrent(5)).unwrap();
    let reports = database.group("reports", limits.max_concurrent(2)).unwrap();
    let everybody = client(&server, exact().guard(database));
    let group = everybody.layer(GroupLayer::new("reports").prefix("report:"));
    let group = group.with_read_through(exact().guard(reports)).unwrap();
    let load = || table.read();
    let of_the_group = (0..10).map(|n| group.get_or_load(format!("g{n}"), TTL, load));
    let of_others = (0..10).map(|n| everybody.get_or_load(format!("k{n}"), TTL, load));
    let (group, others) = tokio::join!(join_all(of_the_group), join_all(of_others));
    let loaded = |results: Vec<Result<_, _>>| results.into_iter().filter(Result::is_ok).count();
    assert_eq!((loaded(group), loaded(others)), (2, 3));
    assert_eq!(table.0.most.load(Ordering::Relaxed), 5);
}

#[tokio::test]
async fn a_blocking_loader_blocks_nobody() {
    let server = Server::new();
    #[expect(clippy::disallowed_methods, reason = "what a driver that blocks does")]
    let load = |_: &Key| {
        std::thread::sleep(ms(200));
        Ok::<_, std::io::Error>(Some("v"))
    };
    let loader = BlockingLoader::new("loads", 2, load).unwrap();
    let layer = ReadThroughLayer::new(loader, TTL);
    let builder = in_memory(std::slice::from_ref(&server)).layer(layer);
    let client = builder.timeout(secs(5)).build().unwrap();
    let mut turns = 0;
    let get = client.get("k");
    let others = async {
        loop {
            sleep(ms(1)).await;
            turns += 1;
        }
    };
    tokio::select! {
        value = get => assert_eq!(value.unwrap().unwrap(), "v"),
        () = others => {}
    }
    assert!(turns > 10, "{turns}");
}

#[tokio::test(start_paused = true)]
async fn refills_have_a_limit() {
    let server = Server::new();
    let client = client(&server, exact().max_refills(1).leases(false));
    client.version().await.unwrap();
    let load = || async {
        sleep(ms(5)).await;
        Ok::<_, BoxError>(Some("v"))
    };
    let gets = (0..10).map(|n| client.get_or_load(format!("k{n}"), TTL, load));
    let gets = join_all(gets);
    let slow_down = async {
        sleep(ms(2)).await;
        server.delay(ms(10));
    };
    for value in tokio::join!(gets, slow_down).0 {
        assert_eq!(value.unwrap().unwrap(), "v");
    }
    advance(ms(50)).await;
    eventually("one is put back", || server.len() == 1).await;
    sleep(ms(50)).await;
    assert_eq!(server.len(), 1);
}

#[tokio::test]
async fn settings_that_make_no_sense_are_refused() {
    let server = Server::new();
    for settings in [
        ReadThroughSettings::default().load_timeout(Duration::ZERO),
        ReadThroughSettings::default().lease(Duration::ZERO),
        ReadThroughSettings::default().lease_wait(secs(1)),
        ReadThroughSettings::default().early_refresh(f64::NAN),
        ReadThroughSettings::default().early_refresh(-1.0),
        ReadThroughSettings::default().ttl_jitter(1.5),
        ReadThroughSettings::default().negative_ttl(Duration::ZERO),
        ReadThroughSettings::default().max_refills(0),
    ] {
        let builder = in_memory(std::slice::from_ref(&server));
        let error = builder.read_through(settings).build().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    }
}

#[tokio::test(start_paused = true)]
async fn a_value_that_cannot_be_cached_keeps_nobody_waiting() {
    let server = Server::new();
    let large = "x".repeat(5_000);
    let table = Table::new(&large, ms(5));
    let small = || {
        let builder = in_memory(std::slice::from_ref(&server)).max_value_size(1_000);
        builder.read_through(exact()).build().unwrap()
    };
    let clients = [small(), small()];
    for n in 0..6 {
        let begun = Instant::now();
        assert_eq!(table.get(&clients[n % 2]).await.unwrap(), some(&large));
        assert!(begun.elapsed() < ms(100), "{:?}", begun.elapsed());
        sleep(ms(5)).await;
    }
    assert_eq!(table.loads(), 6);
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_invalidated_is_not_read_by_who_tried() {
    let server = Server::new();
    let table = Table::new("old", ms(5));
    let builder = in_memory(std::slice::from_ref(&server)).max_in_flight(1);
    let client = builder.read_through(exact()).build().unwrap();
    assert_eq!(table.get(&client).await.unwrap(), some("old"));
    eventually("it is put back", || {
        server.peek("k").is_some_and(|value| value == "old")
    })
    .await;
    server.delay(ms(20));
    let (occupies, refused) = tokio::join!(client.get("other"), async {
        sleep(ms(5)).await;
        table.update("new");
        client.invalidate("k").await
    });
    occupies.unwrap();
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Overloaded);
    assert_eq!(server.peek("k").unwrap(), "old");
    server.delay(Duration::ZERO);
    assert_eq!(table.get(&client).await.unwrap(), some("new"));
    eventually("it is deleted after all", || {
        server.peek("k").is_none_or(|value| value != "old")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn who_overtakes_a_winner_and_fails_leaves_it_its_lease() {
    let server = Server::new();
    let table = Table::new("v", ms(700));
    let clients = [client(&server, exact()), client(&server, exact())];
    let overtakes = async {
        sleep(ms(5)).await;
        let fails = || async { Err::<Option<&str>, _>("down") };
        clients[1].get_or_load("k", TTL, fails).await
    };
    let (won, overtook) = tokio::join!(table.get(&clients[0]), overtakes);
    assert_eq!(won.unwrap(), some("v"));
    assert_eq!(overtook.unwrap_err().kind(), ErrorKind::Load);
    eventually("the winner's value is put back", || {
        server.peek("k").is_some_and(|value| value == "v")
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn no_load_begins_when_there_is_no_time_left_for_it() {
    let server = Server::new();
    let client = client(&server, exact().stale_while_revalidate(secs(600)));
    let load = || async { Ok::<_, BoxError>(Some("old")) };
    client.get_or_load("old", TTL, load).await.unwrap();
    sleep(secs(61)).await;
    let calls = AtomicUsize::new(0);
    let hangs = |_: Vec<Key>| {
        calls.fetch_add(1, Ordering::Relaxed);
        std::future::pending::<Result<Vec<(Key, &str)>, BoxError>>()
    };
    let many = client.get_many_or_load(["new", "old"], TTL, hangs).await;
    assert_eq!(*many.get("old").unwrap().value().unwrap(), "old");
    assert_eq!(many.errors().count(), 1);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_write_behind_what_is_being_put_back_ends_by_its_deadline() {
    let server = Server::new();
    let table = Table::new("v", ms(10));
    let client = client(&server, exact().leases(false));
    client.version().await.unwrap();
    let stall = async {
        sleep(ms(5)).await;
        server.stall();
    };
    let (loaded, ()) = tokio::join!(table.get(&client), stall);
    assert_eq!(loaded.unwrap(), some("v"));
    // It is on its way.
    sleep(ms(2)).await;
    let begun = Instant::now();
    let delete = Operation::Delete {
        key: Key::new("k").unwrap(),
    };
    let request = Request::new(delete).with_deadline(begun + ms(5));
    assert!(client.call(request).await.unwrap_err().is_timeout());
    assert!(begun.elapsed() < ms(10), "{:?}", begun.elapsed());
}
