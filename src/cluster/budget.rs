//! The retry budget: retries and failovers may add only so much to the load, however many
//! requests fail.
//!
//! A token bucket in the manner of Finagle's and linkerd's retry budgets: each request deposits a
//! fraction of a token, a floor flows in with time, each retry withdraws a whole one. What is not
//! used within the window is lost, which here means that the bucket has a capacity.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Tokens are counted in hundredths, so that a percentage is a whole number.
const TOKEN: u64 = 100;

#[derive(Debug)]
pub(super) struct Budget {
    percent: AtomicU32,
    per_second: AtomicU32,
    /// Hundredths of a token.
    balance: AtomicU64,
    began: Instant,
    /// Milliseconds since `began` for which the floor has been paid in.
    paid_until: AtomicU64,
}

/// How many retries and failovers there may be: `percent` of requests, and `per_second` besides. It
/// begins with 100, and saves up at most what ten seconds of 1,000 requests each bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct RetryBudget {
    percent: u32,
    per_second: u32,
}

impl RetryBudget {
    /// 20 % of requests and 10 a second by default, as in Finagle and linkerd.
    #[must_use]
    pub fn new(percent: u32, per_second: u32) -> Self {
        Self {
            percent,
            per_second,
        }
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self::new(20, 10)
    }
}

/// What is saved up is at most this: ten seconds of the floor, or a first hundred.
const WINDOW: u64 = 10;
const INITIAL: u64 = 100 * TOKEN;

impl Budget {
    pub(super) fn new(settings: RetryBudget) -> Self {
        Self {
            percent: settings.percent.into(),
            per_second: settings.per_second.into(),
            balance: AtomicU64::new(INITIAL),
            began: Instant::now(),
            paid_until: AtomicU64::new(0),
        }
    }

    /// Other settings from now on. What has been saved up stays if they are the same.
    pub(super) fn apply(&self, settings: RetryBudget) {
        if self.settings() == settings {
            return;
        }
        self.percent.store(settings.percent, Ordering::Relaxed);
        let per_second = settings.per_second;
        self.per_second.store(per_second, Ordering::Relaxed);
        let now = self.millis();
        self.paid_until.store(now, Ordering::Relaxed);
        self.balance.store(INITIAL, Ordering::Relaxed);
    }

    fn settings(&self) -> RetryBudget {
        RetryBudget {
            percent: self.percent.load(Ordering::Relaxed),
            per_second: self.per_second.load(Ordering::Relaxed),
        }
    }

    fn millis(&self) -> u64 {
        Duration::as_millis(&self.began.elapsed()) as u64
    }

    #[inline]
    fn capacity(&self) -> u64 {
        let settings = self.settings();
        // Ten seconds of a service's requests cannot be known beforehand; what a thousand of them
        // each second deposit is the cap.
        let floor = u64::from(settings.per_second) * WINDOW * TOKEN;
        let share = u64::from(settings.percent) * 1000 * WINDOW;
        INITIAL.max(floor + share)
    }

    /// A request was made.
    #[inline]
    pub(super) fn deposit(&self) {
        // Full is the usual state; then this is one load.
        if self.balance.load(Ordering::Relaxed) < self.capacity() {
            let share = u64::from(self.percent.load(Ordering::Relaxed));
            self.balance.fetch_add(share, Ordering::Relaxed);
        }
    }

    /// Takes a token, if there is one.
    pub(super) fn withdraw(&self) -> bool {
        self.pay_floor();
        self.balance
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |balance| {
                balance.min(self.capacity()).checked_sub(TOKEN)
            })
            .is_ok()
    }

    fn pay_floor(&self) {
        let now = self.millis();
        let paid = self.paid_until.load(Ordering::Relaxed);
        let due = now.saturating_sub(paid).min(WINDOW * 1000);
        // TOKEN per second is TOKEN / 1000 per millisecond; whole hundredths only.
        let hundredths = due * u64::from(self.settings().per_second) * TOKEN / 1000;
        if hundredths > 0
            && self
                .paid_until
                .compare_exchange(paid, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            self.balance.fetch_add(hundredths, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(budget: &Budget) -> u32 {
        let mut taken = 0;
        while budget.withdraw() {
            taken += 1;
        }
        taken
    }

    #[tokio::test(start_paused = true)]
    async fn starts_with_a_hundred_and_gives_a_fifth_of_requests_and_ten_a_second() {
        let budget = Budget::new(RetryBudget::default());
        assert_eq!(drain(&budget), 100);
        (0..1000).for_each(|_| budget.deposit());
        assert_eq!(drain(&budget), 200);
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(drain(&budget), 30);
        assert_eq!(drain(&budget), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn saves_up_only_so_much() {
        let budget = Budget::new(RetryBudget::default());
        (0..1_000_000).for_each(|_| budget.deposit());
        tokio::time::advance(Duration::from_secs(3600)).await;
        let saved = drain(&budget);
        assert!((2000..=2200).contains(&saved), "{saved}");
    }

    #[tokio::test(start_paused = true)]
    async fn can_be_switched_off() {
        let budget = Budget::new(RetryBudget::new(0, 0));
        drain(&budget);
        (0..1000).for_each(|_| budget.deposit());
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(!budget.withdraw());
    }
}
