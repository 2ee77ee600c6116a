//! Nodes that are found, and known by their names wherever they are.
#![cfg(feature = "testing")]

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::channel::mpsc::{UnboundedSender, unbounded};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};
use tower_memcached::testing::Server;
use tower_memcached::{
    Address, BoxStream, BreakerState, Client, Connecting, Connector, Discovery, Error, ErrorKind,
    Executor, GroupSettings, JournalSettings, Key, NodeSpec, Ring, Sent, Ttl,
};

/// Waits until a condition holds.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + secs(30);
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        sleep(ms(2)).await;
    }
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Servers in this process: `10.0.0.1`, `10.0.1.1` and so on all lead to the second one.
#[derive(Clone, Default)]
struct Places {
    servers: Vec<Server>,
    /// At these nothing listens.
    gone: Arc<Mutex<Vec<usize>>>,
}

impl Places {
    fn of(servers: &[Server]) -> Self {
        Self {
            servers: servers.to_vec(),
            ..Self::default()
        }
    }
}

impl Connector for Places {
    fn connect(&self, address: &Address) -> Connecting {
        let (host, _) = address.host_and_port().unwrap();
        let place: usize = host.rsplit('.').next().unwrap().parse().unwrap();
        let gone = self.gone.lock().unwrap().contains(&place);
        let server = self.servers[place].clone();
        Box::pin(async move {
            if gone {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            tokio::spawn(server.serve(theirs));
            Ok(Box::new(ours) as BoxStream)
        })
    }
}

/// `cache-0` at `10.0.0.0`, and so on.
fn specs(places: &[(usize, &str)]) -> Vec<NodeSpec> {
    let spec = |(number, address): &(usize, &str)| {
        let spec = NodeSpec::new(&format!("cache-{number}")).unwrap();
        spec.at(address).unwrap()
    };
    places.iter().map(spec).collect()
}

fn client_of(servers: &[Server], nodes: Vec<NodeSpec>) -> Client {
    let client = Client::builder()
        .nodes(["10.0.0.0"])
        .connector(Places::of(servers))
        .executor(Executor::current())
        .build()
        .unwrap();
    client.set_node_specs(nodes).unwrap();
    client
}

fn keys_of(nodes: &[NodeSpec], index: usize, count: usize) -> Vec<Key> {
    let keys = (0..).map(|n| Key::new(format!("key-{n}")).unwrap());
    let own = keys.filter(|key| Ring::default().node_of(nodes, key) == Some(index));
    own.take(count).collect()
}

async fn read(client: &Client, key: &Key) -> Option<String> {
    let value = client.get(key).await.unwrap()?;
    Some(String::from_utf8(value.to_vec()).unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_node_that_moves_keeps_its_keys_and_is_asked_where_it_is() {
    let servers = [Server::new(), Server::new(), Server::new()];
    let before = specs(&[(0, "10.0.0.0"), (1, "10.0.0.1")]);
    let after = specs(&[(0, "10.0.0.0"), (1, "10.0.0.2")]);
    let client = client_of(&servers, before.clone());
    let fingerprint = client.ring_fingerprint();
    let keys = [keys_of(&before, 0, 20), keys_of(&before, 1, 20)];
    for key in keys.iter().flatten() {
        client.set(key, "v", Ttl::NEVER).await.unwrap();
    }
    client.set_node_specs(after.clone()).unwrap();
    assert_eq!(client.ring_fingerprint(), fingerprint);
    assert!(client.nodes().iter().all(|node| node.ring == fingerprint));
    for (index, keys) in keys.iter().enumerate() {
        for key in keys {
            assert_eq!(Ring::default().node_of(&after, key), Some(index));
            // The one that has moved is another server here, and empty.
            let found = client.get(key).await.unwrap().is_some();
            assert_eq!(found, index == 0);
            client.set(key, "w", Ttl::NEVER).await.unwrap();
        }
    }
    assert_eq!(servers[0].len(), 20);
    assert_eq!(servers[2].len(), 20);
    for key in &keys[1] {
        assert_eq!(servers[1].peek(key.as_bytes()).unwrap(), "v");
        assert_eq!(servers[2].peek(key.as_bytes()).unwrap(), "w");
    }
    sleep(ms(500)).await;
    assert_eq!(servers[1].open_connections(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_server_with_a_new_address_is_not_read_as_it_was_when_it_left() {
    let servers = [Server::new(), Server::new()];
    let both = specs(&[(0, "10.0.0.0"), (1, "10.0.0.1")]);
    let client = client_of(&servers, both.clone());
    let keys = keys_of(&both, 1, 10);
    for key in &keys {
        client.set(key, "1", Ttl::NEVER).await.unwrap();
    }
    client.set_node_specs(both[..1].to_vec()).unwrap();
    for key in &keys[..5] {
        client.set(key, "2", Ttl::NEVER).await.unwrap();
    }
    // The same server, which the client cannot know.
    client
        .set_node_specs(specs(&[(0, "10.0.0.0"), (1, "10.0.9.1")]))
        .unwrap();
    for key in &keys[..5] {
        assert_ne!(read(&client, key).await.as_deref(), Some("1"));
    }
    assert_eq!(read(&client, &keys[5]).await.as_deref(), Some("1"));
    sleep(ms(500)).await;
    assert_eq!(client.nodes()[1].journal, 0);
    for key in &keys[..5] {
        assert_eq!(servers[1].peek(key.as_bytes()), None, "it is deleted there");
    }
}

/// While it is one of the nodes under its new address its keys are written at another node, for the
/// list is another one again.
#[tokio::test(start_paused = true)]
async fn what_is_written_elsewhere_after_a_move_is_forgotten_at_the_new_address_too() {
    let servers = [Server::new(), Server::new(), Server::new()];
    let two = specs(&[(0, "10.0.0.0"), (1, "10.0.0.1")]);
    let client = client_of(&servers, two.clone());
    let three = specs(&[(0, "10.0.0.0"), (1, "10.0.9.1"), (2, "10.0.0.2")]);
    let key = &keys_of(&two, 1, 500)
        .into_iter()
        .find(|key| Ring::default().node_of(&three, key) == Some(2))
        .unwrap();
    client.set(key, "1", Ttl::NEVER).await.unwrap();
    client.set_node_specs(three.clone()).unwrap();
    client.set(key, "2", Ttl::NEVER).await.unwrap();
    client.set_node_specs(three[..2].to_vec()).unwrap();
    assert_eq!(read(&client, key).await, None);
}

#[tokio::test(start_paused = true)]
async fn nodes_that_change_places_are_believed_nothing_old() {
    let servers = [Server::new(), Server::new()];
    let straight = specs(&[(0, "10.0.0.0"), (1, "10.0.0.1")]);
    let crossed = specs(&[(0, "10.0.0.1"), (1, "10.0.0.0")]);
    let client = client_of(&servers, straight.clone());
    let keys = [keys_of(&straight, 0, 5), keys_of(&straight, 1, 5)].concat();
    for round in 0..6 {
        let (now, next) = (round.to_string(), (round + 1).to_string());
        for key in &keys {
            client.set(key, now.clone(), Ttl::NEVER).await.unwrap();
            assert_eq!(read(&client, key).await, Some(now.clone()), "{round}");
        }
        let nodes = [&crossed, &straight][round % 2].clone();
        client.set_node_specs(nodes).unwrap();
        for key in &keys {
            assert_eq!(read(&client, key).await, None, "{round}");
            client.set(key, next.clone(), Ttl::NEVER).await.unwrap();
            assert_eq!(read(&client, key).await, Some(next.clone()), "{round}");
        }
    }
}

#[test]
fn two_names_of_one_place_are_refused() {
    let servers = [Server::new()];
    let client = client_of(&servers, specs(&[(0, "10.0.0.0")]));
    let refused = client.set_node_specs(specs(&[(0, "10.0.0.0"), (1, "10.0.0.0")]));
    let error = refused.unwrap_err().to_string();
    assert!(
        error.contains("\"cache-1\" is at 10.0.0.0:11211"),
        "{error}"
    );
}

type Lists = UnboundedSender<Result<Vec<NodeSpec>, io::Error>>;

/// A discovery that finds what it is told.
fn told() -> (Lists, Discovery) {
    let (tell, lists) = unbounded();
    (tell, Discovery::stream(lists))
}

fn discovering(places: Places, discovery: Discovery) -> Client {
    Client::builder()
        .discover(discovery)
        .connector(places)
        .executor(Executor::current())
        .group("group", GroupSettings::default())
        .build()
        .unwrap()
}

/// The numbers of the nodes that there are.
fn numbers(client: &Client) -> Vec<usize> {
    let nodes = client.nodes().into_iter();
    let number = |name: &str| name.rsplit('-').next().unwrap().parse().unwrap();
    nodes.map(|node| number(&node.node)).collect()
}

fn of(numbers: &[usize]) -> Vec<NodeSpec> {
    let places = numbers.iter().map(|n| (*n, format!("10.0.0.{n}")));
    let places: Vec<_> = places.collect();
    let places: Vec<_> = places.iter().map(|(n, at)| (*n, at.as_str())).collect();
    specs(&places)
}

fn four() -> Vec<Server> {
    (0..4).map(|_| Server::new()).collect()
}

#[tokio::test(start_paused = true)]
async fn without_nodes_requests_fail_at_once_and_loads_are_made_until_some_are_found() {
    let servers = four();
    let (tell, discovery) = told();
    let client = discovering(Places::of(&servers), discovery);
    let began = Instant::now();
    let unavailable = |error: Error| {
        assert_eq!(error.kind(), ErrorKind::NodeUnavailable, "{error}");
        assert_eq!(error.sent(), Sent::No);
        assert!(
            error.to_string().contains("has found no nodes yet"),
            "{error}"
        );
    };
    for _ in 0..2 {
        unavailable(client.get("k").await.unwrap_err());
        unavailable(client.set("k", "v", Ttl::NEVER).await.unwrap_err());
        unavailable(client.delete("k").await.unwrap_err());
        unavailable(client.increment("k", 1).await.unwrap_err());
        unavailable(client.add("k", "v", Ttl::NEVER).await.unwrap_err());
        unavailable(client.version().await.unwrap_err());
        unavailable(client.flush_all().await.unwrap_err());
        unavailable(client.stats().await.unwrap_err());
        let group = client.group("group").unwrap();
        unavailable(group.get("k").await.unwrap_err());
        for outcome in client.get_many(["a", "b"]).await.into_outcomes() {
            unavailable(outcome.into_result().unwrap_err());
        }
        let load = || async { Ok::<_, io::Error>(Some("loaded")) };
        let loaded = client.get_or_load("k", Ttl::NEVER, load).await.unwrap();
        assert_eq!(loaded.as_deref(), Some(&b"loaded"[..]));
        client.invalidate("k").await.unwrap_err();
        assert_eq!(client.nodes().len(), 0);
        assert_eq!(client.ring_fingerprint(), 0);
        // Nor is what a list has that nobody can use.
        tell.unbounded_send(Ok(Vec::new())).unwrap();
        sleep(ms(20)).await;
    }
    assert!(began.elapsed() < ms(100), "{:?}", began.elapsed());
    tell.unbounded_send(Ok(of(&[0, 1]))).unwrap();
    sleep(ms(20)).await;
    assert_eq!(numbers(&client), [0, 1]);
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    assert_eq!(
        read(&client, &Key::new("k").unwrap()).await.as_deref(),
        Some("v")
    );
    let report = client.shutdown(secs(1)).await;
    assert!(report.is_clean(), "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_client_without_nodes_can_be_shut_down() {
    let (tell, discovery) = told();
    let client = discovering(Places::default(), discovery);
    let report = client.shutdown(secs(1)).await;
    assert!(report.is_clean(), "{report}");
    sleep(ms(20)).await;
    assert!(tell.is_closed(), "it is not followed any more");
    assert!(client.discovery().unwrap().ended);
    let error = client.follow(Discovery::fixed(of(&[0]))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shutdown);
}

/// Even if nobody was told that it failed: a kill switch answers for the cache.
#[tokio::test(start_paused = true)]
async fn what_was_written_before_there_were_nodes_is_not_read_as_it_was() {
    let servers = four();
    for server in &servers {
        server.insert("killed", "old");
        server.insert("failed", "old");
        server.insert("other", "old");
    }
    let (tell, discovery) = told();
    let client = discovering(Places::of(&servers), discovery);
    client.delete("failed").await.unwrap_err();
    client.kill_switch().unwrap().throw();
    client.set("killed", "new", Ttl::NEVER).await.unwrap();
    client.kill_switch().unwrap().reset();
    tell.unbounded_send(Ok(of(&[0, 1, 2]))).unwrap();
    sleep(ms(20)).await;
    assert_eq!(client.nodes().len(), 3);
    for _ in 0..2 {
        assert_eq!(client.get("failed").await.unwrap(), None);
        assert_eq!(client.get("killed").await.unwrap(), None);
        assert_eq!(
            client.get("other").await.unwrap().as_deref(),
            Some(&b"old"[..])
        );
        sleep(ms(500)).await;
    }
    assert_eq!(
        client
            .nodes()
            .iter()
            .map(|node| node.journal)
            .sum::<usize>(),
        0
    );
}

/// Everybody else may have written there since.
#[tokio::test(start_paused = true)]
async fn a_client_that_has_waited_long_for_its_nodes_gets_them_all_the_same() {
    let servers = four();
    let keys: Vec<_> = (0..20_000).map(|n| format!("key-{n}")).collect();
    for server in &servers {
        server.insert(&keys[0], "old");
        server.insert(&keys[19_999], "old");
    }
    let (tell, discovery) = told();
    let client = discovering(Places::of(&servers), discovery);
    for key in &keys {
        client.delete(key.as_str()).await.unwrap_err();
    }
    tell.unbounded_send(Ok(of(&[0, 1, 2]))).unwrap();
    for key in [&keys[0], &keys[19_999]] {
        assert_eq!(client.get(key.as_str()).await.unwrap_or(None), None);
    }
    sleep(secs(1)).await;
    let nodes = client.nodes();
    assert!(nodes.iter().all(|node| node.state == BreakerState::Closed));
    // Each is deleted at its home, not all of them everywhere.
    let deletions: u64 = servers
        .iter()
        .map(|server| server.commands_named("md"))
        .sum();
    assert!((20_000..21_000).contains(&deletions), "{deletions}");
    for key in [&keys[0], &keys[19_999]] {
        assert_eq!(client.get(key.as_str()).await.unwrap(), None);
    }
}

/// Which of its nodes take requests.
fn are_in(client: &Client) -> Vec<bool> {
    let takes = |state| matches!(state, BreakerState::Closed | BreakerState::Ramping);
    let nodes = client.nodes().into_iter();
    nodes.map(|node| takes(node.state)).collect()
}

/// A process is known by when it was started, in whole seconds of what is no test's time.
#[expect(clippy::disallowed_methods, reason = "paused time does not count")]
fn a_second_of_real_time() {
    std::thread::sleep(ms(1_100));
}

/// More than can be remembered: then only a server that is empty since has nothing old.
#[tokio::test(start_paused = true)]
async fn what_was_forgotten_of_the_time_without_nodes_keeps_a_server_out_until_it_is_restarted() {
    let servers = four();
    let (tell, discovery) = told();
    let client = Client::builder()
        .discover(discovery)
        .connector(Places::of(&servers))
        .executor(Executor::current())
        .journal(JournalSettings::default().capacity(10))
        .build()
        .unwrap();
    for n in 0..1_000 {
        client.delete(format!("key-{n}")).await.unwrap_err();
    }
    tell.unbounded_send(Ok(of(&[0, 1, 2]))).unwrap();
    sleep(secs(30)).await;
    assert_eq!(are_in(&client), [false, false, false]);
    a_second_of_real_time();
    servers[1].restart_empty();
    sleep(secs(30)).await;
    assert_eq!(are_in(&client), [false, true, false]);
    client.flush_all().await.unwrap();
    sleep(secs(30)).await;
    assert_eq!(are_in(&client), [true, true, true]);
}

#[tokio::test(start_paused = true)]
async fn a_node_of_which_much_was_forgotten_is_not_believed_because_it_has_moved() {
    let mut servers = vec![Server::new(), Server::new()];
    a_second_of_real_time();
    servers.extend([Server::new(), Server::new()]);
    for n in 0..1_000 {
        servers[2].insert(format!("key-{n}"), "old");
    }
    let places = Places::of(&servers);
    let client = Client::builder()
        .nodes(["10.0.0.0"])
        .connector(places.clone())
        .executor(Executor::current())
        .journal(JournalSettings::default().capacity(10))
        .build()
        .unwrap();
    client.set_node_specs(specs(&[(0, "10.0.0.1")])).unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    // It learns whom it has to do with.
    sleep(secs(10)).await;
    places.gone.lock().unwrap().push(1);
    servers[1].close_connections();
    sleep(secs(10)).await;
    for n in 0..1_000 {
        client.delete(format!("key-{n}")).await.unwrap_err();
    }
    // Another server that was there all the time, and may have been asked by others.
    client.set_node_specs(specs(&[(0, "10.0.0.2")])).unwrap();
    for n in 0..1_000 {
        let found = client.get(format!("key-{n}")).await.unwrap_or(None);
        assert_eq!(found, None);
        sleep(ms(20)).await;
    }
    assert_eq!(are_in(&client), [false]);
    // One that has been started since has nothing old.
    servers[3].restart_empty();
    client.set_node_specs(specs(&[(0, "10.0.0.3")])).unwrap();
    sleep(secs(30)).await;
    assert_eq!(are_in(&client), [true]);
}

/// Of hundreds of nodes that are out one changes all the time.
#[tokio::test(start_paused = true)]
async fn a_list_is_heard_while_nodes_change_without_end() {
    let servers = four();
    let (tell, discovery) = told();
    let client = Client::builder()
        .discover(discovery)
        .connector(Places::of(&servers))
        .executor(Executor::current())
        .group("own", GroupSettings::default().nodes(["10.0.0.0"]))
        .build()
        .unwrap();
    let own = client.group("own").unwrap();
    let restless = tokio::spawn(async move {
        loop {
            for nodes in [&["10.0.0.0"][..], &["10.0.0.1"]] {
                own.set_nodes(nodes.iter().copied()).unwrap();
                sleep(ms(1)).await;
            }
        }
    });
    sleep(secs(1)).await;
    tell.unbounded_send(Ok(of(&[2, 3]))).unwrap();
    sleep(secs(1)).await;
    assert_eq!(
        client
            .discovery()
            .unwrap()
            .last_error
            .map(|error| error.to_string()),
        None
    );
    let found = client.nodes().into_iter().map(|node| node.node);
    assert!(found.into_iter().any(|name| &*name == "cache-3"));
    restless.abort();
}

#[tokio::test(start_paused = true)]
async fn nodes_that_are_listed_are_used_until_others_are_found() {
    let servers = four();
    let (tell, discovery) = told();
    let client = Client::builder()
        .nodes(["10.0.0.3"])
        .discover(discovery)
        .connector(Places::of(&servers))
        .executor(Executor::current())
        .build()
        .unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    assert!(servers[3].peek("k").is_some());
    tell.unbounded_send(Ok(of(&[0]))).unwrap();
    sleep(ms(20)).await;
    assert_eq!(numbers(&client), [0]);
}

#[tokio::test(start_paused = true)]
async fn what_fails_or_finds_nothing_takes_no_node_away_and_says_so() {
    let servers = four();
    let (tell, discovery) = told();
    let client = discovering(Places::of(&servers), discovery);
    let status = || client.discovery().unwrap();
    assert!(status().last_found.is_none() && status().last_change.is_none());
    tell.unbounded_send(Ok(of(&[0, 1]))).unwrap();
    sleep(secs(20)).await;
    assert!(status().last_found.is_some() && status().last_change.is_some());
    assert!(status().failing_since.is_none() && status().last_error.is_none());
    let twice = [of(&[2]), of(&[2])].concat();
    let bad = [
        (Err(io::Error::other("no answer")), "no answer"),
        (Ok(Vec::new()), "has found no nodes"),
        (Ok(twice), "is there twice"),
    ];
    for (failures, (list, said)) in (1..).zip(bad) {
        tell.unbounded_send(list).unwrap();
        sleep(secs(20)).await;
        assert_eq!(numbers(&client), [0, 1]);
        let status = status();
        assert_eq!(status.failures, failures);
        assert!(status.failing_since.is_some() && !status.ended);
        let error = status.last_error.unwrap();
        assert!(error.to_string().contains(said), "{error}");
    }
    // It is back.
    tell.unbounded_send(Ok(of(&[1]))).unwrap();
    sleep(ms(20)).await;
    assert_eq!(numbers(&client), [1]);
    assert!(status().failing_since.is_none() && status().last_error.is_some());
    // And ends.
    drop(tell);
    sleep(ms(20)).await;
    assert!(status().ended);
    assert_eq!(numbers(&client), [1]);
    client.set("k", "v", Ttl::NEVER).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn one_that_flaps_changes_the_nodes_no_more_often_than_they_dwell() {
    let servers = four();
    let (tell, discovery) = told();
    let client = discovering(Places::of(&servers), discovery);
    let told = async |numbers: &[usize]| {
        tell.unbounded_send(Ok(of(numbers))).unwrap();
        sleep(ms(20)).await;
    };
    told(&[0, 1]).await;
    let began = Instant::now();
    assert_eq!(numbers(&client), [0, 1], "the first one at once");
    let ids = || {
        client
            .nodes()
            .iter()
            .map(|node| node.since)
            .collect::<Vec<_>>()
    };
    let before = ids();
    // Away and back, in another order: nothing happens at all.
    for _ in 0..100 {
        told(&[0]).await;
        assert!(client.discovery().unwrap().held_back);
        assert_eq!(numbers(&client), [0, 1]);
        told(&[1, 0]).await;
        assert!(!client.discovery().unwrap().held_back);
    }
    sleep(secs(30)).await;
    assert_eq!(numbers(&client), [0, 1]);
    assert_eq!(ids(), before);
    assert!(began.elapsed() > secs(10));
    // It has dwelt: at once. Then only the last one counts.
    told(&[0, 2]).await;
    let changed = Instant::now();
    assert_eq!(numbers(&client), [0, 2]);
    told(&[0, 1]).await;
    told(&[0, 3]).await;
    while numbers(&client) == [0, 2] {
        sleep(ms(10)).await;
    }
    assert_eq!(numbers(&client), [0, 3]);
    let dwelt = changed.elapsed();
    assert!(dwelt >= ms(9_900) && dwelt < ms(10_100), "{dwelt:?}");
    // What is held back when it ends is not lost.
    told(&[1]).await;
    drop(tell);
    sleep(secs(11)).await;
    assert_eq!(numbers(&client), [1]);
    assert!(client.discovery().unwrap().ended);
}

#[tokio::test(start_paused = true)]
async fn whoever_comes_last_says_what_the_nodes_are() {
    let servers = four();
    let (first, discovery) = told();
    let client = discovering(Places::of(&servers), discovery);
    first.unbounded_send(Ok(of(&[0]))).unwrap();
    sleep(ms(20)).await;
    first.unbounded_send(Ok(of(&[1]))).unwrap();
    let (second, discovery) = told();
    client
        .follow(discovery.minimum_dwell(Duration::ZERO))
        .unwrap();
    sleep(ms(20)).await;
    assert!(first.is_closed());
    assert!(client.discovery().unwrap().last_found.is_none());
    assert_eq!(numbers(&client), [0], "until it finds something");
    second.unbounded_send(Ok(of(&[2]))).unwrap();
    sleep(ms(20)).await;
    assert_eq!(numbers(&client), [2]);
    second.unbounded_send(Ok(of(&[1]))).unwrap();
    client.set_node_specs(of(&[3])).unwrap();
    sleep(secs(60)).await;
    assert_eq!(numbers(&client), [3]);
    assert!(second.is_closed() && client.discovery().unwrap().ended);
    let group = client.group("group").unwrap();
    let error = group.follow(Discovery::fixed(of(&[0]))).unwrap_err();
    assert!(error.to_string().contains("no nodes of its own"), "{error}");
    client.follow(Discovery::fixed(of(&[0, 1]))).unwrap();
    sleep(ms(200)).await;
    assert_eq!(numbers(&client), [0, 1]);
    assert!(client.discovery().unwrap().ended);
    let error = client.follow(Discovery::fixed(of(&[0])).period(Duration::ZERO));
    assert!(error.unwrap_err().to_string().contains("period"));
}

#[tokio::test(start_paused = true)]
async fn it_ends_with_the_last_handle_and_not_before() {
    let servers = four();
    let (tell, discovery) = told();
    let client = discovering(Places::of(&servers), discovery);
    let group = client.group("group").unwrap();
    drop(client);
    tell.unbounded_send(Ok(of(&[0]))).unwrap();
    sleep(ms(20)).await;
    group.set("k", "v", Ttl::NEVER).await.unwrap();
    assert!(!tell.is_closed());
    drop(group);
    sleep(ms(200)).await;
    assert!(tell.is_closed());
}

#[test]
fn with_the_current_runtime_it_begins_where_the_client_is_first_used() {
    let servers = four();
    let client = discovering(Places::of(&servers), Discovery::fixed(of(&[0])));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let _ = client.get("k").await;
        sleep(ms(20)).await;
        assert_eq!(client.get("k").await.unwrap(), None);
    });
}

/// Counts how often it is asked.
fn counted(
    list: impl Fn(usize) -> Result<Vec<NodeSpec>, io::Error> + Send + Sync + 'static,
) -> (Arc<AtomicUsize>, Discovery) {
    let asked = Arc::<AtomicUsize>::default();
    let counter = asked.clone();
    let list = Arc::new(list);
    let discovery = Discovery::polled(move || {
        let (time, list) = (counter.fetch_add(1, Ordering::Relaxed), list.clone());
        async move { list(time) }
    });
    (asked, discovery)
}

#[tokio::test(start_paused = true)]
async fn a_source_is_asked_each_period() {
    let (asked, discovery) = counted(|_| Ok(of(&[0])));
    let _client = discovering(Places::of(&four()), discovery);
    sleep(secs(1)).await;
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    sleep(secs(300)).await;
    let times = asked.load(Ordering::Relaxed);
    assert!((9..=13).contains(&times), "{times}");
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_or_hangs_is_asked_again_in_growing_steps() {
    for hangs in [false, true] {
        let asked = Arc::<AtomicUsize>::default();
        let counter = asked.clone();
        let discovery = Discovery::polled(move || {
            counter.fetch_add(1, Ordering::Relaxed);
            async move {
                match hangs {
                    true => std::future::pending().await,
                    false => Err(io::Error::other("no")),
                }
            }
        });
        let client = discovering(Places::of(&four()), discovery.timeout(ms(100)));
        sleep(ms(500)).await;
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        // After 1, 2, 4, 8 and 16 s, and then each 30 s.
        sleep(secs(40)).await;
        assert_eq!(asked.load(Ordering::Relaxed), 6);
        sleep(secs(300)).await;
        let times = asked.load(Ordering::Relaxed);
        assert!((14..=18).contains(&times), "{times}");
        let error = client.discovery().unwrap().last_error.unwrap();
        let kind = if hangs {
            ErrorKind::Timeout
        } else {
            ErrorKind::Discovery
        };
        assert_eq!(error.kind(), kind);
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_is_asked_at_once_when_a_node_is_gone_and_not_all_the_time() {
    let servers = four();
    let places = Places::of(&servers);
    let (asked, discovery) = counted(|time| Ok(if time < 3 { of(&[0, 1]) } else { of(&[0, 2]) }));
    let client = discovering(places.clone(), discovery.period(secs(3600)));
    sleep(secs(60)).await;
    for key in keys_of(&of(&[0, 1]), 1, 5) {
        client.set(&key, "v", Ttl::NEVER).await.unwrap();
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    places.gone.lock().unwrap().push(1);
    servers[1].close_connections();
    let gone = Instant::now();
    let is_out = || {
        client
            .nodes()
            .iter()
            .any(|node| node.state == BreakerState::Open)
    };
    while !is_out() {
        let _ = client.get("k").await;
        sleep(ms(1)).await;
    }
    sleep(ms(20)).await;
    assert_eq!(
        asked.load(Ordering::Relaxed),
        2,
        "after {:?}",
        gone.elapsed()
    );
    // What is found then is the old list; again and again until it is not.
    while numbers(&client) != [0, 2] {
        sleep(ms(10)).await;
    }
    assert!(gone.elapsed() < secs(5), "{:?}", gone.elapsed());
    sleep(secs(3000)).await;
    let times = asked.load(Ordering::Relaxed);
    assert!(times < 20, "{times}");
}

#[tokio::test(start_paused = true)]
async fn a_period_without_end_is_one() {
    let servers = four();
    let places = Places::of(&servers);
    let endless = || {
        let (asked, discovery) = counted(|_| Ok(of(&[0, 1])));
        let discovery = discovery.period(Duration::MAX).timeout(Duration::MAX);
        let discovery = discovery.minimum_dwell(Duration::MAX);
        (asked, discovering(places.clone(), discovery))
    };
    // It is a bit more or less.
    let clients: Vec<_> = (0..20).map(|_| endless()).collect();
    sleep(secs(60)).await;
    for (asked, client) in &clients {
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert!(!client.discovery().unwrap().ended);
    }
    let (asked, client) = &clients[0];
    places.gone.lock().unwrap().push(1);
    servers[1].close_connections();
    let keys = keys_of(&of(&[0, 1]), 1, 1);
    let until = Instant::now() + secs(30);
    while asked.load(Ordering::Relaxed) < 2 {
        assert!(Instant::now() < until, "it is not asked again");
        let _ = client.get(&keys[0]).await;
        sleep(ms(1)).await;
    }
}

/// A stream that has something whenever it is asked.
#[tokio::test(start_paused = true)]
async fn a_stream_without_pause_leaves_the_thread_to_others() {
    let servers = four();
    let lists = futures::stream::repeat_with(|| Ok::<_, Error>(of(&[0])));
    let client = discovering(Places::of(&servers), Discovery::stream(lists));
    eventually("there are nodes", || !client.nodes().is_empty()).await;
    client.set("k", "v", Ttl::NEVER).await.unwrap();
}

#[tokio::test]
async fn a_name_in_the_dns_is_its_addresses() {
    let server = Server::new();
    let address = server.listen().await.unwrap();
    let client = Client::builder()
        .discover(Discovery::dns("localhost", address.port()))
        .build()
        .unwrap();
    eventually("there are nodes", || !client.nodes().is_empty()).await;
    assert_eq!(*client.nodes()[0].node, address.to_string());
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    assert!(server.peek("k").is_some());
}

#[tokio::test]
async fn a_file_is_read_again_and_half_a_file_is_not_believed() {
    let servers = four();
    let path = std::env::temp_dir().join(format!("tower-memcached-nodes-{}", std::process::id()));
    let write = |text: &str| std::fs::write(&path, text).unwrap();
    let discovery = Discovery::file(&path)
        .period(ms(20))
        .minimum_dwell(Duration::ZERO);
    let client = discovering(Places::of(&servers), discovery);
    let failed = |said: &str| {
        let error = client.discovery().and_then(|status| status.last_error);
        error.is_some_and(|error| error.to_string().contains(said))
    };
    eventually("there is no file", || failed("nodes-")).await;
    write("cache-0 1 10.0.0.0\ncache-1 2 10.0.0.1\n");
    eventually("it is read", || client.nodes().len() == 2).await;
    assert_eq!(numbers(&client), [0, 1]);
    write("cache-0 1 10.0.0.0\ncache-1 2 10.0.0.2:\n");
    eventually("it is refused", || failed("line 2")).await;
    write("");
    eventually("it is refused", || failed("no nodes")).await;
    assert_eq!(numbers(&client), [0, 1]);
    write("cache-2 1 10.0.0.2 # moved\n");
    eventually("it is read again", || numbers(&client) == [2]).await;
    std::fs::remove_file(&path).unwrap();
    eventually("it is gone", || failed("No such file")).await;
    assert_eq!(numbers(&client), [2]);
}

/// Answers each line that it gets with what `answer` says; for nothing it hangs up.
async fn endpoint(answer: impl Fn(&str) -> Option<Vec<u8>> + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
                    let Some(bytes) = answer(line.trim_end()) else {
                        return;
                    };
                    // In two pieces.
                    for piece in bytes.chunks(bytes.len().div_ceil(2).max(1)) {
                        let _ = stream.write_all(piece).await;
                        let _ = stream.flush().await;
                        sleep(ms(1)).await;
                    }
                    line.clear();
                }
            });
        }
    });
    address
}

fn cluster(version: u64, nodes: &str, head: &str) -> Vec<u8> {
    let list = format!("{version}\n{nodes}\n");
    format!("{head} 0 {}\r\n{list}\r\nEND\r\n", list.len()).into_bytes()
}

#[tokio::test]
async fn a_managed_caches_own_list_is_asked_for_in_both_ways() {
    for old in [false, true] {
        let version = Arc::new(AtomicUsize::new(5));
        let now = version.clone();
        let endpoint = endpoint(move |line| {
            let now = now.load(Ordering::Relaxed);
            let nodes = match now {
                5 => "127.0.0.1|127.0.0.1|1",
                _ => "127.0.0.1|127.0.0.1|1 127.0.0.1||2",
            };
            Some(match (line, old) {
                ("config get cluster", false) => cluster(now as u64, nodes, "CONFIG cluster"),
                ("get AmazonElastiCache:cluster", true) => {
                    cluster(now as u64, nodes, "VALUE AmazonElastiCache:cluster")
                }
                _ => b"ERROR\r\n".to_vec(),
            })
        });
        let discovery = Discovery::elasticache(&endpoint.await).unwrap();
        let discovery = discovery.period(ms(20)).minimum_dwell(Duration::ZERO);
        let client = Client::builder().discover(discovery).build().unwrap();
        let names = || -> Vec<_> {
            let nodes = client.nodes().into_iter();
            nodes.map(|node| node.node.to_string()).collect()
        };
        eventually("it is found", || names() == ["127.0.0.1:1"]).await;
        version.store(6, Ordering::Relaxed);
        let both = ["127.0.0.1:1", "127.0.0.1:2"];
        eventually("it has changed", || names() == both).await;
    }
}

#[tokio::test]
async fn a_hostile_endpoint_takes_no_node_away_and_no_memory() {
    let endless = vec![b'x'; 1 << 20];
    let answers = [
        (Some(endless), ErrorKind::Protocol),
        (
            Some(b"CONFIG cluster 0 4000000000\r\n".to_vec()),
            ErrorKind::Protocol,
        ),
        (
            Some(b"CONFIG cluster 0 7\r\n1\na|b|c".to_vec()),
            ErrorKind::Timeout,
        ),
        (Some(b"END\r\n".to_vec()), ErrorKind::Protocol),
        (
            Some(cluster(1, "a|b", "CONFIG cluster")),
            ErrorKind::Protocol,
        ),
        (None, ErrorKind::Protocol),
    ];
    for (answer, kind) in answers {
        let shown = answer.as_ref().map_or(0, Vec::len);
        let endpoint = endpoint(move |_| answer.clone()).await;
        let discovery = Discovery::elasticache(&endpoint).unwrap();
        let client = Client::builder()
            .nodes(["127.0.0.1:1"])
            .discover(discovery.timeout(ms(300)))
            .build()
            .unwrap();
        let error = || client.discovery().and_then(|status| status.last_error);
        eventually("it fails", || error().is_some()).await;
        let error = error().unwrap();
        assert_eq!(error.kind(), kind, "{shown}: {error}");
        assert_eq!(client.nodes().len(), 1);
    }
}

/// Answers with `SRV` records of these targets, or that there is no such name.
#[cfg(feature = "srv")]
async fn name_server(targets: Arc<Mutex<Vec<(&'static str, u16)>>>) -> std::net::SocketAddr {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query).await {
            let targets = targets.lock().unwrap().clone();
            let mut end = 12;
            while query[end] > 0 {
                end += 1 + usize::from(query[end]);
            }
            let question = &query[12..(end + 5).min(length)];
            // A response, recursion available; 3 is NXDOMAIN.
            let code = if targets.is_empty() { 3 } else { 0 };
            let mut reply = query[..2].to_vec();
            reply.extend([0x81, 0x80 | code, 0, 1, 0, targets.len() as u8, 0, 0, 0, 0]);
            reply.extend(question);
            for (target, port) in targets {
                let mut data = vec![0, 10, 0, 50];
                data.extend(port.to_be_bytes());
                for label in target.split('.') {
                    data.push(label.len() as u8);
                    data.extend(label.as_bytes());
                }
                data.push(0);
                // The name that was asked for, SRV, IN, a TTL of an hour.
                reply.extend([0xc0, 12, 0, 33, 0, 1, 0, 0, 0x0e, 0x10]);
                reply.extend((data.len() as u16).to_be_bytes());
                reply.extend(data);
            }
            socket.send_to(&reply, from).await.unwrap();
        }
    });
    address
}

#[cfg(feature = "srv")]
#[tokio::test]
async fn a_name_with_srv_records_is_their_targets_whatever_their_order() {
    let targets = Arc::new(Mutex::new(vec![
        ("cache-1.test", 11211),
        ("CACHE-0.test", 5),
    ]));
    let server = name_server(targets.clone()).await;
    let discovery = Discovery::srv_at("_memcached._tcp.cache.test.", server)
        .period(ms(20))
        .minimum_dwell(Duration::ZERO);
    let client = Client::builder().discover(discovery).build().unwrap();
    let names = || -> Vec<_> {
        let nodes = client.nodes().into_iter();
        nodes.map(|node| node.node.to_string()).collect()
    };
    let both = ["cache-0.test:5", "cache-1.test:11211"];
    eventually("they are found", || names() == both).await;
    let fingerprint = client.ring_fingerprint();
    targets.lock().unwrap().reverse();
    sleep(ms(200)).await;
    assert_eq!(client.ring_fingerprint(), fingerprint);
    targets.lock().unwrap().clear();
    let failing = || client.discovery().unwrap().failing_since.is_some();
    eventually("there is no such name", failing).await;
    assert_eq!(names(), both);
    targets.lock().unwrap().push(("cache-2.test", 7));
    eventually("it is found", || names() == ["cache-2.test:7"]).await;
}
