//! What flows back up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result, Sent};
use crate::value::{CasToken, Value};

/// The answer to a [`Request`](crate::Request); which variant is fixed by the operation.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Response {
    /// To `Get` and `GetAndTouch`: the value, or `None` for a miss.
    Value(Option<Value>),
    /// To `Lookup`; boxed, so that every response has not to be as large.
    Found(Box<Lookup>),
    /// To `GetMany`: one outcome for each key, in the order of the keys.
    Values(Vec<Result<Option<Value>>>),
    /// To `Store`: whether the condition held and the value is stored.
    Stored(bool),
    /// To `CompareAndSwap`.
    Swapped(CasOutcome),
    /// To `Delete`: whether there was something.
    Deleted(bool),
    /// To `Touch`: whether there was something.
    Touched(bool),
    /// To `Arithmetic`: the new number, or `None` for a miss.
    Counter(Option<u64>),
    /// To `Version`, from one node.
    Version(String),
    /// To `FlushAll`, from one node.
    Flushed,
    /// To `Stats`, from one node.
    Stats(BTreeMap<String, String>),
    /// To `Version`, `FlushAll` and `Stats` from a cluster: each node's own answer.
    Nodes(Vec<NodeResult<Self>>),
}

/// What a node has under a key, for a [read-through](crate::read_through).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lookup {
    /// What is there.
    pub found: Found,
    /// The version of whatever is there, be it a value or the placeholder of somebody's lease. What
    /// is loaded after this was read may be written with it: if anybody has written or deleted the
    /// key meanwhile, it no longer fits.
    pub token: Option<CasToken>,
    /// Whose the lease is.
    pub lease: LeaseState,
    /// Whether another node than the key's own has answered, because that is out. What is there lives
    /// at most for the failover TTL.
    pub away: bool,
    /// Whether it is not told what TTL is left to a value, as in the classic protocol. What is put back
    /// is then not kept past its TTL, for nobody could tell that it is old.
    pub untimed: bool,
}

/// What a [`Lookup`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Found {
    /// No value: it was never stored, is gone, or was marked as outdated by another client.
    Nothing,
    /// It is known that there is no such thing in the database.
    Absent {
        /// For how long that is known still; `None` is for ever.
        left: Option<Duration>,
    },
    /// A value.
    Value {
        /// The value.
        value: Value,
        /// The TTL that is left to it, within a second; `None` is for ever.
        left: Option<Duration>,
    },
    /// There is a value, and a layer could not make sense of it: it is damaged, or in a format that is
    /// not known here. A read-through loads it anew, and replaces it.
    Unreadable,
}

/// Who loads what is not there, or old.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LeaseState {
    /// Nobody has been asked to.
    Free,
    /// Whoever got this answer.
    Won,
    /// Somebody else, who was told before.
    Taken,
    /// The service knows no leases.
    Unknown,
}

impl Lookup {
    pub(crate) const NOTHING: Self = Self {
        found: Found::Nothing,
        token: None,
        lease: LeaseState::Free,
        away: false,
        untimed: false,
    };

    /// An answer made by hand, for services and tests.
    #[must_use]
    pub fn new(found: Found, token: Option<CasToken>, lease: LeaseState) -> Self {
        Self {
            found,
            token,
            lease,
            away: false,
            untimed: false,
        }
    }
}

/// What one node answered.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NodeResult<T> {
    /// The node, as it is named in the configuration.
    pub node: Arc<str>,
    /// Its answer.
    pub result: Result<T>,
}

impl<T> NodeResult<T> {
    pub(crate) fn new(node: Arc<str>, result: Result<T>) -> Self {
        Self { node, result }
    }
}

/// How a compare-and-swap ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CasOutcome {
    /// The value was still the one that was read; the new one is stored.
    Stored,
    /// It was not, or it can no longer be told (the connection the token came over is gone, or
    /// the key's node is another one now). Read again and decide anew.
    Exists,
    /// There is no value.
    NotFound,
}

impl Response {
    /// From a node that is not the key's own.
    pub(crate) fn answered_away(mut self) -> Self {
        if let Self::Found(lookup) = &mut self {
            lookup.away = true;
        }
        self
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Value(_) => "Value",
            Self::Values(_) => "Values",
            Self::Found(_) => "Found",
            Self::Stored(_) => "Stored",
            Self::Swapped(_) => "Swapped",
            Self::Deleted(_) => "Deleted",
            Self::Touched(_) => "Touched",
            Self::Counter(_) => "Counter",
            Self::Version(_) => "Version",
            Self::Flushed => "Flushed",
            Self::Stats(_) => "Stats",
            Self::Nodes(_) => "Nodes",
        }
    }

    /// The node's failure in an answer that is otherwise one: a multi-key read that ended before
    /// its last key.
    pub(crate) fn partial_failure(&self) -> Option<&Error> {
        match self {
            Self::Values(outcomes) => outcomes.iter().find_map(|outcome| outcome.as_ref().err()),
            _ => None,
        }
    }
}

/// A layer gave an answer to another question.
pub(crate) fn misfit(response: &Response) -> Error {
    let name = response.name();
    let message = format!("a layer answered with {name}, which does not fit");
    Error::new(ErrorKind::Layer, message).with_sent(Sent::Maybe)
}
