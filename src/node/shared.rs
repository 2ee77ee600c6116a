//! What all handles of one node share, and what its transport and its keeper tell of it.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use futures::future::BoxFuture;
use tokio::sync::futures::OwnedNotified;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::book::Book;
use super::classifier::Verdict;
use super::gate::{Admission, BreakerState, Gate, Moment};
use super::journal::{Journal, Reason, Recorded};
use super::latency::Latencies;
use super::leftovers::Leftovers;
use super::policy::{Policy, Trip};
use super::probe::{self, Asker, CANARY_SIZE};
use super::throttle::{Late, Throttle};
use super::{Asked, EjectionCause, JournalOverflow, NodeSettings, NodeStatus, keeper};
use crate::error::{Error, ErrorKind, Result, Sent};
use crate::executor::{LATE, Spawner, after};
use crate::key::Key;
use crate::request::{Operation, Origin, Purpose, Request};
use crate::response::Response;
use crate::telemetry::{Event as Counted, Level, NodeMeters, RingMark};
use crate::transport::{ConnectFailure, Event, Observer, PipelinedSettings, Transport};

impl Moment for Instant {
    fn since(self, earlier: Self) -> Duration {
        self.saturating_duration_since(earlier)
    }
}

/// Why a node was ejected.
type Cause = (EjectionCause, Error);

pub(crate) struct Shared {
    id: u64,
    pub(super) name: Arc<str>,
    pub(super) settings: ArcSwap<NodeSettings>,
    pub(super) gate: Gate<Instant, Cause>,
    policy: Arc<Policy>,
    pub(super) journal: Arc<Journal>,
    pub(super) latencies: Latencies,
    pub(super) meters: NodeMeters,
    /// Nobody waits for a place.
    throttle: Throttle,
    /// Requests that wait for it to be back.
    pub(super) waiting: AtomicUsize,
    /// What a request gets while the gate is shut.
    unavailable: ArcSwapOption<Error>,
    ejections: AtomicU64,
    changed_at: Mutex<SystemTime>,
    changes: OnceLock<watch::Sender<()>>,
    /// Of the ring that it is on, if it is on one.
    ring: OnceLock<Arc<RingMark>>,
    leftovers: Arc<Leftovers>,
    /// What outlives it of these, and of its server.
    pub(super) book: Arc<Book>,
    /// Asks it over the connections that requests use.
    pub(super) asker: Asker,
    fresh: Fresh,
    pub(super) canary: Key,
    /// As large as requests may be, if that is not enough for a real one.
    pub(super) canary_size: usize,
    kept: AtomicBool,
    /// Calls the keeper.
    pub(super) wake: Arc<Notify>,
    /// Calls those who wait for it to be back, or to be closed.
    back: Arc<Notify>,
    /// Anything sent, or its end, ends the keeper.
    pub(super) in_use: watch::Sender<()>,
    /// The client is shut down.
    closed: AtomicBool,
    /// Since when it is none of the cluster's nodes any more.
    retired: OnceLock<Instant>,
    pub(super) spawner: Spawner,
    /// Where it is known: it judges its connections itself.
    pub(super) transport: Option<Transport>,
    /// Whether attempts must be timed here, for what is below may wait without end.
    pub(super) times_attempts: bool,
}

/// Makes a way to ask it over a fresh connection, by the transport's settings if it has any.
pub(super) type Fresh = Box<dyn Fn(Option<PipelinedSettings>) -> Asker + Send + Sync>;

/// What a node is made of.
pub(super) struct Makings {
    pub(super) name: Arc<str>,
    pub(super) settings: NodeSettings,
    pub(super) policy: Arc<Policy>,
    pub(super) asker: Asker,
    pub(super) fresh: Fresh,
    pub(super) spawner: Spawner,
    pub(super) transport: Option<Transport>,
    pub(super) times_attempts: bool,
    pub(super) book: Arc<Book>,
}

impl Shared {
    pub(super) fn new(makings: Makings) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let Makings {
            name,
            settings,
            policy,
            asker,
            fresh,
            spawner,
            transport,
            times_attempts,
            book,
        } = makings;
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            gate: Gate::new(settings.gate()),
            policy,
            journal: book.journal.clone(),
            latencies: Latencies::default(),
            meters: NodeMeters::new(&name, &Verdict::OUTCOMES),
            throttle: Throttle::new(settings.max_in_flight),
            waiting: AtomicUsize::new(0),
            unavailable: ArcSwapOption::empty(),
            ejections: AtomicU64::new(0),
            changed_at: Mutex::new(SystemTime::now()),
            changes: OnceLock::new(),
            ring: OnceLock::new(),
            leftovers: book.leftovers.clone(),
            book,
            asker,
            fresh,
            canary: probe::canary_key(),
            canary_size: transport
                .as_ref()
                .map_or(CANARY_SIZE, Transport::max_value_size)
                .min(CANARY_SIZE),
            kept: AtomicBool::new(false),
            wake: Arc::new(Notify::new()),
            back: Arc::new(Notify::new()),
            in_use: watch::Sender::new(()),
            closed: AtomicBool::new(false),
            retired: OnceLock::new(),
            spawner,
            transport,
            times_attempts,
            name,
            settings: ArcSwap::from_pointee(settings),
        }
    }

    /// Tells it from every other node of this process.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) fn fresh_asker(&self) -> Asker {
        (self.fresh)(self.transport.as_ref().map(Transport::settings))
    }

    /// Other settings from now on, but for the room in its journal.
    pub(crate) fn apply(&self, settings: NodeSettings, transport: PipelinedSettings) {
        self.policy
            .apply(settings.breaker.clone(), settings.attempt_timeout);
        self.gate.apply(settings.gate());
        self.throttle.configure(settings.max_in_flight);
        self.settings.store(Arc::new(settings));
        if let Some(own) = &self.transport {
            own.apply(transport);
        }
        self.wake.notify_one();
    }

    /// Whether no request may go to it.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.gate.is_shut()
    }

    /// Whether requests may go to it for any key: nothing is wrong with it.
    #[inline]
    pub(crate) fn is_untroubled(&self) -> bool {
        self.gate.is_closed() && self.journal.len() == 0
    }

    /// Whether a request for a key may go to it, as far as its breaker goes.
    pub(crate) fn admits(&self, key: &Key) -> Admission {
        let share = || key.fixed_hash() as f64 / u64::MAX as f64;
        self.gate.admits(share, Instant::now())
    }

    /// Whether what it has for a key is not to be used.
    pub(crate) fn is_outdated(&self, key: &Key) -> bool {
        self.journal.holds(key)
    }

    /// What it has for a key is not to be used from now on, until it has been deleted there.
    pub(crate) fn outdate(self: &Arc<Self>, key: &Key, reason: Reason) {
        self.book.outdate(key, reason);
    }

    /// Sees to what has come of an entry in its journal.
    pub(super) fn heed(self: &Arc<Self>, recorded: Recorded) {
        match recorded {
            Recorded::In { wake } => {
                if wake {
                    self.wake.notify_one();
                }
            }
            Recorded::Overflow { first } => {
                self.meters.count(Counted::JournalOverflow);
                if first && self.forgets() {
                    self.open(EjectionCause::Journal, &keeper::journal_overflowed());
                }
            }
        }
    }

    /// Whether something old on it is not known any more, and must not be read.
    pub(super) fn forgets(&self) -> bool {
        let serves = self.settings.load().journal.overflow == JournalOverflow::Serve;
        !serves && self.journal.has_overflowed()
    }

    /// One of its keys is being written on another node, where it may live for `lifetime`.
    pub(crate) fn left_elsewhere(&self, key: &Key, lifetime: Duration) {
        self.leftovers.leave(key, lifetime);
    }

    /// Whether another node may still have what it got of that key.
    pub(crate) fn may_be_elsewhere(&self, key: &Key) -> bool {
        self.leftovers.may_hold(key)
    }

    pub(crate) fn count(&self, event: Counted) {
        self.meters.count(event);
    }

    /// How long 95 % of its answers took at most, lately; `None` until enough is known.
    pub(crate) fn p95(&self) -> Option<Duration> {
        self.latencies.p95()
    }

    pub(crate) fn connections(&self) -> usize {
        self.transport.as_ref().map_or(1, Transport::connections)
    }

    /// Takes a place among those who wait for it to be back.
    pub(crate) fn wait(&self) -> Result<()> {
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        if before >= self.settings.load().max_in_flight {
            self.wait_ends();
            let error = Error::new(ErrorKind::Overloaded, "as many wait for it as may");
            return Err(error.at_node(&self.name));
        }
        Ok(())
    }

    pub(crate) fn wait_ends(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// Ends the wait of all who wait for it.
    pub(crate) fn call_back(&self) {
        self.back.notify_waiters();
    }

    /// Ready once it is back, or closed.
    pub(crate) fn back(&self) -> OwnedNotified {
        self.back.clone().notified_owned()
    }

    /// Tells `changes` whenever its state changes.
    pub(crate) fn report_to(&self, changes: &watch::Sender<()>) {
        let _already = self.changes.set(changes.clone());
    }

    /// It is on that ring.
    pub(crate) fn is_on(&self, ring: &Arc<RingMark>) {
        let _already = self.ring.set(ring.clone());
    }

    /// What it may still execute late is waited for until `closing` is true, or gone.
    pub(crate) fn lingers_until(&self, closing: watch::Receiver<bool>) {
        if let Some(transport) = &self.transport {
            transport.lingers_until(closing);
        }
    }

    pub(super) fn changed(&self) {
        let mut changed_at = self
            .changed_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *changed_at = SystemTime::now();
        drop(changed_at);
        self.show_state();
        if let Some(changes) = self.changes.get() {
            changes.send_replace(());
        }
    }

    fn show_state(&self) {
        if self.is_retired() {
            return;
        }
        let state = match self.gate.state() {
            BreakerState::Closed => 0,
            BreakerState::Ramping => 1,
            BreakerState::HalfOpen => 2,
            BreakerState::Open => 3,
        };
        self.meters.set(Level::BreakerState, state);
        self.clear_if_retired();
    }

    /// At once: later another node may have its name.
    fn clear_if_retired(&self) {
        if self.is_retired() {
            self.meters.clear();
        }
    }

    pub(super) fn show_levels(&self) {
        if self.is_retired() {
            return;
        }
        self.show_state();
        if let Some(ring) = self.ring.get() {
            ring.show();
        }
        self.meters.set(Level::InFlight, self.in_flight());
        let limit = self.throttle.limit_at(Instant::now());
        self.meters.set(Level::InFlightLimit, limit);
        self.meters.set(Level::JournalKeys, self.journal.len());
        if let Some(transport) = &self.transport {
            self.meters.set(Level::QueueDepth, transport.pending());
            let connections = transport.connections_up();
            self.meters.set(Level::Connections, connections);
        }
        self.clear_if_retired();
        self.latencies.turn();
    }

    pub(super) fn status(&self) -> NodeStatus {
        let (cause, last_cause) = self.gate.cause().unzip();
        let since = *self
            .changed_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let transport = self.transport.as_ref();
        NodeStatus {
            node: self.name.clone(),
            state: self.gate.state(),
            since,
            cause,
            last_cause,
            in_flight: self.in_flight(),
            max_in_flight: self.throttle.limit_at(Instant::now()),
            connections: transport.map_or(0, Transport::connections_up),
            protocol: transport.and_then(Transport::protocol),
            journal: self.journal.len(),
            ring: self.ring.get().map_or(0, |ring| ring.get()),
        }
    }

    pub(super) fn ejections(&self) -> u64 {
        self.ejections.load(Ordering::Acquire)
    }

    /// Ejects the node.
    pub(super) fn open(self: &Arc<Self>, cause: EjectionCause, error: &Error) {
        if self.gate.is_shut() || self.is_retired() {
            return;
        }
        self.say_unavailable(error);
        if !self.gate.open((cause, error.clone()), Instant::now()) {
            return;
        }
        self.ejections.fetch_add(1, Ordering::AcqRel);
        self.journal.node_is_out();
        self.meters.ejected(cause.name());
        self.changed();
        // What is on the way to it must not wait for it; nor will what it answers late be believed.
        if let Some(transport) = &self.transport {
            transport.drain(&self.unavailable());
            self.book.birth_counts(transport.newest());
        }
        self.ensure_kept();
        self.wake.notify_one();
    }

    fn say_unavailable(&self, cause: &Error) {
        let message = format!("its circuit breaker is open, since: {cause}");
        let error = Error::new(ErrorKind::NodeUnavailable, message).at_node(&self.name);
        self.unavailable.store(Some(Arc::new(error)));
    }

    pub(super) fn unavailable(&self) -> Error {
        match &*self.unavailable.load() {
            Some(error) => Error::clone(error),
            None => Error::new(ErrorKind::NodeUnavailable, "it is out").at_node(&self.name),
        }
    }

    pub(super) fn probe_failed(&self, error: &Error) {
        let was_half_open = self.gate.state() == BreakerState::HalfOpen;
        let error = error.clone().at_node(&self.name);
        // What it was ejected for stays what it was.
        let cause = self.gate.cause();
        let cause = cause.map_or(EjectionCause::Probe, |(cause, _)| cause);
        self.gate.probe_failed((cause, error));
        if was_half_open {
            self.changed();
        }
    }

    /// Half-open to ramping.
    pub(super) fn readmit(&self) {
        self.policy.reset();
        if self.gate.readmit(Instant::now()) {
            self.call_back();
            self.meters.count(Counted::Readmission);
            self.changed();
        }
    }

    /// One was asked for while the node was out: it is made up for before it is readmitted.
    pub(super) fn flush_wanted(&self) -> bool {
        self.book.flush_wanted()
    }

    /// Whether it must be flushed before it may be asked.
    pub(super) fn owes_a_flush(&self) -> bool {
        self.forgets() || self.flush_wanted()
    }

    /// It is not asked before it has been flushed, if it must be.
    pub(super) fn sees_to_its_debts(self: &Arc<Self>) {
        if self.owes_a_flush() {
            self.open(EjectionCause::Journal, &keeper::journal_overflowed());
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// One keeper, started again should it ever die.
    pub(crate) fn ensure_kept(self: &Arc<Self>) {
        if self.kept.load(Ordering::Acquire)
            || self.closed.load(Ordering::Acquire)
            || self.is_retired()
        {
            return;
        }
        if !self.kept.swap(true, Ordering::AcqRel) && keeper::spawn(self).is_err() {
            // No runtime here; the next request may come from inside one.
            self.keeper_ended();
        }
    }

    pub(super) fn keeper_ended(&self) {
        self.kept.store(false, Ordering::Release);
    }

    /// Requests at it, and those that wait for it.
    pub(crate) fn under_way(&self) -> usize {
        self.in_flight() + self.waiting.load(Ordering::Relaxed)
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.in_use.send_replace(());
        self.call_back();
        if let Some(transport) = &self.transport {
            transport.close();
        }
    }

    /// Whether it is none of the cluster's nodes any more.
    #[inline]
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.get().is_some()
    }

    /// # Errors
    /// [`ErrorKind::NodeUnavailable`], unsent, if it is none of the cluster's nodes any more.
    #[inline]
    pub(super) fn still_there(&self) -> Result<()> {
        match self.is_retired() {
            true => Err(self.gone()),
            false => Ok(()),
        }
    }

    fn gone(&self) -> Error {
        let message = "it is none of the nodes any more";
        Error::new(ErrorKind::NodeUnavailable, message).at_node(&self.name)
    }

    /// It is none of the cluster's nodes any more, and takes no more requests. Those it has been
    /// sent end there; all others, and those who wait for it, go where their keys belong now. Then
    /// its keeper disconnects it, after an attempt's time at the latest.
    pub(crate) fn retire(self: &Arc<Self>) {
        self.ensure_kept();
        if self.retired.set(Instant::now()).is_err() {
            return;
        }
        self.journal.goes_away();
        self.meters.clear();
        if let Some(transport) = &self.transport {
            transport.retire(&self.gone());
            self.book.birth_counts(transport.newest());
            if !self.kept.load(Ordering::Acquire) {
                // Where there is no runtime, nothing is under way.
                transport.close();
            }
        }
        self.call_back();
        self.wake.notify_one();
    }

    /// Closes the connections of a node that has been retired, if nothing is under way there any
    /// more, or nothing should be. Says whether it has.
    pub(super) fn disconnect(&self) -> bool {
        let idle = self.in_flight() == 0;
        let overdue = self.retired.get().is_some_and(|since| {
            let attempt = self
                .settings
                .load()
                .attempt_timeout
                .saturating_add(LATE * 2);
            Instant::now() >= after(*since, attempt)
        });
        if !idle && !overdue {
            return false;
        }
        if let Some(transport) = &self.transport {
            transport.close();
        }
        true
    }

    /// It is the node of that book's server from now on, and is not asked before what must be seen
    /// to first has been.
    pub(crate) fn take_over(self: &Arc<Self>, book: &Arc<Book>) {
        book.moves_to(&self.book);
        self.sees_to_its_debts();
        self.wake.notify_one();
    }

    /// The same of a book that stays another server's, which may be this one all the same; of its keys
    /// those that `concern` this one.
    pub(crate) fn inherit(self: &Arc<Self>, book: &Arc<Book>, concern: impl Fn(&Key) -> bool) {
        book.inherited_by(&self.book, concern);
        self.sees_to_its_debts();
        self.wake.notify_one();
    }

    pub(crate) fn book(&self) -> &Arc<Book> {
        &self.book
    }

    /// How long a probe may take: to connect, to write and to read. Without a transport that says
    /// how long connecting may take, as long again for that.
    pub(super) fn probe_within(&self) -> Duration {
        let attempt = self.settings.load().attempt_timeout;
        self.settings.load().probe.timeout.unwrap_or_else(|| {
            let connecting = self.transport.as_ref().map(Transport::connect_within);
            connecting
                .unwrap_or(attempt.saturating_mul(2))
                .saturating_add(attempt.saturating_mul(2))
        })
    }

    /// Requests at it now.
    pub(super) fn in_flight(&self) -> usize {
        self.throttle.places().in_flight()
    }

    /// Takes a place among the requests in flight, to be given back with [`Self::leave`].
    pub(super) fn enter(self: &Arc<Self>, asked: &mut Asked) -> Result<()> {
        self.ensure_kept();
        if self.gate.is_shut() {
            return Err(self.unavailable());
        }
        let places = self.throttle.places();
        let entered = match asked.request.origin() {
            Origin::Home => places.try_enter(),
            Origin::Moved => places.try_enter_half(),
        };
        if !entered {
            return Err(self.full());
        }
        if asked.operation().is_blind()
            && let Some(key) = asked.written()
        {
            asked.hold = self.journal.hold(key);
        }
        Ok(())
    }

    fn full(&self) -> Error {
        let mut message = "its in-flight limit is reached";
        if self.throttle.is_lowered() {
            let may = self.policy.slow_after();
            self.throttle.refused(may, Instant::now());
            message = "it answers late, and has as many requests as it may have meanwhile";
        }
        Error::new(ErrorKind::Overloaded, message).at_node(&self.name)
    }

    #[inline]
    pub(super) fn leave(&self) {
        self.throttle.places().leave();
    }

    /// Learns from the outcome of a request, begun then; `None` if its future was dropped.
    pub(super) fn learn(
        self: &Arc<Self>,
        asked: &mut Asked,
        outcome: Option<&Result<Response>>,
        started: Instant,
    ) {
        let now = Instant::now();
        let verdict = Verdict::of(outcome);
        let elapsed = now.saturating_duration_since(started);
        let answered = matches!(verdict, Verdict::Answered).then_some(elapsed);
        let label = match outcome {
            // Whoever is to blame for it.
            Some(Err(error)) if error.is_timeout() && !matches!(verdict, Verdict::OurLateness) => {
                Verdict::TIMEOUT
            }
            _ => verdict.outcome(),
        };
        let operation = asked.operation().ordinal();
        self.meters.request(operation, label, answered);
        self.remember(asked, outcome);
        match verdict {
            Verdict::Answered => {
                self.latencies.record(elapsed);
                // The transport has told already, and from nearer by.
                if self.transport.is_none() {
                    self.answered(elapsed, started, now);
                }
            }
            Verdict::Fault(error) => self.blame(error, started, now),
            Verdict::NotTheNodes | Verdict::CallerLeft | Verdict::OurLateness => {}
        }
    }

    /// The breaker has refused a request.
    pub(super) fn refused(self: &Arc<Self>, asked: &mut Asked, error: &Error) {
        let outcome = Err(error.clone());
        let verdict = Verdict::of(Some(&outcome));
        let operation = asked.operation().ordinal();
        self.meters.request(operation, verdict.outcome(), None);
        self.remember(asked, Some(&outcome));
    }

    /// What a request leaves to be made up for later.
    fn remember(self: &Arc<Self>, asked: &mut Asked, outcome: Option<&Result<Response>>) {
        if let Some(hold) = asked.hold.take()
            && let Some(key) = asked.written()
        {
            let acknowledged = matches!(outcome, Some(Ok(_)));
            if self.journal.release(key, hold, acknowledged) {
                self.wake.notify_one();
            }
        }
        let error = match outcome {
            Some(Ok(_)) => return,
            Some(Err(error)) => error,
            // Our own transport tells what comes of it.
            None if self.transport.is_some() => return,
            None => {
                if let Some(key) = asked.written() {
                    self.outdate(key, Reason::InDoubt);
                }
                return;
            }
        };
        let out = error.kind() == ErrorKind::NodeUnavailable;
        if out && matches!(asked.operation(), Operation::FlushAll) {
            self.book.want_flush();
        }
        let Some(key) = asked.written() else { return };
        if error.sent() == Sent::Maybe {
            self.outdate(key, Reason::InDoubt);
        } else if out && asked.request.purpose() != Purpose::Refill {
            self.outdate(key, Reason::Outdated);
        }
    }

    fn answered(self: &Arc<Self>, elapsed: Duration, started: Instant, now: Instant) {
        self.policy.answered(1, now);
        if elapsed > self.policy.slow_after() {
            self.slow(1, started, now);
        }
    }

    /// So many were answered late, the first of them sent then.
    fn slow(self: &Arc<Self>, requests: u32, sent_at: Instant, now: Instant) {
        let took = now.saturating_duration_since(sent_at);
        // What had no answer in an attempt's time has failed by then, unless it was us who were late.
        if took <= self.settings.load().attempt_timeout {
            self.late(took, requests, now);
        }
        if let Some(trip) = self.policy.slow(requests, sent_at, now) {
            self.trip(trip, None);
        }
    }

    fn late(&self, took: Duration, requests: u32, now: Instant) {
        if self.policy.minds_slowness() && self.settings.load().adaptive_limit {
            let late = Late {
                took,
                requests: requests.into(),
                answers: self.policy.answers(),
            };
            self.throttle.slow(late, self.policy.slow_after(), now);
        }
    }

    fn blame(self: &Arc<Self>, error: &Error, started: Instant, now: Instant) {
        // A connection that was lost says nothing about the node.
        if error.kind() != ErrorKind::ConnectionLost && self.gate.state() == BreakerState::Ramping {
            self.open(EjectionCause::Ramp, error);
            return;
        }
        // Our transport reports these by itself; whatever else is below cannot.
        let unreachable = matches!(
            error.kind(),
            ErrorKind::ConnectionFailed | ErrorKind::Unauthenticated | ErrorKind::Unresponsive
        );
        if self.transport.is_none() && unreachable {
            self.open(EjectionCause::of_lost(error.kind()), error);
            return;
        }
        // It has judged its own time-outs as well, connection by connection.
        let counted = self.times_attempts && error.is_timeout();
        let in_a_row = counted.then(|| self.policy.timed_out(started)).flatten();
        let trip = in_a_row
            .or_else(|| self.policy.failed(started, now))
            .or_else(|| {
                let slow = error.is_timeout();
                slow.then(|| self.policy.slow(1, started, now)).flatten()
            });
        if let Some(trip) = trip {
            self.trip(trip, Some(error));
        }
    }

    fn trip(self: &Arc<Self>, trip: Trip, last: Option<&Error>) {
        let (cause, kind, message) = match trip {
            Trip::Timeouts(count) => (
                EjectionCause::Timeouts,
                ErrorKind::Timeout,
                format!("{count} time-outs in a row"),
            ),
            Trip::Failures { failed, of } => (
                EjectionCause::FailureRate,
                last.map_or(ErrorKind::Timeout, Error::kind),
                format!("{failed} of {of} requests failed within 10 s"),
            ),
            Trip::Slow { slow, of } => (
                EjectionCause::SlowCalls,
                ErrorKind::Timeout,
                format!("{slow} of {of} requests were slow within 10 s"),
            ),
        };
        let mut error = Error::new(kind, message).at_node(&self.name);
        if let Some(last) = last {
            error = error.with_source(last.clone());
        }
        self.open(cause, &error);
    }
}

impl Drop for Shared {
    /// A gauge that nobody sets any more would show the last for ever.
    fn drop(&mut self) {
        // By now another node may have its name.
        if !self.is_retired() {
            self.meters.clear();
        }
    }
}

/// What the transport says of its connections.
pub(super) struct Watch {
    pub(super) node: Weak<Shared>,
    /// What is in doubt is told even when the node is gone.
    pub(super) book: Arc<Book>,
    pub(super) policy: Arc<Policy>,
}

impl Observer for Watch {
    fn answered(&self, requests: u32, now: Instant) {
        self.policy.answered(requests, now);
    }

    fn slow_after(&self) -> Duration {
        self.policy.slow_after()
    }

    fn observe(&self, event: &Event<'_>) {
        match event {
            Event::InDoubt { keys, lingers } => {
                let reason = match lingers {
                    true => Reason::Lingering,
                    false => Reason::InDoubt,
                };
                for key in *keys {
                    self.book.outdate(key, reason);
                }
            }
            Event::DoubtEnds { keys, certain } => self.book.lingered(keys, *certain),
            judged => {
                if let Some(shared) = self.node.upgrade() {
                    self.judge(&shared, judged);
                }
            }
        }
    }
}

impl Watch {
    fn judge(&self, shared: &Arc<Shared>, event: &Event<'_>) {
        match event {
            // While other connections answer, a dial that fails does not condemn the node.
            Event::ConnectFailed {
                failure,
                error,
                others_up,
                untried,
                most_dead,
            } => {
                // One thread of the server may hang alone: the next connection is another one's.
                let untried = *untried && *failure != ConnectFailure::Refused;
                let none_answers = *others_up == 0 && !untried;
                if failure.is_the_nodes() && (none_answers || *most_dead) {
                    let cause = match failure {
                        ConnectFailure::Refused => EjectionCause::Refused,
                        _ => EjectionCause::ConnectFailed,
                    };
                    shared.open(cause, error);
                }
            }
            // Once is the connection's fault: memcached gives each to one of its threads, and one
            // can hang alone.
            Event::Unresponsive { error, most_dead } => {
                if *most_dead {
                    shared.open(EjectionCause::Unresponsive, error);
                }
            }
            Event::Slow { requests, sent_at } => {
                shared.slow(*requests, *sent_at, Instant::now());
            }
            Event::InDoubt { .. } | Event::DoubtEnds { .. } => {}
        }
    }
}

/// A way to ask a service.
pub(super) fn asker<S>(service: S) -> Asker
where
    S: tower::Service<Request, Response = Response> + Clone + Send + Sync + 'static,
    S::Error: Into<crate::error::BoxError> + Send,
    S::Future: Send,
{
    Box::new(move |request| -> BoxFuture<'static, _> { Box::pin(request.ask(service.clone())) })
}
