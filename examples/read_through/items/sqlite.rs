//! Items in an SQLite file.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _, Row, params_from_iter};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;

use super::{Gauge, Inside, Item, Result};

/// So many connections to one file. SQLite blocks: what is asynchronous here runs on the threads
/// that tokio has for that, and takes one only when there is a connection for it.
pub(crate) struct SqlitePool {
    idle: Mutex<Vec<Connection>>,
    places: Arc<Semaphore>,
    in_use: Gauge,
    runtime: Handle,
}

/// A connection that goes back when it is dropped, even by a query that panics.
struct Lent {
    pool: Arc<SqlitePool>,
    connection: Option<Connection>,
    _in_use: Inside,
    _place: OwnedSemaphorePermit,
}

impl SqlitePool {
    pub(crate) fn open(file: &Path, connections: usize) -> Result<Self> {
        let idle = (0..connections).map(|_| connect(file));
        let idle = idle.collect::<rusqlite::Result<Vec<_>>>()?;
        if let Some(connection) = idle.first() {
            connection.execute_batch(
                "CREATE TABLE IF NOT EXISTS items (
                     id BIGINT PRIMARY KEY,
                     name TEXT NOT NULL,
                     version BIGINT NOT NULL
                 )",
            )?;
        }
        Ok(Self {
            idle: Mutex::new(idle),
            places: Arc::new(Semaphore::new(connections)),
            in_use: Gauge::default(),
            runtime: Handle::current(),
        })
    }

    pub(crate) fn in_use(&self) -> &Gauge {
        &self.in_use
    }

    pub(crate) async fn load(
        self: &Arc<Self>,
        id: i64,
        before_answering: impl Future<Output = ()> + Send + 'static,
    ) -> Result<Option<Item>> {
        self.ask(move |connection| find(connection, id), before_answering)
            .await
    }

    pub(crate) fn load_blocking(
        self: &Arc<Self>,
        id: i64,
        before_answering: impl Future<Output = ()>,
    ) -> Result<Option<Item>> {
        self.ask_blocking(|connection| find(connection, id), before_answering)
    }

    pub(crate) async fn load_many(
        self: &Arc<Self>,
        ids: &[i64],
        before_answering: impl Future<Output = ()> + Send + 'static,
    ) -> Result<HashMap<i64, Item>> {
        let ids = ids.to_owned();
        self.ask(
            move |connection| find_many(connection, &ids),
            before_answering,
        )
        .await
    }

    pub(crate) fn load_many_blocking(
        self: &Arc<Self>,
        ids: &[i64],
        before_answering: impl Future<Output = ()>,
    ) -> Result<HashMap<i64, Item>> {
        self.ask_blocking(|connection| find_many(connection, ids), before_answering)
    }

    pub(crate) async fn update(self: &Arc<Self>, id: i64, name: &str) -> Result<Option<i64>> {
        let name = name.to_owned();
        let update = move |connection: &Connection| {
            let mut statement = connection.prepare(
                "UPDATE items SET name = ?2, version = version + 1 WHERE id = ?1
                 RETURNING version",
            )?;
            let versions = statement.query_map((id, name), |row| row.get(0))?;
            // To its end: that is where it is committed, and where committing would fail.
            let versions = versions.collect::<rusqlite::Result<Vec<i64>>>()?;
            Ok(versions.first().copied())
        };
        self.ask(update, std::future::ready(())).await
    }

    pub(crate) async fn insert(self: &Arc<Self>, item: &Item) -> Result<bool> {
        let Item { id, name, version } = item.clone();
        let insert = "INSERT OR IGNORE INTO items (id, name, version) VALUES (?1, ?2, ?3)";
        let insert = move |connection: &Connection| connection.execute(insert, (id, name, version));
        Ok(self.ask(insert, std::future::ready(())).await? > 0)
    }

    pub(crate) async fn delete(self: &Arc<Self>, id: i64) -> Result<bool> {
        let delete = "DELETE FROM items WHERE id = ?1";
        let delete = move |connection: &Connection| connection.execute(delete, [id]);
        Ok(self.ask(delete, std::future::ready(())).await? > 0)
    }

    pub(crate) async fn fill(self: &Arc<Self>, count: i64) -> Result<()> {
        let fill = "WITH RECURSIVE ids (id) AS
                        (SELECT 1 UNION ALL SELECT id + 1 FROM ids WHERE id < ?1)
                    INSERT OR IGNORE INTO items SELECT id, 'item ' || id, 1 FROM ids";
        let fill = move |connection: &Connection| connection.execute(fill, [count]);
        self.ask(fill, std::future::ready(())).await.map(drop)
    }

    /// A query goes on to its end when whoever waits for it does not: there is nothing to stop it
    /// with.
    async fn ask<T: Send + 'static>(
        self: &Arc<Self>,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
        before_answering: impl Future<Output = ()> + Send + 'static,
    ) -> Result<T> {
        let lent = self.lend().await;
        let answer = spawn_blocking(move || lent.ask(query, before_answering)).await?;
        Ok(answer?)
    }

    fn ask_blocking<T>(
        self: &Arc<Self>,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T>,
        before_answering: impl Future<Output = ()>,
    ) -> Result<T> {
        let lent = self.runtime.block_on(self.lend());
        Ok(lent.ask(query, before_answering)?)
    }

    async fn lend(self: &Arc<Self>) -> Lent {
        let place = self.places.clone().acquire_owned().await;
        let place = place.expect("it is never closed");
        let connection = self.lock().pop();
        Lent {
            pool: self.clone(),
            connection: Some(connection.expect("as many places as connections")),
            _in_use: self.in_use.enter(),
            _place: place,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lent {
    fn ask<T>(
        self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T>,
        before_answering: impl Future<Output = ()>,
    ) -> rusqlite::Result<T> {
        let connection = self.connection.as_ref().expect("taken by drop alone");
        let answer = query(connection);
        self.pool.runtime.block_on(before_answering);
        answer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // Before the fields are dropped, and the place with them: whoever gets that finds it.
        self.pool.lock().extend(self.connection.take());
    }
}

fn connect(file: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(file)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    // Readers do not wait for the writer, nor it for them.
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    Ok(connection)
}

fn find(connection: &Connection, id: i64) -> rusqlite::Result<Option<Item>> {
    let find = "SELECT id, name, version FROM items WHERE id = ?1";
    connection.query_row(find, [id], item).optional()
}

fn find_many(connection: &Connection, ids: &[i64]) -> rusqlite::Result<HashMap<i64, Item>> {
    let places = vec!["?"; ids.len()].join(", ");
    let find = format!("SELECT id, name, version FROM items WHERE id IN ({places})");
    let mut find = connection.prepare(&find)?;
    let found = find.query_map(params_from_iter(ids), item)?;
    found.map(|item| item.map(|item| (item.id, item))).collect()
}

fn item(row: &Row<'_>) -> rusqlite::Result<Item> {
    Ok(Item {
        id: row.get(0)?,
        name: row.get(1)?,
        version: row.get(2)?,
    })
}
