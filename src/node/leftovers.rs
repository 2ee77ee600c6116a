//! Keys of a node that have been written on other nodes lately, and may still be there.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::executor::after;
use crate::key::Key;

/// Clocks that tick once a second, and the time that a request may take.
const SLACK: Duration = Duration::from_secs(5);

/// Keys are known by their hash: two that share one are at worst deleted elsewhere for nothing.
#[derive(Debug)]
pub(super) struct Leftovers {
    began: Instant,
    /// Nothing is left after this, in milliseconds from `began`.
    latest: AtomicU64,
    inner: Mutex<Inner>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Inner {
    until: HashMap<u64, Instant>,
    /// There was no room for some: until then any key may be one of them.
    any_until: Option<Instant>,
}

impl Leftovers {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            began: Instant::now(),
            latest: AtomicU64::new(0),
            inner: Mutex::default(),
            capacity,
        }
    }

    /// Something is being left elsewhere, where it may live for `lifetime`.
    pub(super) fn leave(&self, key: &Key, lifetime: Duration) {
        let now = Instant::now();
        let until = after(now, lifetime.saturating_add(SLACK));
        self.insert(key.fixed_hash(), until, now);
    }

    /// What is left of the keys of a node that this one has taken the place of.
    pub(super) fn take_over(&self, from: &Self) {
        let now = Instant::now();
        let (until, any_until) = {
            let inner = from.inner.lock().unwrap_or_else(PoisonError::into_inner);
            (inner.until.clone(), inner.any_until)
        };
        for (hash, until) in until.into_iter().filter(|(_, until)| *until > now) {
            self.insert(hash, until, now);
        }
        if let Some(until) = any_until {
            self.extend(until);
            let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            inner.any_until = inner.any_until.max(Some(until));
        }
    }

    fn extend(&self, until: Instant) {
        let millis = until.saturating_duration_since(self.began).as_millis();
        let millis = u64::try_from(millis).unwrap_or(u64::MAX);
        self.latest.fetch_max(millis, Ordering::AcqRel);
    }

    fn insert(&self, hash: u64, until: Instant, now: Instant) {
        self.extend(until);
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.until.len() >= self.capacity {
            inner.until.retain(|_, until| *until > now);
        }
        if inner.until.len() >= self.capacity {
            inner.any_until = inner.any_until.max(Some(until));
            return;
        }
        // Another write may have left it there for longer.
        let known = inner.until.entry(hash).or_insert(until);
        *known = (*known).max(until);
    }

    /// Whether something of that key may be elsewhere.
    pub(super) fn may_hold(&self, key: &Key) -> bool {
        let latest = self.latest.load(Ordering::Acquire);
        if latest == 0 {
            return false;
        }
        let now = Instant::now();
        if now.saturating_duration_since(self.began).as_millis() >= u128::from(latest) {
            return false;
        }
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let known = inner.until.get(&key.fixed_hash());
        [known.copied(), inner.any_until]
            .into_iter()
            .flatten()
            .any(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_was_left_is_known_until_it_is_gone() {
        let key = |n: usize| Key::new(format!("k{n}")).unwrap();
        let left = Leftovers::new(2);
        assert!(!left.may_hold(&key(0)));
        left.leave(&key(0), Duration::from_secs(60));
        left.leave(&key(1), Duration::MAX);
        assert!(left.may_hold(&key(0)) && left.may_hold(&key(1)) && !left.may_hold(&key(2)));
        left.leave(&key(2), Duration::from_secs(60));
        assert!(left.may_hold(&key(3)), "one was not kept, and may be any");
        tokio::time::advance(Duration::from_secs(66)).await;
        assert!(!left.may_hold(&key(0)) && left.may_hold(&key(1)) && !left.may_hold(&key(3)));
        left.leave(&key(3), Duration::from_secs(60));
        left.leave(&key(3), Duration::from_secs(1));
        tokio::time::advance(Duration::from_secs(50)).await;
        assert!(
            left.may_hold(&key(3)) && !left.may_hold(&key(2)),
            "there is room again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_left_is_taken_over() {
        let key = |n: usize| Key::new(format!("k{n}")).unwrap();
        let (from, to) = (Leftovers::new(1), Leftovers::new(9));
        from.leave(&key(0), Duration::from_secs(60));
        to.take_over(&from);
        assert!(to.may_hold(&key(0)) && !to.may_hold(&key(1)));
        from.leave(&key(1), Duration::from_secs(90));
        to.take_over(&from);
        assert!(to.may_hold(&key(2)), "one was not kept, and may be any");
        tokio::time::advance(Duration::from_secs(96)).await;
        assert!(!to.may_hold(&key(0)));
    }
}
