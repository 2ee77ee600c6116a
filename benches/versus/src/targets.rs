//! What has to hold.

use std::fmt;

use serde::Serialize;

use crate::results::{Line, RowResult};
use crate::spec::{Contender, Measured, Work};

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Met,
    NotMet,
    NotMeasured,
}

impl fmt::Display for Verdict {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.pad(match self {
            Self::Met => "met",
            Self::NotMet => "not met",
            Self::NotMeasured => "not measured",
        })
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Target {
    pub what: String,
    pub bound: Bound,
    /// `x` for a ratio, or `ns`.
    pub unit: &'static str,
    /// None if a line of it is missing, or has errors.
    pub measured: Option<f64>,
}

impl Target {
    /// By the figure itself, not by how it is rounded for the table.
    pub fn verdict(&self) -> Verdict {
        let met = match (self.measured, self.bound) {
            (None, _) => return Verdict::NotMeasured,
            (Some(measured), Bound::AtLeast(bound)) => measured >= bound,
            (Some(measured), Bound::AtMost(bound)) => measured <= bound,
        };
        if met { Verdict::Met } else { Verdict::NotMet }
    }

    fn value(&self, value: f64) -> String {
        match self.unit {
            "ns" => format!("{value:.0} ns"),
            unit => format!("{value:.2}{unit}"),
        }
    }

    pub fn shown(&self) -> String {
        self.measured
            .map_or_else(|| "-".to_owned(), |measured| self.value(measured))
    }

    pub fn wanted(&self) -> String {
        match self.bound {
            Bound::AtLeast(bound) => format!(">= {}", self.value(bound)),
            Bound::AtMost(bound) => format!("<= {}", self.value(bound)),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verdict, what) = (self.verdict(), &self.what);
        match self.measured {
            Some(_) => write!(
                out,
                "{verdict}: {what}: {} ({})",
                self.shown(),
                self.wanted()
            ),
            None => write!(out, "{verdict}: {what} ({})", self.wanted()),
        }
    }
}

/// What of a measurement is compared.
type Figure = fn(&Measured) -> f64;

const THROUGHPUT: Figure = |round| round.throughput;
const P99: Figure = |round| round.p99;
const P999: Figure = |round| round.p999;
const CPU: Figure = |round| round.cpu;

/// The medians of one line and of another, put together.
fn compare(
    one: Option<&Line>,
    other: Option<&Line>,
    figure: Figure,
    how: fn(f64, f64) -> f64,
) -> Option<f64> {
    let (one, other) = (one?.median(figure)?, other?.median(figure)?);
    (other > 0.0).then(|| how(one, other))
}

fn ratio(one: Option<&Line>, other: Option<&Line>, figure: Figure) -> Option<f64> {
    compare(one, other, figure, |one, other| one / other)
}

/// What is asked of the rows with single operations: throughput on the callers' runtime and on a thread of
/// its own, latency and processor time against the best of the other clients.
struct Asked {
    row: &'static str,
    tasks: &'static str,
    throughput: f64,
    dedicated: f64,
    latency: (&'static str, Figure, f64),
    cpu: f64,
}

const ASKED: [Asked; 4] = [
    Asked {
        row: "tasks=1",
        tasks: "1 task",
        throughput: 0.95,
        dedicated: 0.5,
        latency: ("p99", P99, 1.1),
        cpu: 1.1,
    },
    Asked {
        row: "tasks=64",
        tasks: "64 tasks",
        throughput: 3.5,
        dedicated: 2.45,
        latency: ("p99", P99, 0.5),
        cpu: 0.3,
    },
    Asked {
        row: "tasks=256",
        tasks: "256 tasks",
        throughput: 4.5,
        dedicated: 3.15,
        latency: ("p999", P999, 0.1),
        cpu: 0.2,
    },
    Asked {
        row: "tasks=1024",
        tasks: "1,024 tasks",
        throughput: 4.8,
        dedicated: 3.36,
        latency: ("p999", P999, 0.1),
        cpu: 0.2,
    },
];

/// Every target, measured or not.
pub fn judge(rows: &[RowResult]) -> Vec<Target> {
    let row = |name| rows.iter().find(|row| row.name == name);
    let line = |name, contender, work| row(name).and_then(|row| row.line(contender, work));
    let mixed = |name, contender| line(name, contender, Work::Mixed);
    let peer = |name| row(name).and_then(RowResult::best_peer);
    let mut targets = Vec::new();
    let mut target = |what, bound, unit, measured| {
        targets.push(Target {
            what,
            bound,
            unit,
            measured,
        });
    };

    for asked in &ASKED {
        let (name, tasks) = (asked.row, asked.tasks);
        let current = mixed(name, Contender::Current);
        let dedicated = mixed(name, Contender::Dedicated);
        target(
            format!("{tasks}: throughput against the best peer"),
            Bound::AtLeast(asked.throughput),
            "x",
            ratio(current, peer(name), THROUGHPUT),
        );
        target(
            format!("{tasks}: throughput on a dedicated thread against the best peer"),
            Bound::AtLeast(asked.dedicated),
            "x",
            ratio(dedicated, peer(name), THROUGHPUT),
        );
        let (quantile, figure, most) = asked.latency;
        target(
            format!("{tasks}: {quantile} against the best peer"),
            Bound::AtMost(most),
            "x",
            ratio(current, peer(name), figure),
        );
        target(
            format!("{tasks}: client CPU of an operation against the best peer"),
            Bound::AtMost(asked.cpu),
            "x",
            ratio(current, peer(name), CPU),
        );
    }

    let large = mixed("value=4096", Contender::Current);
    target(
        "4 KiB values, 256 tasks: throughput against the best peer".to_owned(),
        Bound::AtLeast(2.0),
        "x",
        ratio(large, peer("value=4096"), THROUGHPUT),
    );
    let current = mixed("tasks=256", Contender::Current);
    target(
        "256 tasks: throughput against raw pipelining over as many connections".to_owned(),
        Bound::AtLeast(0.75),
        "x",
        ratio(current, mixed("tasks=256", Contender::Raw), THROUGHPUT),
    );

    for (name, tasks) in [("get_many", "1 task"), ("get_many tasks=8", "8 tasks")] {
        let many = line(name, Contender::Current, Work::GetMany);
        let concurrent = line(name, Contender::Current, Work::Concurrent);
        let raw = line(name, Contender::Raw, Work::GetMany);
        target(
            format!("get_many of 100 keys, {tasks}: against 100 gets at once"),
            Bound::AtLeast(1.3),
            "x",
            ratio(many, concurrent, THROUGHPUT),
        );
        target(
            format!("get_many of 100 keys, {tasks}: against a raw quiet multi-get"),
            Bound::AtLeast(0.8),
            "x",
            ratio(many, raw, THROUGHPUT),
        );
    }

    // One task alone waits for its replies: what the stack costs it is in the first row's latency.
    for asked in &ASKED[1..] {
        let whole = mixed(asked.row, Contender::Ring3);
        let bare = mixed(asked.row, Contender::Transport3);
        let tasks = asked.tasks;
        target(
            format!("{tasks}, three nodes: CPU that the stack costs above the transports"),
            Bound::AtMost(300.0),
            "ns",
            // It is measured in microseconds.
            compare(whole, bare, CPU, |whole, bare| (whole - bare) * 1000.0),
        );
        target(
            format!("{tasks}, three nodes: throughput against the transports alone"),
            Bound::AtLeast(0.8),
            "x",
            ratio(whole, bare, THROUGHPUT),
        );
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::{line, measured};

    fn row(lines: Vec<Line>) -> RowResult {
        RowResult {
            name: "tasks=64",
            tasks: 64,
            value: 100,
            lines,
        }
    }

    fn found(targets: &[Target], what: &str) -> Target {
        let mut found = targets.iter().filter(|target| target.what == what);
        let target = found.next().expect(what).clone();
        assert!(found.next().is_none(), "{what} twice");
        target
    }

    #[test]
    fn targets_are_ratios_of_medians_to_those_of_the_fastest_peer() {
        let rounds = [350.0, 340.0, 700.0].map(|throughput| measured(throughput, 40.0));
        let targets = judge(&[row(vec![
            line(Contender::Current, rounds.to_vec()),
            line(Contender::Dedicated, vec![measured(240.0, 1.0)]),
            line(Contender::MemcacheAsync, vec![measured(100.0, 100.0)]),
            line(Contender::AsyncMemcached, vec![measured(90.0, 1.0)]),
        ])]);
        let throughput = found(&targets, "64 tasks: throughput against the best peer");
        assert_eq!(throughput.measured, Some(3.5));
        assert_eq!(throughput.verdict(), Verdict::Met);
        assert_eq!(
            throughput.to_string(),
            "met: 64 tasks: throughput against the best peer: 3.50x (>= 3.50x)"
        );
        let dedicated = "64 tasks: throughput on a dedicated thread against the best peer";
        assert_eq!(found(&targets, dedicated).verdict(), Verdict::NotMet);
        // Of the same peer, whatever the other one's latency is.
        let p99 = found(&targets, "64 tasks: p99 against the best peer");
        assert_eq!(p99.measured, Some(0.4));
        assert_eq!(p99.verdict(), Verdict::Met);
    }

    #[test]
    fn what_the_stack_costs_is_nanoseconds_above_the_transports() {
        let mut whole = measured(850.0, 1.0);
        let mut bare = measured(1000.0, 1.0);
        (whole.cpu, bare.cpu) = (1.75, 1.5);
        let targets = judge(&[row(vec![
            line(Contender::Ring3, vec![whole]),
            line(Contender::Transport3, vec![bare]),
        ])]);
        let what = "64 tasks, three nodes: CPU that the stack costs above the transports";
        assert_eq!(
            found(&targets, what).to_string(),
            format!("met: {what}: 250 ns (<= 300 ns)")
        );
        let what = "64 tasks, three nodes: throughput against the transports alone";
        assert_eq!(found(&targets, what).shown(), "0.85x");
    }

    #[test]
    fn a_missing_or_failed_line_is_not_measured_and_never_met() {
        assert!(
            judge(&[])
                .iter()
                .all(|target| target.verdict() == Verdict::NotMeasured)
        );
        let mut failed = measured(100.0, 1.0);
        failed.errors = 1;
        let targets = judge(&[row(vec![
            line(Contender::Current, vec![measured(500.0, 1.0)]),
            line(Contender::MemcacheAsync, vec![failed]),
        ])]);
        let target = found(&targets, "64 tasks: throughput against the best peer");
        assert_eq!(
            target.to_string(),
            "not measured: 64 tasks: throughput against the best peer (>= 3.50x)"
        );
    }

    #[test]
    fn every_target_is_of_a_row_that_is_measured() {
        let rows = crate::plan::rows();
        let complete: Vec<_> = rows
            .iter()
            .map(|row| RowResult {
                name: row.name,
                tasks: row.tasks,
                value: row.value,
                lines: row
                    .entries
                    .iter()
                    .map(|entry| Line {
                        entry: *entry,
                        ..line(entry.contender, vec![measured(100.0, 1.0)])
                    })
                    .collect(),
            })
            .collect();
        for target in judge(&complete) {
            assert!(target.measured.is_some(), "{}", target.what);
        }
    }
}
