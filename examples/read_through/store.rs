//! The database as the service has it: bounded, and not for free.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::{Config, NoTls};

use crate::items::{Error, Gauge, Item, Items, Scratch};

/// The pool's size.
pub(crate) const CONNECTIONS: u32 = 8;
/// The items of a user's own PostgreSQL are in it, and nothing of theirs.
const SCHEMA: &str = "read_through_example";

pub(crate) struct Store {
    // Before the file's directory: it is closed, then removed.
    items: Items,
    kind: &'static str,
    /// What a load takes on top of what it really takes, while it holds its connection. A row of a
    /// small table on this machine is there at once; that of a service's database is behind a
    /// network, a join and other people's queries.
    load_cost: Duration,
    loads: AtomicU64,
    _directory: Option<Scratch>,
}

impl Store {
    /// Opens PostgreSQL, or else a new SQLite file, with so many items.
    pub(crate) async fn open(
        postgres: Option<&str>,
        items: u32,
        load_cost: Duration,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let store = match postgres {
            Some(url) => Self {
                items: in_postgres(url.parse()?).await?,
                kind: "PostgreSQL",
                load_cost,
                loads: AtomicU64::new(0),
                _directory: None,
            },
            None => {
                let directory = Scratch::new("tower-memcached-read-through")?;
                let file = directory.path().join("items.db");
                Self {
                    items: Items::sqlite(&file, CONNECTIONS as usize)?,
                    kind: "an SQLite file",
                    load_cost,
                    loads: AtomicU64::new(0),
                    _directory: Some(directory),
                }
            }
        };
        store.items.fill(items.into()).await?;
        Ok(store)
    }

    pub(crate) fn kind(&self) -> &'static str {
        self.kind
    }

    pub(crate) async fn load(&self, id: i64) -> Result<Option<Item>, Error> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        let cost = self.load_cost;
        self.items.load(id, async move { sleep(cost).await }).await
    }

    /// The new version, if there is such an item.
    pub(crate) async fn update(&self, id: i64, name: &str) -> Result<Option<i64>, Error> {
        self.items.update(id, name).await
    }

    /// Loads begun so far.
    pub(crate) fn loads(&self) -> u64 {
        self.loads.load(Ordering::Relaxed)
    }

    pub(crate) fn connections(&self) -> &Gauge {
        self.items.connections()
    }

    /// Waits until no query is under way. Those of SQLite go on without whoever asked.
    pub(crate) async fn idle(&self) {
        while self.connections().now() > 0 {
            sleep(Duration::from_millis(1)).await;
        }
    }
}

async fn in_postgres(mut config: Config) -> Result<Items, Error> {
    let (client, connection) = config.connect(NoTls).await?;
    let connection = tokio::spawn(connection);
    let create = format!("CREATE SCHEMA IF NOT EXISTS {SCHEMA}");
    client.batch_execute(&create).await?;
    drop(client);
    connection.await??;
    config.options(format!("-c search_path={SCHEMA}"));
    Items::postgres(config, CONNECTIONS).await
}
