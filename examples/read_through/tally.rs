//! What became of the requests of a second, or of more.

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::service::Outcome;

pub(crate) struct Tally {
    pub(crate) seconds: u32,
    /// That were due.
    pub(crate) requests: u64,
    /// Of those that have ended, whenever they were due.
    outcomes: [u64; Outcome::ALL.len()],
    /// Microseconds from when a request was due to its end.
    latencies: Histogram<u64>,
    /// That the database was asked to make.
    pub(crate) loads: u64,
    pub(crate) most_loads: u64,
    /// Of the database, the most that were in use at once.
    pub(crate) most_connections: usize,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            seconds: 0,
            requests: 0,
            outcomes: [0; Outcome::ALL.len()],
            latencies: Histogram::new_with_max(60_000_000, 3).expect("three digits are possible"),
            loads: 0,
            most_loads: 0,
            most_connections: 0,
        }
    }

    pub(crate) fn record(&mut self, outcome: Outcome, latency: Duration) {
        self.outcomes[outcome as usize] += 1;
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.latencies.saturating_record(micros);
    }

    /// A second is over, in which the database was asked so much.
    pub(crate) fn close(&mut self, loads: u64, most_connections: usize) {
        self.seconds = 1;
        self.loads = loads;
        self.most_loads = loads;
        self.most_connections = most_connections;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.seconds += other.seconds;
        self.requests += other.requests;
        for (sum, count) in self.outcomes.iter_mut().zip(other.outcomes) {
            *sum += count;
        }
        self.latencies
            .add(&other.latencies)
            .expect("they have the same bounds");
        self.loads += other.loads;
        self.most_loads = self.most_loads.max(other.most_loads);
        self.most_connections = self.most_connections.max(other.most_connections);
    }

    pub(crate) fn count(&self, outcome: Outcome) -> u64 {
        self.outcomes[outcome as usize]
    }

    /// Of what has ended.
    pub(crate) fn percent(&self, outcome: Outcome) -> f64 {
        let ended: u64 = self.outcomes.iter().sum();
        100.0 * self.count(outcome) as f64 / ended.max(1) as f64
    }

    pub(crate) fn p99_ms(&self) -> f64 {
        self.latencies.value_at_quantile(0.99) as f64 / 1_000.0
    }
}
