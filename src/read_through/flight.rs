//! Single flight: of all in this process who want to load a key at once, one does.
//!
//! Those who want a key board its [`Flight`] and queue up for its turn. Who has the turn and finds
//! no outcome leads: loads, and leaves the outcome to those behind. Who leads and is dropped, panics
//! or runs out of time gives the turn up without an outcome, and the next in the queue leads.
//!
//! An outcome is shared with whoever may have it ([`Outcome::serves`]): nobody gets what was read or
//! loaded before something that had already been invalidated when they began to ask.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as StdMutex, MutexGuard as StdMutexGuard, PoisonError};

use tokio::sync::{Mutex, MutexGuard, OwnedMutexGuard};
use tokio::time::Instant;

use crate::error::Result;
use crate::key::Key;
use crate::value::{CasToken, Value};

/// How often the turn is handed on after a load that panicked or took too long, before its error is
/// everybody's.
const HANDOVERS: u32 = 2;

/// When somebody began to ask for a key, and what the cache had under it then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sighting {
    pub(super) asked: Instant,
    pub(super) seen: Seen,
}

/// What the cache had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// No value; a value that is old; or the placeholder of a lease: then there is a token.
    Vacancy(Option<CasToken>),
    /// The same, where there are no leases.
    Unleased(Option<CasToken>),
    /// It could not be asked.
    Failure,
}

/// How a flight ended.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) result: Result<Option<Value>>,
    pub(super) source: Source,
}

/// Where an outcome is from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// The cache, which was asked then.
    Cache(Instant),
    Load(Load),
    /// Nothing was read.
    Nowhere,
}

/// A load.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) begun: Instant,
    /// What the cache had under the key before it, if that is known.
    pub(super) token: Option<CasToken>,
    /// Whether there are leases. Without them invalidations in this process are all that count.
    pub(super) leased: bool,
}

impl Outcome {
    /// Whether it is no older than anything that was invalidated before the asker began.
    fn serves(&self, asker: &Sighting) -> bool {
        match &self.source {
            Source::Cache(asked) => asker.asked <= *asked,
            Source::Load(load) => load.serves(asker) == Some(true),
            Source::Nowhere => true,
        }
    }
}

impl Load {
    /// Whether what it gives is no older than anything that was invalidated before the asker began;
    /// `None` if that cannot be told. An invalidation, by whomever, takes away what the cache had
    /// when the load began; one in this process ends the flight as well ([`Flights::outdate`]).
    fn serves(&self, asker: &Sighting) -> Option<bool> {
        if asker.asked <= self.begun || !self.leased {
            return Some(true);
        }
        match (asker.seen, self.token) {
            (Seen::Vacancy(seen), Some(token)) => Some(seen == Some(token)),
            _ => None,
        }
    }
}

/// The loads under way in one client. It holds only keys that somebody waits for now, or that are
/// being put back.
#[derive(Clone, Default)]
pub(super) struct Flights(Arc<Table>);

#[derive(Default)]
struct Table {
    flights: StdMutex<HashMap<Key, Arc<Flight>>>,
    /// How many there are, for those who only want to know that there are none.
    count: AtomicUsize,
}

#[derive(Default)]
pub(super) struct Flight {
    turn: Arc<Mutex<()>>,
    /// Held while what was loaded is put back unconditionally.
    refill: Mutex<()>,
    outdated: AtomicBool,
    state: StdMutex<State>,
}

#[derive(Default)]
struct State {
    seats: usize,
    load: Option<Load>,
    outcome: Option<Outcome>,
    lease: Option<Lease>,
    handovers: u32,
    /// That have begun.
    loads: u32,
}

/// The placeholder of a lease that a flight holds.
struct Lease {
    token: CasToken,
    give_up: Box<dyn FnOnce() + Send>,
}

/// The right to lead.
pub(super) type Turn = OwnedMutexGuard<()>;

impl Table {
    fn lock(&self) -> StdMutexGuard<'_, HashMap<Key, Arc<Flight>>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, key: &Key, flight: &Arc<Flight>) {
        self.remove_from(&mut self.lock(), key, flight);
    }

    fn remove_from(
        &self,
        flights: &mut HashMap<Key, Arc<Flight>>,
        key: &Key,
        flight: &Arc<Flight>,
    ) {
        if let Entry::Occupied(entry) = flights.entry(key.clone())
            && Arc::ptr_eq(entry.get(), flight)
        {
            entry.remove();
        }
        self.count.store(flights.len(), Ordering::Release);
    }
}

impl Flights {
    /// Boards the key's flight, or a new one if that will not do for the asker. If that cannot be
    /// told it is the same: who finds out in the end that it does not has waited for a load that
    /// somebody had begun anyway, and does so with all who are in the same case.
    pub(super) fn board(&self, key: &Key, asker: &Sighting) -> Seat {
        let mut flights = self.0.lock();
        let flight = flights.entry(key.clone()).or_default();
        if !flight.state().may_serve(asker) {
            *flight = Arc::default();
        }
        flight.state().seats += 1;
        let flight = flight.clone();
        self.0.count.store(flights.len(), Ordering::Release);
        Seat {
            table: self.0.clone(),
            key: key.clone(),
            flight,
        }
    }

    /// Whoever asks for the key from now on boards a new flight, and what this one loads is not put
    /// back any more.
    pub(super) fn outdate(&self, key: &Key) -> Option<Arc<Flight>> {
        if self.0.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut flights = self.0.lock();
        let flight = flights.remove(key)?;
        self.0.count.store(flights.len(), Ordering::Release);
        flight.outdated.store(true, Ordering::SeqCst);
        Some(flight)
    }
}

impl Flight {
    fn state(&self) -> StdMutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_outdated(&self) -> bool {
        self.outdated.load(Ordering::SeqCst)
    }

    /// Waits until nothing is being put back unconditionally.
    pub(super) async fn refilled(&self) {
        drop(self.refill.lock().await);
    }
}

impl State {
    fn may_serve(&self, asker: &Sighting) -> bool {
        match (&self.outcome, &self.load) {
            (Some(outcome), _) => outcome.serves(asker),
            (None, Some(load)) => load.serves(asker) != Some(false),
            (None, None) => true,
        }
    }
}

/// A place on a flight. The flight ends when the last one is given up.
pub(super) struct Seat {
    table: Arc<Table>,
    key: Key,
    flight: Arc<Flight>,
}

impl Seat {
    /// The turn, if nobody has it.
    pub(super) fn try_turn(&self) -> Option<Turn> {
        self.flight.turn.clone().try_lock_owned().ok()
    }

    /// Waits for the turn.
    pub(super) async fn turn(&self) -> Turn {
        self.flight.turn.clone().lock_owned().await
    }

    /// What came of it; `Err` if it is not for that asker.
    pub(super) fn outcome(
        &self,
        asker: &Sighting,
    ) -> Option<std::result::Result<Outcome, Outdated>> {
        let state = self.flight.state();
        let outcome = state.outcome.as_ref()?;
        Some(if outcome.serves(asker) {
            Ok(outcome.clone())
        } else {
            Err(Outdated)
        })
    }

    /// A load begins.
    pub(super) fn begin(&self, load: Load) {
        let mut state = self.flight.state();
        state.load = Some(load);
        state.loads += 1;
    }

    /// How many loads have begun.
    pub(super) fn loads(&self) -> u32 {
        self.flight.state().loads
    }

    /// The load has come to nothing; whether another may try.
    pub(super) fn hand_over(&self) -> bool {
        let mut state = self.flight.state();
        state.handovers += 1;
        state.load = None;
        state.handovers <= HANDOVERS
    }

    pub(super) fn settle(&self, outcome: Outcome) {
        self.flight.state().outcome = Some(outcome);
    }

    /// Nobody boards any more: there is nothing to wait for.
    pub(super) fn land(&self) {
        self.table.remove(&self.key, &self.flight);
    }

    /// The lease that the flight holds.
    pub(super) fn lease(&self) -> Option<CasToken> {
        let state = self.flight.state();
        state.lease.as_ref().map(|lease| lease.token)
    }

    /// The flight holds a lease, which is given up with the last seat unless it is used.
    pub(super) fn hold(&self, token: CasToken, give_up: impl FnOnce() + Send + 'static) {
        let lease = Lease {
            token,
            give_up: Box::new(give_up),
        };
        let before = self.flight.state().lease.replace(lease);
        // Not under the lock: it may hold the last handle of a client.
        drop(before);
    }

    /// The lease is used.
    pub(super) fn use_lease(&self) {
        let lease = self.flight.state().lease.take();
        // Not under the lock: it may hold the last handle of a client.
        drop(lease);
    }

    /// Whether what was loaded is old.
    pub(super) fn is_outdated(&self) -> bool {
        self.flight.is_outdated()
    }

    /// Held while something is put back of which the cache cannot tell whether it is old: who
    /// invalidates the key waits for that to end.
    pub(super) async fn refilling(&self) -> MutexGuard<'_, ()> {
        self.flight.refill.lock().await
    }
}

/// The outcome is not for who asked.
pub(super) struct Outdated;

impl Drop for Seat {
    fn drop(&mut self) {
        let lease = {
            // Boarding takes the table's lock, too, so nobody boards a flight that is being left.
            let mut flights = self.table.lock();
            let mut state = self.flight.state();
            state.seats -= 1;
            if state.seats > 0 {
                return;
            }
            self.table
                .remove_from(&mut flights, &self.key, &self.flight);
            state.lease.take()
        };
        if let Some(lease) = lease {
            (lease.give_up)();
        }
    }
}
