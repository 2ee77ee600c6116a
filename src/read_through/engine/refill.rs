//! Putting back what was loaded, behind the answer.

use std::future::Future;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{Cache, Engine, Fill, Query};
use crate::error::Result;
use crate::executor::{Spawner, after};
use crate::key::Key;
use crate::read_through::flight::Seat;
use crate::request::{Operation, Purpose, Request, StoreMode};
use crate::response::{CasOutcome, Response};
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
        let Some(request) = self.refill(query, key, fill, loaded) else {
            return seat.land();
        };
        let query = query.clone();
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
                    "stored"
                }
                Ok(false) => "outdated",
                // A lease that could not be used is given up with the seat.
                Err(_) => "failed",
            });
        };
        let behind = Behind {
            spawner: self.spawner.clone(),
            permits: self.refills.clone(),
        };
        if !behind.run(write).await {
            telemetry::refill("dropped");
        }
    }

    fn refill<S>(
        &self,
        query: &Query<S>,
        key: &Key,
        fill: Fill,
        loaded: Option<Payload>,
    ) -> Option<Request> {
        let settings = &self.settings;
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
    /// Writes to the cache, in an operation's time of its own; whether it was stored.
    pub(super) async fn put(self, request: Request) -> Result<bool> {
        let request = request.with_deadline(after(Instant::now(), self.timeout));
        Ok(matches!(
            request.ask(self.cache).await?,
            Response::Swapped(CasOutcome::Stored) | Response::Stored(true)
        ))
    }
}

/// Where things are done behind the answer.
pub(super) struct Behind {
    pub(super) spawner: Option<Spawner>,
    pub(super) permits: Arc<Semaphore>,
}

impl Behind {
    /// Runs it behind the answer if there is a runtime, and at once otherwise.
    async fn run(self, write: impl Future<Output = ()> + Send + 'static) -> bool {
        if self.spawner.is_none() && Handle::try_current().is_err() {
            write.await;
            return true;
        }
        self.spawn(write)
    }

    /// Runs it behind the answer; false if that cannot be, or as much is done there as may be.
    pub(super) fn spawn(self, write: impl Future<Output = ()> + Send + 'static) -> bool {
        let Ok(permit) = self.permits.try_acquire_owned() else {
            return false;
        };
        let write = async move {
            write.await;
            drop(permit);
        };
        match (&self.spawner, Handle::try_current()) {
            (Some(spawner), _) => spawner.spawn(write).is_ok(),
            (None, Ok(runtime)) => {
                drop(runtime.spawn(write));
                true
            }
            (None, Err(_)) => false,
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
