//! Times to live, without the protocol's traps.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Above this memcached takes a TTL for a Unix time (`REALTIME_MAXDELTA`: 30 days).
const RELATIVE_MAX: u64 = 60 * 60 * 24 * 30;

/// The latest Unix time memcached's 32-bit field holds, in January 2038.
const ABSOLUTE_MAX: u64 = i32::MAX as u64;

/// How long an item lives.
///
/// On the wire 0 means for ever, a negative number means already expired, and more than 30 days
/// is taken for a date in 1970. Here a duration is a duration, [`Ttl::NEVER`] is explicit, and
/// fractions of a second round up, so that a short life never becomes an eternal one.
///
/// memcached's clock ticks once a second: an item lives up to a second less than its TTL, and one
/// of a second may be gone at once. Times after January 2038 are capped to it (its field has 32
/// bits).
///
/// ```
/// use std::time::Duration;
/// use tower_memcached::Ttl;
///
/// let ttl = Ttl::secs(60);
/// assert_eq!(ttl, Ttl::from(Duration::from_secs(60)));
/// assert_eq!(Ttl::from(Duration::from_millis(1)), Ttl::secs(1));
/// assert_ne!(Ttl::secs(0), Ttl::NEVER);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ttl(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Never,
    Seconds(u64),
    Until(u64),
}

impl Ttl {
    /// Lives until it is evicted, deleted or the server restarts.
    pub const NEVER: Self = Self(Kind::Never);

    /// Lives for so many seconds; 0 is expired at once (not for ever).
    #[must_use]
    pub const fn secs(seconds: u64) -> Self {
        Self(Kind::Seconds(seconds))
    }

    /// Lives until that moment, by the server's clock; a past one is expired at once.
    #[must_use]
    pub fn until(moment: SystemTime) -> Self {
        let since = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(Kind::Until(round_up(since)))
    }

    /// This, or `limit` if that is shorter; [`Ttl::NEVER`] becomes `limit`. An item on a failover
    /// node must not outlive the outage.
    pub(crate) fn at_most(self, limit: Duration) -> Self {
        let limit = round_up(limit);
        match self.0 {
            Kind::Never => Self::secs(limit),
            Kind::Seconds(seconds) => Self::secs(seconds.min(limit)),
            Kind::Until(moment) => Self(Kind::Until(moment.min(unix_now().saturating_add(limit)))),
        }
    }

    /// So much longer.
    pub(crate) fn extended(self, by: Duration) -> Self {
        let by = round_up(by);
        match self.0 {
            Kind::Never => self,
            Kind::Seconds(seconds) => Self::secs(seconds.saturating_add(by)),
            Kind::Until(moment) => Self(Kind::Until(moment.saturating_add(by))),
        }
    }

    /// Shorter by up to `share` of it, `random` (from 0 to 1) of that, so that what was written
    /// together does not expire together. A moment stays what it is, and a second a second.
    pub(crate) fn jittered(self, share: f64, random: f64) -> Self {
        match self.0 {
            Kind::Seconds(seconds) => {
                let less = (seconds as f64 * share * random) as u64;
                Self::secs(seconds.saturating_sub(less).max(seconds.min(1)))
            }
            Kind::Never | Kind::Until(_) => self,
        }
    }

    /// What goes on the wire now.
    pub(crate) fn wire(self) -> i64 {
        // Most need no look at the clock.
        let now = match self.0 {
            Kind::Never | Kind::Seconds(0..=RELATIVE_MAX) => 0,
            Kind::Seconds(_) | Kind::Until(_) => unix_now(),
        };
        self.wire_at(now)
    }

    fn wire_at(self, now: u64) -> i64 {
        let absolute = |moment: u64| moment.min(ABSOLUTE_MAX) as i64;
        match self.0 {
            Kind::Never => 0,
            Kind::Seconds(0) => -1,
            Kind::Seconds(seconds) if seconds <= RELATIVE_MAX => seconds as i64,
            Kind::Seconds(seconds) => absolute(now.saturating_add(seconds)),
            // A small number would be taken for a duration.
            Kind::Until(moment) if moment <= now => -1,
            Kind::Until(moment) => absolute(moment),
        }
    }
}

impl From<Duration> for Ttl {
    /// Rounds up to whole seconds.
    fn from(duration: Duration) -> Self {
        Self::secs(round_up(duration))
    }
}

fn round_up(duration: Duration) -> u64 {
    duration
        .as_secs()
        .saturating_add(u64::from(duration.subsec_nanos() > 0))
}

fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    #[test]
    fn the_wires_traps_cannot_be_expressed() {
        assert_eq!(Ttl::NEVER.wire_at(NOW), 0);
        assert_eq!(Ttl::secs(0).wire_at(NOW), -1, "0 would live for ever");
        assert_eq!(Ttl::from(Duration::from_nanos(1)).wire_at(NOW), 1);
        assert_eq!(Ttl::from(Duration::ZERO).wire_at(NOW), -1);
        assert_eq!(Ttl::secs(RELATIVE_MAX).wire_at(NOW), RELATIVE_MAX as i64);
        assert_eq!(
            Ttl::secs(RELATIVE_MAX + 1).wire_at(NOW),
            (NOW + RELATIVE_MAX + 1) as i64,
            "would be a date in 1970"
        );
        assert_eq!(Ttl::secs(u64::MAX).wire_at(NOW), i64::from(i32::MAX));
        assert_eq!(
            Ttl::until(UNIX_EPOCH + Duration::from_secs(5)).wire_at(NOW),
            -1
        );
        let later = UNIX_EPOCH + Duration::from_secs(NOW + 5);
        assert_eq!(Ttl::until(later).wire_at(NOW), (NOW + 5) as i64);
    }

    #[test]
    fn jitter_shortens_and_never_lengthens_or_kills() {
        assert_eq!(Ttl::secs(100).jittered(0.1, 0.0), Ttl::secs(100));
        assert_eq!(Ttl::secs(100).jittered(0.1, 1.0), Ttl::secs(90));
        assert_eq!(Ttl::secs(1).jittered(1.0, 1.0), Ttl::secs(1));
        assert_eq!(Ttl::secs(0).jittered(1.0, 1.0), Ttl::secs(0));
        assert_eq!(Ttl::NEVER.jittered(0.5, 1.0), Ttl::NEVER);
    }

    #[test]
    fn an_extension_covers_every_kind() {
        let by = Duration::from_millis(1_500);
        assert_eq!(Ttl::secs(10).extended(by), Ttl::secs(12));
        assert_eq!(Ttl::NEVER.extended(by), Ttl::NEVER);
        let moment = UNIX_EPOCH + Duration::from_secs(NOW);
        let later = UNIX_EPOCH + Duration::from_secs(NOW + 2);
        assert_eq!(Ttl::until(moment).extended(by), Ttl::until(later));
    }

    #[test]
    fn a_cap_covers_every_kind() {
        let cap = Duration::from_secs(60);
        assert_eq!(Ttl::NEVER.at_most(cap), Ttl::secs(60));
        assert_eq!(Ttl::secs(3600).at_most(cap), Ttl::secs(60));
        assert_eq!(Ttl::secs(5).at_most(cap), Ttl::secs(5));
        assert_eq!(Ttl::secs(0).at_most(cap), Ttl::secs(0));
        let far = Ttl::until(SystemTime::now() + Duration::from_secs(3600)).at_most(cap);
        let now = unix_now() as i64;
        assert!((now + 55..=now + 61).contains(&far.wire()), "{far:?}");
    }
}
