//! How much may happen each second: governor's cells, on tokio's clock.

use std::num::NonZeroU32;
use std::sync::OnceLock;
use std::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use tokio::time::Instant;

type Limiter = RateLimiter<NotKeyed, InMemoryState, SinceFirstUse, NoOpMiddleware<Nanos>>;

/// So many cells each second, and so many at once.
#[derive(Debug)]
pub(crate) struct Cells {
    quota: Quota,
    /// Made when first used, which may be in another runtime, with another clock, than the one in
    /// which this was made.
    limiter: OnceLock<Limiter>,
}

impl Cells {
    /// `None` without a rate. A burst is a tenth of the rate unless it is set, and at least 1.
    pub(crate) fn of(rate: Option<u32>, burst: Option<u32>) -> Option<Self> {
        let rate = NonZeroU32::new(rate?)?;
        let burst = NonZeroU32::new(burst.unwrap_or(rate.get() / 10));
        Some(Self::new(rate, burst.unwrap_or(NonZeroU32::MIN)))
    }

    pub(crate) fn new(per_second: NonZeroU32, burst: NonZeroU32) -> Self {
        // Rounded up, so that it is never more than was asked for.
        let interval = 1_000_000_000_u32.div_ceil(per_second.get());
        let interval = Duration::from_nanos(u64::from(interval));
        let quota = Quota::with_period(interval).unwrap_or(Quota::per_second(per_second));
        Self {
            quota: quota.allow_burst(burst),
            limiter: OnceLock::new(),
        }
    }

    /// Takes a cell without a lock.
    ///
    /// # Errors
    /// There is none; the next comes then.
    pub(crate) fn take(&self) -> Result<(), Instant> {
        let make = || Limiter::direct_with_clock(self.quota, SinceFirstUse(Instant::now()));
        let limiter = self.limiter.get_or_init(make);
        limiter.check().map_err(|not_until| {
            let earliest = Duration::from(not_until.earliest_possible());
            limiter.clock().0 + earliest
        })
    }
}

/// tokio's clock, which tests can pause. Time before the anchor is the anchor: subtraction of
/// tokio's instants saturates.
#[derive(Debug)]
struct SinceFirstUse(Instant);

impl Clock for SinceFirstUse {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Instant::now().saturating_duration_since(self.0).into()
    }
}
