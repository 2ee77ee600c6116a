//! The command line.

use std::path::PathBuf;

use tower_memcached::{FailureMode, Protocol};

use crate::clients::Contender;
use crate::faults::{Fault, Outage};

pub(crate) const HELP: &str = "\
One of three memcached nodes fails, and comes back: what does a service notice?

usage: cargo run --release --features testing --example incident -- [options]

All clients see the same requests and the same fault, one after the other, on the same nodes.

  --client naive|resilient|both   which client to drive: one configured as in the incident, this
                                  crate's, or both [both]
  --mode redistribute|cancel|retry|all
                                  the failure mode of this crate's client; all is one client for
                                  each [redistribute]
  --protocol auto|meta|classic    how this crate's client asks its nodes [auto]
  --rate N                        requests per second, open loop [500]
  --healthy N                     seconds before the fault [3]
  --fault-seconds N               seconds of the fault [12]
  --after N                       seconds after the fault [8]
  --fault KIND                    what becomes of the first node [stop]
       stop        connections are accepted, and nothing is answered
       kill        connections are refused; it is restarted empty in the end
       slow        every reply is 300 ms late
       flap        stop for a second, continue for a second, and so on
       blackhole   nothing gets through in either direction; connections open, and lead nowhere
                   (slow and blackhole are made by a proxy in front of each node)
  --memcached                     real memcached processes (SIGSTOP and SIGCONT, or SIGKILL)
                                  instead of servers inside this process
  --servers A,B,C                 a cluster of your own; stop one of its nodes and watch
                                  (drives this crate's client unless --client says otherwise;
                                  it writes 3,000 keys that start with incident:)
  --seconds N                     how long to watch --servers [60]
  --svg FILE                      where to draw the seconds [incident.svg]
  --json FILE                     where to write the seconds and the summary [nowhere]
  --help                          this

The exit status is 0, 1 if a wrong value was read or the run failed, 2 for a wrong option.";

const MAX_RATE: u32 = 50_000;
const MAX_SECONDS: u32 = 3_600;

#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) contenders: Vec<Contender>,
    pub(crate) protocol: Protocol,
    pub(crate) servers: Servers,
    pub(crate) rate: u32,
    pub(crate) timeline: Timeline,
    pub(crate) svg: PathBuf,
    pub(crate) json: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Servers {
    InProcess,
    Memcached,
    Own(Vec<String>),
}

/// When the run ends, and the fault, if that is ours to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Timeline {
    pub(crate) seconds: u32,
    pub(crate) outage: Option<Outage>,
}

pub(crate) enum Parsed {
    Run(Options),
    Help,
}

/// What was said, before it is known whether it makes sense together.
#[derive(Default)]
struct Said {
    client: Option<String>,
    mode: Option<String>,
    protocol: Option<String>,
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
            "--mode" => said.mode = Some(value()?),
            "--protocol" => said.protocol = Some(value()?),
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
    fn contenders(&self) -> Result<Vec<Contender>, String> {
        let default = match self.servers {
            Some(_) => "resilient",
            None => "both",
        };
        let (naive, resilient) = match self.client.as_deref().unwrap_or(default) {
            "naive" if self.mode.is_some() => {
                return Err("--mode is for this crate's client, not for the naive one".to_owned());
            }
            "naive" => (true, false),
            "resilient" => (false, true),
            "both" => (true, true),
            other => {
                let clients = "naive, resilient or both";
                return Err(format!("--client is {clients}, not {other:?}"));
            }
        };
        let modes: &[_] = match self.mode.as_deref().unwrap_or("redistribute") {
            "redistribute" => &[FailureMode::Redistribute],
            "cancel" => &[FailureMode::Cancel],
            "retry" => &[FailureMode::Retry],
            "all" => &[
                FailureMode::Redistribute,
                FailureMode::Cancel,
                FailureMode::Retry,
            ],
            other => {
                let modes = "redistribute, cancel, retry or all";
                return Err(format!("--mode is {modes}, not {other:?}"));
            }
        };
        let naive = naive.then_some(Contender::Naive);
        let modes = modes.iter().filter(|_| resilient);
        let resilient = modes.map(|mode| Contender::Resilient(*mode));
        Ok(naive.into_iter().chain(resilient).collect())
    }

    fn protocol(&self) -> Result<Protocol, String> {
        let named = self.protocol.as_deref().unwrap_or("auto");
        let all = [Protocol::Auto, Protocol::Meta, Protocol::Classic];
        let known = all.into_iter().find(|protocol| protocol.name() == named);
        known.ok_or_else(|| format!("--protocol is auto, meta or classic, not {named:?}"))
    }

    fn check(self) -> Result<Options, String> {
        let contenders = self.contenders()?;
        let protocol = self.protocol()?;
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
                    outage: None,
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
                let fault = self.fault.unwrap_or(Fault::Stop);
                let when = begins..ends;
                let timeline = Timeline {
                    seconds: ends + self.after.unwrap_or(8),
                    outage: Some(Outage { fault, when }),
                };
                let servers = match self.memcached {
                    true => Servers::Memcached,
                    false => Servers::InProcess,
                };
                (servers, timeline)
            }
        };
        Ok(Options {
            contenders,
            protocol,
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
    let named = Fault::ALL.into_iter().find(|fault| fault.name() == value);
    named.ok_or_else(|| {
        let names = Fault::ALL.map(Fault::name).join(", ");
        format!("--fault is one of {names}, not {value:?}")
    })
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
