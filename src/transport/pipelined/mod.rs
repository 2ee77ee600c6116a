//! The pipelined transport: many requests share few connections.
//!
//! A [`Pipelined`] is a cheap handle to one node's connections. Each connection is a slot with a
//! bounded queue (a [`Pipeline`](crate::protocol::Pipeline) under one lock, the only one a request
//! takes) and one task on the I/O executor that connects, writes what is queued in as few writes
//! as it can, and settles requests as replies come (`connection.rs`). A request's future encodes
//! it straight into the queue when first polled, and takes its outcome from there.
//!
//! Time-outs are found by the connection's one timer, or by the caller's own (or the
//! [`alarm`] that callers share), whichever is first.
//! A connection that times out three requests in a row, sent over at least an attempt timeout, or
//! that has received no byte for the stall timeout while something is unanswered, is closed; what
//! was on it ends there and then.

mod alarm;
mod connection;
mod slot;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tower::Service;

pub use slot::PipelinedFuture;
use slot::Pool;

use super::protocol::Protocol;
use super::site::{Parts, Site};
use super::{Address, Connector, Credentials};
use crate::error::{Error, Invalid, Result, not_zero};
use crate::executor::{Executor, Spawner};
use crate::protocol::Limits;
use crate::request::Request;
use crate::response::Response;

/// The settings of a [`Pipelined`] transport.
#[derive(Clone, Debug)]
pub struct PipelinedSettings {
    pub(crate) connections: usize,
    pub(crate) attempt_timeout: Duration,
    pub(crate) stall_timeout: Option<Duration>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) timeouts_to_close: u32,
    pub(crate) limits: Limits,
    pub(crate) credentials: Option<Credentials>,
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
            credentials: None,
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

    /// How long connecting may take, resolving and the first answer included. By default what the
    /// connector [says](Connector::connect_timeout), and twice the attempt timeout if it says nothing.
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

    /// Who this client is, to a server that wants to know (see
    /// [`ClientBuilder::credentials`](crate::ClientBuilder::credentials)); nobody by default.
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.credentials = Some(credentials);
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

    /// With what the connector says where nobody else does.
    pub(crate) fn over(mut self, connector: &dyn Connector) -> Self {
        let timeout = self.connect_timeout;
        self.connect_timeout = timeout.or_else(|| connector.connect_timeout());
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        not_zero("attempt_timeout", self.attempt_timeout.is_zero())?;
        not_zero("stall_timeout", self.stall_after().is_zero())?;
        not_zero("connect_timeout", self.connect_within().is_zero())?;
        not_zero("timeouts_to_close", self.timeouts_to_close == 0)?;
        not_zero("connections", self.connections == 0)?;
        not_zero("max_requests", self.limits.requests == 0)?;
        self.credentials
            .as_ref()
            .map_or(Ok(()), Credentials::validate)?;
        not_zero("max_queued_bytes", self.limits.queued_bytes == 0)?;
        if self.limits.value as u64 > crate::protocol::ABSURD_LENGTH {
            let why = "is over 1 GiB, which no memcached holds";
            return Err(Invalid::new("max_value_size", why));
        }
        Ok(())
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
        let (site, spawner) = Site::new(Parts {
            name,
            address,
            settings,
            protocol: Protocol::Meta,
            spoken: Arc::default(),
            pool_size: 0,
            connector,
            spawner: executor.start()?.for_node(),
            observer: None,
        });
        Ok(Self::at(site, spawner))
    }

    pub(super) fn at(site: Arc<Site>, spawner: Spawner) -> Self {
        Self(Arc::new(Pool::new(site, spawner)))
    }

    #[inline]
    pub(super) fn request(&self, request: Request) -> PipelinedFuture {
        PipelinedFuture::new(self.0.clone(), request)
    }

    pub(super) fn site(&self) -> &Arc<Site> {
        self.0.site()
    }

    /// Ends what is queued or in flight, and the connections with it: the node is out.
    pub(super) fn drain(&self, error: &Error) {
        self.0.drain(error);
    }

    /// Ends what is queued, which no one has been sent: the node is to be closed once it has answered
    /// the rest.
    pub(super) fn retire(&self, error: &Error) {
        self.0.retire(error);
    }

    /// Lets broken connections be tried again at once: the node is known to answer.
    pub(super) fn end_backoff(&self) {
        self.0.end_backoff();
    }

    /// Other settings from now on; how many connections there are, and the largest value over one
    /// that is up, stay.
    pub(super) fn apply(&self, settings: PipelinedSettings) {
        self.0.apply(settings);
    }

    /// How many connections it may have.
    pub(super) fn connections(&self) -> usize {
        self.0.connections()
    }

    /// Requests queued and in flight.
    pub(super) fn pending(&self) -> usize {
        self.0.pending()
    }

    /// Closes every connection and ends what is on it.
    pub(super) fn close(&self) {
        self.0.close();
    }
}

impl Service<Request> for Pipelined {
    type Response = Response;
    type Error = Error;
    type Future = PipelinedFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> PipelinedFuture {
        self.request(request)
    }
}
