//! What callers may do, and what they must never see, while a real node is out.

use std::time::Duration;

use futures::future::join_all;
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, sleep};
use tower_memcached::{Client, FailureMode, Key, Outcome, Ttl};

use crate::support::calls::gets;
use crate::support::freezer::{self, Frozen, busiest_worker};
use crate::support::{
    PATIENCE, addresses, alone, client, eventually, keys_of, memcacheds, store_patiently,
    until_closed, until_open,
};

const MILLISECOND: Duration = Duration::from_millis(1);
const WAITERS: usize = 10_000;
/// Of the p99 with waiters to that without.
const RATIO: f64 = 1.5;
/// Below this, what a timer or the scheduler adds is all there is to see.
const NOISE: Duration = Duration::from_millis(3);
const ROUNDS: usize = 4;

/// 43 of FAULTS.
#[test]
fn ten_thousand_waiters_on_a_dead_node_do_not_slow_the_others() {
    alone(async {
        let mut nodes = memcacheds(3);
        let addresses = addresses(&nodes);
        let client = Client::builder()
            .nodes(&addresses)
            .failure_mode(FailureMode::Retry)
            .build()
            .unwrap();
        let waiting = client
            .clone()
            .with_timeout(Duration::from_secs(60))
            .unwrap();
        let (dead, well) = (keys_of(&addresses, 0, 100), keys_of(&addresses, 1, 100));
        for key in dead.iter().chain(&well) {
            store_patiently(&client, key, "v", Ttl::NEVER).await;
        }
        let measured = || gets(&client, &well, 2 * MILLISECOND, Duration::from_secs(2));
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            let healthy = measured().await;
            // It has no connection if nobody has asked it yet.
            store_patiently(&client, &dead[0], "v", Ttl::NEVER).await;
            nodes[0].kill().unwrap();
            until_open(&client, 0).await;
            let waiters = waiters(&waiting, &dead).await;
            sleep(Duration::from_secs(1)).await;
            let still = waiters.iter().filter(|waiter| !waiter.is_finished());
            assert_eq!(still.count(), WAITERS, "they do not wait");
            let beside = measured().await;
            for waiter in waiters {
                waiter.abort();
            }
            println!(
                "healthy: {}\n beside: {}",
                healthy.summary(),
                beside.summary()
            );
            assert_eq!(beside.hits, beside.count(), "{}", beside.summary());
            let of = |calls: &crate::support::calls::Calls| calls.percentile(99).max(NOISE);
            let ratio = of(&beside).as_secs_f64() / of(&healthy).as_secs_f64();
            best = best.min(ratio);
            if best <= RATIO {
                break;
            }
            nodes[0].restart().unwrap();
            until_closed(&client, 0).await;
        }
        println!("p99 beside {WAITERS} waiters: {best:.2} times that without");
        assert!(
            best <= RATIO,
            "{best:.2} times the p99 without waiters in the best of {ROUNDS} rounds"
        );
    });
}

/// All of the waiters, who come within a second.
async fn waiters(client: &Client, keys: &[Key]) -> Vec<JoinHandle<()>> {
    let mut waiters = Vec::new();
    let mut tick = interval(Duration::from_millis(10));
    while waiters.len() < WAITERS {
        tick.tick().await;
        waiters.extend(keys.iter().map(|key| {
            let (client, key) = (client.clone(), key.clone());
            tokio::spawn(async move {
                let _ = client.get(key).await;
            })
        }));
    }
    waiters
}

/// 43 of FAULTS, as it begins: all of them are under way when the node stops answering.
#[test]
fn ten_thousand_calls_under_way_when_a_node_stops_all_end_in_time() {
    alone(async {
        let nodes = memcacheds(3);
        let addresses = addresses(&nodes);
        let client = client(&addresses);
        let keys = keys_of(&addresses, 0, 100);
        for key in &keys {
            store_patiently(&client, key, "v", Ttl::NEVER).await;
        }
        // What a debug build on a small machine needs to begin and end so many.
        let healthy = longest_of_many(&client, &keys).await;
        nodes[0].stop().unwrap();
        let stopped = longest_of_many(&client, &keys).await;
        println!("longest of {WAITERS} calls at once: healthy {healthy:?}, stopped {stopped:?}");
        let allowed = Duration::from_millis(150) + 2 * healthy;
        assert!(stopped <= allowed, "a call took {stopped:?}");
        eventually("nothing is in flight", || {
            client.nodes().iter().all(|node| node.in_flight == 0)
        })
        .await;
    });
}

async fn longest_of_many(client: &Client, keys: &[Key]) -> Duration {
    let calls: Vec<_> = (0..WAITERS)
        .map(|number| {
            let (client, key) = (client.clone(), keys[number % keys.len()].clone());
            tokio::spawn(async move {
                let began = Instant::now();
                let _ = client.get(key).await;
                began.elapsed()
            })
        })
        .collect();
    let took = join_all(calls).await.into_iter().map(Result::unwrap);
    took.max().unwrap()
}

/// 49 of FAULTS.
#[test]
fn a_multi_get_with_a_dead_node_has_the_rest() {
    alone(async {
        for stopped in [false, true] {
            for mode in [FailureMode::Redistribute, FailureMode::Cancel] {
                multi_get(stopped, mode).await;
            }
        }
    });
}

async fn multi_get(stopped: bool, mode: FailureMode) {
    let mut nodes = memcacheds(3);
    let addresses = addresses(&nodes);
    let client = Client::builder()
        .nodes(&addresses)
        .failure_mode(mode)
        .build()
        .unwrap();
    let keys: Vec<(usize, Key)> = (0..3)
        .flat_map(|node| {
            keys_of(&addresses, node, 30)
                .into_iter()
                .map(move |key| (node, key))
        })
        .collect();
    for (_, key) in &keys {
        store_patiently(&client, key, key.as_bytes().to_vec(), Ttl::NEVER).await;
    }
    if stopped {
        nodes[0].stop().unwrap();
    } else {
        nodes[0].kill().unwrap();
    }
    // At first it is not known, then it is.
    for round in 0..20 {
        let began = Instant::now();
        let many = client.get_many(keys.iter().map(|(_, key)| key)).await;
        let took = began.elapsed();
        let case = format!("{mode:?}, stopped {stopped}, round {round}, after {took:?}");
        assert!(took <= 150 * MILLISECOND, "{case}");
        for ((node, key), outcome) in keys.iter().zip(many.outcomes()) {
            match outcome {
                Outcome::Hit(value) if *node > 0 => assert_eq!(**value, *key.as_bytes()),
                Outcome::Miss if *node == 0 && mode == FailureMode::Redistribute => {}
                Outcome::Error(_) if *node == 0 && mode == FailureMode::Cancel => {}
                outcome => panic!("{case}: {outcome:?} for a key of node {node}"),
            }
        }
        sleep(10 * MILLISECOND).await;
    }
}

/// 51 of FAULTS.
#[test]
fn a_node_that_returns_with_old_data_never_serves_it() {
    alone(async {
        let nodes = memcacheds(3);
        let addresses = addresses(&nodes);
        let client = client(&addresses);
        let keys = keys_of(&addresses, 0, 90);
        for key in &keys {
            store_patiently(&client, key, "old", Ttl::NEVER).await;
        }
        nodes[0].stop().unwrap();
        let _ = gets(&client, &keys[..1], 5 * MILLISECOND, 300 * MILLISECOND).await;
        until_open(&client, 0).await;
        let (written, rest) = keys.split_at(30);
        let (deleted, untouched) = rest.split_at(30);
        for key in written {
            store_patiently(&client, key, "new", Ttl::NEVER).await;
        }
        for key in deleted {
            client.delete(key).await.unwrap();
        }
        nodes[0].cont().unwrap();
        let mut stale = 0;
        let mut reads = 0;
        let mut closed = None;
        // From before it is back until all keys are home and what was in doubt is settled.
        while closed.is_none_or(|closed: Instant| closed.elapsed() < Duration::from_secs(5)) {
            for key in written.iter().chain(deleted) {
                let read = client.get(key).await.unwrap();
                stale += usize::from(read.is_some_and(|value| value == "old"));
                reads += 1;
            }
            if closed.is_none() && client.nodes()[0].state == tower_memcached::BreakerState::Closed
            {
                closed = Some(Instant::now());
            }
            sleep(5 * MILLISECOND).await;
        }
        println!("{stale} stale of {reads} reads");
        assert_eq!(stale, 0, "stale of {reads} reads");
        for key in untouched {
            let read = client.get(key).await.unwrap();
            assert_eq!(read.expect("nobody wrote it meanwhile"), "old");
        }
    });
}

/// 55 of FAULTS: the bytes of a write that timed out wait in a socket of a frozen thread. They are executed when it thaws,
/// although the client has long closed that connection and written anew over another.
#[test]
fn a_zombie_write_never_comes_over_a_newer_one() {
    if freezer::switched_off() {
        return;
    }
    alone(async {
        let node = memcacheds(1).remove(0);
        let client = client(&[node.address()]);
        let key = Key::new("k").unwrap();
        store_patiently(&client, &key, "0", Ttl::NEVER).await;
        let mut stale = 0;
        for round in 0..2 {
            let busy = async {
                let keys = std::slice::from_ref(&key);
                let _ = gets(&client, keys, MILLISECOND, 100 * MILLISECOND).await;
            };
            let frozen = Frozen::thread(busiest_worker(&node, busy).await);
            let zombie = client
                .set(&key, format!("zombie {round}"), Ttl::NEVER)
                .await;
            // On the old connection it would only come behind the other.
            let until = Instant::now() + PATIENCE;
            while client.get(&key).await.is_err() {
                assert!(Instant::now() < until, "no other thread answers");
            }
            let newer = format!("newer {round}");
            store_patiently(&client, &key, newer.clone(), Ttl::NEVER).await;
            println!("round {round}: the first write: {zombie:?}");
            sleep(500 * MILLISECOND).await;
            drop(frozen);
            let until = Instant::now() + Duration::from_secs(4);
            while Instant::now() < until {
                if let Ok(Some(read)) = client.get(&key).await {
                    stale += usize::from(read != newer.as_str());
                }
                sleep(5 * MILLISECOND).await;
            }
        }
        assert_eq!(stale, 0, "reads of what was overwritten");
    });
}

/// 55 of FAULTS, on a node that was stopped whole.
#[test]
fn what_a_stopped_node_was_sent_is_not_read_after_a_newer_write() {
    alone(async {
        let nodes = memcacheds(3);
        let addresses = addresses(&nodes);
        let client = client(&addresses);
        let keys = keys_of(&addresses, 0, 100);
        for key in &keys {
            store_patiently(&client, key, "0", Ttl::NEVER).await;
        }
        nodes[0].stop().unwrap();
        // Sent to the stopped node, in doubt, and answered by another.
        let sets = keys.iter().map(|key| client.set(key, "1", Ttl::NEVER));
        let in_doubt = join_all(sets).await;
        assert!(in_doubt.iter().all(Result::is_ok), "{in_doubt:?}");
        for key in &keys {
            store_patiently(&client, key, "2", Ttl::NEVER).await;
        }
        nodes[0].cont().unwrap();
        until_closed(&client, 0).await;
        let until = Instant::now() + Duration::from_secs(4);
        let (mut stale, mut reads) = (0, 0);
        while Instant::now() < until {
            for key in &keys {
                let read = client.get(key).await.unwrap();
                stale += usize::from(read.is_some_and(|value| value != "2"));
                reads += 1;
            }
            sleep(5 * MILLISECOND).await;
        }
        assert_eq!(stale, 0, "stale of {reads} reads");
    });
}
