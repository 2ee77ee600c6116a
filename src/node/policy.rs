//! When to open the gate: what has been seen of a node, and how much of it is too much.
//!
//! Three things open it here: time-outs in a row, the share of requests that failed, and the share
//! that were slow, both over the last ten seconds. Hard signals (a refused connect, connections
//! that answer nothing) need no counting and do not come here.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::BreakerSettings;

/// The window is this many buckets of one second each.
const BUCKETS: u64 = 10;

/// What was slow must have been sent over at least this long: what goes wrong together is one
/// event. What failed, over so many attempt timeouts, or this long if that is less: a hung
/// connection, which takes two to be found and as long again to be made anew, is not a hung node.
const LEAST_SPAN: Duration = Duration::from_secs(1);
const LEAST_ATTEMPTS: u32 = 8;

/// Why the gate is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trip {
    Timeouts(u32),
    Failures { failed: u32, of: u32 },
    Slow { slow: u32, of: u32 },
}

#[derive(Debug)]
pub(crate) struct Policy {
    terms: ArcSwap<Terms>,
    began: Instant,
    buckets: [Bucket; BUCKETS as usize],
    /// Of all time.
    answers: AtomicU64,
    /// Time-outs in a row, to be reset by a success without the lock.
    timeouts: AtomicU32,
    /// When the first and the last request of these were sent.
    streak: Mutex<Option<(Instant, Instant)>>,
}

#[derive(Debug)]
struct Terms {
    settings: BreakerSettings,
    /// How long one attempt may take.
    attempt: Duration,
}

/// One second. Counts are relaxed: a few lost where one second ends and the next begins do not
/// change a share.
#[derive(Debug, Default)]
struct Bucket {
    /// Which second, counted from 1.
    second: AtomicU64,
    answered: AtomicU32,
    failed: AtomicU32,
    slow: AtomicU32,
    /// When the first of the failed and of the slow ones was sent, in milliseconds; 0 if none was.
    first_failed: AtomicU64,
    first_slow: AtomicU64,
}

/// One kind of bad news in a bucket.
type Field = fn(&Bucket) -> (&AtomicU32, &AtomicU64);

const FAILED: Field = |bucket| (&bucket.failed, &bucket.first_failed);
const SLOW: Field = |bucket| (&bucket.slow, &bucket.first_slow);

impl Policy {
    pub(super) fn new(settings: BreakerSettings, attempt: Duration) -> Self {
        Self {
            terms: ArcSwap::from_pointee(Terms { settings, attempt }),
            began: Instant::now(),
            buckets: Default::default(),
            answers: AtomicU64::new(0),
            timeouts: AtomicU32::new(0),
            streak: Mutex::new(None),
        }
    }

    /// Judges by these from now on.
    pub(super) fn apply(&self, settings: BreakerSettings, attempt: Duration) {
        self.terms.store(Arc::new(Terms { settings, attempt }));
    }

    /// An answer later than this is a slow one.
    pub(crate) fn slow_after(&self) -> Duration {
        let terms = self.terms.load();
        terms.settings.slow_call.unwrap_or(terms.attempt / 2)
    }

    /// Whether lateness is to have consequences.
    pub(super) fn minds_slowness(&self) -> bool {
        self.terms.load().settings.slow_call_rate <= 100
    }

    /// How many answers there have been.
    pub(super) fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Forgets everything: the node is a new one, in effect.
    pub(super) fn reset(&self) {
        self.timeouts.store(0, Ordering::Relaxed);
        for bucket in &self.buckets {
            bucket.second.store(0, Ordering::Relaxed);
        }
    }

    /// So many requests were answered, by whatever answer.
    pub(crate) fn answered(&self, requests: u32, now: Instant) {
        if self.timeouts.load(Ordering::Relaxed) != 0 {
            self.timeouts.store(0, Ordering::Relaxed);
        }
        self.answers
            .fetch_add(u64::from(requests), Ordering::Relaxed);
        self.bucket(now)
            .answered
            .fetch_add(requests, Ordering::Relaxed);
    }

    /// So many of the requests that were counted as answered, or as failed, the first of them sent
    /// then, took too long.
    pub(super) fn slow(&self, requests: u32, sent_at: Instant, now: Instant) -> Option<Trip> {
        self.note(SLOW, requests, sent_at, now);
        let (slow, of) = self.share(SLOW, LEAST_SPAN, sent_at, now)?;
        over(slow, of, self.terms.load().settings.slow_call_rate).then_some(Trip::Slow { slow, of })
    }

    /// A request failed, and it is the node's fault.
    pub(super) fn failed(&self, sent_at: Instant, now: Instant) -> Option<Trip> {
        self.note(FAILED, 1, sent_at, now);
        let terms = self.terms.load();
        let least_span = LEAST_SPAN.min(terms.attempt.saturating_mul(LEAST_ATTEMPTS));
        let (failed, of) = self.share(FAILED, least_span, sent_at, now)?;
        over(failed, of, terms.settings.failure_rate).then_some(Trip::Failures { failed, of })
    }

    /// A request timed out, and nothing below counts these in a row.
    pub(super) fn timed_out(&self, sent_at: Instant) -> Option<Trip> {
        let mut streak = self.streak.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.timeouts.fetch_add(1, Ordering::Relaxed) + 1;
        let (first, last) = match *streak {
            Some((first, last)) if count > 1 => (first.min(sent_at), last.max(sent_at)),
            _ => (sent_at, sent_at),
        };
        *streak = Some((first, last));
        // A burst that times out together is one event.
        let terms = self.terms.load();
        let spread = last.saturating_duration_since(first) >= terms.attempt;
        (count >= terms.settings.consecutive_timeouts && spread).then_some(Trip::Timeouts(count))
    }

    fn millis(&self, moment: Instant) -> u64 {
        let millis = moment.saturating_duration_since(self.began).as_millis() as u64;
        millis + 1
    }

    fn bucket(&self, now: Instant) -> &Bucket {
        let second = self.millis(now) / 1000 + 1;
        let bucket = &self.buckets[(second % BUCKETS) as usize];
        let known = bucket.second.load(Ordering::Relaxed);
        if known < second
            && bucket
                .second
                .compare_exchange(known, second, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            bucket.answered.store(0, Ordering::Relaxed);
            for field in [FAILED, SLOW] {
                let (count, first) = field(bucket);
                count.store(0, Ordering::Relaxed);
                first.store(0, Ordering::Relaxed);
            }
        }
        bucket
    }

    fn note(&self, field: Field, requests: u32, sent_at: Instant, now: Instant) {
        let (count, first) = field(self.bucket(now));
        count.fetch_add(requests, Ordering::Relaxed);
        let sent_at = self.millis(sent_at);
        let _ = first.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |known| {
            (known == 0 || sent_at < known).then_some(sent_at)
        });
    }

    /// How many of how many, if these are enough to judge by and spread enough.
    fn share(
        &self,
        field: Field,
        least_span: Duration,
        sent_at: Instant,
        now: Instant,
    ) -> Option<(u32, u32)> {
        let oldest = (self.millis(now) / 1000 + 1).saturating_sub(BUCKETS - 1);
        let (mut of, mut counted, mut first_sent) = (0u32, 0u32, self.millis(sent_at));
        for bucket in &self.buckets {
            if bucket.second.load(Ordering::Relaxed) < oldest.max(1) {
                continue;
            }
            let (count, first) = field(bucket);
            counted = counted.saturating_add(count.load(Ordering::Relaxed));
            of = of
                .saturating_add(bucket.answered.load(Ordering::Relaxed))
                .saturating_add(bucket.failed.load(Ordering::Relaxed));
            match first.load(Ordering::Relaxed) {
                0 => {}
                sent => first_sent = first_sent.min(sent),
            }
        }
        let span = Duration::from_millis(self.millis(sent_at) - first_sent);
        (of >= self.terms.load().settings.minimum_requests && span >= least_span)
            .then_some((counted, of))
    }
}

/// Over 100 % is never, even though slow requests are counted before all of them are answered.
fn over(counted: u32, of: u32, percent: u32) -> bool {
    percent <= 100 && u64::from(counted) * 100 >= u64::from(of) * u64::from(percent)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const ATTEMPT: Duration = Duration::from_millis(30);

    /// A policy, and a time at which it has been there for a while.
    fn policy(settings: BreakerSettings) -> (Policy, Instant) {
        let policy = Policy::new(settings, ATTEMPT);
        let now = policy.began + Duration::from_secs(100);
        (policy, now)
    }

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn three_timeouts_in_a_row_are_too_many() {
        let (policy, now) = policy(BreakerSettings::default());
        assert_eq!(policy.timed_out(now), None);
        assert_eq!(policy.timed_out(now + ATTEMPT), None);
        assert_eq!(policy.timed_out(now + ATTEMPT), Some(Trip::Timeouts(3)));
    }

    #[test]
    fn a_burst_that_times_out_together_is_one_event() {
        let (policy, now) = policy(BreakerSettings::default());
        for request in 0..100 {
            let sent_at = now + ATTEMPT * request / 100;
            assert_eq!(policy.timed_out(sent_at), None, "{request}");
        }
        assert_eq!(policy.timed_out(now + ATTEMPT), Some(Trip::Timeouts(101)));
    }

    #[test]
    fn an_answer_ends_a_row_of_timeouts() {
        let (policy, now) = policy(BreakerSettings::default());
        for round in 0..10 {
            let now = now + ATTEMPT * 9 * round;
            assert_eq!(policy.timed_out(now), None);
            assert_eq!(policy.timed_out(now + ATTEMPT), None);
            policy.answered(1, now + ATTEMPT);
        }
        policy.timed_out(now);
        policy.timed_out(now + ATTEMPT);
        policy.reset();
        assert_eq!(policy.timed_out(now + ATTEMPT * 2), None);
    }

    /// `good` answers, then a failure every tenth of a second: what comes of the last of `bad`.
    fn failures(good: u32, bad: u32) -> Option<Trip> {
        failures_each(millis(100), good, bad)
    }

    fn failures_each(interval: Duration, good: u32, bad: u32) -> Option<Trip> {
        let (policy, now) = policy(BreakerSettings::default());
        policy.answered(good, now);
        let outcome = |nth| {
            let sent_at = now + interval * nth;
            policy.failed(sent_at, sent_at + ATTEMPT)
        };
        (1..=bad).map(outcome).last().flatten()
    }

    #[test]
    fn half_of_all_requests_failing_is_too_much_if_there_are_enough() {
        assert_eq!(
            failures(20, 20),
            Some(Trip::Failures { failed: 20, of: 40 })
        );
        assert_eq!(failures(20, 19), None, "less than half");
        assert_eq!(failures(0, 19), None, "too few to judge by");
        assert_eq!(failures(0, 20), Some(Trip::Failures { failed: 20, of: 20 }));
        let few = failures(9, 11);
        assert_eq!(few, Some(Trip::Failures { failed: 11, of: 20 }));
        // The first and the last of ten are nine intervals apart.
        let just = ATTEMPT * LEAST_ATTEMPTS / 9 + millis(1);
        assert!(failures_each(just, 10, 10).is_some());
        let event = failures_each(just - millis(2), 10, 10);
        assert_eq!(event, None, "too close together");
    }

    #[test]
    fn four_fifths_of_all_requests_being_slow_is_too_much() {
        let (policy, now) = policy(BreakerSettings::default());
        policy.answered(100, now);
        assert_eq!(policy.slow(50, now, now), None);
        let later = now + LEAST_SPAN;
        assert_eq!(policy.slow(29, later, later), None);
        assert_eq!(
            policy.slow(1, later, later),
            Some(Trip::Slow { slow: 80, of: 100 })
        );
        assert_eq!(policy.slow_after(), ATTEMPT / 2);
    }

    #[test]
    fn what_was_ten_seconds_ago_does_not_count() {
        let (policy, now) = policy(BreakerSettings::default());
        for nth in 0..19 {
            assert_eq!(policy.failed(now + millis(100) * nth, now), None);
        }
        let later = now + Duration::from_secs(11);
        assert_eq!(policy.failed(later, later), None);
        let soon = now + Duration::from_secs(20);
        assert_eq!(
            policy.failed(soon, soon),
            None,
            "two of two, far apart, are not enough"
        );
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Answered(u32),
        /// Sent so long before.
        Failed(Duration),
        Slow(u32, Duration),
        TimedOut(Duration),
        Reset,
        Pass(Duration),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let age = || prop_oneof![0..40u64, 0..2_000u64].prop_map(millis);
        let pause = prop_oneof![4 => 0..50u64, 4 => 0..1_500u64, 1 => 8_000..12_000u64];
        let event = prop_oneof![
            4 => (0..4u32).prop_map(Event::Answered),
            8 => age().prop_map(Event::Failed),
            4 => (0..6u32, age()).prop_map(|(requests, age)| Event::Slow(requests, age)),
            4 => age().prop_map(Event::TimedOut),
            8 => pause.prop_map(millis).prop_map(Event::Pass),
        ];
        // Forgetting everything is rare.
        let event = prop_oneof![60 => event, 1 => Just(Event::Reset)];
        vec(event, 0..160)
    }

    /// One request, or several: found when, and sent when.
    #[derive(Clone, Copy)]
    struct Seen {
        kind: Kind,
        requests: u32,
        found: Instant,
        sent: Instant,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Answered,
        Failed,
        Slow,
    }

    /// Everything that has been seen, by its exact time.
    struct Model {
        settings: BreakerSettings,
        began: Instant,
        seen: Vec<Seen>,
        timeouts: Vec<Instant>,
    }

    impl Model {
        /// The window moves by whole seconds, counted from when the policy was made (less the
        /// millisecond that tells the first from never).
        fn second(&self, moment: Instant) -> u64 {
            (moment + millis(1) - self.began).as_secs()
        }

        fn saw(&mut self, kind: Kind, requests: u32, found: Instant, sent: Instant) {
            let seen = Seen {
                kind,
                requests,
                found,
                sent,
            };
            self.seen.push(seen);
        }

        /// Of the last window, if that is enough to judge by: how many of how many are this, when
        /// what is judged was just sent.
        fn share(&self, kind: Kind, now: Instant, sent: Instant) -> Option<(u32, u32)> {
            let recent = |seen: &&Seen| self.second(now) - self.second(seen.found) < BUCKETS;
            let count = |of: fn(Kind, Kind) -> bool| {
                let counted = self
                    .seen
                    .iter()
                    .filter(recent)
                    .filter(|seen| of(seen.kind, kind));
                counted.map(|seen| seen.requests).sum::<u32>()
            };
            let (counted, of) = (
                count(|seen, kind| seen == kind),
                count(|seen, _| seen != Kind::Slow),
            );
            let bad = self
                .seen
                .iter()
                .filter(recent)
                .filter(|seen| seen.kind == kind);
            let first = bad.map(|seen| seen.sent).min()?;
            let least = match kind {
                Kind::Failed => ATTEMPT * LEAST_ATTEMPTS,
                _ => LEAST_SPAN,
            };
            let apart = sent.saturating_duration_since(first) >= least;
            (of >= self.settings.minimum_requests && apart).then_some((counted, of))
        }
    }

    fn is_share(counted: u32, of: u32, percent: u32) -> bool {
        f64::from(counted) / f64::from(of) >= f64::from(percent) / 100.0
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn it_trips_when_the_exact_history_says_so(
            events in events(),
            failure_rate in prop_oneof![Just(50), Just(30), Just(101)],
            slow_call_rate in prop_oneof![Just(80), Just(25), Just(101)],
            minimum in prop_oneof![Just(20), Just(5)],
        ) {
            let settings = BreakerSettings::default()
                .failure_rate(failure_rate)
                .slow_call_rate(slow_call_rate)
                .minimum_requests(minimum);
            let (policy, mut now) = policy(settings.clone());
            let (seen, timeouts) = (Vec::new(), Vec::new());
            let mut model = Model { settings, began: policy.began, seen, timeouts };
            for event in events {
                match event {
                    Event::Answered(requests) => {
                        policy.answered(requests, now);
                        model.saw(Kind::Answered, requests, now, now);
                        model.timeouts.clear();
                    }
                    Event::Failed(age) => {
                        let sent = now - age;
                        model.saw(Kind::Failed, 1, now, sent);
                        let trips = model
                            .share(Kind::Failed, now, sent)
                            .filter(|&(failed, of)| failure_rate <= 100 && is_share(failed, of, failure_rate))
                            .map(|(failed, of)| Trip::Failures { failed, of });
                        prop_assert_eq!(policy.failed(sent, now), trips);
                    }
                    Event::Slow(requests, age) => {
                        let sent = now - age;
                        model.saw(Kind::Slow, requests, now, sent);
                        let trips = model
                            .share(Kind::Slow, now, sent)
                            .filter(|&(slow, of)| slow_call_rate <= 100 && is_share(slow, of, slow_call_rate))
                            .map(|(slow, of)| Trip::Slow { slow, of });
                        prop_assert_eq!(policy.slow(requests, sent, now), trips);
                    }
                    Event::TimedOut(age) => {
                        model.timeouts.push(now - age);
                        let sent = model.timeouts.iter();
                        let span = *sent.clone().max().unwrap() - *sent.min().unwrap();
                        let count = model.timeouts.len() as u32;
                        let trips = (count >= 3 && span >= ATTEMPT).then_some(Trip::Timeouts(count));
                        prop_assert_eq!(policy.timed_out(now - age), trips);
                    }
                    Event::Reset => {
                        policy.reset();
                        model.seen.clear();
                        model.timeouts.clear();
                    }
                    Event::Pass(time) => now += time,
                }
            }
        }
    }
}
