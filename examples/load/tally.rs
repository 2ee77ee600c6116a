//! What became of the requests, second by second of when they were due.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use tower_memcached::ErrorKind;

use crate::cpu::Usage;

/// How long things took.
#[derive(Clone, Debug)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    fn new() -> Self {
        let minute = 60_000_000;
        Self(Histogram::new_with_max(minute, 2).expect("these bounds are valid"))
    }

    fn record(&mut self, latency: Duration) {
        self.0.saturating_record(latency.as_micros() as u64);
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.len()
    }

    pub(crate) fn quantile(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.0.value_at_quantile(quantile))
    }

    fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("the bounds are the same");
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Right,
    /// Every key was stored, so it has been given up since.
    Miss,
    /// A value that is not the key's.
    Wrong,
    Failed(ErrorKind),
    /// By the service itself, which came to it too late to ask the client.
    Refused,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    /// The second in which it was due, from 0.
    pub(crate) second: usize,
    /// From when it was due.
    pub(crate) latency: Duration,
    pub(crate) ending: Ending,
}

/// One second's requests, or several seconds'.
#[derive(Clone, Debug)]
pub(crate) struct Second {
    pub(crate) seconds: u32,
    /// Requests that were due.
    pub(crate) offered: u64,
    /// Answered with what was stored, or stored, by the deadline.
    pub(crate) good: u64,
    pub(crate) misses: u64,
    pub(crate) wrong: u64,
    /// Never given to the client: by the service, which was too far behind.
    pub(crate) refused: u64,
    /// Errors other than those of what was shed.
    pub(crate) errors: Vec<(ErrorKind, u64)>,
    /// Of what was answered, in time or not.
    pub(crate) answered: Latencies,
    /// Of what was [`ErrorKind::Overloaded`].
    pub(crate) shed: Latencies,
    pub(crate) failed: Latencies,
    /// How much later than it was due the load was handed to the service: the generator's own fault.
    pub(crate) lag: Latencies,
    /// Of the service, at most.
    pub(crate) in_flight: usize,
    /// In bytes, at most.
    pub(crate) memory: u64,
    pub(crate) usage: Option<Usage>,
}

impl Second {
    fn new() -> Self {
        Self {
            seconds: 1,
            offered: 0,
            good: 0,
            misses: 0,
            wrong: 0,
            refused: 0,
            errors: Vec::new(),
            answered: Latencies::new(),
            shed: Latencies::new(),
            failed: Latencies::new(),
            lag: Latencies::new(),
            in_flight: 0,
            memory: 0,
            usage: None,
        }
    }

    fn record(&mut self, ended: &Ended, deadline: Duration) {
        match ended.ending {
            Ending::Right => {
                self.answered.record(ended.latency);
                self.good += u64::from(ended.latency <= deadline);
            }
            // No error, but the server had less to do than for a hit.
            Ending::Miss => {
                self.answered.record(ended.latency);
                self.misses += 1;
            }
            Ending::Wrong => self.wrong += 1,
            Ending::Refused => self.refused += 1,
            Ending::Failed(ErrorKind::Overloaded) => self.shed.record(ended.latency),
            Ending::Failed(kind) => {
                self.failed.record(ended.latency);
                self.count_errors(kind, 1);
            }
        }
    }

    fn count_errors(&mut self, kind: ErrorKind, count: u64) {
        match self.errors.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, known)) => *known += count,
            None => self.errors.push((kind, count)),
        }
    }

    /// Of all that has become something.
    pub(crate) fn ended(&self) -> u64 {
        self.answered.count() + self.shed.count() + self.failed.count() + self.wrong + self.refused
    }

    pub(crate) fn failures(&self) -> u64 {
        self.failed.count()
    }

    pub(crate) fn good_share(&self) -> f64 {
        self.good as f64 / self.offered.max(1) as f64
    }

    /// Goodput, a second.
    pub(crate) fn goodput(&self) -> f64 {
        self.good as f64 / f64::from(self.seconds)
    }

    /// Offered load, a second.
    pub(crate) fn load(&self) -> f64 {
        self.offered as f64 / f64::from(self.seconds)
    }

    /// What the client was given in time, a second.
    pub(crate) fn reached_the_client(&self) -> f64 {
        (self.offered - self.refused) as f64 / f64::from(self.seconds)
    }

    /// Errors that are not of what was shed, and misses.
    pub(crate) fn failed_share(&self) -> f64 {
        (self.failures() + self.misses) as f64 / self.offered.max(1) as f64
    }

    /// Several as one.
    pub(crate) fn sum<'a>(seconds: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut sum = Self::new();
        sum.seconds = 0;
        for second in seconds {
            sum.seconds += second.seconds;
            sum.offered += second.offered;
            sum.good += second.good;
            sum.misses += second.misses;
            sum.wrong += second.wrong;
            sum.refused += second.refused;
            for &(kind, count) in &second.errors {
                sum.count_errors(kind, count);
            }
            sum.answered.add(&second.answered);
            sum.shed.add(&second.shed);
            sum.failed.add(&second.failed);
            sum.lag.add(&second.lag);
            sum.in_flight = sum.in_flight.max(second.in_flight);
            sum.memory = sum.memory.max(second.memory);
            sum.usage = match (sum.usage, second.usage) {
                (Some(one), Some(other)) => Some(one + other),
                (one, other) => one.or(other),
            };
        }
        sum
    }
}

/// The seconds of a run, for whoever has something to add.
pub(crate) struct Board {
    deadline: Duration,
    seconds: Mutex<Vec<Second>>,
}

impl Board {
    pub(crate) fn new(seconds: usize, deadline: Duration) -> Self {
        Self {
            deadline,
            seconds: Mutex::new((0..seconds).map(|_| Second::new()).collect()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Second>> {
        self.seconds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(&self, ended: &[Ended]) {
        let mut seconds = self.lock();
        for ended in ended {
            seconds[ended.second].record(ended, self.deadline);
        }
    }

    /// So many were due, and were handed out so late; `refused` of them to nobody, for the service was too far
    /// behind.
    pub(crate) fn offered(&self, second: usize, count: u64, lag: Duration, refused: u64) {
        let second = &mut self.lock()[second];
        second.offered += count;
        second.lag.record(lag);
        second.refused += refused;
    }

    /// So much was in flight, and in memory.
    pub(crate) fn levels(&self, second: usize, in_flight: usize, memory: Option<u64>) {
        let second = &mut self.lock()[second];
        second.in_flight = second.in_flight.max(in_flight);
        second.memory = second.memory.max(memory.unwrap_or(0));
    }

    pub(crate) fn used(&self, second: usize, usage: Option<Usage>) {
        self.lock()[second].usage = usage;
    }

    pub(crate) fn second(&self, second: usize) -> Second {
        self.lock()[second].clone()
    }
}
