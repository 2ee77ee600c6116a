//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use crate::scenarios::Scenario;

pub(crate) const HELP: &str = "\
How much load can the client take on this cluster, and what becomes of more than that?

usage: cargo run --release --features testing --example load -- [options]

The load is open loop: requests come when they come, whether or not those before them have been answered, and the
latency of each counts from when it was due.

  --scenario NAME       [all]
       normal    the normal rate
       burst     the normal rate, ten times that, and the normal rate again
       one-key   the same, and all callers want the same key
       ramp      more and more, until it breaks: there is the knee; then twice the load of the knee
       limited   the same, with servers that give only so many answers a second
       all       all of them, one after the other
  --servers A,B,C       a cluster of your own (it gets 10,000 keys that start with load:; not for limited);
                        otherwise memcached processes if memcached is installed, or else servers in this process
  --nodes N             how many of these to start [1]
  --rate N              the normal rate: requests a second [5000]
  --seconds N           how long each load lasts; a step of the ramp takes a fifth [10]
  --deadline MS         milliseconds; what is answered correctly so soon after it was due is good [100]
  --p99 MS              before the knee, 99 % are answered in this [25]
  --capacity N          servers of ours give only so many answers a second, all together, in every scenario
                        [20000 in limited, no limit in the others]
  --max-in-flight N     the client's limit for each node [its default, 16384]
  --svg DIR             where to draw each scenario, as load-NAME.svg [.]
  --help                this

The exit status is 0, 1 if what must hold does not or the run failed, 2 for a wrong option. What must hold:
normal load is answered, a burst is forgotten once it is over, no value is wrong, and at twice the load of the knee
goodput is at least 90 % of the best that was seen, what is too much is shed, at once, and does not fail in another
way, and what is in flight stays bounded.";

const MAX_RATE: u64 = 10_000_000;

#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) scenarios: Vec<Scenario>,
    pub(crate) servers: Option<Vec<String>>,
    pub(crate) nodes: usize,
    pub(crate) rate: u64,
    pub(crate) seconds: u32,
    pub(crate) deadline: Duration,
    pub(crate) p99: Duration,
    pub(crate) capacity: Option<u64>,
    pub(crate) max_in_flight: Option<usize>,
    pub(crate) svg: PathBuf,
}

impl Options {
    /// How many answers a second the servers give in a scenario, if that is limited.
    pub(crate) fn capacity_in(&self, scenario: Scenario) -> Option<u64> {
        let limited = (scenario == Scenario::Limited).then_some(20_000);
        self.capacity.or(limited)
    }
}

pub(crate) enum Parsed {
    Run(Options),
    Help,
}

/// Parses the arguments after the program's name.
pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Parsed, String> {
    let mut scenario = "all".to_owned();
    let mut options = Options {
        scenarios: Vec::new(),
        servers: None,
        nodes: 1,
        rate: 5_000,
        seconds: 10,
        deadline: Duration::from_millis(100),
        p99: Duration::from_millis(25),
        capacity: None,
        max_in_flight: None,
        svg: ".".into(),
    };
    while let Some(argument) = arguments.next() {
        let (option, given) = match argument.split_once('=') {
            Some((option, value)) => (option, Some(value.to_owned())),
            None => (argument.as_str(), None),
        };
        if let "--help" | "-h" = option {
            return Ok(Parsed::Help);
        }
        let value = given.or_else(|| arguments.next());
        let value = value.ok_or_else(|| format!("{option} needs a value"))?;
        let number = |most| number(option, &value, most);
        match option {
            "--scenario" => scenario = value,
            "--servers" => options.servers = Some(addresses(&value)?),
            "--nodes" => options.nodes = number(100)? as usize,
            "--rate" => options.rate = number(MAX_RATE)?,
            "--seconds" => options.seconds = number(3_600)? as u32,
            "--deadline" => options.deadline = Duration::from_millis(number(60_000)?),
            "--p99" => options.p99 = Duration::from_millis(number(60_000)?),
            "--capacity" => options.capacity = Some(number(MAX_RATE)?),
            "--max-in-flight" => options.max_in_flight = Some(number(1 << 30)? as usize),
            "--svg" => options.svg = value.into(),
            _ => return Err(format!("there is no option {option}")),
        }
    }
    options.scenarios = match &*scenario {
        "all" if options.servers.is_some() => Scenario::ALL
            .into_iter()
            .filter(|scenario| *scenario != Scenario::Limited)
            .collect(),
        "all" => Scenario::ALL.to_vec(),
        "limited" if options.servers.is_some() => {
            return Err("limited needs servers that are not yours: no --servers".to_owned());
        }
        name => {
            let mut all = Scenario::ALL.into_iter();
            let named = all.find(|scenario| scenario.name() == name);
            let names = Scenario::ALL.map(Scenario::name).join(", ");
            vec![named.ok_or_else(|| format!("--scenario is {names} or all, not {name:?}"))?]
        }
    };
    if options.servers.is_some() && options.capacity.is_some() {
        return Err("--capacity is of servers of ours: no --servers".to_owned());
    }
    if options.p99 > options.deadline {
        return Err("--p99 is no more than --deadline".to_owned());
    }
    Ok(Parsed::Run(options))
}

fn number(option: &str, value: &str, most: u64) -> Result<u64, String> {
    match value.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!(
            "{option} is a whole number from 1 to {most}, not {value:?}"
        )),
    }
}

fn addresses(value: &str) -> Result<Vec<String>, String> {
    let addresses: Vec<String> = value
        .split(',')
        .map(|address| address.trim().to_owned())
        .collect();
    if addresses.iter().any(String::is_empty) {
        return Err(format!("--servers is a list of host:port, not {value:?}"));
    }
    Ok(addresses)
}
