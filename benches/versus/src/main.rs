//! tower-memcached side by side with other clients, on a real memcached, on this machine.
//!
//! ```text
//! versus [--quick] [--row NAME].. [--json FILE] [--document FILE] [--check]
//! versus --profile CONTENDER TASKS SECONDS [--runtime single|multi] [--pool N] [--value BYTES]
//!        [--work mixed|get-many|concurrent]
//! ```
//!
//! Each measurement is a process of its own. The contenders of a row take turns, round after round; what
//! is shown are medians. In which runtime, and with how many connections, each of them is best is tried
//! first.

mod contender;
mod measure;
mod plan;
mod spec;

use std::env;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{self, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;
use tower_memcached::testing::Memcached;

use contender::Outcome;
use plan::rows;
use spec::{Cell, Contender, Measured, Order, Runtime, Work};

/// One thread, as much memory as the values need, and a connection for each of a thousand tasks.
const MEMCACHED: [&str; 6] = ["-t", "1", "-m", "256", "-c", "4096"];

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
    };
    for option in options.chunks(2) {
        let [name, value] = option else {
            return Err(format!("{option:?} has no value").into());
        };
        match name.as_str() {
            "--runtime" => cell.runtime = Some(named(value)?),
            "--pool" => cell.pool = Some(value.parse()?),
            "--value" => cell.value = value.parse()?,
            "--work" => cell.work = named(value)?,
            other => return Err(format!("no such option: {other}").into()),
        }
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

fn compare(arguments: &[String]) -> Outcome<ExitCode> {
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let servers = start_servers()?;
    let addresses = addresses(&servers);
    let started = Instant::now();
    for row in rows() {
        preload(&addresses, row.value)?;
        for entry in &row.entries {
            let mut best: Option<(Cell, Measured)> = None;
            for cell in row.candidates(*entry, quick) {
                let measured = take(&Order {
                    cell,
                    servers: addresses.clone(),
                    warm_up: 0.2,
                    duration: 0.4,
                })?;
                if best
                    .as_ref()
                    .is_none_or(|(_, best)| best.throughput < measured.throughput)
                {
                    best = Some((cell, measured));
                }
            }
            let (cell, measured) = best.ok_or("no candidate")?;
            println!(
                "{:6.1} {:18} {:14} {:?} {:30} {:9.0}/s p50 {:6.0} p99 {:6.0} p999 {:6.0} max {:6.0} cpu {:6.2} us switches {:.3} errors {} {:?}",
                started.elapsed().as_secs_f64(),
                row.name,
                cell.contender,
                cell.work,
                cell.configuration(),
                measured.throughput,
                measured.p50,
                measured.p99,
                measured.p999,
                measured.max,
                measured.cpu,
                measured.switches,
                measured.errors,
                measured.first_error,
            );
            std::io::stdout().flush()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
