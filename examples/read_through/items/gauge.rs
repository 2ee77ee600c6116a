//! How many are inside of something, and how many have been at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Clones are handles of the same gauge.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gauge(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// Somebody inside, until dropped.
#[derive(Debug)]
pub(crate) struct Inside(Gauge);

impl Gauge {
    pub(crate) fn enter(&self) -> Inside {
        let now = self.0.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most.fetch_max(now, Ordering::SeqCst);
        Inside(self.clone())
    }

    pub(crate) fn now(&self) -> usize {
        self.0.now.load(Ordering::SeqCst)
    }

    /// The most at once since the beginning, or since it was last [taken](Self::take_most).
    pub(crate) fn most(&self) -> usize {
        self.0.most.load(Ordering::SeqCst)
    }

    /// The most at once, which begins anew with those who are inside now.
    pub(crate) fn take_most(&self) -> usize {
        let most = self.0.most.swap(0, Ordering::SeqCst);
        // Whoever enters in between counts itself and all others, so this never says too much.
        self.0.most.fetch_max(self.now(), Ordering::SeqCst);
        most
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.0.now.fetch_sub(1, Ordering::SeqCst);
    }
}
