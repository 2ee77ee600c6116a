//! A table of items in a real database: SQLite in a file, or PostgreSQL.
//!
//! Either has a pool with so many connections and no more, as a service has it, and a gauge of how
//! many of them are in use. The example and `tests/database` share this module, and each uses a
//! part of it.

mod gauge;
mod postgres;
mod scratch;
mod sqlite;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

pub(crate) use self::gauge::{Gauge, Inside};
pub(crate) use self::scratch::Scratch;

use self::postgres::PostgresPool;
use self::sqlite::SqlitePool;

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) id: i64,
    pub(crate) name: String,
    pub(crate) version: i64,
}

/// Clones are handles of the same pool.
#[derive(Clone)]
pub(crate) enum Items {
    Sqlite(Arc<SqlitePool>),
    Postgres(Arc<PostgresPool>),
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("SQLite failed")]
    Sqlite(#[from] rusqlite::Error),
    #[error("PostgreSQL failed")]
    Postgres(#[from] tokio_postgres::Error),
    /// All of the pool's connections are in use, or none can be made.
    #[error("no connection to the database within {0:?}")]
    NoConnection(std::time::Duration),
    #[error("a query panicked")]
    Thread(#[from] tokio::task::JoinError),
}

impl Item {
    pub(crate) fn to_json(&self) -> Value {
        json!({ "id": self.id, "name": self.name, "version": self.version })
    }

    /// What is put into the cache.
    pub(crate) fn encode(&self) -> String {
        self.to_json().to_string()
    }

    pub(crate) fn decode(bytes: &[u8]) -> io::Result<Self> {
        let value: Value = serde_json::from_slice(bytes)?;
        let item = || {
            Some(Self {
                id: value["id"].as_i64()?,
                name: value["name"].as_str()?.to_owned(),
                version: value["version"].as_i64()?,
            })
        };
        item().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an item"))
    }
}

impl Items {
    /// Opens a file, which is made if it is not there, and the table in it. Blocks for a moment;
    /// needs a runtime.
    pub(crate) fn sqlite(file: &Path, connections: usize) -> Result<Self> {
        let pool = SqlitePool::open(file, connections)?;
        Ok(Self::Sqlite(Arc::new(pool)))
    }

    /// Connects to a server, and makes the table if it is not there.
    pub(crate) async fn postgres(config: tokio_postgres::Config, connections: u32) -> Result<Self> {
        let pool = PostgresPool::connect(config, connections).await?;
        Ok(Self::Postgres(Arc::new(pool)))
    }

    /// How many connections are in use: lent by the pool to a query.
    pub(crate) fn connections(&self) -> &Gauge {
        match self {
            Self::Sqlite(pool) => pool.in_use(),
            Self::Postgres(pool) => pool.in_use(),
        }
    }

    /// Reads an item. `before_answering` runs after its row has been read and while its connection
    /// is held: a query is as slow as that.
    pub(crate) async fn load(
        &self,
        id: i64,
        before_answering: impl Future<Output = ()> + Send + 'static,
    ) -> Result<Option<Item>> {
        match self {
            Self::Sqlite(pool) => pool.load(id, before_answering).await,
            Self::Postgres(pool) => pool.load(id, before_answering).await,
        }
    }

    /// [`load`](Self::load) for a thread that may block, which no thread of a runtime is.
    pub(crate) fn load_blocking(
        &self,
        id: i64,
        before_answering: impl Future<Output = ()>,
    ) -> Result<Option<Item>> {
        match self {
            Self::Sqlite(pool) => pool.load_blocking(id, before_answering),
            Self::Postgres(pool) => pool.block_on(pool.load(id, before_answering)),
        }
    }

    /// Reads those of the items that there are, in one query.
    pub(crate) async fn load_many(
        &self,
        ids: &[i64],
        before_answering: impl Future<Output = ()> + Send + 'static,
    ) -> Result<HashMap<i64, Item>> {
        match self {
            Self::Sqlite(pool) => pool.load_many(ids, before_answering).await,
            Self::Postgres(pool) => pool.load_many(ids, before_answering).await,
        }
    }

    /// [`load_many`](Self::load_many) for a thread that may block.
    pub(crate) fn load_many_blocking(
        &self,
        ids: &[i64],
        before_answering: impl Future<Output = ()>,
    ) -> Result<HashMap<i64, Item>> {
        match self {
            Self::Sqlite(pool) => pool.load_many_blocking(ids, before_answering),
            Self::Postgres(pool) => pool.block_on(pool.load_many(ids, before_answering)),
        }
    }

    /// Renames an item and says its new version, one more than the last, once that is committed;
    /// `None` if there is no such item.
    pub(crate) async fn update(&self, id: i64, name: &str) -> Result<Option<i64>> {
        match self {
            Self::Sqlite(pool) => pool.update(id, name).await,
            Self::Postgres(pool) => pool.update(id, name).await,
        }
    }

    /// Whether there was none with its id.
    pub(crate) async fn insert(&self, item: &Item) -> Result<bool> {
        match self {
            Self::Sqlite(pool) => pool.insert(item).await,
            Self::Postgres(pool) => pool.insert(item).await,
        }
    }

    /// Whether there was such an item.
    pub(crate) async fn delete(&self, id: i64) -> Result<bool> {
        match self {
            Self::Sqlite(pool) => pool.delete(id).await,
            Self::Postgres(pool) => pool.delete(id).await,
        }
    }

    /// Makes the items 1 to `count` that are not there, named `item 1` and so on, of version 1.
    pub(crate) async fn fill(&self, count: i64) -> Result<()> {
        match self {
            Self::Sqlite(pool) => pool.fill(count).await,
            Self::Postgres(pool) => pool.fill(count).await,
        }
    }
}
