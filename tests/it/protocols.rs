//! Which protocol a server is asked in, how that is found out, and what becomes of requests when it
//! changes under them.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::time::sleep;
use tower_memcached::testing::{Dialect, Memcached, Server};
use tower_memcached::{
    Address, BoxStream, CasOutcome, Client, Connecting, Connector, ErrorKind, Executor, Key,
    NodeConfig, NodeSpec, Outcome, ProbeSettings, Protocol, Sent, Ttl,
};

use crate::support::{
    addresses, eventually, in_memory, keys_of, patient, servers, until_closed, until_open,
};

const TTL: Ttl = Ttl::secs(60);

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn become_old(server: &Server) {
    server.set_version("1.4.39");
    server.set_dialect(Dialect::Classic);
}

fn become_new(server: &Server) {
    server.set_version("1.6.18");
    server.set_dialect(Dialect::Meta);
}

/// No probes that are not asked for.
fn unprobed() -> ProbeSettings {
    ProbeSettings::default().initial_delay(Duration::from_secs(3_600))
}

fn protocols(client: &Client) -> Vec<Option<Protocol>> {
    client.nodes().iter().map(|node| node.protocol).collect()
}

fn meta_commands(server: &Server) -> u64 {
    let named = |name| server.commands_named(name);
    ["mg", "ms", "md", "ma"].into_iter().map(named).sum()
}

/// What happens to a connection that a [`Scripted`] connector makes.
enum Meets {
    Server,
    Refusal,
    /// Lines that start with one of these end the connection; the rest is the server's.
    ServerBehind(&'static [&'static str]),
    /// It answers a question for the version, and whatever comes then ends the connection.
    VersionOnly,
    /// Whatever comes ends the connection.
    Nobody,
}

/// Connects to a server without sockets, as told for each connection.
struct Scripted<F> {
    server: Server,
    made: Arc<AtomicUsize>,
    meets: F,
}

impl<F> Connector for Scripted<F>
where
    F: Fn(usize) -> Meets + Send + Sync + 'static,
{
    fn connect(&self, _: &Address) -> Connecting {
        let number = self.made.fetch_add(1, Ordering::SeqCst);
        let (meets, server) = ((self.meets)(number), self.server.clone());
        Box::pin(async move {
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            match meets {
                Meets::Server => drop(tokio::spawn(server.serve(theirs))),
                Meets::Refusal => return Err(std::io::ErrorKind::ConnectionRefused.into()),
                Meets::ServerBehind(forbidden) => {
                    drop(tokio::spawn(forward(theirs, server, forbidden)));
                }
                Meets::VersionOnly => {
                    let mut theirs = theirs;
                    tokio::spawn(async move {
                        let mut question = [0; 9];
                        theirs.read_exact(&mut question).await.unwrap();
                        theirs.write_all(b"VERSION 1.6.18\r\n").await.unwrap();
                        let _ = theirs.read(&mut question).await;
                    });
                }
                Meets::Nobody => {
                    let mut theirs = theirs;
                    tokio::spawn(async move {
                        let _ = theirs.read(&mut [0; 64]).await;
                    });
                }
            }
            Ok(Box::new(ours) as BoxStream)
        })
    }
}

/// Hands what comes on to the server, unless a piece of it starts with what is forbidden.
async fn forward(client: DuplexStream, server: Server, forbidden: &'static [&'static str]) {
    let (proxy, end) = tokio::io::duplex(64 * 1024);
    tokio::spawn(server.serve(end));
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_server, mut to_server) = tokio::io::split(proxy);
    let requests = async {
        let mut piece = [0; 4096];
        while let Ok(length @ 1..) = from_client.read(&mut piece).await {
            let begins = |with: &&str| piece[..length].starts_with(with.as_bytes());
            if forbidden.iter().any(begins) || to_server.write_all(&piece[..length]).await.is_err()
            {
                break;
            }
        }
    };
    tokio::select! {
        _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
        () = requests => {}
    }
}

fn scripted(
    server: &Server,
    meets: impl Fn(usize) -> Meets + Send + Sync + 'static,
) -> (tower_memcached::ClientBuilder, Arc<AtomicUsize>) {
    let made = Arc::new(AtomicUsize::new(0));
    let connector = Scripted {
        server: server.clone(),
        made: made.clone(),
        meets,
    };
    let builder = Client::builder()
        .nodes(["scripted"])
        .connector(connector)
        .executor(Executor::current())
        .probe(unprobed());
    (builder, made)
}

/// All that every protocol can say.
async fn everything_works(client: &Client, key: &str) {
    assert!(client.get(key).await.unwrap().is_none());
    client.set(key, "1", TTL).await.unwrap();
    assert_eq!(client.get(key).await.unwrap().unwrap(), "1");
    assert_eq!(client.increment(key, 4).await.unwrap(), Some(5));
    assert_eq!(client.decrement(key, 2).await.unwrap(), Some(3));
    assert!(!client.add(key, "x", TTL).await.unwrap());
    assert!(client.append(key, "7").await.unwrap());
    assert!(client.prepend(key, "9").await.unwrap());
    assert!(client.touch(key, TTL).await.unwrap());
    let value = client.get_and_touch(key, TTL).await.unwrap();
    assert_eq!(value.unwrap(), "937");
    assert!(client.replace(key, "new", TTL).await.unwrap());
    assert_eq!(client.gets(key).await.unwrap().unwrap(), "new");
    assert!(client.delete(key).await.unwrap());
    assert!(!client.delete(key).await.unwrap());
}

#[tokio::test]
async fn each_node_of_a_mixed_cluster_is_asked_in_what_it_speaks() {
    let servers = servers(3).await;
    become_old(&servers[1]);
    servers[2].set_dialect(Dialect::Proxy);
    let client: Client = patient(&servers).probe(unprobed()).build().unwrap();
    assert_eq!(protocols(&client), [None, None, None]);
    let mut all = Vec::new();
    for place in 0..3 {
        for key in keys_of(&servers, place, 5) {
            let key = std::str::from_utf8(key.as_bytes()).unwrap().to_owned();
            everything_works(&client, &key).await;
            client.set(&key, &*key, TTL).await.unwrap();
            all.push(key);
        }
    }
    let (meta, classic) = (Some(Protocol::Meta), Some(Protocol::Classic));
    assert_eq!(protocols(&client), [meta, classic, classic]);
    assert!(meta_commands(&servers[0]) > 0);
    assert_eq!(servers[0].commands_named("get"), 0);
    assert_eq!(meta_commands(&servers[1]) + meta_commands(&servers[2]), 0);

    let many = client.get_many(&all).await;
    let outcomes = many.outcomes().iter();
    assert!(
        outcomes
            .clone()
            .all(|outcome| matches!(outcome, Outcome::Hit(_)))
    );
    assert_eq!(outcomes.count(), 15);
    let keys = keys_of(&servers, 1, 1);
    let token = client.gets(&keys[0]).await.unwrap().unwrap().cas().unwrap();
    let swapped = client.cas(&keys[0], "swapped", TTL, token).await.unwrap();
    assert_eq!(swapped, CasOutcome::Stored);
}

#[tokio::test]
async fn real_servers_of_all_kinds_are_asked_in_one_cluster() {
    let memcached = Memcached::spawn(&[]).unwrap();
    let others = servers(2).await;
    become_old(&others[0]);
    others[1].set_dialect(Dialect::Proxy);
    let nodes = [memcached.address()].into_iter().chain(addresses(&others));
    let client: Client = patient(&[]).nodes(nodes).build().unwrap();
    for n in 0..60 {
        everything_works(&client, &format!("mixed-{n}")).await;
    }
    let (meta, classic) = (Some(Protocol::Meta), Some(Protocol::Classic));
    assert_eq!(protocols(&client), [meta, classic, classic]);
}

#[tokio::test]
async fn a_node_may_be_asked_in_a_protocol_of_its_own() {
    let servers = servers(2).await;
    let addresses = addresses(&servers);
    let client: Client = patient(&servers[..1])
        .node(NodeConfig::new(&addresses[1]).with_protocol(Protocol::Classic))
        .probe(unprobed())
        .build()
        .unwrap();
    // Known without having been found out.
    assert_eq!(protocols(&client), [None, Some(Protocol::Classic)]);
    for place in 0..2 {
        for key in keys_of(&servers, place, 3) {
            client.set(&key, "v", TTL).await.unwrap();
            assert_eq!(client.get(&key).await.unwrap().unwrap(), "v");
        }
    }
    assert_eq!(meta_commands(&servers[0]), 6);
    assert_eq!(meta_commands(&servers[1]), 0);
    assert_eq!(servers[1].commands_named("set"), 3);

    // And in another one from now on.
    let specs = addresses.iter().map(|node| NodeSpec::new(node).unwrap());
    let specs = specs.map(|spec| spec.with_protocol(Protocol::Meta));
    client.set_node_specs(specs.collect::<Vec<_>>()).unwrap();
    let key = &keys_of(&servers, 1, 1)[0];
    client.set(key, "w", TTL).await.unwrap();
    assert!(meta_commands(&servers[1]) > 0);
}

#[tokio::test]
async fn the_meta_protocol_alone_refuses_an_old_server_and_says_why() {
    let servers = servers(1).await;
    become_old(&servers[0]);
    let client = patient(&servers).protocol(Protocol::Meta).max_attempts(1);
    let client: Client = client.build().unwrap();
    let error = client.get("k").await.unwrap_err();
    assert_eq!(error.sent(), Sent::No);
    assert!(error.to_string().contains("1.4.39"), "{error}");
    // It is not a place to ask.
    until_open(&client, 0).await;
    let cause = client.nodes()[0].last_cause.clone().unwrap();
    assert_eq!(cause.kind(), ErrorKind::Unsupported, "{cause}");
}

#[tokio::test]
async fn a_modern_server_is_asked_in_the_classic_protocol_if_that_is_wanted() {
    let memcached = Memcached::spawn(&[]).unwrap();
    let client = patient(&[]).nodes([memcached.address()]);
    let client: Client = client.protocol(Protocol::Classic).build().unwrap();
    everything_works(&client, "k").await;
    assert_eq!(protocols(&client), [Some(Protocol::Classic)]);
    let binary = Key::binary(b"with space").unwrap();
    let error = client.get(&binary).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!(error.sent(), Sent::No);
}

/// One node, which has to do: whatever does not come back is an error.
fn changing(server: &Server) -> Client {
    in_memory(std::slice::from_ref(server))
        .probe(unprobed())
        .connections(2)
        .pool_size(4)
        .build()
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_replaced_by_an_older_one_and_back_fails_nobody_who_comes_then() {
    let server = Server::new();
    let client = changing(&server);
    for round in 0..10 {
        for protocol in [Protocol::Meta, Protocol::Classic] {
            match protocol {
                Protocol::Classic => become_old(&server),
                _ => become_new(&server),
            }
            server.restart_empty();
            let calls = (0..50).map(|n| {
                let client = client.clone();
                async move {
                    let key = format!("{round}-{n}");
                    client.set(&key, "v", TTL).await?;
                    client.get(&key).await
                }
            });
            for read in join_all(calls).await {
                let read = read.unwrap_or_else(|error| panic!("{round} {protocol}: {error}"));
                assert_eq!(read.unwrap(), "v");
            }
            assert_eq!(protocols(&client), [Some(protocol)], "{round}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn only_what_was_on_the_wire_may_fail_when_a_node_is_replaced() {
    let server = Server::new();
    let client = changing(&server);
    client.set("k", "v", TTL).await.unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..20)
        .map(|_| {
            let (client, ended) = (client.clone(), ended.clone());
            tokio::spawn(async move {
                let mut failed = 0;
                while !ended.load(Ordering::Relaxed) {
                    // Counted, not moved, and never sent twice.
                    match client.increment("n", 1).await {
                        Ok(_) => sleep(ms(1)).await,
                        Err(error) => {
                            assert_eq!(error.sent(), Sent::Maybe, "{error}");
                            failed += 1;
                        }
                    }
                }
                failed
            })
        })
        .collect();
    const CHANGES: usize = 20;
    for change in 0..CHANGES {
        match change % 2 {
            0 => become_old(&server),
            _ => become_new(&server),
        }
        server.restart_empty();
        server.insert("n", "0");
        sleep(ms(20)).await;
    }
    ended.store(true, Ordering::Relaxed);
    for caller in callers {
        assert!(caller.await.unwrap() <= CHANGES);
    }
    assert_eq!(protocols(&client), [Some(Protocol::Meta)]);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_killed_while_it_is_greeted_is_not_taken_for_a_proxy() {
    let server = Server::new();
    // Between the version and `mn`, and before the version; it is there again at the next attempt.
    let killed: [fn() -> Meets; 2] = [|| Meets::VersionOnly, || Meets::Nobody];
    for killed in killed {
        let (builder, made) = scripted(&server, move |number| match number {
            0 => killed(),
            _ => Meets::Server,
        });
        let client: Client = builder.connections(1).build().unwrap();
        client.set("k", "v", TTL).await.unwrap();
        assert_eq!(protocols(&client), [Some(Protocol::Meta)]);
        assert_eq!(made.load(Ordering::SeqCst), 2);
    }
    // It is not there.
    let killed = |number| match number {
        0 => Meets::VersionOnly,
        _ => Meets::Refusal,
    };
    let (builder, _) = scripted(&server, killed);
    let client: Client = builder.build().unwrap();
    let error = client.get("k").await.unwrap_err();
    assert_eq!(error.sent(), Sent::No, "{error}");
    assert_eq!(protocols(&client), [None]);
}

#[tokio::test(start_paused = true)]
async fn a_proxy_that_does_not_know_the_version_is_asked_in_the_classic_protocol() {
    let server = Server::new();
    server.set_dialect(Dialect::Proxy);
    let (builder, _) = scripted(&server, |_| {
        Meets::ServerBehind(&["version", "mn", "mg", "ms", "flush_all", "gat"])
    });
    let client: Client = builder.pool_size(3).build().unwrap();
    everything_works(&client, "k").await;
    assert_eq!(protocols(&client), [Some(Protocol::Classic)]);
    let calls = (0..30).map(|n| {
        let client = client.clone();
        async move { client.set(format!("k{n}"), "v", TTL).await }
    });
    for outcome in join_all(calls).await {
        outcome.unwrap();
    }
    let token = client.gets("k1").await.unwrap().unwrap().cas().unwrap();
    let error = client.cas("k1", "w", TTL, token).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(server.open_connections() <= 3);
}

/// Answers the version by itself, and everything else by saying that it cannot.
#[derive(Clone)]
struct ProxyOfTheDead(Arc<Mutex<Option<Server>>>);

impl Connector for ProxyOfTheDead {
    fn connect(&self, _: &Address) -> Connecting {
        let server = self.0.lock().unwrap().clone();
        Box::pin(async move {
            let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
            match server {
                Some(server) => drop(tokio::spawn(server.serve(theirs))),
                None => drop(tokio::spawn(async move {
                    let mut piece = [0; 4096];
                    while let Ok(length @ 1..) = theirs.read(&mut piece).await {
                        let answer: &[u8] = match &piece[..length] {
                            [b'v', ..] => b"VERSION 0.5.0\r\n",
                            [b'm', ..] => return,
                            _ => b"SERVER_ERROR Connection refused\r\n",
                        };
                        theirs.write_all(answer).await.unwrap();
                    }
                })),
            }
            Ok(Box::new(ours) as BoxStream)
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_proxy_in_front_of_a_dead_server_is_out_until_that_is_back() {
    let server = Server::new();
    server.set_dialect(Dialect::Proxy);
    server.set_version("0.5.0");
    let proxy = ProxyOfTheDead(Arc::new(Mutex::new(Some(server.clone()))));
    let client: Client = Client::builder()
        .nodes(["proxy"])
        .connector(proxy.clone())
        .executor(Executor::current())
        .build()
        .unwrap();
    client.set("k", "v", TTL).await.unwrap();
    *proxy.0.lock().unwrap() = None;
    server.restart_empty();
    eventually("it is out", || {
        client.nodes()[0].state == tower_memcached::BreakerState::Open
    })
    .await;
    *proxy.0.lock().unwrap() = Some(server.clone());
    until_closed(&client, 0).await;
    client.set("k", "w", TTL).await.unwrap();
    assert_eq!(client.get("k").await.unwrap().unwrap(), "w");
    assert_eq!(protocols(&client), [Some(Protocol::Classic)]);
}

#[tokio::test(start_paused = true)]
async fn an_old_node_that_stops_is_out_and_comes_back() {
    let servers = [Server::new(), Server::new()];
    servers.iter().for_each(become_old);
    let client: Client = in_memory(&servers).build().unwrap();
    let keys: Vec<_> = (0..20).map(|n| format!("k{n}")).collect();
    for key in &keys {
        client.set(key, "v", TTL).await.unwrap();
    }
    servers[0].stall();
    let calls = keys.iter().map(|key| client.set(key, "w", TTL));
    for outcome in join_all(calls).await {
        outcome.unwrap();
    }
    until_open(&client, 0).await;
    let began = tokio::time::Instant::now();
    for key in &keys {
        assert_eq!(client.get(key).await.unwrap().unwrap(), "w");
    }
    assert!(began.elapsed() < ms(5), "nobody waits for it");
    servers[0].resume();
    until_closed(&client, 0).await;
    for key in &keys {
        client.set(key, "x", TTL).await.unwrap();
        assert_eq!(client.get(key).await.unwrap().unwrap(), "x");
    }
    assert!(servers[0].commands_named("set") > 0);
    assert_eq!(meta_commands(&servers[0]), 0);
}

#[tokio::test(start_paused = true)]
async fn probes_over_fresh_connections_know_what_is_known_of_a_node() {
    let server = Server::new();
    become_old(&server);
    let client: Client = in_memory(std::slice::from_ref(&server)).build().unwrap();
    client.set("k", "v", TTL).await.unwrap();
    server.stall();
    let _late = client.set("k", "w", TTL).await;
    until_open(&client, 0).await;
    // It is a newer one that comes back, and the probes find that out for the requests.
    become_new(&server);
    server.restart_empty();
    server.resume();
    until_closed(&client, 0).await;
    assert_eq!(protocols(&client), [Some(Protocol::Meta)]);
    let unknown = server.commands_named("unknown");
    client.set("k", "x", TTL).await.unwrap();
    assert_eq!(server.commands_named("unknown"), unknown);
    assert_eq!(server.commands_named("set"), 1);
}
