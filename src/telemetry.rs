//! Every metric name, in one place. Counters go through the [`metrics`] facade: without a
//! recorder they cost nearly nothing. A label is a node or a cause, never a key.
//!
//! These are all rare events; nothing here is on the path of a request that succeeds.

use metrics::counter;

use crate::error::Error;

/// A node's circuit breaker opened. Labels: `node`, `cause`.
pub const BREAKER_OPENED: &str = "memcached_breaker_opened_total";
/// A node's circuit breaker closed again. Label: `node`.
pub const BREAKER_CLOSED: &str = "memcached_breaker_closed_total";
/// A readiness probe of an open node ended. Labels: `node`, `result` (`success`, `failure`).
pub const PROBES: &str = "memcached_probes_total";
/// A request went to another node than its own. Label: `node`, its own.
pub const FAILOVERS: &str = "memcached_failovers_total";
/// A request was sent again to the same node. Label: `node`.
pub const RETRIES: &str = "memcached_retries_total";
/// A retry or failover was not made because the retry budget was spent. Label: `node`.
pub const BUDGET_EXHAUSTED: &str = "memcached_retry_budget_exhausted_total";
/// A loaded value could not be put into the cache.
pub const REFILLS_FAILED: &str = "memcached_refills_failed_total";

pub(crate) fn breaker_opened(node: &str, cause: &Error) {
    let cause = format!("{:?}", cause.kind());
    counter!(BREAKER_OPENED, "node" => node.to_owned(), "cause" => cause).increment(1);
}

pub(crate) fn breaker_closed(node: &str) {
    counter!(BREAKER_CLOSED, "node" => node.to_owned()).increment(1);
}

pub(crate) fn probed(node: &str, ready: bool) {
    let result = if ready { "success" } else { "failure" };
    counter!(PROBES, "node" => node.to_owned(), "result" => result).increment(1);
}

pub(crate) fn failed_over(node: &str) {
    counter!(FAILOVERS, "node" => node.to_owned()).increment(1);
}

pub(crate) fn retried(node: &str) {
    counter!(RETRIES, "node" => node.to_owned()).increment(1);
}

pub(crate) fn budget_exhausted(node: &str) {
    counter!(BUDGET_EXHAUSTED, "node" => node.to_owned()).increment(1);
}

pub(crate) fn refill_failed() {
    counter!(REFILLS_FAILED).increment(1);
}
