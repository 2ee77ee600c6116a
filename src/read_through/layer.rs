//! A shared loader under a whole stack.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::Instant;
use tower::{Layer, Service};

use super::engine::{Cache, Engine, Means, Query};
use super::loads::shared;
use super::settings::ReadThroughSettings;
use crate::error::{BoxError, Error, Invalid, Result};
use crate::executor::{Executor, Spawner, after};
use crate::key::Key;
use crate::request::{Operation, Purpose, Request};
use crate::response::Response;
use crate::shutdown::Tracker;
use crate::ttl::Ttl;
use crate::value::Payload;

/// Loads what the cache does not have.
pub trait Loader: Send + Sync + 'static {
    /// Loads the value of a key; `None` if there is none.
    ///
    /// # Errors
    /// Reach the caller as the source of an [`ErrorKind::Load`](crate::ErrorKind::Load), and are
    /// not cached. To the [guard](super::LoadGuard) each is a failure of the database.
    ///
    /// # Cancel safety
    /// It is dropped when the time to load is up.
    fn load(&self, key: &Key) -> impl Future<Output = Result<Option<Payload>, BoxError>> + Send;

    /// Loads the values of several keys in one go; what is not in the map does not exist. One after
    /// the other unless this is implemented. It is one load to the guard.
    ///
    /// # Errors
    /// As for [`load`](Self::load); it is then the error of all the keys.
    fn load_many(
        &self,
        keys: &[Key],
    ) -> impl Future<Output = Result<HashMap<Key, Payload>, BoxError>> + Send {
        async move {
            let mut loaded = HashMap::with_capacity(keys.len());
            for key in keys {
                if let Some(payload) = self.load(key).await? {
                    loaded.insert(key.clone(), payload);
                }
            }
            Ok(loaded)
        }
    }
}

/// Puts a [`Loader`] under a stack: each `get` and `get_many` that misses, or fails, is loaded, and
/// what was loaded is written back with the layer's TTL. Every other operation passes; one that
/// changes a key makes what is being loaded for it outdated, as [`Client::invalidate`] does.
///
/// A load runs on a task of its own, so that a caller who leaves does not end what others wait for,
/// and old values are refreshed behind the answer. The whole call has the client's
/// [`timeout`](crate::ClientBuilder::timeout): 100 ms unless set, half of it for the cache. A load that
/// takes longer than the rest is an error to its caller, and fills the cache all the same.
///
/// [`Client::invalidate`]: crate::Client::invalidate
#[derive(Debug)]
pub struct ReadThroughLayer<L> {
    loader: Arc<L>,
    ttl: Ttl,
    timeout: Duration,
    settings: ReadThroughSettings,
    spawner: Option<Spawner>,
}

impl<L> Clone for ReadThroughLayer<L> {
    fn clone(&self) -> Self {
        Self {
            loader: self.loader.clone(),
            ttl: self.ttl,
            timeout: self.timeout,
            settings: self.settings.clone(),
            spawner: self.spawner.clone(),
        }
    }
}

impl<L: Loader> ReadThroughLayer<L> {
    /// A layer that writes what it loads with that TTL, with the default settings.
    #[must_use]
    pub fn new(loader: L, ttl: Ttl) -> Self {
        Self {
            loader: Arc::new(loader),
            ttl,
            timeout: Duration::from_millis(100),
            settings: ReadThroughSettings::default(),
            spawner: None,
        }
    }

    /// How it loads.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration), naming the
    /// setting that makes no sense.
    pub fn settings(mut self, settings: ReadThroughSettings) -> Result<Self> {
        settings.validate()?;
        if settings.database_name().is_some() {
            let why = "is known to a client only: give the layer its guard";
            return Err(Invalid::new("database", why).into());
        }
        self.settings = settings;
        Ok(self)
    }

    /// How long all work on the cache before a load may take; 100 ms by default, and never more than
    /// half of the request's time.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if it is zero.
    pub fn timeout(mut self, timeout: Duration) -> Result<Self> {
        if timeout.is_zero() {
            return Err(Error::configuration("the timeout is zero"));
        }
        self.timeout = timeout;
        Ok(self)
    }

    /// Where loads run, and what they load is put back; the runtime of whoever asks by default, so that
    /// outside of every runtime there has to be one. By default that is not where the client's I/O is, and
    /// a loader that blocks makes none of it late.
    ///
    /// The threads of a [dedicated](Executor::dedicated) one are for loads alone, even if the same is
    /// given to the client: a load takes whichever is free, and with all of them blocked reads that hit
    /// go on as before, while those that miss end in time. A [handle](Executor::handle) of the runtime
    /// that has the client's I/O, or [`Executor::current`] for both, is no bulkhead: a loader that
    /// blocks there blocks I/O. For drivers that block there is
    /// [`BlockingLoader`](super::BlockingLoader), which never does.
    ///
    /// The number of loads is the [guard's](super::LoadGuard) to limit. While threads that are all
    /// blocked keep loads from getting that far, 16,384 may wait for a thread; more fail at once with
    /// [`ErrorKind::Overloaded`](crate::ErrorKind::Overloaded).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if its threads
    /// cannot be started.
    pub fn executor(mut self, executor: &Executor) -> Result<Self> {
        self.spawner = Some(executor.start_for_loads()?);
        Ok(self)
    }
}

impl<S, L: Loader> Layer<S> for ReadThroughLayer<L> {
    type Service = ReadThrough<S, L>;

    fn layer(&self, inner: S) -> ReadThrough<S, L> {
        ReadThrough {
            inner,
            engine: Engine::new(
                self.settings.clone(),
                Means {
                    spawner: self.spawner.clone(),
                    behind: self.spawner.clone(),
                    tracker: Tracker::current(),
                    ..Means::default()
                },
            ),
            layer: self.clone(),
        }
    }
}

/// The service of a [`ReadThroughLayer`].
///
/// # Readiness
/// That of the service below is waited for in the future.
///
/// # Cancel safety
/// Dropping its future leaves the load to those who wait for it, and to the cache.
pub struct ReadThrough<S, L> {
    inner: S,
    engine: Arc<Engine>,
    layer: ReadThroughLayer<L>,
}

impl<S: Clone, L> Clone for ReadThrough<S, L> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            engine: self.engine.clone(),
            layer: self.layer.clone(),
        }
    }
}

impl<S, L> fmt::Debug for ReadThrough<S, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadThrough").finish_non_exhaustive()
    }
}

impl<S: Cache, L: Loader> Service<Request> for ReadThrough<S, L> {
    type Response = Response;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let Self {
            inner,
            engine,
            layer,
        } = self.clone();
        Box::pin(async move {
            let deadline = request.deadline();
            // Of a request's time half is for the load.
            let left = deadline.map(|ends| ends.saturating_duration_since(Instant::now()) / 2);
            let timeout = left.map_or(layer.timeout, |left| left.min(layer.timeout));
            let query = Query::new(inner.clone(), layer.ttl, timeout).ending(deadline);
            let mut loads = shared(layer.loader, layer.spawner);
            match request.operation() {
                Operation::Get {
                    key,
                    with_cas: false,
                } => {
                    let value = engine.get(&query, key.clone(), &mut loads).await?;
                    Ok(Response::Value(value))
                }
                Operation::GetMany { keys } => {
                    let values = engine.get_many(&query, keys, &mut loads).await;
                    Ok(Response::Values(values))
                }
                operation => {
                    if operation.changes()
                        && request.purpose() != Purpose::Refill
                        && let Some(key) = operation.key()
                    {
                        let by = after(Instant::now(), layer.timeout);
                        let by = deadline.map_or(by, |deadline| deadline.min(by));
                        if let Some(forgetting) = engine.forget(key, by) {
                            forgetting.await;
                        }
                    }
                    request.ask(inner).await
                }
            }
        })
    }
}
