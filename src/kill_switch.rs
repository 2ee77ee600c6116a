//! Kill switches: to stop using the cache at once, by hand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::request::{Operation, Purpose, Request, StoreMode};
use crate::response::{CasOutcome, Response};
use crate::telemetry;

/// Stops a client ([`Client::kill_switch`](crate::Client::kill_switch)) or a functional group from using
/// the cache: from any thread, at once, at the price of one atomic load a request. Clones are the same
/// switch.
///
/// While it is thrown every request is answered as by a cache that keeps nothing, and nothing is sent:
/// reads are misses, [`get_or_load`](crate::Client::get_or_load) goes to its loader and puts
/// nothing back, and `set` succeeds with what it wrote gone at once. `replace`, `append`, `prepend`,
/// `touch`, `delete`, `cas` and counters find nothing. `add`, whose success might be taken for a lock,
/// fails with [`ErrorKind::Disabled`], and [`claim`](crate::Client::claim) goes to its policy. `version`,
/// `stats` and `flush_all` are sent all the same: they are the operator's. What is under way when it is
/// thrown goes on, requests that wait for their node ([`FailureMode::Retry`](crate::FailureMode::Retry))
/// included.
///
/// A group's switch is above the client's layers: a [`ReadThroughLayer`](crate::ReadThroughLayer) among
/// them is not asked, and a miss is a miss. The client's switch is below them. A write that a layer between
/// refuses to have noted fails with that layer's error.
///
/// What was written while it is thrown is not read as it was before when the switch is reset: the keys
/// go into the nodes' journals, and are deleted there, also while it is thrown. What counters, `append`
/// and `touch` would have changed is not.
#[derive(Clone, Debug, Default)]
pub struct KillSwitch(Arc<AtomicBool>);

impl KillSwitch {
    /// Stops it.
    pub fn throw(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Lets it go on.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Release);
    }

    /// Whether it is thrown.
    #[must_use]
    #[inline]
    pub fn is_thrown(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn set(&self, thrown: bool) {
        self.0.store(thrown, Ordering::Release);
    }
}

/// Whether a request is sent even if its switch is thrown.
pub(crate) fn spares(request: &Request) -> bool {
    matches!(
        request.operation(),
        Operation::Version | Operation::FlushAll | Operation::Stats
    )
}

/// The answer to what is only to be taken note of.
pub(crate) fn noted() -> Error {
    Error::new(ErrorKind::Disabled, "it is only taken note of")
}

/// What becomes of a request whose switch is thrown, unless that [spares](spares) it.
///
/// It is counted for `group`, which errors call `title`.
pub(crate) fn bypass(request: &Request, group: &str, title: &str) -> Bypassed {
    let operation = request.operation();
    // What a cache says that keeps nothing.
    let answer = match operation {
        Operation::Get { .. } | Operation::GetAndTouch { .. } | Operation::GetMany { .. } => {
            operation.miss()
        }
        // Not as a miss, lest what is loaded be put back.
        Operation::Lookup { .. } | Operation::Version | Operation::FlushAll | Operation::Stats => {
            None
        }
        Operation::Store { mode, .. } => match mode {
            StoreMode::Set => Some(Response::Stored(true)),
            StoreMode::Replace | StoreMode::Append | StoreMode::Prepend => {
                Some(Response::Stored(false))
            }
            StoreMode::Add | StoreMode::Claim => None,
        },
        Operation::CompareAndSwap { .. } => Some(Response::Swapped(CasOutcome::NotFound)),
        Operation::Delete { .. } => Some(Response::Deleted(false)),
        Operation::Touch { .. } => Some(Response::Touched(false)),
        Operation::Arithmetic { .. } => Some(Response::Counter(None)),
    };
    let own = matches!(request.purpose(), Purpose::Answer | Purpose::Hedge);
    let answer = answer.filter(|_| own).ok_or_else(|| {
        let message = format!("{title} is stopped by its kill switch");
        Error::new(ErrorKind::Disabled, message)
    });
    telemetry::bypassed(group, operation.name());
    // What it would have changed must not be read as it was.
    let noted = own && operation.written().is_some();
    Bypassed { answer, noted }
}

pub(crate) struct Bypassed {
    pub(crate) answer: Result<Response>,
    /// Whether others must know of it.
    pub(crate) noted: bool,
}
