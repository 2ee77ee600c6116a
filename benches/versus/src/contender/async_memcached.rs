//! async-memcached in a pool of bb8. It buffers its writes itself.

use std::net::SocketAddr;

use ::async_memcached::{AsciiProtocol as _, Client, Error};

use super::Outcome;

pub struct Manager(SocketAddr);

impl bb8::ManageConnection for Manager {
    type Connection = Client;
    type Error = Error;

    async fn connect(&self) -> Result<Client, Error> {
        Client::new(format!("tcp://{}", self.0)).await
    }

    async fn is_valid(&self, connection: &mut Client) -> Result<(), Error> {
        connection.version().await.map(drop)
    }

    fn has_broken(&self, connection: &mut Client) -> bool {
        connection.is_closed()
    }
}

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
        let value = self.0.get().await?.get(key).await?;
        Ok(value.and_then(|value| value.data))
    }

    async fn set(&mut self, key: &str, value: &[u8]) -> Outcome<()> {
        let mut connection = self.0.get().await?;
        Ok(connection.set(key, value, None, None).await?)
    }

    async fn get_many(
        &mut self,
        keys: &[String],
        mut hit: impl FnMut(&[u8], &[u8]) + Send,
    ) -> Outcome<()> {
        let values = self.0.get().await?.get_multi(keys).await?;
        for value in &values {
            hit(&value.key, value.data.as_deref().unwrap_or_default());
        }
        Ok(())
    }
}
