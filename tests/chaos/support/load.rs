//! An open-loop load that knows what every read may return.
//!
//! A thread of its own starts each request when it is due, whatever has become of those before it; latency counts from
//! then. Every value says whose it is and which version of it. A key has one writer at a time and its versions only
//! grow, so a read that began after a write was acknowledged must not return an older version: that would be a stale
//! read. A miss is refilled with the newest version, as a service would from its database, by the same one writer.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex as Lock, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt as _, stream};
use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout_at};
use tower_memcached::{Client, ErrorKind, Ttl};

use super::lateness::pause;

pub(crate) const RATE: u32 = 500;
pub(crate) const KEYS: usize = 2_000;
const GETS_PERCENT: u32 = 90;
const SEED: u64 = 1;
const TTL: Ttl = Ttl::secs(3_600);
/// How long what is still out is waited for when no more becomes due.
const DRAIN: Duration = Duration::from_secs(2);

/// What a request was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Get,
    Set,
    /// The set that follows a miss: not on schedule, but no less a call of the service.
    Refill,
    /// A get when all is over, of every key.
    ReadBack,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Hit,
    /// With when the key had last been written with success.
    Miss {
        written: Option<Instant>,
    },
    Stored,
    /// A value of another key, or of a version nobody wrote.
    Wrong,
    /// Older than a write that was acknowledged before the read began.
    Stale {
        key: usize,
        read: u64,
        acknowledged: u64,
    },
    Failed(ErrorKind),
    /// It had not ended when the run was over.
    Unanswered,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) asked: Asked,
    pub(crate) due: Instant,
    pub(crate) ended: Instant,
    pub(crate) ending: Ending,
}

impl Sample {
    pub(crate) fn latency(&self) -> Duration {
        self.ended.saturating_duration_since(self.due)
    }

    pub(crate) fn failed(&self) -> bool {
        matches!(self.ending, Ending::Failed(_) | Ending::Unanswered)
    }
}

/// The database behind the cache, and what the cache has acknowledged.
#[derive(Debug)]
pub(crate) struct Records(Vec<Record>);

#[derive(Debug, Default)]
struct Record {
    /// The newest version, held by who writes it.
    newest: Mutex<u64>,
    acknowledged: AtomicU64,
    written: Lock<Option<Instant>>,
}

impl Record {
    fn written(&self) -> MutexGuard<'_, Option<Instant>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn key(number: usize) -> String {
    format!("chaos:{number}")
}

fn value(number: usize, version: u64) -> String {
    format!("{:.<100}", format!("{number} {version} "))
}

fn parse(value: &[u8]) -> Option<(usize, u64)> {
    let mut words = std::str::from_utf8(value).ok()?.split(' ');
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

impl Records {
    pub(crate) fn new() -> Self {
        Self((0..KEYS).map(|_| Record::default()).collect())
    }

    pub(crate) async fn read(&self, client: &Client, number: usize) -> Ending {
        let record = &self.0[number];
        let acknowledged = record.acknowledged.load(Ordering::SeqCst);
        let written = *record.written();
        let value = match client.get(key(number)).await {
            Ok(Some(value)) => value,
            Ok(None) => return Ending::Miss { written },
            Err(error) => return Ending::Failed(error.kind()),
        };
        match parse(&value) {
            Some((whose, read)) if whose == number && read < acknowledged => Ending::Stale {
                key: number,
                read,
                acknowledged,
            },
            Some((whose, _)) if whose == number => Ending::Hit,
            _ => Ending::Wrong,
        }
    }

    /// A new version; `None` if the key is being written.
    async fn write(&self, client: &Client, number: usize) -> Option<Ending> {
        let mut newest = self.0[number].newest.try_lock().ok()?;
        *newest += 1;
        Some(self.store(client, number, *newest).await)
    }

    /// The newest version once more; `None` if the key is being written.
    async fn refill(&self, client: &Client, number: usize) -> Option<Ending> {
        let newest = self.0[number].newest.try_lock().ok()?;
        Some(self.store(client, number, *newest).await)
    }

    async fn store(&self, client: &Client, number: usize, version: u64) -> Ending {
        let record = &self.0[number];
        match client.set(key(number), value(number, version), TTL).await {
            Ok(()) => {
                record.acknowledged.fetch_max(version, Ordering::SeqCst);
                *record.written() = Some(Instant::now());
                Ending::Stored
            }
            Err(error) => Ending::Failed(error.kind()),
        }
    }

    /// Stores every key, however often a busy machine makes that fail at first.
    pub(crate) async fn store_all(&self, client: &Client) {
        let store = |number| async move {
            for _ in 0..50 {
                if let Some(Ending::Stored) = self.write(client, number).await {
                    return;
                }
            }
            panic!("key {number} cannot be stored on healthy nodes");
        };
        stream::iter(0..KEYS).for_each_concurrent(32, store).await;
    }

    /// Reads every key once.
    pub(crate) async fn read_back(&self, client: &Client) -> Vec<Sample> {
        let read = |number| async move {
            let due = Instant::now();
            let ending = self.read(client, number).await;
            Sample {
                asked: Asked::ReadBack,
                due,
                ended: Instant::now(),
                ending,
            }
        };
        stream::iter(0..KEYS)
            .map(read)
            .buffer_unordered(16)
            .collect()
            .await
    }
}

/// A load under way.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) start: Instant,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    client: Client,
    records: Arc<Records>,
    samples: Lock<Vec<Sample>>,
    scheduled: AtomicU64,
    over: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    due: Instant,
    key: usize,
    asked: Asked,
}

impl Load {
    /// Starts it on this runtime.
    pub(crate) fn start(client: Client, records: Arc<Records>) -> Self {
        let start = Instant::now() + Duration::from_millis(20);
        let shared = Arc::new(Shared {
            client,
            records,
            samples: Lock::default(),
            scheduled: AtomicU64::new(0),
            over: AtomicBool::new(false),
        });
        let (runtime, working) = (Handle::current(), shared.clone());
        std::thread::spawn(move || schedule(start, &runtime, &working));
        Self { start, shared }
    }

    /// Ends it at that time, and waits for what is under way then.
    pub(crate) async fn end_at(self, until: Instant) -> Vec<Sample> {
        tokio::time::sleep_until(until).await;
        self.shared.over.store(true, Ordering::SeqCst);
        let horizon = Instant::now() + DRAIN * 2;
        let all_in = || {
            let samples = self.shared.lock();
            let scheduled = samples
                .iter()
                .filter(|sample| sample.asked != Asked::Refill)
                .count() as u64;
            scheduled == self.shared.scheduled.load(Ordering::SeqCst)
        };
        while !all_in() {
            assert!(Instant::now() < horizon, "requests that never end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        std::mem::take(&mut *self.shared.lock())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Sample>> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, asked: Asked, due: Instant, ending: Ending) {
        self.lock().push(Sample {
            asked,
            due,
            ended: Instant::now(),
            ending,
        });
    }

    async fn perform(self: Arc<Self>, arrival: Arrival) {
        let Arrival { due, key, asked } = arrival;
        let horizon = Instant::now() + DRAIN;
        let (client, records) = (&self.client, &self.records);
        if asked == Asked::Get {
            let read = timeout_at(horizon, records.read(client, key)).await;
            let ending = read.unwrap_or(Ending::Unanswered);
            self.record(asked, due, ending);
            if let Ending::Miss { .. } = ending {
                let due = Instant::now();
                if let Some(ending) = records.refill(client, key).await {
                    self.record(Asked::Refill, due, ending);
                }
            }
            return;
        }
        // Another key if this one is being written: nobody waits for a writer.
        let mut key = key;
        let stored = async {
            loop {
                if let Some(ending) = records.write(client, key).await {
                    return ending;
                }
                key = (key + 1) % KEYS;
            }
        };
        let ending = timeout_at(horizon, stored).await;
        self.record(asked, due, ending.unwrap_or(Ending::Unanswered));
    }
}

fn schedule(start: Instant, runtime: &Handle, shared: &Arc<Shared>) {
    let mut random = fastrand::Rng::with_seed(SEED);
    for number in 0.. {
        let arrival = Arrival {
            due: start + Duration::from_secs(number) / RATE,
            key: random.usize(..KEYS),
            asked: match random.u32(..100) {
                percent if percent < GETS_PERCENT => Asked::Get,
                _ => Asked::Set,
            },
        };
        pause(arrival.due.saturating_duration_since(Instant::now()));
        if shared.over.load(Ordering::SeqCst) {
            return;
        }
        shared.scheduled.fetch_add(1, Ordering::SeqCst);
        runtime.spawn(shared.clone().perform(arrival));
    }
}
