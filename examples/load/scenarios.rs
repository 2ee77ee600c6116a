//! What is done to the client, and what must come of it.

use crate::load::{Phase, Target, Wanted};
use crate::options::Options;
use crate::report;
use crate::tally::Second;

/// A burst is so many times the normal rate.
const BURST: u64 = 10;

/// Before the knee so much of what is offered is good.
const GOOD_SHARE: f64 = 0.99;

/// Past it, goodput is so much of the best that was seen.
const KEPT_SHARE: f64 = 0.90;

/// And so much at most fails in another way than by being shed.
const FAILED_SHARE: f64 = 0.01;

/// The ramp goes up by this, until it breaks, and then once more by this from the last step that was good.
const STEEP: f64 = 1.5;
const GENTLE: f64 = 1.1;

/// A second of less than so many requests a second is no load.
const LEAST_RATE: u64 = 100;

/// How many seconds what is overloaded may take to be well again.
const RECOVERY: u32 = 15;

/// So many seconds together say that it is.
const RECOVERED_SECONDS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scenario {
    Normal,
    Burst,
    OneKey,
    Ramp,
    Limited,
}

impl Scenario {
    pub(crate) const ALL: [Self; 5] = [
        Self::Normal,
        Self::Burst,
        Self::OneKey,
        Self::Ramp,
        Self::Limited,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Burst => "burst",
            Self::OneKey => "one-key",
            Self::Ramp => "ramp",
            Self::Limited => "limited",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Normal => "Normal load",
            Self::Burst => "Ten times the normal load, for a while",
            Self::OneKey => "Ten times the normal load, for a while, all of it on one key",
            Self::Ramp => "More and more load until it breaks, and then twice that",
            Self::Limited => {
                "Slow servers: more and more load until it breaks, and then twice that"
            }
        }
    }

    pub(crate) fn wanted(self) -> Wanted {
        match self {
            Self::OneKey => Wanted::One,
            _ => Wanted::Any,
        }
    }
}

/// A load that stayed the same.
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) seconds: Vec<Second>,
}

/// Something that must hold.
pub(crate) struct Verdict {
    pub(crate) holds: bool,
    pub(crate) says: String,
}

pub(crate) struct Run {
    pub(crate) scenario: Scenario,
    pub(crate) steps: Vec<Step>,
    pub(crate) verdicts: Vec<Verdict>,
    /// What is to be known besides.
    pub(crate) notes: Vec<String>,
}

impl Run {
    /// From the beginning.
    pub(crate) fn seconds(&self) -> impl Iterator<Item = &Second> {
        self.steps.iter().flat_map(|step| &step.seconds)
    }

    fn judge(&mut self, holds: bool, says: String) {
        self.verdicts.push(Verdict { holds, says });
    }
}

/// A scenario under way.
pub(crate) struct Stage<'a> {
    options: &'a Options,
    target: &'a Target,
    run: Run,
    elapsed: usize,
}

impl<'a> Stage<'a> {
    pub(crate) fn new(options: &'a Options, target: &'a Target, scenario: Scenario) -> Self {
        Self {
            options,
            target,
            run: Run {
                scenario,
                steps: Vec::new(),
                verdicts: Vec::new(),
                notes: Vec::new(),
            },
            elapsed: 0,
        }
    }

    /// `capacity` is that of the servers, where it is known.
    pub(crate) async fn play(mut self, capacity: Option<u64>) -> Run {
        match self.run.scenario {
            Scenario::Normal => self.normal().await,
            Scenario::Burst | Scenario::OneKey => self.burst().await,
            Scenario::Ramp | Scenario::Limited => {
                let start = capacity.map_or(self.options.rate, |capacity| capacity / 4);
                self.ramp(start.max(LEAST_RATE)).await;
            }
        }
        let all = Second::sum(self.run.seconds());
        let wrong = format!("{} values were wrong", all.wrong);
        self.run.judge(all.wrong == 0, wrong);
        let missing = all.offered - all.ended();
        let unanswered = format!("{missing} requests did not end in time");
        self.run.judge(missing == 0, unanswered);
        self.run
    }

    /// Loads that follow upon each other without a pause, each a step.
    async fn offer(&mut self, loads: &[(&'static str, Phase)]) -> Vec<Second> {
        let phases: Vec<Phase> = loads.iter().map(|(_, phase)| *phase).collect();
        let names: Vec<&str> = loads
            .iter()
            .flat_map(|(name, phase)| std::iter::repeat_n(*name, phase.seconds as usize))
            .collect();
        let elapsed = self.elapsed;
        let tell = |number: usize, second: &Second| {
            println!("{}", report::row(elapsed + number, names[number], second));
        };
        let mut seconds = self.target.offer(&phases, tell).await.into_iter();
        self.elapsed += names.len();
        let mut sums = Vec::new();
        for (name, phase) in loads {
            let seconds: Vec<_> = seconds.by_ref().take(phase.seconds as usize).collect();
            sums.push(Second::sum(&seconds));
            self.run.steps.push(Step { name, seconds });
        }
        sums
    }

    async fn step(&mut self, name: &'static str, rate: u64, seconds: u32) -> Second {
        let sums = self.offer(&[(name, Phase { rate, seconds })]).await;
        Second::sum(&sums)
    }

    fn is_well(&self, load: &Second) -> bool {
        load.good_share() >= GOOD_SHARE && load.answered.quantile(0.99) <= self.options.p99
    }

    async fn normal(&mut self) {
        let Options { rate, seconds, .. } = *self.options;
        let load = self.step("normal", rate, seconds).await;
        self.judge_normal("normal load", &load);
    }

    fn judge_normal(&mut self, what: &str, load: &Second) {
        let says = format!(
            "{what}: {:.2} % good, p99 {} ms (at least {:.0} %, in {} ms)",
            load.good_share() * 100.0,
            report::milliseconds(load.answered.quantile(0.99)),
            GOOD_SHARE * 100.0,
            self.options.p99.as_millis(),
        );
        self.run.judge(self.is_well(load), says);
    }

    async fn burst(&mut self) {
        let Options { rate, seconds, .. } = *self.options;
        let load = |rate| Phase { rate, seconds };
        let loads = [
            ("normal", load(rate)),
            ("burst", load(rate * BURST)),
            ("normal", load(rate)),
        ];
        let sums = self.offer(&loads).await;
        self.judge_normal("before", &sums[0]);
        self.run.notes.push(report::past(&sums[1]));
        let after = &self.run.steps[2].seconds;
        let well_from = (0..after.len()).find(|first| {
            let next = after.iter().skip(*first).take(RECOVERED_SECONDS);
            self.is_well(&Second::sum(next))
        });
        // The first second may still have what the burst has left behind.
        let says = match well_from {
            Some(second) => format!("after the burst: well after {second} s (at most 1)"),
            None => "after the burst: not well again".to_owned(),
        };
        self.run
            .judge(well_from.is_some_and(|second| second <= 1), says);
    }

    async fn ramp(&mut self, start: u64) {
        let Some(knee) = self.find_knee(start).await else {
            let says = format!("there is no knee: not even {LEAST_RATE} requests/s are well");
            self.run.judge(false, says);
            return;
        };
        let peak = self.run.steps.iter();
        let peak = peak.map(|step| Second::sum(&step.seconds).goodput());
        let peak = peak.fold(0.0, f64::max);
        let hold = self.step("2x knee", 2 * knee, self.options.seconds).await;

        let sentence = format!(
            "the knee is at {} requests/s (the most of which {:.0} % were good and p99 was under {} ms); \
             peak goodput {}/s",
            report::thousands(knee),
            GOOD_SHARE * 100.0,
            self.options.p99.as_millis(),
            report::thousands(peak as u64),
        );
        self.run.notes.push(sentence);
        self.run.notes.push(report::past(&hold));
        if hold.reached_the_client() < GOOD_SHARE * hold.load() {
            let behind = format!(
                "the service itself was behind: of {} requests/s it gave the client {}, and refused the rest. Processor \
                 time is what this machine lacks",
                report::thousands(hold.load() as u64),
                report::thousands(hold.reached_the_client() as u64),
            );
            self.run.notes.push(behind);
        }
        let share = hold.goodput() / peak;
        let says = format!(
            "goodput at twice the load of the knee: {}/s, {:.1} % of the peak (at least {:.0} %)",
            report::thousands(hold.goodput() as u64),
            share * 100.0,
            KEPT_SHARE * 100.0,
        );
        self.run.judge(share >= KEPT_SHARE, says);
        let says = format!(
            "{:.2} % failed or were given up otherwise than by being shed (at most {:.0} %)",
            hold.failed_share() * 100.0,
            FAILED_SHARE * 100.0,
        );
        self.run.judge(hold.failed_share() <= FAILED_SHARE, says);
        let shed = hold.shed.quantile(0.99);
        let says = format!(
            "{} were shed, 99 % of them in {} ms (at most {} ms)",
            report::thousands(hold.shed.count()),
            report::milliseconds(shed),
            self.options.p99.as_millis(),
        );
        self.run.judge(shed <= self.options.p99, says);
        self.judge_in_flight(&hold);
    }

    /// What is in flight is what the nodes take, and what has just come.
    fn judge_in_flight(&mut self, hold: &Second) {
        let nodes = self.target.client.nodes().len();
        let limit = self.options.max_in_flight.unwrap_or(16_384);
        let bound = nodes * limit + self.just_came(hold);
        let says = format!(
            "{} requests were in flight at most (at most {}), in {} MB of memory",
            report::thousands(hold.in_flight as u64),
            report::thousands(bound as u64),
            hold.memory >> 20,
        );
        self.run.judge(hold.in_flight <= bound, says);
    }

    /// What came within the last few milliseconds.
    fn just_came(&self, load: &Second) -> usize {
        (load.load() / 100.0) as usize
    }

    /// The highest rate that is well.
    async fn find_knee(&mut self, start: u64) -> Option<u64> {
        let mut well = None;
        let mut rate = start;
        let bad = loop {
            if self.is_well_at(rate).await {
                well = Some(rate);
                rate = (rate as f64 * STEEP) as u64;
            } else if well.is_some() {
                break rate;
            } else {
                rate /= 2;
                if rate < LEAST_RATE {
                    return None;
                }
            }
        };
        let mut well = well?;
        self.recover(well).await;
        loop {
            let rate = (well as f64 * GENTLE) as u64;
            if rate >= bad || !self.is_well_at(rate).await {
                break;
            }
            well = rate;
        }
        self.recover(well).await;
        Some(well)
    }

    /// Whether this rate is well: a step that is not gets a second chance, because the machine may have been busy
    /// with something else.
    async fn is_well_at(&mut self, rate: u64) -> bool {
        let seconds = (self.options.seconds / 5).max(1);
        let first = self.step("ramp", rate, seconds).await;
        if self.is_well(&first) {
            return true;
        }
        self.recover(rate / 2).await;
        let second = self.step("ramp", rate, seconds).await;
        self.is_well(&second)
    }

    /// Half of the load until it is well again.
    async fn recover(&mut self, well: u64) {
        for second in 0..RECOVERY {
            let load = self.step("recover", well / 2, 1).await;
            if self.is_well(&load) {
                if second > 1 {
                    let note = format!("after an overload it was well again after {second} s");
                    self.run.notes.push(note);
                }
                return;
            }
        }
        let note = format!("after an overload it was not well again in {RECOVERY} s");
        self.run.notes.push(note);
    }
}
