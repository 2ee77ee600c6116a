//! What a guard is told, checked once.

use std::time::Duration;

use super::throttle::Throttle;
use crate::bulkhead::Limits;
use crate::error::{Invalid, not_zero};
use crate::rate::Cells;

/// How much a database, or one group of those who use it, may be asked for; see
/// [`LoadGuard`](super::LoadGuard).
///
/// ```
/// use std::time::Duration;
/// use tower_memcached::LoadLimits;
///
/// let limits = LoadLimits::default()
///     .max_concurrent(32)
///     .max_wait(Duration::from_millis(100))
///     .rate(500);
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct LoadLimits {
    pub(super) max_concurrent: usize,
    pub(super) max_queue: usize,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) max_wait: Duration,
    rate: Option<u32>,
    burst: Option<u32>,
    throttle: bool,
    throttle_k: f64,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    throttle_window: Duration,
}

impl Default for LoadLimits {
    fn default() -> Self {
        Self {
            max_concurrent: 64,
            max_queue: 1024,
            max_wait: Duration::from_millis(250),
            rate: None,
            burst: None,
            throttle: true,
            throttle_k: 2.0,
            throttle_window: Duration::from_secs(120),
        }
    }
}

impl LoadLimits {
    /// How many loads may run at once; 64 by default. Little more than the connections your
    /// database pool has is right.
    #[must_use]
    pub fn max_concurrent(mut self, loads: usize) -> Self {
        self.max_concurrent = loads;
        self
    }

    /// How many loads may wait until one of those ends; 1024 by default. With 0 none waits.
    #[must_use]
    pub fn max_queue(mut self, loads: usize) -> Self {
        self.max_queue = loads;
        self
    }

    /// How long a load may wait until it starts, be it for one of those to end or for the rate;
    /// 250 ms by default. Whoever asks for it may have less time.
    ///
    /// A load of a group may wait this long from when it has its turn in the group, and no longer
    /// than the group's own time from when it came.
    #[must_use]
    pub fn max_wait(mut self, time: Duration) -> Self {
        self.max_wait = time;
        self
    }

    /// How many loads may start each second; by default there is no such limit, since we cannot
    /// know your database. In any one second no more start than this and the
    /// [burst](Self::burst) together.
    #[must_use]
    pub fn rate(mut self, per_second: u32) -> Self {
        self.rate = Some(per_second);
        self
    }

    /// How many loads may start at once after a while with fewer than the [rate](Self::rate); a
    /// tenth of the rate by default, and at least 1.
    ///
    /// Timers have a granularity of 1 ms: with a burst of less than a thousandth of the rate, the
    /// rate is not reached.
    #[must_use]
    pub fn burst(mut self, loads: u32) -> Self {
        self.burst = Some(loads);
        self
    }

    /// When loads of a failing database are held back: with a probability of `(requests - k *
    /// accepts) / (requests + 1)` of those sent within `window`. 2 and 2 minutes by default, which
    /// holds nothing back while at least half of the loads succeed.
    ///
    /// A database that fails every load is asked about `sqrt(d / window)` times each second, `d`
    /// being how many are wanted, and by all within seconds when it is back. After two minutes of
    /// health it takes one of failures until anything is held back; a shorter window is quicker,
    /// and a `k` nearer to 1 as well.
    #[must_use]
    pub fn throttle(mut self, k: f64, window: Duration) -> Self {
        self.throttle = true;
        self.throttle_k = k;
        self.throttle_window = window;
        self
    }

    /// Never holds a load back because others failed.
    #[must_use]
    pub fn without_throttle(mut self) -> Self {
        self.throttle = false;
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        let refuse = |setting: &str, why: &'static str| Err(Invalid::new(setting, why));
        not_zero("max_concurrent", self.max_concurrent == 0)?;
        not_zero("rate", self.rate == Some(0))?;
        not_zero("burst", self.burst == Some(0))?;
        if self.burst.is_some() && self.rate.is_none() {
            return refuse("burst", "is no limit without a rate");
        }
        if !(self.throttle_k.is_finite() && self.throttle_k >= 1.0) {
            return refuse("throttle_k", "is not a number from 1 upwards");
        }
        if self.throttle_window < Duration::from_secs(1) {
            return refuse("throttle_window", "is shorter than a second");
        }
        Ok(())
    }

    pub(super) fn make_cells(&self) -> Option<Cells> {
        Cells::of(self.rate, self.burst)
    }

    pub(super) fn has_rate_of(&self, other: &Self) -> bool {
        (self.rate, self.burst) == (other.rate, other.burst)
    }

    pub(super) fn throttles_like(&self, other: &Self) -> bool {
        let of = |limits: &Self| (limits.throttle, limits.throttle_k, limits.throttle_window);
        of(self) == of(other)
    }

    pub(super) fn places(&self) -> Limits {
        Limits {
            max_in_flight: self.max_concurrent,
            max_queue: self.max_queue,
            max_wait: self.max_wait,
        }
    }

    pub(super) fn make_throttle(&self) -> Option<Throttle> {
        self.throttle
            .then(|| Throttle::new(self.throttle_k, self.throttle_window))
    }
}
