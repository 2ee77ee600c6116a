//! No read that begins once an update has been invalidated gives an older version: over 100,000 operations by many at
//! once, while nodes stop, die and come back, and the database is slow and fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tower_memcached::read_through::Cache;
use tower_memcached::testing::Memcached;
use tower_memcached::{
    Client, Executor, LoadGuard, LoadLimits, ReadThroughLayer, ReadThroughSettings, Ttl,
};

use crate::read_through::Table;
use crate::support::{Database, Item, LoadError, PATIENCE, on_each_database};

on_each_database!(
    no_read_is_older_than_what_was_invalidated_before_it_while_nodes_fail,
    no_read_is_older_than_what_another_client_invalidated_before_it,
    no_read_of_a_shared_loader_is_older_than_what_was_invalidated_before_it,
);

const KEYS: i64 = 40;
const READERS: usize = 24;
const WRITERS: i64 = 4;
const OPERATIONS: u64 = 100_000;

/// What has been promised, and what was seen.
struct Ledger {
    /// Of each key: the newest version whose invalidation has returned.
    acknowledged: Vec<AtomicI64>,
    operations: AtomicU64,
    updates: AtomicU64,
    values: AtomicU64,
    errors: AtomicU64,
    stale: AtomicU64,
    ended: AtomicBool,
}

impl Ledger {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            acknowledged: (0..=KEYS).map(|_| AtomicI64::new(1)).collect(),
            operations: AtomicU64::new(0),
            updates: AtomicU64::new(0),
            values: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        })
    }

    fn floor(&self, id: i64) -> i64 {
        self.acknowledged[id as usize].load(Ordering::SeqCst)
    }

    fn goes_on(&self) -> bool {
        let operations = self.operations.fetch_add(1, Ordering::Relaxed);
        operations < OPERATIONS && !self.ended.load(Ordering::Relaxed)
    }

    fn check(&self, id: i64, floor: i64, bytes: &[u8]) {
        let item = Item::decode(bytes).unwrap();
        assert_eq!(item.id, id, "another key's value");
        self.values.fetch_add(1, Ordering::Relaxed);
        if item.version < floor {
            self.stale.fetch_add(1, Ordering::Relaxed);
            let seen = item.version;
            eprintln!("item {id}: version {seen} was read after {floor} had been invalidated");
        }
    }

    fn judge(&self) {
        let values = self.values.load(Ordering::Relaxed);
        let updates = self.updates.load(Ordering::Relaxed);
        let errors = self.errors.load(Ordering::Relaxed);
        println!("{values} values, {updates} updates, {errors} errors");
        assert_eq!(self.stale.load(Ordering::Relaxed), 0);
        assert!(self.operations.load(Ordering::Relaxed) >= OPERATIONS);
        assert!(values > OPERATIONS / 2, "{values} values, {errors} errors");
        assert!(updates > 100, "{updates} updates");
    }
}

fn key(id: i64) -> String {
    format!("item:{id}")
}

/// Any value that is not refreshed by chance lives for a second or two, so that all ways are gone all the time.
const TTL: Ttl = Ttl::secs(2);

fn settings() -> ReadThroughSettings {
    let limits = LoadLimits::default().max_concurrent(8).without_throttle();
    ReadThroughSettings::default()
        .guard(LoadGuard::new("items", limits).unwrap())
        .stale_while_revalidate(Duration::from_secs(5))
        .stale_if_error(Duration::from_secs(5))
        .negative_ttl(Duration::from_secs(1))
}

fn nodes(count: usize) -> Vec<Memcached> {
    (0..count).map(|_| Memcached::spawn(&[]).unwrap()).collect()
}

fn client(nodes: &[Memcached]) -> Client {
    Client::builder()
        .nodes(nodes.iter().map(Memcached::address))
        .executor(Executor::dedicated("memcached-io", 1))
        .read_through(settings())
        .build()
        .unwrap()
}

/// Readers of all keys, of which one in a hundred leaves before it has its answer.
fn readers(ledger: &Arc<Ledger>, clients: &[Client], database: &Database, tasks: &mut JoinSet<()>) {
    for reader in 0..READERS {
        let (ledger, database) = (ledger.clone(), database.clone());
        let client = clients[reader % clients.len()].clone();
        tasks.spawn(async move {
            while ledger.goes_on() {
                let id = fastrand::i64(1..=KEYS);
                let floor = ledger.floor(id);
                let read = client.get_or_load(key(id), TTL, || async {
                    let loaded = database.load(id).await?;
                    Ok::<_, LoadError>(loaded.map(|item| item.encode()))
                });
                if fastrand::u32(..100) == 0 {
                    let _ = timeout(Duration::from_micros(fastrand::u64(..2_000)), read).await;
                    continue;
                }
                match read.await {
                    Ok(Some(value)) => ledger.check(id, floor, &value),
                    Ok(None) => panic!("item {id} is there all the time"),
                    Err(_) => {
                        ledger.errors.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
    }
}

/// Each key has one writer, so that the newest version is the one it wrote last. Acknowledged are the invalidations that
/// succeeded, or all.
fn writers<S: Cache>(
    ledger: &Arc<Ledger>,
    client: &Client<S>,
    database: &Database,
    tasks: &mut JoinSet<()>,
    only_successes: bool,
) {
    for writer in 0..WRITERS {
        let (ledger, client, database) = (ledger.clone(), client.clone(), database.clone());
        tasks.spawn(async move {
            while ledger.goes_on() {
                let id = 1 + writer + WRITERS * fastrand::i64(0..KEYS / WRITERS);
                let version = database.update(id).await.unwrap().unwrap();
                let invalidated = client.invalidate(key(id)).await;
                if invalidated.is_ok() || !only_successes {
                    ledger.acknowledged[id as usize].store(version, Ordering::SeqCst);
                }
                ledger.updates.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_millis(fastrand::u64(..10))).await;
            }
        });
    }
}

/// The database is slow, fails and panics, by turns.
fn trouble(ledger: &Arc<Ledger>, database: &Database, tasks: &mut JoinSet<()>) {
    let (ledger, database) = (ledger.clone(), database.clone());
    tasks.spawn(async move {
        while ledger.goes_on() {
            match fastrand::u32(..5) {
                0 => database.delay(Duration::from_millis(30)),
                1 => database.fail_every(3),
                2 => database.panic_every(7),
                _ => database.heal(),
            }
            sleep(Duration::from_millis(300)).await;
        }
        database.heal();
    });
}

async fn all_end(mut tasks: JoinSet<()>) {
    let until = Instant::now() + PATIENCE * 9;
    while let Some(ended) = tokio::time::timeout_at(until, tasks.join_next())
        .await
        .expect("it ends")
    {
        ended.unwrap();
    }
}

/// One client, three nodes: a node is stopped, or killed and started again, all the time.
async fn no_read_is_older_than_what_was_invalidated_before_it_while_nodes_fail(database: Database) {
    database.fill(KEYS).await;
    let mut nodes = nodes(3);
    let client = client(&nodes);
    let (ledger, mut tasks) = (Ledger::new(), JoinSet::new());
    readers(
        &ledger,
        std::slice::from_ref(&client),
        &database,
        &mut tasks,
    );
    // For its own client what failed to be invalidated is in the journal.
    writers(&ledger, &client, &database, &mut tasks, false);
    trouble(&ledger, &database, &mut tasks);
    let faults = tokio::spawn({
        let ledger = ledger.clone();
        async move {
            let mut round = 0;
            while !ledger.ended.load(Ordering::Relaxed) {
                let node = &mut nodes[round % 3];
                if round % 2 == 0 {
                    node.stop().unwrap();
                    sleep(Duration::from_millis(500)).await;
                    node.cont().unwrap();
                } else {
                    node.kill().unwrap();
                    sleep(Duration::from_millis(300)).await;
                    node.restart().unwrap();
                }
                round += 1;
                sleep(Duration::from_millis(700)).await;
            }
            // They live until all is over.
            nodes
        }
    });
    all_end(tasks).await;
    ledger.ended.store(true, Ordering::Relaxed);
    drop(faults.await.unwrap());
    ledger.judge();
}

/// Three clients of one node, as three processes: what one of them has invalidated none of them reads any more.
async fn no_read_is_older_than_what_another_client_invalidated_before_it(database: Database) {
    database.fill(KEYS).await;
    let nodes = nodes(1);
    let clients: Vec<_> = (0..3).map(|_| client(&nodes)).collect();
    let (ledger, mut tasks) = (Ledger::new(), JoinSet::new());
    readers(&ledger, &clients[..2], &database, &mut tasks);
    writers(&ledger, &clients[2], &database, &mut tasks, true);
    trouble(&ledger, &database, &mut tasks);
    all_end(tasks).await;
    ledger.judge();
}

/// The same through a layer, whose loads and refreshes outlive their callers.
async fn no_read_of_a_shared_loader_is_older_than_what_was_invalidated_before_it(
    database: Database,
) {
    database.fill(KEYS).await;
    let nodes = nodes(1);
    let layer = ReadThroughLayer::new(Table(Arc::new(database.clone())), TTL);
    let layer = layer.settings(settings()).unwrap();
    let client = Client::builder()
        .nodes([nodes[0].address()])
        .timeout(Duration::from_secs(2))
        .layer(layer)
        .build()
        .unwrap();
    let (ledger, mut tasks) = (Ledger::new(), JoinSet::new());
    for _ in 0..READERS {
        let (ledger, client) = (ledger.clone(), client.clone());
        tasks.spawn(async move {
            while ledger.goes_on() {
                let id = fastrand::i64(1..=KEYS);
                let floor = ledger.floor(id);
                match client.get(key(id)).await {
                    Ok(Some(value)) => ledger.check(id, floor, &value),
                    Ok(None) => panic!("item {id} is there all the time"),
                    Err(_) => {
                        ledger.errors.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
    }
    writers(&ledger, &client, &database, &mut tasks, true);
    trouble(&ledger, &database, &mut tasks);
    all_end(tasks).await;
    ledger.judge();
}
