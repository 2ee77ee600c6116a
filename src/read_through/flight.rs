//! Single flight: of all who want to load a key at once, one does.
//!
//! Those who want a key queue up for its turn. Who has the turn and finds no outcome loads; whoever
//! gets the turn after that finds the outcome. A loader that is dropped or runs out of time gives
//! the turn up without an outcome, and the next in the queue loads instead.

use std::cell::Cell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::error::{BoxError, Error, ErrorKind, Result, Sent};
use crate::executor::{Spawner, after, until};
use crate::key::Key;
use crate::telemetry;
use crate::value::{Payload, Value};

type Outcome = Result<Option<Payload>>;

/// The loads under way in one client. It holds only keys that somebody waits for now.
#[derive(Clone, Default)]
pub(crate) struct Flights(Arc<StdMutex<HashMap<Key, Arc<Flight>>>>);

#[derive(Default)]
struct Flight {
    turn: Mutex<()>,
    outcome: OnceLock<Outcome>,
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Arc<Flight>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, key: &Key) -> Boarded<'_> {
        let flight = self.lock().entry(key.clone()).or_default().clone();
        Boarded {
            flights: self,
            key: key.clone(),
            flight,
            leads: Cell::new(false),
        }
    }

    /// Waits for the key's turn, up to `within`, and loads if nobody has by then; `refill` puts a
    /// value that was loaded into the cache, after the waiters have it.
    pub(crate) async fn load<L, R, Fut>(
        &self,
        key: &Key,
        within: Duration,
        spawner: Option<&Spawner>,
        load: L,
        refill: R,
    ) -> Result<Option<Value>>
    where
        L: Future<Output = Result<Option<Payload>, BoxError>>,
        R: FnOnce(Payload) -> Fut,
        Fut: Future<Output = Result<()>>,
    {
        let deadline = after(Instant::now(), within);
        let boarded = self.join(key);
        let turn = until(spawner, deadline, boarded.flight.turn.lock()).await?;
        let Some(turn) = turn else {
            let message = format!("no value within {within:?}, while another caller loads");
            return Err(failed(message));
        };
        let flight = &boarded.flight;
        if let Some(outcome) = flight.outcome.get() {
            return outcome.clone().map(|payload| payload.map(Value::from));
        }
        boarded.leads.set(true);
        let load = AssertUnwindSafe(load).catch_unwind();
        let outcome = match until(spawner, deadline, load).await? {
            // The next in the queue may have better luck, and has a time of its own.
            None => return Err(failed(format!("the loader took over {within:?}"))),
            Some(Ok(Ok(loaded))) => Ok(loaded),
            Some(Ok(Err(error))) => Err(failed("the loader failed").with_source(error)),
            Some(Err(_panic)) => Err(failed("the loader panicked")),
        };
        let outcome = flight.outcome.get_or_init(|| outcome).clone();
        drop(turn);
        if let Ok(Some(payload)) = &outcome
            && refill(payload.clone()).await.is_err()
        {
            telemetry::refill_failed();
        }
        outcome.map(|payload| payload.map(Value::from))
    }
}

fn failed(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Load, message).with_sent(Sent::No)
}

/// Somebody who wants a key. The flight ends when who loaded its value has put it into the cache,
/// or the last of them has left.
struct Boarded<'a> {
    flights: &'a Flights,
    key: Key,
    flight: Arc<Flight>,
    leads: Cell<bool>,
}

impl Drop for Boarded<'_> {
    fn drop(&mut self) {
        let mut flights = self.flights.lock();
        if let Entry::Occupied(entry) = flights.entry(self.key.clone())
            && Arc::ptr_eq(entry.get(), &self.flight)
        {
            // Who comes after that must ask the cache. Joining takes the lock we hold, so the count
            // cannot grow: two are the map's and ours.
            let landed = self.leads.get() && self.flight.outcome.get().is_some();
            if landed || Arc::strong_count(&self.flight) == 2 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::join_all;
    use tokio::sync::Notify;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn key() -> Key {
        Key::new("k").unwrap()
    }

    async fn stored(_: Payload) -> Result<()> {
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_misses_are_one_load() {
        let (flights, loads) = (Flights::default(), AtomicUsize::new(0));
        let one = || async {
            let load = async {
                loads.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(10)).await;
                Ok(Some(Payload::from("v")))
            };
            flights.load(&key(), SECOND, None, load, stored).await
        };
        for value in join_all((0..1000).map(|_| one())).await {
            assert_eq!(value.unwrap().unwrap(), "v");
        }
        assert_eq!(loads.load(Ordering::Relaxed), 1);
        assert!(flights.lock().is_empty(), "nothing is kept");
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_takes_over_from_a_leader_that_is_dropped() {
        let flights = Flights::default();
        let key = key();
        let started = Notify::new();
        let endless = async {
            started.notify_one();
            std::future::pending().await
        };
        let leader = Box::pin(flights.load(&key, SECOND, None, endless, stored));
        let waiter = flights.load(&key, SECOND, None, async { Ok(Some("v".into())) }, stored);
        let leader_until_started = async {
            tokio::select! {
                _ = leader => unreachable!("its loader never ends"),
                () = started.notified() => {}
            }
        };
        let (value, ()) = tokio::join!(waiter, leader_until_started);
        assert_eq!(value.unwrap().unwrap(), "v");
        assert!(flights.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_loaders_error_reaches_all_who_wait_typed_and_is_not_kept() {
        let flights = Flights::default();
        let key = key();
        let fail = || async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Err(std::io::Error::other("no such table").into())
        };
        let first = flights.load(&key, SECOND, None, fail(), stored);
        let second = flights.load(&key, SECOND, None, fail(), stored);
        let (first, second) = tokio::join!(first, second);
        for outcome in [first, second] {
            let error = outcome.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Load);
            let source = std::error::Error::source(&error).unwrap();
            assert_eq!(source.to_string(), "no such table");
            assert!(source.is::<std::io::Error>());
        }
        let again = flights
            .load(&key, SECOND, None, async { Ok(None) }, stored)
            .await;
        assert_eq!(again.unwrap(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_loader_that_panics_or_hangs_is_an_error() {
        let flights = Flights::default();
        let panics = async { panic!("a bug in the loader") };
        let error = flights
            .load(&key(), SECOND, None, panics, stored)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Load);
        let hangs = std::future::pending();
        let begun = Instant::now();
        let error = flights
            .load(&key(), SECOND, None, hangs, stored)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Load);
        assert!(begun.elapsed() < SECOND * 2);
        assert!(flights.lock().is_empty());
    }
}
