//! The result of a multi-key read: partial by design.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::key::Key;
use crate::value::Value;

/// How the read of one key ended.
#[derive(Clone, Debug)]
pub enum Outcome<V = Value> {
    /// It is there.
    Hit(V),
    /// Its node answered that it is not there.
    Miss,
    /// Whether it is there is not known.
    Error(Error),
}

impl<V> Outcome<V> {
    /// The value of a hit.
    #[must_use]
    pub fn value(&self) -> Option<&V> {
        match self {
            Self::Hit(value) => Some(value),
            Self::Miss | Self::Error(_) => None,
        }
    }

    /// Hit or miss as `get` gives them.
    ///
    /// # Errors
    /// The error of this key.
    pub fn into_result(self) -> Result<Option<V>> {
        match self {
            Self::Hit(value) => Ok(Some(value)),
            Self::Miss => Ok(None),
            Self::Error(error) => Err(error),
        }
    }
}

impl<V> From<Result<Option<V>>> for Outcome<V> {
    fn from(result: Result<Option<V>>) -> Self {
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
#[derive(Clone, Debug)]
pub struct MultiGet<V = Value> {
    /// The valid ones, in order.
    keys: Arc<[Key]>,
    /// The places of the others among the outcomes, ascending.
    invalid: Vec<usize>,
    outcomes: Vec<Outcome<V>>,
}

impl<V> Default for MultiGet<V> {
    fn default() -> Self {
        Self::new(Arc::default(), Vec::new(), Vec::new())
    }
}

impl<V> MultiGet<V> {
    pub(super) fn new(keys: Arc<[Key]>, invalid: Vec<usize>, outcomes: Vec<Outcome<V>>) -> Self {
        Self {
            keys,
            invalid,
            outcomes,
        }
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
    pub fn outcomes(&self) -> &[Outcome<V>] {
        &self.outcomes
    }

    /// The outcomes by value, in the order of the keys.
    #[must_use]
    pub fn into_outcomes(self) -> Vec<Outcome<V>> {
        self.outcomes
    }

    /// The keys with their outcomes, in order, without keys that were invalid.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Outcome<V>)> {
        let valid = valid(self.outcomes.iter(), self.invalid.iter());
        self.keys.iter().zip(valid)
    }

    /// The hits, by key.
    #[must_use]
    pub fn into_hits(self) -> HashMap<Key, V> {
        let outcomes = valid(self.outcomes.into_iter(), self.invalid.iter());
        let pairs = self.keys.iter().zip(outcomes);
        let hit = |(key, outcome): (&Key, _)| match outcome {
            Outcome::Hit(value) => Some((key.clone(), value)),
            Outcome::Miss | Outcome::Error(_) => None,
        };
        pairs.filter_map(hit).collect()
    }

    /// The outcome for a key, if it was asked for; a scan.
    #[must_use]
    pub fn get(&self, key: impl AsRef<[u8]>) -> Option<&Outcome<V>> {
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

/// The outcomes but those in the places of invalid keys.
fn valid<'a, T>(
    outcomes: impl Iterator<Item = T>,
    invalid: impl Iterator<Item = &'a usize>,
) -> impl Iterator<Item = T> {
    let mut invalid = invalid.copied().peekable();
    let places = outcomes.enumerate();
    places.filter_map(move |(place, outcome)| match invalid.next_if_eq(&place) {
        Some(_) => None,
        None => Some(outcome),
    })
}

#[cfg(feature = "serde")]
impl<V> MultiGet<V> {
    pub(crate) fn map<W>(self, into: impl FnMut(Outcome<V>) -> Outcome<W>) -> MultiGet<W> {
        let outcomes = self.outcomes.into_iter().map(into);
        MultiGet::new(self.keys, self.invalid, outcomes.collect())
    }

    /// The keys with such errors, and their places.
    pub(crate) fn keys_failed(&self, such: impl Fn(&Error) -> bool) -> (Vec<usize>, Vec<Key>) {
        let failed = self.errors().filter(|(_, error)| such(error));
        let placed = failed.filter_map(|(place, _)| {
            // Where it would be among the invalid ones is how many of them are before it.
            let before = self.invalid.binary_search(&place).err()?;
            Some((place, self.keys[place - before].clone()))
        });
        placed.unzip()
    }

    /// Puts the outcomes of others into these places.
    pub(crate) fn put(&mut self, places: Vec<usize>, others: Self) {
        for (place, outcome) in places.into_iter().zip(others.outcomes) {
            self.outcomes[place] = outcome;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn invalid_keys_have_outcomes_and_nothing_else() {
        let key = |key: &str| Key::new(key).unwrap();
        let invalid = || Outcome::<u8>::Error(Key::new("").unwrap_err());
        let failed = Outcome::Error(Error::new(ErrorKind::Timeout, "late"));
        let keys = [key("a"), key("b"), key("c")];
        let outcomes = vec![
            invalid(),
            Outcome::Hit(1),
            invalid(),
            invalid(),
            failed,
            Outcome::Hit(2),
            invalid(),
        ];
        let read = MultiGet::new(keys.clone().into(), vec![0, 2, 3, 6], outcomes);
        assert_eq!(read.len(), 7);
        assert!(read.iter().map(|(key, _)| key).eq(&keys));
        assert!(matches!(read.get("b"), Some(Outcome::Error(_))));
        assert!(matches!(read.get("c"), Some(Outcome::Hit(2))));
        let places: Vec<_> = read.errors().map(|(place, _)| place).collect();
        assert_eq!(places, [0, 2, 3, 4, 6]);
        #[cfg(feature = "serde")]
        assert_eq!(read.keys_failed(|_| true), (vec![4], vec![key("b")]));
        let hits = [(key("a"), 1), (key("c"), 2)];
        assert_eq!(read.into_hits(), HashMap::from(hits));
    }
}
