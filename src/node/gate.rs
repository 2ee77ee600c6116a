//! The gate of a node: the circuit breaker as a state machine, and nothing else.
//!
//! ```text
//!            open                 probe_succeeded        readmit           ramped
//!  Closed ---------> Open <-----------------> HalfOpen ---------> Ramping --------> Closed
//!                     ^      probe_failed                            |
//!                     +------------------------ open ----------------+
//! ```
//!
//! *Closed*: requests may pass. *Open*: none waits for the node any more. *Half-open*: a probe has
//! succeeded, more must. *Ramping*: the node is back, and takes its keys back one by one. Only
//! probes lead out of open; a user's request never tests an open node. When to open is
//! [`policy`](super::policy)'s business, and who probes is [`keeper`](super::keeper)'s.
//!
//! The closed path is one atomic load. Every transition is one function, under one lock.
//!
//! What it synchronises with comes from `super::sync`, so that the test `gate_model` can put loom's
//! types in its place.

use std::time::Duration;

use super::sync::{AtomicU8, Mutex, MutexGuard, Ordering};

/// The state of a node's circuit breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BreakerState {
    /// Requests go to the node.
    Closed,
    /// No request goes to the node; probes do.
    Open,
    /// A probe has succeeded; the node takes requests again once enough have, in a row, and what
    /// is known to be old on it has been removed.
    HalfOpen,
    /// The node is back, and takes its keys back little by little; a failure opens it again.
    Ramping,
}

/// What a gate says to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    Admitted,
    /// The node is back, but not yet for this key.
    Deferred,
    Refused,
}

/// What a successful probe has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// More must follow.
    More,
    /// The node may be [readmitted](Gate::readmit).
    Enough,
    /// Nothing: it is not open.
    None,
}

#[derive(Clone, Debug)]
pub(super) struct GateSettings {
    /// Probes in a row that lead out of half-open.
    pub(super) success_threshold: u32,
    /// How long taking the keys back takes.
    pub(super) ramp: Duration,
    /// The wait before an ejected node is first probed, if it was ejected shortly before as well,
    /// multiplied for each further time.
    pub(super) reopening: Duration,
    pub(super) factor: f64,
    pub(super) longest_reopening: Duration,
    /// What "shortly before" is.
    pub(super) memory: Duration,
}

impl GateSettings {
    fn ramped_share<I: Moment>(&self, since: I, now: I) -> f64 {
        if self.ramp.is_zero() {
            return 1.0;
        }
        now.since(since).as_secs_f64() / self.ramp.as_secs_f64()
    }
}

/// `I` is the clock's instant, `C` the cause it opened for.
#[derive(Debug)]
pub(super) struct Gate<I, C> {
    /// What the request path looks at: one of the constants below.
    hint: AtomicU8,
    inner: Mutex<Inner<I, C>>,
}

const CLOSED: u8 = 0;
const RAMPING: u8 = 1;
const SHUT: u8 = 2;

#[derive(Debug)]
struct Inner<I, C> {
    settings: GateSettings,
    state: State<I>,
    cause: Option<C>,
    /// Ejections in a row, each within `memory` of the readmission before it.
    relapses: u32,
    readmitted: Option<I>,
}

#[derive(Clone, Copy, Debug)]
enum State<I> {
    Closed,
    Open,
    HalfOpen { successes: u32 },
    Ramping { since: I },
}

/// An instant of any clock: tokio's in earnest, a number in a model.
pub(super) trait Moment: Copy {
    fn since(self, earlier: Self) -> Duration;
}

impl<I: Moment, C: Clone> Gate<I, C> {
    pub(super) fn new(settings: GateSettings) -> Self {
        Self {
            hint: AtomicU8::new(CLOSED),
            inner: Mutex::new(Inner {
                settings,
                state: State::Closed,
                cause: None,
                relapses: 0,
                readmitted: None,
            }),
        }
    }

    /// What comes next goes by these.
    pub(super) fn apply(&self, settings: GateSettings) {
        self.lock().settings = settings;
    }

    fn lock(&self) -> MutexGuard<'_, Inner<I, C>> {
        self.inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn become_state(&self, inner: &mut Inner<I, C>, state: State<I>) {
        let hint = match state {
            State::Closed => CLOSED,
            State::Ramping { .. } => RAMPING,
            State::Open | State::HalfOpen { .. } => SHUT,
        };
        inner.state = state;
        // Under the lock, so that the hint cannot lag behind a later transition's.
        self.hint.store(hint, Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.hint.load(Ordering::Acquire) == CLOSED
    }

    /// Open or half-open.
    pub(super) fn is_shut(&self) -> bool {
        self.hint.load(Ordering::Acquire) == SHUT
    }

    /// Whether a request for a key may go to the node. `share` places the key: it is a fixed
    /// number from 0 to 1 of the key's own, so that one key never goes back and forth.
    pub(super) fn admits(&self, share: impl FnOnce() -> f64, now: I) -> Admission {
        if self.is_closed() {
            return Admission::Admitted;
        }
        let inner = self.lock();
        match inner.state {
            State::Closed => Admission::Admitted,
            State::Open | State::HalfOpen { .. } => Admission::Refused,
            State::Ramping { since } => {
                let open_to = inner.settings.ramped_share(since, now);
                if share() < open_to {
                    Admission::Admitted
                } else {
                    Admission::Deferred
                }
            }
        }
    }

    pub(super) fn state(&self) -> BreakerState {
        match self.lock().state {
            State::Closed => BreakerState::Closed,
            State::Open => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
            State::Ramping { .. } => BreakerState::Ramping,
        }
    }

    /// Why it opened the last time, or why the last probe failed.
    pub(super) fn cause(&self) -> Option<C> {
        self.lock().cause.clone()
    }

    /// How long the node is left alone before its first probe: not at all, unless it was ejected
    /// again shortly after it had come back.
    pub(super) fn penalty(&self) -> Option<Duration> {
        let inner = self.lock();
        let settings = &inner.settings;
        let further = inner.relapses.checked_sub(1)?;
        let factor = settings.factor.powi(further.min(64) as i32);
        let seconds = settings.reopening.as_secs_f64() * factor;
        let wait = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        Some(wait.min(settings.longest_reopening))
    }

    /// Closed or ramping to open. True if it was one of these.
    pub(super) fn open(&self, cause: C, now: I) -> bool {
        let mut inner = self.lock();
        if let State::Open | State::HalfOpen { .. } = inner.state {
            return false;
        }
        let relapsed = inner
            .readmitted
            .is_some_and(|then| now.since(then) < inner.settings.memory);
        inner.relapses = if relapsed { inner.relapses + 1 } else { 0 };
        inner.cause = Some(cause);
        self.become_state(&mut inner, State::Open);
        true
    }

    /// Open to half-open, and on from there.
    pub(super) fn probe_succeeded(&self) -> Progress {
        let mut inner = self.lock();
        let successes = match inner.state {
            State::Closed | State::Ramping { .. } => return Progress::None,
            State::Open => 1,
            State::HalfOpen { successes } => successes.saturating_add(1),
        };
        self.become_state(&mut inner, State::HalfOpen { successes });
        if successes < inner.settings.success_threshold {
            Progress::More
        } else {
            Progress::Enough
        }
    }

    /// Half-open to open.
    pub(super) fn probe_failed(&self, cause: C) {
        let mut inner = self.lock();
        if let State::Open | State::HalfOpen { .. } = inner.state {
            inner.cause = Some(cause);
            self.become_state(&mut inner, State::Open);
        }
    }

    /// Half-open to ramping. True if it was half-open, with probes enough.
    pub(super) fn readmit(&self, now: I) -> bool {
        let mut inner = self.lock();
        match inner.state {
            State::HalfOpen { successes } if successes >= inner.settings.success_threshold => {
                inner.readmitted = Some(now);
                self.become_state(&mut inner, State::Ramping { since: now });
                true
            }
            _ => false,
        }
    }

    /// Ramping to closed, once it has taken all its keys back. True if it is closed now.
    pub(super) fn ramped(&self, now: I) -> bool {
        let mut inner = self.lock();
        match inner.state {
            State::Ramping { since } if inner.settings.ramped_share(since, now) >= 1.0 => {
                self.become_state(&mut inner, State::Closed);
                true
            }
            _ => false,
        }
    }
}
