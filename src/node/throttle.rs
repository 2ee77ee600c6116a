//! How many requests a node may have while it answers late.
//!
//! Requests that a node is given beyond what it can do wait at it, each for all before it, until all of them are too
//! late: it does nothing else then but what nobody waits for any more. So when answers come late the limit is lowered
//! to what it can answer in time. By Little's law so many are at a node as it answers in the time that each takes;
//! if that is twice the time it may take, half as many are what it can do. While requests are refused for it the
//! limit rises again, little by little, to the configured one; so goodput stays at what the node can do, whatever
//! that is, and what is too much is refused at once. Without late answers it rises by more, and soon is forgotten: a
//! hiccup must not refuse what comes long after it.
//!
//! Nothing of it is on the way of a request that is answered in time.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::bulkhead::Limit;

/// It is not lowered under this, nor while no more are in flight: so few are no overload, and a node that is slow with
/// them is so by itself.
const LEAST: usize = 32;

/// So many answers must be late and none in time. Where too many are queued all are; where only some are late it is for
/// something else, and fewer requests would not help.
const IN_A_ROW: u64 = 16;
/// However long it is, it ends soon.
const ROW_KEPT: u64 = 128;
/// And for so much of the time that an answer may take: what comes together is one event.
const ROW_SHARE: u32 = 8;

/// It is lowered to so much of what would take all the time there is, so that most answers are not late while it
/// rises again.
const SHARE: f64 = 0.5;

/// It rises by a part of itself: one in so many,
const RISE: usize = 32;
/// and one in so many once no answer has been late for a while,
const FAST_RISE: usize = 4;
const A_WHILE: Duration = Duration::from_secs(1);
/// and to the configured one after a long one.
const A_LONG_WHILE: Duration = Duration::from_secs(10);

/// The places of a node.
#[derive(Debug)]
pub(super) struct Throttle {
    places: Limit,
    /// As configured.
    most: AtomicUsize,
    /// As it is now; under its lock it is changed, and nowhere else.
    limit: AtomicUsize,
    changing: Mutex<()>,
    began: Instant,
    /// When it may be lowered, or raised, again, in microseconds since it began: what a change does shows only after a
    /// while.
    lowers: AtomicU64,
    rises: AtomicU64,
    /// When an answer was late.
    late_at: AtomicU64,
    row: Mutex<Row>,
}

/// Answers in a row that were late.
#[derive(Debug, Default)]
struct Row {
    length: u64,
    /// All answers that there had ever been before it.
    before: u64,
    /// When the first of them came, in microseconds.
    since: u64,
}

/// Answers that were late.
#[derive(Clone, Copy, Debug)]
pub(super) struct Late {
    /// The first of them.
    pub(super) took: Duration,
    pub(super) requests: u64,
    /// All that there have ever been, these included.
    pub(super) answers: u64,
}

impl Throttle {
    pub(super) fn new(most: usize) -> Self {
        Self {
            places: Limit::new(most, 0),
            most: AtomicUsize::new(most),
            limit: AtomicUsize::new(most),
            changing: Mutex::new(()),
            began: Instant::now(),
            lowers: AtomicU64::new(0),
            rises: AtomicU64::new(0),
            late_at: AtomicU64::new(0),
            row: Mutex::default(),
        }
    }

    /// Another limit from now on.
    pub(super) fn configure(&self, most: usize) {
        self.most.store(most, Ordering::Relaxed);
        self.change(|_, most| most);
    }

    pub(super) fn places(&self) -> &Limit {
        &self.places
    }

    /// How many may be in flight now, for whoever asks once in a while.
    pub(super) fn limit_at(&self, now: Instant) -> usize {
        let since = self.late_before(self.micros(now));
        if self.is_lowered() && since >= in_micros(A_LONG_WHILE) {
            self.change(|_, most| most);
        }
        self.limit()
    }

    fn late_before(&self, micros: u64) -> u64 {
        micros.saturating_sub(self.late_at.load(Ordering::Relaxed))
    }

    fn limit(&self) -> usize {
        self.limit.load(Ordering::Relaxed)
    }

    /// Whether that is less than configured.
    pub(super) fn is_lowered(&self) -> bool {
        self.limit() < self.most.load(Ordering::Relaxed)
    }

    /// Answers took longer than they may.
    pub(super) fn slow(&self, late: Late, may: Duration, now: Instant) {
        let Late { took, .. } = late;
        let in_flight = self.places.in_flight();
        let micros = self.micros(now);
        let all_are = self.all_are(late, micros, may / ROW_SHARE);
        if took <= may || in_flight <= LEAST {
            return;
        }
        self.late_at.fetch_max(micros, Ordering::Relaxed);
        // Sooner than it may rise: what has come to much comes to too much soon.
        if !all_are || !turn(&self.lowers, micros, may / 2) {
            return;
        }
        let in_time = may.as_secs_f64() / took.as_secs_f64();
        let fits = (in_flight as f64 * in_time * SHARE) as usize;
        self.change(|limit, most| fits.max(LEAST.min(most)).min(limit));
    }

    /// Whether they have been late for a while without one in time among them.
    fn all_are(&self, late: Late, micros: u64, least: Duration) -> bool {
        let mut row = self.row.lock().unwrap_or_else(PoisonError::into_inner);
        row.length = row.length.saturating_add(late.requests);
        let others = late
            .answers
            .saturating_sub(row.before.saturating_add(row.length));
        // Where several threads count, one may have counted what it is about to call late.
        if others.saturating_mul(8) > row.length.saturating_add(32) {
            row.length = late.requests;
            row.before = late.answers.saturating_sub(late.requests);
            row.since = micros;
        }
        if row.length > ROW_KEPT {
            row.length = ROW_KEPT;
            row.before = late.answers.saturating_sub(ROW_KEPT);
        }
        row.length >= IN_A_ROW && micros.saturating_sub(row.since) >= in_micros(least)
    }

    /// One was refused.
    pub(super) fn refused(&self, may: Duration, now: Instant) {
        if !self.is_lowered() {
            return;
        }
        let micros = self.micros(now);
        let since = self.late_before(micros);
        if since < in_micros(may) || !turn(&self.rises, micros, may) {
            return;
        }
        self.change(|limit, most| match Duration::from_micros(since) {
            since if since >= A_LONG_WHILE => most,
            since if since >= A_WHILE => (limit + limit / FAST_RISE).min(most),
            _ => (limit + limit / RISE + 1).min(most),
        });
    }

    fn micros(&self, now: Instant) -> u64 {
        in_micros(now.saturating_duration_since(self.began))
    }

    fn change(&self, to: impl FnOnce(usize, usize) -> usize) {
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let limit = to(self.limit(), self.most.load(Ordering::Relaxed));
        self.limit.store(limit, Ordering::Relaxed);
        // Nobody waits in its queue, so nobody is woken.
        self.places.set(limit, 0);
        drop(changing);
    }
}

/// More than a lifetime, and far from overflowing.
fn in_micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).map_or(u64::MAX / 4, |micros| micros.min(u64::MAX / 4))
}

/// Whether `next` has come; to one of those who ask, and not again before a pause.
fn turn(next: &AtomicU64, now: u64, pause: Duration) -> bool {
    let known = next.load(Ordering::Relaxed);
    now >= known
        && next
            .compare_exchange(
                known,
                now + in_micros(pause),
                Ordering::Relaxed,
                Ordering::Relaxed,
            )
            .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAY: Duration = Duration::from_millis(15);

    fn after(throttle: &Throttle, millis: u64) -> Instant {
        throttle.began + Duration::from_millis(millis)
    }

    fn enter(throttle: &Throttle, count: usize) {
        for _ in 0..count {
            assert!(throttle.places().try_enter());
        }
    }

    /// As all that has been answered lately.
    fn slow(throttle: &Throttle, took: Duration, may: Duration, now: Instant) {
        let requests = IN_A_ROW;
        let row = throttle.row.lock().unwrap();
        let answers = row.before + row.length + requests;
        drop(row);
        let late = Late {
            took,
            requests,
            answers,
        };
        throttle.slow(late, may, now);
    }

    #[test]
    fn late_answers_lower_the_limit_to_what_can_be_answered_in_time() {
        let throttle = Throttle::new(16_384);
        enter(&throttle, 1_000);
        slow(&throttle, MAY, MAY, after(&throttle, 20));
        assert!(!throttle.is_lowered(), "in time is not late");
        slow(&throttle, MAY * 2, MAY, after(&throttle, 20));
        assert_eq!(throttle.limit(), 250);
        assert!(!throttle.places().try_enter(), "who is inside stays");
        // All that is late together is one event.
        slow(&throttle, MAY * 4, MAY, after(&throttle, 21));
        assert_eq!(throttle.limit(), 250);
        slow(&throttle, MAY * 4, MAY, after(&throttle, 28));
        assert_eq!(throttle.limit(), 125);
        // It does not rise by an answer that is late.
        slow(&throttle, MAY + MAY / 8, MAY, after(&throttle, 40));
        assert_eq!(throttle.limit(), 125);
        // Those who are refused do not keep it from being lowered.
        throttle.refused(MAY, after(&throttle, 60));
        assert_eq!(throttle.limit(), 129);
        slow(&throttle, MAY * 10, MAY, after(&throttle, 60));
        assert_eq!(throttle.limit(), 50);
    }

    #[test]
    fn however_many_were_late_some_in_time_are_enough() {
        let throttle = Throttle::new(16_384);
        enter(&throttle, 1_000);
        let late = |requests, answers, millis| {
            let took = MAY * 2;
            let late = Late {
                took,
                requests,
                answers,
            };
            throttle.slow(late, MAY, after(&throttle, millis));
            throttle.limit()
        };
        assert_eq!(late(100_000, 100_000, 20), 250);
        throttle.configure(16_384);
        assert_eq!(late(50, 100_100, 40), 16_384);
    }

    #[test]
    fn few_requests_are_no_overload_however_late_their_answers_are() {
        let throttle = Throttle::new(16_384);
        enter(&throttle, LEAST);
        slow(&throttle, MAY * 100, MAY, after(&throttle, 20));
        assert!(!throttle.is_lowered());
        enter(&throttle, 1);
        slow(&throttle, MAY * 100, MAY, after(&throttle, 20));
        assert_eq!(throttle.limit(), LEAST);
    }

    #[test]
    fn the_limit_rises_while_requests_are_refused_and_no_further_than_configured() {
        let throttle = Throttle::new(1_000);
        enter(&throttle, 400);
        slow(&throttle, MAY * 2, MAY, after(&throttle, 20));
        assert_eq!(throttle.limit(), 100);
        throttle.refused(MAY, after(&throttle, 34));
        assert_eq!(throttle.limit(), 100, "too soon");
        // Nor while answers are late.
        slow(&throttle, MAY * 2, MAY, after(&throttle, 22));
        throttle.refused(MAY, after(&throttle, 36));
        assert_eq!(throttle.limit(), 100, "too soon");
        throttle.refused(MAY, after(&throttle, 37));
        assert_eq!(throttle.limit(), 104);
        throttle.refused(MAY, after(&throttle, 38));
        assert_eq!(throttle.limit(), 104, "too soon");
        let mut now = 52;
        while throttle.is_lowered() {
            let before = throttle.limit();
            throttle.refused(MAY, after(&throttle, now));
            assert!(throttle.limit() > before);
            now += 15;
            assert!(now < 1_500, "it takes too long");
        }
        assert_eq!(throttle.limit(), 1_000);
    }

    #[test]
    fn what_was_late_a_while_ago_is_made_up_for_soon_and_then_forgotten() {
        let throttle = Throttle::new(16_384);
        enter(&throttle, 400);
        slow(&throttle, MAY * 2, MAY, after(&throttle, 20));
        assert_eq!(throttle.limit(), 100);
        throttle.refused(MAY, after(&throttle, 1_020));
        assert_eq!(throttle.limit(), 125);
        throttle.refused(MAY, after(&throttle, 10_019));
        assert_eq!(throttle.limit(), 156);
        throttle.refused(MAY, after(&throttle, 10_040));
        assert!(!throttle.is_lowered());
    }

    #[test]
    fn another_configuration_replaces_what_was_learnt() {
        let throttle = Throttle::new(1_000);
        enter(&throttle, 400);
        slow(&throttle, MAY * 2, MAY, after(&throttle, 20));
        throttle.configure(500);
        assert_eq!((throttle.limit(), throttle.is_lowered()), (500, false));
    }
}
