//! Putting back what was loaded, behind the answer.

use std::future::Future;

use tokio::runtime::Handle;

use super::{Cache, Engine, Fill, Query};
use crate::bulkhead::Place;
use crate::call::Call;
use crate::error::Result;
use crate::executor::Spawner;
use crate::key::Key;
use crate::read_through::flight::Seat;
use crate::request::{Operation, Purpose, Request, StoreMode};
use crate::response::{CasOutcome, Response};
use crate::shutdown::{Counted, Work};
use crate::telemetry;
use crate::ttl::Ttl;
use crate::value::{CasToken, Payload};

impl Engine {
    /// Puts back what was loaded, or that there is nothing, behind the answer.
    pub(super) async fn put_back<S: Cache>(
        &self,
        query: &Query<S>,
        seat: Seat,
        key: &Key,
        fill: Fill,
        loaded: Option<Payload>,
    ) {
        let loaded_nothing = loaded.is_none();
        let Some(mut request) = self.refill(query, key, fill, loaded) else {
            if matches!(fill, Fill::Not) {
                telemetry::refill("skipped");
            }
            return seat.land();
        };
        let Some(place) = self.refill_place() else {
            self.means.tracker.refill_dropped();
            telemetry::refill("dropped");
            return seat.land();
        };
        // Here, and not behind the answer, where I/O may run.
        if let Some(compression) = self.compression().get()
            && compression.write(&mut request).is_err()
        {
            telemetry::refill("failed");
            return seat.land();
        }
        let counted = self.means.tracker.count(Work::Refill);
        let behind = Behind::new(self.means.behind.clone(), place, counted);
        let query = query.clone();
        let removes = loaded_nothing && self.settings().negative_ttl.is_none();
        let write = async move {
            let _refilling = match fill {
                Fill::Add(_) => Some(seat.refilling().await),
                // If it is old it does not fit any more.
                Fill::Swap(..) | Fill::Not => None,
            };
            let result = match seat.is_outdated() {
                true => Ok(false),
                false => query.put(request).await,
            };
            telemetry::refill(match result {
                Ok(true) => {
                    seat.use_lease();
                    if removes { "removed" } else { "stored" }
                }
                Ok(false) => "outdated",
                // A lease that could not be used is given up with the seat.
                Err(_) => "failed",
            });
            // It is in the cache, or will not be: nobody has to wait for that any more.
            seat.land();
        };
        behind.run(write).await;
    }

    fn refill<S>(
        &self,
        query: &Query<S>,
        key: &Key,
        fill: Fill,
        loaded: Option<Payload>,
    ) -> Option<Request> {
        let settings = self.settings();
        let (payload, ttl) = match (loaded, settings.negative_ttl) {
            (Some(payload), _) => {
                let ttl = query.ttl.jittered(settings.ttl_jitter, fastrand::f64());
                let (Fill::Swap(_, away) | Fill::Add(away)) = fill else {
                    return None;
                };
                (payload, ttl.extended(self.grace(away)))
            }
            (None, Some(ttl)) => (Payload::absent(), Ttl::from(ttl)),
            // What is there is a placeholder, or a value of what no longer is.
            (None, None) => {
                return fill
                    .token()
                    .map(|token| refill(removal(key.clone(), token)));
            }
        };
        let key = key.clone();
        Some(refill(match fill {
            Fill::Swap(token, _) => Operation::CompareAndSwap {
                key,
                payload,
                ttl,
                token,
            },
            Fill::Add(_) => Operation::Store {
                mode: StoreMode::Add,
                key,
                payload,
                ttl,
            },
            Fill::Not => return None,
        }))
    }
}

impl<S: Cache> Query<S> {
    /// Writes to the cache, in an operation's time of its own; whether it was stored. A layer that
    /// never answers would otherwise keep the client alive for ever.
    pub(super) async fn put(self, request: Request) -> Result<bool> {
        Ok(matches!(
            Call::new(self.cache, request, self.timeout, None).await?,
            Response::Swapped(CasOutcome::Stored) | Response::Stored(true)
        ))
    }
}

/// Where things are done behind the answer.
pub(super) struct Behind {
    spawner: Option<Spawner>,
    permit: Place,
    counted: Counted,
}

impl Behind {
    pub(super) fn new(spawner: Option<Spawner>, permit: Place, counted: Counted) -> Self {
        Self {
            spawner,
            permit,
            counted,
        }
    }

    /// Does it there if there is a runtime, and at once otherwise.
    async fn run(self, work: impl Future<Output = ()> + Send + 'static) {
        if self.spawner.is_none() && Handle::try_current().is_err() {
            return work.await;
        }
        self.spawn(work);
    }

    /// Does it there, if there is a runtime, and unless the client is shut down before.
    pub(super) fn spawn(self, work: impl Future<Output = ()> + Send + 'static) {
        let Self {
            spawner,
            permit,
            counted,
        } = self;
        let work = async move {
            let _ = counted.tracker().unless_closed(work).await;
            drop((permit, counted));
        };
        match (spawner, Handle::try_current()) {
            // Where its runtime has gone, so has the cache.
            (Some(spawner), _) => drop(spawner.spawn(work)),
            (None, Ok(runtime)) => drop(runtime.spawn(work)),
            (None, Err(_)) => {}
        }
    }
}

pub(super) fn refill(operation: Operation) -> Request {
    Request::new(operation).with_purpose(Purpose::Refill)
}

/// Deletes what the token stands for: its successor has already expired.
pub(super) fn removal(key: Key, token: CasToken) -> Operation {
    Operation::CompareAndSwap {
        key,
        payload: "".into(),
        ttl: Ttl::secs(0),
        token,
    }
}
