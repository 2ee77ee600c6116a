//! Moments at which something else happens: what a hostile reading looked for.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use tower_memcached::testing::{Admission, Flow, Memcached, Proxy, Server, Toxics};
use tower_memcached::{
    Address, BreakerSettings, BreakerState, Client, ClientBuilder, Connecting, Connector, Executor,
    FailureMode, JournalSettings, Key, NodeSpec, ProbeSettings, Ring, Sent, Ttl,
};

use crate::support::{
    addresses, eventually, keys_of, patient, server, servers, state, until_closed, until_open,
};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const ATTEMPT: Duration = ms(150);

fn builder(servers: &[Server]) -> ClientBuilder {
    patient(servers)
        .breaker(BreakerSettings::default().reopening(ms(100), ms(100)))
        .attempt_timeout(ATTEMPT)
        .probe(ProbeSettings::default().period(ms(200)))
}

async fn write(client: &Client, keys: &[Key], value: &'static str) {
    for key in keys {
        client.set(key, value, Ttl::NEVER).await.unwrap();
    }
}

fn home_is(nodes: &[String], key: &Key, index: usize) -> bool {
    let specs: Vec<_> = nodes
        .iter()
        .map(|node| NodeSpec::new(node).unwrap())
        .collect();
    Ring::default().node_of(&specs, key) == Some(index)
}

fn is_journal_delete(line: &[u8]) -> bool {
    line.starts_with(b"md ") && !line.starts_with(b"md tower")
}

/// Our own lack of file descriptors.
struct NoFiles;

impl Connector for NoFiles {
    fn connect(&self, _: &Address) -> Connecting {
        Box::pin(async { Err(std::io::Error::from_raw_os_error(24)) })
    }
}

/// While a node ramps, a deferred key without a refuge is read though it is in the journal.
#[tokio::test]
async fn a_journaled_key_is_not_read_during_the_ramp() {
    for mode in [
        FailureMode::Redistribute,
        FailureMode::Cancel,
        FailureMode::Retry,
    ] {
        let server = server().await;
        let client = builder(std::slice::from_ref(&server))
            .failure_mode(mode)
            .timeout(ms(400))
            .breaker(
                BreakerSettings::default()
                    .reopening(ms(100), ms(100))
                    .ramp(ms(60_000)),
            )
            .build()
            .unwrap();
        client.get("k").await.unwrap();
        server.stall();
        let error = client.set("k", "late", Ttl::NEVER).await.unwrap_err();
        assert_eq!(error.sent(), Sent::Maybe);
        until_open(&client, 0).await;
        server.resume();
        eventually("ramping", || state(&client, 0) == BreakerState::Ramping).await;
        assert_eq!(client.nodes()[0].journal, 1, "in doubt for two seconds");
        client.set("k", "newer", Ttl::NEVER).await.unwrap();
        assert_eq!(client.nodes()[0].journal, 1);
        // The late write lands now, well within the grace period.
        sleep(ms(20)).await;
        server.insert("k", "late");
        let read = client.get("k").await.unwrap();
        assert_ne!(
            read.as_deref(),
            Some(&b"late"[..]),
            "{mode:?}: {:?}",
            client.nodes()
        );
    }
}

/// The journal overflows while the node is being brought back.
#[tokio::test]
async fn a_journal_that_overflows_while_it_is_worked_off_keeps_the_node_out() {
    let servers = servers(3).await;
    let client = builder(&servers)
        .attempt_timeout(ms(1000))
        .breaker(
            BreakerSettings::default()
                .reopening(ms(100), ms(100))
                .slow_call_rate(101),
        )
        .journal(JournalSettings::default().capacity(10))
        .build()
        .unwrap();
    let keys = keys_of(&servers, 1, 60);
    write(&client, &keys, "old").await;
    servers[1].refuse();
    until_open(&client, 1).await;
    write(&client, &keys[..10], "new").await;
    assert_eq!(client.nodes()[1].journal, 10);
    servers[1].delay(ms(200));
    servers[1].accept().unwrap();
    eventually("the journal is being worked off", || {
        servers[1]
            .requests()
            .iter()
            .any(|line| is_journal_delete(line))
    })
    .await;
    assert_eq!(state(&client, 1), BreakerState::HalfOpen);
    write(&client, &keys[10..], "new").await;
    assert_eq!(state(&client, 1), BreakerState::HalfOpen);
    servers[1].delay(ms(0));
    let until = Instant::now() + ms(5000);
    let mut old = 0;
    while Instant::now() < until && old == 0 {
        for key in &keys {
            let read = client.get(key).await.unwrap();
            old += usize::from(read.is_some_and(|read| read == "old"));
        }
        sleep(ms(5)).await;
    }
    assert_eq!(old, 0, "stale reads, node: {:?}", client.nodes()[1]);
}

/// flush_all while the node is being brought back.
#[tokio::test]
async fn a_flush_asked_for_while_the_node_is_out_is_run_before_it_is_readmitted() {
    let servers = servers(3).await;
    let client = builder(&servers)
        .attempt_timeout(ms(1000))
        .breaker(
            BreakerSettings::default()
                .reopening(ms(100), ms(100))
                .slow_call_rate(101),
        )
        .build()
        .unwrap();
    let keys = keys_of(&servers, 1, 20);
    write(&client, &keys, "old").await;
    servers[1].refuse();
    until_open(&client, 1).await;
    write(&client, &keys[..10], "new").await;
    servers[1].delay(ms(200));
    servers[1].accept().unwrap();
    eventually("the journal is being worked off", || {
        servers[1]
            .requests()
            .iter()
            .any(|line| is_journal_delete(line))
    })
    .await;
    let flushed = client.flush_all().await.unwrap();
    assert_eq!(
        flushed.iter().filter(|node| node.result.is_err()).count(),
        1
    );
    servers[1].delay(ms(0));
    until_closed(&client, 1).await;
    let mut left = 0;
    for key in &keys[10..] {
        left += usize::from(client.get(key).await.unwrap().is_some());
    }
    assert_eq!(
        (left, servers[1].commands_named("flush_all")),
        (0, 1),
        "readmitted unflushed"
    );
}

/// No cap on what is written elsewhere.
#[tokio::test]
async fn a_failover_ttl_that_never_ends() {
    let servers = servers(2).await;
    let client = builder(&servers)
        .failover_ttl(Duration::MAX)
        .build()
        .unwrap();
    let keys = keys_of(&servers, 1, 1);
    client.get(&keys[0]).await.unwrap();
    servers[1].refuse();
    until_open(&client, 1).await;
    client.set(&keys[0], "v", Ttl::secs(60)).await.unwrap();
}

/// No probes, please.
#[tokio::test]
async fn a_probe_period_that_never_comes() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let known = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if info
            .location()
            .is_some_and(|at| at.file().ends_with("time.rs"))
            || info.to_string().contains("Duration")
        {
            PANICS.fetch_add(1, Ordering::Relaxed);
        }
        known(info);
    }));
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .probe(
            ProbeSettings::default()
                .initial_delay(ms(0))
                .period(Duration::MAX),
        )
        .build()
        .unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    sleep(ms(500)).await;
    assert_eq!(PANICS.load(Ordering::Relaxed), 0, "keepers panicked");
}

/// A journal larger than the in-flight limit is never worked off.
#[tokio::test]
async fn a_small_in_flight_limit_does_not_keep_a_node_out() {
    let servers = servers(2).await;
    let client = patient(&servers)
        .max_in_flight(16)
        .probe(ProbeSettings::default().period(ms(1000)))
        .build()
        .unwrap();
    let keys = keys_of(&servers, 1, 400);
    client.get(&keys[0]).await.unwrap();
    servers[1].refuse();
    until_open(&client, 1).await;
    write(&client, &keys, "new").await;
    servers[1].accept().unwrap();
    let began = Instant::now();
    while state(&client, 1) != BreakerState::Closed {
        assert!(
            began.elapsed() < ms(10_000),
            "a 400 key journal, ten seconds later: {:?}",
            client.nodes()[1]
        );
        sleep(ms(10)).await;
    }
}

/// "Not held against a node: `Too many open connections`, our own lack of file descriptors".
#[tokio::test]
async fn a_full_server_is_not_ejected() {
    let server = server().await;
    server.set_admission(Admission::TooMany).unwrap();
    let client = patient(std::slice::from_ref(&server))
        .probe(ProbeSettings::default().initial_delay(ms(0)).period(ms(50)))
        .build()
        .unwrap();
    let _ = client.get("k").await;
    sleep(ms(2000)).await;
    assert_eq!(client.nodes()[0].cause, None, "{:?}", client.nodes());
}

#[tokio::test]
async fn our_own_lack_of_file_descriptors_ejects_nobody() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .connector(NoFiles)
        .probe(ProbeSettings::default().initial_delay(ms(0)).period(ms(50)))
        .build()
        .unwrap();
    let _ = client.get("k").await;
    sleep(ms(2000)).await;
    assert_eq!(client.nodes()[0].cause, None, "{:?}", client.nodes());
}

/// G10: everything stops when the last handle is dropped.
#[tokio::test]
async fn a_keeper_does_not_outlive_its_client() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .timeout(ms(60_000))
        .attempt_timeout(ms(60_000))
        .executor(Executor::dedicated("f9", 1))
        .probe(
            ProbeSettings::default()
                .initial_delay(ms(50))
                .period(ms(50)),
        )
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.stall();
    sleep(ms(300)).await;
    drop(client);
    let threads = || {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter(|task| {
                let comm = task.as_ref().unwrap().path().join("comm");
                std::fs::read_to_string(comm).is_ok_and(|comm| comm.trim() == "f9")
            })
            .count()
    };
    let until = Instant::now() + ms(8000);
    while threads() > 0 {
        assert!(Instant::now() < until, "{} threads still run", threads());
        sleep(ms(20)).await;
    }
}

/// A connection that something between us and the server has reset: the server still executes
/// what it has received (Linux: the receive queue outlives the RST).
#[tokio::test]
async fn a_write_lost_to_a_reset_by_the_network_is_in_doubt() {
    let mut stale = 0;
    for _round in 0..40 {
        let memcached = Memcached::spawn(&["-t", "4"]).unwrap();
        let proxy = Proxy::listen(memcached.socket_address()).await.unwrap();
        let client = Client::builder()
            .nodes([proxy.address().to_string()])
            .executor(Executor::current())
            .failure_mode(FailureMode::Cancel)
            .timeout(ms(10_000))
            .attempt_timeout(ms(5_000))
            .breaker(BreakerSettings::default().slow_call_rate(101))
            .probe(ProbeSettings::default().initial_delay(ms(600_000)))
            .build()
            .unwrap();
        client.get("k").await.unwrap();
        memcached.stop().unwrap();
        let big = "o".repeat(400);
        let keys: Vec<_> = (0..18).map(|n| format!("k{n}")).collect();
        {
            let writes = join_all(
                keys.iter()
                    .map(|key| client.set(key, big.clone(), Ttl::NEVER)),
            );
            assert!(timeout(ms(60), writes).await.is_err());
        }
        // A firewall, a load balancer, `ss -K`: not the server.
        proxy.reset_connections();
        sleep(ms(50)).await;
        let news = tokio::spawn({
            let (client, keys) = (client.clone(), keys.clone());
            async move {
                join_all(
                    keys.iter()
                        .rev()
                        .map(|key| client.set(key, "n", Ttl::NEVER)),
                )
                .await
            }
        });
        sleep(ms(100)).await;
        memcached.cont().unwrap();
        for outcome in news.await.unwrap() {
            outcome.unwrap();
        }
        sleep(ms(100)).await;
        for key in &keys {
            let read = client.get(key).await.unwrap();
            stale += usize::from(read.is_some_and(|read| read.len() > 1));
        }
    }
    assert_eq!(stale, 0, "stale reads");
}

/// Retry: a read that waited for its node is placed before the wait, and reads what is in the
/// journal after it.
#[tokio::test]
async fn a_read_that_waited_does_not_use_what_is_in_the_journal() {
    let server = server().await;
    let client = builder(std::slice::from_ref(&server))
        .failure_mode(FailureMode::Retry)
        .breaker(
            BreakerSettings::default()
                .reopening(ms(100), ms(100))
                .ramp(ms(0)),
        )
        .timeout(ms(4000))
        .max_attempts(1)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    // Lost after it was executed or not: in doubt for two seconds after the node answers.
    server.stall();
    let error = client.set("k", "late", Ttl::NEVER).await.unwrap_err();
    assert_eq!(error.sent(), Sent::Maybe);
    until_open(&client, 0).await;
    server.resume();
    until_closed(&client, 0).await;
    client.set("k", "newer", Ttl::NEVER).await.unwrap();
    assert_eq!(client.nodes()[0].journal, 1, "still in doubt");
    server.refuse();
    until_open(&client, 0).await;
    let reads: Vec<_> = (0..64)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.get("k").await })
        })
        .collect();
    sleep(ms(20)).await;
    server.accept().unwrap();
    eventually("it is back", || {
        !matches!(
            state(&client, 0),
            BreakerState::Open | BreakerState::HalfOpen
        )
    })
    .await;
    assert_eq!(client.nodes()[0].journal, 1, "still in doubt");
    server.insert("k", "late");
    for read in reads {
        let read = read.await.unwrap().unwrap();
        assert_ne!(read.as_deref(), Some(&b"late"[..]), "{:?}", client.nodes());
    }
}

/// Those who wait for a node are bounded (G3).
#[tokio::test]
async fn those_who_wait_in_retry_mode_are_bounded_and_seen() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .failure_mode(FailureMode::Retry)
        .max_in_flight(10)
        .timeout(ms(3000))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.refuse();
    until_open(&client, 0).await;
    let began = Instant::now();
    let all = join_all((0..5000).map(|n| {
        let client = client.clone();
        async move {
            let outcome = client.get(format!("k{n}")).await;
            (outcome.unwrap_err().kind(), began.elapsed())
        }
    }));
    let look = async {
        sleep(ms(1000)).await;
        client.nodes()[0].in_flight
    };
    let (outcomes, seen) = tokio::join!(all, look);
    let at_once = outcomes
        .iter()
        .filter(|(_, after)| *after < ms(1000))
        .count();
    assert!(
        at_once >= 4900,
        "{at_once} of 5,000 refused at once; in flight seen: {seen}"
    );
}

/// Waiters of the retry mode and `shutdown(drain)`.
#[tokio::test]
async fn shutdown_waits_for_those_who_wait_for_their_node() {
    let server = server().await;
    let client = builder(std::slice::from_ref(&server))
        .failure_mode(FailureMode::Retry)
        .timeout(ms(5000))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.refuse();
    until_open(&client, 0).await;
    let write = tokio::spawn({
        let client = client.clone();
        async move { client.set("k", "v", Ttl::NEVER).await }
    });
    sleep(ms(50)).await;
    server.accept().unwrap();
    client.shutdown(ms(3000)).await;
    let outcome = write.await.unwrap();
    assert!(outcome.is_ok(), "{outcome:?}");
}

/// What is left on another node lives from when it is executed, not from when it was placed.
#[tokio::test]
async fn a_leftover_that_was_executed_late_is_not_read() {
    let servers = servers(2).await;
    let proxy = Proxy::listen(servers[1].address().unwrap()).await.unwrap();
    let home = servers[0].address().unwrap().to_string();
    let names = [home, proxy.address().to_string()];
    let key = (0..)
        .map(|n| Key::new(format!("key-{n}")).unwrap())
        .find(|key| home_is(&names, key, 0))
        .unwrap();
    let client = Client::builder()
        .nodes(names)
        .executor(Executor::current())
        .timeout(ms(30_000))
        .attempt_timeout(ms(15_000))
        .connect_timeout(ms(200))
        .failover_ttl(ms(3000))
        .breaker(
            BreakerSettings::default()
                .reopening(ms(100), ms(100))
                .ramp(ms(0))
                .slow_call_rate(101),
        )
        .probe(
            ProbeSettings::default()
                .period(ms(200))
                .initial_delay(ms(600_000)),
        )
        .build()
        .unwrap();
    client.get(&key).await.unwrap();
    servers[0].refuse();
    until_open(&client, 0).await;
    assert_eq!(client.get(&key).await.unwrap(), None);
    proxy.set(Flow::Upstream, Toxics::new().latency(ms(9500), ms(0)));
    let moved = tokio::spawn({
        let (client, key) = (client.clone(), key.clone());
        async move { client.set(&key, "v1", Ttl::NEVER).await }
    });
    sleep(ms(100)).await;
    servers[0].accept().unwrap();
    until_closed(&client, 0).await;
    moved.await.unwrap().unwrap();
    proxy.set(Flow::Upstream, Toxics::new());
    client.set(&key, "v2", Ttl::NEVER).await.unwrap();
    assert_eq!(client.get(&key).await.unwrap().unwrap(), "v2");
    servers[0].refuse();
    let read = client.get(&key).await.unwrap();
    assert_ne!(read.as_deref(), Some(&b"v1"[..]), "{:?}", client.nodes());
}

/// "In-doubt keys are deleted again 2 s after readmission": not if the node was out again.
#[tokio::test]
async fn what_is_in_doubt_stays_so_after_each_readmission() {
    let server = server().await;
    let client = builder(std::slice::from_ref(&server))
        .failure_mode(FailureMode::Cancel)
        .breaker(
            BreakerSettings::default()
                .reopening(ms(100), ms(100))
                .ramp(ms(0)),
        )
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.stall();
    client.set("k", "late", Ttl::NEVER).await.unwrap_err();
    until_open(&client, 0).await;
    server.resume();
    until_closed(&client, 0).await;
    server.stall();
    while state(&client, 0) == BreakerState::Closed {
        let _ = client.get("other").await;
    }
    sleep(ms(3000)).await;
    server.resume();
    eventually("it is back", || {
        matches!(
            state(&client, 0),
            BreakerState::Ramping | BreakerState::Closed
        )
    })
    .await;
    assert_eq!(client.nodes()[0].journal, 1, "deleted again after 2 s");
}

/// One write that times out doubles the writes of its node for 65 seconds.
#[tokio::test]
async fn one_time_out_does_not_double_all_writes() {
    let servers = servers(2).await;
    let client = builder(&servers).build().unwrap();
    let keys = keys_of(&servers, 0, 500);
    client.get(&keys[0]).await.unwrap();
    servers[0].delay(ms(170));
    client.set(&keys[0], "v", Ttl::NEVER).await.unwrap();
    servers[0].delay(ms(0));
    sleep(ms(300)).await;
    assert_eq!(state(&client, 0), BreakerState::Closed);
    let before = servers[1].commands_named("md");
    write(&client, &keys[1..], "v").await;
    sleep(ms(500)).await;
    let extra = servers[1].commands_named("md") - before;
    assert!(
        extra < 10,
        "{extra} deletions at the other node for 499 writes at a healthy one"
    );
}

/// Ramping: a connection that is lost "says nothing about the node".
#[tokio::test]
async fn a_lost_connection_does_not_eject_a_ramping_node() {
    let server = server().await;
    let client = builder(std::slice::from_ref(&server))
        .failure_mode(FailureMode::Cancel)
        .breaker(
            BreakerSettings::default()
                .reopening(ms(100), ms(100))
                .ramp(ms(60_000)),
        )
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.refuse();
    until_open(&client, 0).await;
    server.accept().unwrap();
    eventually("it is back", || state(&client, 0) == BreakerState::Ramping).await;
    client.get("k").await.unwrap();
    server.delay(ms(30));
    let (read, ()) = tokio::join!(client.get("k"), async {
        sleep(ms(10)).await;
        server.close_connections();
    });
    assert!(read.is_ok(), "{read:?}");
    assert_eq!(state(&client, 0), BreakerState::Ramping);
}

/// Dropped while it waits for its node in retry mode: nothing was sent, nothing stays.
#[tokio::test]
async fn retry_wakes_all_waiters() {
    let server = server().await;
    let client = builder(std::slice::from_ref(&server))
        .failure_mode(FailureMode::Retry)
        .timeout(ms(10_000))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.refuse();
    until_open(&client, 0).await;
    let waiters: Vec<_> = (0..2000)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move {
                let began = Instant::now();
                (
                    client.set(format!("k{n}"), "v", Ttl::NEVER).await,
                    began.elapsed(),
                )
            })
        })
        .collect();
    sleep(ms(300)).await;
    server.accept().unwrap();
    for waiter in waiters {
        let (outcome, took) = waiter.await.unwrap();
        outcome.unwrap();
        assert!(took < ms(2500), "{took:?}");
    }
}

/// A node is killed with a thousand gets in flight: redistribute, so no errors.
#[tokio::test]
async fn a_killed_nodes_requests_in_flight_move() {
    let servers = servers(3).await;
    let client = patient(&servers).build().unwrap();
    let keys = keys_of(&servers, 1, 1000);
    for key in &keys[..1] {
        client.get(key).await.unwrap();
    }
    servers[1].delay(ms(500));
    let (outcomes, ()) = tokio::join!(join_all(keys.iter().map(|key| client.get(key))), async {
        sleep(ms(200)).await;
        servers[1].refuse();
    });
    let errors: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
    assert!(
        errors.is_empty(),
        "{} errors, e.g. {:?}",
        errors.len(),
        errors[0]
    );
}

/// Those who wait for a node that is then replaced go to where their key belongs now.
#[tokio::test]
async fn waiters_of_a_node_that_was_taken_away_are_not_left_behind() {
    let servers = servers(2).await;
    let client = builder(&servers[..1])
        .failure_mode(FailureMode::Retry)
        .timeout(ms(3000))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    servers[0].refuse();
    until_open(&client, 0).await;
    let read = tokio::spawn({
        let client = client.clone();
        async move { client.get("k").await }
    });
    sleep(ms(50)).await;
    client.set_nodes([addresses(&servers)[1].as_str()]).unwrap();
    let read = read.await.unwrap();
    assert!(read.is_ok(), "{read:?}");
}

/// Retry: a write that waited is executed on a node that its key no longer belongs to, and
/// acknowledged.
#[tokio::test]
async fn a_write_that_waited_goes_where_its_key_belongs_now() {
    let servers = servers(2).await;
    let client = builder(&servers[..1])
        .failure_mode(FailureMode::Retry)
        .timeout(ms(5000))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    servers[0].refuse();
    until_open(&client, 0).await;
    let write = tokio::spawn({
        let client = client.clone();
        async move { client.set("k", "v2", Ttl::NEVER).await }
    });
    sleep(ms(50)).await;
    client.set_nodes([addresses(&servers)[1].as_str()]).unwrap();
    client.set("k", "v1", Ttl::NEVER).await.unwrap();
    servers[0].accept().unwrap();
    let outcome = write.await.unwrap();
    if outcome.is_ok() {
        let read = client.get("k").await.unwrap();
        assert_eq!(
            read.as_deref(),
            Some(&b"v2"[..]),
            "acknowledged last, and nowhere to be read"
        );
    }
}
