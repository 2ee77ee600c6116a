//! What is printed, and the same for a machine to read.

use serde_json::{Value, json};

use crate::breakers::Transition;
use crate::clients::Contender;
use crate::load;
use crate::options::{Fault, Options, Servers};
use crate::tally::{GOOD_WITHIN, Phase, RECOVERED_PERCENT, Second, Summary, Tally};

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
        Servers::InProcess(_) => "in-process memcached servers",
        Servers::Memcached(_) => "memcached processes",
        Servers::Own(_) => "memcached servers of yours",
    };
    let what = match (options.fault(), &timeline.fault) {
        (Some(fault), Some(when)) => {
            let what = match fault {
                Fault::Stop => "does not answer",
                Fault::Kill => "is dead",
            };
            format!(
                "{} {what} from second {} to {}",
                nodes[0], when.start, when.end
            )
        }
        _ => "stop one and watch; Ctrl-C ends it early".to_owned(),
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
        milliseconds(second.quantile_ms(0.50)),
        milliseconds(second.quantile_ms(0.99)),
        milliseconds(second.max_ms()),
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

/// Both clients side by side.
pub(crate) fn summary(runs: &[Run], watched: bool) -> String {
    let (in_fault, worst) = match watched {
        false => ("goodput in the fault", "worst second of the fault"),
        true => ("goodput", "worst second"),
    };
    let mut table = format!("\n{:<28}", "");
    for run in runs {
        table += &format!("{:>12}", run.contender.name());
    }
    let mut line = |label: &str, cell: &dyn Fn(&Summary) -> String| {
        table += &format!("\n{label:<28}");
        for run in runs {
            table += &format!("{:>12}", cell(&run.summary));
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

/// The whole run; these names stay.
///
/// ```text
/// settings
///   servers              "in-process" | "memcached" | "own"
///   nodes                [address]; the fault is the first one's
///   fault                "stop" | "kill"; null where it is not ours to make
///   fault_from_s, fault_to_s, seconds, rate_per_s, in_flight, keys, gets_percent, seed
///   good_within_ms       what is answered correctly within this is good
///   recovered_percent    goodput of a second from which on a client counts as recovered
/// clients.naive, clients.resilient
///   seconds[]            of when requests were due:
///     second, phase      from 0; "healthy" | "fault" | "after" | "watched"
///     due                how many requests; = ok + miss + error + wrong
///     ok, miss           hits and stores; gets answered with a miss
///     error              failed, or not answered by the end of the run
///     wrong              hits with a value that is not the key's
///     good, goodput_percent
///     p50_ms, p99_ms, max_ms   from when they were due, errors included
///   summary
///     goodput_percent, worst_second_percent   of the fault; of the run where that is null
///     recovery_s         full seconds from the end of the fault until all was well for good;
///                        null: never, or no fault of ours
///     requests, ok, miss, error, wrong, max_ms   of the whole run
///     errors_by_kind     {an ErrorKind's name, or "Unanswered": how many}
///   breakers[]           changes seen: at_s, node, state (a BreakerState's name), cause
/// ```
pub(crate) fn json(options: &Options, nodes: &[String], runs: &[Run]) -> Value {
    let timeline = &options.timeline;
    let clients = runs.iter().map(|run| {
        let seconds = run.tally.seconds().iter().enumerate();
        let client = json!({
            "seconds": seconds
                .map(|(number, second)| json_second(number, timeline.phase(number), second))
                .collect::<Vec<_>>(),
            "summary": json_summary(&run.summary),
            "breakers": run.transitions.iter().map(json_transition).collect::<Vec<_>>(),
        });
        (run.contender.name().to_owned(), client)
    });
    json!({
        "settings": {
            "servers": match options.servers {
                Servers::InProcess(_) => "in-process",
                Servers::Memcached(_) => "memcached",
                Servers::Own(_) => "own",
            },
            "nodes": nodes,
            "fault": options.fault().map(|fault| match fault {
                Fault::Stop => "stop",
                Fault::Kill => "kill",
            }),
            "fault_from_s": timeline.fault.as_ref().map(|fault| fault.start),
            "fault_to_s": timeline.fault.as_ref().map(|fault| fault.end),
            "seconds": timeline.seconds,
            "rate_per_s": options.rate,
            "in_flight": load::IN_FLIGHT,
            "keys": load::KEYS,
            "gets_percent": load::GETS_PERCENT,
            "seed": load::SEED,
            "good_within_ms": GOOD_WITHIN.as_millis() as u64,
            "recovered_percent": RECOVERED_PERCENT,
        },
        "clients": clients.collect::<serde_json::Map<_, _>>(),
    })
}

fn json_second(number: usize, phase: Phase, second: &Second) -> Value {
    json!({
        "second": number,
        "phase": match phase {
            Phase::Healthy => "healthy",
            Phase::Fault => "fault",
            Phase::After => "after",
            Phase::Watched => "watched",
        },
        "due": second.due(),
        "ok": second.ok(),
        "miss": second.misses,
        "error": second.failed(),
        "wrong": second.wrong,
        "good": second.good,
        "goodput_percent": second.goodput_percent(),
        "p50_ms": second.quantile_ms(0.50),
        "p99_ms": second.quantile_ms(0.99),
        "max_ms": second.max_ms(),
    })
}

/// The goodput is of the fault, or of the whole run where there is no fault of ours.
fn json_summary(summary: &Summary) -> Value {
    json!({
        "goodput_percent": summary.goodput_percent,
        "worst_second_percent": summary.worst_second_percent,
        "recovery_s": summary.recovery_seconds,
        "requests": summary.requests,
        "ok": summary.ok,
        "miss": summary.misses,
        "error": summary.failed(),
        "errors_by_kind": summary.errors,
        "wrong": summary.wrong,
        "max_ms": summary.max_ms,
    })
}

fn json_transition(transition: &Transition) -> Value {
    json!({
        "at_s": transition.at.as_secs_f64(),
        "node": &*transition.node,
        "state": format!("{:?}", transition.state),
        "cause": transition.cause,
    })
}
