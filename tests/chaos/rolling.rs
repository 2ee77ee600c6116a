//! All nodes, one after the other: restarted, or replaced by others. 2,000 requests a second, most of which read
//! through, and nobody gets an error.

use std::collections::{BTreeMap, HashMap};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::{JoinSet, block_in_place};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tower_memcached::testing::Memcached;
use tower_memcached::{Client, Error, LoadGuard, LoadLimits, ReadThroughSettings, Ttl};

use crate::support::lateness::{EXCUSES_AN_ERROR, Watch};
use crate::support::{addresses, alone, eventually, memcacheds, until_closed, until_open};

const KEYS: u64 = 2_000;
const PER_SECOND: u32 = 2_000;
/// For how long a node is down, and how long all is well between two.
const DOWN: Duration = Duration::from_secs(1);
const BETWEEN: Duration = Duration::from_secs(2);
/// How often a run is made in which calls failed when the machine, as measured, did too little for it to say anything.
const RUNS: u32 = 3;

/// What came of a call that failed.
#[derive(Debug)]
struct Failure {
    what: &'static str,
    kind: String,
    error: String,
    began: Instant,
    ended: Instant,
}

#[derive(Default)]
struct Seen {
    calls: AtomicU64,
    loads: Mutex<HashMap<u64, u32>>,
    failures: Mutex<Vec<Failure>>,
    wrong: Mutex<Vec<String>>,
}

impl Seen {
    fn note<T>(&self, what: &'static str, began: Instant, outcome: Result<T, Error>) -> Option<T> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        match outcome {
            Ok(value) => Some(value),
            Err(error) => {
                self.failures.lock().unwrap().push(Failure {
                    what,
                    kind: format!("{:?}", error.kind()),
                    error: error.to_string(),
                    began,
                    ended: Instant::now(),
                });
                None
            }
        }
    }

    fn expect(&self, key: &str, value: Option<&[u8]>, expected: &str) {
        if value != Some(expected.as_bytes()) {
            let value = value.map(String::from_utf8_lossy);
            let wrong = format!("{key}: {value:?} for {expected}");
            self.wrong.lock().unwrap().push(wrong);
        }
    }
}

/// One call: nine of ten read through, the others are plain gets and sets.
async fn call(client: Client, seen: Arc<Seen>, number: u64) {
    let (began, key) = (Instant::now(), fastrand(number) % KEYS);
    if number.is_multiple_of(20) {
        let name = format!("plain:{key}");
        let set = client
            .set(&name, format!("of {name}"), Ttl::secs(300))
            .await;
        seen.note("set", began, set);
        return;
    }
    if number % 20 == 10 {
        let name = format!("plain:{key}");
        let got = seen.note("get", began, client.get(&name).await);
        if let Some(Some(value)) = got {
            seen.expect(&name, Some(&value), &format!("of {name}"));
        }
        return;
    }
    read_through(&client, &seen, key).await;
}

async fn read_through(client: &Client, seen: &Seen, key: u64) {
    let began = Instant::now();
    let name = format!("loaded:{key}");
    let load = || async {
        *seen.loads.lock().unwrap().entry(key).or_default() += 1;
        // A database in the same rack.
        sleep(Duration::from_millis(2)).await;
        Ok::<_, std::io::Error>(Some(format!("of {name}")))
    };
    let got = client.get_or_load(&name, Ttl::secs(300), load).await;
    let got = seen.note("get_or_load", began, got);
    if let Some(value) = got {
        let value = value.as_ref().map(|value| &value[..]);
        seen.expect(&name, value, &format!("of {name}"));
    }
}

/// The same for each number, and all over the place.
fn fastrand(number: u64) -> u64 {
    (number.wrapping_add(1)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20
}

/// Runs the load while `change` is made; calls begin when they are due, whatever has become of those before.
async fn under_load(client: &Client, change: impl Future<Output = ()>) -> Arc<Seen> {
    let (seen, over) = (Arc::new(Seen::default()), Arc::new(AtomicBool::new(false)));
    // An empty cache under full load is another test's.
    for key in 0..KEYS {
        read_through(client, &seen, key).await;
    }
    let load = tokio::spawn({
        let (client, seen, over) = (client.clone(), seen.clone(), over.clone());
        async move {
            let (mut calls, mut number) = (JoinSet::new(), 0);
            let mut tick = interval(Duration::from_secs(1) / PER_SECOND);
            tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
            while !over.load(Ordering::Relaxed) {
                tick.tick().await;
                calls.spawn(call(client.clone(), seen.clone(), number));
                number += 1;
                while let Some(done) = calls.try_join_next() {
                    done.unwrap();
                }
            }
            while let Some(done) = calls.join_next().await {
                done.unwrap();
            }
        }
    });
    sleep(BETWEEN).await;
    change.await;
    over.store(true, Ordering::Relaxed);
    load.await.unwrap();
    seen
}

/// Runs a scenario and judges it: nothing wrong, no failure, and on average each value loaded `most_loads` times at most.
fn judged(name: &str, most_loads: u64, scenario: impl AsyncFn() -> Arc<Seen>) {
    for run in 1..=RUNS {
        let began = Instant::now();
        let (seen, stalls) = alone(async {
            let watch = Watch::start();
            let seen = scenario().await;
            (seen, watch.end())
        });
        let ended = Instant::now();
        let wrong = seen.wrong.lock().unwrap();
        assert!(
            wrong.is_empty(),
            "{name}: {} wrong, {:?}",
            wrong.len(),
            &wrong[0]
        );
        let calls = seen.calls.load(Ordering::Relaxed);
        let loads: u64 = seen
            .loads
            .lock()
            .unwrap()
            .values()
            .copied()
            .map(u64::from)
            .sum();
        let most = seen.loads.lock().unwrap().values().copied().max();
        let failures = seen.failures.lock().unwrap();
        println!(
            "{name}: {calls} calls, {} failures, {loads} loads of {KEYS} values, of one at most {most:?}",
            failures.len()
        );
        assert!(
            loads <= most_loads * KEYS,
            "{name}: {loads} loads of {KEYS} values"
        );
        if failures.is_empty() {
            return;
        }
        // Of each kind the first.
        let mut kinds = BTreeMap::new();
        for failure in failures.iter() {
            let kind = (failure.what, failure.kind.clone());
            let (count, _) = kinds.entry(kind).or_insert((0, failure));
            *count += 1;
        }
        for ((what, kind), (count, first)) in kinds {
            let after = first.began - began;
            println!(
                "  {count} {what}: {kind}, first after {after:?}: {}",
                first.error
            );
        }
        let excused =
            |failure: &&Failure| stalls.within(failure.began, failure.ended) >= EXCUSES_AN_ERROR;
        let excused = failures.iter().filter(excused).count();
        let stood_still = stalls.within(began, ended) > (ended - began) / 50;
        assert!(
            run < RUNS && (excused > 0 || stood_still),
            "{name}: of {calls} calls {} failed, {excused} because the machine stood still",
            failures.len(),
        );
    }
}

/// A client that a busy machine does not make give up.
fn client(nodes: &[Memcached]) -> Client {
    let limits = LoadLimits::default().max_wait(Duration::from_secs(5));
    let reads = ReadThroughSettings::default()
        .guard(LoadGuard::new("database", limits).unwrap())
        .load_timeout(Duration::from_secs(5));
    Client::builder()
        .nodes(addresses(nodes))
        .timeout(Duration::from_secs(1))
        .attempt_timeout(Duration::from_millis(200))
        .read_through(reads)
        .build()
        .unwrap()
}

/// Asks it to end, as its service manager would, and waits until it has.
async fn terminate(node: &Memcached) {
    let mut kill = Command::new("kill");
    let ended = block_in_place(|| kill.arg(node.pid().to_string()).status());
    assert!(ended.unwrap().success());
    let address = node.address();
    eventually("it ends", || {
        std::net::TcpStream::connect(&address).is_err()
    })
    .await;
}

/// Each node's keys are loaded again twice: where they go meanwhile, and by the node that is back and empty.
const LOADS_OF_RESTARTS: u64 = 4;

fn rolling_restart(name: &str, stop: impl AsyncFn(&mut Memcached)) {
    judged(name, LOADS_OF_RESTARTS, async || {
        let mut nodes = memcacheds(3);
        let client = client(&nodes);
        let restarting = &client;
        under_load(&client, async {
            for (index, node) in nodes.iter_mut().enumerate() {
                stop(node).await;
                sleep(DOWN).await;
                until_open(restarting, index).await;
                block_in_place(|| node.restart().unwrap());
                until_closed(restarting, index).await;
                sleep(BETWEEN).await;
            }
        })
        .await
    });
}

#[test]
fn no_caller_sees_an_error_of_a_rolling_restart() {
    rolling_restart("SIGTERM", async |node| terminate(node).await);
}

#[test]
fn no_caller_sees_an_error_when_node_after_node_is_killed_and_restarted() {
    rolling_restart("SIGKILL", async |node| {
        block_in_place(|| node.kill().unwrap());
    });
}

#[test]
fn no_caller_sees_an_error_when_every_node_is_replaced_one_by_one() {
    // All are loaded at first, and as many once more as move: each node's keys, and of the others' a few.
    judged("set_nodes", 4, async || {
        let mut nodes = memcacheds(3);
        let client = client(&nodes);
        under_load(&client, async {
            for index in 0..3 {
                let fresh = block_in_place(|| Memcached::spawn(&[]).unwrap());
                let old = std::mem::replace(&mut nodes[index], fresh);
                client.set_nodes(addresses(&nodes)).unwrap();
                let address = old.address();
                assert!(client.nodes().iter().all(|node| *node.node != *address));
                // What is under way there has an attempt's time to end.
                sleep(DOWN).await;
                assert_eq!(block_in_place(|| connections(&old)), 1, "but for ours");
                block_in_place(|| drop(old));
                sleep(BETWEEN).await;
            }
        })
        .await
    });
}

/// How many connections it has, with the one that asks.
fn connections(node: &Memcached) -> u32 {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(node.address()).unwrap();
    stream.write_all(b"stats\r\n").unwrap();
    let mut stats = Vec::new();
    while !stats.ends_with(b"END\r\n") {
        let mut some = [0; 4096];
        let read = stream.read(&mut some).unwrap();
        stats.extend_from_slice(&some[..read]);
    }
    let stats = String::from_utf8(stats).unwrap();
    let count = stats
        .lines()
        .find_map(|line| line.strip_prefix("STAT curr_connections "));
    count.unwrap().trim().parse().unwrap()
}
