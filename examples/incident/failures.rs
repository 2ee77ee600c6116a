//! What the errors were: how many of a kind, how soon they came, and one of them in full.

use std::collections::BTreeMap;
use std::time::Duration;

use tower_memcached::{Error, Sent};

use crate::latencies::Latencies;

/// Errors by the name of their kind, and by whether the request may have been executed.
pub(crate) type Failures = BTreeMap<(String, Sent), Alike>;

/// Errors that mean the same to a caller.
#[derive(Debug)]
pub(crate) struct Alike {
    pub(crate) latencies: Latencies,
    /// The first one's text.
    pub(crate) first: String,
}

/// Adds one. Its latency is from when the request was due.
pub(crate) fn record(failures: &mut Failures, error: &Error, latency: Duration) {
    let kind = (format!("{:?}", error.kind()), error.sent());
    let alike = failures.entry(kind).or_insert_with(|| Alike {
        latencies: Latencies::new(),
        first: error.to_string(),
    });
    alike.latencies.record(latency);
}
