//! The pipelined transport: many requests share few connections.
//!
//! A [`Pipelined`] is a cheap handle to one node's connections. Each connection is a slot with a
//! bounded queue (a [`Pipeline`](crate::protocol::Pipeline) under one lock, the only one a request
//! takes) and one task on the I/O executor that connects, writes what is queued in as few writes
//! as it can, and settles requests as replies come (`connection.rs`). A request's future encodes
//! it straight into the queue when first polled, and takes its outcome from there.
//!
//! Time-outs are found by the connection's one timer, or by the caller's own, whichever is first.
//! A connection that times out three requests in a row, sent over at least an attempt timeout, or
//! that has received no byte for the stall timeout while something is unanswered, is closed; what
//! was on it ends there and then.

mod connect;
mod connection;
mod linger;
mod slot;

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tower::Service;

pub(crate) use connect::ConnectFailure;
pub use slot::PipelinedFuture;
use slot::Pool;

use super::{Address, Connector};
use crate::error::{Error, Invalid, Result, not_zero};
use crate::executor::Executor;
use crate::key::Key;
use crate::protocol::Limits;
use crate::request::Request;
use crate::response::Response;

/// What happened to a node's connections, for whoever judges the node.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// Connecting failed, while so many other connections of the node are up, and others have yet
    /// to be tried or not.
    ConnectFailed {
        failure: ConnectFailure,
        error: &'a Error,
        others_up: usize,
        untried: bool,
        most_dead: bool,
    },
    /// A connection was closed because it did not answer. `most_dead`: most of the node's
    /// connections did not, and nor did those made in their place.
    Unresponsive { error: &'a Error, most_dead: bool },
    /// So many of the requests [answered](Observer::answered), the first of them sent then, should
    /// have been sooner.
    Slow { requests: u32, sent_at: Instant },
    /// Keys of writes that may have been executed, or may still be. `lingers`: the end of that doubt
    /// will be told.
    InDoubt { keys: &'a [Key], lingers: bool },
    /// The end of a doubt that lingers: they will not be executed any more. Unless that is not
    /// `certain`, because it was not waited for any longer.
    DoubtEnds { keys: &'a [Key], certain: bool },
}

/// Whoever judges a node by what its connections do.
pub(crate) trait Observer: Send + Sync {
    /// So many requests were answered in time.
    fn answered(&self, requests: u32, now: Instant);

    /// From when on a request is [slow](Event::Slow).
    fn slow_after(&self) -> Duration;

    fn observe(&self, event: &Event<'_>);
}

/// The settings of a [`Pipelined`] transport.
#[derive(Clone, Debug)]
pub struct PipelinedSettings {
    pub(crate) connections: usize,
    pub(crate) attempt_timeout: Duration,
    pub(crate) stall_timeout: Option<Duration>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) timeouts_to_close: u32,
    pub(crate) limits: Limits,
}

impl Default for PipelinedSettings {
    fn default() -> Self {
        Self {
            connections: 1,
            attempt_timeout: Duration::from_millis(30),
            stall_timeout: None,
            connect_timeout: None,
            timeouts_to_close: 3,
            limits: Limits {
                value: 1 << 20,
                requests: 16_384,
                queued_bytes: 64 << 20,
            },
        }
    }
}

impl PipelinedSettings {
    /// How many connections to the node; 1 by default, which is the fastest on few cores, because
    /// requests share writes. memcached pins each connection to one of its threads, so several
    /// make better use of a server with many.
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections;
        self
    }

    /// How long one attempt may take, from being queued to its reply; 30 ms by default.
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = timeout;
        self
    }

    /// How many time-outs in a row close the connection, if their requests were sent over at least
    /// an attempt timeout (a burst that times out together is one event); 3 by default.
    #[must_use]
    pub fn timeouts_to_close(mut self, timeouts: u32) -> Self {
        self.timeouts_to_close = timeouts;
        self
    }

    /// How long a connection may receive nothing while a request on it is unanswered; twice the
    /// attempt timeout by default.
    #[must_use]
    pub fn stall_timeout(mut self, timeout: Duration) -> Self {
        self.stall_timeout = Some(timeout);
        self
    }

    /// How long connecting may take, resolving and the first answer included; twice the attempt
    /// timeout by default.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = Some(timeout);
        self
    }

    /// The largest value, in bytes, to be sent or received; 1 MiB by default, which is also
    /// memcached's own default limit (on the whole item, key and header included).
    #[must_use]
    pub fn max_value_size(mut self, bytes: usize) -> Self {
        self.limits.value = bytes;
        self
    }

    /// How many requests may be queued or in flight on each connection; 16,384 by default
    /// (spymemcached's queue size).
    #[must_use]
    pub fn max_requests(mut self, requests: usize) -> Self {
        self.limits.requests = requests;
        self
    }

    /// How many bytes of requests may wait in each connection's queue; 64 MiB by default.
    #[must_use]
    pub fn max_queued_bytes(mut self, bytes: usize) -> Self {
        self.limits.queued_bytes = bytes;
        self
    }

    pub(crate) fn stall_after(&self) -> Duration {
        self.stall_timeout
            .unwrap_or(self.attempt_timeout.saturating_mul(2))
    }

    pub(crate) fn connect_within(&self) -> Duration {
        self.connect_timeout
            .unwrap_or(self.attempt_timeout.saturating_mul(2))
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        not_zero("attempt_timeout", self.attempt_timeout.is_zero())?;
        not_zero("stall_timeout", self.stall_after().is_zero())?;
        not_zero("connect_timeout", self.connect_within().is_zero())?;
        not_zero("timeouts_to_close", self.timeouts_to_close == 0)?;
        not_zero("connections", self.connections == 0)?;
        not_zero("max_requests", self.limits.requests == 0)?;
        not_zero("max_queued_bytes", self.limits.queued_bytes == 0)?;
        if self.limits.value as u64 > crate::protocol::ABSURD_LENGTH {
            let why = "is over 1 GiB, which no memcached holds";
            return Err(Invalid::new("max_value_size", why));
        }
        Ok(())
    }
}

/// Numbers the nodes of this process, so that a CAS token can tell them apart.
fn next_node_number() -> NonZeroU32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    loop {
        if let Some(number) = NonZeroU32::new(NEXT.fetch_add(1, Ordering::Relaxed)) {
            return number;
        }
    }
}

/// One node, over pipelined connections: the bottom of the stack.
///
/// A cheap handle: clones share the connections, which are closed when the last clone, and the
/// last future made by one, is dropped. Connections are made when first needed.
///
/// # Readiness
/// `poll_ready` is always ready; a full queue is an immediate
/// [`ErrorKind::Overloaded`](crate::ErrorKind::Overloaded) from `call`.
///
/// # Cancel safety
/// Dropping a [`PipelinedFuture`] whose request is still queued takes it out of the queue. Once it
/// is in the batch being written its place among the replies is kept and its reply discarded.
#[derive(Clone, Debug)]
pub struct Pipelined(Arc<Pool>);

impl Pipelined {
    /// A transport to `address`. No I/O is done yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if a setting is
    /// zero, or the executor's threads cannot be started.
    pub fn new(
        address: Address,
        settings: PipelinedSettings,
        connector: Arc<dyn Connector>,
        executor: &Executor,
    ) -> Result<Self> {
        settings.validate()?;
        let name = Arc::from(address.to_string());
        let parts = slot::Parts {
            name,
            address,
            settings,
            connector,
            spawner: executor.start()?.for_node(),
            observer: None,
        };
        Ok(Self::from_parts(parts))
    }

    pub(crate) fn from_parts(parts: slot::Parts) -> Self {
        Self(Arc::new(Pool::new(parts, next_node_number())))
    }

    /// Ends what is queued or in flight, and the connections with it: the node is out.
    pub(crate) fn drain(&self, error: &Error) {
        self.0.drain(error);
    }

    /// Ends what is queued, which no one has been sent: the node is to be closed once it has answered
    /// the rest.
    pub(crate) fn retire(&self, error: &Error) {
        self.0.retire(error);
    }

    /// Connections that were given up are waited for until then, even if this is closed before.
    pub(crate) fn lingers_until(&self, closing: watch::Receiver<bool>) {
        self.0.lingers_until(closing);
    }

    /// Lets broken connections be tried again at once: the node is known to answer.
    pub(crate) fn end_backoff(&self) {
        self.0.end_backoff();
    }

    pub(crate) fn settings(&self) -> PipelinedSettings {
        self.0.settings()
    }

    /// Other settings from now on; how many connections there are, and the largest value over one
    /// that is up, stay.
    pub(crate) fn apply(&self, settings: PipelinedSettings) {
        self.0.apply(settings);
    }

    pub(crate) fn connect_within(&self) -> Duration {
        self.0.connect_within()
    }

    pub(crate) fn max_value_size(&self) -> usize {
        self.0.max_value_size()
    }

    /// How many connections it may have.
    pub(crate) fn connections(&self) -> usize {
        self.0.connections()
    }

    /// Requests queued and in flight.
    pub(crate) fn pending(&self) -> usize {
        self.0.pending()
    }

    /// Connections that are up.
    pub(crate) fn connections_up(&self) -> usize {
        self.0.up()
    }

    /// How many connections have come up so far.
    pub(crate) fn newest(&self) -> u32 {
        self.0.newest()
    }

    /// Closes every connection and ends what is on it.
    pub(crate) fn close(&self) {
        self.0.close();
    }
}

pub(crate) use slot::Parts;

impl Service<Request> for Pipelined {
    type Response = Response;
    type Error = Error;
    type Future = PipelinedFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> PipelinedFuture {
        PipelinedFuture::new(self.0.clone(), request)
    }
}
