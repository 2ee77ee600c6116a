//! Groups, switches and other settings where they meet: layers between, keys that do not fit, nodes
//! that are shared or not, wakers that call back.

use std::future::Future as _;
use std::sync::Arc;
use std::sync::mpsc;
use std::task::Context;
use std::time::Duration;

use futures::task::{ArcWake, waker};
use tower_memcached::testing::Server;
use tower_memcached::{
    BreakerState, BulkheadLayer, Client, Config, ErrorKind, Executor, GroupLayer, GroupSettings,
    JournalSettings, KillSwitch, LoadLimits, Node, NodeConfig, NodeSettings, Outcome, Pipelined,
    PipelinedSettings, ReadThroughSettings, SystemConnector, Ttl,
};

use crate::support::{PATIENCE, addresses, eventually, patient, server, servers};

fn config(servers: &[Server]) -> Config {
    let mut config = Config::default();
    config.nodes = addresses(servers)
        .into_iter()
        .map(NodeConfig::new)
        .collect();
    config.timeout = Duration::from_secs(5);
    config.attempt_timeout = Duration::from_secs(2);
    config
}

fn build(config: Config) -> Client {
    let builder = Client::builder().config(config);
    builder.executor(Executor::current()).build().unwrap()
}

#[tokio::test]
async fn a_dropped_write_that_a_layer_keeps_from_being_noted_is_not_acknowledged() {
    let servers = servers(1).await;
    let client = patient(&servers)
        .group("g", GroupSettings::default())
        .layer(BulkheadLayer::new(1))
        .build()
        .unwrap();
    let group = client.group("g").unwrap();
    group.set("k", "old", Ttl::NEVER).await.unwrap();
    servers[0].stall();
    let before = servers[0].commands();
    let busy = tokio::spawn({
        let client = client.clone();
        async move { client.get("x").await }
    });
    eventually("it is under way", || client.nodes()[0].in_flight == 1).await;
    assert_eq!(servers[0].commands(), before);
    let switch = group.kill_switch().unwrap();
    switch.throw();
    let error = group.set("k", "new", Ttl::NEVER).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Overloaded);
    servers[0].resume();
    busy.await.unwrap().unwrap();
    group.set("k", "newer", Ttl::NEVER).await.unwrap();
    switch.reset();
    assert_eq!(group.get("k").await.unwrap(), None);
}

#[tokio::test]
async fn without_a_cluster_below_a_dropped_write_is_not_sent_either() {
    let server = server().await;
    let address = server.address().unwrap().to_string().parse().unwrap();
    let (settings, connector) = (
        PipelinedSettings::default(),
        Arc::new(SystemConnector::new()),
    );
    let executor = Executor::current();
    let pipelined = Pipelined::new(address, settings, connector, &executor).unwrap();
    let node = Node::new("n", pipelined.clone(), NodeSettings::default(), &executor).unwrap();
    let switch = KillSwitch::default();
    let layer = GroupLayer::new("g").kill_switch(switch.clone());
    let over_node = Client::from_service(node.clone()).layer(layer.clone());
    let over_connections = Client::from_service(pipelined).layer(layer);
    over_node.set("k", "old", Ttl::NEVER).await.unwrap();
    switch.throw();
    over_node.set("k", "new", Ttl::NEVER).await.unwrap();
    over_connections
        .set("other", "new", Ttl::NEVER)
        .await
        .unwrap();
    assert_ne!(server.peek("k").as_deref(), Some(&b"new"[..]));
    assert_eq!(server.peek("other"), None);
    eventually("what it would have replaced is deleted", || {
        server.peek("k").is_none() && node.status().journal == 0
    })
    .await;
}

#[tokio::test]
async fn keys_that_do_not_fit_keep_their_places_when_the_switch_is_thrown() {
    let servers = servers(1).await;
    let settings = GroupSettings::default()
        .prefix("p".repeat(20))
        .max_in_flight(1)
        .max_queue(9)
        .max_wait(PATIENCE);
    let client = patient(&servers).group("g", settings).build().unwrap();
    let group = client.group("g").unwrap();
    group.get("a").await.unwrap();
    servers[0].stall();
    let call = |keys: Vec<String>| {
        let group = group.clone();
        tokio::spawn(async move { group.get_many(keys).await })
    };
    let keys = || vec!["a".to_owned(), "b".repeat(240), "c".to_owned()];
    let inside = call(vec!["x".to_owned()]);
    eventually("one is inside", || client.groups()[0].in_flight == 1).await;
    let waits = call(keys());
    eventually("one waits", || client.groups()[0].queued == 1).await;
    group.kill_switch().unwrap().throw();
    servers[0].resume();
    inside.await.unwrap();
    for many in [waits.await.unwrap(), call(keys()).await.unwrap()] {
        assert_eq!(client.groups()[0].queued, 0);
        match many.outcomes() {
            [Outcome::Miss, Outcome::Error(error), Outcome::Miss] => {
                assert_eq!(error.kind(), ErrorKind::InvalidKey);
            }
            outcomes => panic!("{outcomes:?}"),
        }
    }
}

#[tokio::test]
async fn journals_are_worked_off_though_a_client_was_never_used_but_killed() {
    let servers = servers(1).await;
    let mut config = config(&servers);
    config.killed = true;
    config.journal = JournalSettings::default().capacity(10);
    let client = build(config);
    for round in 0..4 {
        for n in 0..8 {
            client
                .set(format!("k{round}{n}"), "v", Ttl::NEVER)
                .await
                .unwrap();
        }
        eventually("they are deleted", || client.nodes()[0].journal == 0).await;
    }
    assert_eq!(client.nodes()[0].state, BreakerState::Closed);
    client.kill_switch().unwrap().reset();
    assert_eq!(client.get("k00").await.unwrap(), None);
}

#[tokio::test]
async fn a_group_loads_by_the_clients_guard_whether_built_or_reconfigured() {
    let servers = servers(1).await;
    let mut config = config(&servers);
    let limits = LoadLimits::default().max_concurrent(1);
    config.databases.insert("items".into(), limits);
    let own = ReadThroughSettings::default();
    let group = GroupSettings::default().prefix("g:").read_through(own);
    config.groups.insert("g".into(), group);
    config
        .groups
        .insert("plain".into(), GroupSettings::default().prefix("p:"));
    let reconfigured = build(config.clone());
    config.read_through = ReadThroughSettings::default().database("items");
    reconfigured.reconfigure(config.clone()).unwrap();
    for (what, client) in [("reconfigured", reconfigured), ("built", build(config))] {
        for group in ["g", "plain"] {
            let load = || async { Ok::<_, std::io::Error>(Some("x")) };
            let group = client.group(group).unwrap();
            group.get_or_load(what, Ttl::secs(9), load).await.unwrap();
        }
        let status = client.load_guard("items").unwrap().status();
        assert_eq!(status.started, 2, "{what}");
    }
}

#[tokio::test]
async fn the_clients_flush_reaches_the_nodes_that_groups_have_of_their_own() {
    let servers = servers(2).await;
    let own = GroupSettings::default().nodes(addresses(&servers[1..]));
    let client = patient(&servers[..1]).group("g", own).build().unwrap();
    let group = client.group("g").unwrap();
    group.set("k", "v", Ttl::NEVER).await.unwrap();
    assert_eq!(client.flush_all().await.unwrap().len(), 2);
    assert_eq!(group.get("k").await.unwrap(), None);
    assert_eq!(group.version().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_groups_nodes_are_its_own_or_not_its_to_replace() {
    let servers = servers(3).await;
    let mut config = config(&servers[..1]);
    let own = GroupSettings::default().nodes(addresses(&servers[1..2]));
    config.groups.insert("own".into(), own);
    config
        .groups
        .insert("shares".into(), GroupSettings::default());
    let client = build(config.clone());
    let shares = client.group("shares").unwrap();
    let error = shares.set_nodes(addresses(&servers[2..])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    assert_eq!(*client.nodes()[0].node, *addresses(&servers)[0]);

    // What discovery has found stays where the configuration does not say.
    let own = client.group("own").unwrap();
    own.set_nodes(addresses(&servers[2..])).unwrap();
    config.nodes.clear();
    let nodes = GroupSettings::default().nodes(Vec::<String>::new());
    config.groups.insert("own".into(), nodes);
    client.reconfigure(config.clone()).unwrap();
    assert_eq!(*own.nodes()[0].node, *addresses(&servers)[2]);
    config.nodes.push(NodeConfig::new("127.0.0.1"));
    let error = Client::builder().config(config).build().unwrap_err();
    assert!(error.to_string().contains("groups.own.nodes"), "{error}");
}

#[test]
fn what_no_machine_has_is_refused() {
    let mut config = Config::default();
    config.nodes.push(NodeConfig::new("127.0.0.1"));
    config.connections = usize::MAX;
    let error = Client::builder().config(config).build().unwrap_err();
    assert!(error.to_string().contains("connections"), "{error}");
}

/// Reconfigures when it is woken.
struct CallsBack(Client, Config);

impl ArcWake for CallsBack {
    fn wake_by_ref(this: &Arc<Self>) {
        let outcome = this.0.reconfigure(this.1.clone());
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Overloaded);
    }
}

#[tokio::test]
async fn who_is_woken_by_a_reconfiguration_may_ask_for_another_without_a_deadlock() {
    let servers = servers(1).await;
    let mut config = config(&servers);
    let group = |places| {
        let group = GroupSettings::default().max_in_flight(places).max_queue(9);
        group.max_wait(PATIENCE)
    };
    config.groups.insert("g".into(), group(1));
    let client = build(config.clone());
    let in_group = client.group("g").unwrap();
    servers[0].stall();
    let inside = tokio::spawn({
        let group = in_group.clone();
        async move { group.get("x").await }
    });
    eventually("one is inside", || client.groups()[0].in_flight == 1).await;
    config.groups.insert("g".into(), group(9));
    let mut waits = Box::pin(in_group.get("y"));
    let waker = waker(Arc::new(CallsBack(client.clone(), config.clone())));
    assert!(
        waits
            .as_mut()
            .poll(&mut Context::from_waker(&waker))
            .is_pending()
    );
    let (done, is_done) = mpsc::channel();
    let other = client.clone();
    std::thread::spawn(move || done.send(other.reconfigure(config).is_ok()));
    let outcome = tokio::task::spawn_blocking(move || is_done.recv_timeout(PATIENCE));
    assert_eq!(outcome.await.unwrap(), Ok(true));
    servers[0].resume();
    waits.await.unwrap();
    inside.await.unwrap().unwrap();
}
