//! The result of a multi-key read: partial by design.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::key::Key;
use crate::value::Value;

/// How the read of one key ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It is there.
    Hit(Value),
    /// Its node answered that it is not there.
    Miss,
    /// Whether it is there is not known.
    Error(Error),
}

impl Outcome {
    /// The value of a hit.
    #[must_use]
    pub fn value(&self) -> Option<&Value> {
        match self {
            Self::Hit(value) => Some(value),
            Self::Miss | Self::Error(_) => None,
        }
    }

    /// Hit or miss as `get` gives them.
    ///
    /// # Errors
    /// The error of this key.
    pub fn into_result(self) -> Result<Option<Value>> {
        match self {
            Self::Hit(value) => Ok(Some(value)),
            Self::Miss => Ok(None),
            Self::Error(error) => Err(error),
        }
    }
}

impl From<Result<Option<Value>>> for Outcome {
    fn from(result: Result<Option<Value>>) -> Self {
        match result {
            Ok(Some(value)) => Self::Hit(value),
            Ok(None) => Self::Miss,
            Err(error) => Self::Error(error),
        }
    }
}

/// What [`Client::get_many`](crate::Client::get_many) read: an [`Outcome`] for each key, in the
/// order they were asked for. A node that is out makes errors of its own keys, and leaves the
/// others alone.
#[derive(Clone, Debug, Default)]
pub struct MultiGet {
    /// An invalid key is none, and its outcome says so.
    keys: Vec<Option<Key>>,
    outcomes: Vec<Outcome>,
}

impl MultiGet {
    pub(super) fn new(keys: Vec<Option<Key>>, outcomes: Vec<Outcome>) -> Self {
        Self { keys, outcomes }
    }

    /// How many keys were asked for, repeated ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.outcomes.len()
    }

    /// Whether no keys were asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }

    /// The outcomes, in the order of the keys.
    #[must_use]
    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    /// The outcomes by value, in the order of the keys.
    #[must_use]
    pub fn into_outcomes(self) -> Vec<Outcome> {
        self.outcomes
    }

    /// The keys with their outcomes, in order, without keys that were invalid.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Outcome)> {
        let pairs = self.keys.iter().zip(&self.outcomes);
        pairs.filter_map(|(key, outcome)| Some((key.as_ref()?, outcome)))
    }

    /// The hits, by key.
    #[must_use]
    pub fn into_hits(self) -> HashMap<Key, Value> {
        let pairs = self.keys.into_iter().zip(self.outcomes);
        let hit = |(key, outcome)| match (key, outcome) {
            (Some(key), Outcome::Hit(value)) => Some((key, value)),
            _ => None,
        };
        pairs.filter_map(hit).collect()
    }

    /// The outcome for a key, if it was asked for; a scan.
    #[must_use]
    pub fn get(&self, key: impl AsRef<[u8]>) -> Option<&Outcome> {
        let wanted = key.as_ref();
        self.iter()
            .find(|(key, _)| key.as_bytes() == wanted)
            .map(|(_, outcome)| outcome)
    }

    /// The errors, with the keys' places in the order asked for.
    pub fn errors(&self) -> impl Iterator<Item = (usize, &Error)> {
        let places = self.outcomes.iter().enumerate();
        places.filter_map(|(place, outcome)| match outcome {
            Outcome::Error(error) => Some((place, error)),
            Outcome::Hit(_) | Outcome::Miss => None,
        })
    }
}
