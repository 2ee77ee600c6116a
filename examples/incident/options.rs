//! The command line.

use std::ops::Range;
use std::path::PathBuf;

use crate::clients::Contender;

pub(crate) const HELP: &str = "\
One of three memcached nodes stops answering, and comes back: what does a service notice?

usage: cargo run --release --features testing --example incident -- [options]

  --client naive|resilient|both   which client to drive, one after the other [both]
  --rate N                        requests per second, open loop [500]
  --healthy N                     seconds before the fault [3]
  --fault-seconds N               seconds of the fault [12]
  --after N                       seconds after the fault [8]
  --fault stop|kill               the node hangs, or dies and is restarted empty [stop]
  --memcached                     real memcached processes (SIGSTOP and SIGCONT, or SIGKILL)
                                  instead of servers inside this process
  --servers A,B,C                 a cluster of your own; stop one of its nodes and watch
                                  (drives the resilient client unless --client says otherwise;
                                  it writes 3,000 keys that start with incident:)
  --seconds N                     how long to watch --servers [60]
  --svg FILE                      where to draw the seconds [incident.svg]
  --json FILE                     where to write the seconds and the summary
  --help                          this

The exit status is 0, 1 if a wrong value was read or the run failed, 2 for a wrong option.";

const MAX_RATE: u32 = 50_000;
const MAX_SECONDS: u32 = 3_600;

#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) contenders: Vec<Contender>,
    pub(crate) servers: Servers,
    pub(crate) rate: u32,
    pub(crate) timeline: Timeline,
    pub(crate) svg: PathBuf,
    pub(crate) json: Option<PathBuf>,
}

impl Options {
    /// The fault that is ours to make.
    pub(crate) fn fault(&self) -> Option<Fault> {
        match &self.servers {
            Servers::InProcess(fault) | Servers::Memcached(fault) => Some(*fault),
            Servers::Own(_) => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Servers {
    InProcess(Fault),
    Memcached(Fault),
    Own(Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Connects succeed, nothing answers.
    Stop,
    /// Connects are refused; it comes back empty.
    Kill,
}

/// When the run ends and, if the fault is ours to make, between which seconds it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Timeline {
    pub(crate) seconds: u32,
    pub(crate) fault: Option<Range<u32>>,
}

pub(crate) enum Parsed {
    Run(Options),
    Help,
}

/// What was said, before it is known whether it makes sense together.
#[derive(Default)]
struct Said {
    client: Option<String>,
    rate: Option<u32>,
    healthy: Option<u32>,
    fault_seconds: Option<u32>,
    after: Option<u32>,
    fault: Option<Fault>,
    memcached: bool,
    servers: Option<Vec<String>>,
    seconds: Option<u32>,
    svg: Option<PathBuf>,
    json: Option<PathBuf>,
}

/// Parses the arguments after the program's name.
pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Parsed, String> {
    let mut said = Said::default();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let (option, given) = match argument.split_once('=') {
            Some((option, value)) => (option, Some(value.to_owned())),
            None => (argument.as_str(), None),
        };
        match option {
            "--help" | "-h" => return Ok(Parsed::Help),
            "--memcached" if given.is_none() => {
                said.memcached = true;
                continue;
            }
            "--memcached" => return Err("--memcached takes no value".to_owned()),
            _ => {}
        }
        let mut value = || {
            let value = given.clone().or_else(|| arguments.next());
            value.ok_or_else(|| format!("{option} needs a value"))
        };
        match option {
            "--client" => said.client = Some(value()?),
            "--rate" => said.rate = Some(number(option, &value()?, MAX_RATE)?),
            "--healthy" => said.healthy = Some(number(option, &value()?, MAX_SECONDS)?),
            "--fault-seconds" => said.fault_seconds = Some(number(option, &value()?, MAX_SECONDS)?),
            "--after" => said.after = Some(number(option, &value()?, MAX_SECONDS)?),
            "--seconds" => said.seconds = Some(number(option, &value()?, MAX_SECONDS)?),
            "--fault" => said.fault = Some(fault(&value()?)?),
            "--servers" => said.servers = Some(addresses(&value()?)?),
            "--svg" => said.svg = Some(value()?.into()),
            "--json" => said.json = Some(value()?.into()),
            _ => return Err(format!("there is no option {option}")),
        }
    }
    said.check().map(Parsed::Run)
}

impl Said {
    fn check(self) -> Result<Options, String> {
        let contenders = match (self.client.as_deref(), &self.servers) {
            (Some("naive"), _) => vec![Contender::Naive],
            (Some("resilient"), _) | (None, Some(_)) => vec![Contender::Resilient],
            (Some("both"), _) | (None, None) => vec![Contender::Naive, Contender::Resilient],
            (Some(other), _) => {
                return Err(format!(
                    "--client is naive, resilient or both, not {other:?}"
                ));
            }
        };
        let makes_fault = [
            ("--memcached", self.memcached),
            ("--fault", self.fault.is_some()),
            ("--healthy", self.healthy.is_some()),
            ("--fault-seconds", self.fault_seconds.is_some()),
            ("--after", self.after.is_some()),
        ];
        let (servers, timeline) = match self.servers {
            Some(servers) => {
                if let Some((option, _)) = makes_fault.iter().find(|(_, said)| *said) {
                    return Err(format!(
                        "with --servers the fault is yours to make: no {option}"
                    ));
                }
                let timeline = Timeline {
                    seconds: self.seconds.unwrap_or(60),
                    fault: None,
                };
                (Servers::Own(servers), timeline)
            }
            None if self.seconds.is_some() => {
                let instead = "--healthy, --fault-seconds and --after";
                return Err(format!("--seconds is for --servers; there are {instead}"));
            }
            None => {
                let begins = self.healthy.unwrap_or(3);
                let ends = begins + self.fault_seconds.unwrap_or(12);
                let timeline = Timeline {
                    seconds: ends + self.after.unwrap_or(8),
                    fault: Some(begins..ends),
                };
                let fault = self.fault.unwrap_or(Fault::Stop);
                let servers = match self.memcached {
                    true => Servers::Memcached(fault),
                    false => Servers::InProcess(fault),
                };
                (servers, timeline)
            }
        };
        Ok(Options {
            contenders,
            servers,
            rate: self.rate.unwrap_or(500),
            timeline,
            svg: self.svg.unwrap_or_else(|| "incident.svg".into()),
            json: self.json,
        })
    }
}

fn number(option: &str, value: &str, most: u32) -> Result<u32, String> {
    match value.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!(
            "{option} is a whole number from 1 to {most}, not {value:?}"
        )),
    }
}

fn fault(value: &str) -> Result<Fault, String> {
    match value {
        "stop" => Ok(Fault::Stop),
        "kill" => Ok(Fault::Kill),
        _ => Err(format!("--fault is stop or kill, not {value:?}")),
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
