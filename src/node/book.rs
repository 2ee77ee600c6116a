//! What must not be forgotten of a server for as long as it may be asked again, whether or not it is
//! one of the nodes now.
//!
//! A node has a book. Taken out of the list it leaves its book behind, which goes on being kept
//! ([`Book::outdate`]) while a former list of nodes is remembered that the server was in; should the
//! server be in the list again, its new node [takes over](Book::moves_to) what is written there.
//! Whoever holds the old book then writes into the new one.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::Shared;
use super::journal::{Journal, Reason};
use super::keeper::Birth;
use super::leftovers::Leftovers;
use crate::key::Key;

pub(crate) struct Book {
    pub(super) journal: Arc<Journal>,
    pub(super) leftovers: Arc<Leftovers>,
    /// Counts flushes that were asked for while the server could not be.
    flushes_wanted: AtomicU64,
    /// How many of these have been made up for.
    flushes_made: AtomicU64,
    /// The process of the server that was there when it was last well, and how many connections had
    /// come up when that was learnt: another may lead to another process.
    birth: Mutex<Option<(Birth, u32)>>,
    place: Mutex<Place>,
}

/// What only emptying the server makes up for. What is added to it while that is under way is owed
/// again.
#[derive(Debug)]
pub(super) struct Debts {
    flushes: u64,
    overflows: u64,
}

/// Who sees to what is written here.
enum Place {
    /// This node, while there is one; and books of servers that may be the same one.
    Here(Weak<Shared>, Vec<Weak<Book>>),
    /// The node of that book.
    Moved(Arc<Book>),
}

impl Book {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            journal: Arc::new(Journal::new(capacity)),
            leftovers: Arc::new(Leftovers::new(capacity)),
            flushes_wanted: AtomicU64::new(0),
            flushes_made: AtomicU64::new(0),
            birth: Mutex::default(),
            place: Mutex::new(Place::Here(Weak::new(), Vec::new())),
        }
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moved(&self) -> Option<Arc<Self>> {
        match &*self.place() {
            Place::Here(..) => None,
            Place::Moved(to) => Some(to.clone()),
        }
    }

    /// The books of servers that may be this one, as far as they are still kept: its heirs, theirs, and
    /// so on. A server that is where it was before is among its heirs' heirs.
    fn heirs(self: &Arc<Self>) -> Vec<Arc<Self>> {
        let direct = |book: &Self| -> Vec<Arc<Self>> {
            match &*book.place() {
                Place::Here(_, heirs) => heirs.iter().filter_map(Weak::upgrade).collect(),
                Place::Moved(_) => Vec::new(),
            }
        };
        let own = self.current();
        let mut to_visit = direct(&own);
        let mut found: Vec<Arc<Self>> = Vec::new();
        while let Some(heir) = to_visit.pop() {
            let heir = heir.current();
            let is_known = |known: &Arc<Self>| Arc::ptr_eq(known, &heir);
            if !is_known(&own) && !found.iter().any(is_known) {
                to_visit.extend(direct(&heir));
                found.push(heir);
            }
        }
        found
    }

    /// The book that has taken its place, or itself.
    pub(crate) fn current(self: &Arc<Self>) -> Arc<Self> {
        let mut book = self.clone();
        while let Some(next) = book.moved() {
            book = next;
        }
        book
    }

    /// It is that node's.
    pub(super) fn belongs_to(&self, node: &Arc<Shared>) {
        *self.place() = Place::Here(Arc::downgrade(node), Vec::new());
    }

    /// Does something where the book is now, which it does not leave meanwhile, and hands what comes
    /// of it to its node, if there is one.
    fn here<T>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> T,
        then: impl FnOnce(&Arc<Shared>, T),
    ) {
        let mut book = self.clone();
        loop {
            let place = book.place();
            let next = match &*place {
                Place::Moved(to) => to.clone(),
                Place::Here(node, _) => {
                    let node = node.upgrade();
                    let done = work(&book);
                    drop(place);
                    if let Some(node) = node {
                        then(&node, done);
                    }
                    return;
                }
            };
            drop(place);
            book = next;
        }
    }

    /// What the server has for a key is not to be used from now on, until it has been deleted there.
    pub(crate) fn outdate(self: &Arc<Self>, key: &Key, reason: Reason) {
        self.outdate_sparing(key, reason, None);
    }

    /// The same, but for a server that may be this one and is `spared`, where the key is being written.
    pub(crate) fn outdate_sparing(
        self: &Arc<Self>,
        key: &Key,
        reason: Reason,
        spared: Option<&Arc<Self>>,
    ) {
        let record = |book: &Arc<Self>| {
            book.here(
                |book| book.journal.record(key, reason),
                |node, recorded| node.heed(recorded),
            );
        };
        record(self);
        let is_spared = |heir: &Arc<Self>| spared.is_some_and(|spared| Arc::ptr_eq(spared, heir));
        let heirs = self.heirs().into_iter();
        heirs
            .filter(|heir| !is_spared(heir))
            .for_each(|heir| record(&heir));
    }

    /// A [lingering](Reason::Lingering) doubt has ended.
    pub(super) fn lingered(self: &Arc<Self>, keys: &[Key], certain: bool) {
        let ended = |book: &Self| {
            let mut wake = false;
            for key in keys {
                wake |= book.journal.lingered(key, certain);
            }
            wake
        };
        for book in std::iter::once(self.clone()).chain(self.heirs()) {
            book.here(ended, |node, wake| {
                if wake {
                    node.wake.notify_one();
                }
            });
        }
    }

    /// Whether another server may still have what it got of that key.
    pub(crate) fn may_be_elsewhere(self: &Arc<Self>, key: &Key) -> bool {
        self.current().leftovers.may_hold(key)
    }

    /// Everything is being flushed: if the server is none of the nodes now, it is once it is again.
    /// Should it be another node's by now, that one may not have been asked.
    pub(crate) fn flush_if_away(self: &Arc<Self>) {
        let node = match &*self.place() {
            Place::Here(node, _) => node.upgrade(),
            Place::Moved(_) => None,
        };
        if node.is_none_or(|node| node.is_retired()) {
            self.want_flush();
        }
    }

    /// It is to be flushed before it is asked again.
    pub(super) fn want_flush(self: &Arc<Self>) {
        self.here(Self::count_flush, |node, ()| node.sees_to_its_debts());
    }

    fn count_flush(&self) {
        self.flushes_wanted.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn flush_wanted(&self) -> bool {
        self.flushes_wanted() > self.flushes_made.load(Ordering::Acquire)
    }

    fn flushes_wanted(&self) -> u64 {
        self.flushes_wanted.load(Ordering::Acquire)
    }

    /// What a flush that is sent now makes up for, once it is [acknowledged](Self::flushed).
    pub(super) fn flush_begins(&self) -> Debts {
        Debts {
            flushes: self.flushes_wanted(),
            overflows: self.journal.overflows(),
        }
    }

    pub(super) fn flushed(&self, made_up: &Debts) {
        let Debts { flushes, overflows } = *made_up;
        self.flushes_made.fetch_max(flushes, Ordering::AcqRel);
        self.journal.flushed(overflows);
    }

    fn birth(&self) -> MutexGuard<'_, Option<(Birth, u32)>> {
        self.birth.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn known_birth(&self) -> Option<Birth> {
        self.birth().as_ref().map(|(birth, _)| birth.clone())
    }

    pub(super) fn knows_birth(&self, connections: u32) -> bool {
        matches!(*self.birth(), Some((_, then)) if then == connections)
    }

    pub(super) fn set_birth(&self, birth: Option<Birth>, connections: u32) {
        *self.birth() = birth.map(|birth| (birth, connections));
    }

    /// It is not asked for a while, and so many connections have come up: if one has since the birth
    /// was learnt, what was written over that may be on a process that is not known.
    pub(super) fn birth_counts(&self, connections: u32) {
        self.birth().take_if(|(_, then)| *then != connections);
    }

    /// All of it is `to`'s from now on. Only one may be at it at a time.
    pub(super) fn moves_to(self: &Arc<Self>, to: &Arc<Self>) {
        let book = self.current();
        if Arc::ptr_eq(&book, to) {
            return;
        }
        let mut place = book.place();
        to.journal.take_over(&book.journal);
        to.leftovers.take_over(&book.leftovers);
        if book.flush_wanted() {
            to.count_flush();
        }
        // It tells whether the server has been restarted since what is not known any more was
        // written; for what comes later it would be an old one.
        if to.journal.has_overflowed() {
            // None of its own connections has come up yet.
            to.set_birth(book.known_birth(), 0);
        }
        let heirs = match std::mem::replace(&mut *place, Place::Moved(to.clone())) {
            Place::Here(_, heirs) => heirs,
            Place::Moved(_) => Vec::new(),
        };
        drop(place);
        // What is told here goes on to them as before.
        if let Place::Here(_, all) = &mut *to.place() {
            all.extend(heirs);
        }
    }

    /// `heir` is that of a server which may be this one at another address, or another one: all that
    /// is written here, and will be, is written there, too. Of what is there now only the keys that
    /// `concern` it.
    pub(super) fn inherited_by(self: &Arc<Self>, heir: &Arc<Self>, concern: impl Fn(&Key) -> bool) {
        let book = self.current();
        if Arc::ptr_eq(&book, heir) {
            return;
        }
        let mut place = book.place();
        heir.journal.copy(&book.journal, concern);
        heir.leftovers.take_over(&book.leftovers);
        if book.flush_wanted() {
            heir.count_flush();
        }
        if heir.journal.has_overflowed() {
            // Another process there says nothing: it may always have been another server's.
            heir.set_birth(None, 0);
        }
        if let Place::Here(_, heirs) = &mut *place {
            heirs.retain(|heir| heir.strong_count() > 0);
            heirs.push(Arc::downgrade(heir));
        }
    }
}

impl fmt::Debug for Book {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Book")
            .field("journal", &self.journal.len())
            .finish_non_exhaustive()
    }
}
