//! Calls at a steady rate whose times and errors are kept, for scenarios that are not judged by the whole list.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};
use tower_memcached::{Client, Error, Key};

use super::lateness::{EXCUSES_AN_ERROR, Watch};

/// How calls went: times without what the machine took, and no errors of calls during which it stood still.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    took: Vec<Duration>,
    pub(crate) hits: usize,
    pub(crate) misses: usize,
    pub(crate) errors: Vec<Error>,
    excused: usize,
}

#[derive(Debug)]
struct Call {
    due: Instant,
    ended: Instant,
    /// Whether it was a hit.
    outcome: Result<bool, Error>,
}

impl Calls {
    pub(crate) fn count(&self) -> usize {
        self.took.len()
    }

    /// The time that so many percent of the calls did not exceed.
    pub(crate) fn percentile(&self, percent: usize) -> Duration {
        let mut took = self.took.clone();
        took.sort_unstable();
        took[((took.len() * percent).div_ceil(100)).saturating_sub(1)]
    }

    pub(crate) fn longest(&self) -> Duration {
        self.percentile(100)
    }

    pub(crate) fn summary(&self) -> String {
        let first = self.errors.first().map(ToString::to_string);
        format!(
            "{} calls: {} hits, {} misses, {} errors ({}), {} excused; median {:?}, p99 {:?}, longest {:?}",
            self.count(),
            self.hits,
            self.misses,
            self.errors.len(),
            first.unwrap_or_default(),
            self.excused,
            self.percentile(50),
            self.percentile(99),
            self.longest()
        )
    }
}

/// Gets these keys in turn, one each `every`, whatever has become of those before, for so long.
pub(crate) async fn gets(
    client: &Client,
    keys: &[Key],
    every: Duration,
    lasting: Duration,
) -> Calls {
    let made = Arc::new(Mutex::new(Vec::new()));
    let watch = Watch::start();
    let mut tick = interval(every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let until = Instant::now() + lasting;
    let mut under_way = Vec::new();
    for key in keys.iter().cycle() {
        let due = tick.tick().await;
        if due >= until {
            break;
        }
        let (client, key, made) = (client.clone(), key.clone(), made.clone());
        under_way.push(tokio::spawn(async move {
            let outcome = client.get(&key).await.map(|value| value.is_some());
            let call = Call {
                due,
                ended: Instant::now(),
                outcome,
            };
            made.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(call);
        }));
    }
    for call in under_way {
        call.await.unwrap();
    }
    let stalls = watch.end();
    let mut calls = Calls::default();
    let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
    for call in made.drain(..) {
        let stalled = stalls.within(call.due, call.ended);
        match call.outcome {
            Err(_) if stalled >= EXCUSES_AN_ERROR => {
                calls.excused += 1;
                continue;
            }
            Ok(true) => calls.hits += 1,
            Ok(false) => calls.misses += 1,
            Err(error) => calls.errors.push(error),
        }
        let took = call.ended.saturating_duration_since(call.due);
        calls.took.push(took.saturating_sub(stalled));
    }
    calls
}
