//! What is printed.

use crate::cache::Cache;
use crate::options::{LOADS_AT_ONCE, Options};
use crate::service::Outcome;
use crate::store::{CONNECTIONS, Store};
use crate::storm::{PATIENCE, Phase, UPDATES_PERCENT};
use crate::tally::Tally;

pub(crate) fn introduce(options: &Options, store: &Store, cache: &Cache) -> String {
    let cost = options.load_cost;
    let guard = match options.unguarded {
        true => "It is asked for all of them, whatever it can do.".to_owned(),
        false => {
            let rate = options.load_rate;
            format!("It is asked for at most {rate} of them, {LOADS_AT_ONCE} at once.")
        }
    };
    let mut text = format!(
        "{} items in {}, with {CONNECTIONS} connections. Each load is made to take {cost:?}\n\
         longer than it does, so the database has fewer than {:.0} loads a second in it.\n\
         {guard}\n\
         The cache is {}, in this process.",
        options.items,
        store.kind(),
        f64::from(CONNECTIONS) / cost.as_secs_f64(),
        cache.addresses().join(", "),
    );
    if let Some(storm) = &options.storm {
        text += &format!(
            "\n{} requests a second over HTTP, {UPDATES_PERCENT} % of them updates, for items by Zipf's law.\n\
             After {} s the whole cache is killed for {} s, and comes back empty.\n\n\
             Each line is a second: the requests that were due in it; how many have ended in it,\n\
             and how (hit: without a load of their own; stale: past its TTL, while it is loaded anew;\n\
             shed: not loaded, to spare the database; failed: an error, or nothing within {PATIENCE:?});\n\
             the loads that the database was asked for, and the most of its connections in use\n\
             at once; and the latency since a request was due.",
            storm.rate,
            storm.warm_up + storm.healthy,
            storm.outage,
        );
    }
    text
}

pub(crate) fn header() -> String {
    let mut header = format!("{:>4}  {:<8} {:>8}", "s", "", "requests");
    for (_, name) in Outcome::ALL {
        header += &format!(" {name:>7}");
    }
    header + &format!(" {:>8} {:>8} {:>9}", "loads", "db conns", "p99 ms")
}

pub(crate) fn row(second: u32, phase: Phase, tally: &Tally) -> String {
    let mut row = format!("{second:>4}  {:<8} {:>8}", mark(phase), tally.requests);
    for (outcome, _) in Outcome::ALL {
        row += &format!(" {:>7}", tally.count(outcome));
    }
    row + &format!(
        " {:>8} {:>8} {:>9.1}",
        tally.loads,
        tally.most_connections,
        tally.p99_ms()
    )
}

/// The phases side by side.
pub(crate) fn summary(phases: &[(Phase, Tally)]) -> String {
    let mut table = format!("\n{:<26}", "");
    for (phase, _) in phases {
        table += &format!("{:>12}", mark(*phase));
    }
    let mut line = |label: &str, cell: &dyn Fn(&Tally) -> String| {
        table += &format!("\n{label:<26}");
        for (_, tally) in phases {
            table += &format!("{:>12}", cell(tally));
        }
    };
    line("requests", &|tally| tally.requests.to_string());
    for (outcome, name) in Outcome::ALL {
        line(name, &|tally| format!("{:.1} %", tally.percent(outcome)));
    }
    line("loads per second", &|tally| {
        format!(
            "{:.0}",
            tally.loads as f64 / f64::from(tally.seconds.max(1))
        )
    });
    line("most loads in a second", &|tally| {
        tally.most_loads.to_string()
    });
    line("most database connections", &|tally| {
        tally.most_connections.to_string()
    });
    line("p99", &|tally| format!("{:.1} ms", tally.p99_ms()));
    table
}

fn mark(phase: Phase) -> &'static str {
    match phase {
        Phase::WarmUp => "warm-up",
        Phase::Healthy => "healthy",
        Phase::Outage => "OUTAGE",
        Phase::After => "after",
    }
}
