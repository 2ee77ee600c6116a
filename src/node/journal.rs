//! The invalidation journal of a node: keys of which the node may hold something older than what
//! this client has written since.
//!
//! A key enters when a write or delete of it is answered by another node, fails because the node
//! is out, or is in doubt. While it is here, the node's answers for it are not used. It leaves
//! when the node has acknowledged its deletion, or a later write of it.
//!
//! What was sent over a connection that *we* have given up may still be executed: a server that is
//! stopped reads it when it goes on. Such a key stays until that connection is known to have ended,
//! and for a deletion after that. Where that cannot be known it stays for a second deletion,
//! [`GRACE`] after the first. Either way whatever has been written meanwhile.

use std::collections::hash_map::Entry as Place;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::key::Key;

/// How long after its first deletion a key in lasting doubt is deleted again.
pub(crate) const GRACE: Duration = Duration::from_secs(2);

/// Why a key enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// It was written elsewhere, or would have been; nothing has been written here.
    Outdated,
    /// A write of it may still be executed.
    InDoubt,
    /// The same, but it will be told when that has an [end](Journal::lingered).
    Lingering,
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
    /// Those to be deleted, in the order in which that is due: a key is here once, at its entry's
    /// [`due`](Entry::due), or not at all.
    agenda: BTreeMap<Due, Key>,
    /// Counts what there was no room for.
    overflows: u64,
    /// How many of these do not matter any more.
    made_up: u64,
    /// Since when there has been no room, if what has [overflowed](Self::has_overflowed) matters.
    since: Option<Instant>,
    /// The server is none of the nodes now: nobody deletes anything there.
    away: bool,
    /// Counts what happens to the keys.
    generation: u64,
}

/// When a key is to be deleted (`None` is as soon as may be), and a number to tell it from others.
type Due = (Option<Instant>, u64);

#[derive(Debug)]
struct Entry {
    /// Of the first time it was entered, since it was last removed.
    entered: u64,
    /// Of the last time it was entered: the acknowledgement of an earlier deletion says nothing.
    generation: u64,
    again: Again,
    due: Option<Due>,
    /// Writes of it that are under way to the node: it is not deleted before their end.
    held: u32,
    /// Connections over which a write of it may still be executed.
    lingering: u32,
}

impl Entry {
    /// Nothing of it may be executed late.
    fn is_certain(&self) -> bool {
        self.again == Again::No && self.lingering == 0
    }
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

/// An entry as another journal gets it.
struct Doubt {
    key: Key,
    lingering: u32,
    /// Something of it may be executed late, and its end will not be told.
    lasts: bool,
}

impl Doubt {
    fn of(key: Key, entry: &Entry) -> Self {
        Self {
            key,
            lingering: entry.lingering,
            lasts: entry.again != Again::No || entry.held > 0,
        }
    }
}

/// A write under way, by what it has found here.
#[derive(Debug)]
pub(super) struct Hold {
    entered: u64,
    generation: u64,
}

/// A deletion to be made.
#[derive(Clone, Debug)]
pub(super) struct Deletion {
    pub(super) key: Key,
    generation: u64,
    taken: Instant,
}

impl Inner {
    fn count(&mut self) -> u64 {
        self.generation += 1;
        self.generation
    }

    fn has_overflowed(&self) -> bool {
        self.overflows > self.made_up
    }

    fn overflow(&mut self, since: Instant) {
        let before = self.overflowed_since();
        self.since = Some(before.map_or(since, |before| before.min(since)));
        self.overflows += 1;
    }

    fn overflowed_since(&self) -> Option<Instant> {
        self.since.filter(|_| self.has_overflowed())
    }

    /// Nothing is to be done at once.
    fn is_idle(&self) -> bool {
        !matches!(self.agenda.first_key_value(), Some(((None, _), _)))
    }

    /// Puts a key that is held on the agenda, in place of where it may be on it.
    fn schedule(&mut self, key: &Key, then: Option<Instant>) {
        let due = (then, self.count());
        let Some(entry) = self.keys.get_mut(key) else {
            return;
        };
        if let Some(before) = entry.due.replace(due) {
            self.agenda.remove(&before);
        }
        self.agenda.insert(due, key.clone());
    }
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

    #[inline]
    pub(super) fn len(&self) -> usize {
        self.held.load(Ordering::Acquire)
    }

    pub(super) fn holds(&self, key: &Key) -> bool {
        self.len() > 0 && self.lock().keys.contains_key(key)
    }

    pub(super) fn record(&self, key: &Key, reason: Reason) -> Recorded {
        let mut inner = self.lock();
        // Before it is asked again it is emptied.
        if inner.away && inner.has_overflowed() && reason == Reason::Outdated {
            inner.overflows += 1;
            return Recorded::In { wake: false };
        }
        let full = inner.keys.len() >= self.capacity;
        let generation = inner.count();
        match inner.keys.entry(key.clone()) {
            Place::Occupied(mut entry) => {
                let entry = entry.get_mut();
                match reason {
                    Reason::InDoubt => entry.again = Again::AfterGrace,
                    Reason::Lingering => entry.lingering += 1,
                    // A deletion that is under way will do, or else a key that is written all the
                    // time would never leave; but a write that is under way may come after it.
                    Reason::Outdated => {
                        if entry.held > 0 {
                            entry.generation = generation;
                        }
                        return Recorded::In { wake: false };
                    }
                }
                entry.generation = generation;
                if let Some((None, _)) = entry.due {
                    return Recorded::In { wake: false };
                }
            }
            Place::Vacant(_) if full => {
                let first = !inner.has_overflowed();
                inner.overflow(Instant::now());
                if inner.away {
                    self.forget_certain(&mut inner);
                }
                return Recorded::Overflow { first };
            }
            Place::Vacant(place) => {
                place.insert(Entry {
                    entered: generation,
                    generation,
                    again: match reason {
                        Reason::Outdated | Reason::Lingering => Again::No,
                        Reason::InDoubt => Again::AfterGrace,
                    },
                    due: None,
                    held: 0,
                    lingering: u32::from(reason == Reason::Lingering),
                });
                self.held.store(inner.keys.len(), Ordering::Release);
            }
        }
        let wake = inner.is_idle();
        inner.schedule(key, None);
        Recorded::In { wake }
    }

    /// When the next deletion is due.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        if self.len() == 0 {
            return None;
        }
        let inner = self.lock();
        let ((due, _), _) = inner.agenda.first_key_value()?;
        Some(due.unwrap_or(now))
    }

    /// Takes up to `most` deletions that are due.
    pub(super) fn take(&self, most: usize, now: Instant) -> Vec<Deletion> {
        let mut inner = self.lock();
        let inner = &mut *inner;
        let mut deletions = Vec::new();
        while deletions.len() < most
            && let Some(first) = inner.agenda.first_entry()
            && first.key().0.is_none_or(|due| due <= now)
        {
            let key = first.remove();
            if let Some(entry) = inner.keys.get_mut(&key) {
                entry.due = None;
                // The end of the write will see to it.
                if entry.held == 0 {
                    deletions.push(Deletion {
                        key,
                        generation: entry.generation,
                        taken: now,
                    });
                }
            }
        }
        deletions
    }

    /// A deletion of each key, due or not, unless a write of it is under way.
    pub(super) fn every(&self, now: Instant) -> Vec<Deletion> {
        if self.len() == 0 {
            return Vec::new();
        }
        let inner = self.lock();
        let keys = inner.keys.iter().filter(|(_, entry)| entry.held == 0);
        let deletion = |(key, entry): (&Key, &Entry)| Deletion {
            key: key.clone(),
            generation: entry.generation,
            taken: now,
        };
        keys.map(deletion).collect()
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
            inner.schedule(&deletion.key, Some(then));
            return;
        }
        if entry.lingering > 0 || entry.held > 0 {
            // There will be another deletion when that is over.
            return;
        }
        self.remove(&mut inner, &deletion.key);
    }

    /// A connection over which a write of it might still have been executed has ended; or is not
    /// waited for any longer, which is not `certain`. Says whether whoever sees to the journal must
    /// be told.
    pub(super) fn lingered(&self, key: &Key, certain: bool) -> bool {
        let mut inner = self.lock();
        let generation = inner.count();
        let Some(entry) = inner.keys.get_mut(key) else {
            return false;
        };
        entry.lingering = entry.lingering.saturating_sub(1);
        // A deletion that is under way may have been too early.
        entry.generation = generation;
        if !certain {
            entry.again = Again::AfterGrace;
        }
        if let Some((None, _)) = entry.due {
            return false;
        }
        let wake = inner.is_idle();
        inner.schedule(key, None);
        wake
    }

    fn remove(&self, inner: &mut Inner, key: &Key) {
        if let Some(due) = inner.keys.remove(key).and_then(|entry| entry.due) {
            inner.agenda.remove(&due);
        }
        if inner.keys.is_empty() {
            // An outage may have made it large.
            inner.keys = HashMap::new();
        }
        self.held.store(inner.keys.len(), Ordering::Release);
    }

    /// A write that does not depend on what is there goes to the node: acknowledged, it does what
    /// the deletion would, unless the key is in lasting doubt. To be [released](Self::release) with what is returned.
    pub(super) fn hold(&self, key: &Key) -> Option<Hold> {
        if self.len() == 0 {
            return None;
        }
        let mut inner = self.lock();
        let entry = inner.keys.get_mut(key)?;
        if !entry.is_certain() {
            return None;
        }
        entry.held += 1;
        Some(Hold {
            entered: entry.entered,
            generation: entry.generation,
        })
    }

    /// Says whether whoever sees to the journal must be told.
    pub(super) fn release(&self, key: &Key, hold: Hold, acknowledged: bool) -> bool {
        let mut inner = self.lock();
        let generation = inner.count();
        let Some(entry) = inner.keys.get_mut(key) else {
            return false;
        };
        // Of a later entry nothing is known.
        if entry.entered != hold.entered {
            return false;
        }
        entry.held = entry.held.saturating_sub(1);
        if acknowledged && entry.generation == hold.generation && entry.is_certain() {
            self.remove(&mut inner, key);
            return false;
        }
        // It may be executed after a deletion that is under way.
        entry.generation = generation;
        if entry.due.is_some() {
            return false;
        }
        inner.schedule(key, None);
        true
    }

    /// The server is no node any more, which may be for long.
    pub(super) fn goes_away(&self) {
        let mut inner = self.lock();
        inner.away = true;
        if inner.has_overflowed() {
            self.forget_certain(&mut inner);
        }
    }

    /// Keeps the keys in lasting doubt only: emptying the server will do for the others.
    fn forget_certain(&self, inner: &mut Inner) {
        // What is emptying it now may have begun before these were written.
        inner.overflows += 1;
        let Inner { keys, agenda, .. } = inner;
        keys.retain(|_, entry| {
            let keep = !entry.is_certain() || entry.held > 0;
            if let (false, Some(due)) = (keep, entry.due) {
                agenda.remove(&due);
            }
            keep
        });
        keys.shrink_to_fit();
        self.held.store(keys.len(), Ordering::Release);
    }

    /// Takes everything from the journal of a node that this one has taken the place of. What was
    /// sent by that one may still be executed.
    pub(super) fn take_over(&self, from: &Self) {
        let (keys, overflowed) = {
            let mut inner = from.lock();
            inner.agenda.clear();
            from.held.store(0, Ordering::Release);
            (std::mem::take(&mut inner.keys), inner.overflowed_since())
        };
        let doubts = keys.into_iter().map(|(key, entry)| Doubt::of(key, &entry));
        self.enter(doubts.collect(), overflowed);
    }

    /// Takes the same as `from` has, which keeps it, of the keys that `concern` it.
    pub(super) fn copy(&self, from: &Self, concern: impl Fn(&Key) -> bool) {
        let (doubts, overflowed) = {
            let inner = from.lock();
            let keys = inner.keys.iter().filter(|(key, _)| concern(key));
            let doubts = keys.map(|(key, entry)| Doubt::of(key.clone(), entry));
            (doubts.collect(), inner.overflowed_since())
        };
        self.enter(doubts, overflowed);
    }

    fn enter(&self, doubts: Vec<Doubt>, overflowed: Option<Instant>) {
        // Should there be too little room, emptying the server will do for what is certain.
        let (certain, uncertain): (Vec<_>, Vec<_>) = doubts
            .into_iter()
            .partition(|doubt| doubt.lingering == 0 && !doubt.lasts);
        for doubt in uncertain {
            // The ends of these will be told.
            for _ in 0..doubt.lingering {
                self.record(&doubt.key, Reason::Lingering);
            }
            if doubt.lasts {
                self.record(&doubt.key, Reason::InDoubt);
            }
        }
        for doubt in certain {
            self.record(&doubt.key, Reason::Outdated);
        }
        if let Some(since) = overflowed {
            self.lock().overflow(since);
        }
    }

    /// It did not.
    pub(super) fn put_back(&self, deletion: Deletion) {
        let mut inner = self.lock();
        if let Some(entry) = inner.keys.get(&deletion.key)
            && entry.due.is_none()
        {
            inner.schedule(&deletion.key, None);
        }
    }

    /// The node is out: what it executes late it executes when it is back, so the grace of what is
    /// in doubt begins anew.
    pub(super) fn node_is_out(&self) {
        let mut inner = self.lock();
        let Inner { keys, .. } = &mut *inner;
        let resting: Vec<Key> = keys
            .iter_mut()
            .filter(|(_, entry)| matches!(entry.again, Again::At(_)))
            .map(|(key, entry)| {
                entry.again = Again::AfterGrace;
                key.clone()
            })
            .collect();
        for key in resting {
            inner.schedule(&key, None);
        }
    }

    pub(super) fn has_overflowed(&self) -> bool {
        self.lock().has_overflowed()
    }

    pub(super) fn overflowed_since(&self) -> Option<Instant> {
        self.lock().overflowed_since()
    }

    /// Counts what has been forgotten here, to be told when that is [gone](Self::flushed).
    pub(super) fn overflows(&self) -> u64 {
        self.lock().overflows
    }

    /// What was on the node when so much had been forgotten is gone from it.
    pub(super) fn flushed(&self, overflows: u64) {
        let mut inner = self.lock();
        inner.made_up = inner.made_up.max(overflows);
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn key(number: usize) -> Key {
        Key::new(format!("key-{number}")).unwrap()
    }

    fn keys_of(deletions: &[Deletion]) -> Vec<Key> {
        deletions.iter().map(|of| of.key.clone()).collect()
    }

    fn recorded(journal: &Journal, key: &Key, reason: Reason) {
        assert!(matches!(journal.record(key, reason), Recorded::In { .. }));
    }

    /// Takes the one deletion that is due.
    fn take_one(journal: &Journal, now: Instant) -> Deletion {
        let mut due = journal.take(9, now);
        assert_eq!(due.len(), 1);
        due.remove(0)
    }

    #[test]
    fn what_may_still_be_executed_is_deleted_again_after_a_while() {
        let (journal, key, began) = (Journal::new(9), key(0), Instant::now());
        recorded(&journal, &key, Reason::InDoubt);
        journal.deleted(&take_one(&journal, began), began);
        assert!(journal.holds(&key));
        assert_eq!(journal.due(began), Some(began + GRACE));
        assert!(
            journal
                .take(9, began + GRACE - Duration::from_millis(1))
                .is_empty()
        );
        let second = take_one(&journal, began + GRACE);
        journal.deleted(&second, began + GRACE);
        assert!(!journal.holds(&key));
        assert_eq!(journal.due(began + GRACE), None);
    }

    #[test]
    fn what_is_taken_over_is_deleted_and_what_is_in_doubt_twice() {
        let (from, to, now) = (Journal::new(9), Journal::new(9), Instant::now());
        recorded(&from, &key(0), Reason::Outdated);
        recorded(&from, &key(1), Reason::InDoubt);
        recorded(&from, &key(2), Reason::Lingering);
        recorded(&from, &key(3), Reason::Outdated);
        let hold = from.hold(&key(3)).unwrap();
        // One has been deleted once.
        let taken = from.take(2, now);
        taken
            .iter()
            .for_each(|deletion| from.deleted(deletion, now));
        recorded(&from, &key(0), Reason::Outdated);
        to.take_over(&from);
        assert_eq!((from.len(), to.len()), (0, 4));
        assert!(!from.release(&key(3), hold, true));
        let first = to.take(9, now);
        assert_eq!(first.len(), 4);
        first.iter().for_each(|deletion| to.deleted(deletion, now));
        assert!(!to.holds(&key(0)));
        assert!(!to.has_overflowed());
        let second = to.take(9, now + GRACE);
        assert_eq!(second.len(), 2);
        second
            .iter()
            .for_each(|deletion| to.deleted(deletion, now + GRACE));
        assert_eq!((to.len(), to.due(now)), (1, None));
        // The end of a doubt is told to whoever has taken it over.
        assert!(to.lingered(&key(2), true));
        to.deleted(&take_one(&to, now), now);
        assert_eq!(to.len(), 0);
    }

    #[test]
    fn what_is_in_doubt_is_taken_over_before_what_a_flush_makes_up_for() {
        let (from, to, now) = (Journal::new(99), Journal::new(3), Instant::now());
        for number in 0..50 {
            recorded(&from, &key(number), Reason::Outdated);
        }
        recorded(&from, &key(50), Reason::InDoubt);
        recorded(&from, &key(51), Reason::Lingering);
        to.take_over(&from);
        assert!(to.has_overflowed() && to.holds(&key(50)) && to.holds(&key(51)));
        assert_eq!(to.take(9, now).len(), 3);
    }

    #[test]
    fn a_journal_that_overflows_while_its_server_is_away_keeps_what_is_in_doubt_only() {
        let (journal, now) = (Journal::new(3), Instant::now());
        recorded(&journal, &key(0), Reason::Outdated);
        journal.goes_away();
        recorded(&journal, &key(1), Reason::InDoubt);
        recorded(&journal, &key(2), Reason::Outdated);
        assert_eq!(
            journal.record(&key(3), Reason::Outdated),
            Recorded::Overflow { first: true }
        );
        recorded(&journal, &key(4), Reason::Outdated);
        recorded(&journal, &key(5), Reason::InDoubt);
        assert_eq!(journal.len(), 2);
        let next = Journal::new(3);
        next.take_over(&journal);
        assert!(next.has_overflowed());
        let mut deleted = keys_of(&next.take(9, now));
        deleted.sort_by_key(|key| key.as_bytes().to_vec());
        assert_eq!(deleted, [key(1), key(5)]);
        // From now on everything is recorded again, for it may come after the flush.
        recorded(&next, &key(6), Reason::Outdated);
        assert!(next.holds(&key(6)));
    }

    #[test]
    fn what_lingers_is_deleted_again_when_its_connection_has_ended_and_not_before() {
        let (journal, key, now) = (Journal::new(9), key(0), Instant::now());
        recorded(&journal, &key, Reason::Lingering);
        recorded(&journal, &key, Reason::Lingering);
        journal.deleted(&take_one(&journal, now), now);
        assert_eq!(journal.due(now), None);
        assert!(journal.hold(&key).is_none(), "a write does not end it");
        assert!(journal.lingered(&key, true));
        let early = take_one(&journal, now);
        assert!(journal.lingered(&key, true), "the second of two");
        journal.deleted(&early, now);
        assert!(journal.holds(&key), "it was taken before that");
        journal.deleted(&take_one(&journal, now), now);
        assert!(!journal.holds(&key));

        recorded(&journal, &key, Reason::Lingering);
        assert!(!journal.lingered(&key, false), "it is due already");
        journal.deleted(&take_one(&journal, now), now);
        assert_eq!(journal.due(now), Some(now + GRACE), "who knows");
    }

    #[test]
    fn a_second_deletion_is_made_when_it_is_due_whatever_came_between() {
        let (journal, now) = (Journal::new(9), Instant::now());
        let (first, second) = (key(1), key(2));
        let at = |tenths: u64| now + Duration::from_millis(tenths * 100);
        recorded(&journal, &first, Reason::InDoubt);
        journal.deleted(&take_one(&journal, at(0)), at(0));
        recorded(&journal, &second, Reason::InDoubt);
        journal.deleted(&take_one(&journal, at(10)), at(10));
        recorded(&journal, &first, Reason::Lingering);
        journal.deleted(&take_one(&journal, at(15)), at(15));
        journal.lingered(&first, true);
        journal.deleted(&take_one(&journal, at(15)), at(15));
        assert_eq!(journal.due(at(15)), Some(at(20)));
        assert_eq!(keys_of(&journal.take(9, at(20))), [first]);
        assert_eq!(journal.due(at(20)), Some(at(30)));
        assert_eq!(keys_of(&journal.take(9, at(30))), [second]);
    }

    #[test]
    fn a_write_of_the_same_key_does_what_its_deletion_would() {
        let (journal, key) = (Journal::new(9), key(0));
        assert!(
            journal.hold(&key).is_none(),
            "there is nothing to make up for"
        );
        recorded(&journal, &key, Reason::Outdated);
        let hold = journal.hold(&key).unwrap();
        assert!(
            journal.take(9, Instant::now()).is_empty(),
            "it would delete what is written"
        );
        assert!(!journal.release(&key, hold, true));
        assert!(!journal.holds(&key));
    }

    #[test]
    fn a_write_says_nothing_of_what_came_after_it_or_may_still_come() {
        let (journal, key, now) = (Journal::new(9), key(0), Instant::now());
        recorded(&journal, &key, Reason::Outdated);
        let hold = journal.hold(&key).unwrap();
        recorded(&journal, &key, Reason::InDoubt);
        journal.release(&key, hold, true);
        assert!(
            journal.holds(&key),
            "what is in doubt may be executed after the write"
        );
        assert!(
            journal.hold(&key).is_none(),
            "nor does its deletion wait for one"
        );
        assert_eq!(keys_of(&journal.take(9, now)), [key]);
    }

    #[test]
    fn a_key_written_elsewhere_all_the_time_leaves_with_its_first_deletion() {
        let (journal, key, now) = (Journal::new(9), key(0), Instant::now());
        recorded(&journal, &key, Reason::Outdated);
        let deletion = take_one(&journal, now);
        recorded(&journal, &key, Reason::Outdated);
        journal.deleted(&deletion, now);
        assert!(!journal.holds(&key));
    }

    #[test]
    fn a_deletion_says_nothing_of_a_write_that_was_sent_after_it() {
        let (journal, key, now) = (Journal::new(9), key(0), Instant::now());
        recorded(&journal, &key, Reason::Outdated);
        let early = take_one(&journal, now);
        let write = journal.hold(&key).unwrap();
        assert!(journal.release(&key, write, false), "its caller has left");
        recorded(&journal, &key, Reason::Outdated);
        journal.deleted(&early, now);
        assert!(journal.holds(&key), "the write comes after it");
        journal.deleted(&take_one(&journal, now), now);
        assert!(!journal.holds(&key));
    }

    /// What happens to one key of a node with one connection, of which nothing is lost.
    #[derive(Clone, Copy, Debug)]
    enum Act {
        WriteHere,
        WriteElsewhere,
        /// The caller of the latest write here does not wait for it any longer.
        Leave,
        TakeDeletion,
        /// The node executes the next of what was sent to it.
        Execute,
    }

    enum Sent {
        Set { version: u32, hold: Option<Hold> },
        Delete(Deletion),
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_024))]

        #[test]
        fn what_it_does_not_hold_is_not_old(acts in vec(prop_oneof![
            1 => Just(Act::WriteHere),
            1 => Just(Act::WriteElsewhere),
            1 => Just(Act::Leave),
            1 => Just(Act::TakeDeletion),
            2 => Just(Act::Execute),
        ], 0..40)) {
            let (journal, key, now) = (Journal::new(9), key(0), Instant::now());
            let (mut newest, mut stored) = (0, None);
            let mut queue: std::collections::VecDeque<Sent> = Default::default();
            for act in acts {
                match act {
                    Act::WriteHere => {
                        newest += 1;
                        let hold = journal.hold(&key);
                        queue.push_back(Sent::Set { version: newest, hold });
                    }
                    Act::WriteElsewhere => {
                        newest += 1;
                        recorded(&journal, &key, Reason::Outdated);
                    }
                    Act::Leave => {
                        let held = queue.iter_mut().rev().find_map(|sent| match sent {
                            Sent::Set { hold, .. } => hold.take(),
                            Sent::Delete(_) => None,
                        });
                        if let Some(hold) = held {
                            journal.release(&key, hold, false);
                        }
                    }
                    Act::TakeDeletion => queue.extend(journal.take(9, now).into_iter().map(Sent::Delete)),
                    Act::Execute => match queue.pop_front() {
                        Some(Sent::Set { version, hold }) => {
                            stored = Some(version);
                            if let Some(hold) = hold {
                                journal.release(&key, hold, true);
                            }
                        }
                        Some(Sent::Delete(deletion)) => {
                            stored = None;
                            journal.deleted(&deletion, now);
                        }
                        None => {}
                    },
                }
                let next_read = queue.iter().fold(stored, |_, sent| match sent {
                    Sent::Set { version, .. } => Some(*version),
                    Sent::Delete(_) => None,
                });
                let old = next_read.is_some_and(|version| version < newest);
                prop_assert!(journal.holds(&key) || !old, "{next_read:?} of {newest}");
            }
        }
    }

    #[test]
    fn a_write_of_an_earlier_entry_does_not_free_a_later_one() {
        let (journal, key, now) = (Journal::new(9), key(0), Instant::now());
        recorded(&journal, &key, Reason::Outdated);
        let early = journal.hold(&key).unwrap();
        let other = journal.hold(&key).unwrap();
        journal.release(&key, other, true);
        recorded(&journal, &key, Reason::Outdated);
        let late = journal.hold(&key).unwrap();
        journal.release(&key, early, true);
        assert!(journal.take(9, now).is_empty(), "it is still being written");
        assert!(journal.release(&key, late, false));
        assert_eq!(keys_of(&journal.take(9, now)), [key]);
    }

    #[test]
    fn what_could_not_be_deleted_is_deleted_later() {
        let (journal, key, now) = (Journal::new(9), key(0), Instant::now());
        recorded(&journal, &key, Reason::Outdated);
        journal.put_back(take_one(&journal, now));
        assert_eq!(journal.due(now), Some(now));
        journal.deleted(&take_one(&journal, now), now);
        assert!(!journal.holds(&key));
    }

    #[test]
    fn a_full_journal_says_so_once_until_the_node_is_flushed() {
        let journal = Journal::new(1);
        let record = |number| journal.record(&key(number), Reason::Outdated);
        assert_eq!(record(0), Recorded::In { wake: true });
        assert_eq!(record(0), Recorded::In { wake: false });
        for _ in 0..2 {
            assert_eq!(record(1), Recorded::Overflow { first: true });
            assert_eq!(record(2), Recorded::Overflow { first: false });
            assert!(journal.has_overflowed());
            assert_eq!(record(0), Recorded::In { wake: false }, "it is in already");
            journal.flushed(journal.overflows());
            assert!(!journal.has_overflowed());
        }
        assert_eq!(journal.len(), 1);
    }

    #[test]
    fn what_is_forgotten_while_the_node_is_flushed_asks_for_another_flush() {
        let journal = Journal::new(1);
        recorded(&journal, &key(0), Reason::Outdated);
        journal.record(&key(1), Reason::Outdated);
        let begun = journal.overflows();
        journal.record(&key(2), Reason::Outdated);
        journal.flushed(begun);
        assert!(journal.has_overflowed());
        // Its server leaves the list, and what it holds is forgotten for good.
        let begun = journal.overflows();
        journal.goes_away();
        journal.flushed(begun);
        assert!(journal.has_overflowed());
        let begun = journal.overflows();
        recorded(&journal, &key(3), Reason::Outdated);
        journal.flushed(begun);
        assert!(journal.has_overflowed());
        journal.flushed(journal.overflows());
        assert!(!journal.has_overflowed());
    }

    const CAPACITY: usize = 3;

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Record(usize, Reason),
        /// A write of it begins, and ends.
        Hold(usize),
        Release(prop::sample::Index, bool),
        Take(usize),
        /// A deletion ends.
        Deleted(prop::sample::Index),
        PutBack(prop::sample::Index),
        Flushed,
        Pass(Duration),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let (key, any) = (0..=CAPACITY, any::<prop::sample::Index>);
        let reason = prop_oneof![Just(Reason::Outdated), Just(Reason::InDoubt)];
        let event = prop_oneof![
            4 => (key.clone(), reason).prop_map(|(key, reason)| Event::Record(key, reason)),
            2 => key.prop_map(Event::Hold),
            2 => (any(), prop::bool::ANY).prop_map(|(which, ok)| Event::Release(which, ok)),
            4 => prop_oneof![Just(1), Just(9)].prop_map(Event::Take),
            4 => any().prop_map(Event::Deleted),
            1 => any().prop_map(Event::PutBack),
            1 => Just(Event::Flushed),
            2 => prop_oneof![Just(700), Just(2_000)].prop_map(Duration::from_millis).prop_map(Event::Pass),
        ];
        vec(event, 0..120)
    }

    /// What is known of a key. Times of the model are numbers of events.
    #[derive(Clone, Copy, Debug)]
    struct Known {
        entered: usize,
        recorded: usize,
        in_doubt: bool,
        /// A deletion since `recorded` has been acknowledged.
        deleted: bool,
        /// Since the last doubt a deletion has been, and this is when the second may be taken.
        second_from: Option<Instant>,
    }

    #[derive(Default)]
    struct Model {
        keys: HashMap<usize, Known>,
        /// Writes under way: of which key, entered when, begun when.
        holds: Vec<(usize, usize, usize, Hold)>,
        /// Deletions under way, taken when.
        deletions: Vec<(usize, usize, Deletion)>,
        overflowed: bool,
    }

    impl Model {
        fn is_held(&self, key: usize) -> bool {
            let held = |&(of, entered, ..): &(usize, usize, usize, Hold)| {
                of == key
                    && self
                        .keys
                        .get(&key)
                        .is_some_and(|known| known.entered == entered)
            };
            self.holds.iter().any(held)
        }

        /// When it has to be deleted, unless that is under way or has to wait for a write.
        fn due(&self, key: usize, now: Instant) -> Option<Instant> {
            let known = self.keys.get(&key)?;
            let current =
                |&(of, taken, _): &(usize, usize, Deletion)| of == key && taken > known.recorded;
            match known.second_from {
                _ if self.is_held(key) || self.deletions.iter().any(current) => None,
                Some(from) if known.deleted => Some(from.max(now)),
                _ => Some(now),
            }
        }

        fn deleted(&mut self, key: usize, taken: usize, taken_at: Instant, now: Instant) {
            let held = self.is_held(key);
            let Some(known) = self.keys.get_mut(&key) else {
                return;
            };
            if taken < known.recorded {
                return;
            }
            known.deleted = true;
            match known.second_from {
                None if known.in_doubt => known.second_from = Some(now + GRACE),
                Some(from) if taken_at < from => {}
                _ if held => {}
                _ => _ = self.keys.remove(&key),
            }
        }
    }

    fn index(key: &Key) -> usize {
        (0..=CAPACITY)
            .find(|&number| self::key(number) == *key)
            .unwrap()
    }

    fn listed(journal: &Journal) -> usize {
        let inner = journal.lock();
        inner.agenda.len()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn it_holds_what_is_not_known_to_be_deleted(events in events()) {
            let journal = Journal::new(CAPACITY);
            let mut model = Model::default();
            let mut now = Instant::now();
            for (step, event) in events.into_iter().enumerate() {
                let due_before = journal.due(now).map(|due| due.max(now));
                let mut told = None;
                match event {
                    Event::Record(number, reason) => {
                        let full = model.keys.len() >= CAPACITY;
                        match journal.record(&key(number), reason) {
                            Recorded::In { wake } => {
                                prop_assert!(!full || model.keys.contains_key(&number));
                                told = Some(wake);
                                let again = model.keys.contains_key(&number);
                                let held = model.is_held(number);
                                let known = model.keys.entry(number).or_insert(Known {
                                    entered: step,
                                    recorded: step,
                                    in_doubt: false,
                                    deleted: false,
                                    second_from: None,
                                });
                                if !again || held || reason != Reason::Outdated {
                                    known.recorded = step;
                                    known.deleted = false;
                                }
                                if reason == Reason::InDoubt {
                                    known.in_doubt = true;
                                    known.second_from = None;
                                }
                            }
                            Recorded::Overflow { first } => {
                                prop_assert!(full && !model.keys.contains_key(&number));
                                prop_assert_eq!(first, !model.overflowed);
                                model.overflowed = true;
                            }
                        }
                    }
                    Event::Hold(number) => {
                        let hold = journal.hold(&key(number));
                        let holds = model.keys.get(&number).is_some_and(|known| !known.in_doubt);
                        prop_assert_eq!(hold.is_some(), holds);
                        if let Some(hold) = hold {
                            let entered = model.keys[&number].entered;
                            model.holds.push((number, entered, step, hold));
                        }
                    }
                    Event::Release(which, acknowledged) if !model.holds.is_empty() => {
                        let which = which.index(model.holds.len());
                        let (number, entered, begun, hold) = model.holds.swap_remove(which);
                        told = Some(journal.release(&key(number), hold, acknowledged));
                        let known = model.keys.get_mut(&number);
                        if let Some(known) = known.filter(|known| known.entered == entered) {
                            if acknowledged && !known.in_doubt && begun > known.recorded {
                                model.keys.remove(&number);
                            } else {
                                known.recorded = step;
                                known.deleted = false;
                            }
                        }
                    }
                    Event::Take(most) => {
                        let due: Vec<_> = (0..=CAPACITY).filter(|&key| model.due(key, now) == Some(now)).collect();
                        let taken = journal.take(most, now);
                        prop_assert!(taken.len() <= most);
                        let numbers: Vec<_> = taken.iter().map(|of| index(&of.key)).collect();
                        for (at, number) in numbers.iter().enumerate() {
                            prop_assert!(model.keys.contains_key(number));
                            prop_assert!(!model.is_held(*number), "it is being written");
                            prop_assert!(!numbers[..at].contains(number), "twice at once");
                        }
                        if most > CAPACITY {
                            prop_assert!(due.iter().all(|key| numbers.contains(key)), "{:?} of {:?}", numbers, due);
                        }
                        model.deletions.extend(numbers.into_iter().zip(taken).map(|(number, of)| (number, step, of)));
                    }
                    Event::Deleted(which) if !model.deletions.is_empty() => {
                        let which = which.index(model.deletions.len());
                        let (number, taken, deletion) = model.deletions.swap_remove(which);
                        journal.deleted(&deletion, now);
                        model.deleted(number, taken, deletion.taken, now);
                    }
                    Event::PutBack(which) if !model.deletions.is_empty() => {
                        let which = which.index(model.deletions.len());
                        journal.put_back(model.deletions.swap_remove(which).2);
                    }
                    Event::Flushed => {
                        journal.flushed(journal.overflows());
                        model.overflowed = false;
                    }
                    Event::Pass(time) => now += time,
                    Event::Release(..) | Event::Deleted(_) | Event::PutBack(_) => {}
                }
                prop_assert_eq!(journal.len(), model.keys.len());
                prop_assert_eq!(journal.has_overflowed(), model.overflowed);
                for number in 0..=CAPACITY {
                    prop_assert_eq!(journal.holds(&key(number)), model.keys.contains_key(&number));
                }
                prop_assert!(listed(&journal) <= model.keys.len(), "{:?}", journal);
                let due = journal.due(now).map(|due| due.max(now));
                for number in 0..=CAPACITY {
                    if let Some(owed) = model.due(number, now) {
                        prop_assert!(due.is_some_and(|due| due <= owed), "{} is forgotten", number);
                    }
                }
                let earlier = due.is_some_and(|due| due_before.is_none_or(|before| due < before));
                if earlier && let Some(told) = told {
                    prop_assert!(told, "whoever sees to it sleeps on");
                }
            }
            // Left alone, it comes to an end.
            for (number, _, _, hold) in std::mem::take(&mut model.holds) {
                journal.release(&key(number), hold, false);
            }
            for (_, _, deletion) in std::mem::take(&mut model.deletions) {
                journal.put_back(deletion);
            }
            let ends = now + GRACE;
            while let Some(due) = journal.due(now) {
                prop_assert!(due <= ends);
                now = due;
                for deletion in journal.take(9, now) {
                    journal.deleted(&deletion, now);
                }
            }
            prop_assert_eq!(journal.len(), 0);
        }
    }
}
