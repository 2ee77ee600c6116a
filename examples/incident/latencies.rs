//! How long things took.

use std::time::Duration;

use hdrhistogram::Histogram;

/// How long requests took, from when they were due.
#[derive(Clone, Debug)]
pub(crate) struct Latencies {
    microseconds: Histogram<u64>,
}

impl Latencies {
    pub(crate) fn new() -> Self {
        let minute = 60_000_000;
        Self {
            microseconds: Histogram::new_with_max(minute, 3).expect("these bounds are valid"),
        }
    }

    pub(crate) fn record(&mut self, latency: Duration) {
        self.microseconds
            .saturating_record(latency.as_micros() as u64);
    }

    pub(crate) fn count(&self) -> u64 {
        self.microseconds.len()
    }

    pub(crate) fn quantile_ms(&self, quantile: f64) -> f64 {
        self.microseconds.value_at_quantile(quantile) as f64 / 1_000.0
    }

    pub(crate) fn max_ms(&self) -> f64 {
        self.microseconds.max() as f64 / 1_000.0
    }
}
