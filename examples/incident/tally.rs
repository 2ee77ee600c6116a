//! What became of the requests, second by second of when they were due.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use crate::failures::{self, Failures};
use crate::faults::Outage;
use crate::latencies::Latencies;
use crate::load::{Ended, Ending, Load};
use crate::options::Timeline;

/// What is answered correctly within this is good.
pub(crate) const GOOD_WITHIN: Duration = Duration::from_millis(100);

/// Goodput of a second, in percent, from which on the service counts as recovered.
pub(crate) const RECOVERED_PERCENT: f64 = 99.0;

/// So many such seconds in a row.
pub(crate) const RECOVERED_SECONDS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Healthy,
    Fault,
    After,
    /// The fault, if any, is not ours.
    Watched,
}

impl Timeline {
    pub(crate) fn phase(&self, second: usize) -> Phase {
        let Some(Outage { when, .. }) = &self.outage else {
            return Phase::Watched;
        };
        match second {
            second if second < when.start as usize => Phase::Healthy,
            second if second < when.end as usize => Phase::Fault,
            _ => Phase::After,
        }
    }

    /// The seconds that are judged: those of the fault, or all if it is not known.
    fn judged(&self) -> Range<usize> {
        let judged = match &self.outage {
            Some(Outage { when, .. }) => when.clone(),
            None => 0..self.seconds,
        };
        judged.start as usize..judged.end as usize
    }
}

/// One second's requests.
#[derive(Clone, Debug)]
pub(crate) struct Second {
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) stored: u64,
    pub(crate) wrong: u64,
    pub(crate) errors: BTreeMap<String, u64>,
    pub(crate) good: u64,
    pub(crate) latencies: Latencies,
}

impl Second {
    fn new() -> Self {
        Self {
            hits: 0,
            misses: 0,
            stored: 0,
            wrong: 0,
            errors: BTreeMap::new(),
            good: 0,
            latencies: Latencies::new(),
        }
    }

    fn record(&mut self, ended: &Ended) {
        self.latencies.record(ended.latency);
        let correct = match &ended.ending {
            Ending::Hit => {
                self.hits += 1;
                true
            }
            // A correct answer, if not the one hoped for.
            Ending::Miss => {
                self.misses += 1;
                true
            }
            Ending::Stored => {
                self.stored += 1;
                true
            }
            Ending::Wrong => {
                self.wrong += 1;
                false
            }
            Ending::Failed(error) => {
                let kind = error.kind();
                *self.errors.entry(format!("{kind:?}")).or_default() += 1;
                false
            }
            Ending::Unanswered => {
                *self.errors.entry("Unanswered".to_owned()).or_default() += 1;
                false
            }
        };
        if correct && ended.latency <= GOOD_WITHIN {
            self.good += 1;
        }
    }

    /// Those of them that have ended: in the end, all.
    pub(crate) fn due(&self) -> u64 {
        self.latencies.count()
    }

    pub(crate) fn ok(&self) -> u64 {
        self.hits + self.stored
    }

    pub(crate) fn failed(&self) -> u64 {
        self.errors.values().sum()
    }

    pub(crate) fn goodput_percent(&self) -> f64 {
        percent(self.good, self.due())
    }
}

fn percent(part: u64, of: u64) -> f64 {
    match of {
        0 => 0.0,
        of => 100.0 * part as f64 / of as f64,
    }
}

/// All seconds of one client's run.
#[derive(Debug)]
pub(crate) struct Tally {
    rate: u64,
    seconds: Vec<Second>,
    failures: Failures,
}

impl Tally {
    pub(crate) fn new(load: Load) -> Self {
        Self {
            rate: load.rate.into(),
            seconds: vec![Second::new(); load.seconds as usize],
            failures: Failures::new(),
        }
    }

    pub(crate) fn record(&mut self, ended: &Ended) {
        self.seconds[ended.second].record(ended);
        if let Ending::Failed(error) = &ended.ending {
            failures::record(&mut self.failures, error, ended.latency);
        }
    }

    /// A second, once all that was due in it has ended.
    pub(crate) fn complete(&self, second: usize) -> Option<&Second> {
        let second = self.seconds.get(second)?;
        (second.due() == self.rate).then_some(second)
    }

    /// The seconds in which requests were due.
    pub(crate) fn seconds(&self) -> &[Second] {
        let run = self.seconds.iter().take_while(|second| second.due() > 0);
        &self.seconds[..run.count()]
    }

    /// Of the whole run.
    pub(crate) fn failures(&self) -> &Failures {
        &self.failures
    }

    pub(crate) fn summary(&self, timeline: &Timeline) -> Summary {
        let seconds = self.seconds();
        let judged = timeline.judged();
        let judged = &seconds[judged.start.min(seconds.len())..judged.end.min(seconds.len())];
        let sum = |of: fn(&Second) -> u64| seconds.iter().map(of).sum();
        let mut errors = BTreeMap::new();
        for (kind, count) in seconds.iter().flat_map(|second| &second.errors) {
            *errors.entry(kind.clone()).or_default() += count;
        }
        let slowest = seconds.iter().map(|second| second.latencies.max_ms());
        Summary {
            goodput_percent: percent(
                judged.iter().map(|second| second.good).sum(),
                judged.iter().map(Second::due).sum(),
            ),
            worst_second_percent: judged
                .iter()
                .map(Second::goodput_percent)
                .fold(100.0, f64::min),
            recovery_seconds: timeline
                .outage
                .as_ref()
                .and_then(|outage| recovery(seconds.get(outage.when.end as usize..)?)),
            requests: sum(Second::due),
            ok: sum(Second::ok),
            misses: sum(|second| second.misses),
            wrong: sum(|second| second.wrong),
            errors,
            max_ms: slowest.fold(0.0, f64::max),
        }
    }
}

/// How many of the seconds after the fault went by before several in a row were well, or all that
/// were left; `None` if that never was. One bad second much later is not the fault's.
fn recovery(after: &[Second]) -> Option<usize> {
    let recovered = |second: &Second| second.goodput_percent() >= RECOVERED_PERCENT;
    let well_from = |first: &usize| {
        let mut row = after[*first..].iter().take(RECOVERED_SECONDS);
        row.all(recovered)
    };
    (0..after.len()).find(well_from)
}

#[derive(Clone, Debug)]
pub(crate) struct Summary {
    /// In the fault; in the whole run where the fault is not ours.
    pub(crate) goodput_percent: f64,
    pub(crate) worst_second_percent: f64,
    pub(crate) recovery_seconds: Option<usize>,
    pub(crate) requests: u64,
    pub(crate) ok: u64,
    pub(crate) misses: u64,
    pub(crate) wrong: u64,
    pub(crate) errors: BTreeMap<String, u64>,
    pub(crate) max_ms: f64,
}

impl Summary {
    pub(crate) fn failed(&self) -> u64 {
        self.errors.values().sum()
    }
}
