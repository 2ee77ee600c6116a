//! memcache's client for tokio: what it calls experimental, and has instead of its blocking one.

use std::net::SocketAddr;

use ::memcache::exp::{
    AsyncMetaClient, AsyncMetaConnection, Error, Get, GetOptions, ReturnCode, SetOptions,
    build_get, build_noop, build_set,
};

use super::Outcome;

/// With the pool that it has itself, which looks at a socket each time before it hands it out. Its own
/// time-out is off, which the other pooled clients do not have either.
#[derive(Clone)]
pub struct Own(AsyncMetaClient);

impl Own {
    pub async fn new(server: SocketAddr, pool: usize) -> Outcome<Self> {
        let builder = AsyncMetaClient::builder()
            .max_idle(pool)
            .max_connections(Some(pool))
            .connect_timeout(None)
            .io_timeout(None);
        Ok(Self(builder.connect_async(server).await?))
    }
}

impl super::Client for Own {
    type Value = Vec<u8>;

    async fn get(&mut self, key: &str) -> Outcome<Option<Vec<u8>>> {
        Ok(self.0.get(key).send().await?.value)
    }

    async fn set(&mut self, key: &str, value: &[u8]) -> Outcome<()> {
        match self.0.set(key, value).send().await? {
            stored if stored.applied() => Ok(()),
            other => Err(format!("not stored: {other:?}").into()),
        }
    }

    async fn get_many(
        &mut self,
        keys: &[String],
        mut hit: impl FnMut(&[u8], &[u8]) + Send,
    ) -> Outcome<()> {
        for found in self.0.run_many(keys.iter().map(Get::new)).await? {
            let found = found?;
            if let Some(value) = &found.value {
                hit(&found.key, value);
            }
        }
        Ok(())
    }
}

pub struct Manager(SocketAddr);

impl bb8::ManageConnection for Manager {
    type Connection = AsyncMetaConnection;
    type Error = Error;

    async fn connect(&self) -> Result<AsyncMetaConnection, Error> {
        AsyncMetaConnection::connect(self.0).await
    }

    async fn is_valid(&self, connection: &mut AsyncMetaConnection) -> Result<(), Error> {
        connection.execute(&build_noop()).await.map(drop)
    }

    fn has_broken(&self, _: &mut AsyncMetaConnection) -> bool {
        false
    }
}

/// Its connections in a pool of bb8, which hands them out as they are.
#[derive(Clone)]
pub struct Pooled(bb8::Pool<Manager>);

impl Pooled {
    pub async fn new(server: SocketAddr, pool: usize) -> Outcome<Self> {
        Ok(Self(super::pool(Manager(server), pool).await?))
    }
}

impl super::Client for Pooled {
    type Value = Vec<u8>;

    async fn get(&mut self, key: &str) -> Outcome<Option<Vec<u8>>> {
        let command = build_get(key, &GetOptions::default())?;
        let response = self.0.get().await?.execute(&command).await?;
        Ok(response.into_value())
    }

    async fn set(&mut self, key: &str, value: &[u8]) -> Outcome<()> {
        let command = build_set(key, value, &SetOptions::default())?;
        let response = self.0.get().await?.execute(&command).await?;
        match response.rc() {
            ReturnCode::Hd => Ok(()),
            other => Err(format!("not stored: {other:?}").into()),
        }
    }

    async fn get_many(
        &mut self,
        keys: &[String],
        mut hit: impl FnMut(&[u8], &[u8]) + Send,
    ) -> Outcome<()> {
        let commands = keys
            .iter()
            .map(|key| build_get(key, &GetOptions::default()));
        let commands = commands.collect::<Result<Vec<_>, _>>()?;
        let responses = self.0.get().await?.execute_batch(&commands).await?;
        for (key, response) in keys.iter().zip(&responses) {
            if let Some(value) = response.value() {
                hit(key.as_bytes(), value);
            }
        }
        Ok(())
    }
}
