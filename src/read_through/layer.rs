//! A shared loader under a whole stack.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use tower::{Layer, Service};

use super::{Flights, settled};
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::key::Key;
use crate::request::{Operation, Purpose, Request, StoreMode};
use crate::response::Response;
use crate::ttl::Ttl;
use crate::value::{Payload, Value};

/// Loads what the cache does not have.
pub trait Loader: Send + Sync + 'static {
    /// Loads the value of a key; `None` if there is none.
    ///
    /// # Errors
    /// Reach the caller as the source of an [`ErrorKind::Load`], and are not cached.
    fn load(&self, key: &Key) -> impl Future<Output = Result<Option<Payload>, BoxError>> + Send;
}

/// Puts a [`Loader`] under a stack: each `get` that misses, or fails, is loaded, and the value
/// written back with the layer's TTL. Every other operation passes.
#[derive(Debug)]
pub struct ReadThroughLayer<L> {
    loader: Arc<L>,
    ttl: Ttl,
    load_timeout: Duration,
}

impl<L> Clone for ReadThroughLayer<L> {
    fn clone(&self) -> Self {
        Self {
            loader: self.loader.clone(),
            ttl: self.ttl,
            load_timeout: self.load_timeout,
        }
    }
}

impl<L: Loader> ReadThroughLayer<L> {
    /// A layer that writes what it loads with that TTL. A load may take 1 s.
    #[must_use]
    pub fn new(loader: L, ttl: Ttl) -> Self {
        Self {
            loader: Arc::new(loader),
            ttl,
            load_timeout: Duration::from_secs(1),
        }
    }

    /// How long a load, or the wait for another caller's, may take; 1 s by default. A request's
    /// deadline ends it earlier.
    #[must_use]
    pub fn load_timeout(mut self, timeout: Duration) -> Self {
        self.load_timeout = timeout;
        self
    }
}

impl<S, L: Loader> Layer<S> for ReadThroughLayer<L> {
    type Service = ReadThrough<S, L>;

    fn layer(&self, inner: S) -> ReadThrough<S, L> {
        ReadThrough {
            inner,
            layer: self.clone(),
            flights: Flights::default(),
        }
    }
}

/// The service of a [`ReadThroughLayer`].
///
/// # Readiness
/// That of the service below is waited for in the future.
pub struct ReadThrough<S, L> {
    inner: S,
    layer: ReadThroughLayer<L>,
    flights: Flights,
}

impl<S: Clone, L> Clone for ReadThrough<S, L> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            layer: self.layer.clone(),
            flights: self.flights.clone(),
        }
    }
}

impl<S, L> fmt::Debug for ReadThrough<S, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadThrough").finish_non_exhaustive()
    }
}

impl<S, L> Service<Request> for ReadThrough<S, L>
where
    S: Service<Request, Response = Response> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError> + Send,
    S::Future: Send,
    L: Loader,
{
    type Response = Response;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            match request.operation() {
                Operation::Get {
                    key,
                    with_cas: false,
                } => {
                    let key = key.clone();
                    let value = this.get_or_load(key, request).await?;
                    Ok(Response::Value(value))
                }
                _ => request.ask(this.inner).await,
            }
        })
    }
}

impl<S, L> ReadThrough<S, L>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
    L: Loader,
{
    async fn get_or_load(self, key: Key, request: Request) -> Result<Option<Value>> {
        let deadline = request.deadline();
        let cached = match request.ask(self.inner.clone()).await {
            Ok(Response::Value(value)) => Ok(value),
            Ok(_) => Err(Error::new(ErrorKind::Layer, "not the answer to a get")),
            Err(error) => Err(error),
        };
        if let Some(answer) = settled(cached) {
            return answer;
        }
        let load = self.layer.loader.load(&key);
        let refill = |payload: Payload| {
            let request = Request::new(Operation::Store {
                mode: StoreMode::Set,
                key: key.clone(),
                payload,
                ttl: self.layer.ttl,
            })
            .with_purpose(Purpose::Refill);
            let request = match deadline {
                Some(deadline) => request.with_deadline(deadline),
                None => request,
            };
            let service = self.inner.clone();
            async move { request.ask(service).await.map(drop) }
        };
        let within = self.layer.load_timeout;
        self.flights.load(&key, within, None, load, refill).await
    }
}
