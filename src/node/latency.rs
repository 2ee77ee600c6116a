//! How long requests to a node take, as far as hedging needs to know.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of doubling width, each in four: 0 to 4.3 s in microseconds.
const BUCKETS: usize = 88;

/// Fewer than this say nothing about a 95th percentile.
const ENOUGH: u64 = 40;

/// A histogram of answers since the last turn, which sets what is told until the next one.
#[derive(Debug)]
pub(super) struct Latencies {
    buckets: [AtomicU32; BUCKETS],
    /// In microseconds; 0 while it is unknown.
    p95: AtomicU64,
    /// Somebody has asked: until then nothing is counted.
    wanted: AtomicBool,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU32::new(0) }; BUCKETS],
            p95: AtomicU64::new(0),
            wanted: AtomicBool::new(false),
        }
    }
}

/// Four buckets for each power of two, so that a bucket is at most a quarter wide.
fn bucket(micros: u64) -> usize {
    if micros < 4 {
        return micros as usize;
    }
    let power = micros.ilog2() as usize;
    let quarter = (micros >> (power - 2)) as usize & 3;
    (power * 4 - 4 + quarter).min(BUCKETS - 1)
}

/// The end of a bucket, in microseconds.
fn end(bucket: usize) -> u64 {
    if bucket < 4 {
        return bucket as u64 + 1;
    }
    let (power, quarter) = (bucket / 4 + 1, bucket % 4);
    (5 + quarter as u64) << (power - 2)
}

impl Latencies {
    pub(super) fn record(&self, elapsed: Duration) {
        if !self.wanted.load(Ordering::Relaxed) {
            return;
        }
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(micros)].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn p95(&self) -> Option<Duration> {
        if !self.wanted.load(Ordering::Relaxed) {
            self.wanted.store(true, Ordering::Relaxed);
        }
        match self.p95.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }

    /// Takes stock, if enough has been seen since the last time.
    pub(super) fn turn(&self) {
        if !self.wanted.load(Ordering::Relaxed) {
            return;
        }
        let counts = self
            .buckets
            .each_ref()
            .map(|count| u64::from(count.load(Ordering::Relaxed)));
        let total: u64 = counts.iter().sum();
        if total < ENOUGH {
            return;
        }
        let mut above = total / 20;
        let found = counts.iter().rposition(|&count| {
            let here = count > above;
            above = above.saturating_sub(count);
            here
        });
        if let Some(found) = found {
            self.p95.store(end(found), Ordering::Relaxed);
        }
        for (bucket, count) in self.buckets.iter().zip(counts) {
            bucket.fetch_sub(count as u32, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_at_most_a_quarter_wide() {
        for micros in 0..100_000 {
            let found = bucket(micros);
            assert!(micros < end(found), "{micros} is in {found}");
            assert!(
                found == 0 || micros >= end(found - 1),
                "{micros} is in {found}"
            );
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn the_95th_percentile_is_found_within_a_quarter() {
        let latencies = Latencies::default();
        latencies.turn();
        assert_eq!(latencies.p95(), None);
        for micros in 1..=1000 {
            latencies.record(Duration::from_micros(micros));
        }
        latencies.turn();
        let p95 = latencies.p95().unwrap().as_micros();
        assert!((950..=1200).contains(&p95), "{p95}");
        latencies.turn();
        assert!(latencies.p95().is_some(), "nothing new changes nothing");
    }
}
