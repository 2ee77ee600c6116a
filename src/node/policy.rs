//! When to open the gate: what has been seen of a node, and how much of it is too much.
//!
//! Three things open it here: time-outs in a row, the share of requests that failed, and the share
//! that were slow, both over the last ten seconds. Hard signals (a refused connect, connections
//! that answer nothing) need no counting and do not come here.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

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
    settings: BreakerSettings,
    /// How long one attempt may take.
    attempt: Duration,
    began: Instant,
    buckets: [Bucket; BUCKETS as usize],
    /// Time-outs in a row, to be reset by a success without the lock.
    timeouts: AtomicU32,
    /// When the first and the last request of these were sent.
    streak: Mutex<Option<(Instant, Instant)>>,
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
            settings,
            attempt,
            began: Instant::now(),
            buckets: Default::default(),
            timeouts: AtomicU32::new(0),
            streak: Mutex::new(None),
        }
    }

    /// An answer later than this is a slow one.
    pub(crate) fn slow_after(&self) -> Duration {
        self.settings.slow_call.unwrap_or(self.attempt / 2)
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
        self.bucket(now)
            .answered
            .fetch_add(requests, Ordering::Relaxed);
    }

    /// So many requests, the first of them sent then, were not answered as soon as they should
    /// have been. They are counted as answered, or as failed, besides.
    pub(super) fn slow(&self, requests: u32, sent_at: Instant, now: Instant) -> Option<Trip> {
        self.note(SLOW, requests, sent_at, now);
        let (slow, of) = self.share(SLOW, LEAST_SPAN, sent_at, now)?;
        over(slow, of, self.settings.slow_call_rate).then_some(Trip::Slow { slow, of })
    }

    /// A request failed, and it is the node's fault.
    pub(super) fn failed(&self, sent_at: Instant, now: Instant) -> Option<Trip> {
        self.note(FAILED, 1, sent_at, now);
        let least_span = LEAST_SPAN.min(self.attempt.saturating_mul(LEAST_ATTEMPTS));
        let (failed, of) = self.share(FAILED, least_span, sent_at, now)?;
        over(failed, of, self.settings.failure_rate).then_some(Trip::Failures { failed, of })
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
        let spread = last.saturating_duration_since(first) >= self.attempt;
        (count >= self.settings.consecutive_timeouts && spread).then_some(Trip::Timeouts(count))
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
        (of >= self.settings.minimum_requests && span >= least_span).then_some((counted, of))
    }
}

fn over(counted: u32, of: u32, percent: u32) -> bool {
    u64::from(counted) * 100 >= u64::from(of) * u64::from(percent)
}
