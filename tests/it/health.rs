//! How a node is judged, and how it comes back.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::join_all;
use tokio::time::{Instant, sleep};
use tower::{BoxError, Service as _, service_fn};
use tower_memcached::testing::{Admission, Flow, Proxy, Toxics};
use tower_memcached::{
    Address, BreakerSettings, BreakerState, Client, Connecting, Connector, EjectionCause,
    ErrorKind, Executor, FailureMode, JournalSettings, Key, Node, NodeSettings, Operation,
    ProbeSettings, Request, Response, SystemConnector, Ttl,
};

use crate::support::{
    addresses, eventually, keys_of, patient, server, servers, state, until_closed, until_open,
};

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn get(key: &str) -> Request {
    Request::new(Operation::Get {
        key: Key::new(key).unwrap(),
        with_cas: false,
    })
}

/// FAULTS 47: what answers some questions and not others is not ready, and nobody has to use it for
/// that to be found.
#[tokio::test]
async fn a_node_that_answers_only_some_questions_is_taken_out_and_stays_out() {
    let hangs_at: [fn(&[u8]) -> bool; 3] = [
        |line| line.starts_with(b"mg "),
        |line| line.starts_with(b"ms "),
        |line| line.windows(6).any(|part| part == b" 2048 "),
    ];
    for hangs in hangs_at {
        let server = server().await;
        let probe = ProbeSettings::default().initial_delay(ms(1)).period(ms(50));
        let client = patient(std::slice::from_ref(&server))
            .attempt_timeout(ms(100))
            .probe(probe)
            .build()
            .unwrap();
        client.get("k").await.unwrap();
        server.rewrite_replies(move |line, reply| match hangs(line) {
            true => Vec::new(),
            false => reply,
        });
        until_open(&client, 0).await;
        let asked = server.commands_named("version");
        eventually("it is probed", || {
            server.commands_named("version") > asked + 3
        })
        .await;
        assert_eq!(state(&client, 0), BreakerState::Open);
        server.heal().unwrap();
        until_closed(&client, 0).await;
        client.get("k").await.unwrap();
    }
}

/// FAULTS 8: a server that takes no new connections may well serve those it has.
#[tokio::test]
async fn dials_that_fail_condemn_no_node_whose_connections_answer() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .connections(4)
        .attempt_timeout(ms(100))
        .probe(ProbeSettings::default().period(ms(50)))
        .failure_mode(FailureMode::Cancel)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.set_admission(Admission::Silent).unwrap();
    let mut answered = 0;
    let until = Instant::now() + ms(1500);
    while Instant::now() < until {
        answered += u32::from(client.get("k").await.is_ok());
        assert_eq!(
            state(&client, 0),
            BreakerState::Closed,
            "{:?}",
            client.nodes()
        );
        sleep(ms(5)).await;
    }
    assert!(answered > 10, "{answered}");
}

/// The first `good` connections go one way, all others another.
struct Parted {
    dialled: AtomicUsize,
    good: usize,
    others: Address,
}

impl Connector for Parted {
    fn connect(&self, address: &Address) -> Connecting {
        let nth = self.dialled.fetch_add(1, Ordering::Relaxed);
        SystemConnector::new().connect(if nth < self.good {
            address
        } else {
            &self.others
        })
    }
}

/// FAULTS 7: connections that hang, with those made in their place, are the node only if they are
/// most of them.
#[tokio::test]
async fn a_node_is_out_when_most_of_its_connections_are_dead_and_not_before() {
    for (good, out) in [(2, false), (1, true)] {
        let server = server().await;
        let well = Proxy::listen(server.address().unwrap()).await.unwrap();
        let hangs = Proxy::listen(server.address().unwrap()).await.unwrap();
        let client = Client::builder()
            .nodes([well.address().to_string()])
            .executor(Executor::current())
            .connections(4)
            .attempt_timeout(ms(100))
            .timeout(ms(150))
            .failure_mode(FailureMode::Cancel)
            // Only what connections do counts here.
            .breaker(
                BreakerSettings::default()
                    .failure_rate(101)
                    .slow_call_rate(101),
            )
            .probe(ProbeSettings::default().initial_delay(ms(60_000)))
            .connector(Parted {
                dialled: AtomicUsize::new(0),
                good,
                others: hangs.address().to_string().parse().unwrap(),
            })
            .build()
            .unwrap();
        while client.nodes()[0].connections < 4 {
            client.get("k").await.unwrap();
        }
        hangs.set(Flow::Both, Toxics::new().blackhole());
        let until = Instant::now() + ms(if out { 20_000 } else { 3_000 });
        while Instant::now() < until && state(&client, 0) == BreakerState::Closed {
            let _ = join_all((0..8).map(|_| client.get("k"))).await;
        }
        assert_eq!(
            state(&client, 0) != BreakerState::Closed,
            out,
            "{good} of 4 are well"
        );
    }
}

#[tokio::test]
async fn a_node_that_opens_lets_go_of_all_that_is_on_its_way_to_it() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .connections(2)
        .attempt_timeout(ms(30_000))
        .timeout(ms(30_000))
        .failure_mode(FailureMode::Cancel)
        // The first doubt is one too many.
        .journal(JournalSettings::default().capacity(0))
        .build()
        .unwrap();
    for _ in 0..4 {
        client.get("k").await.unwrap();
    }
    server.stall();
    let waiting: Vec<_> = (0..10)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.get("k").await })
        })
        .collect();
    eventually("they are under way", || client.nodes()[0].in_flight == 10).await;
    sleep(ms(50)).await;
    let dropped = tokio::time::timeout(ms(50), client.set("k", "v", Ttl::NEVER));
    assert!(dropped.await.is_err());
    let began = Instant::now();
    for waiter in waiting {
        let error = waiter.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NodeUnavailable, "{error}");
    }
    assert!(began.elapsed() < ms(10_000), "{:?}", began.elapsed());
    assert_eq!(client.nodes()[0].cause, Some(EjectionCause::Journal));
    eventually("its connections are closed", || {
        client.nodes()[0].connections == 0
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn failures_open_at_half_of_the_requests_and_not_before() {
    for (nth, opens) in [(2, true), (3, false)] {
        let calls = Arc::new(AtomicUsize::new(0));
        let service = service_fn(move |_: Request| {
            let call = calls.fetch_add(1, Ordering::Relaxed);
            async move {
                if call.is_multiple_of(nth) {
                    return Err(BoxError::from(tower::timeout::error::Elapsed::new()));
                }
                Ok(Response::Value(None))
            }
        });
        // Time-outs in a row are another matter.
        let breaker = BreakerSettings::default().consecutive_timeouts(1000);
        let settings = NodeSettings::default()
            .breaker(breaker)
            .probe(ProbeSettings::default().initial_delay(ms(3_600_000)));
        let mut node = Node::new("n", service, settings, &Executor::current()).unwrap();
        for request in 0..200 {
            let _ = node.call(get("k")).await;
            sleep(ms(20)).await;
            assert!(request > 18 || !node.is_open(), "too soon: {request}");
        }
        assert_eq!(node.is_open(), opens, "each {nth}th fails");
        let cause = opens.then_some(EjectionCause::FailureRate);
        assert_eq!(node.status().cause, cause);
    }
}

#[tokio::test(start_paused = true)]
async fn slow_answers_open_at_four_fifths_of_the_requests_and_not_before() {
    for (of_ten, opens) in [(9, true), (7, false)] {
        let calls = Arc::new(AtomicUsize::new(0));
        let service = service_fn(move |_: Request| {
            let slow = calls.fetch_add(1, Ordering::Relaxed) % 10 < of_ten;
            async move {
                sleep(ms(if slow { 20 } else { 10 })).await;
                Ok::<_, BoxError>(Response::Value(None))
            }
        });
        let settings =
            NodeSettings::default().probe(ProbeSettings::default().initial_delay(ms(3_600_000)));
        let mut node = Node::new("n", service, settings, &Executor::current()).unwrap();
        for _ in 0..300 {
            let _ = node.call(get("k")).await;
        }
        assert_eq!(node.is_open(), opens, "{of_ten} of ten are slow");
        let cause = opens.then_some(EjectionCause::SlowCalls);
        assert_eq!(node.status().cause, cause);
    }
}

#[tokio::test]
async fn a_server_that_answers_in_time_but_slowly_is_taken_out() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .attempt_timeout(ms(400))
        .failure_mode(FailureMode::Cancel)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.delay(ms(250));
    let until = Instant::now() + ms(10_000);
    while state(&client, 0) == BreakerState::Closed {
        assert!(Instant::now() < until, "{:?}", client.nodes());
        let asked = join_all((0..10).map(|_| client.get("k"))).await;
        drop(asked);
    }
    assert_eq!(client.nodes()[0].cause, Some(EjectionCause::SlowCalls));
}

/// G8's other half: when we are late, no node is to blame.
#[tokio::test]
async fn a_runtime_that_is_blocked_ejects_nobody() {
    let servers = servers(3).await;
    let client = Client::builder()
        .nodes(addresses(&servers))
        .executor(Executor::current())
        .build()
        .unwrap();
    for _ in 0..15 {
        let gets = tokio::spawn({
            let client = client.clone();
            async move { join_all((0..50).map(|n| client.get(format!("j{n}")))).await }
        });
        tokio::task::yield_now().await;
        // Servers, connections and callers all live in this thread.
        let blocked = Instant::now();
        while blocked.elapsed() < ms(100) {}
        let _ = gets.await;
    }
    for status in client.nodes() {
        assert_eq!(status.state, BreakerState::Closed, "{status:?}");
        assert_eq!(status.cause, None, "{status:?}");
    }
}

/// FAULTS 18.
#[tokio::test]
async fn a_node_that_fails_again_and_again_is_left_alone_for_longer_and_longer() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .breaker(
            BreakerSettings::default()
                .reopening(ms(800), ms(1200))
                .ramp(ms(50)),
        )
        .probe(ProbeSettings::default().period(ms(100)))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    let mut out_for = Vec::new();
    for _ in 0..4 {
        server.refuse();
        until_open(&client, 0).await;
        let since = Instant::now();
        server.accept().unwrap();
        until_closed(&client, 0).await;
        out_for.push(since.elapsed());
    }
    assert!(out_for[0] < ms(700), "{out_for:?}");
    assert!(out_for[1] > ms(640), "800 ms less a fifth: {out_for:?}");
    assert!(out_for[2] > ms(960), "1,200 ms less a fifth: {out_for:?}");
    assert!(
        out_for[3] > ms(960) && out_for[3] < ms(3000),
        "the longest: {out_for:?}"
    );
}

#[tokio::test]
async fn keys_come_back_one_by_one_and_each_stays() {
    let servers = servers(2).await;
    let client = patient(&servers)
        .breaker(BreakerSettings::default().ramp(ms(1500)))
        .build()
        .unwrap();
    let keys = keys_of(&servers, 0, 100);
    for key in &keys {
        client.set(key, "home", Ttl::NEVER).await.unwrap();
    }
    servers[0].refuse();
    until_open(&client, 0).await;
    servers[0].accept().unwrap();
    eventually("it is back", || state(&client, 0) == BreakerState::Ramping).await;
    let began = Instant::now();
    let mut home: HashMap<&Key, Duration> = HashMap::new();
    while state(&client, 0) == BreakerState::Ramping {
        for key in &keys {
            let is_home = client.get(key).await.unwrap().is_some();
            assert!(
                is_home || !home.contains_key(key),
                "{key:?} went back and forth"
            );
            if is_home {
                home.entry(key).or_insert_with(|| began.elapsed());
            }
        }
    }
    let early = home.values().filter(|at| **at < ms(750)).count();
    assert!(
        (20..=80).contains(&early),
        "{early} of 100 in the first half"
    );
    for key in &keys {
        assert!(client.get(key).await.unwrap().is_some());
    }
}

#[tokio::test]
async fn a_failure_while_it_takes_its_keys_back_takes_a_node_out_again() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .attempt_timeout(ms(150))
        .breaker(BreakerSettings::default().ramp(ms(60_000)))
        .failure_mode(FailureMode::Cancel)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.refuse();
    until_open(&client, 0).await;
    server.accept().unwrap();
    eventually("it is back", || state(&client, 0) == BreakerState::Ramping).await;
    client.get("k").await.unwrap();
    server.stall();
    // Unless the time-out is found late, by a busy machine's fault.
    while state(&client, 0) == BreakerState::Ramping {
        client.get("k").await.unwrap_err();
    }
    assert_eq!(client.nodes()[0].cause, Some(EjectionCause::Ramp));
}

#[tokio::test]
async fn what_happens_to_nodes_can_be_followed() {
    let servers = servers(2).await;
    let client = patient(&servers).build().unwrap();
    let mut events = client.node_events();
    for _ in 0..2 {
        assert_eq!(events.next().await.unwrap().state, BreakerState::Closed);
    }
    client.get_many(keys_of(&servers, 1, 1)).await;
    servers[1].refuse();
    let opened = events.next().await.unwrap();
    assert_eq!(*opened.node, *addresses(&servers)[1]);
    assert_eq!(opened.state, BreakerState::Open);
    assert_eq!(opened.cause, Some(EjectionCause::Refused));
    assert!(opened.since.elapsed().unwrap() < ms(10_000));
    servers[1].accept().unwrap();
    let mut states = Vec::new();
    while states.last() != Some(&BreakerState::Closed) {
        states.push(events.next().await.unwrap().state);
    }
    states.retain(|&state| state != BreakerState::Open);
    let expected = [
        BreakerState::HalfOpen,
        BreakerState::Ramping,
        BreakerState::Closed,
    ];
    assert!(states.ends_with(&expected), "{states:?}");
    client.set_nodes([addresses(&servers)[0].as_str()]).unwrap();
    drop(client);
    assert!(events.next().await.is_none(), "it ends with the client");
}

#[tokio::test]
async fn no_more_nodes_are_stood_in_for_than_is_allowed() {
    for (percent, moved) in [(0, false), (33, false), (34, true)] {
        let servers = servers(3).await;
        let client = patient(&servers)
            .max_ejection_percent(percent)
            .build()
            .unwrap();
        let keys = keys_of(&servers, 1, 1);
        client.get(&keys[0]).await.unwrap();
        servers[1].refuse();
        until_open(&client, 1).await;
        let read = client.get(&keys[0]).await;
        assert_eq!(read.is_ok(), moved, "{percent} %");
        if let Err(error) = read {
            assert_eq!(error.kind(), ErrorKind::NodeUnavailable);
        }
    }
}

/// The first connection leads to a server that is slow, all others to one that is not.
struct Uneven {
    dialled: AtomicUsize,
    fast: Address,
}

impl Connector for Uneven {
    fn connect(&self, address: &Address) -> Connecting {
        let first = self.dialled.fetch_add(1, Ordering::Relaxed) == 0;
        SystemConnector::new().connect(if first { address } else { &self.fast })
    }
}

#[tokio::test]
async fn a_get_that_takes_long_is_asked_again_over_another_connection() {
    for hedged in [true, false] {
        let servers = servers(2).await;
        for server in &servers {
            server.insert("k", "v");
        }
        let client = patient(&servers[..1])
            .connections(2)
            .hedged_gets(hedged)
            .connector(Uneven {
                dialled: AtomicUsize::new(0),
                fast: addresses(&servers)[1].parse().unwrap(),
            })
            .breaker(BreakerSettings::default().slow_call_rate(101))
            // It would not read what it has written.
            .probe(ProbeSettings::default().initial_delay(ms(60_000)))
            .build()
            .unwrap();
        // What is usual must be known first, and is taken stock of each second.
        for _ in 0..100 {
            client.get("k").await.unwrap();
        }
        sleep(ms(1300)).await;
        servers[0].delay(ms(600));
        let mut longest = Duration::ZERO;
        for _ in 0..10 {
            let began = Instant::now();
            assert_eq!(client.get("k").await.unwrap().unwrap(), "v");
            longest = longest.max(began.elapsed());
        }
        assert_eq!(longest < ms(500), hedged, "{longest:?}");
    }
    let one = Client::builder().nodes(["a"]).hedged_gets(true);
    let error = one.build().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
}

#[tokio::test]
async fn a_period_without_end_means_no_probes() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .probe(
            ProbeSettings::default()
                .initial_delay(ms(1))
                .period(Duration::MAX),
        )
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    sleep(ms(300)).await;
    assert!(server.commands() < 20, "{}", server.commands());
}
