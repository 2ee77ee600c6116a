//! What reads that hit notice of a loader whose threads are all blocked, or of another functional group that
//! is at its limit: nothing, or their 99th percentile would tell. One client against a real memcached, in
//! one run, with and without that in turn, so that what the machine does besides is the same for both.
//!
//! `cargo bench --all-features --bench isolation` prints both distributions and the ratio of their 99th
//! percentiles, and fails if it is over 1.2.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::runtime::Builder;
use tokio::time::{Instant, sleep};
use tower_memcached::testing::Memcached;
use tower_memcached::{
    BlockingLoader, BoxedService, Client, Executor, GroupSettings, Key, Loader, Payload,
    ReadThroughLayer, Ttl,
};

const THREADS: usize = 2;
const CALLERS: usize = 8;
const ROUNDS: usize = 20;
const ROUND: Duration = Duration::from_millis(250);
const KEYS: usize = 1_000;
const LIMIT: f64 = 1.2;

/// A database that blocks whoever asks while it is shut.
#[derive(Clone, Default)]
struct Database {
    shut: Arc<(Mutex<bool>, Condvar)>,
    asking: Arc<AtomicUsize>,
}

impl Database {
    fn set(&self, shut: bool) {
        *self.shut.0.lock().unwrap() = shut;
        self.shut.1.notify_all();
    }

    fn ask(&self) -> Option<Payload> {
        self.asking.fetch_add(1, Ordering::SeqCst);
        let shut = self.shut.0.lock().unwrap();
        drop(self.shut.1.wait_while(shut, |shut| *shut).unwrap());
        self.asking.fetch_sub(1, Ordering::SeqCst);
        Some("loaded".into())
    }

    async fn until_asked_by(&self, threads: usize) {
        while self.asking.load(Ordering::SeqCst) != threads {
            sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Loader for Database {
    async fn load(&self, _: &Key) -> Result<Option<Payload>, tower::BoxError> {
        Ok(self.ask())
    }
}

/// Reads that hit, for one round.
async fn read(client: &Client<BoxedService>, latencies: &mut Histogram<u64>) {
    let ends = Instant::now() + ROUND;
    let callers = (0..CALLERS).map(|caller| {
        let client = client.clone();
        tokio::spawn(async move {
            let (mut latencies, mut n) = (Vec::new(), caller);
            while Instant::now() < ends {
                n = (n + 7) % KEYS;
                let asked = Instant::now();
                let value = client.get(format!("k{n}")).await.unwrap();
                assert_eq!(value.unwrap(), "cached");
                latencies.push(asked.elapsed());
            }
            latencies
        })
    });
    for caller in callers.collect::<Vec<_>>() {
        for latency in caller.await.unwrap() {
            latencies.record(latency.as_nanos() as u64).unwrap();
        }
    }
}

/// The ratio of the 99th percentiles, with all threads blocked and with all free.
async fn compare(name: &str, database: &Database, client: Client<BoxedService>) -> f64 {
    for n in 0..KEYS {
        client
            .set(format!("k{n}"), "cached", Ttl::NEVER)
            .await
            .unwrap();
    }
    let [mut free, mut blocked] = [(); 2].map(|()| Histogram::new(3).unwrap());
    read(&client, &mut Histogram::new(3).unwrap()).await;
    for round in 0..ROUNDS {
        read(&client, &mut free).await;
        database.set(true);
        let misses = (0..THREADS * 2).map(|n| {
            let (client, key) = (client.clone(), format!("miss:{name}:{round}:{n}"));
            tokio::spawn(async move { client.get(key).await })
        });
        let misses: Vec<_> = misses.collect();
        database.until_asked_by(THREADS).await;
        read(&client, &mut blocked).await;
        database.set(false);
        for miss in misses {
            assert_eq!(miss.await.unwrap().unwrap().unwrap(), "loaded");
        }
        database.until_asked_by(0).await;
    }
    ratio(name, &free, &blocked)
}

/// The same for the reads of one group, with another group at its limit and without.
async fn compare_groups(client: Client) -> f64 {
    let reads = client.group("reads").unwrap().boxed();
    for n in 0..KEYS {
        let key = format!("k{n}");
        reads.set(key, "cached", Ttl::NEVER).await.unwrap();
    }
    let [mut free, mut beside] = [(); 2].map(|()| Histogram::new(3).unwrap());
    read(&reads, &mut Histogram::new(3).unwrap()).await;
    let shed = Arc::new(AtomicUsize::new(0));
    for _ in 0..ROUNDS {
        read(&reads, &mut free).await;
        let floods = (0..CALLERS).map(|_| {
            let (flood, shed) = (client.group("flood").unwrap(), shed.clone());
            tokio::spawn(async move {
                loop {
                    if flood
                        .get("k")
                        .await
                        .is_err_and(|error| error.is_overloaded())
                    {
                        shed.fetch_add(1, Ordering::Relaxed);
                    }
                    sleep(Duration::from_millis(1)).await;
                }
            })
        });
        let floods: Vec<_> = floods.collect();
        read(&reads, &mut beside).await;
        floods.iter().for_each(|flood| flood.abort());
    }
    let shed = shed.load(Ordering::Relaxed);
    println!("of the group that floods {shed} requests were shed");
    assert!(shed > 0, "it was not at its limit");
    ratio("groups", &free, &beside)
}

fn ratio(name: &str, free: &Histogram<u64>, blocked: &Histogram<u64>) -> f64 {
    let ratio = blocked.value_at_quantile(0.99) as f64 / free.value_at_quantile(0.99) as f64;
    println!("{name}: 99th percentile {ratio:.2} times that of the undisturbed");
    for (threads, latencies) in [("free", free), ("blocked", blocked)] {
        let at = |quantile| Duration::from_nanos(latencies.value_at_quantile(quantile));
        let (p50, p99, p999) = (at(0.5), at(0.99), at(0.999));
        let reads = latencies.len();
        println!("  {threads:8} {reads} reads, p50 {p50:?}, p99 {p99:?}, p99.9 {p999:?}");
    }
    ratio
}

fn main() {
    let memcached = Memcached::spawn(&["-t", "1"]).unwrap();
    let build = || {
        Client::builder()
            .nodes([memcached.address()])
            // Latency is measured here, not time-outs.
            .timeout(Duration::from_secs(10))
            .attempt_timeout(Duration::from_secs(2))
    };
    let application = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    let application = application.unwrap();
    let database = Database::default();

    let shared = ReadThroughLayer::new(database.clone(), Ttl::secs(60));
    let shared = shared.timeout(Duration::from_secs(5)).unwrap();
    let shared = shared
        .executor(&Executor::dedicated("loads", THREADS))
        .unwrap();
    let shared = build().layer(shared).build().unwrap().boxed();
    let shared = application.block_on(compare("executor", &database, shared));

    let asked = database.clone();
    let blocking = BlockingLoader::new("blocking", THREADS, move |_: &Key| {
        Ok::<_, std::io::Error>(asked.ask())
    });
    let blocking = ReadThroughLayer::new(blocking.unwrap(), Ttl::secs(60));
    let blocking = blocking.timeout(Duration::from_secs(5)).unwrap();
    let blocking = build().layer(blocking).build().unwrap().boxed();
    let blocking = application.block_on(compare("blocking", &database, blocking));

    let flood = GroupSettings::default().prefix("flood:").rate(1_000);
    let reads = GroupSettings::default().prefix("reads:");
    let groups = build().group("flood", flood).group("reads", reads);
    let groups = application.block_on(compare_groups(groups.build().unwrap()));

    assert!(
        shared <= LIMIT && blocking <= LIMIT && groups <= LIMIT,
        "over {LIMIT}: reads that hit notice the others"
    );
}
