//! One node: what stands between routing and a transport.
//!
//! Read from top to bottom, a request to a node meets
//! 1. the circuit [`breaker`]: while it is open the request fails at once, unsent;
//! 2. the in-flight limit;
//! 3. the attempt's time-out, where the service below has none of its own;
//! 4. the service below: the user's node layers around the transport.
//!
//! Its outcome is told to the breaker. The transport reports by itself what only it sees
//! ([`Shared::observe`]): refused connects and connections that do not answer. While the breaker
//! is open a [`probe`] runs, and nothing else closes it.

mod breaker;
mod probe;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};
use tower::{Layer, Service};

use breaker::Breaker;
pub use breaker::BreakerState;
use probe::Probe;
pub use probe::ProbeSettings;

use crate::error::{BoxError, Charge, Error, ErrorKind, Result, Sent};
use crate::executor::{Executor, LATE, Spawner, after};
use crate::request::{Origin, Request};
use crate::response::Response;
use crate::telemetry;
use crate::transport::{ConnectFailure, Event, Parts, Pipelined};

/// The settings of a [`Node`].
#[derive(Clone, Debug)]
pub struct NodeSettings {
    pub(crate) attempt_timeout: Duration,
    pub(crate) consecutive_timeouts: u32,
    pub(crate) max_in_flight: usize,
    pub(crate) probe: ProbeSettings,
}

impl Default for NodeSettings {
    fn default() -> Self {
        Self {
            attempt_timeout: Duration::from_millis(30),
            consecutive_timeouts: 3,
            max_in_flight: 16_384,
            probe: ProbeSettings::default(),
        }
    }
}

impl NodeSettings {
    /// How long one attempt may take; 30 ms by default. Not enforced a second time around a
    /// [`Pipelined`] transport, which does it itself with one timer per connection.
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = timeout;
        self
    }

    /// How many time-outs in a row open the breaker; 3 by default. Their requests must have been
    /// sent over at least an attempt timeout, since a burst that times out together is one event.
    #[must_use]
    pub fn consecutive_timeouts(mut self, timeouts: u32) -> Self {
        self.consecutive_timeouts = timeouts;
        self
    }

    /// How many requests the node may have at once; 16,384 by default. Requests moved here from
    /// another node may use half of it.
    #[must_use]
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.max_in_flight = requests;
        self
    }

    /// How the node is tested while its breaker is open.
    #[must_use]
    pub fn probe(mut self, probe: ProbeSettings) -> Self {
        self.probe = probe;
        self
    }

    pub(crate) fn validate(&self) -> Result<()> {
        if self.attempt_timeout.is_zero() {
            return Err(Error::configuration("the attempt timeout is zero"));
        }
        if self.consecutive_timeouts == 0 {
            return Err(Error::configuration("zero time-outs open the breaker"));
        }
        if self.max_in_flight == 0 {
            return Err(Error::configuration("no request may be in flight"));
        }
        self.probe.validate()
    }
}

/// What a client believes about one of its nodes: an entry of [`Client::nodes`](crate::Client::nodes).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NodeStatus {
    /// The node, as it is named in the configuration.
    pub node: Arc<str>,
    /// Its circuit breaker.
    pub state: BreakerState,
    /// Why the breaker opened, or the last probe failed; `None` if it never did.
    pub last_cause: Option<Error>,
    /// Requests at it now.
    pub in_flight: usize,
    /// Connections to it that are up.
    pub connections: usize,
}

/// What all handles of one node share.
pub(crate) struct Shared {
    id: u64,
    name: Arc<str>,
    settings: NodeSettings,
    breaker: Breaker,
    in_flight: AtomicUsize,
    probe: Probe,
    /// How long a probe may take unless it is set.
    probe_within: Duration,
    probing: AtomicBool,
    /// Anything sent, or its end, ends the probing task.
    in_use: watch::Sender<()>,
    /// The client is shut down.
    closed: AtomicBool,
    spawner: Spawner,
    /// Where it is known: it judges its connections itself.
    transport: Option<Pipelined>,
    /// Whether attempts must be timed here, for what is below may wait without end.
    times_attempts: bool,
}

impl Shared {
    /// Tells it from every other node of this process.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(crate) fn is_open(&self) -> bool {
        self.breaker.is_open()
    }

    fn open(self: &Arc<Self>, cause: &Error) {
        if self.breaker.open(cause) {
            self.opened(cause);
        }
    }

    fn opened(self: &Arc<Self>, cause: &Error) {
        telemetry::breaker_opened(&self.name, cause);
        self.ensure_probing();
    }

    /// One owner, started again should it ever die.
    pub(crate) fn ensure_probing(self: &Arc<Self>) {
        if self.closed.load(Ordering::Acquire) {
            return;
        }
        if !self.probing.swap(true, Ordering::AcqRel) && probe::spawn(self).is_err() {
            // No runtime here; the next request may come from inside one.
            self.probing_ended();
        }
    }

    fn probing_ended(&self) {
        self.probing.store(false, Ordering::Release);
    }

    /// True if that closed the breaker.
    fn probe_succeeded(&self) -> bool {
        if !self.breaker.probe_succeeded() {
            return false;
        }
        if let Some(transport) = &self.transport {
            transport.end_backoff();
        }
        telemetry::breaker_closed(&self.name);
        true
    }

    /// What the transport says of its connections.
    fn observe(self: &Arc<Self>, event: &Event<'_>) {
        match event {
            Event::Connected => {}
            Event::ConnectFailed {
                failure,
                error,
                others_up,
            } => match failure {
                // While other connections answer, a dial that fails does not condemn the node.
                ConnectFailure::Refused | ConnectFailure::TimedOut | ConnectFailure::Other
                    if *others_up == 0 =>
                {
                    self.open(error);
                }
                _ => {}
            },
            // Once is the connection's fault: memcached gives each to one of its threads, and
            // one can hang alone. Twice in a row is the node's.
            Event::Unresponsive { error, again } => {
                if *again {
                    self.open(error);
                }
            }
        }
    }

    /// Tells the breaker what came of a request.
    fn record(self: &Arc<Self>, outcome: &Result<Response>, started: Option<Instant>) {
        let failure = match outcome {
            Ok(response) => response.partial_failure(),
            Err(error) => Some(error),
        };
        let Some(error) = failure else {
            self.breaker.succeeded();
            return;
        };
        // Our transport reports these by itself; whatever else is below cannot.
        let lost = matches!(
            error.kind(),
            ErrorKind::ConnectionFailed | ErrorKind::Unresponsive
        );
        if self.transport.is_none() && lost && error.charge() == Charge::Node {
            self.open(error);
            return;
        }
        // It has judged its own time-outs as well, connection by connection.
        if let Some(started) = started
            && error.is_timeout()
            && error.charge() == Charge::Node
            && self.breaker.timed_out(started, error)
        {
            self.opened(error);
        }
    }

    fn unavailable(&self) -> Error {
        let message = match self.breaker.last_cause() {
            Some(cause) => format!("its circuit breaker is open, since: {cause}"),
            None => String::from("its circuit breaker is open"),
        };
        Error::new(ErrorKind::NodeUnavailable, message).at_node(&self.name)
    }

    /// Takes a place among the requests in flight, to be given back with [`Self::leave`].
    fn enter(self: &Arc<Self>, origin: Origin) -> Result<()> {
        if self.is_open() {
            self.ensure_probing();
            return Err(self.unavailable());
        }
        let limit = match origin {
            Origin::Home => self.settings.max_in_flight,
            Origin::Moved => (self.settings.max_in_flight / 2).max(1),
        };
        let before = self.in_flight.fetch_add(1, Ordering::Relaxed);
        if before >= limit {
            self.leave();
            let error = Error::new(ErrorKind::Overloaded, "its in-flight limit is reached");
            return Err(error.at_node(&self.name));
        }
        Ok(())
    }

    fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    fn times_attempts(&self) -> bool {
        self.times_attempts || self.transport.is_none()
    }
}

/// One node of a cluster: a circuit breaker and an in-flight limit around a service that sends
/// requests to it.
///
/// # Readiness
/// `poll_ready` is always ready, because routing needs the key of the request: an open breaker is
/// an immediate [`ErrorKind::NodeUnavailable`], the limit an immediate [`ErrorKind::Overloaded`],
/// both unsent. The readiness of the service below is waited for in the future, within the
/// attempt's time.
///
/// # Cancel safety
/// Dropping a [`NodeFuture`] gives its place back and counts neither for nor against the node.
pub struct Node<S> {
    shared: Arc<Shared>,
    service: S,
}

impl<S: Clone> Clone for Node<S> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            service: self.service.clone(),
        }
    }
}

impl<S> fmt::Debug for Node<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl<S> Node<S> {
    /// A node around any service. It is timed, judged by its time-outs, and probed through
    /// `service` itself.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`] if a setting is zero.
    pub fn new(
        name: impl Into<Arc<str>>,
        service: S,
        settings: NodeSettings,
        executor: &Executor,
    ) -> Result<Self>
    where
        S: Service<Request, Response = Response> + Clone + Send + Sync + 'static,
        S::Error: Into<BoxError> + Send,
        S::Future: Send,
    {
        settings.validate()?;
        let probed = service.clone();
        let key = probe::canary_key();
        let probe = probe::boxed(move || probe::canary(probed.clone(), key.clone()));
        let spawner = executor.start()?;
        let parts = SharedParts {
            name: name.into(),
            settings,
            probe,
            spawner,
            times_attempts: true,
        };
        let shared = Arc::new(parts.into_shared(None));
        Ok(Self { shared, service })
    }

    /// A node over the pipelined transport, with the user's layers between. The transport's own
    /// connections report to the breaker; probes use a connection of their own.
    pub(crate) fn over_transport<L>(
        parts: Parts,
        settings: NodeSettings,
        layer: &L,
        times_attempts: bool,
    ) -> Self
    where
        L: Layer<Pipelined, Service = S>,
    {
        let mut service = None;
        let shared = Arc::new_cyclic(|weak: &Weak<Shared>| {
            let mut fresh = parts.clone();
            let needed = probe::CANARY_SIZE * 2;
            fresh.settings = fresh.settings.connections(1);
            let limits = &mut fresh.settings.limits;
            limits.value = limits.value.max(needed);
            limits.queued_bytes = limits.queued_bytes.max(needed);
            let key = probe::canary_key();
            let probe = probe::boxed(move || {
                let transport = Pipelined::from_parts(fresh.clone());
                probe::canary(transport, key.clone())
            });
            let node = weak.clone();
            let observer = move |event: Event<'_>| {
                if let Some(shared) = node.upgrade() {
                    shared.observe(&event);
                }
            };
            let name = parts.name.clone();
            let spawner = parts.spawner.clone();
            let transport = Pipelined::from_parts(Parts {
                observer: Some(Arc::new(observer)),
                ..parts
            });
            service = Some(layer.layer(transport.clone()));
            let shared = SharedParts {
                name,
                settings,
                probe,
                spawner,
                times_attempts,
            };
            shared.into_shared(Some(transport))
        });
        match service {
            Some(service) => Self { shared, service },
            None => unreachable!("set while the shared part was made"),
        }
    }

    /// Its name in the configuration.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.shared.name
    }

    /// Whether no request may go to it now.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.shared.is_open()
    }

    /// What is believed of it.
    #[must_use]
    pub fn status(&self) -> NodeStatus {
        let shared = &self.shared;
        NodeStatus {
            node: shared.name.clone(),
            state: shared.breaker.state(),
            last_cause: shared.breaker.last_cause(),
            in_flight: self.in_flight(),
            connections: shared
                .transport
                .as_ref()
                .map_or(0, Pipelined::connections_up),
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::Relaxed)
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.in_use.send_replace(());
        if let Some(transport) = &self.shared.transport {
            transport.close();
        }
    }
}

struct SharedParts {
    name: Arc<str>,
    settings: NodeSettings,
    probe: Probe,
    spawner: Spawner,
    times_attempts: bool,
}

impl SharedParts {
    fn into_shared(self, transport: Option<Pipelined>) -> Shared {
        let Self {
            name,
            settings,
            probe,
            spawner,
            times_attempts,
        } = self;
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        Shared {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            breaker: Breaker::new(
                settings.consecutive_timeouts,
                settings.attempt_timeout,
                settings.probe.success_threshold,
            ),
            // One attempt each to write and to read; without a transport that says how long
            // connecting may take, as long again for that.
            probe_within: transport
                .as_ref()
                .map_or(settings.attempt_timeout.saturating_mul(2), |transport| {
                    transport.connect_within()
                })
                .saturating_add(settings.attempt_timeout.saturating_mul(2)),
            name,
            settings,
            in_flight: AtomicUsize::new(0),
            probe,
            probing: AtomicBool::new(false),
            in_use: watch::Sender::new(()),
            closed: AtomicBool::new(false),
            spawner,
            transport,
            times_attempts,
        }
    }
}

impl<S> Service<Request> for Node<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = Error;
    type Future = NodeFuture<S>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> NodeFuture<S> {
        NodeFuture::new(self, request)
    }
}

pin_project! {
    /// The future of one attempt at a [`Node`].
    #[must_use = "futures do nothing unless polled"]
    pub struct NodeFuture<S>
    where
        S: Service<Request>,
    {
        shared: Arc<Shared>,
        #[pin]
        step: Step<S>,
        // Whether it holds a place among the requests in flight.
        entered: bool,
        // When it was, if attempts are timed here.
        started: Option<Instant>,
        deadline: Option<Instant>,
        #[pin]
        timer: Option<Sleep>,
    }

    impl<S> PinnedDrop for NodeFuture<S>
    where
        S: Service<Request>,
    {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if *this.entered {
                this.shared.leave();
            }
        }
    }
}

pin_project! {
    #[project = StepProjection]
    #[project_replace = StepReplacement]
    enum Step<S>
    where
        S: Service<Request>,
    {
        Waiting { service: S, request: Request },
        Called { #[pin] future: S::Future },
        Done,
    }
}

impl<S: Service<Request> + Clone> NodeFuture<S> {
    pub(crate) fn new(node: &Node<S>, request: Request) -> Self {
        Self {
            shared: node.shared.clone(),
            deadline: request.deadline(),
            step: Step::Waiting {
                service: node.service.clone(),
                request,
            },
            entered: false,
            started: None,
            timer: None,
        }
    }
}

impl<S: Service<Request>> NodeFuture<S> {
    pub(crate) fn node(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl<S> Future for NodeFuture<S>
where
    S: Service<Request, Response = Response>,
    S::Error: Into<BoxError>,
{
    type Output = Result<Response>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let mut this = self.project();
        let shared = &*this.shared;
        let mut waited = false;
        let polled = loop {
            match this.step.as_mut().project() {
                StepProjection::Waiting { service, request } => {
                    if !*this.entered {
                        shared.enter(request.origin())?;
                        *this.entered = true;
                        if shared.times_attempts() {
                            *this.started = Some(Instant::now());
                        }
                    }
                    match service.poll_ready(cx) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                        Poll::Pending => {
                            waited = true;
                            break Poll::Pending;
                        }
                    }
                    // It may have opened while the request waited.
                    if shared.is_open() {
                        return Poll::Ready(Err(shared.unavailable()));
                    }
                    let StepReplacement::Waiting {
                        mut service,
                        request,
                    } = this.step.as_mut().project_replace(Step::Done)
                    else {
                        unreachable!("matched above");
                    };
                    let future = service.call(request);
                    this.step.set(Step::Called { future });
                }
                StepProjection::Called { future } => break future.poll(cx),
                StepProjection::Done => panic!("polled after completion"),
            }
        };
        let outcome = match (polled, *this.started) {
            (Poll::Ready(outcome), _) => {
                outcome.map_err(|error| Error::from_boxed(error.into()).at_node(&shared.name))
            }
            (Poll::Pending, None) => return Poll::Pending,
            (Poll::Pending, Some(started)) => {
                let attempt_ends = after(started, shared.settings.attempt_timeout);
                let due = this
                    .deadline
                    .map_or(attempt_ends, |ends| ends.min(attempt_ends));
                if this.timer.is_none() {
                    this.timer.set(Some(shared.spawner.sleep_until(due)?));
                }
                if let Some(timer) = this.timer.as_mut().as_pin_mut() {
                    ready!(timer.poll(cx));
                }
                let error = if waited {
                    Error::new(ErrorKind::Timeout, "a node layer was not ready in time")
                } else {
                    overdue(due, due == attempt_ends)
                };
                Err(error.at_node(&shared.name))
            }
        };
        shared.record(&outcome, *this.started);
        // Ends what is below at once, should it still run.
        this.step.set(Step::Done);
        *this.entered = false;
        shared.leave();
        Poll::Ready(outcome)
    }
}

/// An attempt ended by our own timer. Found late, or before it had its `full` time, it is nobody's
/// fault.
fn overdue(due: Instant, full: bool) -> Error {
    let late = due.elapsed() > LATE;
    let charge = if late || !full {
        Charge::Nobody
    } else {
        Charge::Node
    };
    Error::new(ErrorKind::Timeout, "the attempt's time ran out")
        .with_sent(Sent::Maybe)
        .charged_to(charge)
}

impl<S: Service<Request>> fmt::Debug for NodeFuture<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeFuture").finish_non_exhaustive()
    }
}

/// Makes a [`Node`] of any service that sends requests to one memcached.
#[derive(Clone, Debug)]
pub struct NodeLayer {
    name: Arc<str>,
    settings: NodeSettings,
    executor: Executor,
}

impl NodeLayer {
    /// A layer for the node of that name; probes run on `executor`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`] if a setting is zero or the executor's threads cannot
    /// be started.
    pub fn new(
        name: impl Into<Arc<str>>,
        settings: NodeSettings,
        executor: Executor,
    ) -> Result<Self> {
        settings.validate()?;
        executor.start()?;
        Ok(Self {
            name: name.into(),
            settings,
            executor,
        })
    }
}

impl<S> Layer<S> for NodeLayer
where
    S: Service<Request, Response = Response> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError> + Send,
    S::Future: Send,
{
    type Service = Node<S>;

    fn layer(&self, service: S) -> Node<S> {
        match Node::new(
            self.name.clone(),
            service,
            self.settings.clone(),
            &self.executor,
        ) {
            Ok(node) => node,
            Err(_) => unreachable!("settings and executor were checked in NodeLayer::new"),
        }
    }
}
