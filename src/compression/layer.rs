//! Compression for stacks built by hand.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use tower::{Layer, Service};

use super::CompressionSettings;
use crate::error::{BoxError, Error, Result};
use crate::request::Request;
use crate::response::Response;

/// Compresses what goes down and decompresses what comes up, for stacks built by hand, and under layers
/// that must not see what is compressed. A whole client has
/// [`ClientBuilder::compression`](crate::ClientBuilder::compression), which is around all layers: what
/// a [`ReadThroughLayer`](crate::ReadThroughLayer) under it loads is put back as it is. Put this under
/// such a layer instead.
///
/// It computes where its service is called, and where its future is polled. Of a client that is the
/// caller's task, but what is put back after a load is written where
/// [`ClientBuilder::load_executor`](crate::ClientBuilder::load_executor) says: with this layer, give
/// one.
#[derive(Clone, Debug)]
pub struct CompressionLayer {
    settings: Arc<CompressionSettings>,
}

impl CompressionLayer {
    /// A layer with these settings.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration), naming the setting
    /// that makes no sense.
    pub fn new(settings: CompressionSettings) -> Result<Self> {
        settings.validate()?;
        let settings = Arc::new(settings);
        Ok(Self { settings })
    }
}

impl<S> Layer<S> for CompressionLayer {
    type Service = Compressed<S>;

    fn layer(&self, inner: S) -> Compressed<S> {
        let settings = self.settings.clone();
        Compressed { inner, settings }
    }
}

/// The service of a [`CompressionLayer`].
///
/// # Readiness
/// That of the service below.
///
/// # Cancel safety
/// That of the service below.
#[derive(Clone, Debug)]
pub struct Compressed<S> {
    inner: S,
    settings: Arc<CompressionSettings>,
}

impl<S> Service<Request> for Compressed<S>
where
    S: Service<Request, Response = Response>,
    S::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = Error;
    type Future = CompressedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let ready = self.inner.poll_ready(cx);
        ready.map_err(|error| Error::from_boxed(error.into()))
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let state = match self.settings.write(&mut request) {
            Ok(()) => State::Called {
                future: self.inner.call(request),
                settings: self.settings.clone(),
            },
            Err(error) => State::Refused { error: Some(error) },
        };
        CompressedFuture { state }
    }
}

pin_project! {
    /// The future of one request to a [`Compressed`].
    #[must_use = "futures do nothing unless polled"]
    pub struct CompressedFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F> {
        Called { #[pin] future: F, settings: Arc<CompressionSettings> },
        Refused { error: Option<Error> },
    }
}

impl<F, E> Future for CompressedFuture<F>
where
    F: Future<Output = Result<Response, E>>,
    E: Into<BoxError>,
{
    type Output = Result<Response>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        match self.project().state.project() {
            StateProjection::Called { future, settings } => {
                let answer = ready!(future.poll(cx));
                let response = answer.map_err(|error| Error::from_boxed(error.into()))?;
                Poll::Ready(settings.read(response))
            }
            StateProjection::Refused { error } => match error.take() {
                Some(error) => Poll::Ready(Err(error)),
                None => panic!("polled after completion"),
            },
        }
    }
}

impl<F> fmt::Debug for CompressedFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompressedFuture").finish_non_exhaustive()
    }
}
