//! What can happen to a memcached process, done to real ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tower_memcached::testing::Memcached;
use tower_memcached::{BreakerState, Client, Error, Key, ProbeSettings, Ttl};

use crate::support::calls::{Calls, gets};
use crate::support::freezer::{self, Frozen, listener, workers};
use crate::support::lateness::pause;
use crate::support::{
    PATIENCE, addresses, alone, client, eventually, keys_of, memcacheds, raw, state,
    store_patiently, until_closed, until_open,
};

const MILLISECOND: Duration = Duration::from_millis(1);
/// The default timeout of an operation, and what a busy machine may add to it.
const IN_TIME: Duration = Duration::from_millis(150);

/// Small values under many keys of one node.
async fn fill(client: &Client, keys: &[Key]) {
    for key in keys {
        store_patiently(client, key, "v", Ttl::NEVER).await;
    }
}

/// A client that waits so long that only what is told at once ends a call early.
fn patient(nodes: &[String]) -> Client {
    Client::builder()
        .nodes(nodes)
        .timeout(Duration::from_secs(10))
        .attempt_timeout(Duration::from_secs(5))
        .build()
        .unwrap()
}

/// 1 of FAULTS.
#[test]
fn every_call_to_a_stopped_node_ends_in_time_and_leaves_nothing_behind() {
    alone(async {
        let node = Memcached::spawn(&[]).unwrap();
        let client = client(&[node.address()]);
        let key = Key::new("k").unwrap();
        store_patiently(&client, &key, "1", Ttl::NEVER).await;
        node.stop().unwrap();
        let call = |number: usize| {
            let (client, key) = (client.clone(), key.clone());
            async move {
                let began = Instant::now();
                let failed = match number % 6 {
                    // What is in doubt on its node is a miss, whatever the node may say.
                    0 => !matches!(client.get(&key).await, Ok(Some(_))),
                    1 => client.set(&key, "2", Ttl::NEVER).await.is_err(),
                    2 => client.increment(&key, 1).await.is_err(),
                    3 => client.delete(&key).await.is_err(),
                    4 => client.add(&key, "3", Ttl::NEVER).await.is_err(),
                    _ => client.touch(&key, Ttl::NEVER).await.is_err(),
                };
                (failed, began.elapsed())
            }
        };
        let mut longest = Duration::ZERO;
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            for (failed, took) in join_all((0..120).map(call)).await {
                assert!(failed, "a stopped node answered");
                longest = longest.max(took);
            }
            sleep(20 * MILLISECOND).await;
        }
        println!("longest call {longest:?}");
        assert!(longest <= IN_TIME, "a call took {longest:?}");
        assert_ne!(state(&client, 0), BreakerState::Closed);
        eventually("nothing is in flight", || client.nodes()[0].in_flight == 0).await;
        node.cont().unwrap();
        until_closed(&client, 0).await;
        store_patiently(&client, &key, "4", Ttl::NEVER).await;
    });
}

/// 3 of FAULTS.
#[test]
fn the_call_after_an_idle_node_was_killed_is_answered() {
    alone(async {
        let mut nodes = memcacheds(3);
        let addresses = addresses(&nodes);
        let client = patient(&addresses);
        let keys = keys_of(&addresses, 0, 20);
        for round in 0..2 {
            fill(&client, &keys).await;
            nodes[0].kill().unwrap();
            for key in &keys {
                let read = client.get(key).await;
                assert!(read.is_ok(), "round {round}: {read:?}");
            }
            nodes[0].restart().unwrap();
            until_closed(&client, 0).await;
        }
    });
}

/// 4 of FAULTS: with requests unread, the kernel of a dead process sends a reset.
#[test]
fn requests_a_killed_node_never_read_are_answered_elsewhere_at_once() {
    alone(async {
        let mut nodes = memcacheds(3);
        let addresses = addresses(&nodes);
        let client = patient(&addresses);
        let keys = keys_of(&addresses, 0, 200);
        fill(&client, &keys[..1]).await;
        nodes[0].stop().unwrap();
        let under_way: Vec<_> = keys
            .iter()
            .map(|key| {
                let (client, key) = (client.clone(), key.clone());
                tokio::spawn(async move { client.get(key).await })
            })
            .collect();
        eventually("all are under way", || {
            client.nodes()[0].in_flight == keys.len()
        })
        .await;
        sleep(50 * MILLISECOND).await;
        let killed = Instant::now();
        nodes[0].kill().unwrap();
        for call in join_all(under_way).await {
            call.unwrap().expect("moved to a node that answers");
        }
        let took = killed.elapsed();
        assert!(took < Duration::from_secs(1), "they waited {took:?}");
    });
}

/// 5 of FAULTS.
#[test]
fn a_node_back_empty_misses_and_each_key_is_loaded_once() {
    alone(async {
        let mut node = Memcached::spawn(&[]).unwrap();
        let client = patient(&[node.address()]);
        let keys = keys_of(&[node.address()], 0, 10);
        fill(&client, &keys).await;
        node.restart().unwrap();
        eventually("it is back", || client.nodes()[0].connections == 0).await;
        until_closed(&client, 0).await;
        let loads = AtomicUsize::new(0);
        let loads = &loads;
        let load = |number: usize| {
            let (client, key) = (client.clone(), keys[number % keys.len()].clone());
            async move {
                let load = || async {
                    loads.fetch_add(1, Ordering::SeqCst);
                    sleep(50 * MILLISECOND).await;
                    Ok::<_, std::io::Error>(Some("v"))
                };
                client.get_or_load(key, Ttl::NEVER, load).await
            }
        };
        for loaded in join_all((0..1_000).map(load)).await {
            assert_eq!(loaded.unwrap().unwrap(), "v");
        }
        assert_eq!(loads.load(Ordering::SeqCst), keys.len());
    });
}

/// 7 of FAULTS: memcached gives each connection to one of its threads.
#[test]
fn a_frozen_worker_thread_is_judged_by_connection_and_the_node_stays_in() {
    if freezer::switched_off() {
        return;
    }
    alone(async {
        let nodes = memcacheds(3);
        let addresses = addresses(&nodes);
        let client = Client::builder()
            .nodes(&addresses)
            .connections(8)
            .build()
            .unwrap();
        let keys = keys_of(&addresses, 0, 200);
        fill(&client, &keys).await;
        let warm = gets(&client, &keys, 2 * MILLISECOND, Duration::from_secs(1)).await;
        println!("before: {}", warm.summary());
        let frozen = Frozen::thread(workers(&nodes[0])[0]);
        let opened = Arc::new(AtomicBool::new(false));
        let watched = tokio::spawn(watch_for_opening(client.clone(), opened.clone()));
        let calls = gets(&client, &keys, 2 * MILLISECOND, Duration::from_secs(5)).await;
        println!("one thread frozen: {}", calls.summary());
        drop(frozen);
        watched.abort();
        assert!(
            !opened.load(Ordering::SeqCst),
            "the node was ejected for one of its four threads: {:?}",
            client.nodes()[0].last_cause
        );
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
    });
}

/// Says what the first node's breaker does, and notes whether it opens.
async fn watch_for_opening(client: Client, opened: Arc<AtomicBool>) {
    let (began, mut before) = (Instant::now(), BreakerState::Closed);
    loop {
        let node = client.nodes().swap_remove(0);
        if node.state != before {
            let cause = node.last_cause.map(|cause| cause.to_string());
            let after = began.elapsed();
            println!("{after:?}: {:?}, {}", node.state, cause.unwrap_or_default());
            before = node.state;
        }
        if node.state == BreakerState::Open {
            opened.store(true, Ordering::SeqCst);
        }
        sleep(MILLISECOND).await;
    }
}

/// 8 of FAULTS: memcached's main thread accepts connections; the others serve those there are.
#[test]
fn a_node_whose_listener_is_frozen_goes_on_serving_its_connections() {
    if freezer::switched_off() {
        return;
    }
    alone(async {
        let node = Memcached::spawn(&[]).unwrap();
        let client = client(&[node.address()]);
        let keys = keys_of(&[node.address()], 0, 100);
        fill(&client, &keys).await;
        let frozen = Frozen::thread(listener(&node));
        assert!(
            !raw::answers_within(&node.address(), 200 * MILLISECOND).await,
            "a new connection was served"
        );
        let calls = gets(&client, &keys, 2 * MILLISECOND, Duration::from_secs(5)).await;
        println!("listener frozen: {}", calls.summary());
        drop(frozen);
        assert_eq!(state(&client, 0), BreakerState::Closed);
        assert_eq!(calls.hits, calls.count(), "{}", calls.summary());
    });
}

/// 9 of FAULTS: a node that gets 5 ms of processor time in 45.
#[test]
fn a_starved_node_costs_its_callers_little() {
    alone(async {
        let (calls, _) = starved(40 * MILLISECOND).await;
        println!("5 ms of 45: {}", calls.summary());
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        let p99 = calls.percentile(99);
        assert!(p99 <= 100 * MILLISECOND, "{}", calls.summary());
    });
}

/// 9 of FAULTS, so that most calls to it time out, but now and then some in a row do not.
#[test]
fn a_node_starved_of_nearly_everything_is_out() {
    alone(async {
        let (calls, opened) = starved(95 * MILLISECOND).await;
        println!("5 ms of 100: {}", calls.summary());
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        assert!(opened, "it stayed in");
    });
}

/// Calls to three nodes, of which one gets 5 ms of processor time after each such stop, and whether that was ejected.
async fn starved(stops: Duration) -> (Calls, bool) {
    let nodes = memcacheds(3);
    let addresses = addresses(&nodes);
    let client = client(&addresses);
    // Of all nodes: what one node's failures may cost is a share of all requests.
    let of_each = [0, 1, 2].map(|index| keys_of(&addresses, index, 100));
    let [first, second, third] = of_each.map(Vec::into_iter);
    let keys: Vec<Key> = first
        .zip(second)
        .zip(third)
        .flat_map(|((a, b), c)| [a, b, c])
        .collect();
    fill(&client, &keys).await;
    let opened = Arc::new(AtomicBool::new(false));
    let watched = tokio::spawn(watch_for_opening(client.clone(), opened.clone()));
    let (over, node) = (&AtomicBool::new(false), &nodes[0]);
    let calls = std::thread::scope(|scope| {
        scope.spawn(move || {
            while !over.load(Ordering::SeqCst) {
                node.stop().unwrap();
                pause(stops);
                node.cont().unwrap();
                pause(5 * MILLISECOND);
            }
        });
        let calls = tokio::task::block_in_place(|| {
            let lasting = Duration::from_secs(5);
            let calls = gets(&client, &keys, 5 * MILLISECOND, lasting);
            tokio::runtime::Handle::current().block_on(calls)
        });
        over.store(true, Ordering::SeqCst);
        calls
    });
    watched.abort();
    until_closed(&client, 0).await;
    (calls, opened.load(Ordering::SeqCst))
}

/// Takes all the connections that a node has to give, and returns them.
async fn take_all_connections(node: &Memcached) -> Vec<TcpStream> {
    let mut held = Vec::new();
    loop {
        use tokio::io::AsyncWriteExt as _;
        let mut stream = TcpStream::connect(node.socket_address()).await.unwrap();
        let _ = stream.write_all(b"version\r\n").await;
        let mut reply = [0; 7];
        let read = timeout(500 * MILLISECOND, stream.read_exact(&mut reply)).await;
        match read {
            Ok(Ok(_)) if &reply == b"VERSION" => held.push(stream),
            _ => return held,
        }
    }
}

/// 10 of FAULTS.
#[test]
fn a_node_at_its_connection_limit_is_not_stormed() {
    alone(async {
        let node = Memcached::spawn(&["-c", "40", "-t", "1"]).unwrap();
        // Kept for looking.
        let mut looking = TcpStream::connect(node.socket_address()).await.unwrap();
        let held = take_all_connections(&node).await;
        let before = rejected(&mut looking).await;
        let client = client(&[node.address()]);
        let keys = keys_of(&[node.address()], 0, 10);
        let calls = gets(&client, &keys, MILLISECOND, Duration::from_secs(3)).await;
        println!("connection limit: {}", calls.summary());
        let attempts = rejected(&mut looking).await - before;
        println!("{attempts} attempts to connect");
        assert_eq!(calls.errors.len(), calls.count());
        assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
        assert!(
            (1..=60).contains(&attempts),
            "{attempts} attempts to connect"
        );
        drop(held);
        fill(&client, &keys).await;
    });
}

/// How many connections memcached has refused.
async fn rejected(looking: &mut TcpStream) -> u64 {
    use tokio::io::AsyncWriteExt as _;
    looking.write_all(b"stats\r\n").await.unwrap();
    let mut stats = Vec::new();
    while !stats.ends_with(b"END\r\n") {
        assert_ne!(looking.read_buf(&mut stats).await.unwrap(), 0);
    }
    let stats = String::from_utf8(stats).unwrap();
    let line = stats
        .lines()
        .find_map(|line| line.strip_prefix("STAT rejected_connections "));
    line.unwrap().parse().unwrap()
}

/// 11 of FAULTS: the first connection too many is accepted by the kernel, and served by nobody.
#[test]
fn a_node_that_accepts_no_more_connections_in_silence_is_survived() {
    alone(async {
        let arguments = ["-c", "40", "-t", "1", "-o", "no_maxconns_fast"];
        let node = Memcached::spawn(&arguments).unwrap();
        let held = take_all_connections(&node).await;
        let client = client(&[node.address()]);
        let keys = keys_of(&[node.address()], 0, 10);
        let calls = gets(&client, &keys, 5 * MILLISECOND, Duration::from_secs(2)).await;
        println!("silent: {}", calls.summary());
        assert_eq!(calls.errors.len(), calls.count());
        assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
        drop(held);
        until_closed(&client, 0).await;
        fill(&client, &keys).await;
    });
}

/// 12 of FAULTS.
#[test]
fn a_node_with_a_full_backlog_is_survived() {
    alone(async {
        let node = Memcached::spawn(&["-b", "4"]).unwrap();
        node.stop().unwrap();
        let mut waiting = Vec::new();
        while let Ok(connected) =
            timeout(300 * MILLISECOND, TcpStream::connect(node.socket_address())).await
        {
            waiting.push(connected.unwrap());
            assert!(waiting.len() < 100, "the backlog is not limited");
        }
        let client = client(&[node.address()]);
        let keys = keys_of(&[node.address()], 0, 10);
        let calls = gets(&client, &keys, 5 * MILLISECOND, Duration::from_secs(2)).await;
        println!("backlog full: {}", calls.summary());
        assert_eq!(calls.errors.len(), calls.count());
        assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
        assert_ne!(state(&client, 0), BreakerState::Closed);
        drop(waiting);
        node.cont().unwrap();
        until_closed(&client, 0).await;
        fill(&client, &keys).await;
    });
}

/// 13 of FAULTS: only one node, so that no other can answer instead.
#[test]
fn being_kicked_as_idle_is_not_noticed() {
    alone(async {
        let node = Memcached::spawn(&["-o", "idle_timeout=1"]).unwrap();
        // Probes would keep the connection from being idle.
        let client = Client::builder()
            .nodes([node.address()])
            .probe(ProbeSettings::default().initial_delay(2 * PATIENCE))
            .build()
            .unwrap();
        let key = Key::new("k").unwrap();
        store_patiently(&client, &key, "v", Ttl::NEVER).await;
        for kicked in 0..2 {
            let until = Instant::now() + PATIENCE;
            while raw::stat(&node.address(), "idle_kicks").await <= kicked {
                assert!(Instant::now() < until, "it is not kicked");
                sleep(20 * MILLISECOND).await;
            }
            let read = client.get(&key).await;
            assert_eq!(read.unwrap().unwrap(), "v");
            assert_eq!(state(&client, 0), BreakerState::Closed);
        }
    });
}

/// 16 of FAULTS.
#[test]
fn a_rolling_restart_of_all_nodes_is_not_noticed() {
    alone(async {
        let mut nodes = memcacheds(3);
        let addresses = addresses(&nodes);
        let client = client(&addresses);
        let over = AtomicBool::new(false);
        let (over, client) = (&over, &client);
        let call = |caller: usize| async move {
            let mut calls = 0;
            while !over.load(Ordering::SeqCst) {
                let key = format!("key-{}", (calls * 8 + caller) % 400);
                let load = || async { Ok::<_, std::io::Error>(Some("v")) };
                let began = Instant::now();
                let loaded = client.get_or_load(&key, Ttl::NEVER, load).await;
                let took = began.elapsed();
                assert_eq!(loaded.expect("no caller's error").unwrap(), "v");
                assert!(took <= IN_TIME, "a call took {took:?}");
                calls += 1;
                sleep(5 * MILLISECOND).await;
            }
            calls
        };
        let restarts = async {
            for (index, node) in nodes.iter_mut().enumerate() {
                sleep(500 * MILLISECOND).await;
                node.kill().unwrap();
                until_open(client, index).await;
                let others = (0..3).filter(|&other| other != index);
                assert!(
                    others
                        .into_iter()
                        .all(|other| state(client, other) == BreakerState::Closed),
                    "another node was ejected: {:?}",
                    client.nodes()
                );
                sleep(500 * MILLISECOND).await;
                node.restart().unwrap();
                until_closed(client, index).await;
            }
            over.store(true, Ordering::SeqCst);
        };
        let (calls, ()) = tokio::join!(join_all((0..8).map(call)), restarts);
        println!("{} calls", calls.iter().sum::<usize>());
    });
}

/// 17 of FAULTS.
#[test]
fn with_all_nodes_gone_the_fallback_answers_at_once() {
    alone(async {
        let mut nodes = memcacheds(3);
        let client = client(&addresses(&nodes));
        let keys: Vec<_> = (0..200)
            .map(|number| Key::new(format!("key-{number}")).unwrap())
            .collect();
        fill(&client, &keys).await;
        nodes[0].kill().unwrap();
        nodes[1].kill().unwrap();
        nodes[2].stop().unwrap();
        let mut took = Vec::new();
        for _ in 0..5 {
            for key in &keys {
                let began = Instant::now();
                let load = || async { Ok::<_, std::io::Error>(Some("from the database")) };
                let loaded = client.get_or_load(key, Ttl::NEVER, load).await;
                took.push(began.elapsed());
                assert_eq!(loaded.expect("the fallback").unwrap(), "from the database");
            }
        }
        let longest = took.iter().max().unwrap();
        println!("longest {longest:?}");
        assert!(*longest <= IN_TIME, "a call took {longest:?}");
        // By now they are known to be gone.
        let mut known = took.split_off(took.len() / 2);
        known.sort_unstable();
        let median = known[known.len() / 2];
        println!("median once they are known to be gone {median:?}");
        assert!(median < MILLISECOND, "the fallback waited {median:?}");
    });
}

/// 18 of FAULTS: a node that comes back for a second every other second is believed less each time.
#[test]
fn a_flapping_node_is_ejected_for_longer_each_time() {
    alone(async {
        let nodes = memcacheds(3);
        let addresses = addresses(&nodes);
        let client = client(&addresses);
        let keys = keys_of(&addresses, 0, 100);
        fill(&client, &keys).await;
        let began = Instant::now();
        let flaps = 8;
        let flapping = async {
            for flap in 0..flaps {
                nodes[0].stop().unwrap();
                sleep_until(began + Duration::from_secs(2 * flap + 1)).await;
                nodes[0].cont().unwrap();
                sleep_until(began + Duration::from_secs(2 * flap + 2)).await;
            }
        };
        let openings = AtomicUsize::new(0);
        let counting = async {
            let mut before = BreakerState::Closed;
            loop {
                let now = state(&client, 0);
                let was_in = matches!(before, BreakerState::Closed | BreakerState::Ramping);
                if was_in && now == BreakerState::Open {
                    openings.fetch_add(1, Ordering::SeqCst);
                }
                before = now;
                sleep(MILLISECOND).await;
            }
        };
        let lasting = Duration::from_secs(2 * flaps);
        let calls = gets(&client, &keys, 5 * MILLISECOND, lasting);
        let (calls, ()) = tokio::select! {
            _ = counting => unreachable!("it counts without end"),
            both = async { tokio::join!(calls, flapping) } => both,
        };
        let openings = openings.into_inner();
        println!("{openings} openings in {flaps} flaps: {}", calls.summary());
        assert!(openings >= 1);
        assert!(
            openings as u64 <= flaps - 2,
            "it was let in after {openings} of {flaps} flaps"
        );
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
    });
}

/// Retry, the failure mode: a call waits for its node if there is time.
#[test]
fn with_retry_a_call_waits_for_its_node_until_it_is_back() {
    alone(async {
        let mut node = Memcached::spawn(&[]).unwrap();
        let client = Client::builder()
            .nodes([node.address()])
            .failure_mode(tower_memcached::FailureMode::Retry)
            .timeout(PATIENCE)
            .build()
            .unwrap();
        let key = Key::new("k").unwrap();
        store_patiently(&client, &key, "old", Ttl::NEVER).await;
        node.kill().unwrap();
        until_open(&client, 0).await;
        let waiting = {
            let (client, key) = (client.clone(), key.clone());
            tokio::spawn(async move { client.set(key, "new", Ttl::NEVER).await })
        };
        sleep(500 * MILLISECOND).await;
        assert!(!waiting.is_finished(), "it did not wait");
        node.restart().unwrap();
        let stored: Result<(), Error> = waiting.await.unwrap();
        stored.expect("its node is back");
        assert_eq!(client.get(&key).await.unwrap().unwrap(), "new");
        // And no longer than there is time.
        node.kill().unwrap();
        until_open(&client, 0).await;
        let hurried = client.with_timeout(300 * MILLISECOND).unwrap();
        let began = Instant::now();
        hurried.get(&key).await.expect_err("its node is gone");
        let took = began.elapsed();
        assert!(took >= 250 * MILLISECOND, "it gave up after {took:?}");
        assert!(took < Duration::from_secs(1), "it took {took:?}");
    });
}

/// Cancel, the failure mode: a call to a node that is out fails at once, unsent.
#[test]
fn with_cancel_a_call_to_a_node_that_is_out_fails_at_once_and_unsent() {
    alone(async {
        let nodes = memcacheds(3);
        let addresses = addresses(&nodes);
        let client = Client::builder()
            .nodes(&addresses)
            .failure_mode(tower_memcached::FailureMode::Cancel)
            .build()
            .unwrap();
        let keys = keys_of(&addresses, 0, 100);
        fill(&client, &keys).await;
        nodes[0].stop().unwrap();
        let _ = gets(&client, &keys, MILLISECOND, 300 * MILLISECOND).await;
        until_open(&client, 0).await;
        let mut took = Vec::new();
        for key in keys.iter().cycle().take(2_000) {
            let began = Instant::now();
            let error = client.get(key).await.expect_err("its node is out");
            took.push(began.elapsed());
            assert_eq!(error.sent(), tower_memcached::Sent::No, "{error}");
        }
        took.sort_unstable();
        let median = took[took.len() / 2];
        println!("median {median:?}, longest {:?}", took[took.len() - 1]);
        assert!(median < MILLISECOND, "failing took {median:?}");
    });
}
