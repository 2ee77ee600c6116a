//! One node: what stands between routing and a transport.
//!
//! Read from top to bottom, a request to a node meets
//! 1. the circuit breaker's [`gate`]: while it is shut the request fails at once, unsent;
//! 2. the in-flight limit, lowered while the node answers late if that is wanted ([`throttle`]);
//! 3. the attempt's time-out, where the service below has none of its own;
//! 4. the service below: the user's node layers around the transport.
//!
//! What its outcome says of the node is the [`classifier`]'s to decide, when that is too much the
//! [`policy`]'s, and what happens then the gate's. The transport tells by itself what only it sees
//! ([`shared`]): refused connects, connections that do not answer, answers that are slow.
//!
//! The [`keeper`] is the node's one task: it [`probe`]s, readmits, and deletes what the
//! [`journal`] names.

mod book;
mod classifier;
mod gate;
#[cfg(test)]
mod gate_tests;
mod journal;
mod keeper;
mod latency;
mod leftovers;
mod policy;
mod probe;
mod settings;
mod shared;
mod shutdown;
mod throttle;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use pin_project_lite::pin_project;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};
use tower::{Layer, Service};

pub(crate) use book::Book;
pub(crate) use gate::Admission;
pub use gate::BreakerState;
use journal::Hold;
pub(crate) use journal::{GRACE, Reason};
use policy::Policy;
pub use probe::ProbeSettings;
pub use settings::{BreakerSettings, JournalOverflow, JournalSettings, NodeSettings};
pub(crate) use shared::Shared;
use shared::{Makings, Watch, asker};

use crate::error::{BoxError, Charge, Error, ErrorKind, Result, Sent};
use crate::executor::{Executor, LATE, Spawner, after};
use crate::key::Key;
use crate::kill_switch::noted;
use crate::request::{Operation, Purpose, Request};
use crate::response::Response;
use crate::transport::{Parts, PipelinedSettings, Protocol, Transport};

/// What [`gate`] synchronises with.
mod sync {
    pub(super) use std::sync::atomic::{AtomicU8, Ordering};
    pub(super) use std::sync::{Mutex, MutexGuard};
}

/// What a client believes about one of its nodes: an entry of [`Client::nodes`](crate::Client::nodes).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NodeStatus {
    /// The node, as it is named in the configuration.
    pub node: Arc<str>,
    /// Its circuit breaker.
    pub state: BreakerState,
    /// Since when it is in this state.
    pub since: SystemTime,
    /// What the breaker opened for the last time; `None` if it never did.
    pub cause: Option<EjectionCause>,
    /// The same in detail, or if probes of it have failed since, why the last one did.
    pub last_cause: Option<Error>,
    /// Requests at it now.
    pub in_flight: usize,
    /// How many may be: its [limit](crate::ClientBuilder::max_in_flight), or, with an
    /// [adaptive](crate::ClientBuilder::adaptive_limit) one, fewer while it answers late.
    pub max_in_flight: usize,
    /// Connections to it that are up.
    pub connections: usize,
    /// Which protocol it is asked in: [`Meta`](Protocol::Meta) or [`Classic`](Protocol::Classic).
    /// `None` while it is to be found out ([`Protocol::Auto`]) and the server has not answered yet,
    /// and for a [`Node`] over a service that is not a [`Transport`].
    pub protocol: Option<Protocol>,
    /// Keys of which it may hold something older than what this client has written since. They are
    /// deleted there as soon as it answers, and what it has for them is not used until then.
    pub journal: usize,
    /// The fingerprint of the ring that it is on: see
    /// [`Client::ring_fingerprint`](crate::Client::ring_fingerprint). 0 for a node that is on none.
    pub ring: u64,
}

/// What a node's circuit breaker opens for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EjectionCause {
    /// A connect was refused: nothing listens there.
    Refused,
    /// No connection could be made that answers.
    ConnectFailed,
    /// Most of its connections did not answer, nor did those made in their place.
    Unresponsive,
    /// Time-outs in a row.
    Timeouts,
    /// Too large a share of its requests failed.
    FailureRate,
    /// Too large a share of its requests was slow.
    SlowCalls,
    /// Readiness probes failed.
    Probe,
    /// A request failed while the node was taking its keys back.
    Ramp,
    /// More keys would have to be remembered than its journal holds.
    Journal,
}

impl EjectionCause {
    /// A short lower-case name, for metrics and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::ConnectFailed => "connect_failed",
            Self::Unresponsive => "unresponsive",
            Self::Timeouts => "timeouts",
            Self::FailureRate => "failure_rate",
            Self::SlowCalls => "slow_calls",
            Self::Probe => "probe",
            Self::Ramp => "ramp",
            Self::Journal => "journal",
        }
    }

    fn of_lost(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::ConnectionFailed | ErrorKind::Unauthenticated => Self::ConnectFailed,
            _ => Self::Unresponsive,
        }
    }
}

/// A request while it is under way.
#[derive(Debug)]
struct Asked {
    /// Kept to the end, for what it leaves to be made up for, and should it have to be made again.
    request: Request,
    hold: Option<Hold>,
}

impl Asked {
    fn operation(&self) -> &Operation {
        self.request.operation()
    }

    /// The key, if an older value of it must not be read after this.
    fn written(&self) -> Option<&Key> {
        self.operation().written()
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
        let spawner = executor.start()?.for_node();
        let policy = Policy::new(settings.breaker.clone(), settings.attempt_timeout);
        let book = Arc::new(Book::new(settings.journal.capacity));
        let probed = service.clone();
        let shared = Arc::new(Shared::new(Makings {
            name: name.into(),
            policy: Arc::new(policy),
            settings,
            asker: asker(service.clone()),
            fresh: Box::new(move |_| asker(probed.clone())),
            spawner,
            transport: None,
            times_attempts: true,
            book,
        }));
        Ok(Self::kept(shared, service))
    }

    /// A node over its transport, with the user's layers between. The transport's own
    /// connections report to the breaker; a node that is out is probed over a connection of its
    /// own.
    pub(crate) fn over_transport<L>(
        parts: Parts,
        settings: NodeSettings,
        layer: &L,
        times_attempts: bool,
    ) -> Self
    where
        L: Layer<Transport, Service = S>,
    {
        let probing = parts.clone();
        let fresh = move |settings: Option<PipelinedSettings>| {
            let mut fresh = probing.clone();
            fresh.settings = settings.unwrap_or(fresh.settings).connections(1);
            let (limits, needed) = (&mut fresh.settings.limits, probe::CANARY_SIZE * 2);
            limits.value = limits.value.max(needed);
            limits.queued_bytes = limits.queued_bytes.max(needed);
            fresh.pool_size = 1;
            asker(Transport::from_parts(fresh))
        };
        let policy = Policy::new(settings.breaker.clone(), settings.attempt_timeout);
        let policy = Arc::new(policy);
        let book = Arc::new(Book::new(settings.journal.capacity));
        let (name, spawner) = (parts.name.clone(), parts.spawner.clone());
        let mut transport = None;
        let shared = Arc::new_cyclic(|weak: &Weak<Shared>| {
            let watch = Watch {
                node: weak.clone(),
                book: book.clone(),
                policy: policy.clone(),
            };
            let made = Transport::from_parts(Parts {
                observer: Some(Arc::new(watch)),
                ..parts
            });
            transport = Some(made.clone());
            Shared::new(Makings {
                name,
                policy,
                settings,
                asker: asker(made.clone()),
                fresh: Box::new(fresh),
                spawner,
                transport: Some(made),
                times_attempts,
                book,
            })
        });
        match transport {
            Some(transport) => Self::kept(shared, layer.layer(transport)),
            None => unreachable!("set while the shared part was made"),
        }
    }

    /// Its keeper starts with it, unless the runtime is still to be found.
    fn kept(shared: Arc<Shared>, service: S) -> Self {
        shared.book.belongs_to(&shared);
        if shared.spawner.knows_its_runtime() {
            shared.ensure_kept();
        }
        Self { shared, service }
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
        self.shared.status()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Tells `changes` whenever its state changes.
    pub(crate) fn report_to(&self, changes: &watch::Sender<()>) {
        self.shared.report_to(changes);
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
        NodeFuture::new(self.clone(), request)
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
        asked: Asked,
        // Since when it holds a place among the requests in flight.
        entered: Option<Instant>,
        // Only where the service below has no timer of its own.
        timer: Option<Pin<Box<Timer>>>,
    }

    impl<S> PinnedDrop for NodeFuture<S>
    where
        S: Service<Request>,
    {
        fn drop(this: Pin<&mut Self>) {
            let this = this.project();
            if let Some(entered) = this.entered.take() {
                this.shared.leave();
                this.shared.learn(this.asked, None, entered);
            }
        }
    }
}

pin_project! {
    #[project = StepProjection]
    enum Step<S>
    where
        S: Service<Request>,
    {
        // Called is a service only once, also if that panics and whoever polls goes on.
        Waiting { service: S, called: bool },
        Called { #[pin] future: S::Future },
        Done,
    }
}

pin_project! {
    /// When an attempt ends.
    struct Timer {
        due: Instant,
        // Whether it had all of its time by then.
        full: bool,
        // Once there is something to wait for.
        #[pin]
        sleep: Option<Sleep>,
    }
}

impl Timer {
    fn new(request: &Request, started: Instant, attempt_timeout: Duration) -> Pin<Box<Self>> {
        let attempt_ends = after(started, attempt_timeout);
        let own = request.attempt_timeout();
        let own = own.map(|own| after(started, own));
        let ends = [Some(attempt_ends), request.deadline(), own];
        let due = ends.into_iter().flatten().min().unwrap_or(attempt_ends);
        Box::pin(Self {
            due,
            full: due == attempt_ends,
            sleep: None,
        })
    }

    fn poll(self: Pin<&mut Self>, spawner: &Spawner, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut this = self.project();
        if this.sleep.is_none() {
            this.sleep.set(Some(spawner.sleep_until(*this.due)?));
        }
        match this.sleep.as_mut().as_pin_mut() {
            Some(sleep) => sleep.poll(cx).map(Ok),
            None => Poll::Pending,
        }
    }
}

impl<S: Service<Request>> NodeFuture<S> {
    pub(crate) fn new(node: Node<S>, request: Request) -> Self {
        Self {
            shared: node.shared,
            asked: Asked {
                request,
                hold: None,
            },
            step: Step::Waiting {
                service: node.service,
                called: false,
            },
            entered: None,
            timer: None,
        }
    }
}

impl<S: Service<Request>> NodeFuture<S> {
    pub(crate) fn node(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// What it asks.
    pub(crate) fn request(&self) -> &Request {
        &self.asked.request
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
        let foreign = |error: S::Error| Error::from_boxed(error.into());
        let mut waited = false;
        let polled = loop {
            match this.step.as_mut().project() {
                StepProjection::Waiting { called: true, .. } => panic!("polled after a panic"),
                StepProjection::Waiting { service, called } => {
                    let now = match *this.entered {
                        Some(entered) => entered,
                        None => {
                            enter(shared, this.asked)?;
                            let now = this.asked.request.take_time();
                            *this.entered = Some(now);
                            if shared.times_attempts {
                                let timeout = shared.settings.load().attempt_timeout;
                                let timer = Timer::new(&this.asked.request, now, timeout);
                                *this.timer = Some(timer);
                            }
                            now
                        }
                    };
                    match service.poll_ready(cx) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => break Poll::Ready(Err(foreign(error))),
                        Poll::Pending => {
                            waited = true;
                            break Poll::Pending;
                        }
                    }
                    // It may have been retired or opened while the request waited.
                    if let Err(error) = shared.still_there() {
                        break Poll::Ready(Err(error));
                    }
                    if shared.is_open() {
                        break Poll::Ready(Err(shared.unavailable()));
                    }
                    let mut request = this.asked.request.clone();
                    if !shared.times_attempts {
                        // Right below is our own transport.
                        request.tell_time(now);
                    }
                    *called = true;
                    let future = service.call(request);
                    this.step.set(Step::Called { future });
                }
                StepProjection::Called { future } => break future.poll(cx).map_err(foreign),
                StepProjection::Done => panic!("polled after completion"),
            }
        };
        let Some(started) = *this.entered else {
            unreachable!("nothing is waited for before it has entered");
        };
        let outcome = match polled {
            Poll::Ready(outcome) => outcome.map_err(|error| error.at_node(&shared.name)),
            Poll::Pending => {
                let Some(timer) = this.timer else {
                    return Poll::Pending;
                };
                ready!(timer.as_mut().poll(&shared.spawner, cx))?;
                let error = if waited {
                    Error::new(ErrorKind::Timeout, "a node layer was not ready in time")
                } else {
                    overdue(timer.due, timer.full)
                };
                Err(error.at_node(&shared.name))
            }
        };
        *this.entered = None;
        shared.leave();
        shared.learn(this.asked, Some(&outcome), started);
        // Ends what is below at once, should it still run.
        this.step.set(Step::Done);
        Poll::Ready(outcome)
    }
}

/// Takes a place at the node, if the request may be made there.
fn enter(shared: &Arc<Shared>, asked: &mut Asked) -> Result<()> {
    if asked.request.purpose() == Purpose::Note {
        if let Some(key) = asked.written() {
            shared.outdate(key, Reason::Outdated);
            shared.ensure_kept();
        }
        return Err(noted());
    }
    let entered = shared.still_there().and_then(|()| shared.enter(asked));
    if let Err(error) = &entered {
        shared.refused(asked, error);
    }
    entered
}

/// An attempt ended by our own timer. Found late, or before it had its `full` time, it is nobody's
/// fault.
fn overdue(due: Instant, full: bool) -> Error {
    let late = due.elapsed() > LATE;
    let charge = match (late, full) {
        (true, _) => Charge::OurLateness,
        (false, false) => Charge::Nobody,
        (false, true) => Charge::Node,
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
