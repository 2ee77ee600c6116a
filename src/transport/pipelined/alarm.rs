//! One timer for all who wait for a connection's answers, instead of one for each of them.
//!
//! A caller must be released at its deadline even if the connection's task is held up. The timer that
//! sees to it has to be in the caller's own runtime, and to have one of its own costs a request as much
//! as all of its routing. Nearly all of them are answered long before. So the first to wait sets an
//! alarm for its own deadline, which covers all those behind it that are released later; when it goes
//! off everybody is woken who waits there, and the first of those that still have to wait sets the next.
//! Each request is woken at most once too often for each alarm that it lives to see. That is few while the
//! connection's own timer releases who is due; with its task held up, and deadlines of all lengths, it may
//! be one for each millisecond in which somebody is due.
//!
//! An alarm that is recorded is trusted, also by those who come before its timer runs. So whoever was
//! given an [`Unset`] has to start it; where no timer can be made the alarm is taken back, and those
//! who wait are woken to see to themselves.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Wake, Waker};

use tokio::runtime::Id;
use tokio::task::coop::unconstrained;
use tokio::time::{Instant, Sleep};

use super::slot::Node;
use crate::error::Result;
use crate::executor::Spawner;

/// Whoever waits for an answer.
#[derive(Debug)]
pub(super) struct Waiter {
    waker: Waker,
    /// In whose runtime an alarm is to wake it.
    runtime: Option<Id>,
}

impl Waiter {
    pub(super) fn new(waker: &Waker, runtime: Option<Id>) -> Self {
        let waker = waker.clone();
        Self { waker, runtime }
    }

    pub(super) fn wake(self) {
        self.waker.wake();
    }

    pub(super) fn will_wake(&self, waker: &Waker) -> bool {
        self.waker.will_wake(waker)
    }

    pub(super) fn is_in(&self, runtime: Id) -> bool {
        self.runtime == Some(runtime)
    }
}

/// The alarms of one connection: of each runtime in which somebody waits, one.
#[derive(Debug, Default)]
pub(super) struct Alarms {
    set: Vec<Alarm>,
    next: u64,
}

#[derive(Debug)]
struct Alarm {
    /// Tells it from those that were set in its place.
    number: u64,
    runtime: Id,
    at: Instant,
    /// Once it runs.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Alarms {
    /// Has whoever waits in that runtime be woken by `at`. What is returned is to be
    /// [started](Unset::start) once the lock is released.
    pub(super) fn cover(&mut self, runtime: Id, at: Instant) -> Option<Unset> {
        let mut set = self.set.iter_mut();
        let known = set.find(|alarm| alarm.runtime == runtime);
        if known.as_ref().is_some_and(|alarm| alarm.at <= at) {
            return None;
        }
        self.next += 1;
        let number = self.next;
        match known {
            // Its timer goes on until the other is there, and is not heeded.
            Some(alarm) => (alarm.number, alarm.at) = (number, at),
            None => self.set.push(Alarm {
                number,
                runtime,
                at,
                timer: None,
            }),
        }
        Some(Unset { number, at })
    }

    fn position(&self, number: u64) -> Option<usize> {
        self.set.iter().position(|alarm| alarm.number == number)
    }
}

/// An alarm without a timer as yet.
#[must_use = "nobody is woken by it"]
pub(super) struct Unset {
    number: u64,
    at: Instant,
}

impl Unset {
    /// # Errors
    /// [`ErrorKind::NoRuntime`](crate::ErrorKind::NoRuntime), and the alarm is none.
    pub(super) fn start(self, spawner: &Spawner, node: &Arc<Node>, slot: usize) -> Result<()> {
        let Self { number, at } = self;
        let bell = Arc::new(Bell {
            number,
            node: Arc::downgrade(node),
            slot,
        });
        let unset = RingsOnDrop(Some(bell.clone()));
        // Panics in a runtime that keeps no time.
        let mut timer = Box::pin(spawner.sleep_until(at)?);
        let waker = Waker::from(bell);
        // Whoever sets it may have used up what it may do in one go; the timer has no part in that.
        let started =
            Pin::new(&mut unconstrained(timer.as_mut())).poll(&mut Context::from_waker(&waker));
        if started.is_ready() {
            return Ok(());
        }
        unset.disarm();
        let mut state = node.slot(slot).lock();
        // Unless it has gone off already, or another was set in its place.
        let before = match state.alarms.position(number) {
            Some(index) => state.alarms.set[index].timer.replace(timer),
            None => Some(timer),
        };
        drop(state);
        drop(before);
        Ok(())
    }
}

/// What a timer wakes.
struct Bell {
    number: u64,
    node: Weak<Node>,
    slot: usize,
}

impl Bell {
    fn ring(&self) {
        let Some(node) = self.node.upgrade() else {
            return;
        };
        let mut state = node.slot(self.slot).lock();
        let Some(index) = state.alarms.position(self.number) else {
            return;
        };
        let alarm = state.alarms.set.swap_remove(index);
        let woken = state
            .pipeline
            .take_waiters(|waiter| waiter.is_in(alarm.runtime));
        drop(state);
        drop(alarm);
        woken.into_iter().for_each(Waiter::wake);
    }
}

/// For as long as an alarm has no timer: should it never have one, those who rely on it are to see to
/// themselves.
struct RingsOnDrop(Option<Arc<Bell>>);

impl RingsOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for RingsOnDrop {
    fn drop(&mut self) {
        if let Some(bell) = self.0.take() {
            bell.ring();
        }
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.ring();
    }
}
