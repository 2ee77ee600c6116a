//! [`Database`]: a real database for a test, which counts and fails as it is told.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::items::{self, Gauge, Inside, Item, Items, Scratch};
use super::postgres::Postgres;

/// As many as a pool has unless a test says otherwise.
pub(crate) const CONNECTIONS: u32 = 8;

/// A table of [`Item`]s in SQLite or PostgreSQL. Clones are handles of the same one; the last takes
/// the database with it.
///
/// Faults are set at run time, and only loads have them. They happen after the row has been read
/// and while the connection is held: what a load then answers may be old by that time.
#[derive(Clone)]
pub(crate) struct Database {
    shared: Arc<Shared>,
}

struct Shared {
    // Before what it is about: connections are closed, then the database goes.
    items: Items,
    keep: Keep,
    faults: watch::Sender<Faults>,
    starts: Mutex<Vec<Instant>>,
    running: Gauge,
    read: Arc<AtomicU64>,
}

enum Keep {
    Sqlite { _file: Scratch },
    Postgres(Arc<Postgres>),
}

#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    delay: Duration,
    fail_every: u64,
    panic_every: u64,
    hangs: bool,
}

/// Why a load failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("the database was told to fail")]
    Told,
    #[error(transparent)]
    Database(#[from] items::Error),
}

/// The name that updates and inserts here give an item: whose it is can be seen.
pub(crate) fn name_of(id: i64) -> String {
    format!("item {id}")
}

impl Database {
    /// An SQLite file of its own, with 8 connections.
    pub(crate) async fn sqlite() -> Self {
        Self::sqlite_with(CONNECTIONS).await
    }

    pub(crate) async fn sqlite_with(connections: u32) -> Self {
        let directory = Scratch::new("tower-memcached-sqlite").unwrap();
        let file = directory.path().join("items.db");
        let items = Items::sqlite(&file, connections as usize).unwrap();
        Self::new(items, Keep::Sqlite { _file: directory })
    }

    /// A PostgreSQL server of its own, with 8 connections.
    pub(crate) async fn postgres() -> Self {
        let server = Arc::new(Postgres::start().await);
        Self::on(&server, CONNECTIONS).await
    }

    /// So many connections to a server, which it may share with others: counters and faults are
    /// its own, the items are theirs, too.
    pub(crate) async fn on(server: &Arc<Postgres>, connections: u32) -> Self {
        let items = Items::postgres(server.config(), connections).await.unwrap();
        Self::new(items, Keep::Postgres(server.clone()))
    }

    fn new(items: Items, keep: Keep) -> Self {
        let shared = Shared {
            items,
            keep,
            faults: watch::Sender::default(),
            starts: Mutex::default(),
            running: Gauge::default(),
            read: Arc::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The server, if it is PostgreSQL: to be stopped, for example.
    pub(crate) fn server(&self) -> Option<&Postgres> {
        match &self.shared.keep {
            Keep::Sqlite { .. } => None,
            Keep::Postgres(server) => Some(server),
        }
    }
}

/// Operations.
impl Database {
    /// Reads an item. For PostgreSQL, dropping this ends it; for SQLite, the query goes on to its
    /// end on another thread, as queries of SQLite do.
    pub(crate) async fn load(&self, id: i64) -> Result<Option<Item>, LoadError> {
        let load = self.begin();
        let loaded = self.shared.items.load(id, load.run()).await;
        load.end(loaded)
    }

    /// [`load`](Self::load) for a thread that may block, and that is none of a runtime's.
    pub(crate) fn load_blocking(&self, id: i64) -> Result<Option<Item>, LoadError> {
        let load = self.begin();
        let loaded = self.shared.items.load_blocking(id, load.run());
        load.end(loaded)
    }

    /// Reads those that there are, in one query. It counts as one load.
    pub(crate) async fn load_many(&self, ids: &[i64]) -> Result<HashMap<i64, Item>, LoadError> {
        let load = self.begin();
        let loaded = self.shared.items.load_many(ids, load.run()).await;
        load.end(loaded)
    }

    /// [`load_many`](Self::load_many) for a thread that may block.
    pub(crate) fn load_many_blocking(&self, ids: &[i64]) -> Result<HashMap<i64, Item>, LoadError> {
        let load = self.begin();
        let loaded = self.shared.items.load_many_blocking(ids, load.run());
        load.end(loaded)
    }

    /// Raises an item's version and says the new one, once it is committed; `None` if there is no
    /// such item.
    pub(crate) async fn update(&self, id: i64) -> Result<Option<i64>, items::Error> {
        self.shared.items.update(id, &name_of(id)).await
    }

    /// Adds an item of version 1; false if there is one already.
    pub(crate) async fn insert(&self, id: i64) -> Result<bool, items::Error> {
        let (name, version) = (name_of(id), 1);
        self.shared.items.insert(&Item { id, name, version }).await
    }

    /// False if there was no such item.
    pub(crate) async fn delete(&self, id: i64) -> Result<bool, items::Error> {
        self.shared.items.delete(id).await
    }

    /// Adds those of the items 1 to `count` that there are not, with version 1.
    pub(crate) async fn fill(&self, count: i64) {
        self.shared.items.fill(count).await.unwrap();
    }
}

/// Faults. [`heal`](Self::heal) ends them all.
impl Database {
    /// Each load takes so much longer; zero ends it.
    pub(crate) fn delay(&self, by: Duration) {
        self.shared.faults.send_modify(|faults| faults.delay = by);
    }

    /// Every `nth` load fails, after the time it takes; with 1 all of them, 0 ends it. Counted from
    /// the first load, or from [`forget`](Self::forget).
    pub(crate) fn fail_every(&self, nth: u64) {
        let faults = &self.shared.faults;
        faults.send_modify(|faults| faults.fail_every = nth);
    }

    /// Every `nth` load panics, after the time it takes; 0 ends it.
    pub(crate) fn panic_every(&self, nth: u64) {
        let faults = &self.shared.faults;
        faults.send_modify(|faults| faults.panic_every = nth);
    }

    /// No load answers until [`release`](Self::release); those under way included, unless they have
    /// got past it.
    pub(crate) fn hang(&self) {
        self.shared.faults.send_modify(|faults| faults.hangs = true);
    }

    /// Ends [`hang`](Self::hang): those that hang answer what they read before.
    pub(crate) fn release(&self) {
        let faults = &self.shared.faults;
        faults.send_modify(|faults| faults.hangs = false);
    }

    pub(crate) fn heal(&self) {
        self.shared.faults.send_replace(Faults::default());
    }
}

/// Counters.
impl Database {
    /// Loads begun since the beginning.
    pub(crate) fn loads_started(&self) -> usize {
        self.starts().len()
    }

    /// The most loads that were begun in any time that long.
    pub(crate) fn most_loads_within(&self, window: Duration) -> usize {
        let starts = self.starts();
        let mut first = 0;
        let within = starts.iter().enumerate().map(|(last, start)| {
            while start.duration_since(starts[first]) >= window {
                first += 1;
            }
            last - first + 1
        });
        within.max().unwrap_or(0)
    }

    /// Loads that have read their row and may not have answered yet.
    pub(crate) fn loads_read(&self) -> u64 {
        self.shared.read.load(Ordering::SeqCst)
    }

    /// Loads the database has not done with, waiting for a connection included.
    pub(crate) fn loads_running(&self) -> usize {
        self.shared.running.now()
    }

    pub(crate) fn most_loads_running(&self) -> usize {
        self.shared.running.most()
    }

    /// Connections that a load or another query holds now.
    pub(crate) fn connections_in_use(&self) -> usize {
        self.shared.items.connections().now()
    }

    pub(crate) fn most_connections_in_use(&self) -> usize {
        self.shared.items.connections().most()
    }

    /// Forgets the loads and the high-water marks so far, as after a warm-up.
    pub(crate) fn forget(&self) {
        self.starts().clear();
        self.shared.read.store(0, Ordering::SeqCst);
        self.shared.running.take_most();
        self.shared.items.connections().take_most();
    }

    fn starts(&self) -> std::sync::MutexGuard<'_, Vec<Instant>> {
        let starts = &self.shared.starts;
        starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self) -> Load {
        let number = {
            let mut starts = self.starts();
            // In order: the time is taken inside the lock.
            starts.push(Instant::now());
            starts.len() as u64
        };
        Load {
            number,
            faults: self.shared.faults.subscribe(),
            read: self.shared.read.clone(),
            running: self.shared.running.clone(),
        }
    }
}

/// One load. It holds nothing that would keep the database: whoever hangs lets go when that is
/// dropped.
struct Load {
    number: u64,
    faults: watch::Receiver<Faults>,
    read: Arc<AtomicU64>,
    running: Gauge,
}

impl Load {
    /// What happens between reading and answering. It counts as running from now until it is
    /// dropped, which is when the database is done.
    fn run(&self) -> impl Future<Output = ()> + Send + use<> {
        let inside: Inside = self.running.enter();
        let (mut faults, read) = (self.faults.clone(), self.read.clone());
        async move {
            let _inside = inside;
            read.fetch_add(1, Ordering::SeqCst);
            let delay = faults.borrow().delay;
            // Neither outlasts the database: SQLite's thread is waited for when the test ends.
            if !delay.is_zero() {
                tokio::select! {
                    () = sleep(delay) => {}
                    _dropped = faults.wait_for(|_| false) => {}
                }
            }
            let _ = faults.wait_for(|faults| !faults.hangs).await;
        }
    }

    fn end<T>(self, loaded: Result<T, items::Error>) -> Result<T, LoadError> {
        let faults = *self.faults.borrow();
        let is = |nth: u64| nth > 0 && self.number.is_multiple_of(nth);
        assert!(!is(faults.panic_every), "the database was told to panic");
        match is(faults.fail_every) {
            true => Err(LoadError::Told),
            false => Ok(loaded?),
        }
    }
}
