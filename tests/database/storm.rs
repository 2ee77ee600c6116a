//! The storm: 2,000 requests a second, and all cache nodes die. The database gets what it was said to bear and no
//! more, everybody else is told so in time, and when the nodes are back the hits come back within the same limits.
//! Counted, not timed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tower_memcached::testing::Memcached;
use tower_memcached::{
    Client, ErrorKind, Executor, LoadGuard, LoadLimits, ReadThroughSettings, Ttl,
};

use crate::support::{Database, LoadError, PATIENCE, on_each_database};

on_each_database!(the_database_sees_no_storm);

const REQUESTS_A_SECOND: usize = 2_000;
const KEYS: i64 = 600;
const RATE: usize = 150;
const BURST: usize = 15;
const CONCURRENT: usize = 6;
const LOAD_TIMEOUT: Duration = Duration::from_millis(500);

#[derive(Default)]
struct Answers {
    hits: AtomicUsize,
    loaded: AtomicUsize,
    shed: AtomicUsize,
    late: AtomicUsize,
    others: AtomicUsize,
}

impl Answers {
    /// How many there were since the last time: hits, and all.
    fn take(&self) -> (usize, usize) {
        let take = |count: &AtomicUsize| count.swap(0, Ordering::Relaxed);
        let hits = take(&self.hits);
        (hits, hits + take(&self.loaded) + take(&self.shed))
    }
}

async fn the_database_sees_no_storm(database: Database) {
    database.fill(KEYS).await;
    database.delay(Duration::from_millis(5));
    let mut nodes: Vec<_> = (0..3).map(|_| Memcached::spawn(&[]).unwrap()).collect();
    let limits = LoadLimits::default()
        .max_concurrent(CONCURRENT)
        .max_queue(100)
        .max_wait(Duration::from_millis(100))
        .rate(RATE as u32)
        .burst(BURST as u32);
    let guard = LoadGuard::new("items", limits).unwrap();
    let settings = ReadThroughSettings::default()
        .guard(guard.clone())
        .load_timeout(LOAD_TIMEOUT);
    let client = Client::builder()
        .nodes(nodes.iter().map(Memcached::address))
        .executor(Executor::dedicated("memcached-io", 1))
        .read_through(settings)
        .build()
        .unwrap();
    let answers = Arc::new(Answers::default());

    let load = tokio::spawn(requests(client.clone(), database.clone(), answers.clone()));
    until_hits(&answers, 95, "the cache warms up").await;

    for node in &mut nodes {
        node.kill().unwrap();
    }
    let loads = guard.status().started;
    sleep(Duration::from_secs(4)).await;
    answers.take();
    sleep(Duration::from_secs(2)).await;
    let (hits, all) = answers.take();
    // Some get what another caller loads.
    assert!(hits < all / 2, "{hits} of {all}, and there is no cache");
    assert!(guard.status().started > loads, "the database is used");
    let shed = guard.status().shed;
    assert!(shed.queue_full + shed.waited + shed.rate > 0);
    assert_eq!(shed.throttled, 0, "the database is well");

    for node in &mut nodes {
        node.restart().unwrap();
    }
    until_hits(&answers, 95, "the cache is filled again").await;

    load.abort();
    let _ = load.await;
    let within = database.most_loads_within(Duration::from_secs(1));
    println!(
        "at most {within} loads in a second, {} at once, over {} connections; {:?}",
        database.most_loads_running(),
        database.most_connections_in_use(),
        guard.status(),
    );
    // A load starts a moment after its turn has come, so a busy machine can move one from one second to the next.
    assert!(within <= RATE + BURST + RATE / 10, "{within} in a second");
    assert!(within > RATE / 2, "the test has made no storm: {within}");
    assert!(database.most_loads_running() <= CONCURRENT);
    assert!(database.most_connections_in_use() <= CONCURRENT);
    assert_eq!(answers.others.load(Ordering::Relaxed), 0);
    let late = answers.late.load(Ordering::Relaxed);
    assert_eq!(late, 0, "{late} answers after their deadline");
}

/// 2,000 a second, whatever becomes of those before; fewer where the machine cannot do as many, for what is owed to them
/// afterwards, all at once, would only wait for each other.
async fn requests(client: Client, database: Database, answers: Arc<Answers>) {
    const TICK: Duration = Duration::from_millis(5);
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut requests = JoinSet::new();
    loop {
        ticks.tick().await;
        for _ in 0..REQUESTS_A_SECOND / 200 {
            let (client, database) = (client.clone(), database.clone());
            requests.spawn(request(client, database, answers.clone()));
        }
        while let Some(ended) = requests.try_join_next() {
            ended.unwrap();
        }
    }
}

async fn request(client: Client, database: Database, answers: Arc<Answers>) {
    let id = fastrand::i64(1..=KEYS);
    let begun = Instant::now();
    let mut loads = false;
    let loader = || {
        loads = true;
        async {
            let loaded = database.load(id).await?;
            Ok::<_, LoadError>(loaded.map(|item| item.encode()))
        }
    };
    let read = client
        .get_or_load(format!("item:{id}"), Ttl::secs(600), loader)
        .await;
    let count = match read {
        Ok(Some(_)) if loads => &answers.loaded,
        Ok(Some(_)) => &answers.hits,
        Err(error) if error.kind() == ErrorKind::LoadShed => &answers.shed,
        // It waited for another's load, or its own, for all of its time: a busy machine.
        Err(error) if error.kind() == ErrorKind::Load => &answers.shed,
        other => {
            eprintln!("{other:?}");
            &answers.others
        }
    };
    count.fetch_add(1, Ordering::Relaxed);
    // The operation's time, the load's, and patience with a busy machine.
    if begun.elapsed() > LOAD_TIMEOUT + Duration::from_secs(2) {
        answers.late.fetch_add(1, Ordering::Relaxed);
    }
}

/// Waits until so many of a hundred requests are hits.
async fn until_hits(answers: &Answers, percent: usize, what: &str) {
    let until = Instant::now() + PATIENCE * 2;
    answers.take();
    loop {
        sleep(Duration::from_millis(500)).await;
        let (hits, all) = answers.take();
        if all > 0 && hits * 100 >= all * percent {
            return;
        }
        assert!(Instant::now() < until, "never: {what}; {hits} of {all}");
    }
}
