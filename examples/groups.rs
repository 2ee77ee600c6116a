//! Functional groups: three parts of a service share a cache and cannot take it from each other.
//!
//! A crawler floods one group, then another one's node hangs, and each time the others are watched.
//! Then limits are changed and a kill switch is thrown, all while requests are under way. It takes
//! ten seconds and needs nothing installed:
//!
//! ```text
//! cargo run --release --features testing,serde --example groups
//! ```
//!
//! The exit code says whether a group that should not have noticed had an error.

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tower_memcached::testing::Server;
use tower_memcached::{Client, Config, OnFailure, Ttl};

/// What would be in the service's own file.
fn config(addresses: &[String], catalogue_rate: u32) -> Result<Config, Box<dyn Error>> {
    let [a, b, own] = addresses else {
        return Err("three nodes".into());
    };
    Ok(toml::from_str(&format!(
        r#"
        nodes = ["{a}", "{b}"]
        timeout = "1s"
        attempt_timeout = "400ms"

        [databases.items]
        max_concurrent = 8
        max_queue = 16

        # Needed by every request.
        [groups.sessions]
        prefix = "session:"
        max_in_flight = 1000

        # Read through, and what a crawler would flood.
        [groups.catalogue]
        prefix = "item:"
        max_in_flight = 32
        rate = {catalogue_rate}
        read_through = {{ database = "items" }}

        # Which messages were seen before: on a node of its own, and better not known than late.
        [groups.dedupe]
        prefix = "seen:"
        timeout = "50ms"
        failure_mode = "cancel"
        nodes = ["{own}"]
        "#
    ))?)
}

const SESSIONS: usize = 0;
const CATALOGUE: usize = 1;
const DEDUPE: usize = 2;
const NAMES: [&str; 3] = ["sessions", "catalogue", "dedupe"];

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let servers = [Server::new(), Server::new(), Server::new()];
    let mut addresses = Vec::new();
    for server in &servers {
        addresses.push(server.listen().await?.to_string());
    }
    let client = Client::builder()
        .config(config(&addresses, 2_000)?)
        .build()?;
    let mut watch = Watch::new(&client);

    let users = users(&client, &watch.tallies)?;
    sleep(Duration::from_millis(500)).await;
    watch.discard();
    let quiet = watch
        .seconds(2, "as usual", &[SESSIONS, CATALOGUE, DEDUPE])
        .await;

    let crawler = crawler(&client)?;
    let flooded = watch
        .seconds(3, "a crawler floods the catalogue", &[SESSIONS, DEDUPE])
        .await;
    client.reconfigure(config(&addresses, 500)?)?;
    watch
        .seconds(1, "the catalogue's rate is 500 now", &[SESSIONS, DEDUPE])
        .await;
    client.reconfigure(config(&addresses, 2_000)?)?;
    drop(crawler);
    sleep(Duration::from_millis(200)).await;
    watch.discard();

    servers[2].stall();
    let stalled = watch
        .seconds(2, "the node of dedupe hangs", &[SESSIONS, CATALOGUE])
        .await;
    servers[2].resume();

    let catalogue = client.group("catalogue")?;
    if let Some(switch) = catalogue.kill_switch() {
        switch.throw();
        watch
            .seconds(1, "the catalogue's kill switch is thrown", &[SESSIONS])
            .await;
        switch.reset();
        watch.seconds(1, "and reset", &[SESSIONS]).await;
    }

    for (what, beside) in [("flood", flooded), ("outage", stalled)] {
        let ratio = beside.as_secs_f64() / quiet.as_secs_f64();
        println!("p99 of sessions beside the {what}: {ratio:.2} x as usual (1.2 x is the aim)");
    }
    drop(users);
    println!(
        "shutdown: {}",
        client.shutdown(Duration::from_secs(1)).await
    );
    println!(
        "errors of groups that should not have noticed: {}",
        watch.noticed
    );
    Ok(match watch.noticed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

type Tallies = [Arc<Tally>; 3];

/// The service's requests. They end when this is dropped.
fn users(client: &Client, tallies: &Tallies) -> Result<JoinSet<()>, Box<dyn Error>> {
    let mut users = JoinSet::new();
    for user in 0..16 {
        let sessions = client.group("sessions")?;
        let tally = tallies[SESSIONS].clone();
        users.spawn(async move {
            let key = user.to_string();
            loop {
                tally
                    .record(sessions.set(&key, "a session", Ttl::secs(600)))
                    .await;
                tally.record(sessions.get(&key)).await;
                sleep(Duration::from_millis(4)).await;
            }
        });
        let catalogue = client.group("catalogue")?;
        let tally = tallies[CATALOGUE].clone();
        users.spawn(async move {
            for item in (0..50).cycle() {
                let key = item.to_string();
                tally
                    .record(catalogue.get_or_load(&key, Ttl::secs(600), load))
                    .await;
                sleep(Duration::from_millis(20)).await;
            }
        });
        let dedupe = client.group("dedupe")?;
        let tally = tallies[DEDUPE].clone();
        users.spawn(async move {
            for message in 0_u64.. {
                let key = format!("{user}-{message}");
                let claim = async {
                    // Rather twice than not at all.
                    let claim = dedupe.claim(&key, Ttl::secs(600), OnFailure::Allow).await?;
                    claim.error().map_or(Ok(()), |error| Err(error.clone()))
                };
                tally.record(claim).await;
                sleep(Duration::from_millis(8)).await;
            }
        });
    }
    Ok(users)
}

/// Asks for what nobody has, several times as often as the group may.
fn crawler(client: &Client) -> Result<JoinSet<()>, Box<dyn Error>> {
    let mut crawler = JoinSet::new();
    let next = Arc::new(AtomicU64::new(1_000));
    for _ in 0..32 {
        let (catalogue, next) = (client.group("catalogue")?, next.clone());
        crawler.spawn(async move {
            loop {
                let key = next.fetch_add(1, Ordering::Relaxed).to_string();
                // It does not care what becomes of it.
                let _ = catalogue.get_or_load(&key, Ttl::secs(600), load).await;
                sleep(Duration::from_millis(5)).await;
            }
        });
    }
    Ok(crawler)
}

/// The database.
async fn load() -> std::io::Result<Option<&'static str>> {
    sleep(Duration::from_millis(5)).await;
    Ok(Some("an item"))
}

/// What became of a group's requests.
#[derive(Default)]
struct Tally(Mutex<Outcomes>);

#[derive(Default)]
struct Outcomes {
    took: Vec<Duration>,
    /// Refused, by the group's limits or the database's.
    shed: u64,
    errors: u64,
}

impl Tally {
    async fn record<T>(&self, request: impl Future<Output = tower_memcached::Result<T>>) {
        let asked = Instant::now();
        let outcome = request.await;
        let mut tally = self.0.lock().unwrap();
        match outcome {
            Ok(_) => tally.took.push(asked.elapsed()),
            Err(error) if error.is_overloaded() => tally.shed += 1,
            Err(_) => tally.errors += 1,
        }
    }

    fn take(&self) -> Outcomes {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl Outcomes {
    fn quantile(&mut self, share: f64) -> Duration {
        self.took.sort_unstable();
        let place = (self.took.len() as f64 * share) as usize;
        let last = self.took.len().saturating_sub(1);
        self.took.get(place.min(last)).copied().unwrap_or_default()
    }
}

/// Looks at all groups once a second.
struct Watch {
    client: Client,
    tallies: Tallies,
    loads: u64,
    /// Requests that were refused or failed although they should not have noticed.
    noticed: u64,
}

impl Watch {
    fn new(client: &Client) -> Self {
        println!("each second: p50/p99 in milliseconds, then what was shed and what failed");
        Self {
            client: client.clone(),
            tallies: Default::default(),
            loads: 0,
            noticed: 0,
        }
    }

    fn discard(&self) {
        for tally in &self.tallies {
            tally.take();
        }
    }

    /// Watches for so long, and says what 99 % of the sessions' requests took at most.
    async fn seconds(&mut self, count: u32, what: &str, unaffected: &[usize]) -> Duration {
        println!("-- {what}");
        let mut sessions = Outcomes::default();
        for _ in 0..count {
            sleep(Duration::from_secs(1)).await;
            for (place, tally) in self.tallies.iter().enumerate() {
                let mut outcomes = tally.take();
                let [p50, p99] = [0.5, 0.99].map(|share| outcomes.quantile(share));
                let [p50, p99] = [p50, p99].map(|took| took.as_secs_f64() * 1_000.0);
                let Outcomes { took, shed, errors } = outcomes;
                print!("{} {p50:.2}/{p99:.2} {shed} {errors} | ", NAMES[place]);
                if unaffected.contains(&place) {
                    self.noticed += shed + errors;
                }
                if place == SESSIONS {
                    sessions.took.extend(took);
                }
            }
            let started = self
                .client
                .load_guard("items")
                .map_or(0, |guard| guard.status().started);
            println!("{} loads", started - self.loads);
            self.loads = started;
        }
        sessions.quantile(0.99)
    }
}
