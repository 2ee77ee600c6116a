//! A bulkhead: so many at once, so many waiting behind them, each for so long, and nobody else.
//!
//! Places are given out in the order in which they were asked for. It knows nothing of what is
//! done in a place: a [`Place`] is one until it is dropped, a [`Ticket`] is one in the queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::error::Result;
use crate::executor::{Spawner, until};

/// How long somebody is willing to wait for their turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Until that moment.
    Until(Instant),
    /// Not at all: it is done now or not.
    Now,
}

impl Patience {
    /// The same, but not beyond `moment`.
    pub(crate) fn at_most(self, moment: Instant) -> Self {
        match self {
            Self::Until(own) => Self::Until(own.min(moment)),
            Self::Now => Self::Now,
        }
    }
}

/// What lets only so many in at once, and only so many wait.
#[derive(Debug)]
pub(crate) struct Bulkhead {
    /// Fair: a place that becomes free belongs to the first in the queue, and whoever comes then
    /// does not find it free.
    free: Arc<Semaphore>,
    max_queue: usize,
    queued: Arc<AtomicUsize>,
}

impl Bulkhead {
    pub(crate) fn new(max_concurrent: usize, max_queue: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(max_concurrent.min(Semaphore::MAX_PERMITS))),
            max_queue,
            queued: Arc::default(),
        }
    }

    /// A place, if one is free now and nobody waits for it.
    pub(crate) fn try_enter(&self) -> Option<Place> {
        let permit = self.free.clone().try_acquire_owned().ok()?;
        Some(Place(permit))
    }

    /// A place in the queue, if it is not full.
    pub(crate) fn line_up(&self) -> Option<Ticket> {
        self.queued
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |queued| {
                (queued < self.max_queue).then_some(queued + 1)
            })
            .ok()?;
        Some(Ticket {
            free: self.free.clone(),
            queued: self.queued.clone(),
        })
    }
}

/// A place in the queue, given back when it is dropped, which is after the wait. The order is that
/// of the calls of [`turn`](Self::turn).
#[derive(Debug)]
pub(crate) struct Ticket {
    free: Arc<Semaphore>,
    queued: Arc<AtomicUsize>,
}

impl Ticket {
    /// Waits for a place; `None` if there was none by `moment`.
    ///
    /// # Errors
    /// There is no runtime for a timer.
    ///
    /// # Cancel safety
    /// Dropping the future ends the wait, and gives a place back that had just become this one's.
    pub(crate) async fn turn(
        &mut self,
        moment: Instant,
        spawner: Option<&Spawner>,
    ) -> Result<Option<Place>> {
        let place = self.free.clone().acquire_owned();
        // Nobody closes the semaphore.
        let place = until(spawner, moment, place).await?.and_then(Result::ok);
        Ok(place.map(Place))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.queued.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A place, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place(
    #[expect(dead_code, reason = "held, never looked at")] OwnedSemaphorePermit,
);

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::time::Duration;

    use futures::FutureExt as _;
    use futures::future::join_all;
    use tokio::task::yield_now;

    use super::*;

    fn queued(bulkhead: &Bulkhead) -> usize {
        bulkhead.queued.load(Ordering::Relaxed)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(1)
    }

    /// Lines up at once, and waits for a second when polled.
    fn wait_in(bulkhead: &Bulkhead) -> impl Future<Output = Result<Option<Place>>> {
        let mut ticket = bulkhead.line_up().unwrap();
        async move { ticket.turn(soon(), None).await }
    }

    #[tokio::test(start_paused = true)]
    async fn places_and_queue_are_bounded_and_come_back() {
        let bulkhead = Bulkhead::new(2, 1);
        let first = bulkhead.try_enter().unwrap();
        let _second = bulkhead.try_enter().unwrap();
        assert!(bulkhead.try_enter().is_none());
        let mut third = pin!(wait_in(&bulkhead));
        assert!((&mut third).now_or_never().is_none());
        assert!(bulkhead.line_up().is_none(), "the queue holds one");
        drop(first);
        assert!(
            bulkhead.try_enter().is_none(),
            "the place that became free belongs to who waits"
        );
        let third = third.await.unwrap().unwrap();
        assert_eq!(queued(&bulkhead), 0);
        drop(third);
        assert!(bulkhead.try_enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn turns_come_in_order() {
        let bulkhead = Bulkhead::new(1, 100);
        let place = bulkhead.try_enter().unwrap();
        let order = std::sync::Mutex::new(Vec::new());
        let waiting = join_all((0..100).map(|n| {
            let (waiting, order) = (wait_in(&bulkhead), &order);
            async move {
                let place = waiting.await.unwrap().unwrap();
                order.lock().unwrap().push(n);
                yield_now().await;
                drop(place);
            }
        }));
        let release = async { drop(place) };
        tokio::join!(waiting, release);
        assert_eq!(*order.lock().unwrap(), (0..100).collect::<Vec<_>>());
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_at_its_moment_and_leaves_the_queue() {
        let bulkhead = Bulkhead::new(1, 1);
        let _place = bulkhead.try_enter().unwrap();
        let begun = Instant::now();
        let late = wait_in(&bulkhead).await;
        assert!(late.unwrap().is_none());
        assert_eq!(begun.elapsed(), Duration::from_secs(1));
        assert_eq!(queued(&bulkhead), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_dropped_in_the_queue_or_on_the_doorstep_leaves_nothing_behind() {
        let bulkhead = Bulkhead::new(1, 2);
        let place = bulkhead.try_enter().unwrap();
        let mut leaves = Box::pin(wait_in(&bulkhead));
        let mut stays = pin!(wait_in(&bulkhead));
        assert!((&mut leaves).now_or_never().is_none());
        assert!((&mut stays).now_or_never().is_none());
        // Its turn has come, but it has not been told when it goes.
        drop(place);
        drop(leaves);
        assert_eq!(queued(&bulkhead), 1);
        let place = stays.now_or_never().unwrap().unwrap().unwrap();
        assert_eq!(queued(&bulkhead), 0);
        drop(place);
        assert!(bulkhead.try_enter().is_some());
    }

    #[test]
    fn without_a_runtime_or_an_executor_a_wait_is_a_typed_error() {
        let bulkhead = Bulkhead::new(1, 1);
        let _place = bulkhead.try_enter().unwrap();
        let waiting = wait_in(&bulkhead);
        let error = futures::executor::block_on(waiting).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::NoRuntime);
        assert_eq!(queued(&bulkhead), 0);
    }
}
