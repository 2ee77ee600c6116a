//! Nodes that come, go and get other weights while the client is used.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::time::{Instant, advance, sleep, timeout};
use tower_memcached::testing::Server;
use tower_memcached::{
    Address, BoxStream, BreakerState, CasOutcome, Client, Connecting, Connector, EjectionCause,
    Executor, FailureMode, GroupLayer, JournalOverflow, JournalSettings, Key, KillSwitch, NodeSpec,
    Outcome, ProbeSettings, Protocol, Ring, Ttl,
};

use crate::support::{
    InMemory, PATIENCE, addresses, eventually, keys_of, patient, servers, until_closed, until_open,
};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn specs(servers: &[&Server]) -> Vec<NodeSpec> {
    let spec = |server: &&Server| NodeSpec::new(&server.address().unwrap().to_string()).unwrap();
    servers.iter().map(spec).collect()
}

async fn set_all(client: &Client, keys: &[Key], value: &'static str) {
    for key in keys {
        client.set(key, value, Ttl::NEVER).await.unwrap();
    }
}

async fn read(client: &Client, key: &Key) -> Option<String> {
    let value = client.get(key).await.unwrap()?;
    Some(String::from_utf8(value.to_vec()).unwrap())
}

/// Keys of the second of two servers are written at the first, then at the second, then the second is
/// taken away again.
#[tokio::test]
async fn a_key_that_comes_back_is_not_read_as_it_was_when_it_left() {
    let servers = servers(2).await;
    let client = patient(&servers[..1]).build().unwrap();
    let keys = keys_of(&servers, 1, 7);
    set_all(&client, &keys, "1").await;
    client.set_nodes(addresses(&servers)).unwrap();
    // In every way there is to change a key.
    client.set(&keys[0], "2", Ttl::NEVER).await.unwrap();
    assert!(client.add(&keys[1], "2", Ttl::NEVER).await.unwrap());
    client.delete(&keys[2]).await.unwrap();
    servers[1].insert(keys[3].as_bytes(), "1");
    assert!(client.replace(&keys[3], "2", Ttl::NEVER).await.unwrap());
    servers[1].insert(keys[4].as_bytes(), "1");
    assert_eq!(client.increment(&keys[4], 1).await.unwrap(), Some(2));
    servers[1].insert(keys[5].as_bytes(), "1");
    let token = client.gets(&keys[5]).await.unwrap().unwrap().cas().unwrap();
    let swapped = client.cas(&keys[5], "2", Ttl::NEVER, token).await;
    assert_eq!(swapped.unwrap(), CasOutcome::Stored);

    client.set_nodes(addresses(&servers[..1])).unwrap();
    for key in &keys[..6] {
        assert_eq!(read(&client, key).await, None, "{key:?}");
    }
    // What nobody has changed is still there.
    assert_eq!(read(&client, &keys[6]).await.as_deref(), Some("1"));
    eventually("it is deleted there", || servers[0].len() == 1).await;
}

#[tokio::test]
async fn a_server_that_comes_back_is_not_believed_what_was_written_elsewhere() {
    let servers = servers(3).await;
    let client = patient(&servers[..2]).build().unwrap();
    let keys = keys_of(&servers[..2], 0, 20);
    set_all(&client, &keys, "1").await;
    client.set_nodes(addresses(&servers[1..2])).unwrap();
    set_all(&client, &keys[..10], "2").await;
    // It is away for long, and others come and go meanwhile.
    for _ in 0..50 {
        client.set_nodes(addresses(&servers[1..])).unwrap();
        client
            .set_nodes([1, 2].map(|n| addresses(&servers)[3 - n].clone()))
            .unwrap();
        client.set_nodes(addresses(&servers[1..2])).unwrap();
    }
    assert_eq!(servers[0].peek(keys[0].as_bytes()).unwrap(), "1");
    client.set_nodes(addresses(&servers[..2])).unwrap();
    for key in &keys[..10] {
        assert_ne!(read(&client, key).await.as_deref(), Some("1"));
    }
    assert_eq!(read(&client, &keys[10]).await.as_deref(), Some("1"));
    eventually("its journal is worked off", || {
        client.nodes()[0].journal == 0
    })
    .await;
    for key in &keys[..10] {
        assert_eq!(servers[0].peek(key.as_bytes()), None);
    }
}

/// The first of two is a key's home before the second comes, and stands in for that later.
#[tokio::test]
async fn who_stands_in_for_a_new_node_does_not_answer_with_what_it_had_before() {
    let servers = servers(2).await;
    let client = patient(&servers[..1]).build().unwrap();
    let key = &keys_of(&servers, 1, 1)[0];
    client.set(key, "1", Ttl::NEVER).await.unwrap();
    client.set_nodes(addresses(&servers)).unwrap();
    client.set(key, "2", Ttl::NEVER).await.unwrap();
    servers[1].refuse();
    until_open(&client, 1).await;
    assert_eq!(read(&client, key).await, None);
}

/// Something is written at a stand-in, then the ring changes, the key is written at its new home,
/// the ring changes back, and the stand-in stands in again.
#[tokio::test]
async fn a_stand_in_of_before_does_not_answer_with_what_it_got_then() {
    let servers = servers(3).await;
    let client = patient(&servers[..2])
        .probe(ProbeSettings::default().period(ms(50)))
        .build()
        .unwrap();
    // The first one's, and the third one's once that is there.
    let key = &keys_of(&servers[..2], 0, 500)
        .into_iter()
        .find(|key| {
            let all = specs(&servers.iter().collect::<Vec<_>>());
            Ring::default().node_of(&all, key) == Some(2)
        })
        .unwrap();
    client.get(key).await.unwrap();
    servers[0].refuse();
    until_open(&client, 0).await;
    client.set(key, "1", Ttl::NEVER).await.unwrap();
    assert_eq!(servers[1].peek(key.as_bytes()).unwrap(), "1");
    // Its home leaves, and comes back.
    client.set_nodes(addresses(&servers[1..])).unwrap();
    client.set_nodes(addresses(&servers)).unwrap();
    client.set(key, "2", Ttl::NEVER).await.unwrap();
    assert_eq!(servers[2].peek(key.as_bytes()).unwrap(), "2");
    client.set_nodes(addresses(&servers[..2])).unwrap();
    assert_ne!(read(&client, key).await.as_deref(), Some("1"));
    until_open(&client, 0).await;
    assert_ne!(read(&client, key).await.as_deref(), Some("1"));
}

/// A home that is out with nobody to stand in, and a kill switch.
#[tokio::test]
async fn a_write_that_is_not_made_outdates_former_homes_too() {
    let servers = servers(2).await;
    let client = patient(&servers[..1])
        .failure_mode(FailureMode::Cancel)
        .build()
        .unwrap();
    let keys = keys_of(&servers, 1, 3);
    set_all(&client, &keys, "1").await;
    client.set_nodes(addresses(&servers)).unwrap();
    client.get(&keys[0]).await.unwrap();
    let switch = KillSwitch::default();
    let group = client.layer(GroupLayer::new("group").kill_switch(switch.clone()));
    switch.throw();
    group.set(&keys[1], "2", Ttl::NEVER).await.unwrap();
    servers[1].refuse();
    until_open(&client, 1).await;
    client.set(&keys[0], "2", Ttl::NEVER).await.unwrap_err();
    client.set_nodes(addresses(&servers[..1])).unwrap();
    assert_eq!(read(&client, &keys[0]).await, None);
    assert_eq!(read(&client, &keys[1]).await, None);
    assert_eq!(read(&client, &keys[2]).await.as_deref(), Some("1"));
}

async fn away_and_overflowed(overflow: JournalOverflow) -> (Vec<Server>, Client, Vec<Key>) {
    let servers = servers(2).await;
    let journal = JournalSettings::default().capacity(10).overflow(overflow);
    let client = patient(&servers)
        .journal(journal)
        .probe(ProbeSettings::default().period(ms(50)).initial_delay(ms(1)))
        .build()
        .unwrap();
    let keys = keys_of(&servers, 0, 50);
    set_all(&client, &keys, "1").await;
    // It is known which process it is once it has been probed.
    let asked = || servers[0].commands_named("stats") > 0;
    eventually("it is known", asked).await;
    client.set_nodes(addresses(&servers[1..])).unwrap();
    set_all(&client, &keys, "2").await;
    (servers, client, keys)
}

#[tokio::test]
async fn a_server_of_which_too_much_was_written_elsewhere_is_not_asked_until_it_is_flushed() {
    let (servers, client, keys) = away_and_overflowed(JournalOverflow::Refuse).await;
    client.set_nodes(addresses(&servers)).unwrap();
    let status = &client.nodes()[0];
    assert_eq!(status.state, BreakerState::Open);
    assert_eq!(status.cause, Some(EjectionCause::Journal));
    for key in &keys {
        assert_eq!(read(&client, key).await.as_deref(), Some("2"));
    }
    sleep(ms(500)).await;
    assert_ne!(client.nodes()[0].state, BreakerState::Closed);
    let _ = client.flush_all().await;
    until_closed(&client, 0).await;
    assert_eq!(servers[0].len(), 1, "but for the canary");
}

#[tokio::test]
async fn a_server_of_which_too_much_was_written_elsewhere_may_be_flushed_by_itself() {
    let (servers, client, keys) = away_and_overflowed(JournalOverflow::Flush).await;
    client.set_nodes(addresses(&servers)).unwrap();
    until_closed(&client, 0).await;
    for key in &keys {
        assert_ne!(read(&client, key).await.as_deref(), Some("1"));
    }
}

#[tokio::test]
async fn a_server_that_was_restarted_while_it_was_away_need_not_be_flushed() {
    let (servers, client, _) = away_and_overflowed(JournalOverflow::Refuse).await;
    // Its start is known to the second.
    sleep(ms(1100)).await;
    servers[0].restart_empty();
    client.set_nodes(addresses(&servers)).unwrap();
    until_closed(&client, 0).await;
    assert_eq!(servers[0].commands_named("flush_all"), 0);
}

#[tokio::test]
async fn what_is_flushed_is_flushed_on_a_server_that_is_away_as_well() {
    let servers = servers(2).await;
    let client = patient(&servers).build().unwrap();
    let key = &keys_of(&servers, 0, 1)[0];
    client.set(key, "1", Ttl::NEVER).await.unwrap();
    client.set_nodes(addresses(&servers[1..])).unwrap();
    let _ = client.flush_all().await;
    assert!(servers[0].peek(key.as_bytes()).is_some());
    client.set_nodes(addresses(&servers)).unwrap();
    assert_eq!(read(&client, key).await, None);
    until_closed(&client, 0).await;
    assert_eq!(read(&client, key).await, None);
    assert_eq!(servers[0].commands_named("flush_all"), 1);
}

/// The first connection to the first server loses its way, until it is let go.
struct Detour {
    direct: InMemory,
    dialled: AtomicUsize,
    held: Arc<Mutex<Vec<u8>>>,
    let_go: Arc<Notify>,
}

impl Connector for Detour {
    fn connect(&self, address: &Address) -> Connecting {
        let first = self.dialled.fetch_add(1, Ordering::Relaxed) == 0;
        if !first {
            return self.direct.connect(address);
        }
        let server = self.direct.0[0].clone();
        let (held, let_go) = (self.held.clone(), self.let_go.clone());
        Box::pin(async move {
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let (mut near, far) = tokio::io::duplex(64 * 1024);
            tokio::spawn(server.serve(far));
            tokio::spawn(async move {
                let (mut up, mut answers) = tokio::io::split(theirs);
                let mut buffer = [0; 4096];
                // The greeting passes.
                let greeting = up.read(&mut buffer).await.unwrap();
                near.write_all(&buffer[..greeting]).await.unwrap();
                let answer = near.read(&mut buffer).await.unwrap();
                answers.write_all(&buffer[..answer]).await.unwrap();
                loop {
                    match up.read(&mut buffer).await {
                        Ok(0) | Err(_) => break,
                        Ok(read) => held.lock().unwrap().extend_from_slice(&buffer[..read]),
                    }
                }
                let_go.notified().await;
                let late = std::mem::take(&mut *held.lock().unwrap());
                near.write_all(&late).await.unwrap();
                near.shutdown().await.unwrap();
                let mut discarded = Vec::new();
                let _ = near.read_to_end(&mut discarded).await;
            });
            Ok(Box::new(ours) as BoxStream)
        })
    }
}

/// A write whose caller has left is on its way to a server that is then taken away, and is executed
/// when that is back and has been told to forget the key.
#[tokio::test(start_paused = true)]
async fn what_a_server_was_sent_before_it_went_away_is_not_read_when_it_is_back() {
    let servers = [Server::new(), Server::new()];
    let (held, let_go) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::new(Notify::new()));
    let client = Client::builder()
        .nodes(["node-0"])
        .connector(Detour {
            direct: InMemory(servers.to_vec()),
            dialled: AtomicUsize::new(0),
            held: held.clone(),
            let_go: let_go.clone(),
        })
        .protocol(Protocol::Meta)
        .executor(Executor::current())
        .build()
        .unwrap();
    let left = timeout(ms(1), client.set("k", "1", Ttl::NEVER)).await;
    left.unwrap_err();
    assert!(String::from_utf8_lossy(&held.lock().unwrap()).contains("ms "));
    client.set_nodes(["node-1"]).unwrap();
    client.set("k", "2", Ttl::NEVER).await.unwrap();
    sleep(ms(1000)).await;
    client.set_nodes(["node-0"]).unwrap();
    sleep(ms(500)).await;
    assert!(servers[0].commands_named("md") > 0, "deleted there");
    let_go.notify_one();
    sleep(ms(100)).await;
    assert!(held.lock().unwrap().is_empty(), "executed late");
    assert_eq!(client.get("k").await.unwrap(), None);
    sleep(ms(2000)).await;
    assert_eq!(client.nodes()[0].journal, 0);
    assert_eq!(servers[0].peek("k"), None, "deleted once more");
    assert_eq!(client.get("k").await.unwrap(), None);
}

/// A value is loaded for a lease of one node and put back after its key has moved to another.
#[tokio::test]
async fn what_was_loaded_for_another_nodes_lease_is_not_put_back() {
    let servers = servers(2).await;
    let client = patient(&servers[..1]).build().unwrap();
    let key = keys_of(&servers, 1, 1).remove(0);
    let (loading, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let got = tokio::spawn({
        let (client, key) = (client.clone(), key.clone());
        let (loading, go_on) = (loading.clone(), go_on.clone());
        async move {
            let load = || async {
                loading.notify_one();
                go_on.notified().await;
                Ok::<_, std::io::Error>(Some("old"))
            };
            client.get_or_load(&key, Ttl::NEVER, load).await
        }
    });
    loading.notified().await;
    client.set_nodes(addresses(&servers)).unwrap();
    client.delete(&key).await.unwrap();
    go_on.notify_one();
    let _ = got.await.unwrap();
    let check = async || {
        assert_eq!(servers[1].peek(key.as_bytes()), None);
        assert_eq!(read(&client, &key).await, None);
    };
    check().await;
    client.set_nodes(addresses(&servers[..1])).unwrap();
    let look = Instant::now() + ms(300);
    while Instant::now() < look {
        assert_eq!(read(&client, &key).await, None);
        sleep(ms(10)).await;
    }
}

#[tokio::test]
async fn a_token_of_before_is_refused_by_a_server_that_has_come_back() {
    let servers = servers(2).await;
    let client = patient(&servers[..1]).build().unwrap();
    client.set("k", "1", Ttl::NEVER).await.unwrap();
    let token = client.gets("k").await.unwrap().unwrap().cas().unwrap();
    client.set_nodes(addresses(&servers[1..])).unwrap();
    client.set_nodes(addresses(&servers[..1])).unwrap();
    let swapped = client.cas("k", "2", Ttl::NEVER, token).await;
    assert_eq!(swapped.unwrap(), CasOutcome::Exists);
}

/// Of 2,000 keys those and only those move that the ring says must.
#[tokio::test]
async fn only_the_keys_that_must_move_do() {
    let servers = servers(4).await;
    let weighted = |weights: &[(usize, u32)]| -> Vec<NodeSpec> {
        let spec = |&(place, weight): &(usize, u32)| {
            let spec = specs(&[&servers[place]]).remove(0);
            spec.with_weight(weight)
        };
        weights.iter().map(spec).collect()
    };
    let sets = [
        weighted(&[(0, 1), (1, 1), (2, 1)]),
        // The last one comes,
        weighted(&[(0, 1), (1, 1), (2, 1), (3, 1)]),
        // the first one goes,
        weighted(&[(1, 1), (2, 1), (3, 1)]),
        // one gets more,
        weighted(&[(1, 3), (2, 1), (3, 1)]),
        // and these are the same.
        weighted(&[(3, 1), (2, 1), (1, 3)]),
        weighted(&[(1, 6), (2, 2), (3, 2)]),
    ];
    let keys: Vec<Key> = (0..2000)
        .map(|number| Key::new(format!("key-{number}")).unwrap())
        .collect();
    let client = patient(&servers[..3]).build().unwrap();
    let mut homes: Vec<Option<Address>> = vec![None; keys.len()];
    for (round, set) in sets.iter().enumerate() {
        client.set_node_specs(set.clone()).unwrap();
        let mut moved = 0;
        for (key, home) in keys.iter().zip(&mut homes) {
            let now = set[Ring::default().node_of(set, key).unwrap()].address();
            if home.as_ref() == Some(now) {
                continue;
            }
            moved += 1;
            let before = home.replace(now.clone());
            match round {
                // The others' points are placed anew, too.
                0 | 3 => {}
                1 => assert_eq!(now, sets[1][3].address(), "to the one that came"),
                2 => assert_eq!(before.as_ref(), Some(sets[1][0].address())),
                _ => panic!("{key:?} should not have moved"),
            }
        }
        let mut misses = 0;
        for many in keys.chunks(500) {
            let found = client.get_many(many).await;
            for (key, outcome) in many.iter().zip(found.outcomes()) {
                match outcome {
                    Outcome::Hit(_) => {}
                    Outcome::Miss => {
                        misses += 1;
                        client.set(key, "v", Ttl::NEVER).await.unwrap();
                    }
                    Outcome::Error(error) => panic!("{error}"),
                }
            }
        }
        assert_eq!(misses, moved, "round {round}");
    }
}

#[tokio::test]
async fn a_node_that_stays_keeps_its_connections_and_its_breaker() {
    let servers = servers(3).await;
    let client = patient(&servers)
        .probe(ProbeSettings::default().period(PATIENCE))
        .build()
        .unwrap();
    client.version().await.unwrap();
    servers[1].refuse();
    until_open(&client, 1).await;
    let before = client.nodes();
    let accepted = || {
        servers
            .iter()
            .map(Server::connections_accepted)
            .collect::<Vec<_>>()
    };
    let connections = accepted();
    let all: Vec<&Server> = servers.iter().collect();
    let reweighted: Vec<_> = specs(&all)
        .into_iter()
        .map(|spec| spec.with_weight(5))
        .collect();
    let reversed: Vec<_> = specs(&all).into_iter().rev().collect();
    for set in [specs(&all), reweighted, reversed, specs(&all)] {
        client.set_node_specs(set).unwrap();
        for server in [0, 2] {
            let key = &keys_of(&servers, server, 1)[0];
            client.get(key).await.unwrap();
        }
    }
    let after = client.nodes();
    for (before, after) in before.iter().zip(&after) {
        assert_eq!((&before.node, before.state), (&after.node, after.state));
        assert_eq!(before.since, after.since);
    }
    assert_eq!(accepted(), connections);
}

/// Of everything that a removed node had nothing is left, whatever state it was in.
#[test]
fn a_removed_node_leaves_no_task_and_no_socket_behind() {
    let ours = tokio::runtime::Runtime::new().unwrap();
    let theirs = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let alive = || theirs.metrics().num_alive_tasks();
    ours.block_on(async {
        for removed in ["well", "stalled", "open", "connecting", "never asked"] {
            let servers = servers(2).await;
            let client = patient(&servers[..1])
                .executor(Executor::handle(theirs.handle().clone()))
                .connections(2)
                .attempt_timeout(ms(500))
                .build()
                .unwrap();
            for _ in 0..2 {
                client.get("k").await.unwrap();
            }
            let kept = client.clone();
            eventually("its tasks run", || alive() == 3).await;
            let both = addresses(&servers);
            client.set_nodes(&both).unwrap();
            if removed == "connecting" {
                servers[1].stall();
            }
            let keys = keys_of(&servers, 1, 20);
            if removed != "never asked" && removed != "connecting" {
                for key in &keys {
                    client.get(key).await.unwrap();
                }
            }
            match removed {
                "stalled" => servers[1].stall(),
                "open" => {
                    servers[1].refuse();
                    until_open(&client, 1).await;
                }
                _ => {}
            }
            let under_way: Vec<_> = keys
                .iter()
                .map(|key| {
                    let (client, key) = (client.clone(), key.clone());
                    tokio::spawn(async move { client.get(key).await })
                })
                .collect();
            if ["stalled", "connecting"].contains(&removed) {
                let status = || client.nodes()[1].in_flight;
                eventually("they are under way", || status() == keys.len()).await;
            }
            let began = Instant::now();
            client.set_nodes(&both[..1]).unwrap();
            assert_eq!(client.nodes().len(), 1);
            for read in under_way {
                assert_eq!(read.await.unwrap().unwrap(), None, "{removed}");
            }
            if removed == "connecting" {
                assert!(began.elapsed() < ms(400), "what is queued goes at once");
            }
            drop(client);
            // Nothing is done with this one.
            eventually(removed, || alive() == 3).await;
            assert!(began.elapsed() < ms(500) + PATIENCE / 4, "{removed}");
            // While it was stalled it did not see that it is alone.
            servers[1].resume();
            let open = || servers[1].open_connections();
            eventually(removed, || open() == 0).await;
            drop(kept);
            eventually("all of it ends", || alive() == 0).await;
        }
    });
}

/// A future that nobody polls does not keep a removed node's sockets.
#[tokio::test]
async fn a_request_that_is_not_polled_does_not_keep_a_removed_node() {
    let servers = servers(2).await;
    let client = patient(&servers[..1])
        .attempt_timeout(ms(200))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    servers[0].stall();
    let mut stuck = Box::pin(client.get("k"));
    assert!(timeout(ms(20), &mut stuck).await.is_err());
    client.set_nodes(addresses(&servers[1..])).unwrap();
    servers[0].resume();
    let open = || servers[0].open_connections();
    eventually("it is disconnected", || open() == 0).await;
    assert_eq!(stuck.await.unwrap(), None);
}

/// What is under way at a removed node ends there if that is healthy: nothing is done twice.
#[tokio::test]
async fn requests_under_way_at_a_removed_node_end_there() {
    let servers = servers(2).await;
    let client = patient(&servers[..1]).build().unwrap();
    client.get("k").await.unwrap();
    servers[0].insert("n", "1");
    servers[0].delay(ms(200));
    let increment = tokio::spawn({
        let client = client.clone();
        async move { client.increment("n", 1).await }
    });
    eventually("it is under way", || client.nodes()[0].in_flight == 1).await;
    // It has left us.
    eventually("it is there", || servers[0].commands_named("ma") == 1).await;
    client.set_nodes(addresses(&servers[1..])).unwrap();
    assert_eq!(increment.await.unwrap().unwrap(), Some(2));
    assert_eq!(servers[1].commands_named("ma"), 0);
    eventually("it is disconnected", || servers[0].open_connections() == 0).await;
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_for_a_node_that_is_removed_go_on_at_once() {
    let servers = [Server::new(), Server::new()];
    let client = Client::builder()
        .nodes(["node-0"])
        .connector(InMemory(servers.to_vec()))
        .executor(Executor::current())
        .failure_mode(FailureMode::Retry)
        .timeout(Duration::from_secs(60))
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    servers[0].stall();
    while client.nodes()[0].state != BreakerState::Open {
        let _ = timeout(ms(100), client.get("k")).await;
    }
    let under_way: Vec<_> = (0..100)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.set(format!("k{n}"), "v", Ttl::NEVER).await })
        })
        .collect();
    sleep(Duration::from_secs(1)).await;
    let began = Instant::now();
    client.set_nodes(["node-1"]).unwrap();
    for written in under_way {
        written.await.unwrap().unwrap();
    }
    assert!(began.elapsed() < ms(200), "{:?}", began.elapsed());
    assert_eq!(servers[1].len(), 100);
    advance(ms(1)).await;
}

/// Flushes of `node-0` are lost on the way while it says so.
struct LosesFlushes {
    direct: InMemory,
    loses: Arc<AtomicBool>,
    lost: Arc<AtomicUsize>,
}

impl Connector for LosesFlushes {
    fn connect(&self, address: &Address) -> Connecting {
        let (host, _) = address.host_and_port().unwrap();
        if host != "node-0" {
            return self.direct.connect(address);
        }
        let (loses, lost) = (self.loses.clone(), self.lost.clone());
        let direct = self.direct.connect(address);
        Box::pin(async move {
            let (from_server, mut to_server) = tokio::io::split(direct.await?);
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let (mut from_client, mut to_client) = tokio::io::split(theirs);
            tokio::spawn(async move {
                let mut from_server = from_server;
                let _ = tokio::io::copy(&mut from_server, &mut to_client).await;
                let _ = to_client.shutdown().await;
            });
            tokio::spawn(async move {
                let mut sent = [0; 4096];
                while let Ok(read @ 1..) = from_client.read(&mut sent).await {
                    let mut words = sent[..read].windows(9);
                    if loses.load(Ordering::SeqCst) && words.any(|word| word == b"flush_all") {
                        lost.fetch_add(1, Ordering::SeqCst);
                    } else if to_server.write_all(&sent[..read]).await.is_err() {
                        break;
                    }
                }
                let _ = to_server.shutdown().await;
            });
            Ok(Box::new(ours) as BoxStream)
        })
    }
}

/// A node must be flushed, and that flush is under way when the list of nodes changes.
async fn a_flush_under_way(asked_for: bool, renamed: bool) {
    let servers = [Server::new(), Server::new()];
    let (loses, lost) = (
        Arc::new(AtomicBool::new(true)),
        Arc::<AtomicUsize>::default(),
    );
    let client = Client::builder()
        .nodes(["node-0", "node-1"])
        .connector(LosesFlushes {
            direct: InMemory(servers.to_vec()),
            loses: loses.clone(),
            lost: lost.clone(),
        })
        .executor(Executor::current())
        .journal(
            JournalSettings::default()
                .capacity(10)
                .overflow(JournalOverflow::Flush),
        )
        .attempt_timeout(ms(300))
        .timeout(ms(2000))
        .build()
        .unwrap();
    let specs = ["node-0", "node-1"].map(|name| NodeSpec::new(name).unwrap());
    let keys: Vec<Key> = (0..)
        .map(|number| Key::new(format!("key-{number}")).unwrap())
        .filter(|key| Ring::default().node_of(&specs, key) == Some(0))
        .take(50)
        .collect();
    for key in &keys {
        client.set(key, "old", Ttl::NEVER).await.unwrap();
    }
    servers[0].refuse();
    servers[0].close_connections();
    let _ = client.get(&keys[0]).await;
    until_open(&client, 0).await;
    if asked_for {
        let _ = client.flush_all().await;
    } else {
        for key in &keys {
            client.set(key, "new", Ttl::NEVER).await.unwrap();
        }
    }
    servers[0].heal().unwrap();
    while lost.load(Ordering::SeqCst) == 0 {
        sleep(ms(1)).await;
    }
    if renamed {
        client.set_nodes(["node-0:11211", "node-1"]).unwrap();
    } else {
        client.set_nodes(["node-1"]).unwrap();
        sleep(ms(1000)).await;
        client.set_nodes(["node-0", "node-1"]).unwrap();
    }
    loses.store(false, Ordering::SeqCst);
    for _ in 0..5 {
        for key in &keys {
            assert_ne!(read(&client, key).await.as_deref(), Some("old"));
        }
        sleep(ms(1000)).await;
    }
    assert_eq!(servers[0].commands_named("flush_all"), 1);
    assert_eq!(client.nodes()[0].state, BreakerState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_flush_that_was_asked_for_is_made_after_its_node_was_removed_under_it() {
    a_flush_under_way(true, false).await;
}

#[tokio::test(start_paused = true)]
async fn a_flush_that_was_asked_for_is_made_after_its_node_was_renamed_under_it() {
    a_flush_under_way(true, true).await;
}

#[tokio::test(start_paused = true)]
async fn a_flush_after_an_overflow_is_made_after_its_node_was_removed_under_it() {
    a_flush_under_way(false, false).await;
}

#[tokio::test(start_paused = true)]
async fn a_flush_after_an_overflow_is_made_after_its_node_was_renamed_under_it() {
    a_flush_under_way(false, true).await;
}

/// A write is held up on a connection that is given up, for longer than anything else lasts, and
/// executed when its node has been replaced by another of the same server.
async fn a_write_executed_late(removed_meanwhile: bool) {
    let servers = [Server::new(), Server::new()];
    let (held, let_go) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::new(Notify::new()));
    let client = Client::builder()
        .nodes(["node-0"])
        .connector(Detour {
            direct: InMemory(servers.to_vec()),
            dialled: AtomicUsize::new(0),
            held: held.clone(),
            let_go: let_go.clone(),
        })
        .executor(Executor::current())
        .build()
        .unwrap();
    let write = client.set("k", "old", Ttl::NEVER);
    timeout(ms(1), write).await.unwrap_err();
    if removed_meanwhile {
        client.set_nodes(["node-1"]).unwrap();
        client.set("k", "new", Ttl::NEVER).await.unwrap();
        sleep(ms(1000)).await;
        client.set_nodes(["node-0"]).unwrap();
        sleep(ms(500)).await;
    } else {
        client.set_nodes(["node-0:11211"]).unwrap();
        sleep(ms(500)).await;
        client.set("k", "new", Ttl::NEVER).await.unwrap();
    }
    sleep(ms(60_000)).await;
    let key = Key::new("k").unwrap();
    let_go.notify_one();
    for _ in 0..100 {
        assert_ne!(read(&client, &key).await.as_deref(), Some("old"));
        sleep(ms(50)).await;
    }
    assert!(held.lock().unwrap().is_empty(), "executed late");
    assert_eq!(client.nodes()[0].journal, 0, "its connection has ended");
}

#[tokio::test(start_paused = true)]
async fn a_write_executed_after_its_node_was_removed_and_came_back_is_not_read() {
    a_write_executed_late(true).await;
}

#[tokio::test(start_paused = true)]
async fn a_write_executed_long_after_its_node_was_renamed_is_not_read() {
    a_write_executed_late(false).await;
}

/// Connections that are waited for go with the client, though their node went before.
#[tokio::test(start_paused = true)]
async fn what_a_removed_node_may_execute_late_is_not_waited_for_after_its_client() {
    for shut_down in [true, false] {
        let servers = [Server::new(), Server::new()];
        let (held, let_go) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::new(Notify::new()));
        let client = Client::builder()
            .nodes(["node-0"])
            .connector(Detour {
                direct: InMemory(servers.to_vec()),
                dialled: AtomicUsize::new(0),
                held,
                let_go,
            })
            .executor(Executor::current())
            .build()
            .unwrap();
        let alive = || {
            tokio::runtime::Handle::current()
                .metrics()
                .num_alive_tasks()
        };
        let write = client.set("k", "old", Ttl::NEVER);
        timeout(ms(1), write).await.unwrap_err();
        client.set_nodes(["node-1"]).unwrap();
        sleep(ms(1000)).await;
        // Its connection has been given up by now.
        let before = alive();
        if shut_down {
            client.shutdown(ms(10)).await;
            sleep(ms(200)).await;
            assert!(alive() < before);
        }
        drop(client);
        sleep(ms(200)).await;
        // The detour itself is still being held.
        assert!(alive() < before, "{} of {before}", alive());
    }
}

/// A server is restarted so fast that its node is never out, and only later is it out or taken away
/// while more is written than its journal holds. It has not been restarted since.
async fn a_restart_before(removed: bool) {
    let servers = servers(2).await;
    let probe = ProbeSettings::default().period(ms(50)).initial_delay(ms(1));
    let client = patient(&servers)
        .journal(JournalSettings::default().capacity(10))
        .probe(probe)
        .build()
        .unwrap();
    let keys = keys_of(&servers, 0, 50);
    client.set(&keys[0], "0", Ttl::NEVER).await.unwrap();
    let asked = || servers[0].commands_named("stats");
    eventually("its birth is known", || asked() > 0).await;
    // Births are told apart by the second.
    sleep(ms(1200)).await;
    servers[0].restart_empty();
    set_all(&client, &keys, "old").await;
    assert_eq!(client.nodes()[0].state, BreakerState::Closed);
    if removed {
        client.set_nodes(addresses(&servers[1..])).unwrap();
    } else {
        servers[0].refuse();
        let _ = client.get(&keys[0]).await;
        until_open(&client, 0).await;
    }
    set_all(&client, &keys, "new").await;
    if removed {
        client.set_nodes(addresses(&servers)).unwrap();
    } else {
        servers[0].heal().unwrap();
    }
    let until = Instant::now() + ms(2000);
    while Instant::now() < until {
        for key in &keys {
            if let Ok(value) = client.get(key).await {
                assert!(value.is_none_or(|value| value != *"old"));
            }
        }
        sleep(ms(50)).await;
    }
}

#[tokio::test]
async fn a_restart_before_an_outage_does_not_excuse_what_was_written_in_it() {
    a_restart_before(false).await;
}

#[tokio::test]
async fn a_restart_before_a_server_was_removed_does_not_excuse_what_was_written_since() {
    a_restart_before(true).await;
}

/// While the nodes that take the places of others are being made, those others still serve.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_outdated_is_not_read_while_the_nodes_are_being_replaced() {
    type Hook = Box<dyn FnOnce() + Send>;
    let servers = [Server::new(), Server::new(), Server::new()];
    let hook = Arc::<Mutex<Option<Hook>>>::default();
    let made = Arc::<AtomicUsize>::default();
    let client = Client::builder()
        .nodes(["node-0"])
        .connector(InMemory(servers.to_vec()))
        .executor(Executor::current())
        .timeout(PATIENCE)
        .attempt_timeout(PATIENCE / 2)
        .node_layer(tower::layer::layer_fn({
            let (hook, made) = (hook.clone(), made.clone());
            move |inner| {
                // The first of those two that come last has been made.
                if made.fetch_add(1, Ordering::SeqCst) == 3
                    && let Some(hook) = hook.lock().unwrap().take()
                {
                    hook();
                }
                inner
            }
        }))
        .build()
        .unwrap();
    let specs = ["node-0", "node-1"].map(|name| NodeSpec::new(name).unwrap());
    let keys: Vec<Key> = (0..)
        .map(|number| Key::new(format!("key-{number}")).unwrap())
        .filter(|key| Ring::default().node_of(&specs, key) == Some(1))
        .take(600)
        .collect();
    set_all(&client, &keys, "old").await;
    client.set_nodes(["node-0", "node-1"]).unwrap();
    servers[0].stall();
    set_all(&client, &keys, "new").await;
    client.set_nodes(["node-0"]).unwrap();
    let last = keys.last().unwrap().clone();
    assert_eq!(read(&client, &last).await, None, "in the journal");
    let (seen, server) = (Arc::<Mutex<Option<_>>>::default(), servers[0].clone());
    *hook.lock().unwrap() = Some(Box::new({
        let (client, seen) = (client.clone(), seen.clone());
        move || {
            server.resume();
            let runtime = tokio::runtime::Handle::current();
            let read = || runtime.block_on(read(&client, &last));
            *seen.lock().unwrap() = Some(tokio::task::block_in_place(read));
        }
    }));
    client.set_nodes(["node-0:11211", "node-2"]).unwrap();
    let seen = seen.lock().unwrap().take().expect("it was read then");
    assert_ne!(seen.as_deref(), Some("old"));
}
