//! Whether a value that was found is still good.

use std::time::Duration;

/// What may be done with a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Freshness {
    /// It is good.
    Fresh,
    /// It is good, and should be loaded anew before it is not.
    Early,
    /// It is past its TTL by so much.
    Stale(Duration),
}

/// Judges a value that memcached keeps for `left`, `grace` of which is past its TTL, and that is to
/// be refreshed `early` before its TTL ends.
pub(super) fn judge(left: Option<Duration>, grace: Duration, early: Duration) -> Freshness {
    let Some(left) = left else {
        return Freshness::Fresh;
    };
    let Some(fresh) = left.checked_sub(grace) else {
        return Freshness::Stale(grace - left);
    };
    // What memcached calls n seconds is anything over n - 1.
    const HALF_A_SECOND: Duration = Duration::from_millis(500);
    if !early.is_zero() && fresh.saturating_sub(HALF_A_SECOND) <= early {
        return Freshness::Early;
    }
    Freshness::Fresh
}

/// How long before its end a value is refreshed by a reader that draws `random`, from 0 to 1.
pub(super) fn early(cost: Duration, beta: f64, random: f64) -> Duration {
    // 0 would be for ever.
    let gap = cost.as_secs_f64() * beta * -random.max(f64::MIN_POSITIVE).ln();
    Duration::try_from_secs_f64(gap).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_is_left_beyond_the_grace_is_fresh() {
        use Freshness::{Fresh, Stale};
        let judge = |left, grace| judge(Some(seconds(left)), seconds(grace), Duration::ZERO);
        assert_eq!(judge(10, 0), Fresh);
        assert_eq!(judge(0, 0), Fresh);
        assert_eq!(judge(30, 30), Fresh);
        assert_eq!(judge(29, 30), Stale(seconds(1)));
        assert_eq!(judge(0, 30), Stale(seconds(30)));
        let for_ever = super::judge(None, seconds(30), seconds(1000));
        assert_eq!(for_ever, Fresh);
    }

    #[test]
    fn a_refresh_is_early_by_what_was_drawn() {
        let judge = |left, early| judge(Some(seconds(left)), seconds(30), early);
        assert_eq!(judge(35, Duration::from_millis(4_400)), Freshness::Fresh);
        assert_eq!(judge(35, Duration::from_millis(4_500)), Freshness::Early);
        assert_eq!(judge(35, Duration::ZERO), Freshness::Fresh);
    }

    #[test]
    fn refreshes_are_drawn_as_the_paper_says() {
        // The probability to refresh with `left` to go is exp(-left / (cost * beta)).
        let cost = Duration::from_millis(500);
        for (beta, left) in [(1.0, 1.0), (2.0, 1.0), (1.0, 0.25)] {
            let mut random = fastrand::Rng::with_seed(7);
            let draws = 100_000;
            let refreshed = (0..draws)
                .filter(|_| early(cost, beta, random.f64()).as_secs_f64() >= left)
                .count();
            let expected = (-left / (cost.as_secs_f64() * beta)).exp();
            let share = refreshed as f64 / f64::from(draws);
            assert!((share - expected).abs() < 0.01, "{share} for {expected}");
        }
        assert_eq!(early(cost, 0.0, 0.0), Duration::ZERO);
        assert!(early(cost, 1.0, 0.0) < seconds(1000), "not for ever");
    }
}
