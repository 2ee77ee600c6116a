//! What redistribute, cancel and retry do, and that only probes bring a node back.

use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;
use tower_memcached::testing::Server;
use tower_memcached::{
    BreakerState, Client, ErrorKind, FailureMode, JournalOverflow, JournalSettings, Outcome,
    ProbeSettings, RetryBudget, Sent, Ttl,
};

use crate::support::{addresses, keys_of, patient, servers, state, until_closed, until_open};

/// Short enough to be waited for, long enough for a busy machine.
const ATTEMPT: Duration = Duration::from_millis(150);

fn client(servers: &[Server], mode: FailureMode) -> Client {
    patient(servers)
        .failure_mode(mode)
        .attempt_timeout(ATTEMPT)
        // Not again within a test, unless it waits for it.
        .probe(ProbeSettings::default().period(Duration::from_millis(300)))
        .build()
        .unwrap()
}

fn is_canary(line: &[u8]) -> bool {
    String::from_utf8_lossy(line).contains("canary")
}

fn commands(server: &Server) -> u64 {
    server.commands_named("mg") + server.commands_named("ms") + server.commands_named("md")
}

#[tokio::test]
async fn redistribute_moves_a_refused_nodes_keys_to_the_next_node() {
    let servers = servers(3).await;
    let client = client(&servers, FailureMode::Redistribute);
    let keys = keys_of(&servers, 1, 20);
    for key in &keys {
        client.set(key, "home", Ttl::NEVER).await.unwrap();
    }
    servers[1].refuse();
    until_open(&client, 1).await;
    for key in &keys {
        assert_eq!(
            client.get(key).await.unwrap(),
            None,
            "the next node does not have it"
        );
        client.set(key, "away", Ttl::NEVER).await.unwrap();
        assert_eq!(client.get(key).await.unwrap().unwrap(), "away");
        assert!(client.touch(key, Ttl::NEVER).await.unwrap());
    }
    // Nothing written away from home may outlive the outage for long.
    let moved = servers
        .iter()
        .flat_map(Server::requests)
        .filter(|line| line.starts_with(b"ms ") && !String::from_utf8_lossy(line).contains(" T0 "));
    let capped = moved.filter(|line| String::from_utf8_lossy(line).contains(" T60 "));
    assert_eq!(capped.count(), keys.len());
    let uncapped = servers[0]
        .requests()
        .into_iter()
        .chain(servers[2].requests());
    let touches = uncapped.filter(|line| String::from_utf8_lossy(line).contains(" T0 "));
    assert_eq!(touches.count(), 0, "a touch is capped as well");
    let many = client.get_many(&keys).await;
    assert!(
        many.outcomes()
            .iter()
            .all(|outcome| matches!(outcome, Outcome::Hit(_)))
    );
}

#[tokio::test]
async fn redistribute_moves_what_is_in_flight_when_a_node_stops_answering() {
    let servers = servers(3).await;
    let client = client(&servers, FailureMode::Redistribute);
    let keys = keys_of(&servers, 0, 50);
    client.get_many(&keys).await;
    servers[0].stall();
    let started = Instant::now();
    let gets = keys.iter().map(|key| client.get(key));
    for outcome in join_all(gets).await {
        assert_eq!(outcome.unwrap(), None);
    }
    let many = client.get_many(&keys).await;
    assert_eq!(many.errors().count(), 0);
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn an_open_node_gets_probes_only_and_they_alone_bring_it_back() {
    let servers = servers(3).await;
    let client = client(&servers, FailureMode::Redistribute);
    let keys = keys_of(&servers, 2, 10);
    client.get_many(&keys).await;
    servers[2].refuse();
    until_open(&client, 2).await;
    // It answers again, but until probes have said so nobody else asks it.
    let known = servers[2].requests().len();
    servers[2].accept().unwrap();
    let greeting = |line: &[u8]| line.starts_with(b"version") || line.starts_with(b"mn");
    let probe = |line: &[u8]| greeting(line) || is_canary(line);
    loop {
        for outcome in join_all(keys.iter().map(|key| client.get(key))).await {
            outcome.unwrap();
        }
        let asked = servers[2].requests().split_off(known);
        if let BreakerState::Ramping | BreakerState::Closed = state(&client, 2) {
            break;
        }
        assert!(asked.iter().all(|line| probe(line)), "{asked:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let canaries = servers[2]
        .requests()
        .iter()
        .filter(|line| is_canary(line))
        .count();
    assert_eq!(canaries, 4, "two probes, each a write and a read");
    until_closed(&client, 2).await;
    client.set(&keys[0], "back", Ttl::NEVER).await.unwrap();
    assert!(servers[2].peek(keys[0].as_bytes()).is_some());
}

#[tokio::test]
async fn a_node_that_may_serve_what_it_has_comes_back_with_its_journal_overflowed() {
    let servers = servers(3).await;
    let journal = JournalSettings::default().capacity(1);
    let client = patient(&servers)
        .attempt_timeout(ATTEMPT)
        .journal(journal.overflow(JournalOverflow::Serve))
        .build()
        .unwrap();
    let keys = keys_of(&servers, 2, 3);
    client.get_many(&keys).await;
    servers[2].refuse();
    until_open(&client, 2).await;
    for key in &keys {
        client.set(key, "away", Ttl::NEVER).await.unwrap();
    }
    servers[2].accept().unwrap();
    until_closed(&client, 2).await;
}

#[tokio::test]
async fn a_node_that_answers_its_version_and_nothing_else_stays_out() {
    let servers = servers(3).await;
    let client = client(&servers, FailureMode::Redistribute);
    let keys = keys_of(&servers, 2, 10);
    client.get_many(&keys).await;
    servers[2].rewrite_replies(|line, reply| match line.starts_with(b"version") {
        true => reply,
        false => Vec::new(),
    });
    while state(&client, 2) == BreakerState::Closed {
        client.get_many(&keys).await;
    }
    let probes = servers[2].connections_accepted();
    crate::support::eventually("it is probed again and again", || {
        servers[2].connections_accepted() >= probes + 3
    })
    .await;
    assert_ne!(state(&client, 2), BreakerState::Closed);
    servers[2].heal().unwrap();
    until_closed(&client, 2).await;
}

#[tokio::test]
async fn cancel_fails_at_once_and_unsent() {
    let servers = servers(3).await;
    let client = client(&servers, FailureMode::Cancel);
    let keys = keys_of(&servers, 1, 5);
    client.get_many(&keys).await;
    servers[1].refuse();
    until_open(&client, 1).await;
    let before: u64 = servers.iter().map(commands).sum();
    let started = Instant::now();
    for key in &keys {
        let error = client.get(key).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NodeUnavailable, "{error}");
        assert_eq!(error.sent(), Sent::No);
        assert_eq!(error.node(), Some(addresses(&servers)[1].as_str()));
        let error = client.set(key, "v", Ttl::NEVER).await.unwrap_err();
        assert_eq!(error.sent(), Sent::No);
    }
    assert!(
        started.elapsed() < Duration::from_millis(100),
        "{:?}",
        started.elapsed()
    );
    let after: u64 = servers.iter().map(commands).sum();
    assert_eq!(after, before, "no node was asked");
    let others = keys_of(&servers, 0, 5);
    let many = client.get_many(keys.iter().chain(&others)).await;
    assert_eq!(
        many.errors().count(),
        5,
        "its own keys are errors, not misses"
    );
    assert_eq!(
        many.outcomes()[5..]
            .iter()
            .filter(|o| matches!(o, Outcome::Miss))
            .count(),
        5
    );
}

#[tokio::test]
async fn retry_waits_for_the_node_and_succeeds_when_it_is_back() {
    let servers = servers(3).await;
    let client = client(&servers, FailureMode::Retry);
    let key = keys_of(&servers, 1, 1).remove(0);
    client.set(&key, "v", Ttl::NEVER).await.unwrap();
    servers[1].refuse();
    until_open(&client, 1).await;
    let back = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        servers[1].accept().unwrap();
    };
    let (value, ()) = tokio::join!(client.get(&key), back);
    assert_eq!(value.unwrap().unwrap(), "v");
}

#[tokio::test]
async fn retry_ends_at_its_deadline() {
    let servers = servers(3).await;
    let client = client(&servers, FailureMode::Retry);
    let key = keys_of(&servers, 1, 1).remove(0);
    servers[1].refuse();
    let timeout = Duration::from_millis(300);
    let client = client.with_timeout(timeout).unwrap();
    let started = Instant::now();
    let error = client.get(&key).await.unwrap_err();
    let took = started.elapsed();
    assert!(took >= timeout && took < timeout * 4, "{took:?}");
    assert_eq!(error.sent(), Sent::No, "{error}");
    // And get_many, key by key.
    let keys = keys_of(&servers, 1, 3);
    let others = keys_of(&servers, 0, 3);
    let many = client.get_many(keys.iter().chain(&others)).await;
    assert_eq!(
        many.errors().map(|(place, _)| place).collect::<Vec<_>>(),
        [0, 1, 2]
    );
}

#[tokio::test]
async fn what_must_not_run_twice_is_neither_moved_nor_repeated() {
    let servers = servers(3).await;
    for mode in [FailureMode::Redistribute, FailureMode::Retry] {
        let client = client(&servers, mode)
            .with_timeout(Duration::from_millis(600))
            .unwrap();
        let key = keys_of(&servers, 1, 1).remove(0);
        client.set(&key, "1", Ttl::NEVER).await.unwrap();
        // It executes what it gets, and its replies do not come back.
        servers[1].rewrite_replies(|line, reply| match line.starts_with(b"version") {
            true => reply,
            false => Vec::new(),
        });
        let before = servers[1].commands_named("ma");
        let error = client.increment(&key, 1).await.unwrap_err();
        assert_eq!(error.sent(), Sent::Maybe, "{error}");
        assert_eq!(servers[1].commands_named("ma"), before + 1, "{mode:?}");
        for elsewhere in [0, 2] {
            assert_eq!(servers[elsewhere].commands_named("ma"), 0);
        }
        let before: u64 = servers
            .iter()
            .map(|server| server.commands_named("ms"))
            .sum();
        assert!(client.append(&key, "x").await.is_err());
        assert!(client.add(&key, "x", Ttl::NEVER).await.is_err());
        let after: u64 = servers
            .iter()
            .map(|server| server.commands_named("ms"))
            .sum();
        let requests = servers[1].requests();
        let canaries = requests
            .iter()
            .filter(|line| line.starts_with(b"ms") && is_canary(line));
        assert!(after - before <= 2 + canaries.count() as u64);
        servers[1].heal().unwrap();
        until_closed(&client, 1).await;
    }
    // Its node being open, it fails unsent rather than being moved.
    let client = client(&servers, FailureMode::Redistribute);
    let key = keys_of(&servers, 1, 1).remove(0);
    client.get(&key).await.unwrap();
    servers[1].refuse();
    until_open(&client, 1).await;
    let error = client.increment(&key, 1).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::NodeUnavailable, Sent::No)
    );
}

#[tokio::test]
async fn when_most_nodes_are_out_the_rest_are_not_loaded_with_their_keys() {
    let servers = servers(3).await;
    let client = client(&servers, FailureMode::Redistribute);
    let keys: Vec<_> = (0..3)
        .map(|index| keys_of(&servers, index, 1).remove(0))
        .collect();
    client.get_many(&keys).await;
    servers[0].refuse();
    until_open(&client, 0).await;
    assert_eq!(
        client.get(&keys[0]).await.unwrap(),
        None,
        "one of three may be moved"
    );
    servers[1].refuse();
    until_open(&client, 1).await;
    let before = commands(&servers[2]);
    for key in &keys[..2] {
        let error = client.get(key).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.sent()),
            (ErrorKind::NodeUnavailable, Sent::No)
        );
    }
    assert_eq!(commands(&servers[2]), before);
    client.get(&keys[2]).await.unwrap();
}

#[tokio::test]
async fn a_lost_connection_is_not_a_lost_node() {
    let servers = servers(3).await;
    let client = client(&servers, FailureMode::Redistribute);
    let key = keys_of(&servers, 1, 1).remove(0);
    client.set(&key, "v", Ttl::NEVER).await.unwrap();
    for _ in 0..30 {
        servers[1].reset_connections();
        assert_eq!(
            client.get(&key).await.unwrap().unwrap(),
            "v",
            "from its own node"
        );
    }
    assert_eq!(state(&client, 1), BreakerState::Closed);
}

#[tokio::test]
async fn retries_spend_a_budget() {
    let servers = servers(3).await;
    let client = patient(&servers)
        .attempt_timeout(ATTEMPT)
        .retry_budget(RetryBudget::new(0, 0))
        .build()
        .unwrap();
    let key = keys_of(&servers, 1, 1).remove(0);
    client.get(&key).await.unwrap();
    // Cut at every reply, and good again on the next connection: each get is one repetition.
    servers[1].rewrite_replies(|line, reply| match line.starts_with(b"version") {
        true => reply,
        false => b"nonsense\r\n".to_vec(),
    });
    let mut moved = 0;
    let mut failed = 0;
    for _ in 0..130 {
        match client.get(&key).await {
            Ok(_) => moved += 1,
            Err(_) => failed += 1,
        }
    }
    assert!(
        moved <= 100,
        "{moved} moved and {failed} failed on a budget of 100"
    );
    assert!(failed >= 30);
}

#[tokio::test]
async fn the_topology_is_replaced_as_a_whole_and_known_nodes_keep_their_connections() {
    let servers = servers(3).await;
    let client = client(&servers[..2], FailureMode::Redistribute);
    let keys: Vec<String> = (0..100).map(|n| format!("key-{n}")).collect();
    client.get_many(&keys).await;
    let reading = async {
        for _ in 0..50 {
            for outcome in client.get_many(&keys).await.outcomes() {
                assert!(!matches!(outcome, Outcome::Error(_)), "{outcome:?}");
            }
        }
    };
    let changing = async {
        for round in 0..20 {
            let count = if round % 2 == 0 { 3 } else { 2 };
            client.set_nodes(addresses(&servers[..count])).unwrap();
            tokio::task::yield_now().await;
        }
    };
    tokio::join!(reading, changing);
    assert_eq!(client.nodes().len(), 2);
    assert_eq!(servers[0].connections_accepted(), 1);
    assert_eq!(servers[1].connections_accepted(), 1);
    let error = client.set_nodes([] as [&str; 0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    assert_eq!(client.nodes().len(), 2, "as it was");
    // A node that is gone closes its connections.
    client.set_nodes(addresses(&servers[..1])).unwrap();
    crate::support::eventually("it is closed", || servers[1].open_connections() == 0).await;
}
