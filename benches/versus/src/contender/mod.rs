//! Clients behind one trait, each as its own documentation would have it used.

pub mod async_memcached;
pub mod memcache;
pub mod memcache_async;
pub mod ours;
pub mod raw;

use std::error::Error;
use std::future::{Future, ready};
use std::ops::Deref;

pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// One caller's client.
pub trait Client: Clone + Send + 'static {
    type Value: Deref<Target = [u8]> + Send;

    fn get(&mut self, key: &str) -> impl Future<Output = Outcome<Option<Self::Value>>> + Send;

    fn set(&mut self, key: &str, value: &[u8]) -> impl Future<Output = Outcome<()>> + Send;

    /// Reads many keys in one call, and shows each hit.
    fn get_many(
        &mut self,
        _keys: &[String],
        _hit: impl FnMut(&[u8], &[u8]) + Send,
    ) -> impl Future<Output = Outcome<()>> + Send {
        ready(Err("has no multi-key read".into()))
    }

    /// The same by a get for each, all at once.
    fn get_concurrently(
        &mut self,
        _keys: &[String],
        _hit: impl FnMut(&[u8], &[u8]) + Send,
    ) -> impl Future<Output = Outcome<()>> + Send {
        ready(Err("is not shared by the gets of one task".into()))
    }
}

/// A pool of connections that are all made at the start, and handed out without asking the server first.
async fn pool<M: bb8::ManageConnection>(
    manager: M,
    connections: usize,
) -> Result<bb8::Pool<M>, M::Error> {
    let connections = u32::try_from(connections).unwrap_or(u32::MAX);
    let builder = bb8::Pool::builder()
        .max_size(connections)
        .min_idle(connections)
        .test_on_check_out(false);
    builder.build(manager).await
}
