//! `Client::reconfigure`: what may change acts at once, what may not is refused with nothing
//! applied, and no request notices.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::{join, join_all};
use tokio::time::{Instant, advance, sleep, timeout};
use tower_memcached::testing::Server;
use tower_memcached::{
    BreakerSettings, BreakerState, Client, Config, Error, ErrorKind, ExecutorConfig, FailureMode,
    GroupSettings, JournalOverflow, JournalSettings, Key, LoadLimits, NodeConfig, NodeSpec,
    ProbeSettings, ReadThroughSettings, RetryBudget, Ring, Ttl,
};

use crate::support::{InMemory, PATIENCE, addresses, eventually, in_memory, servers, state};

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn group() -> GroupSettings {
    GroupSettings::default()
}

fn new_servers(count: usize) -> Vec<Server> {
    (0..count).map(|_| Server::new()).collect()
}

/// A configuration changed in part.
fn with(config: &Config, change: impl FnOnce(&mut Config)) -> Config {
    let mut config = config.clone();
    change(&mut config);
    config
}

fn one_group(config: &Config, settings: GroupSettings) -> Config {
    with(config, |config| {
        config.groups.insert("g".into(), settings);
    })
}

/// The nodes `node-0` and so on, and a group `g`.
fn config(nodes: usize) -> Config {
    let mut config = Config::default();
    config.nodes = (0..nodes)
        .map(|n| NodeConfig::new(format!("node-{n}")))
        .collect();
    config.groups.insert("g".into(), group());
    config
}

fn client(servers: &[Server], config: &Config) -> Client {
    // The configuration's nodes take the place of the builder's.
    in_memory(servers).config(config.clone()).build().unwrap()
}

fn keys_at(nodes: usize, index: usize, count: usize) -> Vec<Key> {
    let specs: Vec<_> = (0..nodes)
        .map(|place| NodeSpec::new(&format!("node-{place}")).unwrap())
        .collect();
    let candidates = (0..).map(|n| Key::new(format!("key-{n}")).unwrap());
    let is_there = |key: &Key| Ring::default().node_of(&specs, key) == Some(index);
    candidates.filter(is_there).take(count).collect()
}

async fn until_out(client: &Client, index: usize, nodes: usize) {
    let key = keys_at(nodes, index, 1).remove(0);
    let asks = async {
        while state(client, index) != BreakerState::Open {
            let _ = client.get(&key).await;
        }
    };
    timeout(secs(60), asks).await.expect("it opens");
}

async fn fails_after<S>(client: &Client<S>, key: &Key) -> (Duration, Error)
where
    S: tower::Service<tower_memcached::Request, Response = tower_memcached::Response> + Clone,
    S::Error: Into<tower::BoxError>,
{
    let asked = Instant::now();
    let error = client.get(key).await.unwrap_err();
    (asked.elapsed(), error)
}

fn about(took: Duration, expected: Duration) {
    assert!(
        (expected..expected + ms(5)).contains(&took),
        "{took:?} is not {expected:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn timeouts_of_the_client_of_attempts_and_of_groups_change() {
    let servers = new_servers(1);
    let first = with(&config(1), |config| {
        (config.timeout, config.attempt_timeout) = (ms(100), ms(50));
        config.stall_timeout = Some(secs(60));
        // Late answers are no reason to close the connection here.
        let breaker = BreakerSettings::default().consecutive_timeouts(1_000);
        config.breaker = breaker.failure_rate(101).slow_call_rate(101);
    });
    let client = client(&servers, &first);
    let group = client.group("g").unwrap();
    let key = Key::new("k").unwrap();
    client.get("k").await.unwrap();
    servers[0].delay(secs(1));
    let mode = |config: &mut Config| config.failure_mode = FailureMode::Cancel;
    client.reconfigure(with(&first, mode)).unwrap();
    about(fails_after(&client, &key).await.0, ms(50));
    let second = with(&first, |config| {
        (config.timeout, config.attempt_timeout) = (ms(300), ms(200));
        mode(config);
    });
    client.reconfigure(second.clone()).unwrap();
    about(fails_after(&client, &key).await.0, ms(200));
    about(fails_after(&group, &key).await.0, ms(200));
    client
        .reconfigure(with(&second, |config| config.timeout = ms(120)))
        .unwrap();
    about(fails_after(&client, &key).await.0, ms(120));
    client
        .reconfigure(one_group(&second, GroupSettings::default().timeout(ms(30))))
        .unwrap();
    about(fails_after(&group, &key).await.0, ms(30));
    about(fails_after(&client, &key).await.0, ms(200));
    client
        .reconfigure(one_group(
            &second,
            GroupSettings::default().attempt_timeout(ms(10)),
        ))
        .unwrap();
    about(fails_after(&group, &key).await.0, ms(10));
    // And back to none of its own.
    client.reconfigure(second).unwrap();
    about(fails_after(&group, &key).await.0, ms(200));
}

#[tokio::test(start_paused = true)]
async fn the_stall_and_connect_timeouts_change() {
    let servers = new_servers(1);
    let first = with(&config(1), |config| {
        (config.timeout, config.attempt_timeout) = (secs(10), secs(10));
        config.stall_timeout = Some(secs(4));
        config.connect_timeout = Some(secs(3));
    });
    let client = client(&servers, &first);
    let key = Key::new("k").unwrap();
    client.get("k").await.unwrap();
    client
        .reconfigure(with(&first, |config| config.stall_timeout = Some(ms(500))))
        .unwrap();
    servers[0].stall();
    let (took, error) = fails_after(&client, &key).await;
    assert_eq!(error.kind(), ErrorKind::Unresponsive, "{error}");
    about(took, ms(500));

    // Of a connection that is not there yet.
    for (connect, expected) in [(None, secs(3)), (Some(ms(700)), ms(700))] {
        let servers = new_servers(1);
        servers[0].stall();
        let client = self::client(&servers, &first);
        if let Some(connect) = connect {
            let shorter = with(&first, |config| config.connect_timeout = Some(connect));
            client.reconfigure(shorter).unwrap();
        }
        let (took, _) = fails_after(&client, &key).await;
        about(took, expected);
    }
}

#[tokio::test(start_paused = true)]
async fn limits_of_nodes_and_groups_and_rates_change() {
    let servers = new_servers(1);
    let first = with(&config(1), |config| config.max_in_flight = 100);
    let client = client(&servers, &first);
    let group = client.group("g").unwrap();
    client.get("k").await.unwrap();
    let refused = |by_group: bool| {
        let (client, group) = (client.clone(), group.clone());
        async move {
            let gets = (0..20).map(|_| async {
                match by_group {
                    true => group.get("k").await,
                    false => client.get("k").await,
                }
            });
            let outcomes = join_all(gets).await;
            let refused = outcomes.iter().filter(|outcome| {
                let error = outcome.as_ref().err();
                error.is_some_and(|error| error.kind() == ErrorKind::Overloaded)
            });
            refused.count()
        }
    };
    assert_eq!(refused(false).await, 0);
    client
        .reconfigure(with(&first, |config| config.max_in_flight = 5))
        .unwrap();
    assert_eq!(refused(false).await, 15);
    client.reconfigure(first.clone()).unwrap();
    assert_eq!(refused(false).await, 0);

    for (settings, expected) in [
        (GroupSettings::default().max_in_flight(3), 17),
        (GroupSettings::default().max_in_flight(3).max_queue(4), 13),
        (GroupSettings::default().rate(10).burst(6), 14),
        (GroupSettings::default(), 0),
    ] {
        client
            .reconfigure(one_group(&first, settings.clone()))
            .unwrap();
        assert_eq!(refused(true).await, expected, "{settings:?}");
        assert_eq!(refused(false).await, 0);
    }
    // What a rate has counted stays while it is the same, and no longer.
    let rated = |burst| one_group(&first, GroupSettings::default().rate(10).burst(burst));
    client.reconfigure(rated(6)).unwrap();
    assert_eq!(refused(true).await, 14);
    client
        .reconfigure(with(&rated(6), |config| config.timeout = ms(90)))
        .unwrap();
    assert_eq!(refused(true).await, 20);
    advance(ms(200)).await;
    assert_eq!(refused(true).await, 18);
    client.reconfigure(rated(8)).unwrap();
    assert_eq!(refused(true).await, 12);
}

#[tokio::test(start_paused = true)]
async fn failure_modes_failover_ttls_and_ejection_limits_change() {
    let servers = new_servers(3);
    let first = with(&config(3), |config| config.timeout = ms(300));
    let client = client(&servers, &first);
    let group = client.group("g").unwrap();
    let key = keys_at(3, 0, 1).remove(0);
    servers[0].stall();
    until_out(&client, 0, 3).await;
    assert!(client.get(&key).await.is_ok() && group.get(&key).await.is_ok());

    client
        .reconfigure(with(&first, |config| {
            config.failure_mode = FailureMode::Cancel
        }))
        .unwrap();
    let (took, error) = fails_after(&client, &key).await;
    assert_eq!((took, error.kind()), (ms(0), ErrorKind::NodeUnavailable));
    assert!(group.get(&key).await.is_err(), "it goes by the client's");
    client
        .reconfigure(with(&first, |config| {
            config.failure_mode = FailureMode::Retry
        }))
        .unwrap();
    about(fails_after(&client, &key).await.0, ms(300));
    client
        .reconfigure(one_group(
            &first,
            GroupSettings::default().failure_mode(FailureMode::Cancel),
        ))
        .unwrap();
    assert!(client.get(&key).await.is_ok() && group.get(&key).await.is_err());
    client
        .reconfigure(with(&first, |config| config.max_ejection_percent = 0))
        .unwrap();
    assert_eq!(fails_after(&client, &key).await.0, ms(0));

    for (ttl, flag) in [(secs(60), " T60"), (secs(9), " T9")] {
        client
            .reconfigure(with(&first, |config| config.failover_ttl = ttl))
            .unwrap();
        client.set(&key, "v", Ttl::NEVER).await.unwrap();
        let lines = servers[1]
            .requests()
            .into_iter()
            .chain(servers[2].requests());
        let name = format!("ms {}", String::from_utf8_lossy(key.as_bytes()));
        let lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
        let last = lines.filter(|line| line.starts_with(&name)).last().unwrap();
        assert!(last.contains(flag), "{last}");
    }
}

#[tokio::test(start_paused = true)]
async fn attempts_and_retry_budgets_change() {
    let key = keys_at(3, 0, 1).remove(0);
    for (change, failing) in [
        (None, 0),
        (Some("max_attempts"), 150),
        (Some("retry_budget"), 50),
    ] {
        let servers = new_servers(3);
        let first = config(3);
        let client = client(&servers, &first);
        client.get(&key).await.unwrap();
        // Of what there is the default saves up for more than these.
        join_all((0..500).map(|_| client.get(&key))).await;
        let next = with(&first, |config| match change {
            Some("max_attempts") => config.max_attempts = 1,
            Some("retry_budget") => config.retry_budget = RetryBudget::new(0, 0),
            _ => config.timeout = ms(90),
        });
        client.reconfigure(next).unwrap();
        servers[0].stall();
        let outcomes = join_all((0..150).map(|_| client.get(&key))).await;
        let failed = outcomes.iter().filter(|outcome| outcome.is_err()).count();
        assert_eq!(failed, failing, "{change:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn hedging_changes() {
    let servers = new_servers(1);
    let first = with(&config(1), |config| {
        (config.timeout, config.attempt_timeout) = (secs(2), secs(1));
        config.connections = 2;
    });
    let hedged = with(&first, |config| config.hedged_gets = true);
    let client = client(&servers, &first);
    servers[0].insert("k", "v");
    client.reconfigure(hedged.clone()).unwrap();
    for _ in 0..300 {
        client.get("k").await.unwrap();
        sleep(ms(10)).await;
    }
    servers[0].delay(ms(50));
    let asked = || {
        let lines = servers[0].requests();
        lines
            .iter()
            .filter(|line| line.starts_with(b"mg k "))
            .count()
    };
    for (config, times) in [(&hedged, 2), (&first, 1), (&hedged, 2)] {
        client.reconfigure(config.clone()).unwrap();
        let before = asked();
        client.get("k").await.unwrap();
        sleep(ms(100)).await;
        assert_eq!(asked() - before, times);
    }
}

#[tokio::test(start_paused = true)]
async fn what_opens_a_breaker_changes() {
    // Every second answer is late: by default that is no reason to open within a few seconds.
    for (rate, opens) in [(101, false), (10, true)] {
        let servers = new_servers(1);
        let tolerant = BreakerSettings::default()
            .failure_rate(101)
            .slow_call_rate(101);
        let first = with(&config(1), |config| {
            config.breaker = tolerant.clone();
            config.failure_mode = FailureMode::Cancel;
            // Late canaries would open it as well.
            config.probe = ProbeSettings::default().initial_delay(secs(3_600));
            config.stall_timeout = Some(secs(60));
        });
        let client = client(&servers, &first);
        client.get("k").await.unwrap();
        let next = with(&first, |config| {
            config.breaker = tolerant.clone().failure_rate(rate)
        });
        client.reconfigure(next).unwrap();
        servers[0].delay_every(2, ms(45));
        let until = Instant::now() + secs(8);
        while Instant::now() < until && state(&client, 0) == BreakerState::Closed {
            let _ = client.get("k").await;
            sleep(ms(20)).await;
        }
        assert_eq!(state(&client, 0) == BreakerState::Open, opens, "{rate} %");
    }
}

#[tokio::test(start_paused = true)]
async fn the_ramp_and_the_period_of_probes_change() {
    for (ramp, period) in [(secs(2), secs(1)), (secs(30), secs(1)), (secs(2), secs(20))] {
        let servers = new_servers(3);
        let first = config(3);
        let client = client(&servers, &first);
        let next = with(&first, |config| {
            config.breaker = BreakerSettings::default().ramp(ramp);
            config.probe = ProbeSettings::default().period(period);
        });
        servers[0].stall();
        until_out(&client, 0, 3).await;
        client.reconfigure(next).unwrap();
        // While the probe that is due by the old period is over.
        sleep(secs(5)).await;
        servers[0].resume();
        let resumed = Instant::now();
        let is = |wanted| {
            let client = &client;
            async move {
                while state(client, 0) != wanted {
                    assert!(resumed.elapsed() < secs(120), "never {wanted:?}");
                    sleep(ms(10)).await;
                }
                resumed.elapsed()
            }
        };
        let readmitted = is(BreakerState::Ramping).await;
        let closed = is(BreakerState::Closed).await - readmitted;
        assert!(
            readmitted < period * 13 / 10 + secs(1),
            "{readmitted:?} for {period:?}"
        );
        assert!(
            (ramp..ramp * 11 / 10 + secs(1)).contains(&closed),
            "{closed:?} for {ramp:?}"
        );
        // Of a node that is well, too.
        let canaries = || {
            let lines = servers[1].requests();
            let canary = |line: &&bytes::Bytes| String::from_utf8_lossy(line).contains("canary");
            lines.iter().filter(canary).count() / 2
        };
        let before = canaries();
        sleep(secs(100)).await;
        let probed = (canaries() - before) as u64;
        let expected = 100 / period.as_secs();
        assert!(
            (expected * 7 / 10..=expected * 14 / 10).contains(&probed),
            "{probed} for {period:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_becomes_of_a_journal_that_overflows_changes() {
    for (overflow, comes_back) in [
        (JournalOverflow::Refuse, false),
        (JournalOverflow::Flush, true),
    ] {
        let servers = new_servers(3);
        let journal = JournalSettings::default().capacity(2);
        let first = with(&config(3), |config| config.journal = journal.clone());
        let client = client(&servers, &first);
        let keys = keys_at(3, 0, 5);
        for key in &keys {
            client.set(key, "old", Ttl::NEVER).await.unwrap();
        }
        servers[0].stall();
        until_out(&client, 0, 3).await;
        for key in &keys {
            client.set(key, "new", Ttl::NEVER).await.unwrap();
        }
        client
            .reconfigure(with(&first, |config| {
                config.journal = journal.clone().overflow(overflow)
            }))
            .unwrap();
        servers[0].resume();
        sleep(secs(60)).await;
        assert_eq!(
            state(&client, 0) == BreakerState::Closed,
            comes_back,
            "{overflow:?}"
        );
        let old = servers[0].peek(keys[4].as_bytes());
        assert_eq!(old.is_none(), comes_back, "flushed, or as it was");
    }
}

#[tokio::test(start_paused = true)]
async fn kill_switches_change_and_one_that_was_thrown_by_hand_too() {
    let servers = new_servers(1);
    let first = config(1);
    let client = client(&servers, &first);
    let group = client.group("g").unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    let reads = || async {
        [
            client.get("k").await.unwrap().is_some(),
            group.get("k").await.unwrap().is_some(),
        ]
    };
    assert_eq!(reads().await, [true, true]);
    client
        .reconfigure(one_group(&first, GroupSettings::default().killed(true)))
        .unwrap();
    assert_eq!(reads().await, [true, false]);
    client
        .reconfigure(with(&first, |config| config.killed = true))
        .unwrap();
    assert_eq!(reads().await, [false, false]);
    client.reconfigure(first.clone()).unwrap();
    assert_eq!(reads().await, [true, true]);
    client.kill_switch().unwrap().throw();
    group.kill_switch().unwrap().throw();
    client.reconfigure(first).unwrap();
    assert_eq!(reads().await, [true, true]);
}

fn exact() -> ReadThroughSettings {
    ReadThroughSettings::default()
        .ttl_jitter(0.0)
        .early_refresh(0.0)
}

#[tokio::test(start_paused = true)]
async fn limits_of_databases_and_how_values_are_loaded_change() {
    let servers = new_servers(1);
    let first = with(&config(1), |config| {
        config
            .databases
            .insert("items".into(), LoadLimits::default());
        config
            .databases
            .insert("users".into(), LoadLimits::default());
        config.read_through = exact().database("items");
    });
    let client = client(&servers, &first);
    let group = client.group("g").unwrap();
    let next_key = AtomicUsize::new(0);
    let load_for = |time: Duration, by_group: bool| {
        let key = next_key.fetch_add(1, Ordering::Relaxed).to_string();
        let (client, group) = (&client, &group);
        async move {
            let load = || async {
                sleep(time).await;
                Ok::<_, std::io::Error>(Some("v"))
            };
            match by_group {
                true => group.get_or_load(&key, Ttl::NEVER, load).await,
                false => client.get_or_load(&key, Ttl::NEVER, load).await,
            }
        }
    };
    let failing = |outcomes: Vec<Result<_, Error>>| outcomes.iter().filter(|o| o.is_err()).count();
    let ten = || join_all((0..10).map(|n| load_for(ms(20), n % 2 == 0)));
    assert_eq!(failing(ten().await), 0);
    // One guard of all that load from there.
    let limits = |limits: LoadLimits| {
        with(&first, |config| {
            config.databases.insert("items".into(), limits);
        })
    };
    client
        .reconfigure(limits(LoadLimits::default().max_concurrent(2).max_queue(1)))
        .unwrap();
    assert_eq!(failing(ten().await), 7);
    client
        .reconfigure(limits(
            LoadLimits::default().rate(1).burst(4).max_wait(ms(1)),
        ))
        .unwrap();
    assert_eq!(failing(ten().await), 6);
    client.reconfigure(first.clone()).unwrap();

    // How long a load may take; of the group, too, unless it has settings of its own.
    assert!(load_for(ms(500), true).await.is_ok());
    client
        .reconfigure(with(&first, |config| {
            config.read_through = exact().load_timeout(ms(300))
        }))
        .unwrap();
    assert!(load_for(ms(500), false).await.is_err() && load_for(ms(500), true).await.is_err());
    let own =
        GroupSettings::default().read_through(exact().load_timeout(ms(300)).database("users"));
    client.reconfigure(one_group(&first, own)).unwrap();
    let started = |name| client.load_guard(name).unwrap().status().started;
    let before = [started("items"), started("users")];
    assert!(load_for(ms(500), false).await.is_ok() && load_for(ms(500), true).await.is_err());
    assert_eq!(
        [started("items"), started("users")],
        [before[0] + 1, before[1] + 1]
    );

    // How much is put back behind the answers.
    let stored = || {
        let stored = servers[0].len();
        servers[0].restart_empty();
        stored
    };
    client
        .reconfigure(with(&first, |config| {
            config.read_through = exact().leases(false).max_refills(3)
        }))
        .unwrap();
    sleep(secs(5)).await;
    stored();
    client.get("connect").await.unwrap();
    servers[0].delay(ms(10));
    assert_eq!(failing(ten().await), 0);
    sleep(secs(1)).await;
    let items = servers[0].requests();
    let put_back = items
        .iter()
        .rev()
        .take_while(|line| !line.starts_with(b"mg connect"));
    let put_back = put_back.filter(|line| {
        line.starts_with(b"ms ") && !String::from_utf8_lossy(line).contains("canary")
    });
    // Three of the client's, and three of the group's.
    assert_eq!(put_back.count(), 6, "{items:?}");
}

#[tokio::test(start_paused = true)]
async fn nodes_and_weights_change_and_none_is_to_keep_them() {
    let servers = new_servers(4);
    let first = with(&config(2), |config| {
        config
            .groups
            .insert("own".into(), group().nodes(["node-3"]));
    });
    let client = in_memory(&servers)
        .config(first.clone())
        .connector(InMemory(servers.clone()))
        .build()
        .unwrap();
    let own = client.group("own").unwrap();
    let names = |nodes: Vec<tower_memcached::NodeStatus>| -> Vec<String> {
        nodes.iter().map(|node| node.node.to_string()).collect()
    };
    assert_eq!(names(client.nodes()), ["node-0", "node-1", "node-3"]);
    client.get("k").await.unwrap();
    let nodes = |of: &[(&str, u32)], own: &[&str]| {
        with(&first, |config| {
            let node = |(node, weight): &(&str, u32)| NodeConfig::new(*node).with_weight(*weight);
            config.nodes = of.iter().map(node).collect();
            config
                .groups
                .insert("own".into(), group().nodes(own.to_vec()));
        })
    };
    client
        .reconfigure(nodes(&[("node-1", 1), ("node-2", 1)], &["node-0"]))
        .unwrap();
    assert_eq!(names(client.nodes()), ["node-1", "node-2", "node-0"]);
    assert_eq!(names(own.nodes()), ["node-0"]);
    own.set("k", "own", Ttl::NEVER).await.unwrap();
    assert_eq!(servers[0].peek("k").unwrap(), "own");
    // As discovered nodes are, which no configuration has.
    client.set_nodes(["node-3"]).unwrap();
    client.reconfigure(nodes(&[], &["node-0"])).unwrap();
    assert_eq!(names(client.nodes()), ["node-3", "node-0"]);
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    assert_eq!(servers[3].peek("k").unwrap(), "v");

    // By weight.
    let keys: Vec<_> = (0..200).map(|n| format!("w{n}")).collect();
    client
        .reconfigure(nodes(&[("node-1", 1), ("node-2", 9)], &["node-0"]))
        .unwrap();
    for key in &keys {
        client.set(key, "v", Ttl::NEVER).await.unwrap();
    }
    let there = |server: &Server| keys.iter().filter(|key| server.peek(key).is_some()).count();
    assert!(
        there(&servers[2]) > 150 && there(&servers[1]) > 2,
        "{}",
        there(&servers[2])
    );
}

/// A refused setting beside some that may change: nothing of it is applied.
#[tokio::test(start_paused = true)]
async fn what_cannot_change_is_refused_by_name_and_nothing_is_applied() {
    let servers = new_servers(2);
    let first = with(&config(1), |config| {
        config
            .databases
            .insert("items".into(), LoadLimits::default());
        config
            .groups
            .insert("own".into(), group().prefix("o:").nodes(["node-1"]));
        config.connections = 2;
    });
    let client = in_memory(&servers).config(first.clone()).build().unwrap();
    client.set("k", "v", Ttl::NEVER).await.unwrap();
    type Break = fn(&mut Config);
    let cases: &[(&str, Break)] = &[
        ("executor", |config| {
            config.executor = Some(ExecutorConfig::Current)
        }),
        ("load_executor", |config| {
            config.load_executor = Some(ExecutorConfig::Current)
        }),
        ("ring", |config| config.ring = Ring::spymemcached()),
        ("connections", |config| config.connections = 3),
        ("max_value_size", |config| config.max_value_size = 1),
        ("journal.capacity", |config| {
            config.journal = JournalSettings::default().capacity(1)
        }),
        ("databases", |config| config.databases.clear()),
        ("databases", |config| {
            config.databases.insert("x".into(), LoadLimits::default());
        }),
        ("groups", |config| {
            config.groups.remove("g");
        }),
        ("groups", |config| {
            config.groups.insert("x".into(), GroupSettings::default());
        }),
        ("groups.own.prefix", |config| {
            config
                .groups
                .insert("own".into(), GroupSettings::default().nodes(["node-1"]));
        }),
        ("groups.own.nodes", |config| {
            config
                .groups
                .insert("own".into(), GroupSettings::default().prefix("o:"));
        }),
        ("groups.g.nodes", |config| {
            config
                .groups
                .insert("g".into(), GroupSettings::default().nodes(["node-1"]));
        }),
        // And what makes no sense at all.
        ("groups.g.timeout", |config| {
            config
                .groups
                .insert("g".into(), GroupSettings::default().timeout(Duration::ZERO));
        }),
        ("nodes[1]", |config| {
            config.nodes.push(NodeConfig::new("node-1"))
        }),
    ];
    let guard = client.load_guard("items").unwrap();
    for (name, break_it) in cases {
        let next = with(&first, |config| {
            config.nodes = vec![NodeConfig::new("node-1")];
            config.killed = true;
            config.timeout = ms(1);
            config.max_in_flight = 1;
            let nothing = LoadLimits::default().max_concurrent(1).max_queue(0);
            config.databases.insert("items".into(), nothing);
            config
                .groups
                .insert("g".into(), GroupSettings::default().killed(true));
            break_it(config);
        });
        let error = client.reconfigure(next).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfiguration, "{error}");
        assert!(
            error.to_string().contains(&format!(": {name}: ")),
            "{name}: {error}"
        );

        assert_eq!(&*client.nodes()[0].node, "node-0", "{name}");
        assert!(!client.kill_switch().unwrap().is_thrown() && !client.groups()[0].killed);
        assert!(
            format!("{client:?}").contains("timeout: 100ms"),
            "{client:?}"
        );
        let gets = join_all((0..10).map(|_| client.get("k"))).await;
        assert!(
            gets.iter()
                .all(|get| get.as_ref().is_ok_and(Option::is_some)),
            "{name}"
        );
        let load = || async {
            sleep(ms(1)).await;
            Ok::<_, std::io::Error>(1)
        };
        let (one, other) = join(guard.run(load()), guard.run(load())).await;
        assert!(one.is_ok() && other.is_ok(), "{name}");
    }
    client.reconfigure(first).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_shut_down_or_not_ours_takes_no_other_settings() {
    let servers = new_servers(1);
    let first = config(1);
    let client = client(&servers, &first);
    let group = client.group("g").unwrap();
    // By whatever handle.
    group
        .boxed()
        .reconfigure(with(&first, |config| config.killed = true))
        .unwrap();
    assert!(client.kill_switch().unwrap().is_thrown());
    client.shutdown(secs(1)).await;
    for error in [
        client.reconfigure(first.clone()),
        group.reconfigure(first.clone()),
    ] {
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Shutdown);
    }
    let bare = Client::from_service(tower::service_fn(|_: tower_memcached::Request| async {
        Ok::<_, Error>(tower_memcached::Response::Value(None))
    }));
    let error = bare.reconfigure(first).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
}

/// Nodes that come while settings change have the new ones, whoever is first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_come_while_settings_change_have_the_new_ones() {
    let servers = servers(6).await;
    let addresses = addresses(&servers);
    let mut first = Config::default();
    first.nodes = addresses[..1].iter().map(NodeConfig::new).collect();
    (first.timeout, first.attempt_timeout) = (secs(10), secs(10));
    first.stall_timeout = Some(secs(60));
    first.groups.insert("g".into(), group());
    let client = Client::builder().config(first.clone()).build().unwrap();
    first.nodes.clear();
    let places = [7, 3];
    for round in 0..200 {
        let set_nodes = tokio::task::spawn_blocking({
            let (client, addresses) = (client.clone(), addresses.clone());
            move || client.set_nodes([&addresses[round % 6], &addresses[(round + 1) % 6]])
        });
        let places = places[round % 2];
        let next = with(&first, |config| config.max_in_flight = places);
        client.reconfigure(next).unwrap();
        set_nodes.await.unwrap().unwrap();
        if round % 50 != 49 {
            continue;
        }
        // Each of both takes as many as it may now.
        for node in [round % 6, (round + 1) % 6] {
            let others: Vec<_> = addresses
                .iter()
                .map(|node| NodeSpec::new(node).unwrap())
                .collect();
            let both = [others[round % 6].clone(), others[(round + 1) % 6].clone()];
            let is_there = |key: &Key| {
                let place = Ring::default().node_of(&both, key).unwrap();
                both[place].name() == others[node].name()
            };
            let keys = (0..)
                .map(|n| Key::new(format!("k{n}")).unwrap())
                .filter(is_there)
                .take(10);
            let keys: Vec<_> = keys.collect();
            timeout(PATIENCE, client.get(&keys[0]))
                .await
                .unwrap()
                .unwrap();
            servers[node].stall();
            let asked: Vec<_> = keys
                .into_iter()
                .map(|key| {
                    let client = client.clone();
                    tokio::spawn(async move { client.get(&key).await })
                })
                .collect();
            let refused = || asked.iter().filter(|task| task.is_finished()).count();
            eventually("the rest is refused", || refused() == 10 - places).await;
            servers[node].resume();
            for task in asked {
                let _ = timeout(PATIENCE, task).await.unwrap().unwrap();
            }
        }
    }
}

/// Everything that may change changes, to and fro, with some hundred requests a second under way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_or_is_dropped_whatever_changes_under_it() {
    let servers = servers(4).await;
    let addresses = addresses(&servers);
    let nodes = |places: &[usize]| -> Vec<NodeConfig> {
        places
            .iter()
            .map(|&place| NodeConfig::new(&addresses[place]))
            .collect()
    };
    let mut one = Config::default();
    one.nodes = nodes(&[0, 1]);
    (one.timeout, one.attempt_timeout) = (secs(8), secs(4));
    one.connections = 2;
    one.databases.insert("items".into(), LoadLimits::default());
    one.read_through = exact().database("items").load_timeout(secs(8));
    one.groups.insert("g".into(), group().prefix("g:"));
    one.groups
        .insert("own".into(), group().nodes([&addresses[3]]));
    let other = with(&one, |config| {
        config.nodes = vec![
            NodeConfig::new(&addresses[1]).with_weight(3),
            NodeConfig::new(&addresses[2]),
        ];
        (config.timeout, config.attempt_timeout) = (secs(9), secs(5));
        (config.stall_timeout, config.connect_timeout) = (Some(secs(7)), Some(secs(6)));
        (config.max_in_flight, config.max_attempts) = (5_000, 5);
        (config.failure_mode, config.failover_ttl) = (FailureMode::Retry, secs(5));
        (config.retry_budget, config.max_ejection_percent) = (RetryBudget::new(50, 50), 100);
        config.hedged_gets = true;
        config.breaker = BreakerSettings::default().ramp(ms(10)).minimum_requests(50);
        config.probe = ProbeSettings::default().period(ms(300));
        config.journal = JournalSettings::default().overflow(JournalOverflow::Flush);
        config.read_through = exact().load_timeout(secs(7)).max_refills(10).leases(false);
        let limits = LoadLimits::default().max_concurrent(200).rate(100_000);
        config.databases.insert("items".into(), limits);
        let limited = group()
            .prefix("g:")
            .max_in_flight(500)
            .max_queue(100)
            .rate(100_000);
        config.groups.insert(
            "g".into(),
            limited.timeout(secs(6)).attempt_timeout(secs(3)),
        );
        config.groups.insert(
            "own".into(),
            group().nodes([&addresses[0]]).hedged_gets(true),
        );
    });
    let client = Client::builder().config(one.clone()).build().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicUsize::new(0));
    let tasks: Vec<_> = (0..8)
        .map(|task| {
            let (client, stop, done) = (client.clone(), stop.clone(), done.clone());
            let (g, own) = (client.group("g").unwrap(), client.group("own").unwrap());
            tokio::spawn(async move {
                let mut begun = 0;
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("{task}-{}", begun % 20);
                    begun += 1;
                    let load = || async { Ok::<_, std::io::Error>(Some("v")) };
                    client.set(&key, "v", Ttl::secs(60)).await.unwrap();
                    client.get(&key).await.unwrap();
                    g.set(&key, "v", Ttl::secs(60)).await.unwrap();
                    g.get(&key).await.unwrap();
                    assert_eq!(own.get_many([&key]).await.errors().count(), 0);
                    own.delete(&key).await.unwrap();
                    g.get_or_load(&key, Ttl::secs(60), load)
                        .await
                        .unwrap()
                        .unwrap();
                    assert_eq!(client.get_many([&key, "none"]).await.errors().count(), 0);
                    done.fetch_add(1, Ordering::Relaxed);
                    sleep(ms(2)).await;
                }
                begun
            })
        })
        .collect();
    let until = Instant::now() + secs(3);
    let mut changes = 0;
    // Some at the least, on a machine that is busy with others.
    while Instant::now() < until
        || (done.load(Ordering::Relaxed) < 200 && Instant::now() < until + PATIENCE)
    {
        let next = [&one, &other][changes % 2];
        let killed = changes % 7 == 3;
        client
            .reconfigure(with(next, |config| config.killed = killed))
            .unwrap();
        changes += 1;
        sleep(ms(5)).await;
    }
    client.reconfigure(one).unwrap();
    stop.store(true, Ordering::Relaxed);
    let begun = timeout(PATIENCE, join_all(tasks)).await.unwrap();
    let begun: usize = begun
        .into_iter()
        .map(|task| task.expect("no request has failed"))
        .sum();
    assert_eq!(begun, done.load(Ordering::Relaxed));
    assert!(
        begun >= 200 && changes > 20,
        "{begun} turns, {changes} changes"
    );
    let nothing_left = || {
        let groups = client.groups();
        groups
            .iter()
            .all(|group| (group.in_flight, group.queued) == (0, 0))
            && client.nodes().iter().all(|node| node.in_flight == 0)
    };
    eventually("nothing is under way", nothing_left).await;
}
