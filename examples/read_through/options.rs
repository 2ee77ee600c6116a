//! The command line.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tower_memcached::LoadLimits;

pub(crate) const HELP: &str = "\
A service that reads items through a cache from a database.

usage: cargo run --release --features testing --example read_through -- [options]

  GET /items/ID                   the item, from the cache or else the database
  PUT /items/ID {\"name\": \"...\"}   renames it in the database, and takes it out of the cache

The header x-outcome of an answer says where it is from.

  --postgres URL                  a PostgreSQL server, such as postgres://user:password@host/database,
                                  instead of an SQLite file that goes when this ends; the items are in
                                  a schema read_through_example, which stays
  --items N                       how many items there are [5000]
  --load-ms N                     how much longer than it really takes a load is made to take [10]
  --load-rate N                   how many loads per second the database is to get at most [400]
  --listen ADDRESS                where to serve [127.0.0.1:8080; with --storm, any free port]
  --storm                         load the service, and kill the whole cache meanwhile
  --unguarded                     let all loads through to the database, to see what that is like
  --rate N                        requests per second, open loop [2000]
  --warm-up N                     seconds before the figures count [5]
  --healthy N                     seconds before the outage [5]
  --outage N                      seconds without a cache [5]
  --after N                       seconds after the outage [10]
  --help                          this

The exit status is 0, 1 if the run failed, 2 for a wrong option.";

const MAX_SECONDS: u32 = 3_600;

#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) postgres: Option<String>,
    pub(crate) items: u32,
    pub(crate) load_cost: Duration,
    pub(crate) load_rate: u32,
    pub(crate) unguarded: bool,
    pub(crate) listen: SocketAddr,
    pub(crate) storm: Option<Storm>,
}

/// Some connections are left for those who write.
pub(crate) const LOADS_AT_ONCE: usize = 6;

impl Options {
    /// What the database can be asked to load (docs/DATABASE_FALLBACK.md says how to choose it).
    pub(crate) fn limits(&self) -> LoadLimits {
        if self.unguarded {
            let all = LoadLimits::default().max_concurrent(1_000_000);
            return all.without_throttle();
        }
        const MAX_WAIT: Duration = Duration::from_millis(100);
        let tenth = (self.load_rate / 10).max(1);
        LoadLimits::default()
            .max_concurrent(LOADS_AT_ONCE)
            .rate(self.load_rate)
            .burst(tenth)
            .max_wait(MAX_WAIT)
            // As many as can have their turn in that time.
            .max_queue(tenth as usize)
    }
}

/// The load, and how many seconds each part of it takes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Storm {
    pub(crate) rate: u32,
    pub(crate) warm_up: u32,
    pub(crate) healthy: u32,
    pub(crate) outage: u32,
    pub(crate) after: u32,
}

pub(crate) enum Parsed {
    Run(Options),
    Help,
}

/// Parses the arguments after the program's name.
pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Parsed, String> {
    let mut arguments = arguments;
    let (mut postgres, mut items, mut listen) = (None, 5_000, None);
    let (mut load_ms, mut load_rate) = (10, 400);
    let mut storm = Storm {
        rate: 2_000,
        warm_up: 5,
        healthy: 5,
        outage: 5,
        after: 10,
    };
    let (mut storms, mut of_the_storm, mut unguarded) = (false, None, false);
    while let Some(argument) = arguments.next() {
        let (option, given) = match argument.split_once('=') {
            Some((option, value)) => (option.to_owned(), Some(value.to_owned())),
            None => (argument, None),
        };
        match (option.as_str(), &given) {
            ("--help" | "-h", None) => return Ok(Parsed::Help),
            ("--storm", None) => {
                storms = true;
                continue;
            }
            ("--unguarded", None) => {
                unguarded = true;
                continue;
            }
            ("--help" | "-h" | "--storm" | "--unguarded", Some(_)) => {
                return Err(format!("{option} takes no value"));
            }
            _ => {}
        }
        let seconds = match option.as_str() {
            "--warm-up" => Some(&mut storm.warm_up),
            "--healthy" => Some(&mut storm.healthy),
            "--outage" => Some(&mut storm.outage),
            "--after" => Some(&mut storm.after),
            _ => None,
        };
        let value = || {
            let value = given.or_else(|| arguments.next());
            value.ok_or_else(|| format!("{option} needs a value"))
        };
        match (option.as_str(), seconds) {
            (_, Some(seconds)) => *seconds = number(&option, &value()?, MAX_SECONDS)?,
            ("--rate", _) => storm.rate = number(&option, &value()?, 50_000)?,
            ("--items", _) => items = number(&option, &value()?, 1_000_000)?,
            ("--load-ms", _) => load_ms = number(&option, &value()?, 1_000)?,
            ("--load-rate", _) => load_rate = number(&option, &value()?, 1_000_000)?,
            ("--postgres", _) => postgres = Some(value()?),
            ("--listen", _) => {
                let value = value()?;
                let address = value.parse::<SocketAddr>();
                let address = address.map_err(|_| {
                    format!("--listen is an address such as 127.0.0.1:8080, not {value:?}")
                })?;
                listen = Some(address);
            }
            _ => return Err(format!("there is no option {option}")),
        }
        let of_the_service = [
            "--items",
            "--load-ms",
            "--load-rate",
            "--listen",
            "--postgres",
        ];
        if !of_the_service.contains(&option.as_str()) {
            of_the_storm = Some(option);
        }
    }
    if let (false, Some(option)) = (storms, of_the_storm) {
        return Err(format!("{option} is for --storm"));
    }
    let port = if storms { 0 } else { 8080 };
    Ok(Parsed::Run(Options {
        postgres,
        items,
        load_cost: Duration::from_millis(load_ms.into()),
        load_rate,
        unguarded,
        listen: listen.unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
        storm: storms.then_some(storm),
    }))
}

fn number(option: &str, value: &str, most: u32) -> Result<u32, String> {
    match value.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!(
            "{option} is a whole number from 1 to {most}, not {value:?}"
        )),
    }
}
