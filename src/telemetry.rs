//! Every metric name, in one place. Metrics go through the [`metrics`] facade; without a recorder
//! they cost nearly nothing. A label is a node, an operation, an outcome or a cause, never a key.
//!
//! Handles are made when first used and made anew every 10 s, so that a recorder that is installed
//! after the client was built counts too, from then on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use crate::request::Operation;

/// Requests to a node ended. Labels: `node`, `operation` ([`Operation::name`]), `outcome`
/// (`answered`, `timeout`, `failed`, `refused` by ourselves or a layer, `dropped` by the caller,
/// `late` for time-outs found late by our own fault). Probes are not counted.
pub const REQUESTS: &str = "memcached_requests_total";
/// How long requests to a node took until they were answered, in seconds. Label: `node`.
pub const LATENCY: &str = "memcached_request_duration_seconds";
/// Requests at a node now, queued or sent; a gauge, set each second. Label: `node`.
pub const IN_FLIGHT: &str = "memcached_requests_in_flight";
/// How many may be: as configured, or fewer while the node answers late; a gauge, set each second. Label: `node`.
pub const IN_FLIGHT_LIMIT: &str = "memcached_in_flight_limit";
/// Requests in the queues of a node's connections, sent ones included; a gauge, set each second.
/// Label: `node`.
pub const QUEUE_DEPTH: &str = "memcached_queue_depth";
/// Connections to a node that are up; a gauge, set each second. Label: `node`.
pub const CONNECTIONS: &str = "memcached_connections";
/// A node's circuit breaker: 0 closed, 1 ramping, 2 half-open, 3 open; a gauge. Label: `node`.
pub const BREAKER_STATE: &str = "memcached_breaker_state";
/// What decides where keys go, as a number ([`Client::ring_fingerprint`](crate::Client::ring_fingerprint));
/// a gauge, set each second, 0 while there are no nodes. Services that share a cache must show the same
/// one: `count(count_values("ring", memcached_ring_fingerprint > 0))` over those that do is 1. Label: `group`
/// whose nodes they are (`client` for those of the whole client). Of several clients in one process that
/// have the same group it shows one or the other: ask these themselves.
pub const RING_FINGERPRINT: &str = "memcached_ring_fingerprint";
/// A [discovery](crate::discovery) has not found a list of nodes that can be used: those there are stay.
/// Labels: `group` whose nodes they are (`client` for those of the whole client), `reason` (`error`;
/// `empty`: it has found none; `invalid`: what it has found cannot be a list of nodes).
pub const DISCOVERY_FAILURES: &str = "memcached_discovery_failures_total";
/// A discovery has changed the nodes. Label: `group`.
pub const DISCOVERY_CHANGES: &str = "memcached_discovery_changes_total";
/// When a discovery last found a list of nodes, the same one or another, in seconds since 1970; a
/// gauge. Label: `group`.
pub const DISCOVERY_LAST_FOUND: &str = "memcached_discovery_last_found_timestamp_seconds";
/// A node's circuit breaker opened. Labels: `node`, `cause`
/// ([`EjectionCause::name`](crate::EjectionCause::name)).
pub const EJECTIONS: &str = "memcached_ejections_total";
/// A node that was out takes requests again. Label: `node`.
pub const READMISSIONS: &str = "memcached_readmissions_total";
/// A readiness probe ended. Labels: `node`, `result` (`success`, `failure`).
pub const PROBES: &str = "memcached_probes_total";
/// Keys of which a node may hold something old; a gauge, set each second. Label: `node`.
pub const JOURNAL_KEYS: &str = "memcached_journal_keys";
/// A key found no room in a node's journal. Label: `node`.
pub const JOURNAL_OVERFLOWS: &str = "memcached_journal_overflows_total";
/// A key was deleted on a node because of its journal. Label: `node`.
pub const JOURNAL_DELETIONS: &str = "memcached_journal_deletions_total";
/// A request went to another node than its own. Label: `node`, its own.
pub const FAILOVERS: &str = "memcached_failovers_total";
/// A request was sent again to the same node. Label: `node`.
pub const RETRIES: &str = "memcached_retries_total";
/// A second attempt was made while the first was still unanswered. Label: `node`.
pub const HEDGES: &str = "memcached_hedges_total";
/// A retry, failover or hedge was not made because the retry budget was spent. Label: `node`.
pub const BUDGET_EXHAUSTED: &str = "memcached_retry_budget_exhausted_total";
/// A read that may load ended. Label: `result` (`hit`; `stale`; `refreshed`, good and being loaded
/// anew; `loaded`, by this caller or the one it waited for; `absent`, not in the database; `shed`;
/// `failed`).
pub const READ_THROUGHS: &str = "memcached_read_throughs_total";
/// What was loaded was written to the cache, or not. Label: `result` (`stored`; `outdated`: the key
/// was written or invalidated during the load; `failed`; `dropped`: too many were under way;
/// `skipped`: the cache could not be asked before the load; `removed`: there is nothing, and a lease or
/// an old value was taken away).
pub const REFILLS: &str = "memcached_refills_total";
/// A wait for another process that has the lease on a key ended. Label: `result` (`filled`;
/// `released`: it gave the lease up, or the cache did not answer; `ended`: it took too long).
pub const LEASE_WAITS: &str = "memcached_lease_waits_total";
/// A [claim](crate::Client::claim) was decided. Label: `result` (`first` or `seen`, as the cache has it;
/// where that cannot tell `allowed`, `denied`, or `fallback` if that has answered; `failed`: it has not).
pub const CLAIMS: &str = "memcached_claims_total";

/// A request was not sent, because a [`KillSwitch`](crate::KillSwitch) is thrown. Labels: `group`, whose
/// switch it is (`client` for that of the whole client), and `operation`.
pub const BYPASSED: &str = "memcached_bypassed_total";
/// A functional group's own limits refused a request. Labels: `group`, and `reason` (`queue_full`: as many
/// were under way and waited as may; `waited`: none of those ended in time; `rate`).
pub const GROUP_SHED: &str = "memcached_group_shed_total";

/// A load under a [`LoadGuard`](crate::LoadGuard) ended. Labels: `guard`, its name; `result`
/// (`success`, `failure`, `abandoned` by the caller). One of a group counts in the group and in the
/// database's guard, here and below.
pub const LOADS_ENDED: &str = "memcached_loads_ended_total";
/// How long loads took until they succeeded or failed, in seconds; not how long they waited. Label:
/// `guard`.
pub const LOADS_DURATION: &str = "memcached_loads_duration_seconds";
/// A load was not made, to protect the database. Labels: `guard` whose limit it was; `reason`
/// (`throttled` since the database fails, `queue_full`, `waited` too long for its turn, `rate`).
pub const LOADS_SHED: &str = "memcached_loads_shed_total";
/// Loads that run now; a gauge. Label: `guard`.
pub const LOADS_RUNNING: &str = "memcached_loads_running";
/// Loads that wait for their turn now; a gauge. Label: `guard`.
pub const LOADS_QUEUED: &str = "memcached_loads_queued";

/// A ring's fingerprint, shown for as long as it is there.
#[derive(Debug)]
pub(crate) struct RingMark {
    group: Arc<str>,
    fingerprint: AtomicU64,
}

impl RingMark {
    pub(crate) fn new(group: impl Into<Arc<str>>) -> Self {
        Self {
            group: group.into(),
            fingerprint: AtomicU64::new(0),
        }
    }

    pub(crate) fn get(&self) -> u64 {
        self.fingerprint.load(Ordering::Acquire)
    }

    pub(crate) fn set(&self, fingerprint: u64) {
        self.fingerprint.store(fingerprint, Ordering::Release);
    }

    /// Again and again, for a recorder may have been installed since.
    pub(crate) fn show(&self) {
        // Under 2^53: nothing of it is lost.
        gauge!(RING_FINGERPRINT, "group" => self.group.clone()).set(self.get() as f64);
    }
}

impl Drop for RingMark {
    fn drop(&mut self) {
        self.set(0);
        self.show();
    }
}

/// Discoveries are rare: their handles are made at each use.
pub(crate) fn discovery_failed(group: &Arc<str>, reason: &'static str) {
    counter!(DISCOVERY_FAILURES, "group" => group.clone(), "reason" => reason).increment(1);
}

pub(crate) fn discovery_changed(group: &Arc<str>) {
    counter!(DISCOVERY_CHANGES, "group" => group.clone()).increment(1);
}

pub(crate) fn discovery_found(group: &Arc<str>, at: SystemTime) {
    let since = at.duration_since(SystemTime::UNIX_EPOCH);
    let seconds = since.map_or(0.0, |since| since.as_secs_f64());
    gauge!(DISCOVERY_LAST_FOUND, "group" => group.clone()).set(seconds);
}

/// Loads are rare compared with requests: their handles are made at each use.
pub(crate) fn load_ended(guard: &Arc<str>, result: &'static str, took: Option<Duration>) {
    counter!(LOADS_ENDED, "guard" => guard.clone(), "result" => result).increment(1);
    if let Some(took) = took {
        histogram!(LOADS_DURATION, "guard" => guard.clone()).record(took.as_secs_f64());
    }
}

pub(crate) fn load_shed(guard: &Arc<str>, reason: &'static str) {
    counter!(LOADS_SHED, "guard" => guard.clone(), "reason" => reason).increment(1);
}

/// `gauge` is [`LOADS_RUNNING`] or [`LOADS_QUEUED`].
pub(crate) fn loads(gauge: &'static str, guard: &Arc<str>, loads: usize) {
    gauge!(gauge, "guard" => guard.clone()).set(loads as f64);
}

pub(crate) fn read_through(result: &'static str) {
    match result {
        // Most are: the label that is known beforehand needs no allocation.
        "hit" => counter!(READ_THROUGHS, "result" => "hit").increment(1),
        _ => counter!(READ_THROUGHS, "result" => result).increment(1),
    }
}

pub(crate) fn refill(result: &'static str) {
    counter!(REFILLS, "result" => result).increment(1);
}

pub(crate) fn lease_wait(result: &'static str) {
    counter!(LEASE_WAITS, "result" => result).increment(1);
}

pub(crate) fn bypassed(group: &str, operation: &'static str) {
    counter!(BYPASSED, "group" => group.to_owned(), "operation" => operation).increment(1);
}

pub(crate) fn group_shed(group: &str, reason: &'static str) {
    counter!(GROUP_SHED, "group" => group.to_owned(), "reason" => reason).increment(1);
}

pub(crate) fn claim(result: &'static str) {
    counter!(CLAIMS, "result" => result).increment(1);
}

/// How old handles may become: a recorder may have been installed since.
pub(crate) const REMADE_EVERY: Duration = Duration::from_secs(10);

/// A handle, made when first used.
struct Lazy<H>(OnceLock<H>);

impl<H> Default for Lazy<H> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<H> Lazy<H> {
    fn get(&self, make: impl FnOnce() -> H) -> &H {
        self.0.get_or_init(make)
    }
}

/// What is counted at one node.
pub(crate) struct NodeMeters {
    node: String,
    outcomes: &'static [&'static str],
    handles: ArcSwap<Handles>,
}

#[derive(Default)]
struct Handles {
    requests: Box<[Lazy<Counter>]>,
    latency: Lazy<Histogram>,
    events: [Lazy<Counter>; Event::COUNT],
    gauges: [Lazy<Gauge>; Level::COUNT],
}

/// What is counted one by one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    Readmission,
    ProbeSuccess,
    ProbeFailure,
    JournalOverflow,
    JournalDeletion,
    Failover,
    Retry,
    Hedge,
    BudgetExhausted,
}

impl Event {
    const COUNT: usize = Self::BudgetExhausted as usize + 1;

    const fn name(self) -> &'static str {
        match self {
            Self::Readmission => READMISSIONS,
            Self::ProbeSuccess | Self::ProbeFailure => PROBES,
            Self::JournalOverflow => JOURNAL_OVERFLOWS,
            Self::JournalDeletion => JOURNAL_DELETIONS,
            Self::Failover => FAILOVERS,
            Self::Retry => RETRIES,
            Self::Hedge => HEDGES,
            Self::BudgetExhausted => BUDGET_EXHAUSTED,
        }
    }
}

/// What goes up and down.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    InFlight,
    InFlightLimit,
    QueueDepth,
    Connections,
    BreakerState,
    JournalKeys,
}

impl Level {
    const COUNT: usize = Self::JournalKeys as usize + 1;

    const fn name(self) -> &'static str {
        match self {
            Self::InFlight => IN_FLIGHT,
            Self::InFlightLimit => IN_FLIGHT_LIMIT,
            Self::QueueDepth => QUEUE_DEPTH,
            Self::Connections => CONNECTIONS,
            Self::BreakerState => BREAKER_STATE,
            Self::JournalKeys => JOURNAL_KEYS,
        }
    }
}

impl NodeMeters {
    /// `outcomes` are the names of the outcomes that requests are counted by.
    pub(crate) fn new(node: &str, outcomes: &'static [&'static str]) -> Self {
        let meters = Self {
            node: node.to_owned(),
            outcomes,
            handles: ArcSwap::default(),
        };
        meters.remake();
        meters
    }

    /// Forgets the handles: the next use makes them anew.
    pub(crate) fn remake(&self) {
        let cells = Operation::NAMES.len() * self.outcomes.len();
        self.handles.store(Arc::new(Handles {
            requests: (0..cells).map(|_| Lazy::default()).collect(),
            ..Handles::default()
        }));
    }

    /// A request ended; `latency` if it was answered.
    pub(crate) fn request(&self, operation: usize, outcome: usize, latency: Option<Duration>) {
        let handles = self.handles.load();
        let counted = handles.requests[operation * self.outcomes.len() + outcome].get(|| {
            counter!(
                REQUESTS,
                "node" => self.node.clone(),
                "operation" => Operation::NAMES[operation],
                "outcome" => self.outcomes[outcome],
            )
        });
        counted.increment(1);
        if let Some(latency) = latency {
            let histogram = handles
                .latency
                .get(|| histogram!(LATENCY, "node" => self.node.clone()));
            histogram.record(latency.as_secs_f64());
        }
    }

    pub(crate) fn count(&self, event: Event) {
        let handles = self.handles.load();
        let counted = handles.events[event as usize].get(|| {
            let node = self.node.clone();
            match event {
                Event::ProbeSuccess => counter!(PROBES, "node" => node, "result" => "success"),
                Event::ProbeFailure => counter!(PROBES, "node" => node, "result" => "failure"),
                _ => counter!(event.name(), "node" => node),
            }
        });
        counted.increment(1);
    }

    pub(crate) fn set(&self, level: Level, value: usize) {
        let handles = self.handles.load();
        let shown = handles.gauges[level as usize]
            .get(|| gauge!(level.name(), "node" => self.node.clone()));
        shown.set(value as f64);
    }

    /// There is nothing to be shown any more.
    pub(crate) fn clear(&self) {
        for level in [
            Level::InFlight,
            Level::InFlightLimit,
            Level::QueueDepth,
            Level::Connections,
            Level::BreakerState,
            Level::JournalKeys,
        ] {
            self.set(level, 0);
        }
    }

    pub(crate) fn ejected(&self, cause: &'static str) {
        // Rare, and there are many causes.
        counter!(EJECTIONS, "node" => self.node.clone(), "cause" => cause).increment(1);
    }
}
