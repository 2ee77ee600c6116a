//! A limit that is shared, with places and tickets that give themselves back.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use super::limit::Limit;
use crate::error::{Error, ErrorKind};
use crate::telemetry;

/// How many may be inside, how many may wait, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) max_in_flight: usize,
    pub(crate) max_queue: usize,
    pub(crate) max_wait: Duration,
}

impl Limits {
    pub(crate) const DEFAULT_MAX_WAIT: Duration = Duration::from_millis(50);

    /// Without a queue.
    pub(crate) const fn of(max_in_flight: usize) -> Self {
        Self {
            max_in_flight,
            max_queue: 0,
            max_wait: Self::DEFAULT_MAX_WAIT,
        }
    }
}

/// A room with so many places, and a queue in front of its door.
pub(crate) struct Room {
    limit: Limit,
    /// In nanoseconds.
    max_wait: AtomicU64,
    /// Whose it is, in words.
    title: String,
    /// The functional group whose refusals are counted.
    group: Option<Arc<str>>,
}

impl Room {
    pub(crate) fn new(title: impl Into<String>, limits: Limits) -> Arc<Self> {
        Self::make(title.into(), None, limits)
    }

    pub(crate) fn of_group(group: &Arc<str>, title: &str, limits: Limits) -> Arc<Self> {
        Self::make(title.to_owned(), Some(group.clone()), limits)
    }

    fn make(title: String, group: Option<Arc<str>>, limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limit: Limit::new(limits.max_in_flight, limits.max_queue),
            max_wait: AtomicU64::new(nanoseconds(limits.max_wait)),
            title,
            group,
        })
    }

    pub(crate) fn set_limits(&self, limits: Limits) {
        let max_wait = nanoseconds(limits.max_wait);
        self.max_wait.store(max_wait, Ordering::Relaxed);
        self.limit.set(limits.max_in_flight, limits.max_queue);
    }

    pub(crate) fn title(&self) -> &str {
        &self.title
    }

    pub(crate) fn max_wait(&self) -> Duration {
        Duration::from_nanos(self.max_wait.load(Ordering::Relaxed))
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.limit.in_flight()
    }

    pub(crate) fn queued(&self) -> usize {
        self.limit.queued()
    }

    /// A place, if one is free now and nobody waits for it.
    pub(crate) fn try_enter(self: &Arc<Self>) -> Option<Place> {
        self.limit.try_enter().then(|| Place(self.clone()))
    }

    /// A place in the queue, if it is not full.
    pub(crate) fn line_up(self: &Arc<Self>) -> Option<Ticket> {
        let number = self.limit.line_up()?;
        Some(Ticket {
            room: self.clone(),
            number: Some(number),
        })
    }

    /// Of one that came in vain.
    pub(super) fn full(&self) -> Error {
        self.refuse("", "queue_full")
    }

    /// Of one that waited in vain.
    pub(super) fn none_ended(&self) -> Error {
        self.refuse(", and none ended in time", "waited")
    }

    fn refuse(&self, more: &str, reason: &'static str) -> Error {
        if let Some(group) = &self.group {
            telemetry::group_shed(group, reason);
        }
        let message = format!("{} has all the requests it may have{more}", self.title);
        Error::new(ErrorKind::Overloaded, message)
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room")
            .field("title", &self.title)
            .field("in_flight", &self.in_flight())
            .field("queued", &self.queued())
            .finish_non_exhaustive()
    }
}

/// A place, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place(Arc<Room>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.limit.leave();
    }
}

/// A place in the queue, given back when it is dropped, which is after the wait. The order is that
/// of the calls of [`line_up`](Room::line_up).
#[derive(Debug)]
pub(crate) struct Ticket {
    room: Arc<Room>,
    /// Until it has had its turn.
    number: Option<u64>,
}

impl Ticket {
    pub(super) fn room(&self) -> &Room {
        &self.room
    }

    /// Ready once, with the place. Until then a ticket that is dropped gives back a place that has
    /// just become its own.
    pub(crate) fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Place> {
        let Some(number) = self.number else {
            panic!("polled after its turn");
        };
        ready!(self.room.limit.poll_turn(number, cx.waker()));
        self.number = None;
        Poll::Ready(Place(self.room.clone()))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.room.limit.give_up(number);
        }
        self.room.limit.ticket_ends();
    }
}
