//! The invalidation journal of a node: keys of which the node may hold something older than what
//! this client has written since.
//!
//! A key enters when a write or delete of it is answered by another node, fails because the node
//! is out, or is in doubt. While it is here, the node's answers for it are not used. It leaves
//! when the node has acknowledged its deletion, or a later write of it.
//!
//! What was sent over a connection that *we* have given up may still be executed: a server that is
//! stopped reads it when it goes on. Such a key stays for a second deletion, [`GRACE`] after the
//! first, whatever has been written meanwhile.

use std::collections::hash_map::Entry as Place;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, ErrorKind};
use crate::key::Key;

/// How long after its first deletion a key in lasting doubt is deleted again.
pub(crate) const GRACE: Duration = Duration::from_secs(2);

/// Why a key enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// It was written elsewhere, or would have been; or a write of it may have been executed, but
    /// will not be any more.
    Outdated,
    /// A write of it may still be executed.
    InDoubt,
}

impl Reason {
    /// Of a write that ended with `error`, and may have been executed.
    pub(crate) fn of(error: &Error) -> Self {
        match error.kind() {
            // The server has closed the connection itself, and reads nothing from it any more.
            ErrorKind::ConnectionLost => Self::Outdated,
            _ => Self::InDoubt,
        }
    }
}

/// What came of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recorded {
    /// It is in; whether whoever sees to it must be told.
    In { wake: bool },
    /// There is no room: the journal no longer knows everything. `first`: it did until now.
    Overflow { first: bool },
}

#[derive(Debug)]
pub(super) struct Journal {
    /// How many keys there are, to be seen without the lock.
    held: AtomicUsize,
    inner: Mutex<Inner>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Inner {
    keys: HashMap<Key, Entry>,
    /// Those to be deleted as soon as may be.
    queue: VecDeque<Key>,
    /// Those to be deleted again then. Some may have been queued anew since: their generation is
    /// another one.
    resting: VecDeque<(Instant, Key, u64)>,
    overflowed: bool,
    generation: u64,
}

#[derive(Debug)]
struct Entry {
    /// Of the last time it was entered: the acknowledgement of an earlier deletion says nothing.
    generation: u64,
    again: Again,
    queued: bool,
    /// Writes of it that are under way to the node: it is not deleted before their end.
    held: u32,
}

/// Whether a key is to be deleted a second time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    No,
    /// [`GRACE`] after its first deletion.
    AfterGrace,
    /// Not before then.
    At(Instant),
}

/// A write under way, by the generation that it began in.
#[derive(Debug)]
pub(super) struct Hold(u64);

/// A deletion to be made.
#[derive(Clone, Debug)]
pub(super) struct Deletion {
    pub(super) key: Key,
    generation: u64,
    taken: Instant,
}

impl Journal {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            held: AtomicUsize::new(0),
            inner: Mutex::default(),
            capacity,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> usize {
        self.held.load(Ordering::Acquire)
    }

    pub(super) fn holds(&self, key: &Key) -> bool {
        self.len() > 0 && self.lock().keys.contains_key(key)
    }

    pub(super) fn record(&self, key: &Key, reason: Reason) -> Recorded {
        let mut inner = self.lock();
        let Inner {
            keys,
            queue,
            overflowed,
            generation,
            ..
        } = &mut *inner;
        let full = keys.len() >= self.capacity;
        *generation += 1;
        let wake = queue.is_empty();
        match keys.entry(key.clone()) {
            Place::Occupied(mut entry) => {
                let entry = entry.get_mut();
                entry.generation = *generation;
                if reason == Reason::InDoubt {
                    entry.again = Again::AfterGrace;
                }
                if !std::mem::replace(&mut entry.queued, true) {
                    queue.push_back(key.clone());
                }
            }
            Place::Vacant(_) if full => {
                let first = !std::mem::replace(overflowed, true);
                return Recorded::Overflow { first };
            }
            Place::Vacant(place) => {
                place.insert(Entry {
                    generation: *generation,
                    again: match reason {
                        Reason::Outdated => Again::No,
                        Reason::InDoubt => Again::AfterGrace,
                    },
                    queued: true,
                    held: 0,
                });
                queue.push_back(key.clone());
                self.held.store(keys.len(), Ordering::Release);
            }
        }
        Recorded::In { wake }
    }

    /// When the next deletion is due.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        if self.len() == 0 {
            return None;
        }
        let inner = self.lock();
        match inner.queue.is_empty() {
            false => Some(now),
            true => inner.resting.front().map(|&(due, ..)| due),
        }
    }

    /// Takes up to `most` deletions that are due.
    pub(super) fn take(&self, most: usize, now: Instant) -> Vec<Deletion> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        while inner.resting.front().is_some_and(|&(due, ..)| due <= now) {
            let Some((_, key, generation)) = inner.resting.pop_front() else {
                break;
            };
            if let Some(entry) = inner.keys.get_mut(&key)
                && entry.generation == generation
                && !std::mem::replace(&mut entry.queued, true)
            {
                inner.queue.push_back(key);
            }
        }
        let taken = inner.queue.len().min(most);
        let mut deletions = Vec::with_capacity(taken);
        for key in inner.queue.drain(..taken) {
            if let Some(entry) = inner.keys.get_mut(&key) {
                entry.queued = false;
                if entry.held > 0 {
                    continue;
                }
                deletions.push(Deletion {
                    key,
                    generation: entry.generation,
                    taken: now,
                });
            }
        }
        deletions
    }

    /// The node has acknowledged a deletion.
    pub(super) fn deleted(&self, deletion: &Deletion, now: Instant) {
        let mut inner = self.lock();
        let Some(entry) = inner.keys.get_mut(&deletion.key) else {
            return;
        };
        if entry.generation != deletion.generation {
            return;
        }
        let rests_until = match entry.again {
            Again::No => None,
            Again::AfterGrace => Some(now + GRACE),
            Again::At(then) => (deletion.taken < then).then_some(then),
        };
        if let Some(then) = rests_until {
            entry.again = Again::At(then);
            let resting = (then, deletion.key.clone(), deletion.generation);
            inner.resting.push_back(resting);
            return;
        }
        self.remove(&mut inner, &deletion.key);
    }

    fn remove(&self, inner: &mut Inner, key: &Key) {
        inner.keys.remove(key);
        if inner.keys.is_empty() {
            // An outage may have made it large.
            inner.keys = HashMap::new();
            inner.queue = VecDeque::new();
        }
        self.held.store(inner.keys.len(), Ordering::Release);
    }

    /// A write that does not depend on what is there goes to the node: acknowledged, it does what
    /// the deletion would. To be [released](Self::release) with what is returned.
    pub(super) fn hold(&self, key: &Key) -> Option<Hold> {
        if self.len() == 0 {
            return None;
        }
        let mut inner = self.lock();
        let entry = inner.keys.get_mut(key)?;
        entry.held += 1;
        Some(Hold(entry.generation))
    }

    /// Says whether whoever sees to the journal must be told.
    pub(super) fn release(&self, key: &Key, Hold(generation): Hold, acknowledged: bool) -> bool {
        let mut inner = self.lock();
        let Some(entry) = inner.keys.get_mut(key) else {
            return false;
        };
        entry.held = entry.held.saturating_sub(1);
        // Of a later entry nothing is known.
        if acknowledged && entry.generation == generation && entry.again == Again::No {
            self.remove(&mut inner, key);
            return false;
        }
        if std::mem::replace(&mut entry.queued, true) {
            return false;
        }
        inner.queue.push_back(key.clone());
        true
    }

    /// It did not.
    pub(super) fn put_back(&self, deletion: Deletion) {
        let mut inner = self.lock();
        let inner = &mut *inner;
        if let Some(entry) = inner.keys.get_mut(&deletion.key)
            && !std::mem::replace(&mut entry.queued, true)
        {
            inner.queue.push_front(deletion.key);
        }
    }

    pub(super) fn has_overflowed(&self) -> bool {
        self.lock().overflowed
    }

    /// Everything that was on the node before is gone from it, so what was forgotten here is, too.
    pub(super) fn flushed(&self) {
        self.lock().overflowed = false;
    }
}
