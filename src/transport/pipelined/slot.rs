//! Where callers and a connection's task meet: the queue under its lock, and the future of one
//! request.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::runtime::Id;
use tokio::time::Instant;

use super::alarm::{Alarms, Unset, Waiter};
use super::{PipelinedSettings, connection};
use crate::call::{forget_wake, promise_wake};
use crate::error::{Error, Result, Sent};
use crate::executor::{LATE, Spawner, after};
use crate::kill_switch::noted;
use crate::protocol::{Pipeline, Ticket, check_value};
use crate::request::{Operation, Purpose, Request};
use crate::response::{CasOutcome, Response};
use crate::transport::BoxStream;
use crate::transport::site::{Site, own_end, shut_down};
use crate::value::CasToken;

/// The handles' side of one node: dropped with the last of them, which ends the tasks.
pub(super) struct Pool {
    node: Arc<Node>,
    spawner: Spawner,
    next: AtomicUsize,
}

/// What the connections' tasks share with the handles. It does not own the executor, whose
/// threads would otherwise keep themselves running.
pub(super) struct Node {
    pub(super) site: Arc<Site>,
    slots: Box<[Slot]>,
    /// How many slots are [dead](State::dead).
    dead: AtomicUsize,
}

/// One connection's place.
pub(super) struct Slot(Mutex<State>);

pub(super) struct State {
    pub(super) pipeline: Pipeline<Waiter>,
    pub(super) alarms: Alarms,
    pub(super) phase: Phase,
    /// Wakes the task, when it is parked: it has seen an empty queue and waits.
    task: Option<Waker>,
    parked: bool,
    /// Its connection did not answer, nor could one be made in its place that does.
    dead: bool,
}

#[derive(Debug)]
pub(super) enum Phase {
    /// There is no task: nothing was asked of this slot yet, or its runtime is gone.
    Unstarted,
    /// The task waits for something to do.
    Idle,
    Connecting,
    Up,
    /// It is up, and to be closed, for the node is out: what is on it ends with that error.
    Draining(Error),
    /// Connecting failed, and is not tried again before then; until then requests fail with that
    /// error at once.
    Broken {
        until: Instant,
        error: Error,
    },
    /// The last handle was dropped, or the client shut down.
    Closed,
}

/// What is to be done once the lock is released.
#[must_use]
enum Next {
    Nothing,
    Wake(Waker),
    Spawn,
}

impl Slot {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock is a bug of ours; the queue is no worse than before it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// For the task, when it has nothing to write: whatever is queued next wakes it.
    pub(super) fn park(&mut self, waker: &Waker) {
        match &mut self.task {
            Some(known) => known.clone_from(waker),
            None => self.task = Some(waker.clone()),
        }
        self.parked = true;
    }

    fn unpark(&mut self) -> Next {
        if !std::mem::take(&mut self.parked) {
            return Next::Nothing;
        }
        self.task.clone().map_or(Next::Nothing, Next::Wake)
    }

    /// Makes sure that somebody will see to what is about to be queued.
    fn prepare(&mut self) -> Result<Next> {
        match &self.phase {
            Phase::Unstarted => {
                self.phase = Phase::Idle;
                return Ok(Next::Spawn);
            }
            Phase::Broken { until, error } => {
                if Instant::now() < *until {
                    return Err(error.clone().with_sent(Sent::No));
                }
                self.phase = Phase::Idle;
            }
            Phase::Closed => return Err(shut_down()),
            Phase::Idle | Phase::Connecting | Phase::Up | Phase::Draining(_) => {}
        }
        Ok(self.unpark())
    }
}

impl Node {
    pub(super) fn slot(&self, index: usize) -> &Slot {
        &self.slots[index]
    }

    pub(super) fn set_dead(&self, state: &mut State, dead: bool) {
        if std::mem::replace(&mut state.dead, dead) != dead {
            match dead {
                true => self.dead.fetch_add(1, Ordering::Relaxed),
                false => self.dead.fetch_sub(1, Ordering::Relaxed),
            };
        }
    }

    /// Whether there is a slot that nobody has tried to connect since there was a reason to.
    pub(super) fn has_untried(&self) -> bool {
        self.slots
            .iter()
            .any(|slot| matches!(slot.lock().phase, Phase::Unstarted | Phase::Idle))
    }

    pub(super) fn most_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed) * 2 > self.slots.len()
    }

    /// Ends what is queued and in flight in a slot.
    pub(super) fn fail_all(
        self: &Arc<Self>,
        slot: &Slot,
        error: &Error,
        phase: Phase,
        given_up: Option<BoxStream>,
    ) {
        self.fail(slot, error, phase, true, given_up);
    }

    /// Ends what is in flight in a slot, and keeps what is queued.
    pub(super) fn fail_in_flight(
        self: &Arc<Self>,
        slot: &Slot,
        error: &Error,
        phase: Phase,
        given_up: Option<BoxStream>,
    ) {
        self.fail(slot, error, phase, false, given_up);
    }

    /// `given_up` is the connection, if it has ended because we wanted it to: the server may still
    /// execute what was sent over it.
    fn fail(
        self: &Arc<Self>,
        slot: &Slot,
        error: &Error,
        phase: Phase,
        queued_too: bool,
        given_up: Option<BoxStream>,
    ) {
        let mut woken = Vec::new();
        let mut state = slot.lock();
        if !matches!(state.phase, Phase::Closed) {
            state.phase = phase;
        }
        let keys = state.pipeline.close(error, &mut woken);
        if queued_too {
            state.pipeline.fail_queued(error, &mut woken);
        }
        drop(state);
        self.site.left_in_doubt(&keys, given_up);
        // Whoever is told of the end of a write finds its doubt noted.
        woken.into_iter().for_each(Waiter::wake);
    }
}

impl Pool {
    pub(super) fn new(site: Arc<Site>, spawner: Spawner) -> Self {
        let settings = site.settings.load_full();
        let slot = |_| {
            Slot(Mutex::new(State {
                pipeline: Pipeline::new(settings.limits, site.number),
                alarms: Alarms::default(),
                phase: Phase::Unstarted,
                task: None,
                parked: false,
                dead: false,
            }))
        };
        Self {
            node: Arc::new(Node {
                slots: (0..settings.connections).map(slot).collect(),
                site,
                dead: AtomicUsize::new(0),
            }),
            spawner,
            next: AtomicUsize::new(0),
        }
    }

    pub(super) fn site(&self) -> &Arc<Site> {
        &self.node.site
    }

    pub(super) fn apply(&self, settings: PipelinedSettings) {
        let limits = settings.limits;
        self.node.site.apply(settings);
        for slot in &self.node.slots {
            slot.lock().pipeline.set_limits(limits);
        }
    }

    pub(super) fn connections(&self) -> usize {
        self.node.slots.len()
    }

    pub(super) fn pending(&self) -> usize {
        let slots = self.node.slots.iter();
        slots.map(|slot| slot.lock().pipeline.len()).sum()
    }

    pub(super) fn drain(&self, error: &Error) {
        for slot in &self.node.slots {
            let mut woken = Vec::new();
            let mut state = slot.lock();
            let task = match state.phase {
                Phase::Up => {
                    // What is in flight is the task's to settle, once it writes no more.
                    state.phase = Phase::Draining(error.clone());
                    state.task.take()
                }
                Phase::Closed | Phase::Draining(_) => continue,
                _ => None,
            };
            state.pipeline.fail_queued(error, &mut woken);
            drop(state);
            woken.into_iter().for_each(Waiter::wake);
            task.into_iter().for_each(Waker::wake);
        }
    }

    pub(super) fn retire(&self, error: &Error) {
        self.node.site.retire();
        for slot in &self.node.slots {
            let mut woken = Vec::new();
            let mut state = slot.lock();
            state.pipeline.fail_queued(error, &mut woken);
            let keys = state.pipeline.abandoned();
            drop(state);
            self.node.site.in_doubt(&keys);
            woken.into_iter().for_each(Waiter::wake);
        }
    }

    pub(super) fn end_backoff(&self) {
        for slot in &self.node.slots {
            let mut state = slot.lock();
            self.node.set_dead(&mut state, false);
            if let Phase::Broken { .. } = state.phase {
                state.phase = Phase::Idle;
            }
        }
    }

    pub(super) fn close(&self) {
        self.node.site.closing.send_replace(true);
        for slot in &self.node.slots {
            let mut woken = Vec::new();
            let mut state = slot.lock();
            state.phase = Phase::Closed;
            // What is in flight is the task's to settle, once it writes no more.
            state.pipeline.fail_queued(&shut_down(), &mut woken);
            // Parked or not: it may be waiting for a socket that never moves again.
            let task = state.task.take();
            drop(state);
            woken.into_iter().for_each(Waiter::wake);
            if let Some(task) = task {
                task.wake();
            }
        }
    }

    /// The slot for the next request: one after the other, those that are up before those that
    /// would have to connect first.
    fn choose(&self) -> usize {
        let slots = &self.node.slots;
        if slots.len() == 1 {
            return 0;
        }
        let first = self.next.fetch_add(1, Ordering::Relaxed) % slots.len();
        if self.node.site.up() == slots.len() {
            return first;
        }
        let mut order = (0..slots.len()).map(|offset| (first + offset) % slots.len());
        // One that is not up is brought up by taking its turn, unless it is trying, or has failed
        // a moment ago.
        let now = Instant::now();
        order
            .find(|&index| match &slots[index].lock().phase {
                Phase::Up | Phase::Unstarted | Phase::Idle => true,
                Phase::Broken { until, .. } => *until <= now,
                Phase::Connecting | Phase::Closed | Phase::Draining(_) => false,
            })
            .unwrap_or(first)
    }

    /// The slot that waits the least for an answer: of several that are up, not the one where the
    /// first attempt is stuck.
    fn choose_for_hedge(&self) -> usize {
        let now = Instant::now();
        let waits = |slot: &Slot| {
            let state = slot.lock();
            let oldest = state.pipeline.oldest_sent_at();
            (
                !matches!(state.phase, Phase::Up),
                oldest.map_or(Duration::ZERO, |oldest| {
                    now.saturating_duration_since(oldest)
                }),
            )
        };
        let slots = self.node.slots.iter().map(waits).enumerate();
        let least = slots.min_by_key(|&(_, waits)| waits);
        least.map_or(0, |(index, _)| index)
    }

    /// A slot whose connection a token may still be used over.
    fn slot_for(&self, token: CasToken) -> Option<usize> {
        if token.node != self.node.site.number {
            return None;
        }
        self.node.slots.iter().position(|slot| {
            let state = slot.lock();
            matches!(state.phase, Phase::Up) && state.pipeline.connection() <= token.connection
        })
    }

    fn enqueue(
        &self,
        index: usize,
        operation: &Operation,
        (deadline, judge_at): (Instant, Instant),
        waiter: Waiter,
        alarm: Option<(Id, Instant)>,
    ) -> Result<(Ticket, Option<Unset>)> {
        let mut state = self.node.slots[index].lock();
        let next = state.prepare()?;
        let pipeline = &mut state.pipeline;
        let ticket = pipeline.enqueue(operation, deadline, judge_at, None);
        let mut unset = None;
        // Whoever is refused does not wait, and would leave an alarm behind that nobody starts.
        if let Ok(ticket) = &ticket {
            pipeline.poll(ticket, |place| *place = Some(waiter));
            unset = alarm.and_then(|(runtime, at)| state.alarms.cover(runtime, at));
        }
        drop(state);
        match next {
            Next::Nothing => {}
            Next::Wake(waker) => waker.wake(),
            Next::Spawn => {
                let task = connection::task(self.node.clone(), index);
                if let Err(error) = self.spawner.spawn(task) {
                    let slot = &self.node.slots[index];
                    self.node.fail_all(slot, &error, Phase::Unstarted, None);
                }
            }
        }
        Ok((ticket?, unset))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("node", &self.node.site.name)
            .field("connections_up", &self.node.site.up())
            .finish_non_exhaustive()
    }
}

/// The future of one request to a [`Pipelined`](super::Pipelined) node.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub struct PipelinedFuture {
    step: Step,
    /// Kept to the end, should it have to be asked in another way.
    request: Request,
}

#[derive(Debug)]
enum Step {
    Start(Arc<Pool>),
    Waiting(Waiting),
    Done,
}

#[derive(Debug)]
struct Waiting {
    pool: Arc<Pool>,
    slot: usize,
    /// Taken when the outcome is.
    ticket: Option<Ticket>,
    /// When the caller stops waiting if the connection's own timer has not spoken by then.
    give_up_at: Instant,
    /// Whether it is to be woken then by an [alarm](super::alarm).
    alarmed: bool,
}

impl PipelinedFuture {
    #[inline]
    pub(super) fn new(pool: Arc<Pool>, request: Request) -> Self {
        Self {
            step: Step::Start(pool),
            request,
        }
    }

    #[cfg(feature = "classic")]
    pub(in crate::transport) fn into_request(self) -> Request {
        self.request
    }
}

impl Future for PipelinedFuture {
    type Output = Result<Response>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let polled = match &mut self.step {
            Step::Start(..) => match std::mem::replace(&mut self.step, Step::Done) {
                Step::Start(pool) => match start(pool, &mut self.request, cx) {
                    Ok(Started::Waiting(waiting)) => {
                        self.step = Step::Waiting(waiting);
                        return Poll::Pending;
                    }
                    Ok(Started::Answered(response)) => Poll::Ready(Ok(response)),
                    Err(error) => Poll::Ready(Err(error)),
                },
                _ => unreachable!("matched one line above"),
            },
            Step::Waiting(waiting) => waiting.poll(cx),
            Step::Done => panic!("polled after completion"),
        };
        if polled.is_ready() {
            self.step = Step::Done;
        }
        polled
    }
}

enum Started {
    Waiting(Waiting),
    Answered(Response),
}

fn start(pool: Arc<Pool>, request: &mut Request, cx: &mut Context<'_>) -> Result<Started> {
    let node = &pool.node;
    let terms = &node.site.terms;
    let now = request.take_time();
    let operation = request.operation();
    let name = |error: Error| error.at_node(&node.site.name);

    if request.purpose() == Purpose::Note {
        return Err(name(noted()));
    }
    check_value(operation, terms.max_value_size()).map_err(name)?;
    let slot = match operation {
        Operation::CompareAndSwap { token, .. } => match pool.slot_for(*token) {
            Some(slot) => slot,
            None => return Ok(Started::Answered(Response::Swapped(CasOutcome::Exists))),
        },
        Operation::GetMany { keys } if keys.is_empty() => {
            return Ok(Started::Answered(Response::Values(Vec::new())));
        }
        _ if request.purpose() == Purpose::Hedge => pool.choose_for_hedge(),
        _ => pool.choose(),
    };
    let attempt_ends = after(now, terms.attempt_timeout());
    let (deadline, give_up_at) = match own_end(request, now).map_err(name)? {
        Some(ends) if ends <= attempt_ends => (ends, ends),
        // The connection's timer judges, and should speak first; it may be late.
        Some(ends) => (attempt_ends, ends.min(after(attempt_ends, LATE))),
        None => (attempt_ends, after(attempt_ends, LATE)),
    };
    let runtime = request
        .is_alarmed()
        .then(|| pool.spawner.runtime_of_caller())
        .flatten();
    let (ticket, unset) = pool
        .enqueue(
            slot,
            operation,
            (deadline, attempt_ends),
            Waiter::new(cx.waker(), runtime),
            runtime.map(|runtime| (runtime, give_up_at)),
        )
        .map_err(name)?;
    let waiting = Waiting {
        pool,
        slot,
        ticket: Some(ticket),
        give_up_at,
        alarmed: request.is_alarmed(),
    };
    if runtime.is_some() {
        waiting.is_covered(unset);
    }
    Ok(Started::Waiting(waiting))
}

impl Waiting {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let Some(ticket) = self.ticket.take() else {
            panic!("polled after completion");
        };
        forget_wake();
        let node = &self.pool.node;
        let slot = node.slot(self.slot);
        let mut known = true;
        let mut state = slot.lock();
        let mut outcome = state.pipeline.poll(&ticket, |waiter| {
            let waiter = waiter.as_ref();
            known = waiter.is_some_and(|waiter| waiter.will_wake(cx.waker()));
        });
        // A waker's drop may run anything, this future's siblings included: not under the lock.
        let (mut replaced, mut given_up) = (None, None);
        let mut runtime = None;
        if (!known || self.alarmed) && outcome.is_none() {
            drop(state);
            runtime = match self.alarmed {
                true => self.pool.spawner.runtime_of_caller(),
                false => None,
            };
            let own = Waiter::new(cx.waker(), runtime);
            state = slot.lock();
            outcome = state
                .pipeline
                .poll(&ticket, |waiter| replaced = waiter.replace(own));
        }
        let outcome = match outcome {
            Some(outcome) => outcome,
            None if Instant::now() >= self.give_up_at => {
                let (outcome, waiter) = state.pipeline.give_up(ticket);
                given_up = waiter;
                outcome
            }
            None => {
                self.ticket = Some(ticket);
                let alarms = &mut state.alarms;
                let unset = runtime.map(|runtime| alarms.cover(runtime, self.give_up_at));
                drop(state);
                drop(replaced);
                if let Some(unset) = unset {
                    self.is_covered(unset);
                }
                return Poll::Pending;
            }
        };
        drop(state);
        drop((replaced, given_up));
        Poll::Ready(outcome.map_err(|error| error.at_node(&node.site.name)))
    }

    /// An alarm is set, or is to be set, for whoever polls.
    fn is_covered(&self, unset: Option<Unset>) {
        let pool = &self.pool;
        let started = unset.map_or(Ok(()), |unset| {
            unset.start(&pool.spawner, &pool.node, self.slot)
        });
        if started.is_ok() {
            promise_wake(self.give_up_at);
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            forget_wake();
            let node = &self.pool.node;
            let mut state = node.slot(self.slot).lock();
            let (waker, unanswered) = state.pipeline.abandon(ticket);
            drop(state);
            drop(waker);
            // Over one connection a later write comes later; over another one it may not.
            let several = node.slots.len() > 1 || node.site.is_retired();
            if let Some(key) = unanswered.filter(|_| several) {
                node.site.in_doubt(&[key]);
            }
        }
    }
}
