//! What flows down the stack of layers.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tower::{Service, ServiceExt as _};

use crate::error::{BoxError, Error, Result};
use crate::key::Key;
use crate::response::{Lookup, Response};
use crate::ttl::Ttl;
use crate::value::{CasToken, Payload};

/// What is asked of the cache.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Operation {
    /// Read a value; answered with [`Response::Value`](crate::Response::Value).
    Get {
        /// Which.
        key: Key,
        /// Whether to read its CAS token too.
        with_cas: bool,
    },
    /// Read many values at once; answered with [`Response::Values`](crate::Response::Values), in
    /// the order of the keys.
    GetMany {
        /// Which.
        keys: Arc<[Key]>,
    },
    /// Read a value with all that a [read-through](crate::read_through) has to know of it, and take
    /// the lease on it if there is one to be had; answered with
    /// [`Response::Found`](crate::Response::Found).
    ///
    /// In the classic protocol there is a lease only on what is not there, whatever
    /// [`recache`](LeaseTerms::recache) says, and to take it are three round trips within the time of one
    /// attempt. One that is dropped or fails on the way may leave the lease taken until it ends. Through
    /// a proxy there is none ([`LeaseState::Unknown`](crate::LeaseState::Unknown)).
    Lookup {
        /// Which.
        key: Key,
        /// On what terms; `None` only reads.
        lease: Option<LeaseTerms>,
    },
    /// Read a value and give it a new TTL; answered with
    /// [`Response::Value`](crate::Response::Value).
    GetAndTouch {
        /// Which.
        key: Key,
        /// Its new TTL.
        ttl: Ttl,
    },
    /// Write a value; answered with [`Response::Stored`](crate::Response::Stored).
    Store {
        /// Under what condition, and how.
        mode: StoreMode,
        /// Where.
        key: Key,
        /// What.
        payload: Payload,
        /// For how long; append and prepend leave the TTL as it is.
        ttl: Ttl,
    },
    /// Write a value if it is still the one that was read; answered with
    /// [`Response::Swapped`](crate::Response::Swapped).
    CompareAndSwap {
        /// Where.
        key: Key,
        /// What.
        payload: Payload,
        /// For how long.
        ttl: Ttl,
        /// The version that must still be there.
        token: CasToken,
    },
    /// Remove a value; answered with [`Response::Deleted`](crate::Response::Deleted).
    Delete {
        /// Which.
        key: Key,
    },
    /// Give a value a new TTL; answered with [`Response::Touched`](crate::Response::Touched).
    Touch {
        /// Which.
        key: Key,
        /// Its new TTL.
        ttl: Ttl,
    },
    /// Add to or subtract from a decimal number; answered with
    /// [`Response::Counter`](crate::Response::Counter).
    Arithmetic {
        /// Which.
        key: Key,
        /// By how much.
        delta: u64,
        /// Up, wrapping at 2^64, or down, stopping at 0: as memcached does.
        direction: Direction,
    },
    /// Ask each node for its version; [`Response::Version`](crate::Response::Version).
    Version,
    /// Remove everything from each node; [`Response::Flushed`](crate::Response::Flushed).
    FlushAll,
    /// Ask each node for its counters; [`Response::Stats`](crate::Response::Stats).
    Stats,
}

/// What a lease is asked for with: the right, and with it the duty, to load a value, which only one
/// of all clients of a memcached gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct LeaseTerms {
    /// For how long nobody else gets it if there is no value; whole seconds, rounded up.
    pub duration: Duration,
    /// A value that has less than this left is to be loaded anew; whole seconds, rounded up.
    pub recache: Duration,
}

impl LeaseTerms {
    /// A lease of that duration on what is not there.
    #[must_use]
    pub fn new(duration: Duration) -> Self {
        Self {
            duration,
            recache: Duration::ZERO,
        }
    }

    /// Also on a value that has less than this left.
    #[must_use]
    pub fn recache(mut self, left: Duration) -> Self {
        self.recache = left;
        self
    }
}

/// How a value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreMode {
    /// Whatever is there.
    Set,
    /// Only where nothing is.
    Add,
    /// The same for a [claim](crate::Client::claim). What it leaves in doubt is its caller's own: one
    /// that fails does not make the claim that may be there already be forgotten.
    Claim,
    /// Only where something is.
    Replace,
    /// Behind what is there.
    Append,
    /// Before what is there.
    Prepend,
}

/// Which way a counter goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Add.
    Up,
    /// Subtract.
    Down,
}

impl Operation {
    /// The key that decides where it goes; `None` for operations on many keys or on every node.
    #[must_use]
    pub fn key(&self) -> Option<&Key> {
        match self {
            Self::Get { key, .. }
            | Self::Lookup { key, .. }
            | Self::GetAndTouch { key, .. }
            | Self::Store { key, .. }
            | Self::CompareAndSwap { key, .. }
            | Self::Delete { key }
            | Self::Touch { key, .. }
            | Self::Arithmetic { key, .. } => Some(key),
            Self::GetMany { .. } | Self::Version | Self::FlushAll | Self::Stats => None,
        }
    }

    /// A short lower-case name, for metrics and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        Self::NAMES[self.ordinal()]
    }

    /// Whether it may be sent to another node, or again, after an attempt whose outcome is
    /// unknown: get, gets, get_many, lookup, lease, get_and_touch, set, replace, delete and touch.
    /// Never add or claim (it must not succeed beside an original that it cannot see), append,
    /// prepend, counters or cas.
    #[must_use]
    pub fn is_movable(&self) -> bool {
        match self {
            Self::Get { .. }
            | Self::Lookup { .. }
            | Self::GetMany { .. }
            | Self::GetAndTouch { .. }
            | Self::Delete { .. }
            | Self::Touch { .. } => true,
            Self::Store { mode, .. } => matches!(mode, StoreMode::Set | StoreMode::Replace),
            Self::CompareAndSwap { .. }
            | Self::Arithmetic { .. }
            | Self::Version
            | Self::FlushAll
            | Self::Stats => false,
        }
    }

    /// The key, if it is one of which an older value must not be read after this: that of a set,
    /// add, replace or delete. What counters, append, cas and claims leave in doubt is their caller's
    /// own.
    pub(crate) fn written(&self) -> Option<&Key> {
        match self {
            Self::Store { mode, key, .. } => {
                let whole = matches!(mode, StoreMode::Set | StoreMode::Add | StoreMode::Replace);
                whole.then_some(key)
            }
            Self::Delete { key } => Some(key),
            _ => None,
        }
    }

    /// The answer that there is nothing, if it reads a value.
    pub(crate) fn miss(&self) -> Option<Response> {
        match self {
            Self::Get { .. } | Self::GetAndTouch { .. } => Some(Response::Value(None)),
            Self::Lookup { .. } => Some(Response::Found(Box::new(Lookup::NOTHING))),
            Self::GetMany { keys } => Some(Response::Values(vec![Ok(None); keys.len()])),
            _ => None,
        }
    }

    /// Whether it writes only where nothing is.
    pub(crate) fn is_add(&self) -> bool {
        matches!(self, Self::Store { mode, .. } if matches!(mode, StoreMode::Add | StoreMode::Claim))
    }

    /// Whether it is a compare-and-swap.
    pub(crate) fn is_swap(&self) -> bool {
        matches!(self, Self::CompareAndSwap { .. })
    }

    /// Whether it does the same whatever is there.
    pub(crate) fn is_blind(&self) -> bool {
        match self {
            Self::Store { mode, .. } => *mode == StoreMode::Set,
            Self::Delete { .. } => true,
            _ => false,
        }
    }

    /// Whether what it does leaves something behind that has a TTL.
    pub(crate) fn lasts(&self) -> bool {
        matches!(
            self,
            Self::Store { .. }
                | Self::Touch { .. }
                | Self::GetAndTouch { .. }
                | Self::Lookup { lease: Some(_), .. }
        )
    }

    /// Whether what it leaves differs from what was there before.
    pub(crate) fn changes(&self) -> bool {
        matches!(
            self,
            Self::Store { .. }
                | Self::CompareAndSwap { .. }
                | Self::Delete { .. }
                | Self::Arithmetic { .. }
        )
    }

    /// Its name's place in [`NAMES`](Self::NAMES).
    pub(crate) fn ordinal(&self) -> usize {
        match self {
            Self::Get {
                with_cas: false, ..
            } => 0,
            Self::Get { with_cas: true, .. } => 1,
            Self::Lookup { lease: None, .. } => 2,
            Self::Lookup { lease: Some(_), .. } => 3,
            Self::GetMany { .. } => 4,
            Self::GetAndTouch { .. } => 5,
            Self::Store { mode, .. } => match mode {
                StoreMode::Set => 6,
                StoreMode::Add => 7,
                StoreMode::Claim => 8,
                StoreMode::Replace => 9,
                StoreMode::Append => 10,
                StoreMode::Prepend => 11,
            },
            Self::CompareAndSwap { .. } => 12,
            Self::Delete { .. } => 13,
            Self::Touch { .. } => 14,
            Self::Arithmetic {
                direction: Direction::Up,
                ..
            } => 15,
            Self::Arithmetic {
                direction: Direction::Down,
                ..
            } => 16,
            Self::Version => 17,
            Self::FlushAll => 18,
            Self::Stats => 19,
        }
    }

    /// What [`name`](Self::name) may say.
    pub(crate) const NAMES: [&'static str; 20] = [
        "get",
        "gets",
        "lookup",
        "lease",
        "get_many",
        "get_and_touch",
        "set",
        "add",
        "claim",
        "replace",
        "append",
        "prepend",
        "cas",
        "delete",
        "touch",
        "increment",
        "decrement",
        "version",
        "flush_all",
        "stats",
    ];

    /// Caps the TTL it sets, if it sets one.
    pub(crate) fn cap_ttl(&mut self, limit: Duration) {
        match self {
            Self::Store { ttl, .. }
            | Self::GetAndTouch { ttl, .. }
            | Self::Touch { ttl, .. }
            | Self::CompareAndSwap { ttl, .. } => *ttl = ttl.at_most(limit),
            Self::Lookup {
                lease: Some(terms), ..
            } => terms.duration = terms.duration.min(limit),
            Self::Get { .. }
            | Self::Lookup { lease: None, .. }
            | Self::GetMany { .. }
            | Self::Delete { .. }
            | Self::Arithmetic { .. }
            | Self::Version
            | Self::FlushAll
            | Self::Stats => {}
        }
    }

    /// The largest value it carries, in bytes.
    pub(crate) fn payload_len(&self) -> usize {
        match self {
            Self::Store { payload, .. } | Self::CompareAndSwap { payload, .. } => {
                payload.data().len()
            }
            _ => 0,
        }
    }
}

/// Whose request it is at the node that gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The key's own node.
    Home,
    /// Another node's, moved here while that one is out. It may use half of the in-flight limit,
    /// so that one node's outage cannot crowd out another node's own keys.
    Moved,
}

/// An [`Operation`] with its deadline: what every layer's service takes.
///
/// Cheap to clone and to move: clones share the operation until one of them changes it.
#[derive(Clone, Debug)]
pub struct Request {
    operation: Arc<Operation>,
    deadline: Option<Instant>,
    origin: Origin,
    purpose: Purpose,
    route: u32,
    alarmed: bool,
    attempt_timeout: Option<Duration>,
    time: Option<Instant>,
}

/// What a request is made for, besides what it asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Its caller's own.
    Answer,
    /// To answer sooner than the same request does, which is under way already: over another
    /// connection if there is one.
    Hedge,
    /// To put back what was loaded; nothing has changed.
    Refill,
    /// Not to be sent; only that it would have been is to be taken note of.
    Note,
}

impl Request {
    /// A request without a deadline; [`Client`](crate::Client) stamps one on each.
    #[must_use]
    #[inline]
    pub fn new(operation: Operation) -> Self {
        Self {
            operation: Arc::new(operation),
            deadline: None,
            origin: Origin::Home,
            purpose: Purpose::Answer,
            route: 0,
            alarmed: false,
            attempt_timeout: None,
            time: None,
        }
    }

    /// Sets the moment by which it must have ended. Layers may bring it forward, never put it off:
    /// of two deadlines the earlier stays.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Instant) -> Self {
        self.limit(deadline);
        self
    }

    /// The same in place.
    #[inline]
    pub(crate) fn limit(&mut self, deadline: Instant) {
        self.deadline = Some(self.deadline.map_or(deadline, |known| known.min(deadline)));
    }

    pub(crate) fn with_origin(mut self, origin: Origin) -> Self {
        self.origin = origin;
        self
    }

    pub(crate) fn with_purpose(mut self, purpose: Purpose) -> Self {
        self.purpose = purpose;
        self
    }

    pub(crate) fn purpose(&self) -> Purpose {
        self.purpose
    }

    /// How long one attempt may take, where that is less than the node's own attempt timeout.
    pub(crate) fn with_attempt_timeout(mut self, timeout: Duration) -> Self {
        let known = self.attempt_timeout.unwrap_or(timeout);
        self.attempt_timeout = Some(known.min(timeout));
        self
    }

    pub(crate) fn attempt_timeout(&self) -> Option<Duration> {
        self.attempt_timeout
    }

    /// Has whoever waits for its answer be woken at the deadline by the transport, in the caller's
    /// runtime, and tell so with [`promise_wake`](crate::call::promise_wake).
    pub(crate) fn with_alarm(mut self, alarmed: bool) -> Self {
        self.alarmed = alarmed;
        self
    }

    pub(crate) fn is_alarmed(&self) -> bool {
        self.alarmed
    }

    /// What time it is, for those below that it is given to before it is any later.
    pub(crate) fn tell_time(&mut self, now: Instant) {
        self.time = Some(now);
    }

    /// It is later now.
    pub(crate) fn forget_time(&mut self) {
        self.time = None;
    }

    /// What time it is. It is told once.
    #[inline]
    pub(crate) fn take_time(&mut self) -> Instant {
        self.time.take().unwrap_or_else(Instant::now)
    }

    /// Says which functional group's failure mode, retry budget and nodes are its.
    pub(crate) fn with_route(mut self, route: u32) -> Self {
        self.route = route;
        self
    }

    /// 0 unless it is a group's.
    pub(crate) fn route(&self) -> u32 {
        self.route
    }

    /// Asks a service, whatever errors it has.
    pub(crate) async fn ask<S>(self, service: S) -> Result<Response>
    where
        S: Service<Self, Response = Response>,
        S::Error: Into<BoxError>,
    {
        let answer = service.oneshot(self).await;
        answer.map_err(|error| Error::from_boxed(error.into()))
    }

    /// What is asked.
    #[must_use]
    pub fn operation(&self) -> &Operation {
        &self.operation
    }

    /// What is asked, to be changed by a layer (a prefix before the key, another TTL).
    pub fn operation_mut(&mut self) -> &mut Operation {
        Arc::make_mut(&mut self.operation)
    }

    /// What is asked, by value.
    #[must_use]
    pub fn into_operation(self) -> Operation {
        Arc::unwrap_or_clone(self.operation)
    }

    /// When it must have ended.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    pub(crate) fn origin(&self) -> Origin {
        self.origin
    }
}

impl From<Operation> for Request {
    fn from(operation: Operation) -> Self {
        Self::new(operation)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_what_may_run_twice_is_movable() {
        let key = Key::new("k").unwrap();
        let store = |mode| Operation::Store {
            mode,
            key: key.clone(),
            payload: "v".into(),
            ttl: Ttl::NEVER,
        };
        let movable = [
            Operation::Get {
                key: key.clone(),
                with_cas: true,
            },
            Operation::Delete { key: key.clone() },
            Operation::Touch {
                key: key.clone(),
                ttl: Ttl::NEVER,
            },
            Operation::GetAndTouch {
                key: key.clone(),
                ttl: Ttl::NEVER,
            },
            Operation::Lookup {
                key: key.clone(),
                lease: Some(LeaseTerms::new(Duration::from_secs(2))),
            },
            store(StoreMode::Set),
            store(StoreMode::Replace),
        ];
        assert!(movable.iter().all(Operation::is_movable));
        let pinned = [
            store(StoreMode::Add),
            store(StoreMode::Claim),
            store(StoreMode::Append),
            store(StoreMode::Prepend),
            Operation::Arithmetic {
                key: key.clone(),
                delta: 1,
                direction: Direction::Up,
            },
            Operation::FlushAll,
        ];
        assert!(!pinned.iter().any(Operation::is_movable));
    }

    #[test]
    fn a_layer_cannot_put_a_deadline_off() {
        let now = Instant::now();
        let (soon, late) = (now + Duration::from_millis(1), now + Duration::from_secs(1));
        let request = Request::new(Operation::Version)
            .with_deadline(soon)
            .with_deadline(late);
        assert_eq!(request.deadline(), Some(soon));
    }
}
