//! An open-loop load, and the service that it meets.
//!
//! A thread of its own says each millisecond what is due now, and waits for nothing else: never for an answer, nor
//! for the service to have time. If the thread is woken late, or the service takes its work late, then that is part
//! of each request's latency, which counts from when it was due; and how late the thread was is told.
//!
//! The service is a few tasks, each of which drives many requests at once, as the task of an HTTP/2 connection does.
//! It has a door: what it comes to only after the patience of a request is over (that of --p99) it refuses itself, as
//! any service should, and the client is not asked. Where processors are what is short the queue is in front of the
//! service, and nothing in the client can shed what it does not see.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::FuturesUnordered;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};
use tower_memcached::{Client, Error, Key, Ttl};

use crate::cpu::{self, Process, Usage};
use crate::tally::{Board, Ended, Ending, Second};

pub(crate) const KEYS: usize = 10_000;
pub(crate) const GETS_PERCENT: u32 = 90;
pub(crate) const VALUE_SIZE: usize = 100;

/// What is due within it is due at its beginning.
const TICK: Duration = Duration::from_millis(1);
const TICKS_PER_SECOND: u64 = 1_000;

/// The tasks of the service.
const TASKS: usize = 8;

/// Endings are told together, so many of them.
const TOLD_TOGETHER: usize = 256;

/// How long after its deadline the last request may take to be told.
const GRACE: Duration = Duration::from_millis(500);

const TTL: Ttl = Ttl::secs(3_600);

/// So many requests a second, for so long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Phase {
    pub(crate) rate: u64,
    pub(crate) seconds: u32,
}

/// Which keys the callers want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Any,
    One,
}

struct Item {
    key: Key,
    value: Bytes,
}

/// What the load is put on.
pub(crate) struct Target {
    pub(crate) client: Client,
    items: Arc<[Item]>,
    wanted: Wanted,
    deadline: Duration,
    /// How late the service may come to a request.
    patience: Duration,
    /// Servers of ours that are processes.
    servers: Vec<Process>,
}

/// What is due at once, for one of the tasks.
struct Due {
    at: Instant,
    second: usize,
    count: u64,
}

impl Target {
    pub(crate) fn new(
        client: Client,
        wanted: Wanted,
        (deadline, patience): (Duration, Duration),
        servers: Vec<Process>,
    ) -> Self {
        let item = |number| {
            let key = format!("load:{number:08}");
            let value = format!("{:.<VALUE_SIZE$}", format!("the value of {key} "));
            Item {
                key: Key::new(key).expect("it is a valid key"),
                value: value.into(),
            }
        };
        Self {
            client,
            items: (0..KEYS).map(item).collect(),
            wanted,
            deadline,
            patience,
            servers,
        }
    }

    /// Stores every key.
    pub(crate) async fn fill(&self) -> Result<(), Error> {
        let store = |item: &Item| {
            let (client, key, value) = (self.client.clone(), item.key.clone(), item.value.clone());
            async move {
                let mut tries = 1;
                loop {
                    match client.set(&key, value.clone(), TTL).await {
                        Err(_) if tries < 5 => tries += 1,
                        outcome => return outcome,
                    }
                }
            }
        };
        let stores: Vec<_> = self.items.iter().map(store).collect();
        let stored = stream::iter(stores).buffer_unordered(64);
        stored.try_collect().await
    }

    /// Puts the load on, one phase after the other, and tells of each second once all of it is known.
    pub(crate) async fn offer(
        &self,
        phases: &[Phase],
        mut tell: impl FnMut(usize, &Second),
    ) -> Vec<Second> {
        let rates: Vec<u64> = phases
            .iter()
            .flat_map(|phase| std::iter::repeat_n(phase.rate, phase.seconds as usize))
            .collect();
        let seconds = rates.len();
        let board = Arc::new(Board::new(seconds, self.deadline));
        let in_flight: Arc<[AtomicUsize]> = (0..TASKS).map(|_| AtomicUsize::new(0)).collect();
        let mut tasks = JoinSet::new();
        let senders = (0..TASKS).map(|number| {
            // As far as a task may be behind.
            let ticks = self.patience.as_millis() as usize + 1;
            let (sender, receiver) = mpsc::channel(ticks);
            let task = Task {
                client: self.client.clone(),
                items: self.items.clone(),
                wanted: self.wanted,
                patience: self.patience,
                board: board.clone(),
                in_flight: in_flight.clone(),
                number,
                random: fastrand::Rng::new(),
            };
            tasks.spawn(task.run(receiver));
            sender
        });
        let senders: Vec<_> = senders.collect();
        let start = Instant::now() + Duration::from_millis(20);
        let generator = std::thread::Builder::new().name("generator".to_owned());
        let told = board.clone();
        let generator = generator.spawn(move || generate(start, &rates, &senders, &told));
        let generator = generator.expect("a thread can be started");

        let known_after = self.deadline + GRACE;
        let watching = async {
            let mut before = Usage::read(&self.servers);
            for second in 0..seconds {
                let ends = start + Duration::from_secs(second as u64 + 1);
                while Instant::now() < ends {
                    let has = |task: &AtomicUsize| task.load(Ordering::Relaxed);
                    let in_flight = in_flight.iter().map(has).sum();
                    board.levels(second, in_flight, cpu::memory());
                    sleep_until(ends.min(Instant::now() + 20 * TICK)).await;
                }
                let now = Usage::read(&self.servers);
                let used = before.zip(now).map(|(before, now)| now - before);
                board.used(second, used);
                before = now;
            }
        };
        let telling = async {
            for second in 0..seconds {
                let ends = start + Duration::from_secs(second as u64 + 1);
                sleep_until(ends + known_after).await;
                tell(second, &board.second(second));
            }
        };
        tokio::join!(watching, telling);
        generator.join().expect("it does not panic");
        // A request that does not end in time does not end the run; it is seen as missing.
        let last = Instant::now() + GRACE;
        while let Ok(Some(ended)) = timeout_at(last, tasks.join_next()).await {
            ended.expect("no task panics");
        }
        (0..seconds).map(|second| board.second(second)).collect()
    }
}

/// Says what is due, and counts how late it is said.
fn generate(start: Instant, rates: &[u64], tasks: &[mpsc::Sender<Due>], board: &Board) {
    let mut owed = 0;
    let mut turn = 0;
    for (second, rate) in rates.iter().enumerate() {
        for tick in 0..TICKS_PER_SECOND {
            owed += rate;
            let count = owed / TICKS_PER_SECOND;
            owed %= TICKS_PER_SECOND;
            let at = start + Duration::from_secs(second as u64) + TICK * tick as u32;
            wait_until(at);
            let lag = at.elapsed();
            let (each, more) = (count / TASKS as u64, (count % TASKS as u64) as usize);
            let mut refused = 0;
            for place in 0..TASKS {
                let count = each + u64::from(place < more);
                let task = &tasks[(turn + place) % TASKS];
                let due = Due { at, second, count };
                if count > 0 && task.try_send(due).is_err() {
                    refused += count;
                }
            }
            turn = (turn + more) % TASKS;
            board.offered(second, count, lag, refused);
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "on a thread of its own; tokio's timers are a millisecond coarse"
)]
fn wait_until(due: Instant) {
    let ahead = due.saturating_duration_since(Instant::now());
    if !ahead.is_zero() {
        std::thread::sleep(ahead);
    }
}

/// One of the service's.
struct Task {
    client: Client,
    items: Arc<[Item]>,
    wanted: Wanted,
    patience: Duration,
    board: Arc<Board>,
    /// What each of them has.
    in_flight: Arc<[AtomicUsize]>,
    number: usize,
    random: fastrand::Rng,
}

impl Task {
    async fn run(mut self, due: mpsc::Receiver<Due>) {
        let mut due = pin!(due);
        let mut requests = FuturesUnordered::new();
        let mut ended: Vec<Ended> = Vec::with_capacity(TOLD_TOGETHER);
        let mut closed = false;
        while !(closed && requests.is_empty()) {
            // Who has an answer goes first, so that nothing new begins before all that has begun is under way.
            tokio::select! {
                biased;
                Some(end) = requests.next(), if !requests.is_empty() => {
                    ended.push(end);
                    if ended.len() < TOLD_TOGETHER && !requests.is_empty() {
                        continue;
                    }
                }
                came = due.recv(), if !closed => match came {
                    Some(due) => requests.extend(self.begin(&due, &mut ended)),
                    None => closed = true,
                },
            }
            self.in_flight[self.number].store(requests.len(), Ordering::Relaxed);
            self.board.record(&ended);
            ended.clear();
        }
    }

    fn begin(
        &mut self,
        due: &Due,
        ended: &mut Vec<Ended>,
    ) -> Vec<impl Future<Output = Ended> + Send + use<>> {
        let &Due { at, second, count } = due;
        let latency = at.elapsed();
        if latency > self.patience {
            let refused = Ended {
                second,
                latency,
                ending: Ending::Refused,
            };
            ended.extend((0..count).map(|_| refused));
            return Vec::new();
        }
        let request = |_| {
            let client = self.client.clone();
            let number = match self.wanted {
                Wanted::Any => self.random.usize(..KEYS),
                Wanted::One => 0,
            };
            let is_get = self.random.u32(..100) < GETS_PERCENT;
            let items = self.items.clone();
            async move {
                let ending = ask(&client, &items[number], is_get).await;
                let latency = at.elapsed();
                Ended {
                    second,
                    latency,
                    ending,
                }
            }
        };
        (0..count).map(request).collect()
    }
}

async fn ask(client: &Client, item: &Item, is_get: bool) -> Ending {
    let store = || client.set(&item.key, item.value.clone(), TTL);
    if !is_get {
        return match store().await {
            Ok(()) => Ending::Right,
            Err(error) => Ending::Failed(error.kind()),
        };
    }
    match client.get(&item.key).await {
        Ok(Some(value)) if value == *item.value => Ending::Right,
        Ok(Some(_)) => Ending::Wrong,
        Ok(None) => {
            // As a service would, with what it then had from its database. The next miss is another occasion.
            let _ = store().await;
            Ending::Miss
        }
        Err(error) => Ending::Failed(error.kind()),
    }
}
