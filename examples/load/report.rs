//! What is printed.

use std::time::Duration;

use crate::load::{GETS_PERCENT, KEYS, VALUE_SIZE};
use crate::options::Options;
use crate::scenarios::{Run, Scenario};
use crate::tally::Second;

pub(crate) fn introduce(options: &Options) -> String {
    format!(
        "{GETS_PERCENT} % gets of {VALUE_SIZE}-byte values, {KEYS} keys; good is what is answered correctly, and no miss, \
         within {} ms of being due.\n\
         Latencies are from when a request was due. CPU is in % of one core: of the service's threads, with what the \
         client does on them, and of the client's own.",
        options.deadline.as_millis(),
    )
}

pub(crate) fn header(scenario: Scenario, nodes: usize, what: &str) -> String {
    format!(
        "\n{}: {}\nnodes: {nodes}, {what}\n{:>4}  {:<8}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>8}{:>6}{:>5}  {}",
        scenario.name(),
        scenario.title(),
        "s",
        "",
        "offered",
        "good",
        "p50 ms",
        "p99 ms",
        "p999 ms",
        "shed",
        "p99 ms",
        "errors",
        "in fl.",
        "lag ms",
        "serv.",
        "io",
        "",
    )
}

pub(crate) fn row(number: usize, name: &str, second: &Second) -> String {
    let Second {
        answered,
        shed,
        lag,
        ..
    } = second;
    let percent = |of: fn(&crate::cpu::Usage) -> Duration| match &second.usage {
        Some(usage) => format!(
            "{:.0}",
            of(usage).as_secs_f64() * 100.0 / f64::from(second.seconds)
        ),
        None => "-".to_owned(),
    };
    let mut row = format!(
        "{number:>4}  {name:<8}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>8}{:>6}{:>5}",
        thousands(second.offered),
        thousands(second.good),
        milliseconds(answered.quantile(0.50)),
        milliseconds(answered.quantile(0.99)),
        milliseconds(answered.quantile(0.999)),
        thousands(shed.count()),
        milliseconds(shed.quantile(0.99)),
        thousands(second.failures()),
        thousands(second.in_flight as u64),
        milliseconds(lag.quantile(0.99)),
        percent(|usage| usage.service),
        percent(|usage| usage.io),
    );
    for (kind, count) in &second.errors {
        row += &format!("  {} {kind:?}", thousands(*count));
    }
    if second.refused > 0 {
        row += &format!("  {} refused by the service", thousands(second.refused));
    }
    if second.wrong > 0 {
        row += &format!("  {} WRONG", second.wrong);
    }
    if second.misses > 0 {
        row += &format!("  {} misses", thousands(second.misses));
    }
    row
}

/// What became of a load.
pub(crate) fn past(load: &Second) -> String {
    let mut says = format!(
        "at {} requests/s: {}/s good, {}/s shed, {}/s failed (99 % within {} ms)",
        thousands(load.load() as u64),
        thousands(load.goodput() as u64),
        thousands(load.shed.count() / u64::from(load.seconds.max(1))),
        thousands(load.failures() / u64::from(load.seconds.max(1))),
        milliseconds(load.failed.quantile(0.99)),
    );
    if let Some(usage) = load.usage {
        let each = usage.client().as_secs_f64() * 1e6 / load.offered.max(1) as f64;
        says += &format!(
            "; CPU of client and service {each:.2} us a request, of servers of ours {:.2} us, of the generator {:.2} us",
            usage.servers.as_secs_f64() * 1e6 / load.offered.max(1) as f64,
            usage.generator.as_secs_f64() * 1e6 / load.offered.max(1) as f64,
        );
    }
    let lag = load.lag.quantile(0.999);
    if lag > Duration::from_millis(5) {
        says += &format!(
            "; the generator itself was up to {} ms late",
            milliseconds(lag)
        );
    }
    says
}

pub(crate) fn summary(runs: &[Run]) -> String {
    let mut text = "\n".to_owned();
    for run in runs {
        text += &format!("{}\n", run.scenario.name());
        for note in &run.notes {
            text += &format!("          {note}\n");
        }
        for verdict in &run.verdicts {
            let mark = match verdict.holds {
                true => "met",
                false => "NOT MET",
            };
            text += &format!("  {mark:<8}{}\n", verdict.says);
        }
    }
    text
}

/// Three digits that matter.
pub(crate) fn milliseconds(duration: Duration) -> String {
    match duration.as_secs_f64() * 1_000.0 {
        0.0 => "-".to_owned(),
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => thousands(value.round() as u64),
    }
}

pub(crate) fn thousands(number: u64) -> String {
    match number {
        0..1_000 => number.to_string(),
        _ => format!("{},{:03}", thousands(number / 1_000), number % 1_000),
    }
}
