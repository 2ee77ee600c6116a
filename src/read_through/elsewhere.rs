//! Values that are there, and being loaded anew by somebody else.
//!
//! memcached tells one reader of an old value to load it, and everybody else that somebody does. It
//! says no more if that one dies. So what was said is remembered for as long as a lease, in which
//! nobody here tries to load the value; after that somebody does.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::key::Key;
use crate::value::CasToken;

/// Beyond that many keys nothing more is remembered: old values are then asked for at each read.
const CAPACITY: usize = 4096;

#[derive(Default)]
pub(super) struct Elsewhere {
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    noted: HashMap<Key, Noted>,
    /// When room was made for the last time.
    swept: Option<Instant>,
}

/// A version that is being replaced, since when it is.
struct Noted {
    token: CasToken,
    since: Instant,
}

impl Elsewhere {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody has just been told to load this version anew, or has been for a while.
    pub(super) fn note(&self, key: &Key, token: CasToken, lease: Duration) {
        const A_SECOND: Duration = Duration::from_secs(1);
        let mut known = self.lock();
        let Known { noted, swept } = &mut *known;
        let now = Instant::now();
        if noted.len() >= CAPACITY && !noted.contains_key(key) {
            if swept.is_some_and(|swept| now.duration_since(swept) < A_SECOND) {
                return;
            }
            *swept = Some(now);
            noted.retain(|_, noted| now.duration_since(noted.since) < lease);
            if noted.len() >= CAPACITY {
                return;
            }
        }
        let known = noted.get(key);
        let since = match known {
            Some(known) if known.token == token && now.duration_since(known.since) < lease => {
                known.since
            }
            _ => now,
        };
        noted.insert(key.clone(), Noted { token, since });
    }

    /// Whether somebody is loading this version anew.
    pub(super) fn is_at_it(&self, key: &Key, token: CasToken, lease: Duration) -> bool {
        self.ask(key, token, |since| since < lease)
    }

    /// Whether somebody should have loaded this version anew by now.
    pub(super) fn is_overdue(&self, key: &Key, token: CasToken, lease: Duration) -> bool {
        self.ask(key, token, |since| since >= lease)
    }

    fn ask(&self, key: &Key, token: CasToken, answer: impl FnOnce(Duration) -> bool) -> bool {
        let known = self.lock();
        let known = known.noted.get(key).filter(|noted| noted.token == token);
        known.is_some_and(|known| answer(known.since.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    const LEASE: Duration = Duration::from_secs(2);

    fn key(number: usize) -> Key {
        Key::new(format!("key-{number}")).unwrap()
    }

    fn token(unique: u64) -> CasToken {
        CasToken {
            node: NonZeroU32::MIN,
            connection: 1,
            unique,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn somebody_has_a_lease_long_to_replace_a_version() {
        let elsewhere = Elsewhere::default();
        assert!(!elsewhere.is_at_it(&key(1), token(1), LEASE));
        elsewhere.note(&key(1), token(1), LEASE);
        tokio::time::advance(LEASE - Duration::from_millis(1)).await;
        // That it is still so is no news.
        elsewhere.note(&key(1), token(1), LEASE);
        assert!(elsewhere.is_at_it(&key(1), token(1), LEASE));
        assert!(
            !elsewhere.is_at_it(&key(1), token(2), LEASE),
            "another version"
        );
        assert!(!elsewhere.is_overdue(&key(1), token(1), LEASE));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(elsewhere.is_overdue(&key(1), token(1), LEASE));
        assert!(!elsewhere.is_overdue(&key(1), token(2), LEASE));
        assert!(!elsewhere.is_at_it(&key(1), token(1), LEASE));
        // Who takes over has as long.
        elsewhere.note(&key(1), token(1), LEASE);
        assert!(elsewhere.is_at_it(&key(1), token(1), LEASE));
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_bounded_and_makes_room_when_leases_have_passed() {
        let elsewhere = Elsewhere::default();
        for number in 0..CAPACITY {
            elsewhere.note(&key(number), token(1), LEASE);
        }
        elsewhere.note(&key(CAPACITY), token(1), LEASE);
        assert!(!elsewhere.is_at_it(&key(CAPACITY), token(1), LEASE));
        tokio::time::advance(LEASE).await;
        elsewhere.note(&key(CAPACITY), token(1), LEASE);
        assert!(elsewhere.is_at_it(&key(CAPACITY), token(1), LEASE));
        assert_eq!(elsewhere.lock().noted.len(), 1);
    }
}
