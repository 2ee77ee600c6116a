//! One node's transport, whatever it speaks.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::watch;
use tower::Service;

#[cfg(feature = "classic")]
use super::classic::{Classic, ClassicFuture};
use super::protocol::{Dialect, Protocol};
use super::site::{Parts, Site};
use super::{Pipelined, PipelinedFuture, PipelinedSettings};
use crate::error::{Error, Result};
#[cfg(feature = "classic")]
use crate::error::{ErrorKind, Sent};
use crate::request::Request;
use crate::response::Response;

/// One node of a client, in whichever [`Protocol`](crate::Protocol) it is asked: the bottom of the
/// stack.
///
/// A cheap handle: clones share the connections, which are closed when the last clone, and the last
/// future made by one, is dropped. Connections are made when first needed.
///
/// # Readiness
/// `poll_ready` is always ready; a full queue is an immediate
/// [`ErrorKind::Overloaded`](crate::ErrorKind::Overloaded) from `call`.
///
/// # Cancel safety
/// Dropping a [`TransportFuture`] whose request has not been written means that it never will be.
/// Once it has been, its reply is waited for and discarded; the connection stays in step.
#[derive(Clone)]
pub struct Transport(Arc<Inner>);

struct Inner {
    pipelined: Pipelined,
    #[cfg(feature = "classic")]
    classic: Classic,
}

impl Transport {
    pub(crate) fn from_parts(parts: Parts) -> Self {
        #[cfg(feature = "classic")]
        let pool_size = parts.pool_size;
        let (site, spawner) = Site::new(parts);
        Self(Arc::new(Inner {
            #[cfg(feature = "classic")]
            classic: Classic::at(site.clone(), spawner.clone(), pool_size),
            pipelined: Pipelined::at(site, spawner),
        }))
    }

    fn site(&self) -> &Arc<Site> {
        self.0.pipelined.site()
    }

    /// Ends what is queued or in flight, and the connections with it: the node is out.
    pub(crate) fn drain(&self, error: &Error) {
        self.0.pipelined.drain(error);
        #[cfg(feature = "classic")]
        self.0.classic.drain(error);
    }

    /// Ends what is queued, which no one has been sent: the node is to be closed once it has answered
    /// the rest.
    pub(crate) fn retire(&self, error: &Error) {
        self.0.pipelined.retire(error);
        #[cfg(feature = "classic")]
        self.0.classic.retire(error);
    }

    /// Connections that were given up are waited for until then, even if this is closed before.
    pub(crate) fn lingers_until(&self, closing: watch::Receiver<bool>) {
        self.site().lingers_until(closing);
    }

    /// Lets broken connections be tried again at once: the node is known to answer.
    pub(crate) fn end_backoff(&self) {
        self.0.pipelined.end_backoff();
        #[cfg(feature = "classic")]
        self.0.classic.end_backoff();
    }

    pub(crate) fn settings(&self) -> PipelinedSettings {
        PipelinedSettings::clone(&self.site().settings.load())
    }

    /// Other settings from now on; how many connections there are, and the largest value over one
    /// that is up, stay.
    pub(crate) fn apply(&self, settings: PipelinedSettings) {
        self.0.pipelined.apply(settings);
    }

    pub(crate) fn connect_within(&self) -> Duration {
        self.site().settings.load().connect_within()
    }

    pub(crate) fn max_value_size(&self) -> usize {
        self.site().settings.load().limits.value
    }

    /// How many connections it may have.
    pub(crate) fn connections(&self) -> usize {
        #[cfg(feature = "classic")]
        if self.is_classic() {
            return self.0.classic.connections();
        }
        self.0.pipelined.connections()
    }

    /// How many requests it can have on the way at the same time.
    pub(crate) fn carries_at_once(&self) -> usize {
        #[cfg(feature = "classic")]
        if self.is_classic() {
            return self.0.classic.connections();
        }
        usize::MAX
    }

    /// Requests queued and in flight.
    pub(crate) fn pending(&self) -> usize {
        #[cfg(feature = "classic")]
        return self.0.pipelined.pending() + self.0.classic.pending();
        #[cfg(not(feature = "classic"))]
        self.0.pipelined.pending()
    }

    /// Connections that are up.
    pub(crate) fn connections_up(&self) -> usize {
        self.site().up()
    }

    /// How many connections have come up so far.
    pub(crate) fn newest(&self) -> u32 {
        self.site().newest()
    }

    /// Closes every connection and ends what is on it.
    pub(crate) fn close(&self) {
        self.0.pipelined.close();
        #[cfg(feature = "classic")]
        self.0.classic.close();
    }

    /// Which protocol it is asked in; `None` until that is known.
    pub(crate) fn protocol(&self) -> Option<Protocol> {
        let site = self.site();
        match site.protocol {
            Protocol::Auto => site.spoken.get().map(|dialect| match dialect {
                Dialect::Meta => Protocol::Meta,
                Dialect::Classic { .. } => Protocol::Classic,
            }),
            said => Some(said),
        }
    }

    /// Whether it is asked in the classic protocol, as far as is known.
    #[cfg(feature = "classic")]
    #[inline]
    fn is_classic(&self) -> bool {
        self.protocol() == Some(Protocol::Classic)
    }

    #[cfg(feature = "classic")]
    #[inline]
    fn send(&self, request: Request) -> Asking {
        match self.is_classic() {
            true => Asking::Classic(Box::new(self.0.classic.request(request))),
            false => Asking::Pipelined(self.0.pipelined.request(request)),
        }
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("node", &self.site().name)
            .field("connections_up", &self.connections_up())
            .finish_non_exhaustive()
    }
}

impl Service<Request> for Transport {
    type Response = Response;
    type Error = Error;
    type Future = TransportFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, request: Request) -> TransportFuture {
        #[cfg(feature = "classic")]
        return TransportFuture {
            // Whoever is there next may speak another protocol than is thought.
            again: (self.site().protocol == Protocol::Auto).then(|| self.clone()),
            asking: Some(self.send(request)),
        };
        #[cfg(not(feature = "classic"))]
        TransportFuture {
            asking: Some(Asking::Pipelined(self.0.pipelined.request(request))),
        }
    }
}

/// The future of one request to a node by its [`Transport`].
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct TransportFuture {
    /// Gone once it is answered.
    asking: Option<Asking>,
    /// To ask once more, in the other protocol.
    #[cfg(feature = "classic")]
    again: Option<Transport>,
}

#[derive(Debug)]
enum Asking {
    Pipelined(PipelinedFuture),
    // A task and a channel are made for it anyway, and most requests are none.
    #[cfg(feature = "classic")]
    Classic(Box<ClassicFuture>),
}

impl Asking {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        match self {
            Self::Pipelined(future) => Pin::new(future).poll(cx),
            #[cfg(feature = "classic")]
            Self::Classic(future) => Pin::new(&mut **future).poll(cx),
        }
    }

    #[cfg(feature = "classic")]
    fn into_request(self) -> Request {
        match self {
            Self::Pipelined(future) => future.into_request(),
            Self::Classic(future) => future.into_request(),
        }
    }
}

impl TransportFuture {
    fn poll_asking(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        match &mut self.asking {
            Some(asking) => asking.poll(cx),
            None => panic!("polled after completion"),
        }
    }

    /// Once more, if another protocol is spoken there than it was asked in. Says whether it is.
    #[cfg(feature = "classic")]
    #[cold]
    fn ask_again(&mut self) -> bool {
        let (Some(transport), Some(asked)) = (self.again.take(), self.asking.take()) else {
            return false;
        };
        let again = transport.is_classic() != matches!(asked, Asking::Classic(_));
        if again {
            let mut request = asked.into_request();
            request.forget_time();
            self.asking = Some(transport.send(request));
        }
        again
    }
}

impl Future for TransportFuture {
    type Output = Result<Response>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let this = &mut *self;
        #[cfg_attr(not(feature = "classic"), expect(unused_mut))]
        let mut outcome = ready!(this.poll_asking(cx));
        #[cfg(feature = "classic")]
        if let Err(error) = &outcome
            && error.kind() == ErrorKind::ConnectionFailed
            && error.sent() == Sent::No
            && this.ask_again()
        {
            outcome = ready!(this.poll_asking(cx));
        }
        this.asking = None;
        Poll::Ready(outcome)
    }
}
