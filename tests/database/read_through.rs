//! What a client makes of a database: hits, misses, what is put back, and loaders that fail in every way.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use tower_memcached::testing::Memcached;
use tower_memcached::{
    BlockingLoader, Client, ClientBuilder, Error, ErrorKind, Executor, Key, LoadGuard, LoadLimits,
    Loader, Payload, ReadThroughLayer, ReadThroughSettings, Ttl, Value,
};

use crate::support::{Database, Item, LoadError, PATIENCE, eventually, on_each_database};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

const TTL: Ttl = Ttl::secs(600);

on_each_database!(
    what_is_not_in_the_cache_is_loaded_once_and_kept,
    an_update_is_seen_once_it_is_invalidated,
    what_is_not_in_the_database_is_kept_as_that,
    an_old_value_stands_in_for_a_database_that_fails,
    two_clients_load_a_value_once_and_a_thousand_callers_too,
    a_winner_that_is_gone_costs_a_wait,
    loads_that_are_slow_fail_panic_or_are_dropped,
    many_are_loaded_in_one_query,
    blocking_queries_run_on_threads_of_their_own,
);

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// A client that a busy machine does not make time out by itself.
pub(crate) fn patient(node: &Memcached) -> ClientBuilder {
    Client::builder()
        .nodes([node.address()])
        .executor(Executor::current())
        .timeout(Duration::from_secs(5))
        .attempt_timeout(Duration::from_secs(2))
}

fn settings() -> ReadThroughSettings {
    ReadThroughSettings::default().load_timeout(Duration::from_secs(10))
}

fn client(node: &Memcached, settings: ReadThroughSettings) -> Client {
    patient(node).read_through(settings).build().unwrap()
}

fn key(id: i64) -> String {
    format!("item:{id}")
}

async fn load(database: &Database, id: i64) -> Result<Option<String>, LoadError> {
    let loaded = database.load(id).await?;
    Ok(loaded.map(|item| item.encode()))
}

async fn read(client: &Client, database: &Database, id: i64) -> Result<Option<Value>, Error> {
    let load = || load(database, id);
    client.get_or_load(key(id), TTL, load).await
}

fn version(value: Result<Option<Value>, Error>) -> Option<i64> {
    let item = value.unwrap().map(|value| Item::decode(&value).unwrap());
    item.map(|item| item.version)
}

async fn until_cached(client: &Client, id: i64) {
    let until = Instant::now() + PATIENCE;
    while client.get(key(id)).await.unwrap().is_none() {
        assert!(Instant::now() < until, "it is never put back");
        sleep(ms(2)).await;
    }
}

async fn what_is_not_in_the_cache_is_loaded_once_and_kept(database: Database) {
    database.fill(1).await;
    let node = Memcached::spawn(&[]).unwrap();
    let client = client(&node, settings());
    for _ in 0..2 {
        assert_eq!(version(read(&client, &database, 1).await), Some(1));
        until_cached(&client, 1).await;
    }
    assert_eq!(database.loads_started(), 1);
}

async fn an_update_is_seen_once_it_is_invalidated(database: Database) {
    database.fill(1).await;
    let node = Memcached::spawn(&[]).unwrap();
    let client = client(&node, settings());
    assert_eq!(version(read(&client, &database, 1).await), Some(1));
    until_cached(&client, 1).await;
    // While the old row is being loaded, too.
    for begun in 2..5 {
        client.delete(key(1)).await.unwrap();
        database.hang();
        let reads = database.loads_read();
        let reader = tokio::spawn({
            let (client, database) = (client.clone(), database.clone());
            async move { version(read(&client, &database, 1).await) }
        });
        eventually("it has read the row", || database.loads_read() > reads).await;
        assert_eq!(database.update(1).await.unwrap(), Some(begun));
        client.invalidate(key(1)).await.unwrap();
        database.release();
        assert_eq!(version(read(&client, &database, 1).await), Some(begun));
        assert_eq!(reader.await.unwrap(), Some(begun - 1));
        until_cached(&client, 1).await;
        assert_eq!(version(client.get(key(1)).await), Some(begun));
    }
}

async fn what_is_not_in_the_database_is_kept_as_that(database: Database) {
    let node = Memcached::spawn(&[]).unwrap();
    let settings = settings().negative_ttl(Duration::from_secs(600));
    let client = client(&node, settings);
    assert_eq!(version(read(&client, &database, 1).await), None);
    let until = Instant::now() + PATIENCE;
    loop {
        let loads = database.loads_started();
        assert_eq!(version(read(&client, &database, 1).await), None);
        if database.loads_started() == loads {
            break;
        }
        assert!(Instant::now() < until, "it is loaded each time");
    }
    // To a plain read there is nothing.
    assert_eq!(client.get(key(1)).await.unwrap(), None);
    assert!(database.insert(1).await.unwrap());
    client.invalidate(key(1)).await.unwrap();
    assert_eq!(version(read(&client, &database, 1).await), Some(1));
}

async fn an_old_value_stands_in_for_a_database_that_fails(database: Database) {
    database.fill(1).await;
    let node = Memcached::spawn(&[]).unwrap();
    let settings = settings().stale_if_error(Duration::from_secs(600));
    let client = client(&node, settings.ttl_jitter(0.0));
    let read = |ttl| client.get_or_load(key(1), ttl, || load(&database, 1));
    assert_eq!(version(read(Ttl::secs(1)).await), Some(1));
    until_cached(&client, 1).await;
    database.fail_every(1);
    let until = Instant::now() + PATIENCE;
    loop {
        let value = read(Ttl::secs(1)).await.unwrap().unwrap();
        if value.is_stale() {
            break;
        }
        assert!(Instant::now() < until, "it does not get old");
        sleep(ms(50)).await;
    }
    assert_eq!(version(read(Ttl::secs(1)).await), Some(1));
    database.heal();
    database.update(1).await.unwrap();
    // As soon as another load may be tried.
    let until = Instant::now() + PATIENCE;
    while version(read(TTL).await) != Some(2) {
        assert!(Instant::now() < until, "it stays old");
        sleep(ms(50)).await;
    }
}

async fn two_clients_load_a_value_once_and_a_thousand_callers_too(database: Database) {
    database.fill(1).await;
    let node = Memcached::spawn(&[]).unwrap();
    // Two clients are to memcached what two processes are.
    let settings = || settings().lease_wait(Duration::from_secs(9));
    let clients = [client(&node, settings()), client(&node, settings())];
    database.delay(ms(100));
    let reads = (0..1000).map(|n| read(&clients[n % 2], &database, 1));
    for value in join_all(reads).await {
        assert_eq!(version(value), Some(1));
    }
    assert_eq!(database.loads_started(), 1);
}

async fn a_winner_that_is_gone_costs_a_wait(database: Database) {
    database.fill(1).await;
    let node = Memcached::spawn(&[]).unwrap();
    // It has the lease for five minutes.
    let settings = || {
        settings()
            .lease(Duration::from_secs(300))
            .lease_wait(ms(300))
    };
    let clients = [client(&node, settings()), client(&node, settings())];
    database.hang();
    let winner = tokio::spawn({
        let (client, database) = (clients[0].clone(), database.clone());
        async move { read(&client, &database, 1).await.map(drop) }
    });
    eventually("it loads", || database.loads_read() == 1).await;
    let waits = Instant::now();
    let loads = read(&clients[1], &database, 1);
    let release = async {
        eventually("another loads", || database.loads_read() == 2).await;
        database.release();
    };
    let (value, ()) = tokio::join!(loads, release);
    assert_eq!(version(value), Some(1));
    assert!(waits.elapsed() >= ms(300), "{:?}", waits.elapsed());
    winner.await.unwrap().unwrap();
    until_cached(&clients[1], 1).await;
}

async fn loads_that_are_slow_fail_panic_or_are_dropped(database: Database) {
    database.fill(10).await;
    let node = Memcached::spawn(&[]).unwrap();
    let guard = LoadGuard::new("items", LoadLimits::default().without_throttle()).unwrap();
    let quick = settings().load_timeout(ms(300)).guard(guard.clone());
    let client = client(&node, quick);

    database.fail_every(1);
    let error = read(&client, &database, 1).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Load);
    let source = std::error::Error::source(&error).unwrap();
    assert!(matches!(
        source.downcast_ref::<LoadError>(),
        Some(LoadError::Told)
    ));

    database.heal();
    database.panic_every(1);
    let error = read(&client, &database, 2).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Load);

    database.heal();
    database.hang();
    let begun = Instant::now();
    let error = read(&client, &database, 3).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Load);
    assert!(begun.elapsed() < PATIENCE / 2);

    let dropped = timeout(ms(50), read(&client, &database, 4)).await;
    assert!(dropped.is_err());

    // Nothing of that is kept: not the error, not the lease, not a place at the database.
    database.heal();
    for id in 1..=10 {
        let until = Instant::now() + PATIENCE;
        while read(&client, &database, id).await.is_err() {
            assert!(Instant::now() < until, "it is never loaded");
        }
        until_cached(&client, id).await;
    }
    assert_eq!(guard.status().running, 0);
    eventually("no load runs on", || database.loads_running() == 0).await;
    assert_eq!(database.connections_in_use(), 0);
}

async fn many_are_loaded_in_one_query(database: Database) {
    database.fill(50).await;
    let node = Memcached::spawn(&[]).unwrap();
    let client = client(&node, settings());
    for id in 1..=20 {
        read(&client, &database, id).await.unwrap();
        until_cached(&client, id).await;
    }
    database.forget();
    let load = |missing: Vec<Key>| {
        let database = database.clone();
        async move {
            let id = |key: &Key| key.to_string()["item:".len()..].parse::<i64>().unwrap();
            let ids: Vec<i64> = missing.iter().map(id).collect();
            let loaded = database.load_many(&ids).await?;
            let items = loaded.into_values();
            let found = items.map(|item| (Key::new(key(item.id)).unwrap(), item.encode()));
            Ok::<_, LoadError>(found.collect::<HashMap<_, _>>())
        }
    };
    let keys: Vec<String> = (1..=60).map(key).collect();
    let found = client.get_many_or_load(&keys, TTL, load).await;
    assert_eq!(found.errors().count(), 0);
    let hits = found.into_hits();
    assert_eq!(hits.len(), 50);
    for (key, value) in hits {
        let item = Item::decode(&value).unwrap();
        assert_eq!(self::key(item.id), key.to_string());
    }
    assert_eq!(database.loads_started(), 1);
}

async fn blocking_queries_run_on_threads_of_their_own(database: Database) {
    database.fill(100).await;
    let node = Memcached::spawn(&[]).unwrap();
    let table = database.clone();
    let load = move |key: &Key| {
        let id = key.to_string()["item:".len()..].parse().unwrap();
        let loaded = table.load_blocking(id)?;
        Ok::<_, LoadError>(loaded.map(|item| item.encode()))
    };
    let loader = BlockingLoader::new("items", 4, load).unwrap();
    let layer = ReadThroughLayer::new(loader, TTL)
        .settings(settings())
        .unwrap();
    let layer = layer.timeout(Duration::from_secs(5)).unwrap();
    let builder = patient(&node).timeout(Duration::from_secs(20));
    let client = builder.layer(layer).build().unwrap();
    database.delay(ms(5));
    let gets = join_all((1..=100).map(|id| client.get(key(id)))).await;
    for (place, value) in gets.into_iter().enumerate() {
        let item = Item::decode(&value.unwrap().unwrap()).unwrap();
        assert_eq!(item.id as usize, place + 1);
    }
    assert!(database.most_loads_running() <= 4);
    assert_eq!(database.loads_started(), 100);
}

/// The same table as a shared loader.
pub(crate) struct Table(pub(crate) Arc<Database>);

impl Loader for Table {
    async fn load(&self, key: &Key) -> Result<Option<Payload>, BoxError> {
        let id = key.to_string()["item:".len()..].parse()?;
        let loaded = self.0.load(id).await?;
        Ok(loaded.map(|item| item.encode().into()))
    }
}
