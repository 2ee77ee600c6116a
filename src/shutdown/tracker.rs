//! What a client and all that is derived from it (clones, groups, layers) have under way.
//!
//! Operations of callers are counted where they enter, so that those a layer holds back are known as
//! well; what goes on behind the answer where it begins. Each of these begins only as part of one
//! before it in the order of [`Tracker::is_idle`], and is counted before that one ends.

use std::cell::RefCell;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use futures::future::{Either, select};
use tokio::sync::{Notify, watch};

use super::{ShutdownReport, shut_down};
use crate::error::Result;

/// Work that is not a caller's operation, or not only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A load that runs as part of its caller's operation.
    OwnLoad,
    /// A task that loads.
    Load,
    /// A value that is being put back.
    Refill,
    /// A lease that is held.
    Lease,
}

#[derive(Debug)]
pub(crate) struct Tracker {
    /// Operations of callers, times [`ONE`]; and [`REFUSES`].
    operations: AtomicUsize,
    work: [AtomicUsize; 4],
    /// Refills that were not made, for there were too many, since no new operation begins.
    dropped: AtomicUsize,
    /// Told, once no new operation begins, whenever the last of a kind ends.
    ended: Notify,
    closed: watch::Sender<bool>,
    report: OnceLock<ShutdownReport>,
}

/// No new operation begins.
const REFUSES: usize = 1;

const ONE: usize = 2;

impl Default for Tracker {
    fn default() -> Self {
        Self {
            operations: AtomicUsize::new(0),
            work: Default::default(),
            dropped: AtomicUsize::new(0),
            ended: Notify::new(),
            closed: watch::Sender::new(false),
            report: OnceLock::new(),
        }
    }
}

/// An operation of a caller.
#[derive(Debug)]
pub(crate) struct Operating<'a>(&'a Tracker);

impl Drop for Operating<'_> {
    #[inline]
    fn drop(&mut self) {
        let before = self.0.operations.fetch_sub(ONE, Ordering::AcqRel);
        if before == ONE | REFUSES {
            self.0.ended.notify_waiters();
        }
    }
}

/// A piece of [`Work`].
#[derive(Debug)]
pub(crate) struct Counted {
    tracker: Arc<Tracker>,
    work: Work,
}

impl Counted {
    pub(crate) fn tracker(&self) -> &Tracker {
        &self.tracker
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let before = self.tracker.of(self.work).fetch_sub(1, Ordering::AcqRel);
        if before == 1 && self.tracker.refuses() {
            self.tracker.ended.notify_waiters();
        }
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Tracker>>> = const { RefCell::new(None) };
}

impl Tracker {
    /// Puts layers together: the engines among them are this client's.
    pub(crate) fn layering<T>(self: &Arc<Self>, layer: impl FnOnce() -> T) -> T {
        struct Before(Option<Arc<Tracker>>);
        impl Drop for Before {
            fn drop(&mut self) {
                let ours = CURRENT.replace(self.0.take());
                drop(ours);
            }
        }
        let _before = Before(CURRENT.replace(Some(self.clone())));
        layer()
    }

    /// That of the client whose layers are being put together; of its own otherwise.
    pub(crate) fn current() -> Arc<Self> {
        CURRENT.with_borrow(|current| current.clone().unwrap_or_default())
    }

    /// An operation of a caller begins.
    ///
    /// # Errors
    /// [`ErrorKind::Shutdown`](crate::ErrorKind::Shutdown), once no new one may.
    #[inline]
    pub(crate) fn operate(&self) -> Result<Operating<'_>> {
        // Those who are refused do not show up among those who are not.
        if self.refuses() {
            return Err(shut_down());
        }
        let before = self.operations.fetch_add(ONE, Ordering::AcqRel);
        let operating = Operating(self);
        match before & REFUSES {
            0 => Ok(operating),
            _ => Err(shut_down()),
        }
    }

    pub(crate) fn count(self: &Arc<Self>, work: Work) -> Counted {
        self.of(work).fetch_add(1, Ordering::AcqRel);
        Counted {
            tracker: self.clone(),
            work,
        }
    }

    fn of(&self, work: Work) -> &AtomicUsize {
        &self.work[work as usize]
    }

    fn counted(&self, work: Work) -> usize {
        self.of(work).load(Ordering::Acquire)
    }

    /// A refill was not made, for there were too many.
    pub(crate) fn refill_dropped(&self) {
        if self.refuses() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(crate) fn refuses(&self) -> bool {
        self.operations.load(Ordering::Acquire) & REFUSES != 0
    }

    /// No new operation begins from now on.
    pub(crate) fn refuse(&self) {
        self.operations.fetch_or(REFUSES, Ordering::AcqRel);
    }

    fn operations(&self) -> usize {
        self.operations.load(Ordering::Acquire) / ONE
    }

    fn is_idle(&self) -> bool {
        // In this order: see above.
        self.operations() == 0
            && self.counted(Work::Load) == 0
            && self.counted(Work::Refill) == 0
            && self.counted(Work::Lease) == 0
    }

    /// Waits until nothing is under way any more, once no new operation begins.
    pub(crate) async fn idle(&self) {
        loop {
            let mut ended = pin!(self.ended.notified());
            ended.as_mut().enable();
            if self.is_idle() {
                return;
            }
            ended.await;
        }
    }

    /// What is under way.
    pub(crate) fn under_way(&self) -> ShutdownReport {
        let own = self.counted(Work::OwnLoad);
        ShutdownReport {
            requests: self.operations().saturating_sub(own),
            loads: own + self.counted(Work::Load),
            refills: self.counted(Work::Refill) + self.dropped.load(Ordering::Relaxed),
            leases: self.counted(Work::Lease),
            journals: Vec::new(),
        }
    }

    /// What was abandoned, once that is known.
    pub(crate) fn report(&self) -> Option<&ShutdownReport> {
        self.report.get()
    }

    /// What is still under way is abandoned: it ends now. The first to say so says what that is.
    pub(crate) fn close(&self, report: impl FnOnce() -> ShutdownReport) -> &ShutdownReport {
        let report = self.report.get_or_init(report);
        self.closed.send_replace(true);
        report
    }

    async fn closed(&self) {
        // It fails only without a sender, which is here.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// Does it, unless everything is abandoned before.
    pub(crate) async fn unless_closed<F: Future>(&self, work: F) -> Option<F::Output> {
        match select(pin!(work), pin!(self.closed())).await {
            Either::Left((output, _)) => Some(output),
            Either::Right(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn it_is_idle_when_the_last_of_every_kind_has_ended() {
        let tracker = Arc::new(Tracker::default());
        let operation = tracker.operate().unwrap();
        let own = tracker.count(Work::OwnLoad);
        let task = tracker.count(Work::Load);
        tracker.refill_dropped();
        tracker.refuse();
        assert!(tracker.operate().is_err());
        let mut idle = Box::pin(tracker.idle());
        assert!((&mut idle).now_or_never().is_none());
        let report = tracker.under_way();
        assert_eq!((report.requests, report.loads, report.refills), (0, 2, 0));
        tracker.refill_dropped();
        drop(own);
        let report = tracker.under_way();
        assert_eq!((report.requests, report.loads, report.refills), (1, 1, 1));
        drop(operation);
        assert!((&mut idle).now_or_never().is_none());
        let refill = tracker.count(Work::Refill);
        drop(task);
        let lease = tracker.count(Work::Lease);
        assert!((&mut idle).now_or_never().is_none());
        drop(refill);
        assert!((&mut idle).now_or_never().is_none());
        assert_eq!(tracker.under_way().leases, 1);
        drop(lease);
        assert!(idle.now_or_never().is_some());
    }

    #[test]
    fn what_is_abandoned_ends_and_the_first_report_stays() {
        let tracker = Tracker::default();
        let mut work = Box::pin(tracker.unless_closed(std::future::pending::<()>()));
        assert!((&mut work).now_or_never().is_none());
        let first = ShutdownReport {
            requests: 1,
            ..ShutdownReport::default()
        };
        assert_eq!(tracker.close(|| first.clone()), &first);
        assert_eq!(work.now_or_never(), Some(None));
        assert_eq!(tracker.close(ShutdownReport::default), &first);
        let at_once = tracker.unless_closed(std::future::ready(1));
        assert_eq!(at_once.now_or_never(), Some(Some(1)), "what ends has ended");
    }

    #[test]
    fn layers_are_their_clients_even_if_one_panics() {
        let (one, other) = (Arc::new(Tracker::default()), Arc::new(Tracker::default()));
        let is = |tracker: &Arc<Tracker>| Arc::ptr_eq(&Tracker::current(), tracker);
        one.layering(|| {
            assert!(is(&one));
            let inner = std::panic::AssertUnwindSafe(|| other.layering(|| panic!("a layer's bug")));
            assert!(std::panic::catch_unwind(inner).is_err());
            assert!(is(&one));
        });
        assert!(!is(&one) && !is(&other));
    }

    #[test]
    fn those_who_come_and_go_while_it_begins_are_counted_or_refused() {
        let tracker = Arc::new(Tracker::default());
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let tracker = tracker.clone();
                std::thread::spawn(move || while tracker.operate().is_ok() {})
            })
            .collect();
        std::thread::yield_now();
        tracker.refuse();
        futures::executor::block_on(tracker.idle());
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(tracker.under_way(), ShutdownReport::default());
    }
}
