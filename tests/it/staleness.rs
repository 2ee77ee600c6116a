//! Guarantee G7: this client never reads something older than what it has itself written, however
//! nodes come and go.

use std::time::Duration;

use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use tokio::time::{Instant, timeout};
use tower_memcached::testing::{Flow, Proxy, Server, Toxics};
use tower_memcached::{
    Address, BreakerSettings, BreakerState, CasOutcome, Client, ClientBuilder, Connecting,
    Connector, EjectionCause, ErrorKind, Executor, FailureMode, GroupLayer, JournalOverflow,
    JournalSettings, Key, KillSwitch, Outcome, ProbeSettings, Sent, SystemConnector, Ttl,
};

use crate::support::{
    eventually, keys_of, patient, server, servers, state, until_closed, until_open,
};

const ATTEMPT: Duration = Duration::from_millis(150);

fn builder(servers: &[Server]) -> ClientBuilder {
    let shortly = Duration::from_millis(100);
    patient(servers)
        .breaker(BreakerSettings::default().reopening(shortly, shortly))
        .attempt_timeout(ATTEMPT)
        .probe(ProbeSettings::default().period(Duration::from_millis(200)))
}

fn redistributing(servers: &[Server]) -> Client {
    builder(servers).build().unwrap()
}

async fn write(client: &Client, keys: &[Key], value: &'static str) {
    for key in keys {
        client.set(key, value, Ttl::NEVER).await.unwrap();
    }
}

/// Asks all the time until the node is back for good, and holds every answer against what may be
/// read.
async fn watch(client: &Client, index: usize, keys: &[Key], allowed: &[Option<&str>]) {
    let mut closed_for = 0;
    while closed_for < 3 {
        closed_for += usize::from(state(client, index) == BreakerState::Closed);
        let gets = join_all(keys.iter().map(|key| client.get(key))).await;
        let many = client.get_many(keys).await;
        for ((key, read), outcome) in keys.iter().zip(gets).zip(many.outcomes()) {
            let both = [
                read.unwrap(),
                match outcome {
                    Outcome::Hit(value) => Some(value.clone()),
                    Outcome::Miss => None,
                    Outcome::Error(error) => panic!("{error}"),
                },
            ];
            for read in both {
                let read = read
                    .as_ref()
                    .map(|value| std::str::from_utf8(value).unwrap());
                assert!(allowed.contains(&read), "{key:?} is {read:?}");
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_was_written_elsewhere_meanwhile_is_not_read_from_a_node_that_comes_back() {
    let servers = servers(3).await;
    let client = redistributing(&servers);
    let keys = keys_of(&servers, 1, 60);
    let (written, rest) = keys.split_at(20);
    let (deleted, untouched) = rest.split_at(20);
    write(&client, &keys, "old").await;
    servers[1].stall();
    // In doubt, too: these are executed when the node goes on.
    write(&client, written, "new").await;
    until_open(&client, 1).await;
    write(&client, written, "newer").await;
    for key in deleted {
        client.delete(key).await.unwrap();
    }
    servers[1].resume();
    watch(&client, 1, written, &[Some("newer"), None]).await;
    watch(&client, 1, deleted, &[None]).await;
    // A busy machine may take the node out once more, and then it is a miss.
    watch(&client, 1, untouched, &[Some("old"), None]).await;
    for key in untouched {
        assert_eq!(servers[1].peek(key.as_bytes()).unwrap(), "old");
    }
    eventually("the journal is worked off", || {
        client.nodes()[1].journal == 0
    })
    .await;
    for key in written.iter().chain(deleted) {
        assert_eq!(servers[1].peek(key.as_bytes()), None, "nothing old is left");
    }
}

#[tokio::test]
async fn a_write_that_fails_because_its_node_is_out_still_invalidates() {
    for mode in [FailureMode::Cancel, FailureMode::Retry] {
        let servers = servers(2).await;
        let client = builder(&servers)
            .failure_mode(mode)
            .timeout(Duration::from_millis(300))
            .build()
            .unwrap();
        let keys = keys_of(&servers, 0, 3);
        write(&client, &keys, "old").await;
        servers[0].stall();
        while state(&client, 0) == BreakerState::Closed {
            let _ = client.get(&keys[2]).await;
        }
        let error = client.set(&keys[0], "new", Ttl::NEVER).await.unwrap_err();
        assert_eq!(error.sent(), Sent::No, "{error}");
        client.delete(&keys[1]).await.unwrap_err();
        servers[0].resume();
        until_closed(&client, 0).await;
        assert_eq!(client.get(&keys[0]).await.unwrap(), None);
        assert_eq!(client.get(&keys[1]).await.unwrap(), None);
        assert_eq!(client.get(&keys[2]).await.unwrap().unwrap(), "old");
    }
}

#[tokio::test]
async fn a_second_outage_does_not_serve_what_the_first_one_left() {
    let servers = servers(3).await;
    let client = redistributing(&servers);
    let keys = keys_of(&servers, 2, 20);
    write(&client, &keys, "before").await;
    for round in ["first", "second", "third"] {
        servers[2].refuse();
        until_open(&client, 2).await;
        // A leftover on the failover node, good for a minute.
        write(&client, &keys, "elsewhere").await;
        servers[2].accept().unwrap();
        until_closed(&client, 2).await;
        eventually("the journal is worked off", || {
            client.nodes()[2].journal == 0
        })
        .await;
        write(&client, &keys, "home").await;
        let (some, others) = keys.split_at(10);
        for key in some {
            client.delete(key).await.unwrap();
        }
        servers[2].refuse();
        for key in some {
            assert_eq!(client.get(key).await.unwrap(), None, "{round}");
        }
        for key in others {
            assert_ne!(
                client.get(key).await.unwrap().as_deref(),
                Some(&b"elsewhere"[..]),
                "{round}"
            );
        }
        servers[2].accept().unwrap();
        until_closed(&client, 2).await;
    }
}

/// 55 of FAULTS, on a node that stays in: its one connection hangs and is given up, and what was
/// sent over it is executed later, over a newer value.
#[tokio::test]
async fn a_write_that_is_executed_late_is_not_read() {
    let server = server().await;
    let client = builder(std::slice::from_ref(&server))
        .failure_mode(FailureMode::Cancel)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    server.stall();
    let error = client.set("k", "late", Ttl::NEVER).await.unwrap_err();
    assert_eq!(error.sent(), Sent::Maybe);
    // Dropped in flight: nobody is told of its end, but it may be executed as well.
    let dropped = client.set("dropped", "late", Ttl::NEVER);
    assert!(timeout(ATTEMPT / 3, dropped).await.is_err());
    // Its connection is given up; the server does not know.
    eventually("it is out", || state(&client, 0) == BreakerState::Open).await;
    server.resume();
    eventually("the late write is executed", || {
        let requests = server.requests();
        requests.iter().any(|line| line.starts_with(b"ms k "))
    })
    .await;
    let keys = [Key::new("k").unwrap(), Key::new("dropped").unwrap()];
    let both_gone = || keys.iter().all(|key| server.peek(key.as_bytes()).is_none());
    let mut looks = 0;
    while looks < 50 || client.nodes()[0].journal > 0 || !both_gone() {
        for key in &keys {
            if let Ok(read) = client.get(key).await {
                assert_eq!(read, None, "{key:?}");
            }
        }
        looks += 1;
        assert!(looks < 4000, "{:?}", client.nodes());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The first connection goes through one proxy, all others through another.
struct Parted {
    dialled: AtomicUsize,
    others: Address,
}

impl Connector for Parted {
    fn connect(&self, address: &Address) -> Connecting {
        let first = self.dialled.fetch_add(1, Ordering::Relaxed) == 0;
        SystemConnector::new().connect(if first { address } else { &self.others })
    }
}

/// 7 and 55 of FAULTS: one thread of the server sleeps, with its connections, and the node stays in.
#[tokio::test]
async fn a_write_that_is_executed_much_later_over_a_connection_given_up_is_not_read() {
    let server = server().await;
    let upstream = server.address().unwrap();
    let sleeps = Proxy::listen(upstream).await.unwrap();
    let awake = Proxy::listen(upstream).await.unwrap();
    let client = Client::builder()
        .nodes([sleeps.address().to_string()])
        .executor(Executor::current())
        .timeout(Duration::from_secs(2))
        .attempt_timeout(ATTEMPT)
        // It ends before the write does, whose deletion would otherwise go the same way.
        .stall_timeout(ATTEMPT / 2)
        .connector(Parted {
            dialled: AtomicUsize::new(0),
            others: awake.address().to_string().parse().unwrap(),
        })
        .build()
        .unwrap();
    client.set("k", "old", Ttl::NEVER).await.unwrap();
    sleeps.set(Flow::Both, Toxics::new().blackhole());
    let late = client.set("k", "late", Ttl::NEVER).await;
    eventually("it is made anew", || awake.open_connections() > 0).await;
    assert_eq!(state(&client, 0), BreakerState::Closed, "{late:?}");
    // Far longer than the grace that is given where nothing is known.
    let sleeping = Instant::now();
    while sleeping.elapsed() < Duration::from_secs(5) {
        client.set("k", "new", Ttl::NEVER).await.unwrap();
        assert!(
            client
                .get("k")
                .await
                .unwrap()
                .is_none_or(|read| read == "new")
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let ended = sleeps.open_connections();
    assert_eq!(ended, 1, "it is watched");
    sleeps.heal().unwrap();
    eventually("it is over", || {
        client.nodes()[0].journal == 0 && sleeps.open_connections() == 0
    })
    .await;
    for _ in 0..50 {
        let read = client.get("k").await.unwrap();
        assert_eq!(
            read, None,
            "neither the late one nor what it has overwritten"
        );
    }
}

#[tokio::test]
async fn a_write_repeated_after_its_connection_was_lost_is_read_or_a_miss() {
    let server = server().await;
    let client = redistributing(std::slice::from_ref(&server));
    client.set("k", "old", Ttl::NEVER).await.unwrap();
    // What was acknowledged last, and what is in doubt since.
    let (mut allowed, mut rounds) = (vec!["old".to_owned()], 0);
    for round in 0..20 {
        // It is executed, but its connection ends before the answer comes. Who has ended it, and
        // whether the server has read it all, nobody can tell.
        server.delay(Duration::from_millis(20));
        let value = round.to_string();
        let cut = client.set("k", value.clone(), Ttl::NEVER);
        let close = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            server.close_connections();
        };
        let (outcome, ()) = tokio::join!(cut, close);
        // On a busy machine the repetition may be cut off, too, or come late.
        match outcome {
            Ok(()) => allowed = vec![value],
            Err(_) => allowed.push(value),
        }
        let Ok(read) = client.get("k").await else {
            continue;
        };
        rounds += 1;
        let is_allowed = read
            .as_ref()
            .is_none_or(|read| allowed.iter().any(|value| *read == **value));
        assert!(is_allowed, "{read:?} is none of {allowed:?}");
    }
    assert!(rounds > 0, "none could be judged");
    server.heal().unwrap();
    eventually("the doubt is over", || client.nodes()[0].journal == 0).await;
    client.set("k", "new", Ttl::NEVER).await.unwrap();
    assert_eq!(client.get("k").await.unwrap().unwrap(), "new");
}

#[tokio::test]
async fn a_key_whose_node_may_hold_something_old_is_a_miss_where_there_is_no_other_node() {
    let server = server().await;
    let client = redistributing(std::slice::from_ref(&server));
    client.set("k", "old", Ttl::NEVER).await.unwrap();
    client.set("n", "1", Ttl::NEVER).await.unwrap();
    let token = client.gets("k").await.unwrap().unwrap().cas().unwrap();
    server.stall();
    for key in ["k", "n"] {
        client.set(key, "2", Ttl::NEVER).await.unwrap_err();
    }
    // It answers, but what it has is being deleted for two seconds.
    server.resume();
    until_closed(&client, 0).await;
    assert!(client.nodes()[0].journal > 0);
    assert_eq!(client.get("k").await.unwrap(), None);
    assert_eq!(client.get_and_touch("k", Ttl::NEVER).await.unwrap(), None);
    let swapped = client.cas("k", "new", Ttl::NEVER, token).await.unwrap();
    assert_eq!(swapped, CasOutcome::Exists);
    let error = client.increment("n", 1).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.sent()),
        (ErrorKind::NodeUnavailable, Sent::No)
    );
    let error = client.add("k", "new", Ttl::NEVER).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NodeUnavailable);
    eventually("the doubt is over", || client.nodes()[0].journal == 0).await;
    assert!(client.add("k", "new", Ttl::NEVER).await.unwrap());
    assert_eq!(client.get("k").await.unwrap().unwrap(), "new");
}

#[tokio::test]
async fn what_is_only_loaded_meanwhile_does_not_empty_a_node_that_comes_back() {
    let servers = servers(3).await;
    let client = redistributing(&servers);
    let keys = keys_of(&servers, 1, 20);
    write(&client, &keys, "v").await;
    servers[1].refuse();
    until_open(&client, 1).await;
    for key in &keys {
        let load = || async { Ok::<_, std::io::Error>(Some("v")) };
        let loaded = client.get_or_load(key, Ttl::NEVER, load).await.unwrap();
        assert_eq!(loaded.unwrap(), "v");
    }
    assert_eq!(client.nodes()[1].journal, 0);
    // But what is written is not read from where it was only loaded, in the next outage.
    servers[1].accept().unwrap();
    until_closed(&client, 1).await;
    write(&client, &keys[..10], "w").await;
    servers[1].refuse();
    until_open(&client, 1).await;
    for key in &keys[..10] {
        assert_eq!(client.get(key).await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_key_that_is_written_all_the_time_comes_home_as_well() {
    let servers = servers(3).await;
    let client = redistributing(&servers);
    let key = &keys_of(&servers, 1, 1)[0];
    write(&client, std::slice::from_ref(key), "0").await;
    servers[1].refuse();
    until_open(&client, 1).await;
    let writers = (0..8).map(|_| {
        let (client, key) = (client.clone(), key.clone());
        tokio::spawn(async move {
            loop {
                client.set(&key, "1", Ttl::NEVER).await.unwrap();
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    servers[1].accept().unwrap();
    until_closed(&client, 1).await;
    eventually("it is home", || servers[1].peek(key.as_bytes()).is_some()).await;
    writers.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn a_write_that_a_kill_switch_drops_still_invalidates() {
    let servers = servers(2).await;
    let client = redistributing(&servers);
    let switch = KillSwitch::default();
    let group = GroupLayer::new("g")
        .prefix("g:")
        .kill_switch(switch.clone());
    let group = client.layer(group);
    for key in ["set", "deleted", "counted"] {
        group.set(key, "1", Ttl::NEVER).await.unwrap();
    }
    switch.throw();
    group.set("set", "2", Ttl::NEVER).await.unwrap();
    assert!(!group.delete("deleted").await.unwrap());
    assert_eq!(group.increment("counted", 1).await.unwrap(), None);
    switch.reset();
    for key in ["set", "deleted"] {
        assert_eq!(group.get(key).await.unwrap(), None, "{key}");
    }
    assert_eq!(group.get("counted").await.unwrap().unwrap(), "1");
    eventually("the keys are deleted", || {
        servers
            .iter()
            .all(|server| server.peek("g:set").is_none() && server.peek("g:deleted").is_none())
    })
    .await;
}

async fn overflowing(overflow: JournalOverflow) -> (Vec<Server>, Client, Vec<Key>) {
    let servers = servers(3).await;
    let journal = JournalSettings::default().capacity(10).overflow(overflow);
    let client = builder(&servers).journal(journal).build().unwrap();
    let keys = keys_of(&servers, 1, 30);
    write(&client, &keys, "old").await;
    servers[1].refuse();
    until_open(&client, 1).await;
    write(&client, &keys, "new").await;
    assert!(client.nodes()[1].journal <= 10);
    servers[1].accept().unwrap();
    (servers, client, keys)
}

#[tokio::test]
async fn a_node_with_more_old_keys_than_can_be_remembered_takes_no_reads_until_it_is_flushed() {
    let (servers, client, keys) = overflowing(JournalOverflow::Refuse).await;
    let canaries = |server: &Server| {
        let requests = server.requests();
        requests
            .iter()
            .filter(|line| line.starts_with(b"ms tower"))
            .count()
    };
    let probed = canaries(&servers[1]);
    eventually("it is probed, with success", || {
        canaries(&servers[1]) > probed + 3
    })
    .await;
    assert_ne!(state(&client, 1), BreakerState::Ramping);
    assert_ne!(state(&client, 1), BreakerState::Closed);
    let status = &client.nodes()[1];
    let cause = status.last_cause.as_ref().unwrap().to_string();
    assert!(cause.contains("flush it"), "{cause}");
    for key in &keys {
        assert_eq!(client.get(key).await.unwrap().unwrap(), "new");
    }
    // By hand: an error for that node now, made up for before it is readmitted.
    let flushed = client.flush_all().await.unwrap();
    let failed: Vec<_> = flushed.iter().filter(|node| node.result.is_err()).collect();
    assert_eq!(failed.len(), 1);
    until_closed(&client, 1).await;
    assert_eq!(servers[1].commands_named("flush_all"), 1);
    for key in &keys {
        assert_eq!(client.get(key).await.unwrap(), None);
        assert_eq!(servers[1].peek(key.as_bytes()), None);
    }
}

#[tokio::test]
async fn a_node_is_flushed_when_that_is_the_policy() {
    let (servers, client, keys) = overflowing(JournalOverflow::Flush).await;
    watch(&client, 1, &keys, &[Some("new"), None]).await;
    assert_eq!(servers[1].commands_named("flush_all"), 1);
}

#[tokio::test]
async fn a_node_serves_old_values_only_when_that_is_the_policy() {
    let (servers, client, keys) = overflowing(JournalOverflow::Serve).await;
    until_closed(&client, 1).await;
    assert_eq!(servers[1].commands_named("flush_all"), 0);
    let mut old = 0;
    for key in &keys {
        let read = client.get(key).await.unwrap();
        old += usize::from(read.is_some_and(|read| read == "old"));
    }
    assert_eq!(old, 20, "those there was no room for");
}

#[tokio::test]
async fn a_journal_that_overflows_on_a_node_in_use_takes_it_out() {
    let server = server().await;
    let journal = JournalSettings::default().capacity(2);
    let client = builder(std::slice::from_ref(&server))
        .failure_mode(FailureMode::Cancel)
        .journal(journal)
        .build()
        .unwrap();
    client.get("k").await.unwrap();
    // Deletions do not get through, so that each write in doubt stays remembered.
    server.rewrite_replies(|line, reply| match line.starts_with(b"ms") {
        true => Vec::new(),
        false => reply,
    });
    for n in 0..3 {
        let _ = client.set(format!("k{n}"), "v", Ttl::NEVER).await;
    }
    eventually("it is taken out", || {
        client.nodes()[0].cause == Some(EjectionCause::Journal)
            || state(&client, 0) == BreakerState::Open
    })
    .await;
}
