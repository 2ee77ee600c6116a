//! The run, for a machine to read.

use serde_json::{Value, json};
use tower_memcached::{FailureMode, Sent};

use crate::breakers::Transition;
use crate::clients::Contender;
use crate::failures::Alike;
use crate::load;
use crate::options::{Options, Servers};
use crate::report::Run;
use crate::tally::{GOOD_WITHIN, Phase, RECOVERED_PERCENT, RECOVERED_SECONDS, Second, Summary};

/// The whole run; these names stay.
///
/// ```text
/// settings
///   servers              "in-process" | "memcached" | "own"
///   nodes                [address]; the fault is the first one's
///   fault                as the option is written; null where it is not ours to make
///   fault_from_s, fault_to_s, seconds, rate_per_s, in_flight, keys, gets_percent, seed
///   good_within_ms       what is answered correctly within this is good
///   recovered_percent, recovered_seconds
///                        a client has recovered when so many seconds in a row had this goodput
/// clients.naive, .resilient (redistribute), .cancel, .retry: those that were driven
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
///     recovery_s         full seconds from the end of the fault until several in a row were well;
///                        null: never, or no fault of ours
///     requests, ok, miss, error, wrong, max_ms   of the whole run
///     errors_by_kind     {an ErrorKind's name, or "Unanswered": how many}
///   failures[]           of the whole run: kind, sent (a Sent's name), count, p50_ms, max_ms,
///                        first (its text)
///   breakers[]           changes seen: at_s, node, state (a BreakerState's name), cause
/// ```
pub(crate) fn document(options: &Options, nodes: &[String], runs: &[Run]) -> Value {
    let timeline = &options.timeline;
    let outage = timeline.outage.as_ref();
    let clients = runs.iter().map(|run| {
        let seconds = run.tally.seconds().iter().enumerate();
        let seconds = seconds.map(|(number, of)| second(number, timeline.phase(number), of));
        let client = json!({
            "seconds": seconds.collect::<Vec<_>>(),
            "summary": summary(&run.summary),
            "failures": run.tally.failures().iter().map(failure).collect::<Vec<_>>(),
            "breakers": run.transitions.iter().map(transition).collect::<Vec<_>>(),
        });
        (name(run.contender).to_owned(), client)
    });
    json!({
        "settings": {
            "servers": match options.servers {
                Servers::InProcess => "in-process",
                Servers::Memcached => "memcached",
                Servers::Own(_) => "own",
            },
            "nodes": nodes,
            "fault": outage.map(|outage| outage.fault.name()),
            "fault_from_s": outage.map(|outage| outage.when.start),
            "fault_to_s": outage.map(|outage| outage.when.end),
            "seconds": timeline.seconds,
            "rate_per_s": options.rate,
            "in_flight": load::IN_FLIGHT,
            "keys": load::KEYS,
            "gets_percent": load::GETS_PERCENT,
            "seed": load::SEED,
            "good_within_ms": GOOD_WITHIN.as_millis() as u64,
            "recovered_percent": RECOVERED_PERCENT,
            "recovered_seconds": RECOVERED_SECONDS,
        },
        "clients": clients.collect::<serde_json::Map<_, _>>(),
    })
}

/// Of this crate's client, the one with the default mode is named after none.
fn name(contender: Contender) -> &'static str {
    match contender {
        Contender::Resilient(FailureMode::Redistribute) => "resilient",
        other => other.name(),
    }
}

fn second(number: usize, phase: Phase, second: &Second) -> Value {
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
        "p50_ms": second.latencies.quantile_ms(0.50),
        "p99_ms": second.latencies.quantile_ms(0.99),
        "max_ms": second.latencies.max_ms(),
    })
}

/// The goodput is of the fault, or of the whole run where there is no fault of ours.
fn summary(summary: &Summary) -> Value {
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

fn failure(((kind, sent), alike): (&(String, Sent), &Alike)) -> Value {
    json!({
        "kind": kind,
        "sent": format!("{sent:?}"),
        "count": alike.latencies.count(),
        "p50_ms": alike.latencies.quantile_ms(0.50),
        "max_ms": alike.latencies.max_ms(),
        "first": alike.first,
    })
}

fn transition(transition: &Transition) -> Value {
    json!({
        "at_s": transition.at.as_secs_f64(),
        "node": &*transition.node,
        "state": format!("{:?}", transition.state),
        "cause": transition.cause,
    })
}
