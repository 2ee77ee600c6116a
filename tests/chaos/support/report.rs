//! What a run showed, second by second, and whether that is what it must show.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::time::Duration;

use tokio::time::Instant;
use tower_memcached::BreakerState;

use super::lateness::{EXCUSES_AN_ERROR, Stalls};
use super::load::{Asked, Ending, Sample};

/// A get is answered in time within this.
const IN_TIME: Duration = Duration::from_millis(100);
/// No call may take longer.
const LONGEST: Duration = Duration::from_millis(150);
const IN_TIME_PERCENT: f64 = 99.9;
const IN_TIME_PERCENT_OF_ANY_SECOND: f64 = 99.0;
/// Of the hit ratio before the fault.
const HIT_RATIO_PERCENT: f64 = 99.0;
/// So long after the fault has cleared all is as it was.
pub(crate) const RECOVERY: Duration = Duration::from_secs(5);
/// When more than this share of the calls is excused, the run says nothing.
const EXCUSED_PERCENT: f64 = 0.5;

/// A node's circuit breaker changed.
#[derive(Debug)]
pub(crate) struct Transition {
    pub(crate) at: Instant,
    pub(crate) node: usize,
    pub(crate) state: BreakerState,
    pub(crate) cause: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) name: &'static str,
    pub(crate) start: Instant,
    pub(crate) fault: Instant,
    pub(crate) cleared: Instant,
    pub(crate) end: Instant,
    pub(crate) samples: Vec<Sample>,
    pub(crate) stalls: Stalls,
    pub(crate) transitions: Vec<Transition>,
    /// The breakers when the run was over.
    pub(crate) states: Vec<BreakerState>,
    /// Nodes that came back empty have nothing of what was written before they did.
    pub(crate) came_back_empty: bool,
    /// A node that failed again and again is distrusted for longer each time: it need not be back after 5 s.
    pub(crate) flapped: bool,
    /// Keys that are not on their own node after recovery, of those looked for.
    pub(crate) astray: usize,
}

/// What is counted in a second.
#[derive(Clone, Debug, Default)]
struct Row {
    gets: usize,
    in_time: usize,
    hits: usize,
    /// Misses of what the cache should have.
    misses: usize,
    /// Misses that refilling explains.
    cold: usize,
    sets: usize,
    refills: usize,
    errors: BTreeMap<String, usize>,
    wrong: usize,
    stale: usize,
    excused: usize,
    longest: Duration,
    stalled: Duration,
}

impl Row {
    fn in_time_percent(&self) -> f64 {
        percent(self.in_time, self.gets)
    }

    fn hit_percent(&self) -> f64 {
        percent(self.hits, self.hits + self.misses)
    }

    fn raw_hit_percent(&self) -> f64 {
        percent(self.hits, self.hits + self.misses + self.cold)
    }
}

fn percent(part: usize, of: usize) -> f64 {
    if of == 0 {
        return 100.0;
    }
    100.0 * part as f64 / of as f64
}

impl Report {
    /// A sample's latency without what the machine took.
    fn latency(&self, sample: &Sample) -> Duration {
        let stalled = self.stalls.within(sample.due, sample.ended);
        sample.latency().saturating_sub(stalled)
    }

    /// Whether a failure is the machine's, which did nothing at all for too long.
    fn excused(&self, sample: &Sample) -> bool {
        let stalled = self.stalls.within(sample.due, sample.ended);
        sample.failed() && stalled >= EXCUSES_AN_ERROR
    }

    /// Whether it is no wonder that the cache does not have what was written then.
    fn is_cold(&self, written: Option<Instant>) -> bool {
        let Some(written) = written else {
            return true;
        };
        let home_by = match self.transitions.last() {
            Some(last) if self.flapped => last.at.max(self.cleared + RECOVERY),
            _ => self.cleared + RECOVERY,
        };
        // Written elsewhere, or on a node that has lost it since.
        let elsewhere = written >= self.fault && written < home_by;
        elsewhere || (self.came_back_empty && written < home_by)
    }

    fn row<'a>(&self, samples: impl IntoIterator<Item = &'a Sample>) -> Row {
        let mut row = Row::default();
        for sample in samples {
            self.count(&mut row, sample);
        }
        row
    }

    fn count(&self, row: &mut Row, sample: &Sample) {
        if self.excused(sample) {
            row.excused += 1;
            return;
        }
        let latency = self.latency(sample);
        row.longest = row.longest.max(latency);
        let is_get = matches!(sample.asked, Asked::Get | Asked::ReadBack);
        row.gets += usize::from(is_get);
        row.sets += usize::from(sample.asked == Asked::Set);
        row.refills += usize::from(sample.asked == Asked::Refill);
        let mut answered = false;
        match sample.ending {
            Ending::Hit => {
                row.hits += 1;
                answered = true;
            }
            Ending::Miss { written } => {
                if self.is_cold(written) {
                    row.cold += 1;
                } else {
                    row.misses += 1;
                }
                answered = true;
            }
            Ending::Stored => {}
            Ending::Wrong => row.wrong += 1,
            // Not what was asked for, but in time: it has a column of its own.
            Ending::Stale { .. } => {
                row.stale += 1;
                answered = true;
            }
            Ending::Failed(kind) => *row.errors.entry(format!("{kind:?}")).or_default() += 1,
            Ending::Unanswered => *row.errors.entry("Unanswered".to_owned()).or_default() += 1,
        }
        row.in_time += usize::from(is_get && answered && latency <= IN_TIME);
    }

    fn between(&self, from: Instant, to: Instant) -> Row {
        let due = self.samples.iter().filter(|sample| {
            sample.asked != Asked::ReadBack && sample.due >= from && sample.due < to
        });
        let mut row = self.row(due);
        row.stalled = self.stalls.within(from, to);
        row
    }

    /// The whole seconds from one time on, until another.
    fn seconds(&self, from: Instant, to: Instant) -> impl Iterator<Item = (Instant, Row)> {
        let second = Duration::from_secs(1);
        std::iter::successors(Some(from), move |&from| Some(from + second))
            .take_while(move |&from| from + second <= to)
            .map(move |from| (from, self.between(from, from + second)))
    }

    fn since_start(&self, at: Instant) -> String {
        format!("{:.3} s", (at - self.start).as_secs_f64())
    }

    /// Everything that is not as it must be, one sentence each.
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        let mut expect = |holds: bool, what: String| {
            if !holds {
                failures.push(what);
            }
        };
        let fault = self.between(self.fault, self.cleared);
        expect(
            fault.in_time_percent() >= IN_TIME_PERCENT,
            format!(
                "{:.2} % of the gets in the fault were answered within {IN_TIME:?}, {IN_TIME_PERCENT} % must be",
                fault.in_time_percent()
            ),
        );
        for (from, row) in self.seconds(self.fault, self.cleared) {
            expect(
                row.in_time_percent() >= IN_TIME_PERCENT_OF_ANY_SECOND,
                format!(
                    "{:.2} % of the gets in the second from {} were answered within {IN_TIME:?}",
                    row.in_time_percent(),
                    self.since_start(from)
                ),
            );
        }
        let all = self.row(&self.samples);
        expect(all.errors.is_empty(), format!("errors: {:?}", all.errors));
        expect(
            all.longest <= LONGEST,
            format!(
                "a call took {:?}, {LONGEST:?} is the longest allowed",
                all.longest
            ),
        );
        expect(all.wrong == 0, format!("{} wrong values", all.wrong));
        expect(
            all.stale == 0,
            format!("{} stale reads{}", all.stale, self.stale_example()),
        );
        let healthy = self.between(self.start, self.fault).hit_percent();
        for (from, row) in self.seconds(self.cleared + RECOVERY, self.end) {
            expect(
                row.hit_percent() >= healthy * HIT_RATIO_PERCENT / 100.0,
                format!(
                    "the hit ratio of the second from {} is {:.2} %, before the fault it was {healthy:.2} %",
                    self.since_start(from),
                    row.hit_percent()
                ),
            );
        }
        expect(
            self.states
                .iter()
                .all(|&state| state == BreakerState::Closed),
            format!("the breakers are {:?} after recovery", self.states),
        );
        let late = self
            .transitions
            .iter()
            .filter(|transition| transition.at > self.cleared + RECOVERY)
            .count();
        expect(
            late == 0 || self.flapped,
            format!("{late} changes of breakers later than {RECOVERY:?} after the fault"),
        );
        expect(
            self.astray == 0,
            format!(
                "{} keys are not on their own node after recovery",
                self.astray
            ),
        );
        failures
    }

    /// Whether the machine did so little that failures may be its own. A wrong value or a stale read never is.
    pub(crate) fn is_disturbed(&self) -> bool {
        let all = self.row(&self.samples);
        if all.wrong + all.stale > 0 {
            return false;
        }
        percent(all.excused, self.samples.len()) > EXCUSED_PERCENT
            || self.stalls.within(self.start, self.end) > (self.end - self.start) / 50
    }

    fn stale_example(&self) -> String {
        let example = self
            .samples
            .iter()
            .find(|sample| matches!(sample.ending, Ending::Stale { .. }));
        example.map_or_else(String::new, |sample| {
            format!(
                ", the first {:?} at {}: {:?}",
                sample.asked,
                self.since_start(sample.due),
                sample.ending
            )
        })
    }

    /// The figures of the whole run in one line.
    pub(crate) fn summary(&self) -> String {
        let (fault, all) = (
            self.between(self.fault, self.cleared),
            self.row(&self.samples),
        );
        let worst = self
            .seconds(self.fault, self.cleared)
            .map(|(_, row)| row.in_time_percent())
            .fold(100.0, f64::min);
        let after: Vec<_> = self
            .seconds(self.cleared + RECOVERY, self.end)
            .map(|(_, row)| format!("{:.1} ({:.1})", row.hit_percent(), row.raw_hit_percent()))
            .collect();
        format!(
            "in time {:.2} %, worst second {worst:.2} %, errors {:?}, longest {:.0} ms, wrong {}, stale {}, hit ratio \
             after recovery (with first reads) {}, excused {}",
            fault.in_time_percent(),
            all.errors,
            all.longest.as_secs_f64() * 1e3,
            all.wrong,
            all.stale,
            after.join(", "),
            all.excused
        )
    }
}

/// The table: one line for each second of when requests were due.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.name, self.summary())?;
        writeln!(
            f,
            "second  phase     gets  in time   hits  miss  cold  hit %   sets  refill  wrong  stale  longest  stalled  \
             excused  errors"
        )?;
        for (second, (from, row)) in self.seconds(self.start, self.end).enumerate() {
            // The fault is cleared some milliseconds after a second begins.
            let phase = match from + Duration::from_millis(500) {
                middle if middle < self.fault => "healthy",
                middle if middle < self.cleared => "FAULT",
                middle if middle < self.cleared + RECOVERY => "recovery",
                _ => "after",
            };
            let mut errors = String::new();
            for (kind, count) in &row.errors {
                write!(errors, "{kind} {count} ")?;
            }
            writeln!(
                f,
                "{second:>6}  {phase:<8} {:>5}  {:>5.1} % {:>6} {:>5} {:>5}  {:>5.1}  {:>5}  {:>6}  {:>5}  {:>5}  \
                 {:>4.0} ms  {:>4.0} ms  {:>7}  {errors}",
                row.gets,
                row.in_time_percent(),
                row.hits,
                row.misses,
                row.cold,
                row.raw_hit_percent(),
                row.sets,
                row.refills,
                row.wrong,
                row.stale,
                row.longest.as_secs_f64() * 1e3,
                row.stalled.as_secs_f64() * 1e3,
                row.excused,
            )?;
        }
        let read_back: Vec<_> = self
            .samples
            .iter()
            .filter(|sample| sample.asked == Asked::ReadBack)
            .collect();
        let row = self.row(read_back.iter().copied());
        writeln!(
            f,
            "read back: {} keys, {} hits, {} misses, {} cold, {} wrong, {} stale, errors {:?}; {} keys astray",
            row.gets, row.hits, row.misses, row.cold, row.wrong, row.stale, row.errors, self.astray
        )?;
        writeln!(
            f,
            "the fault began at {} and was cleared at {}",
            self.since_start(self.fault),
            self.since_start(self.cleared)
        )?;
        for transition in &self.transitions {
            let cause = transition.cause.as_deref().unwrap_or("");
            writeln!(
                f,
                "{:>10}  node {} {:?}  {cause}",
                self.since_start(transition.at),
                transition.node,
                transition.state
            )?;
        }
        Ok(())
    }
}
