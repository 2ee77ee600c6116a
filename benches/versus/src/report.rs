//! Tables, and the machine that they are from.

use std::env;
use std::fs;
use std::process::Command;
use std::thread::{self, available_parallelism};
use std::time::Duration;

use serde::Serialize;

use crate::contender::Outcome;
use crate::plan::Settings;
use crate::results::{Line, RowResult};
use crate::spec::{Contender, Measured, Work};
use crate::targets::Target;

const FROM: &str = "<!-- scripts/versus writes from here -->";
const TO: &str = "<!-- scripts/versus writes to here -->";

/// What all processors together have done since the machine started, in ticks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ticks {
    total: f64,
    idle: f64,
    stolen: f64,
}

impl Ticks {
    /// None where there is no such count.
    pub fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let ticks: Result<Vec<f64>, _> = line.split_whitespace().map(str::parse).collect();
        // user, nice, system, idle, waiting for I/O, interrupts, soft interrupts, stolen; what follows are
        // guests', which are in the first two.
        let ticks = ticks.ok()?;
        let ticks = ticks.get(..8)?;
        Some(Self {
            total: ticks.iter().sum(),
            idle: ticks[3] + ticks[4],
            stolen: ticks[7],
        })
    }

    fn percent(&self, since: &Self, part: impl Fn(&Self) -> f64) -> f64 {
        let total = self.total - since.total;
        if total <= 0.0 {
            return 0.0;
        }
        100.0 * (part(self) - part(since)) / total
    }

    fn busy(&self, since: &Self) -> f64 {
        self.percent(since, |ticks| ticks.total - ticks.idle)
    }

    fn stolen(&self, since: &Self) -> f64 {
        self.percent(since, |ticks| ticks.stolen)
    }
}

/// How busy the machine is while nothing is measured, in percent.
pub fn busy(observed: Duration) -> Option<f64> {
    let before = Ticks::now()?;
    thread::sleep(observed);
    Some(Ticks::now()?.busy(&before))
}

/// Where and with what.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub date: String,
    /// The crate's commit.
    pub revision: String,
    pub processor: String,
    pub cores: usize,
    pub kernel: String,
    pub memcached: String,
    pub rustc: String,
    pub peers: Vec<(&'static str, String)>,
    /// What was busy before, in percent of all processors.
    pub busy: Option<f64>,
    /// What the host gave to others during the measurements, in percent of all processors.
    pub stolen: Option<f64>,
}

/// What a command says in its first line.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output();
    let line = output
        .ok()
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .and_then(|text| text.lines().next().map(|line| line.trim().to_owned()));
    line.filter(|line| !line.is_empty())
        .unwrap_or_else(|| "unknown".to_owned())
}

/// The version of a package in a lock file.
fn version(lock: &str, package: &str) -> Option<String> {
    let name = format!("name = \"{package}\"");
    let mut lines = lock.lines().skip_while(|line| **line != name);
    let version = lines.nth(1)?.strip_prefix("version = \"")?;
    Some(version.strip_suffix('"')?.to_owned())
}

fn processor() -> String {
    let described = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = described
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or_else(|| said("uname", &["-m"]), |(_, name)| name.to_owned())
}

impl Machine {
    pub fn here(busy: Option<f64>, since: Option<Ticks>) -> Self {
        let lock = include_str!("../Cargo.lock");
        let peers = ["memcache-async", "async-memcached", "memcache", "bb8"];
        let memcached = env::var("MEMCACHED").unwrap_or_else(|_| "memcached".to_owned());
        Self {
            date: said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
            revision: said(
                "git",
                &["describe", "--always", "--dirty", "--exclude", "*"],
            ),
            processor: processor(),
            cores: available_parallelism().map_or(0, |cores| cores.get()),
            kernel: said("uname", &["-srm"]),
            memcached: said(&memcached, &["-V"]),
            rustc: said("rustc", &["--version"]),
            peers: peers
                .map(|peer| (peer, version(lock, peer).unwrap_or_default()))
                .to_vec(),
            busy,
            stolen: since
                .zip(Ticks::now())
                .map(|(since, now)| now.stolen(&since)),
        }
    }

    fn described(&self, settings: &Settings) -> String {
        let busy = self
            .busy
            .map(|busy| format!(", which something else kept {busy:.0} % busy just before"));
        let stolen = self.stolen.map(|stolen| {
            let and = if busy.is_some() { " and" } else { "," };
            format!("{and} whose host gave {stolen:.1} % of them to others meanwhile")
        });
        let peers: Vec<_> = self
            .peers
            .iter()
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        format!(
            "Measured on {}, at {}, on {} with {} cores for client and server together{}{}; {}, {}, {}, {}. \
             Medians of rounds of {} s, of which there were {} (least to most); max is the most of all.",
            self.date,
            self.revision,
            self.processor,
            self.cores,
            busy.unwrap_or_default(),
            stolen.unwrap_or_default(),
            self.kernel,
            self.memcached,
            self.rustc,
            peers.join(", "),
            settings.duration,
            settings.rounds,
        )
    }
}

/// A table of Markdown that can be read as it is: the first row is its head.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(|column| width(column).max(1)).collect();
    let mut text = String::new();
    for (place, row) in rows.iter().enumerate() {
        for (column, width) in widths.iter().enumerate() {
            let cell = row.get(column).map_or("", String::as_str);
            text += &format!("| {cell:width$} ");
        }
        text += "|\n";
        if place == 0 {
            for width in &widths {
                text += &format!("| {:-<width$} ", "");
            }
            text += "|\n";
        }
    }
    text
}

/// With a comma before each three digits.
fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Of microseconds.
fn time(microseconds: f64) -> String {
    if microseconds >= 10_000.0 {
        format!("{} ms", grouped(microseconds / 1000.0))
    } else {
        format!("{} us", grouped(microseconds))
    }
}

/// Who does what, as the table calls it.
pub fn who(line: &Line) -> String {
    let title = line.cell.contender.title();
    match (line.cell.contender, line.cell.work) {
        (_, Work::Mixed) => title.to_owned(),
        (Contender::Raw | Contender::Raw4, _) => title.replace("pipelining", "quiet multi-get"),
        (_, Work::GetMany) => format!("{title}: one call"),
        (_, Work::Concurrent) => format!("{title}: 100 gets at once"),
    }
}

/// The median, and what the rounds were between if there was more than one.
fn spread(
    line: &Line,
    figure: fn(&Measured) -> f64,
    shown: impl Fn(f64) -> String,
) -> Option<String> {
    let median = shown(line.median(figure)?);
    let figures = || line.rounds.iter().map(figure);
    if line.rounds.len() < 2 {
        return Some(median);
    }
    let least = shown(figures().min_by(f64::total_cmp)?);
    let most = shown(figures().max_by(f64::total_cmp)?);
    // One unit is enough.
    let least = match (least.rsplit_once(' '), most.rsplit_once(' ')) {
        (Some((number, unit)), Some((_, same))) if unit == same => number.to_owned(),
        _ => least,
    };
    Some(format!("{median} ({least} to {most})"))
}

fn figures(line: &Line, base: Option<f64>) -> Option<Vec<String>> {
    let against = base.map(|base| Some(format!("{:.2}", line.throughput()? / base)));
    Some(vec![
        spread(line, |round| round.throughput, grouped)?,
        against.flatten().unwrap_or_else(|| "-".to_owned()),
        time(line.median(|round| round.p50)?),
        spread(line, |round| round.p99, time)?,
        spread(line, |round| round.p999, time)?,
        time(
            line.rounds
                .iter()
                .map(|round| round.max)
                .max_by(f64::total_cmp)?,
        ),
        spread(line, |round| round.cpu, |cpu| format!("{cpu:.2}"))?,
        format!("{:.3}", line.median(|round| round.switches)?),
    ])
}

fn row(row: &RowResult) -> String {
    let base = row.best_peer().and_then(Line::throughput);
    let many = row.lines.iter().any(|line| line.entry.work != Work::Mixed);
    let amount = if many { "keys/s" } else { "operations/s" };
    let head = [
        "who",
        "best with",
        amount,
        "x",
        "p50",
        "p99",
        "p999",
        "max",
        "CPU us",
        "switches",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(row.lines.iter().map(|line| {
        let mut cells = vec![who(line), line.cell.configuration()];
        match figures(line, base) {
            Some(figures) => cells.extend(figures),
            None => {
                let first = line.first_error().unwrap_or("nothing was measured");
                // It must not end the cell or the line.
                let first = first.replace(['|', '\n', '\r'], " ");
                cells.push(format!("no result: {} errors, {first}", line.errors()));
            }
        }
        cells
    }));
    let tasks = match row.tasks {
        1 => "1 task".to_owned(),
        tasks => format!("{} tasks", grouped(tasks as f64)),
    };
    let value = grouped(row.value as f64);
    format!(
        "### {}: {tasks}, {value} bytes\n\n{}\n",
        row.name,
        table(&rows)
    )
}

/// The machine, and a table for each row.
pub fn measurements(machine: &Machine, settings: &Settings, rows: &[RowResult]) -> String {
    let mut text = machine.described(settings) + "\n\n";
    text.extend(rows.iter().map(row));
    text
}

pub fn targets(targets: &[Target]) -> String {
    let head = ["", "measured", "target", "what"].map(str::to_owned);
    let mut rows = vec![head.to_vec()];
    rows.extend(targets.iter().map(|target| {
        vec![
            target.verdict().to_string(),
            target.shown(),
            target.wanted(),
            target.what.clone(),
        ]
    }));
    format!("### Targets\n\n{}", table(&rows))
}

/// The document with another text between its two marks.
pub fn replace(document: &str, text: &str) -> Outcome<String> {
    let parts = document
        .split_once(FROM)
        .and_then(|(before, rest)| Some((before, rest.split_once(TO)?.1)));
    let (before, after) = parts.ok_or_else(|| format!("no {FROM} and {TO} in the document"))?;
    Ok(format!("{before}{FROM}\n\n{}\n\n{TO}{after}", text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::{line, measured};

    #[test]
    fn a_document_keeps_what_is_not_between_the_marks() {
        let document = format!("head\n{FROM}\nold\n{TO}\ntail\n");
        let once = replace(&document, "new\n").unwrap();
        assert_eq!(once, format!("head\n{FROM}\n\nnew\n\n{TO}\ntail\n"));
        assert_eq!(replace(&once, "new\n").unwrap(), once);
        assert!(replace("no marks", "new").is_err());
        let wrong_way_round = format!("{TO} {FROM}");
        assert!(replace(&wrong_way_round, "new").is_err());
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["who", "x"], vec!["somebody", "1.00"], vec!["none"]];
        let rows = rows.map(|row| row.into_iter().map(str::to_owned).collect());
        assert_eq!(
            table(&rows),
            "| who      | x    |\n| -------- | ---- |\n| somebody | 1.00 |\n| none     |      |\n"
        );
    }

    #[test]
    fn figures_are_readable() {
        assert_eq!(grouped(999.4), "999");
        assert_eq!(grouped(1_234_567.0), "1,234,567");
        assert_eq!(time(9_999.0), "9,999 us");
        assert_eq!(time(1_250_000.0), "1,250 ms");
    }

    #[test]
    fn several_rounds_are_shown_with_their_spread_and_one_alone() {
        let rounds = [3000.0, 1000.0, 2000.0].map(|throughput| measured(throughput, throughput));
        let several = line(Contender::Current, rounds.to_vec());
        let shown = spread(&several, |round| round.p99, time);
        assert_eq!(shown.as_deref(), Some("2,000 us (1,000 to 3,000 us)"));
        let shown = spread(&several, |round| round.p99 * 6.0, time);
        assert_eq!(shown.as_deref(), Some("12 ms (6,000 us to 18 ms)"));
        let one = line(Contender::Current, rounds[..1].to_vec());
        let shown = spread(&one, |round| round.throughput, grouped);
        assert_eq!(shown.as_deref(), Some("3,000"));
    }

    #[test]
    fn a_line_with_errors_shows_none_of_its_figures() {
        let mut failed = measured(123_456.0, 1.0);
        failed.errors = 2;
        failed.first_error = Some("a|b\nc".into());
        let text = row(&RowResult {
            name: "tasks=64",
            tasks: 64,
            value: 100,
            lines: vec![line(Contender::Current, vec![failed])],
        });
        assert!(text.contains("no result: 2 errors, a b c"), "{text}");
        assert!(!text.contains("123,456"), "{text}");
    }

    #[test]
    fn ticks_are_told_apart() {
        let before = Ticks::parse("cpu  10 0 10 70 10 0 0 0 5 5\ncpu0 1 2 3\n").unwrap();
        let after = Ticks::parse("cpu  40 0 20 100 20 0 0 20 9 9\n").unwrap();
        assert_eq!(after.busy(&before), 60.0);
        assert_eq!(after.stolen(&before), 20.0);
        assert_eq!(after.busy(&after), 0.0);
        assert_eq!(Ticks::parse("intr 1 2 3\n"), None);
    }

    #[test]
    fn the_versions_of_the_others_are_those_of_the_lock_file() {
        let lock = "[[package]]\nname = \"bb8\"\nversion = \"0.9.1\"\nsource = \"x\"\n";
        assert_eq!(version(lock, "bb8").as_deref(), Some("0.9.1"));
        assert_eq!(version(lock, "bb"), None);
        let machine = Machine::here(None, None);
        assert!(machine.peers.iter().all(|(_, version)| !version.is_empty()));
    }
}
