//! Loading: by the guard, within the time there is, and what comes of it for those who wait.

use std::collections::HashMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::time::Instant;

use super::{Cache, Engine, Fill, Led, Loaded, Query, Settled, Terms, failed, out_of_time};
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::executor::{after, until};
use crate::key::Key;
use crate::read_through::flight::{Load, Outcome, Seen, Source};
use crate::read_through::guard::{Patience, Permit};
use crate::shutdown::{Work, shut_down};
use crate::value::{Payload, Value};

/// So many loads of one flight may follow each other at once.
const MANY_LOADS: u32 = 3;

/// The pause before the first that may not.
const SHORTEST_PAUSE: Duration = Duration::from_millis(4);

fn is_codecs(error: &BoxError) -> bool {
    let own = error.downcast_ref::<Error>();
    own.is_some_and(|error| error.kind() == ErrorKind::Codec)
}

impl Engine {
    /// Loads keys in one go, settles them, and puts back what was loaded.
    pub(super) async fn load<S, F, Fut>(
        self: &Arc<Self>,
        query: &Query<S>,
        ready: Vec<(Led, Fill)>,
        terms: Terms,
        load: &mut F,
    ) -> Vec<Settled>
    where
        S: Cache,
        F: FnMut(Vec<Key>) -> Fut,
        Fut: Future<Output = Loaded>,
    {
        if ready.is_empty() {
            return Vec::new();
        }
        let spawner = self.means.spawner.as_ref();
        let begun = ready.iter().map(|(led, _)| led.seat.loads()).max();
        if let Some(pause) = self.pause_before(begun.unwrap_or_default()) {
            let due = after(Instant::now(), pause).min(terms.ends);
            let pending = std::future::pending::<()>();
            if let Err(error) = until(spawner, due, pending).await {
                return self.all_fail(ready, &error, false);
            }
        }
        if Instant::now() >= terms.ends {
            return self.all_fail(ready, &out_of_time(), true);
        }
        let patience = match terms.patient {
            true => Patience::Until(terms.ends),
            false => Patience::Now,
        };
        let permit = match self.guard().enter(patience, spawner).await {
            Ok(permit) => permit,
            Err(shed) => return self.all_fail(ready, &shed, false),
        };
        if Instant::now() >= terms.ends {
            return self.all_fail(ready, &out_of_time(), true);
        }
        let begun = Instant::now();
        for (led, fill) in &ready {
            led.seat.begin(self.beginning(led, *fill, begun));
        }
        let keys = ready.iter().map(|(led, _)| led.wanted.key.clone());
        let keys: Vec<Key> = keys.collect();
        // As a task it is counted already.
        let own = (!terms.on_task).then(|| self.means.tracker.count(Work::OwnLoad));
        // A loader may panic when it is called, polled, or dropped because its time is up.
        let work = self.means.tracker.unless_closed(async { load(keys).await });
        let work = until(spawner, terms.ends, work);
        let worked = AssertUnwindSafe(work).catch_unwind().await;
        drop(own);
        let (error, hands_over) = match worked {
            Ok(Ok(Some(Some(Ok(loaded))))) => {
                permit.succeeded();
                self.learn(begun.elapsed());
                return self.all_loaded(query, ready, loaded, begun).await;
            }
            Ok(Ok(Some(None))) => (shut_down(), false),
            // What was loaded could not be encoded: that is not the database's doing.
            Ok(Ok(Some(Some(Err(error))))) if is_codecs(&error) => {
                (Error::from_boxed(error), false)
            }
            Ok(Ok(Some(Some(Err(error))))) => {
                permit.failed();
                (failed("the loader failed").with_source(error), false)
            }
            Err(_panic) => {
                permit.failed();
                (failed("the loader panicked"), true)
            }
            Ok(Ok(None)) => {
                self.took_too_long(permit, begun);
                let after = begun.elapsed();
                (failed(format!("the loader took over {after:?}")), true)
            }
            Ok(Err(error)) => (error, false),
        };
        self.all_fail(ready, &error, hands_over)
    }

    /// Asks the database for something else than a value, by the guard, within the time to load.
    pub(crate) async fn ask_database<T, E, Fut>(&self, work: impl FnOnce() -> Fut) -> Result<T>
    where
        Fut: Future<Output = Result<T, E>>,
        E: Into<BoxError>,
    {
        let spawner = self.means.spawner.as_ref();
        let ends = self.load_ends();
        let tracker = &self.means.tracker;
        let entering = self.guard();
        let entering = entering.enter(Patience::Until(ends), spawner);
        let Some(entered) = tracker.unless_closed(entering).await else {
            return Err(shut_down());
        };
        let (permit, begun) = (entered?, Instant::now());
        let _counted = tracker.count(Work::OwnLoad);
        let work = tracker.unless_closed(async { work().await });
        let Some(worked) = until(spawner, ends, work).await? else {
            self.took_too_long(permit, begun);
            let after = begun.elapsed();
            return Err(failed(format!("the database did not answer in {after:?}")));
        };
        match worked {
            Some(Ok(answer)) => {
                permit.succeeded();
                Ok(answer)
            }
            Some(Err(error)) => {
                permit.failed();
                Err(failed("the database was asked and failed").with_source(error))
            }
            None => Err(shut_down()),
        }
    }

    /// How long to wait before a key is loaded once more in the same flight. Callers who leave sooner
    /// than the database answers would hand over to each other load by load.
    fn pause_before(&self, loads: u32) -> Option<Duration> {
        let repeated = loads.checked_sub(MANY_LOADS)?;
        let pause = SHORTEST_PAUSE.saturating_mul(1 << repeated.min(10));
        Some(pause.min(self.settings().load_timeout / 4))
    }

    /// A load that did not have its time says nothing of the database.
    fn took_too_long(&self, permit: Permit, begun: Instant) {
        if begun.elapsed() >= self.settings().load_timeout / 2 {
            permit.failed();
        }
    }

    fn all_fail(&self, ready: Vec<(Led, Fill)>, error: &Error, hands_over: bool) -> Vec<Settled> {
        let failed = ready.into_iter().map(|(led, fill)| {
            if let (Some(token), Some(_)) = (fill.token(), &led.wanted.fallback) {
                // Not every read tries to load anew what cannot be.
                self.elsewhere
                    .note(&led.wanted.key, token, self.settings().lease_duration());
            }
            if hands_over && led.seat.hand_over() {
                return led.wanted.conclude(Err(error.clone()));
            }
            led.seat.land();
            led.settle(Outcome {
                result: Err(error.clone()),
                source: Source::Nowhere,
            })
        });
        failed.collect()
    }

    fn beginning(&self, led: &Led, fill: Fill, begun: Instant) -> Load {
        Load {
            begun,
            token: fill.token(),
            leased: match led.wanted.sighting.seen {
                Seen::Vacancy(_) => true,
                Seen::Unleased(_) => false,
                Seen::Failure => self.settings().leases,
            },
        }
    }

    async fn all_loaded<S: Cache>(
        self: &Arc<Self>,
        query: &Query<S>,
        ready: Vec<(Led, Fill)>,
        mut loaded: HashMap<Key, Payload>,
        begun: Instant,
    ) -> Vec<Settled> {
        let mut settled = Vec::with_capacity(ready.len());
        for (led, fill) in ready {
            let payload = loaded.remove(&led.wanted.key);
            let outcome = Outcome {
                result: Ok(payload.clone().map(Value::from)),
                source: Source::Load(self.beginning(&led, fill, begun)),
            };
            let Led { wanted, turn, seat } = led;
            seat.settle(outcome.clone());
            drop(turn);
            self.put_back(query, seat, &wanted.key, fill, payload).await;
            settled.push(wanted.conclude(outcome.result));
        }
        settled
    }

    /// A moving average of what loads take.
    fn learn(&self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let known = self.cost.load(Ordering::Relaxed);
        let cost = match known {
            0 => took,
            _ => known - known / 8 + took / 8,
        };
        // Of two at once one is lost, which matters to nobody.
        self.cost.store(cost, Ordering::Relaxed);
    }
}
