//! What is printed.

use tower_memcached::Sent;

use crate::breakers::Transition;
use crate::clients::Contender;
use crate::faults::Outage;
use crate::load;
use crate::options::{Options, Servers};
use crate::tally::{Phase, Second, Summary, Tally};

/// One client's run.
pub(crate) struct Run {
    pub(crate) contender: Contender,
    pub(crate) tally: Tally,
    pub(crate) summary: Summary,
    pub(crate) transitions: Vec<Transition>,
}

pub(crate) fn introduce(options: &Options, nodes: &[String]) -> String {
    let Options { rate, timeline, .. } = options;
    let kind = match &options.servers {
        Servers::InProcess => "in-process memcached servers",
        Servers::Memcached => "memcached processes",
        Servers::Own(_) => "memcached servers of yours",
    };
    let what = match &timeline.outage {
        Some(Outage { fault, when }) => format!(
            "{} {} from second {} to {}",
            nodes[0],
            fault.describe(),
            when.start,
            when.end
        ),
        None => "stop one and watch; Ctrl-C ends it early".to_owned(),
    };
    format!(
        "{} {kind}: {what}.\n\
         {rate} requests/s for {} s, {} % gets, at most {} in flight; latency from when a request was due.\n\
         A second is printed once all that was due in it has ended.",
        nodes.len(),
        timeline.seconds,
        load::GETS_PERCENT,
        load::IN_FLIGHT,
    )
}

pub(crate) fn header(contender: Contender) -> String {
    format!(
        "\n{}: {}\n{:>4}  {:<7} {:>6} {:>6} {:>6} {:>9} {:>9} {:>9} {:>9}",
        contender.name(),
        contender.describe(),
        "s",
        "",
        "ok",
        "miss",
        "error",
        "goodput",
        "p50 ms",
        "p99 ms",
        "max ms",
    )
}

pub(crate) fn row(number: usize, phase: Phase, second: &Second) -> String {
    let mark = match phase {
        Phase::Healthy => "healthy",
        Phase::Fault => "FAULT",
        Phase::After => "after",
        Phase::Watched => "",
    };
    let mut row = format!(
        "{number:>4}  {mark:<7} {:>6} {:>6} {:>6} {:>7.1} % {:>9} {:>9} {:>9}",
        second.ok(),
        second.misses,
        second.failed(),
        second.goodput_percent(),
        milliseconds(second.latencies.quantile_ms(0.50)),
        milliseconds(second.latencies.quantile_ms(0.99)),
        milliseconds(second.latencies.max_ms()),
    );
    if second.wrong > 0 {
        row += &format!("  {} WRONG VALUES", second.wrong);
    }
    row
}

/// Three digits that matter.
fn milliseconds(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => thousands(value.round() as u64),
    }
}

fn thousands(number: u64) -> String {
    match number {
        0..1_000 => number.to_string(),
        _ => format!("{},{:03}", thousands(number / 1_000), number % 1_000),
    }
}

/// The clients side by side.
pub(crate) fn summary(runs: &[Run], watched: bool) -> String {
    let (in_fault, worst) = match watched {
        false => ("goodput in the fault", "worst second of the fault"),
        true => ("goodput", "worst second"),
    };
    let mut table = format!("\n{:<28}", "");
    for run in runs {
        table += &format!("{:>14}", run.contender.name());
    }
    let mut line = |label: &str, cell: &dyn Fn(&Summary) -> String| {
        table += &format!("\n{label:<28}");
        for run in runs {
            table += &format!("{:>14}", cell(&run.summary));
        }
    };
    line(in_fault, &|summary| {
        format!("{:.2} %", summary.goodput_percent)
    });
    line(worst, &|summary| {
        format!("{:.1} %", summary.worst_second_percent)
    });
    if !watched {
        line(
            "recovered after",
            &|summary| match summary.recovery_seconds {
                Some(seconds) => format!("{seconds} s"),
                None => "never".to_owned(),
            },
        );
    }
    line("slowest request", &|summary| {
        format!("{} ms", milliseconds(summary.max_ms))
    });
    line("misses", &|summary| thousands(summary.misses));
    line("errors", &|summary| thousands(summary.failed()));
    let kinds = runs.iter().flat_map(|run| run.summary.errors.keys());
    for kind in kinds.collect::<std::collections::BTreeSet<_>>() {
        line(&format!("  {kind}"), &|summary| {
            thousands(summary.errors.get(kind).copied().unwrap_or(0))
        });
    }
    line("wrong values", &|summary| thousands(summary.wrong));
    table
}

/// What each client's errors were, if it had any.
pub(crate) fn errors(runs: &[Run]) -> String {
    let mut text = String::new();
    for run in runs {
        let failures = run.tally.failures();
        if failures.is_empty() {
            continue;
        }
        text += &format!(
            "\nerrors of {}, and the first of each kind:",
            run.contender.name()
        );
        for ((kind, sent), alike) in failures {
            let sent = match sent {
                Sent::No => "not sent",
                Sent::Maybe => "may have been executed",
                Sent::Yes => "answered",
            };
            text += &format!(
                "\n{:>8} {kind}, {sent}: half within {} ms, all within {} ms\n{:>9}{}",
                thousands(alike.latencies.count()),
                milliseconds(alike.latencies.quantile_ms(0.50)),
                milliseconds(alike.latencies.max_ms()),
                "",
                alike.first,
            );
        }
        text += "\n";
    }
    text
}
