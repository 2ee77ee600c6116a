//! tower-memcached side by side with other clients, on a real memcached, and by itself in memory, on this machine.
//!
//! ```text
//! versus [--quick] [--row NAME].. [--json FILE] [--document FILE] [--check]
//! versus --profile CONTENDER TASKS SECONDS [--runtime single|multi] [--pool N] [--value BYTES]
//!        [--work mixed|get-many|concurrent] [--in-memory true|false]
//! ```
//!
//! Each measurement is a process of its own. The contenders of a row take turns, round after round; what
//! is shown are medians. In which runtime, and with how many connections, each of them is best is tried
//! first. Progress goes to standard error, tables and targets to standard output, everything that was
//! measured to the JSON file. `--document` rewrites what is between two marks in a file. `--check` fails if
//! a target is not met.

#[path = "../../support/canned.rs"]
mod canned;
mod contender;
mod measure;
mod plan;
mod report;
mod results;
mod spec;
mod targets;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{self, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use serde::Deserialize;
use serde_json::{Value, json};
use tower_memcached::testing::Memcached;

use contender::Outcome;
use plan::{Row, Settings};
use report::{Machine, Ticks};
use results::{Line, RowResult};
use spec::{Cell, Contender, Measured, Order, Runtime, Work};
use targets::{Target, Verdict};

/// One thread, as much memory as the values need, and a connection for each of a thousand tasks.
const MEMCACHED: [&str; 6] = ["-t", "1", "-m", "256", "-c", "4096"];

/// What may be busy before, in percent.
const QUIET: f64 = 5.0;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let done = match arguments.first().map(String::as_str) {
        Some("--measure") => measured(&arguments[1..]),
        Some("--profile") => profile(&arguments[1..]),
        _ => compare(&arguments),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("versus: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A child process: takes one measurement, and prints it.
fn measured(arguments: &[String]) -> Outcome<ExitCode> {
    let order: Order = serde_json::from_str(arguments.first().ok_or("no order")?)?;
    let late = Duration::from_secs_f64(order.warm_up + order.duration) + Duration::from_secs(30);
    thread::spawn(move || {
        thread::sleep(late);
        eprintln!("still running after {late:?}");
        process::exit(1);
    });
    let measured = measure::measure(&order)?;
    println!("{}", serde_json::to_string(&measured)?);
    // Threads and connections are not waited for.
    process::exit(0);
}

/// Has a child process take a measurement. What goes wrong in it is an error of the cell.
fn take(order: &Order) -> Outcome<Measured> {
    let child = Command::new(env::current_exe()?)
        .arg("--measure")
        .arg(serde_json::to_string(order)?)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(serde_json::from_slice(&output.stdout)?);
    }
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Ok(Measured {
        errors: 1,
        first_error: Some(complaint),
        ..Measured::default()
    })
}

fn start_servers() -> Outcome<Vec<Memcached>> {
    let servers = (0..3).map(|_| Memcached::spawn(&MEMCACHED));
    Ok(servers.collect::<Result<_, _>>()?)
}

fn addresses(servers: &[Memcached]) -> Vec<SocketAddr> {
    servers.iter().map(Memcached::socket_address).collect()
}

fn preload(servers: &[SocketAddr], value: usize) -> Outcome<()> {
    servers
        .iter()
        .try_for_each(|server| measure::preload(*server, value))
}

/// The value of an enumeration by the name that it has in the JSON.
fn named<T: for<'a> Deserialize<'a>>(name: &str) -> Outcome<T> {
    Ok(serde_json::from_value(Value::from(name))?)
}

/// Runs one contender alone in this process, for a profiler.
fn profile(arguments: &[String]) -> Outcome<ExitCode> {
    let [contender, tasks, seconds, options @ ..] = arguments else {
        return Err("--profile CONTENDER TASKS SECONDS".into());
    };
    let contender: Contender = named(contender)?;
    let tasks: usize = tasks.parse()?;
    let mut cell = Cell {
        contender,
        runtime: (!contender.is_raw()).then_some(Runtime::Single),
        pool: contender.is_peer().then_some(tasks.min(64)),
        work: Work::Mixed,
        tasks,
        value: 100,
        in_memory: false,
    };
    for option in options.chunks(2) {
        let [name, value] = option else {
            return Err(format!("{option:?} has no value").into());
        };
        match name.as_str() {
            "--runtime" => cell.runtime = Some(named(value)?),
            "--pool" => cell.pool = Some(value.parse()?),
            "--value" => cell.value = value.parse()?,
            "--in-memory" => cell.in_memory = value.parse()?,
            "--work" => cell.work = named(value)?,
            other => return Err(format!("no such option: {other}").into()),
        }
    }
    if cell.in_memory && (cell.contender.is_raw() || cell.contender.is_peer() || cell.value != 100)
    {
        return Err("in memory there are our own contenders only, and values of 100 bytes".into());
    }
    let servers = start_servers()?;
    let order = Order {
        cell,
        servers: addresses(&servers),
        warm_up: 0.3,
        duration: seconds.parse()?,
    };
    preload(&order.servers, cell.value)?;
    let measured = measure::measure(&order)?;
    println!("{}", serde_json::to_string_pretty(&measured)?);
    Ok(ExitCode::SUCCESS)
}

/// What is to be compared.
struct Options {
    settings: Settings,
    rows: Vec<Row>,
    json: Option<PathBuf>,
    document: Option<PathBuf>,
    check: bool,
}

impl Options {
    fn parse(arguments: &[String]) -> Outcome<Self> {
        let all = plan::rows();
        let mut rows: Vec<Row> = Vec::new();
        let mut options = Self {
            settings: Settings::FULL,
            rows: Vec::new(),
            json: None,
            document: None,
            check: false,
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || {
                let value = arguments.next();
                value.ok_or_else(|| format!("{argument} what?"))
            };
            match argument.as_str() {
                "--quick" => options.settings = Settings::QUICK,
                "--check" => options.check = true,
                "--json" => options.json = Some(value()?.into()),
                "--document" => options.document = Some(value()?.into()),
                "--row" => {
                    let name = value()?;
                    let Some(row) = all.iter().find(|row| row.is_called(name)) else {
                        let names: Vec<_> = all.iter().map(|row| row.name).collect();
                        return Err(format!("no row {name}, but {}", names.join(", ")).into());
                    };
                    if !rows.iter().any(|other| other.name == row.name) {
                        rows.push(row.clone());
                    }
                }
                other => return Err(format!("no such option: {other}").into()),
            }
        }
        let partial = options.settings.quick || !rows.is_empty();
        if partial && options.document.is_some() {
            return Err("a document takes a full run: neither --quick nor --row".into());
        }
        options.rows = if rows.is_empty() { all } else { rows };
        Ok(options)
    }

    /// Whether these targets are enough for `--check`. What was not asked for need not be measured.
    fn passes(&self, targets: &[Target]) -> bool {
        let everything = self.rows.len() == plan::rows().len();
        targets.iter().all(|target| match target.verdict() {
            Verdict::Met => true,
            Verdict::NotMet => false,
            Verdict::NotMeasured => !everything,
        })
    }
}

/// Measures one row: first everybody's configurations, then the rounds, in turns.
fn run(
    row: &Row,
    settings: &Settings,
    servers: &[SocketAddr],
    tried: &mut Vec<Line>,
) -> Outcome<RowResult> {
    let order = |cell, duration| Order {
        cell,
        servers: servers.to_vec(),
        warm_up: settings.warm_up,
        duration,
    };
    preload(servers, row.value)?;
    let mut lines: Vec<Line> = Vec::new();
    for entry in &row.entries {
        let mut cells = row.candidates(*entry, settings.quick);
        if let Some(first) = entry.contender.follows() {
            let first = lines.iter().find(|line| line.entry.contender == first);
            cells.retain(|cell| first.is_none_or(|first| first.cell.runtime == cell.runtime));
        }
        let cell = if let [only] = cells[..] {
            only
        } else {
            let (began, trials) = (tried.len(), settings.trials(cells.len()));
            tried.extend(cells.into_iter().map(|cell| Line::new(*entry, cell)));
            for _ in 0..trials {
                for line in &mut tried[began..] {
                    line.rounds.push(take(&order(line.cell, settings.trial))?);
                }
            }
            results::best(&tried[began..]).ok_or("nothing to try")?
        };
        lines.push(Line::new(*entry, cell));
    }
    for _ in 0..settings.rounds {
        for line in &mut lines {
            let measured = take(&order(line.cell, settings.duration))?;
            eprintln!(
                "{:18.0}/s  {}, {}",
                measured.throughput,
                report::who(line),
                line.cell.configuration(),
            );
            if let Some(error) = &measured.first_error {
                eprintln!("{:20}  {} errors: {error}", "", measured.errors);
            }
            line.rounds.push(measured);
        }
    }
    Ok(RowResult {
        name: row.name,
        tasks: row.tasks,
        value: row.value,
        lines,
    })
}

fn compare(arguments: &[String]) -> Outcome<ExitCode> {
    let options = Options::parse(arguments)?;
    let settings = &options.settings;
    // Said now, not when all has been measured.
    if let Some(document) = &options.document {
        report::replace(&fs::read_to_string(document)?, "")?;
    }
    let busy = report::busy(Duration::from_secs(2));
    if let Some(busy) = busy.filter(|busy| *busy > QUIET) {
        eprintln!(
            "versus: something else keeps this machine {busy:.0} % busy: what follows is no result"
        );
    }
    let seconds: f64 = options.rows.iter().map(|row| row.seconds(settings)).sum();
    eprintln!("about {:.0} minutes", (seconds / 60.0).ceil());

    let servers = start_servers()?;
    let addresses = addresses(&servers);
    let ticks = Ticks::now();
    let started = Instant::now();
    let mut tried = Vec::new();
    let mut rows = Vec::new();
    for row in &options.rows {
        eprintln!("{:5.0} s  {}", started.elapsed().as_secs_f64(), row.name);
        rows.push(run(row, settings, &addresses, &mut tried)?);
    }
    let machine = Machine::here(busy, ticks);
    let targets = targets::judge(&rows);
    let measurements = report::measurements(&machine, settings, &rows);

    if let Some(path) = &options.json {
        let verdicts: Vec<_> = targets
            .iter()
            .map(|target| json!({"target": target, "verdict": target.verdict().to_string()}))
            .collect();
        let results = json!({
            "machine": machine,
            "settings": settings,
            "rows": rows,
            "tried": tried,
            "targets": verdicts,
        });
        fs::write(path, serde_json::to_string_pretty(&results)?)?;
    }
    if let Some(path) = &options.document {
        let text = measurements.clone() + &report::targets(&targets);
        fs::write(path, report::replace(&fs::read_to_string(path)?, &text)?)?;
    }
    println!("{measurements}");
    for target in &targets {
        println!("{target}");
    }
    println!("\nThe other targets are measured elsewhere: allocations and memory by tests/costs.");
    Ok(if options.check && !options.passes(&targets) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Outcome<Options> {
        let arguments: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        Options::parse(&arguments)
    }

    #[test]
    fn only_a_full_run_is_for_the_document() {
        assert!(parse("--document COMPARE.md --check").is_ok());
        assert!(parse("--document COMPARE.md --quick").is_err());
        assert!(parse("--row 64 --document COMPARE.md").is_err());
    }

    #[test]
    fn rows_are_chosen_once_each() {
        assert_eq!(parse("").unwrap().rows.len(), plan::rows().len());
        let options = parse("--row 64 --row tasks=64 --row get_many").unwrap();
        let names: Vec<_> = options.rows.iter().map(|row| row.name).collect();
        assert_eq!(names, ["tasks=64", "get_many"]);
        for wrong in ["--row 65", "--row", "--slow"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_check_of_everything_takes_every_target() {
        let unmeasured = targets::judge(&[]);
        assert!(!parse("--check").unwrap().passes(&unmeasured));
        let one_row = parse("--check --row 64").unwrap();
        assert!(one_row.passes(&unmeasured));
        let mut missed = unmeasured;
        missed[0].measured = Some(0.1);
        assert!(!one_row.passes(&missed));
    }

    #[test]
    fn a_child_is_told_all_of_its_order() {
        let order = Order {
            cell: results::tests::cell(Contender::MemcacheBb8, Work::GetMany, Some(8)),
            servers: vec!["127.0.0.1:11211".parse().unwrap()],
            warm_up: 0.3,
            duration: 2.0,
        };
        let told: Order = serde_json::from_str(&serde_json::to_string(&order).unwrap()).unwrap();
        assert_eq!(told.cell, order.cell);
        assert_eq!(told.servers, order.servers);
        assert_eq!((told.warm_up, told.duration), (0.3, 2.0));
    }
}
