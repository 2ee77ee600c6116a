//! The circuit breaker: whether requests may go to the node.
//!
//! *Closed*: they may. *Open*: none waits for the node any more. *Half-open*: a probe has
//! succeeded, more must. Only probes close it; a user's request never tests an open node.
//!
//! The closed path is one atomic load. Everything else is rare and takes the lock.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::error::Error;

/// The state of a node's circuit breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BreakerState {
    /// Requests go to the node.
    Closed,
    /// No request goes to the node; probes do.
    Open,
    /// A probe has succeeded; the node takes requests again once enough have, in a row.
    HalfOpen,
}

#[derive(Debug)]
pub(super) struct Breaker {
    /// 0 while closed: what the request path looks at.
    open: AtomicU8,
    /// Time-outs in a row, to be reset by a success without the lock.
    timeouts: AtomicU32,
    inner: Mutex<Inner>,
    threshold: u32,
    span: Duration,
    successes_to_close: u32,
}

#[derive(Debug)]
struct Inner {
    state: State,
    last_cause: Option<Error>,
    /// When the first and the latest request of the time-outs in a row were sent.
    streak: Option<(Instant, Instant)>,
}

#[derive(Debug)]
enum State {
    Closed,
    Open,
    HalfOpen { successes: u32 },
}

impl Breaker {
    /// Opens after `threshold` time-outs in a row whose requests were sent over at least `span`;
    /// closes after so many probes in a row.
    pub(super) fn new(threshold: u32, span: Duration, successes_to_close: u32) -> Self {
        Self {
            open: AtomicU8::new(0),
            timeouts: AtomicU32::new(0),
            inner: Mutex::new(Inner {
                state: State::Closed,
                last_cause: None,
                streak: None,
            }),
            threshold,
            span,
            successes_to_close,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire) != 0
    }

    pub(super) fn state(&self) -> BreakerState {
        match self.lock().state {
            State::Closed => BreakerState::Closed,
            State::Open => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// Why it opened the last time.
    pub(super) fn last_cause(&self) -> Option<Error> {
        self.lock().last_cause.clone()
    }

    pub(super) fn succeeded(&self) {
        if self.timeouts.load(Ordering::Relaxed) != 0 {
            self.timeouts.store(0, Ordering::Relaxed);
        }
    }

    /// A request sent then timed out. True if that opened the breaker.
    pub(super) fn timed_out(&self, sent_at: Instant, error: &Error) -> bool {
        let mut inner = self.lock();
        let count = self.timeouts.fetch_add(1, Ordering::Relaxed) + 1;
        let (first, last) = match inner.streak {
            Some((first, last)) if count > 1 => (first.min(sent_at), last.max(sent_at)),
            _ => (sent_at, sent_at),
        };
        inner.streak = Some((first, last));
        if count < self.threshold || last - first < self.span {
            return false;
        }
        self.trip(&mut inner, error)
    }

    /// Closed to open. True if it was closed.
    pub(super) fn open(&self, cause: &Error) -> bool {
        self.trip(&mut self.lock(), cause)
    }

    fn trip(&self, inner: &mut Inner, cause: &Error) -> bool {
        if !matches!(inner.state, State::Closed) {
            return false;
        }
        inner.state = State::Open;
        inner.last_cause = Some(cause.clone());
        self.open.store(1, Ordering::Release);
        true
    }

    /// Open to half-open, and half-open to closed. True if it is closed now.
    pub(super) fn probe_succeeded(&self) -> bool {
        let mut inner = self.lock();
        let successes = match inner.state {
            State::Closed => return true,
            State::Open => 1,
            State::HalfOpen { successes } => successes + 1,
        };
        if successes < self.successes_to_close {
            inner.state = State::HalfOpen { successes };
            return false;
        }
        inner.state = State::Closed;
        inner.streak = None;
        self.timeouts.store(0, Ordering::Relaxed);
        self.open.store(0, Ordering::Release);
        true
    }

    /// Half-open to open.
    pub(super) fn probe_failed(&self, error: &Error) {
        let mut inner = self.lock();
        if let State::Open | State::HalfOpen { .. } = inner.state {
            inner.state = State::Open;
            inner.last_cause = Some(error.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    const SPAN: Duration = Duration::from_millis(30);

    fn breaker() -> Breaker {
        Breaker::new(3, SPAN, 2)
    }

    fn timeout() -> Error {
        Error::new(ErrorKind::Timeout, "no answer")
    }

    #[test]
    fn opens_on_three_timeouts_in_a_row_spread_over_an_attempt() {
        let (breaker, start) = (breaker(), Instant::now());
        assert!(!breaker.timed_out(start, &timeout()));
        assert!(!breaker.timed_out(start + SPAN / 2, &timeout()));
        assert!(!breaker.is_open());
        assert!(breaker.timed_out(start + SPAN, &timeout()));
        assert!(breaker.is_open());
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn a_burst_is_one_event() {
        let (breaker, start) = (breaker(), Instant::now());
        for _ in 0..100 {
            assert!(!breaker.timed_out(start, &timeout()));
        }
        assert!(breaker.timed_out(start + SPAN, &timeout()));
    }

    #[test]
    fn a_success_between_starts_the_count_again() {
        let (breaker, start) = (breaker(), Instant::now());
        breaker.timed_out(start, &timeout());
        breaker.timed_out(start + SPAN, &timeout());
        breaker.succeeded();
        assert!(!breaker.timed_out(start + SPAN * 2, &timeout()));
        assert!(!breaker.timed_out(start + SPAN * 2, &timeout()));
        assert!(breaker.timed_out(start + SPAN * 3, &timeout()));
    }

    #[test]
    fn only_successful_probes_in_a_row_close_it() {
        let breaker = breaker();
        assert!(breaker.open(&timeout()));
        assert!(!breaker.open(&timeout()), "it is open already");
        breaker.succeeded();
        assert!(breaker.is_open());
        assert!(!breaker.probe_succeeded());
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        assert!(breaker.is_open(), "half-open takes no user's request");
        breaker.probe_failed(&timeout());
        assert!(!breaker.probe_succeeded());
        assert!(breaker.probe_succeeded());
        assert!(!breaker.is_open());
    }
}
