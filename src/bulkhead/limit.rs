//! So many at once, so many waiting behind them, and nobody else: numbers and wakers, no time.
//!
//! Everything that decides who may enter is one atomic word: how many are inside, how many may be,
//! and whether somebody waits. While nobody waits, to enter is one compare-and-swap and to leave one
//! subtraction. The queue is behind a lock, which is taken only where somebody waits or wants to.
//!
//! No hand-over is lost, because that somebody waits is told by the word that places are given back
//! to. It is set under the lock, before the waiter looks for a place for the last time. Of a waiter
//! that sets it and a leaver that subtracts, one comes second in the order of changes to the word: a
//! leaver that comes second sees it, and hands its place over; a waiter that comes second sees the
//! place. There is one word, so acquire and release are enough.
//!
//! Nobody barges: who comes while somebody waits finds the word say so, however many places are free.
//! So while it says so the number inside only falls, but for hand-overs, which are made under the
//! lock and cannot exceed the limit.
//!
//! What it synchronises with comes from `super::sync`, so that the test `bulkhead_model` can put
//! loom's types in its place.

use std::collections::BTreeMap;
use std::task::{Poll, Waker};

use super::sync::{AtomicU64, AtomicUsize, Mutex, MutexGuard, Ordering};

/// What lets only so many in at once, and only so many wait for it, in the order in which they came.
#[derive(Debug)]
pub(crate) struct Limit {
    state: AtomicU64,
    /// In the queue, or given a place and not come for it yet. Raised under the lock only.
    tickets: AtomicUsize,
    queue: Mutex<Queue>,
}

#[derive(Debug)]
struct Queue {
    /// By their numbers, which are given out in order, and only once. Who is not here any more has a
    /// place.
    waiting: BTreeMap<u64, Option<Waker>>,
    next: u64,
    max: usize,
}

/// Bit 0: somebody waits. Bits 1 to 31: how many are inside. Bits 32 to 62: how many may be.
#[derive(Clone, Copy)]
struct State(u64);

const WAITS: u64 = 1;
const PLACE: u64 = 1 << 1;
const MOST: u64 = (1 << 31) - 1;

impl State {
    fn waits(self) -> bool {
        self.0 & WAITS != 0
    }

    fn inside(self) -> u64 {
        self.0 >> 1 & MOST
    }

    fn limit(self) -> u64 {
        self.0 >> 32
    }

    fn with_limit(self, limit: usize) -> Self {
        let limit = u64::try_from(limit).unwrap_or(MOST).min(MOST);
        Self((self.0 & ((PLACE * MOST) | WAITS)) | (limit << 32))
    }

    /// Whether a place is free that somebody waits for.
    fn owes_a_place(self) -> bool {
        self.waits() && self.inside() < self.limit()
    }
}

impl Limit {
    /// No more than 2^31 - 1 are inside whatever the limit.
    pub(crate) fn new(max_inside: usize, max_queue: usize) -> Self {
        Self {
            state: AtomicU64::new(State(0).with_limit(max_inside).0),
            tickets: AtomicUsize::new(0),
            queue: Mutex::new(Queue {
                waiting: BTreeMap::new(),
                next: 0,
                max: max_queue,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn state(&self) -> State {
        State(self.state.load(Ordering::Acquire))
    }

    /// How many are inside, with those who have been given a place and have not noticed yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.state().inside() as usize
    }

    /// How many are in the queue, or have had their turn and have not noticed yet. Never more than
    /// may.
    pub(crate) fn queued(&self) -> usize {
        self.tickets.load(Ordering::Relaxed)
    }

    /// Takes a place, if one is free and nobody waits for it. To be given back with
    /// [`leave`](Self::leave).
    pub(crate) fn try_enter(&self) -> bool {
        self.try_enter_below(|limit| limit)
    }

    /// The same for those who may use no more than half of the places, but one in any case: only if
    /// fewer are in use, by whomever.
    pub(crate) fn try_enter_half(&self) -> bool {
        self.try_enter_below(|limit| (limit / 2).max(1).min(limit))
    }

    fn try_enter_below(&self, most: impl Fn(u64) -> u64) -> bool {
        let mut state = State(self.state.load(Ordering::Relaxed));
        loop {
            if state.waits() || state.inside() >= most(state.limit()) {
                return false;
            }
            match self.state.compare_exchange_weak(
                state.0,
                state.0 + PLACE,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(changed) => state = State(changed),
            }
        }
    }

    /// Gives a place back: to the first in the queue.
    #[inline]
    pub(crate) fn leave(&self) {
        let before = State(self.state.fetch_sub(PLACE, Ordering::AcqRel));
        debug_assert!(before.inside() > 0, "nobody is inside");
        if before.waits() {
            self.hand_over();
        }
    }

    /// Joins the queue, unless it is full. The number is to be asked [`whether it has its
    /// turn`](Self::poll_turn) until it has, or [given up](Self::give_up), and
    /// [`ends`](Self::ticket_ends) after that.
    pub(crate) fn line_up(&self) -> Option<u64> {
        let mut queue = self.lock();
        if self.tickets.load(Ordering::Relaxed) >= queue.max {
            return None;
        }
        self.tickets.fetch_add(1, Ordering::Relaxed);
        let number = queue.next;
        queue.next += 1;
        queue.waiting.insert(number, None);
        self.state.fetch_or(WAITS, Ordering::AcqRel);
        drop(queue);
        // One may have left since no place was found, and not have known that anybody waits.
        self.hand_over();
        Some(number)
    }

    /// Ready once it has a place, to be given back with [`leave`](Self::leave). Not to be asked again
    /// then.
    pub(crate) fn poll_turn(&self, number: u64, waker: &Waker) -> Poll<()> {
        // Foreign code is not run under the lock.
        let waker = waker.clone();
        let mut queue = self.lock();
        let Some(known) = queue.waiting.get_mut(&number) else {
            return Poll::Ready(());
        };
        let former = known.replace(waker);
        drop(queue);
        drop(former);
        Poll::Pending
    }

    /// Leaves the queue before [`poll_turn`](Self::poll_turn) was ready. If a place had just become
    /// this one's, it is the next one's.
    pub(crate) fn give_up(&self, number: u64) {
        let mut queue = self.lock();
        let waited = queue.waiting.remove(&number);
        if waited.is_some() {
            self.nobody_waits_if_empty(&queue);
        }
        drop(queue);
        if waited.is_none() {
            self.leave();
        }
    }

    /// There is room for another in the queue.
    pub(crate) fn ticket_ends(&self) {
        self.tickets.fetch_sub(1, Ordering::Relaxed);
    }

    /// Other limits from now on. Those who wait and may enter now do so at once. If more are inside
    /// than may be, nobody enters until enough have left; if more wait than may, they go on waiting.
    pub(crate) fn set(&self, max_inside: usize, max_queue: usize) {
        let mut queue = self.lock();
        queue.max = max_queue;
        let changed = |state| Some(State(state).with_limit(max_inside).0);
        // Under the lock, so that no hand-over exceeds it. It does not fail.
        let _ = self
            .state
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, changed);
        drop(queue);
        self.hand_over();
    }

    /// Gives free places to those who wait.
    #[cold]
    fn hand_over(&self) {
        while self.state().owes_a_place() {
            if let Some(waker) = self.admit_first() {
                waker.wake();
            }
        }
    }

    fn admit_first(&self) -> Option<Waker> {
        let mut queue = self.lock();
        if !self.state().owes_a_place() {
            return None;
        }
        let (_, waker) = queue.waiting.pop_first()?;
        self.state.fetch_add(PLACE, Ordering::AcqRel);
        // After that, so that nobody comes in between.
        self.nobody_waits_if_empty(&queue);
        waker
    }

    fn nobody_waits_if_empty(&self, queue: &Queue) {
        if queue.waiting.is_empty() {
            self.state.fetch_and(!WAITS, Ordering::AcqRel);
        }
    }
}
