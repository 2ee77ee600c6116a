//! An open-loop load: requests come when they come, whether or not those before them have been
//! answered.
//!
//! A thread of its own says when each request is due, and waits for nothing else. A request that
//! is due takes one of 64 places, as in a service with so many workers; while all are taken it
//! waits, first come first served. Its latency counts from when it was due, so the waiting is in
//! it: what a user of the service would measure.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, timeout_at};
use tower_memcached::{Client, Error, Ttl};

pub(crate) const IN_FLIGHT: usize = 64;
pub(crate) const KEYS: u32 = 3_000;
pub(crate) const GETS_PERCENT: u32 = 95;
pub(crate) const SEED: u64 = 1;

/// How long after the last request was due the answers still out are waited for.
const DRAIN: Duration = Duration::from_secs(3);

/// Values read from the database and written back to the cache at a time; more are not.
const REFILLS: usize = 16;

const TTL: Ttl = Ttl::secs(3_600);

#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Requests per second.
    pub(crate) rate: u32,
    pub(crate) seconds: u32,
}

/// How a request ended.
#[derive(Debug)]
pub(crate) enum Ending {
    Hit,
    /// A hit with a value that is not the key's.
    Wrong,
    Miss,
    Stored,
    Failed(Error),
    /// Nothing was heard of it by the end of the run, or it was never even sent.
    Unanswered,
}

#[derive(Debug)]
pub(crate) struct Ended {
    /// The second of the run it was due in, from 0.
    pub(crate) second: usize,
    /// From when it was due.
    pub(crate) latency: Duration,
    pub(crate) ending: Ending,
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    second: usize,
    due: Instant,
    key: u32,
    is_get: bool,
}

impl Load {
    pub(crate) fn requests(&self) -> u64 {
        u64::from(self.rate) * u64::from(self.seconds)
    }

    /// When the `number`th request is due, after the start.
    fn due(&self, number: u64) -> Duration {
        Duration::from_nanos(number * 1_000_000_000 / u64::from(self.rate))
    }

    /// The same requests at the same times in every run.
    fn arrivals(self, start: Instant) -> impl Iterator<Item = Arrival> {
        let mut random = fastrand::Rng::with_seed(SEED);
        (0..self.requests()).map(move |number| Arrival {
            second: (number / u64::from(self.rate)) as usize,
            due: start + self.due(number),
            key: random.u32(..KEYS),
            is_get: random.u32(..100) < GETS_PERCENT,
        })
    }

    /// Sends every request when it is due, and tells how each ended. Once it is to stop, no
    /// more become due.
    pub(crate) async fn run(
        self,
        client: Client,
        start: Instant,
        stop: watch::Receiver<bool>,
        ended: mpsc::Sender<Ended>,
    ) {
        let horizon = start + Duration::from_secs(self.seconds.into()) + DRAIN;
        let places = Arc::new(Semaphore::new(IN_FLIGHT));
        let refills = Arc::new(Semaphore::new(REFILLS));
        let mut due = self.schedule(start, stop);
        while let Some(arrival) = due.recv().await {
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let (client, refills, ended) = (client.clone(), refills.clone(), ended.clone());
            tokio::spawn(async move {
                let ending = arrival.perform(&client, horizon).await;
                let latency = arrival.due.elapsed();
                drop(place);
                if let Ending::Miss = ending {
                    refill(client, arrival.key, &refills);
                }
                let second = arrival.second;
                let told = ended.send(Ended {
                    second,
                    latency,
                    ending,
                });
                let _ = told.await;
            });
        }
    }

    /// Hands out each request when it is due. There is room for all of them, so that whoever
    /// takes them cannot hold up the clock.
    fn schedule(self, start: Instant, stop: watch::Receiver<bool>) -> mpsc::Receiver<Arrival> {
        let (sender, receiver) = mpsc::channel(self.requests() as usize);
        std::thread::spawn(move || {
            for arrival in self.arrivals(start) {
                sleep_until(arrival.due);
                if *stop.borrow() || sender.try_send(arrival).is_err() {
                    return;
                }
            }
        });
        receiver
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "on a thread of its own; tokio's timers are a millisecond coarse"
)]
fn sleep_until(due: Instant) {
    std::thread::sleep(due.saturating_duration_since(Instant::now()));
}

impl Arrival {
    /// Nothing is sent, and no answer waited for, after the horizon.
    async fn perform(&self, client: &Client, horizon: Instant) -> Ending {
        if Instant::now() >= horizon {
            return Ending::Unanswered;
        }
        let answer = timeout_at(horizon, self.ask(client)).await;
        match answer {
            Ok(Ok(ending)) => ending,
            Ok(Err(error)) => Ending::Failed(error),
            Err(_elapsed) => Ending::Unanswered,
        }
    }

    async fn ask(&self, client: &Client) -> Result<Ending, Error> {
        let key = key(self.key);
        if !self.is_get {
            client.set(&*key, value(&key), TTL).await?;
            return Ok(Ending::Stored);
        }
        Ok(match client.get(&*key).await? {
            Some(read) if read == *value(&key).as_str() => Ending::Hit,
            Some(_) => Ending::Wrong,
            None => Ending::Miss,
        })
    }
}

fn key(number: u32) -> String {
    format!("incident:{number}")
}

/// Says whose it is, in 100 bytes.
fn value(key: &str) -> String {
    format!("{:.<100}", format!("the value of {key} "))
}

/// After a miss a service has the value from its database, and writes it back when it has
/// answered its own caller.
fn refill(client: Client, number: u32, refills: &Arc<Semaphore>) {
    let Ok(place) = refills.clone().try_acquire_owned() else {
        return;
    };
    tokio::spawn(async move {
        let key = key(number);
        // If it fails, the next miss is another occasion.
        let _ = client.set(&*key, value(&key), TTL).await;
        drop(place);
    });
}

/// Stores every key, before the clock starts.
pub(crate) async fn fill(client: &Client) -> Result<(), Error> {
    let store = |number| async move {
        let key = key(number);
        let mut tries = 1;
        loop {
            match client.set(&*key, value(&key), TTL).await {
                Err(_) if tries < 3 => tries += 1,
                outcome => return outcome,
            }
        }
    };
    let stored = stream::iter(0..KEYS).map(store).buffer_unordered(IN_FLIGHT);
    stored.try_collect().await
}
