//! memcache-async in a pool of bb8.
//!
//! Its writes are buffered, so that a set and a multi-key read are one system call each, not several.
//! Its set is one that the server does not answer.

use std::io;
use std::net::SocketAddr;

use ::memcache_async::ascii::Protocol;
use futures::io::BufWriter;
use tokio::net::TcpStream;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt as _};

use super::Outcome;

pub struct Manager(SocketAddr);

impl bb8::ManageConnection for Manager {
    type Connection = Protocol<BufWriter<Compat<TcpStream>>>;
    type Error = io::Error;

    async fn connect(&self) -> io::Result<Self::Connection> {
        let stream = TcpStream::connect(self.0).await?;
        stream.set_nodelay(true)?;
        Ok(Protocol::new(BufWriter::new(stream.compat())))
    }

    async fn is_valid(&self, connection: &mut Self::Connection) -> io::Result<()> {
        connection.version().await.map(drop)
    }

    fn has_broken(&self, _: &mut Self::Connection) -> bool {
        false
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
        let mut connection = self.0.get().await?;
        match connection.get(key).await {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn set(&mut self, key: &str, value: &[u8]) -> Outcome<()> {
        let mut connection = self.0.get().await?;
        Ok(connection.set(key, value, 0).await?)
    }

    async fn get_many(
        &mut self,
        keys: &[String],
        mut hit: impl FnMut(&[u8], &[u8]) + Send,
    ) -> Outcome<()> {
        let values = self.0.get().await?.get_multi(keys).await?;
        for (key, value) in &values {
            hit(key.as_bytes(), value);
        }
        Ok(())
    }
}
