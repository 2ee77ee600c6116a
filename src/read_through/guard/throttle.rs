//! Holding loads back from a database that fails them.
//!
//! Client-side throttling as in Google's *Site Reliability Engineering*, chapter "Handling
//! Overload": a load is rejected, without asking the database, with probability
//!
//! ```text
//! p = max(0, (requests - K * accepts) / (requests + 1))
//! ```
//!
//! over the last two minutes. With K = 2 nothing is rejected while at least half of the loads
//! succeed, and a database that fails them all is asked often enough to notice that it is back.
//!
//! # What is counted, and when
//!
//! In the book `requests` are all that the application wanted, rejected ones included. Here they
//! are those that were sent. With the book's, two minutes without a success at `d` loads a second
//! leave `120 d` requests in the window and no accepts. Afterwards `s = d * (1 - p)`, which is
//! `2 a / 120` loads are sent each second, `a` being those that were accepted within the window; such
//! an `s` grows e-fold in 75 s (`s ~ exp(x t / 120)` with `x = 2 (1 - exp(-x))`), and has to grow
//! from `1 / 120` to `d / 2`: a quarter of an hour for 2,000 loads a second.
//!
//! Counted when sent, an outage leaves few requests, since few are sent: the `d / (r + 1)` that are
//! sent each second balance the `r / 120` that slide out at `r = sqrt(120 d)`. Accepts then grow
//! e-fold in `r / 2d` seconds. For 2,000 loads a second `r` is 490 instead of 240,000, that time an
//! eighth of a second, and all is served after two. The price is paid by the database, which is asked
//! `sqrt(d / 120)` times a second while it is out: 4 times for 2,000. The tests below measure both.
//!
//! A load counts as accepted when it is sent, and loses that when it fails, in the bucket in which it
//! was sent. So loads under way on a cold start do not shed each other, and a database that hangs is
//! noticed as its loads time out. One whose caller gave up says nothing, and keeps what it counted.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

const BUCKETS: usize = 24;

/// Of fewer loads in the window nothing can be told: with the formula alone a service that loads once
/// a minute would, after one failure, not load at all half of the time.
const LEAST: u64 = 10;

/// What the loads of one guard came to, of late.
#[derive(Debug)]
pub(super) struct Throttle {
    k: f64,
    bucket: Duration,
    window: Mutex<Window>,
}

#[derive(Debug, Default)]
struct Window {
    /// The first load. Not earlier: the guard may be made under another clock than that of the
    /// runtime it is used in.
    began: Option<Instant>,
    /// The number, since the first, of the bucket that is filled now.
    newest: u64,
    buckets: [Counts; BUCKETS],
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    requests: u64,
    accepts: u64,
}

/// The bucket in which a load was sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct SentIn(u64);

impl Throttle {
    pub(super) fn new(k: f64, window: Duration) -> Self {
        Self {
            k,
            bucket: window / BUCKETS as u32,
            window: Mutex::default(),
        }
    }

    /// Whether a load is rejected, for a random number in `[0, 1)`.
    pub(super) fn rejects(&self, random: f64) -> bool {
        random < self.probability()
    }

    /// The probability with which a load is rejected now.
    pub(super) fn probability(&self) -> f64 {
        let counts = self.now().total();
        probability(self.k, counts.requests, counts.accepts)
    }

    /// A load is sent.
    pub(super) fn sent(&self) -> SentIn {
        let mut window = self.now();
        let newest = window.newest;
        let counts = window.bucket(newest);
        counts.requests += 1;
        counts.accepts += 1;
        SentIn(newest)
    }

    /// A load that was sent then has failed.
    pub(super) fn failed(&self, sent: SentIn) {
        let mut window = self.now();
        if window.newest - sent.0 < BUCKETS as u64 {
            let counts = window.bucket(sent.0);
            counts.accepts = counts.accepts.saturating_sub(1);
        }
    }

    /// The window as it is now.
    fn now(&self) -> MutexGuard<'_, Window> {
        // Every change of it is whole, whatever happens elsewhere.
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let elapsed = now.saturating_duration_since(*window.began.get_or_insert(now));
        let number = elapsed.as_nanos() / self.bucket.as_nanos().max(1);
        window.slide_to(u64::try_from(number).unwrap_or(u64::MAX));
        window
    }
}

impl Window {
    fn slide_to(&mut self, number: u64) {
        // A clock that went back does not move it.
        let passed = number.saturating_sub(self.newest).min(BUCKETS as u64);
        self.newest = self.newest.max(number);
        for age in 0..passed {
            *self.bucket(self.newest - age) = Counts::default();
        }
    }

    fn bucket(&mut self, number: u64) -> &mut Counts {
        &mut self.buckets[(number % BUCKETS as u64) as usize]
    }

    fn total(&self) -> Counts {
        self.buckets
            .iter()
            .fold(Counts::default(), |sum, counts| Counts {
                requests: sum.requests + counts.requests,
                accepts: sum.accepts + counts.accepts,
            })
    }
}

fn probability(k: f64, requests: u64, accepts: u64) -> f64 {
    if requests < LEAST {
        return 0.0;
    }
    let (requests, accepts) = (requests as f64, accepts as f64);
    ((requests - k * accepts) / (requests + 1.0)).max(0.0)
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_few_failures_tell_nothing() {
        let throttle = throttle();
        for _ in 1..LEAST {
            let load = throttle.sent();
            throttle.failed(load);
            assert_eq!(throttle.probability(), 0.0);
        }
        let load = throttle.sent();
        throttle.failed(load);
        assert!(throttle.probability() > 0.9);
    }

    const MINUTES: Duration = Duration::from_secs(120);
    /// Loads wanted each second.
    const DEMAND: u32 = 2000;

    fn throttle() -> Throttle {
        Throttle::new(2.0, MINUTES)
    }

    /// A second of demand; how many loads are sent.
    async fn second(
        throttle: &Throttle,
        random: &mut Rng,
        mut fails: impl FnMut() -> bool,
        on_rejected: impl Fn(&Throttle),
    ) -> u32 {
        let mut sent = 0;
        for _ in 0..200 {
            for _ in 0..DEMAND / 200 {
                if throttle.rejects(random.f64()) {
                    on_rejected(throttle);
                    continue;
                }
                sent += 1;
                let load = throttle.sent();
                if fails() {
                    throttle.failed(load);
                }
            }
            advance(Duration::from_millis(5)).await;
        }
        sent
    }

    /// How many seconds it takes after four minutes without a success until all is served, and how
    /// many loads the database was sent in the last of the four minutes.
    async fn recovery(on_rejected: impl Fn(&Throttle) + Copy) -> (u32, u32) {
        let (throttle, mut random) = (throttle(), Rng::with_seed(1));
        let mut last = 0;
        for n in 0..240 {
            let sent = second(&throttle, &mut random, || true, on_rejected).await;
            last += if n < 180 { 0 } else { sent };
        }
        for seconds in 1..3600 {
            if second(&throttle, &mut random, || false, on_rejected).await == DEMAND {
                return (seconds, last);
            }
        }
        panic!("not in an hour");
    }

    #[test]
    fn the_books_formula() {
        assert_eq!(probability(2.0, 0, 0), 0.0);
        assert_eq!(probability(2.0, 100, 100), 0.0);
        assert_eq!(probability(2.0, 100, 50), 0.0);
        assert_eq!(probability(2.0, 99, 0), 0.99);
        assert_eq!(probability(2.0, 99, 25), 0.49);
        assert_eq!(probability(1.0, 99, 49), 0.5);
    }

    #[tokio::test(start_paused = true)]
    async fn the_decision_is_exact() {
        let throttle = throttle();
        for _ in 0..99 {
            let load = throttle.sent();
            throttle.failed(load);
        }
        assert!(throttle.rejects(0.0) && throttle.rejects(0.989));
        assert!(!throttle.rejects(0.99));
    }

    #[tokio::test(start_paused = true)]
    async fn a_cold_start_sheds_nothing_however_much_is_under_way() {
        let throttle = throttle();
        let under_way: Vec<_> = (0..1000)
            .map(|_| {
                assert!(!throttle.rejects(0.0));
                throttle.sent()
            })
            .collect();
        // A hung database: they time out.
        for load in under_way {
            throttle.failed(load);
        }
        assert!(throttle.rejects(0.99));
    }

    #[tokio::test(start_paused = true)]
    async fn a_database_that_fails_half_of_its_loads_is_asked_by_all() {
        let throttle = throttle();
        for n in 0..10_000 {
            assert!(!throttle.rejects(0.0), "after {n}");
            let load = throttle.sent();
            if n % 2 == 1 {
                throttle.failed(load);
            }
            advance(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_asked_little_and_full_service_is_back_in_seconds() {
        let (seconds, sent) = recovery(|_| ()).await;
        // sqrt(2000 / 120) each second, for a minute, is 245.
        assert!((150..=350).contains(&sent), "{sent} sent in a minute");
        assert!(seconds <= 4, "{seconds} s");
    }

    #[tokio::test(start_paused = true)]
    async fn with_rejected_loads_counted_as_in_the_book_recovery_would_take_a_quarter_of_an_hour() {
        let count_rejected = |throttle: &Throttle| {
            let rejected = throttle.sent();
            throttle.failed(rejected);
        };
        let (seconds, _) = recovery(count_rejected).await;
        assert!(seconds > 600, "{seconds} s");
    }

    #[tokio::test(start_paused = true)]
    async fn buckets_slide_out_one_by_one() {
        let throttle = throttle();
        let fails = || {
            let load = throttle.sent();
            throttle.failed(load);
            load
        };
        for _ in 1..10 {
            fails();
        }
        let early = fails();
        advance(MINUTES / 2).await;
        for _ in 0..10 {
            fails();
        }
        assert_eq!(throttle.probability(), 20.0 / 21.0);
        advance(MINUTES / 2).await;
        assert_eq!(throttle.probability(), 10.0 / 11.0);
        // The failure of a load whose bucket is gone is not that of another's.
        let new = throttle.sent();
        throttle.failed(early);
        assert_eq!(
            throttle.probability(),
            9.0 / 12.0,
            "eleven sent, one accepted"
        );
        throttle.failed(new);
        assert_eq!(throttle.probability(), 11.0 / 12.0);
        advance(Duration::from_secs(3600)).await;
        assert_eq!(throttle.probability(), 0.0);
    }
}
