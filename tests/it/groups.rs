//! Functional groups that are declared in the builder: each setting of one acts, and on that group
//! only.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::{join, join_all};
use tokio::sync::Notify;
use tokio::time::{Instant, advance, sleep, timeout};
use tower_memcached::testing::Server;
use tower_memcached::{
    BoxedService, BreakerState, Client, ClientBuilder, ErrorKind, FailureMode, GroupLayer,
    GroupSettings, Key, LoadLimits, NodeSpec, ReadThroughSettings, RetryBudget, Ring, Ttl,
};

use crate::support::{
    InMemory, PATIENCE, addresses, eventually, in_memory, patient, server, state, until_open,
};

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn group() -> GroupSettings {
    GroupSettings::default()
}

fn new_servers(count: usize) -> Vec<Server> {
    (0..count).map(|_| Server::new()).collect()
}

/// With time-outs that tell a group's from the client's.
fn builder(servers: &[Server]) -> ClientBuilder {
    in_memory(servers)
        .timeout(ms(500))
        .attempt_timeout(ms(200))
        .stall_timeout(Duration::from_secs(60))
}

/// Keys that belong to `node-{index}` of so many once the prefix is before them.
fn keys_at(nodes: usize, index: usize, prefix: &str, count: usize) -> Vec<Key> {
    let specs: Vec<_> = (0..nodes)
        .map(|place| NodeSpec::new(&format!("node-{place}")).unwrap())
        .collect();
    let is_there = |key: &Key| {
        let whole = [prefix.as_bytes(), key.as_bytes()].concat();
        let whole = Key::new(whole).unwrap();
        Ring::default().node_of(&specs, &whole) == Some(index)
    };
    let candidates = (0..).map(|n| Key::new(format!("key-{n}")).unwrap());
    candidates.filter(is_there).take(count).collect()
}

fn names<S>(client: &Client<S>) -> Vec<String> {
    let nodes = client.nodes();
    nodes.iter().map(|node| node.node.to_string()).collect()
}

#[tokio::test(start_paused = true)]
async fn each_group_has_its_prefix_before_all_of_its_keys() {
    let server = Server::new();
    let client = builder(std::slice::from_ref(&server))
        .group("users", group().prefix("u:"))
        .group("carts", group().prefix("c:"))
        .group("bare", group())
        .build()
        .unwrap();
    let users = client.group("users").unwrap();
    let carts = client.group("carts").unwrap();
    users.set("1", "ada", Ttl::NEVER).await.unwrap();
    carts.set("1", "tea", Ttl::NEVER).await.unwrap();
    client.set("1", "bare", Ttl::NEVER).await.unwrap();
    assert_eq!(server.peek("u:1").unwrap(), "ada");
    assert_eq!(server.peek("c:1").unwrap(), "tea");
    assert_eq!(server.peek("1").unwrap(), "bare");
    let bare = client.group("bare").unwrap();
    assert_eq!(bare.get("1").await.unwrap().unwrap(), "bare");

    // 250 bytes are a key; with the prefix 248 are.
    let (fits, long) = ("k".repeat(248), "k".repeat(249));
    users.set(&fits, "v", Ttl::NEVER).await.unwrap();
    let error = users.get(&long).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidKey);
    let many = users.get_many([&long, "1", &long, &fits, "2"]).await;
    let places: Vec<_> = many.errors().map(|(place, _)| place).collect();
    assert_eq!(places, [0, 2]);
    assert_eq!(many.outcomes()[1].value().unwrap(), &"ada");
    assert_eq!(many.outcomes()[3].value().unwrap(), &"v");
    assert!(many.outcomes()[4].value().is_none());
    assert_eq!(carts.get_many(["1"]).await.into_hits().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_groups_timeout_ends_its_operations_and_no_others() {
    let server = Server::new();
    let client = builder(std::slice::from_ref(&server))
        .group("quick", group().timeout(ms(20)))
        .group("patient", group().timeout(Duration::from_secs(60)))
        .group("plain", group())
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.stall();
    let took = |name: &'static str| {
        let group = client.group(name).unwrap();
        async move {
            let asked = Instant::now();
            let error = group.get("k").await.unwrap_err();
            assert!(error.is_timeout(), "{error}");
            asked.elapsed()
        }
    };
    let quick = took("quick").await;
    assert!((ms(20)..ms(25)).contains(&quick), "{quick:?}");
    // Those of the client: no group's is longer.
    for name in ["patient", "plain"] {
        let took = took(name).await;
        assert!((ms(190)..=ms(501)).contains(&took), "{name}: {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_short_attempt_timeout_of_a_group_is_its_own_business_and_ejects_nobody() {
    let server = Server::new();
    let client = builder(std::slice::from_ref(&server))
        .group("hasty", group().attempt_timeout(ms(5)).max_attempts(1))
        .group("plain", group())
        .build()
        .unwrap();
    let (hasty, plain) = (
        client.group("hasty").unwrap(),
        client.group("plain").unwrap(),
    );
    plain.set("k", "v", Ttl::NEVER).await.unwrap();
    // Late for the one, in good time for the other.
    server.delay(ms(10));
    for _ in 0..200 {
        let asked = Instant::now();
        let error = hasty.get("k").await.unwrap_err();
        assert!(error.is_timeout(), "{error}");
        assert!(asked.elapsed() < ms(10), "{:?}", asked.elapsed());
        assert_eq!(plain.get("k").await.unwrap().unwrap(), "v");
        assert_eq!(state(&client, 0), BreakerState::Closed);
    }
    // Nor with nobody else asking, of whom the node could have an answer.
    for _ in 0..200 {
        hasty.get("k").await.unwrap_err();
        hasty.get_many(["k", "l"]).await;
    }
    let node = client.nodes().remove(0);
    assert_eq!((node.state, node.cause), (BreakerState::Closed, None));
    assert_eq!(server.connections_accepted(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_groups_places_and_queue_are_shared_by_all_its_handles_and_by_nobody_else() {
    let server = Server::new();
    let small = group().max_in_flight(2).max_queue(1).max_wait(ms(20));
    let client = builder(std::slice::from_ref(&server))
        .group("small", small)
        .group("plain", group())
        .build()
        .unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    server.delay(ms(50));
    let handles = [(); 4].map(|()| client.group("small").unwrap());
    let gets = handles.iter().map(|handle| async {
        let asked = Instant::now();
        (handle.get("k").await, asked.elapsed())
    });
    let plain = client.group("plain").unwrap();
    let others = join_all((0..20).map(|_| plain.get("k")));
    let status = async {
        sleep(ms(1)).await;
        let groups = client.groups();
        let small = groups.iter().find(|group| &*group.group == "small");
        let small = small.unwrap();
        (small.in_flight, small.queued, small.killed)
    };
    let ((outcomes, others), status) = join(join(join_all(gets), others), status).await;
    assert!(others.into_iter().all(|other| other.unwrap().is_some()));
    assert_eq!(status, (2, 1, false));
    let refused = |place: usize, after: Duration| {
        let (outcome, took) = &outcomes[place];
        let error = outcome.as_ref().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Overloaded, "{error}");
        assert!(error.to_string().contains("the group \"small\""), "{error}");
        assert!((after..after + ms(2)).contains(took), "{took:?}");
    };
    assert!(outcomes[..2].iter().all(|(outcome, _)| outcome.is_ok()));
    refused(2, ms(20));
    refused(3, ms(0));

    // A place that comes free in time is taken.
    server.delay(ms(10));
    let gets = handles[..3].iter().map(|handle| handle.get("k"));
    for outcome in join_all(gets).await {
        assert_eq!(outcome.unwrap().unwrap(), "v");
    }
    let small = client.groups().remove(1);
    assert_eq!(
        (&*small.group, small.in_flight, small.queued),
        ("small", 0, 0)
    );
}

#[tokio::test(start_paused = true)]
async fn a_groups_rate_and_burst_are_kept_to_the_request() {
    let server = Server::new();
    let client = builder(std::slice::from_ref(&server))
        .group("rated", group().rate(10).burst(3))
        .group("plain", group())
        .build()
        .unwrap();
    let handles = [(); 2].map(|()| client.group("rated").unwrap());
    let plain = client.group("plain").unwrap();
    plain.get("k").await.unwrap();
    let began = Instant::now();
    let (mut passed, mut refused) = (0, 0);
    for turn in 0..=300 {
        match handles[turn % 2].get("k").await {
            Ok(_) => passed += 1,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Overloaded, "{error}");
                assert!(error.to_string().contains("\"rated\""), "{error}");
                refused += 1;
            }
        }
        plain.get("k").await.unwrap();
        advance(ms(10)).await;
    }
    assert_eq!(began.elapsed(), ms(3010));
    // Those of the burst, and ten in each second since.
    assert_eq!((passed, refused), (3 + 30, 301 - 33));
    // What is saved up is the burst and no more.
    advance(Duration::from_secs(60)).await;
    let gets = join_all((0..10).map(|_| handles[0].get("k"))).await;
    assert_eq!(gets.iter().filter(|get| get.is_ok()).count(), 3);
}

/// While their node is out, each group does what it was told to.
#[tokio::test(start_paused = true)]
async fn groups_of_the_same_nodes_differ_in_what_becomes_of_an_outage() {
    let servers = new_servers(3);
    let client = in_memory(&servers)
        .timeout(Duration::from_secs(30))
        .group("moves", group().prefix("m:"))
        .group(
            "ends",
            group().prefix("e:").failure_mode(FailureMode::Cancel),
        )
        .group(
            "waits",
            group().prefix("w:").failure_mode(FailureMode::Retry),
        )
        .build()
        .unwrap();
    let of = |name, prefix| {
        let key = keys_at(3, 0, prefix, 1).remove(0);
        (client.group(name).unwrap(), key)
    };
    let (moves, moved) = of("moves", "m:");
    let (ends, ended) = of("ends", "e:");
    let (waits, waited) = of("waits", "w:");
    moves.set(&moved, "home", Ttl::NEVER).await.unwrap();
    ends.set(&ended, "home", Ttl::NEVER).await.unwrap();
    waits.set(&waited, "home", Ttl::NEVER).await.unwrap();
    servers[0].stall();
    while state(&client, 0) != BreakerState::Open {
        let _ = moves.get(&moved).await;
    }

    let asked = Instant::now();
    let error = ends.get(&ended).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NodeUnavailable, "{error}");
    moves.set(&moved, "away", Ttl::NEVER).await.unwrap();
    assert_eq!(moves.get(&moved).await.unwrap().unwrap(), "away");
    assert_eq!(asked.elapsed(), Duration::ZERO, "neither has waited");
    let waiting = tokio::spawn(async move { waits.get(&waited).await });
    sleep(Duration::from_secs(5)).await;
    assert!(!waiting.is_finished());
    servers[0].resume();
    let found = waiting.await.unwrap().unwrap();
    assert_eq!(found.unwrap(), "home");
    while state(&client, 0) != BreakerState::Closed {
        sleep(ms(50)).await;
    }
    assert_eq!(ends.get(&ended).await.unwrap().unwrap(), "home");
    assert_eq!(moves.get(&moved).await.unwrap(), None, "it was deleted");
}

#[tokio::test(start_paused = true)]
async fn what_a_group_writes_away_from_home_lives_for_its_failover_ttl() {
    let servers = new_servers(3);
    let client = in_memory(&servers)
        .failover_ttl(Duration::from_secs(33))
        .group(
            "short",
            group().prefix("s:").failover_ttl(Duration::from_secs(7)),
        )
        .group("plain", group().prefix("p:"))
        .build()
        .unwrap();
    servers[0].stall();
    let probe = keys_at(3, 0, "", 1).remove(0);
    while state(&client, 0) != BreakerState::Open {
        let _ = client.get(&probe).await;
    }
    for (name, prefix, ttl) in [("short", "s:", " T7 "), ("plain", "p:", " T33 ")] {
        let key = keys_at(3, 0, prefix, 1).remove(0);
        let group = client.group(name).unwrap();
        group.set(&key, "v", Ttl::NEVER).await.unwrap();
        let whole = format!("ms {prefix}{}", String::from_utf8_lossy(key.as_bytes()));
        let lines = servers[1]
            .requests()
            .into_iter()
            .chain(servers[2].requests());
        let lines: Vec<_> = lines
            .map(|line| String::from_utf8_lossy(&line).into_owned())
            .filter(|line| line.starts_with(&whole))
            .collect();
        assert!(
            lines.len() == 1 && format!("{} ", lines[0]).contains(ttl),
            "{lines:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_group_makes_no_more_attempts_than_it_may() {
    let servers = new_servers(3);
    let client = in_memory(&servers)
        .group("once", group().max_attempts(1))
        .group("plain", group())
        .build()
        .unwrap();
    let key = keys_at(3, 0, "", 1).remove(0);
    servers[0].stall();
    let (once, plain) = (
        client.group("once").unwrap(),
        client.group("plain").unwrap(),
    );
    let (once, plain) = join(once.get(&key), plain.get(&key)).await;
    assert!(once.unwrap_err().is_timeout());
    assert_eq!(plain.unwrap(), None, "the next node was asked");
    assert_eq!(state(&client, 0), BreakerState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_group_without_budget_left_does_not_take_the_others() {
    let servers = new_servers(3);
    let client = in_memory(&servers)
        .group("poor", group().retry_budget(RetryBudget::new(0, 0)))
        .group("rich", group())
        .build()
        .unwrap();
    let key = keys_at(3, 0, "", 1).remove(0);
    servers[0].stall();
    let (poor, rich) = (client.group("poor").unwrap(), client.group("rich").unwrap());
    // All time out at once, which is one event to the node: it stays in.
    let poor = join_all((0..150).map(|_| poor.get(&key)));
    let rich = join_all((0..80).map(|_| rich.get(&key)));
    let (poor, rich) = join(poor, rich).await;
    let failed = poor.iter().filter(|outcome| outcome.is_err()).count();
    assert_eq!(failed, 50, "a hundred are in each budget to begin with");
    assert!(rich.iter().all(Result::is_ok));
    assert_eq!(state(&client, 0), BreakerState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_group_with_its_own_ejection_limit_stops_moving_sooner() {
    let servers = new_servers(4);
    let client = in_memory(&servers)
        .timeout(Duration::from_secs(2))
        .group("strict", group().max_ejection_percent(25))
        .build()
        .unwrap();
    let strict = client.group("strict").unwrap();
    let key = keys_at(4, 0, "", 1).remove(0);
    for out in [0, 1] {
        servers[out].stall();
        let key = keys_at(4, out, "", 1).remove(0);
        while state(&client, out) != BreakerState::Open {
            let _ = client.get(&key).await;
        }
        client.get(&key).await.unwrap();
        assert_eq!(
            strict.get(&key).await.is_ok(),
            out == 0,
            "one of four may be out"
        );
    }
    let error = strict.get(&key).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NodeUnavailable, "{error}");
}

#[tokio::test(start_paused = true)]
async fn only_the_group_that_hedges_sends_its_slow_gets_twice() {
    let server = Server::new();
    let client = builder(std::slice::from_ref(&server))
        .connections(2)
        .group("hedged", group().hedged_gets(true))
        .group("plain", group())
        .build()
        .unwrap();
    let (hedged, plain) = (
        client.group("hedged").unwrap(),
        client.group("plain").unwrap(),
    );
    server.insert("k", "v");
    // Until the node knows what is slow.
    for _ in 0..300 {
        hedged.get("k").await.unwrap();
        sleep(ms(10)).await;
    }
    server.delay(ms(50));
    let asked = || {
        let asks = |line: &bytes::Bytes| line.starts_with(b"mg k ");
        server.requests().iter().filter(|line| asks(line)).count()
    };
    for (group, asked_for) in [(&plain, 1), (&hedged, 2)] {
        let before = asked();
        assert_eq!(group.get("k").await.unwrap().unwrap(), "v");
        sleep(ms(100)).await;
        assert_eq!(asked() - before, asked_for);
    }
}

fn exact() -> ReadThroughSettings {
    let settings = ReadThroughSettings::default();
    settings.ttl_jitter(0.0).early_refresh(0.0)
}

#[tokio::test(start_paused = true)]
async fn each_group_loads_by_its_own_settings_and_its_own_database() {
    let server = Server::new();
    let client = builder(std::slice::from_ref(&server))
        .database(
            "items",
            LoadLimits::default().max_concurrent(1).max_queue(0),
        )
        .database("users", LoadLimits::default())
        .read_through(exact().database("users"))
        .group(
            "items",
            group().read_through(exact().database("items").load_timeout(ms(40))),
        )
        .group("inherits", group())
        .group(
            "no database",
            group().read_through(exact().load_timeout(ms(40))),
        )
        .build()
        .unwrap();
    let running =
        || ["items", "users"].map(|name| client.load_guard(name).unwrap().status().running);
    let slowly = || async {
        sleep(ms(60)).await;
        Ok::<_, std::io::Error>(Some("loaded"))
    };
    // Which database is asked, and for how long it may take.
    let cases = [
        ("items", [1, 0], false),
        ("inherits", [0, 1], true),
        ("no database", [0, 1], false),
    ];
    for (name, asked, loads) in cases {
        let group = client.group(name).unwrap();
        let key = name.replace(' ', "-");
        let load = group.get_or_load(&key, Ttl::NEVER, slowly);
        let (loaded, seen) = join(load, async {
            sleep(ms(20)).await;
            running()
        })
        .await;
        assert_eq!(seen, asked, "{name}");
        assert_eq!(loaded.is_ok(), loads, "{name}: {loaded:?}");
    }
    // One place, and no queue: another load of that database is refused, of the other one is not.
    let (items, inherits) = (
        client.group("items").unwrap(),
        client.group("inherits").unwrap(),
    );
    let at_once = || async {
        sleep(ms(5)).await;
        Ok::<_, std::io::Error>(Some("loaded"))
    };
    let two = |group: &Client<_>| {
        let group = Client::clone(group);
        async move {
            let one = group.get_or_load("one", Ttl::NEVER, at_once);
            let other = group.get_or_load("other", Ttl::NEVER, at_once);
            let (one, other) = join(one, other).await;
            [one.is_ok(), other.is_ok()]
        }
    };
    assert_eq!(two(&inherits).await, [true, true]);
    server.restart_empty();
    assert_eq!(two(&items).await, [true, false]);
    assert!(client.load_guard("nobody's").is_none());
    assert!(
        items.load_guard("items").is_some(),
        "a group knows them as well"
    );
}

/// The name of a database means the same wherever settings are taken.
#[tokio::test(start_paused = true)]
async fn settings_of_a_clients_loads_find_its_databases_by_name() {
    let server = Server::new();
    let client = builder(std::slice::from_ref(&server))
        .database("items", LoadLimits::default())
        .build()
        .unwrap();
    let other = client
        .clone()
        .with_read_through(exact().database("items"))
        .unwrap();
    let load = || async { Ok::<_, std::io::Error>(Some("loaded")) };
    other.get_or_load("k", Ttl::NEVER, load).await.unwrap();
    assert_eq!(client.load_guard("items").unwrap().status().started, 1);
    let error = client
        .with_read_through(exact().database("none"))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    assert!(
        error.to_string().contains("database: there is no \"none\""),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_group_with_nodes_of_its_own_uses_them_and_no_others() {
    let servers = new_servers(4);
    let client = builder(&servers[..2])
        .connector(InMemory(servers.clone()))
        .group("own", group().prefix("o:").nodes(["node-2"]))
        .group("shares", group().prefix("s:"))
        .build()
        .unwrap();
    let (own, shares) = (
        client.group("own").unwrap(),
        client.group("shares").unwrap(),
    );
    let keys: Vec<_> = (0..40).map(|n| format!("k{n}")).collect();
    for key in &keys {
        own.set(key, "own", Ttl::NEVER).await.unwrap();
        shares.set(key, "shared", Ttl::NEVER).await.unwrap();
    }
    assert_eq!(own.get_many(&keys).await.into_hits().len(), 40);
    assert_eq!(servers[2].len(), 40);
    assert_eq!(servers[0].len() + servers[1].len(), 40);
    assert!(
        keys.iter()
            .all(|key| servers[2].peek(format!("o:{key}")).is_some())
    );
    assert_eq!(names(&client), ["node-0", "node-1", "node-2"]);
    assert_eq!(names(&own), ["node-2"]);
    assert_eq!(own.version().await.unwrap().len(), 1);
    assert_eq!(client.version().await.unwrap().len(), 3);

    // Its outage is its own.
    servers[2].stall();
    while state(&own, 0) != BreakerState::Open {
        let _ = own.get("k0").await;
    }
    assert_eq!(shares.get_many(&keys).await.into_hits().len(), 40);

    own.set_nodes(["node-3"]).unwrap();
    assert_eq!(names(&client), ["node-0", "node-1", "node-3"]);
    own.set("k0", "moved", Ttl::NEVER).await.unwrap();
    assert_eq!(servers[3].peek("o:k0").unwrap(), "moved");
    assert_eq!(shares.get_many(&keys).await.into_hits().len(), 40);
    client.set_nodes(["node-1"]).unwrap();
    assert_eq!(names(&client), ["node-1", "node-3"]);
    assert_eq!(own.get("k0").await.unwrap().unwrap(), "moved");
    // Without nodes of its own it has none to replace.
    let error = shares.set_nodes(["node-0", "node-1"]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    assert_eq!(names(&client), ["node-1", "node-3"]);
    let error = own.set_nodes::<[&str; 0]>([]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    assert_eq!(names(&own), ["node-3"]);
}

#[tokio::test]
async fn all_groups_share_the_clients_connections() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .group("a", group().prefix("a:").failure_mode(FailureMode::Cancel))
        .group("b", group().prefix("b:").attempt_timeout(ms(500)))
        .group(
            "c",
            group()
                .max_in_flight(10)
                .retry_budget(RetryBudget::new(0, 0)),
        )
        .build()
        .unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    for name in ["a", "b", "c"] {
        let group = client.group(name).unwrap();
        for outcome in join_all((0..10).map(|_| group.get("k"))).await {
            outcome.unwrap();
        }
    }
    assert_eq!(server.connections_accepted(), 1);
    assert_eq!(client.nodes()[0].connections, 1);
}

#[tokio::test(start_paused = true)]
async fn a_group_is_had_by_its_name_and_by_no_other() {
    let server = Server::new();
    let client = builder(std::slice::from_ref(&server))
        .group("known", group().killed(true))
        .build()
        .unwrap();
    for unknown in ["", "Known", "known ", "unknown"] {
        let error = client.group(unknown).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
        assert!(
            error.to_string().contains(&format!("{unknown:?}")),
            "{error}"
        );
    }
    let known = client.group("known").unwrap();
    let groups: BTreeSet<_> = client
        .groups()
        .into_iter()
        .map(|group| group.group)
        .collect();
    assert_eq!(groups, BTreeSet::from([Arc::from("known")]));
    assert!(known.kill_switch().unwrap().is_thrown());
    assert!(!client.kill_switch().unwrap().is_thrown());
    // Groups are not nested.
    assert!(known.group("known").is_err() && known.groups().is_empty());
    let bare = Client::from_service(tower::service_fn(|_: tower_memcached::Request| async {
        Ok::<_, tower_memcached::Error>(tower_memcached::Response::Value(None))
    }));
    assert!(bare.group("known").is_err() && bare.kill_switch().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_group_is_the_same_group_behind_layers_boxes_and_other_timeouts() {
    let server = Server::new();
    let client = builder(std::slice::from_ref(&server))
        .group("g", group().prefix("g:").max_in_flight(1))
        .build()
        .unwrap();
    let plain = client.group("g").unwrap();
    let layered = client.layer(GroupLayer::new("outer").prefix("outer:"));
    let layered = layered.group("g").unwrap();
    let boxed: Client<BoxedService> = client.boxed();
    let boxed_group = boxed.group("g").unwrap();
    let brief = client
        .clone()
        .with_timeout(ms(20))
        .unwrap()
        .group("g")
        .unwrap();
    layered.set("k", "layered", Ttl::NEVER).await.unwrap();
    assert_eq!(server.peek("outer:g:k").unwrap(), "layered");
    boxed_group.set("k", "boxed", Ttl::NEVER).await.unwrap();
    assert_eq!(server.peek("g:k").unwrap(), "boxed");
    assert_eq!(plain.boxed().get("k").await.unwrap().unwrap(), "boxed");

    // One place for all of them.
    server.delay(ms(50));
    let (held, refused) = join(plain.get("k"), async {
        sleep(ms(1)).await;
        [
            layered.get("k").await.unwrap_err(),
            boxed_group.get("k").await.unwrap_err(),
            brief.get("k").await.unwrap_err(),
        ]
    })
    .await;
    held.unwrap();
    assert!(
        refused
            .iter()
            .all(|error| error.kind() == ErrorKind::Overloaded)
    );
    let asked = Instant::now();
    assert!(brief.get("k").await.unwrap_err().is_timeout());
    assert!(asked.elapsed() < ms(25), "{:?}", asked.elapsed());
    // And one switch.
    boxed_group.kill_switch().unwrap().throw();
    assert_eq!(plain.get("k").await.unwrap(), None);
    assert_eq!(layered.get("k").await.unwrap(), None);
}

/// Ratios are for the benchmarks, on a quiet machine; here only that the others are served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_at_its_limit_leaves_the_others_alone() {
    let server = server().await;
    let client = patient(std::slice::from_ref(&server))
        .group("floods", group().prefix("f:").max_in_flight(16))
        .group("steady", group().prefix("s:"))
        .build()
        .unwrap();
    let steady = client.group("steady").unwrap();
    steady.set("k", "v", Ttl::NEVER).await.unwrap();
    let measure = || async {
        let mut took = Vec::new();
        for _ in 0..500 {
            let asked = Instant::now();
            assert_eq!(steady.get("k").await.unwrap().unwrap(), "v");
            took.push(asked.elapsed());
        }
        took.sort_unstable();
        (
            took[took.len() / 2],
            took[took.len() * 99 / 100],
            took[took.len() - 1],
        )
    };
    let alone = timeout(PATIENCE, measure()).await.unwrap();

    let (stop, shed) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
    let floods: Vec<_> = (0..64)
        .map(|_| {
            let (stop, shed) = (stop.clone(), shed.clone());
            let floods = client.group("floods").unwrap();
            tokio::spawn(async move {
                let mut refused = 0;
                while !stop.load(Ordering::Relaxed) {
                    if let Err(error) = floods.get("k").await {
                        assert_eq!(error.kind(), ErrorKind::Overloaded, "{error}");
                        refused += 1;
                        shed.notify_one();
                        tokio::task::yield_now().await;
                    }
                }
                refused
            })
        })
        .collect();
    timeout(PATIENCE, shed.notified()).await.unwrap();
    let beside = timeout(PATIENCE, measure()).await.unwrap();
    stop.store(true, Ordering::Relaxed);
    let refused: Vec<usize> = timeout(PATIENCE, join_all(floods))
        .await
        .unwrap()
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert!(refused.iter().sum::<usize>() > 0, "it was at its limit");
    println!(
        "p50, p99 and longest of a group alone: {alone:?}; beside one at its limit: {beside:?}"
    );
    assert!(beside.2 < Duration::from_secs(2), "{beside:?}");
}

/// A node of a group's own that hangs takes nothing from the others, whatever the group sends it.
#[tokio::test]
async fn a_group_whose_own_node_hangs_leaves_the_others_alone() {
    let servers = crate::support::servers(2).await;
    let addresses = addresses(&servers);
    let client = patient(&servers[..1])
        .group("hangs", group().nodes([&addresses[1]]).max_in_flight(100))
        .group("well", group())
        .build()
        .unwrap();
    let (hangs, well) = (
        client.group("hangs").unwrap(),
        client.group("well").unwrap(),
    );
    hangs.get("k").await.unwrap();
    servers[1].stall();
    let waiting: Vec<_> = (0..300)
        .map(|_| {
            let hangs = hangs.clone();
            tokio::spawn(async move { hangs.get("k").await })
        })
        .collect();
    eventually("its places are taken", || {
        client.groups()[0].in_flight == 100
    })
    .await;
    for _ in 0..200 {
        let get = timeout(Duration::from_secs(1), well.get("k"));
        get.await.expect("at once").unwrap();
    }
    until_open(&hangs, 0).await;
    for task in waiting {
        task.await.unwrap().unwrap_err();
    }
    assert_eq!(state(&client, 0), BreakerState::Closed);
    assert_eq!(client.groups()[0].in_flight, 0);
}
