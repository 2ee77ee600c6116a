//! The storm: an open-loop load over HTTP, and a cache that dies in the middle of it.
//!
//! Requests come when they are due, whether or not those before them have been answered, as those
//! of many users do. What is late counts from when it was due.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::cache::Cache;
use crate::http::Connection;
use crate::options::Storm;
use crate::report;
use crate::service::{OUTCOME, Outcome};
use crate::store::Store;
use crate::tally::Tally;

/// The most connections to the service: what a proxy in front of it would have. While all are in
/// use, requests wait.
const CONNECTIONS: usize = 256;
/// How long a user waits.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);
pub(crate) const UPDATES_PERCENT: u32 = 2;

const SEED: u64 = 1;
const SECOND: Duration = Duration::from_secs(1);

/// The parts of the run, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    WarmUp,
    Healthy,
    Outage,
    After,
}

impl Phase {
    pub(crate) const ALL: [Self; 4] = [Self::WarmUp, Self::Healthy, Self::Outage, Self::After];

    fn seconds(self, storm: &Storm) -> u32 {
        match self {
            Self::WarmUp => storm.warm_up,
            Self::Healthy => storm.healthy,
            Self::Outage => storm.outage,
            Self::After => storm.after,
        }
    }
}

/// Runs it to its end, prints each second, and says what came of it.
pub(crate) async fn run(
    storm: &Storm,
    items: u32,
    service: SocketAddr,
    cache: &Cache,
    store: &Store,
) -> io::Result<String> {
    println!("{}", report::header());
    let start = Instant::now();
    let users = Arc::new(Users::of(service));
    // Dropped, it takes all of its requests with it.
    let mut load = JoinSet::new();
    load.spawn(users.clone().come(storm.rate, items, start));

    let (mut second, mut loads) = (0, store.loads());
    let mut phases = Vec::new();
    for phase in Phase::ALL {
        match phase {
            Phase::WarmUp | Phase::Healthy => {}
            Phase::Outage => cache.kill(),
            Phase::After => cache.restart()?,
        }
        let mut whole = Tally::new();
        for _ in 0..phase.seconds(storm) {
            second += 1;
            sleep_until(start + SECOND * second).await;
            let mut tally = std::mem::replace(&mut *users.tally(), Tally::new());
            let so_far = store.loads();
            tally.close(so_far - loads, store.connections().take_most());
            loads = so_far;
            println!("{}", report::row(second, phase, &tally));
            whole.add(&tally);
        }
        phases.push((phase, whole));
    }
    Ok(report::summary(&phases))
}

/// Those who ask the service.
struct Users {
    service: SocketAddr,
    places: Semaphore,
    /// Connections that are kept alive.
    idle: Mutex<Vec<Connection>>,
    tally: Mutex<Tally>,
}

impl Users {
    fn of(service: SocketAddr) -> Self {
        Self {
            service,
            places: Semaphore::new(CONNECTIONS),
            idle: Mutex::default(),
            tally: Mutex::new(Tally::new()),
        }
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends each request when it is due, without end. The same ones in every run.
    async fn come(self: Arc<Self>, rate: u32, items: u32, start: Instant) {
        let popularity = Popularity::of(items);
        let mut random = fastrand::Rng::with_seed(SEED);
        let mut requests = JoinSet::new();
        for number in 0.. {
            let due = start + Duration::from_nanos(number * 1_000_000_000 / u64::from(rate));
            sleep_until(due).await;
            let id = popularity.draw(&mut random);
            let updates = random.u32(..100) < UPDATES_PERCENT;
            requests.spawn(self.clone().request(id, updates, due));
            while requests.try_join_next().is_some() {}
        }
    }

    async fn request(self: Arc<Self>, id: u32, updates: bool, due: Instant) {
        self.tally().requests += 1;
        let outcome = match timeout_at(due + PATIENCE, self.ask(id, updates)).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => Outcome::Failed,
        };
        self.tally().record(outcome, due.elapsed());
    }

    async fn ask(&self, id: u32, updates: bool) -> io::Result<Outcome> {
        let _place = self.places.acquire().await.map_err(io::Error::other)?;
        let kept = self.idle().pop();
        let mut connection = match kept {
            Some(connection) => connection,
            None => Connection::open(self.service).await?,
        };
        let path = format!("/items/{id}");
        let answer = match updates {
            true => {
                let body = format!(r#"{{"name": "item {id}, renamed"}}"#);
                connection.ask("PUT", &path, &body).await?
            }
            false => connection.ask("GET", &path, "").await?,
        };
        self.idle().push(connection);
        let outcome = answer.header(OUTCOME.as_str()).and_then(Outcome::named);
        // Every item that is asked for is there.
        let outcome = outcome.filter(|outcome| answer.status == 200 || outcome.is_refusal());
        outcome.ok_or_else(|| io::Error::other(format!("an answer {}", answer.status)))
    }
}

/// Few items are asked for often, and most seldom: by Zipf's law the second half as often as the
/// first, the third a third.
struct Popularity {
    /// The shares of the items up to each, added up.
    shares: Vec<f64>,
}

impl Popularity {
    fn of(items: u32) -> Self {
        let shares = (1..=items).scan(0.0, |sum, rank| {
            *sum += 1.0 / f64::from(rank);
            Some(*sum)
        });
        Self {
            shares: shares.collect(),
        }
    }

    fn draw(&self, random: &mut fastrand::Rng) -> u32 {
        let whole = self.shares.last().copied().unwrap_or_default();
        let drawn = random.f64() * whole;
        let below = self.shares.partition_point(|share| *share <= drawn);
        // Rounding may lead past the last.
        below.min(self.shares.len() - 1) as u32 + 1
    }
}
