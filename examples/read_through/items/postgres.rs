//! Items in PostgreSQL.

use std::collections::HashMap;
use std::time::Duration;

use bb8::{Pool, PooledConnection, RunError};
use bb8_postgres::PostgresConnectionManager;
use tokio::runtime::Handle;
use tokio_postgres::{Config, NoTls, Row};

use super::{Error, Gauge, Inside, Item, Result};

/// How long a query waits for a connection: for another query to end, or for the server.
const WAIT: Duration = Duration::from_secs(2);

type Manager = PostgresConnectionManager<NoTls>;

pub(crate) struct PostgresPool {
    pool: Pool<Manager>,
    in_use: Gauge,
    runtime: Handle,
}

/// A connection, counted until it goes back.
struct Lent<'a> {
    // Dropped first: whoever gets the connection next is not counted beside this one.
    _in_use: Inside,
    connection: PooledConnection<'a, Manager>,
}

impl PostgresPool {
    pub(crate) async fn connect(config: Config, connections: u32) -> Result<Self> {
        let pool = Pool::builder()
            .max_size(connections)
            .connection_timeout(WAIT)
            .build(PostgresConnectionManager::new(config, NoTls))
            .await?;
        let this = Self {
            pool,
            in_use: Gauge::default(),
            runtime: Handle::current(),
        };
        let create = "CREATE TABLE IF NOT EXISTS items (
                          id BIGINT PRIMARY KEY,
                          name TEXT NOT NULL,
                          version BIGINT NOT NULL
                      )";
        this.lend().await?.connection.batch_execute(create).await?;
        Ok(this)
    }

    pub(crate) fn in_use(&self) -> &Gauge {
        &self.in_use
    }

    /// What the blocking drivers do, too.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    pub(crate) async fn load(
        &self,
        id: i64,
        before_answering: impl Future<Output = ()>,
    ) -> Result<Option<Item>> {
        let lent = self.lend().await?;
        let find = "SELECT id, name, version FROM items WHERE id = $1";
        let found = lent.connection.query_opt(find, &[&id]).await?;
        before_answering.await;
        Ok(found.map(|row| item(&row)))
    }

    pub(crate) async fn load_many(
        &self,
        ids: &[i64],
        before_answering: impl Future<Output = ()>,
    ) -> Result<HashMap<i64, Item>> {
        let lent = self.lend().await?;
        let find = "SELECT id, name, version FROM items WHERE id = ANY($1)";
        let found = lent.connection.query(find, &[&ids]).await?;
        before_answering.await;
        let found = found.iter().map(item);
        Ok(found.map(|item| (item.id, item)).collect())
    }

    pub(crate) async fn update(&self, id: i64, name: &str) -> Result<Option<i64>> {
        let lent = self.lend().await?;
        let update = "UPDATE items SET name = $2, version = version + 1 WHERE id = $1
                      RETURNING version";
        let updated = lent.connection.query_opt(update, &[&id, &name]).await?;
        Ok(updated.map(|row| row.get(0)))
    }

    pub(crate) async fn insert(&self, item: &Item) -> Result<bool> {
        let lent = self.lend().await?;
        let insert = "INSERT INTO items (id, name, version) VALUES ($1, $2, $3)
                      ON CONFLICT DO NOTHING";
        let Item { id, name, version } = item;
        let inserted = lent
            .connection
            .execute(insert, &[id, name, version])
            .await?;
        Ok(inserted > 0)
    }

    pub(crate) async fn delete(&self, id: i64) -> Result<bool> {
        let lent = self.lend().await?;
        let delete = "DELETE FROM items WHERE id = $1";
        Ok(lent.connection.execute(delete, &[&id]).await? > 0)
    }

    pub(crate) async fn fill(&self, count: i64) -> Result<()> {
        let lent = self.lend().await?;
        let fill = "INSERT INTO items SELECT id, 'item ' || id, 1 FROM generate_series(1, $1::BIGINT) AS id
                    ON CONFLICT DO NOTHING";
        lent.connection.execute(fill, &[&count]).await?;
        Ok(())
    }

    async fn lend(&self) -> Result<Lent<'_>> {
        let connection = self.pool.get().await?;
        Ok(Lent {
            _in_use: self.in_use.enter(),
            connection,
        })
    }
}

impl From<RunError<tokio_postgres::Error>> for Error {
    fn from(error: RunError<tokio_postgres::Error>) -> Self {
        match error {
            RunError::User(error) => Self::Postgres(error),
            RunError::TimedOut => Self::NoConnection(WAIT),
        }
    }
}

fn item(row: &Row) -> Item {
    Item {
        id: row.get(0),
        name: row.get(1),
        version: row.get(2),
    }
}
