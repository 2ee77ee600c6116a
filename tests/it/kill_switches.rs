//! What a thrown kill switch answers, and that nothing old is read once it is reset.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use fastrand::Rng;
use futures::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use tower::Service;
use tower_memcached::testing::Server;
use tower_memcached::{
    BoxedService, BreakerSettings, BreakerState, CasOutcome, Client, ClientBuilder, ErrorKind,
    FailureMode, GroupSettings, Key, OnFailure, Outcome, ProbeSettings, Protocol, Request,
    Response, Ttl,
};

use crate::support::{
    PATIENCE, eventually, in_memory, keys_of, patient, servers, state, until_closed, until_open,
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

/// Holds each operation's answer against that of a cache that keeps nothing. `key` is there.
async fn answers_as_one_that_keeps_nothing<S>(client: &Client<S>, key: &str)
where
    S: Service<Request, Response = Response> + Clone + Send + Sync + 'static,
    S::Error: Into<tower::BoxError> + Send,
    S::Future: Send,
{
    let switch = client.kill_switch().unwrap();
    let token = client.gets(key).await.unwrap().unwrap().cas().unwrap();
    switch.throw();
    assert_eq!(client.get(key).await.unwrap(), None);
    assert_eq!(client.gets(key).await.unwrap(), None);
    assert_eq!(client.get_and_touch(key, Ttl::NEVER).await.unwrap(), None);
    let many = client.get_many([key, "another"]).await;
    assert!(
        many.outcomes()
            .iter()
            .all(|outcome| matches!(outcome, Outcome::Miss))
    );
    client.set("set", "v", Ttl::NEVER).await.unwrap();
    let added = client.add("added", "v", Ttl::NEVER).await.unwrap_err();
    assert_eq!(added.kind(), ErrorKind::Disabled, "{added}");
    assert!(!client.replace(key, "v", Ttl::NEVER).await.unwrap());
    assert!(!client.append(key, "v").await.unwrap());
    assert!(!client.prepend(key, "v").await.unwrap());
    let swapped = client.cas(key, "v", Ttl::NEVER, token).await.unwrap();
    assert_eq!(swapped, CasOutcome::NotFound);
    assert!(!client.delete(key).await.unwrap());
    client.invalidate(key).await.unwrap();
    assert!(!client.touch(key, Ttl::NEVER).await.unwrap());
    assert_eq!(client.increment(key, 1).await.unwrap(), None);
    assert_eq!(client.decrement(key, 1).await.unwrap(), None);
    for (policy, goes_on) in [(OnFailure::Allow, true), (OnFailure::Deny, false)] {
        let claim = client.claim("claim", Ttl::NEVER, policy).await.unwrap();
        assert_eq!(claim.is_first(), goes_on);
        assert_eq!(claim.error().unwrap().kind(), ErrorKind::Disabled);
    }
    let decides = |_| async { Ok::<_, std::io::Error>(true) };
    let claim = client.claim_or_else("claim", Ttl::NEVER, decides).await;
    assert!(claim.unwrap().is_first());

    // A wrong key is one as ever.
    let error = client.get("no key").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidKey);
    // The operator's go through.
    for version in client.version().await.unwrap() {
        version.result.unwrap();
    }
    for stats in client.stats().await.unwrap() {
        assert!(stats.result.unwrap().contains_key("cmd_get"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_thrown_switch_answers_every_operation_as_a_cache_that_keeps_nothing() {
    for whole in [false, true] {
        let servers = new_servers(3);
        let client = in_memory(&servers)
            .group("g", group().prefix("g:"))
            .protocol(Protocol::Meta)
            .build()
            .unwrap();
        let one = client.group("g").unwrap();
        for key in ["k", "g:k"] {
            client.set(key, "1", Ttl::NEVER).await.unwrap();
        }
        let asked = || -> u64 {
            let sent = ["ms", "mn", "ma"];
            let sent = |server: &Server| {
                sent.iter()
                    .map(|name| server.commands_named(name))
                    .sum::<u64>()
            };
            let canaries = servers.iter().flat_map(Server::requests);
            let canaries = canaries.filter(|line| {
                line.starts_with(b"ms ") && String::from_utf8_lossy(line).contains("canary")
            });
            servers.iter().map(sent).sum::<u64>() - canaries.count() as u64
        };
        let before = asked();
        match whole {
            true => answers_as_one_that_keeps_nothing(&client, "k").await,
            false => answers_as_one_that_keeps_nothing(&one, "k").await,
        }
        assert_eq!(asked(), before, "no write was sent");

        // The client's stops its groups, a group's nobody else.
        let (other, key) = match whole {
            true => (one.get("k").await.unwrap(), "k"),
            false => (client.get("k").await.unwrap(), "g:k"),
        };
        assert_eq!(other.is_none(), whole);
        assert_eq!(client.groups()[0].killed, !whole);

        client.kill_switch().unwrap().reset();
        one.kill_switch().unwrap().reset();
        assert_eq!(
            client.get(key).await.unwrap(),
            None,
            "it was deleted meanwhile"
        );
        let gone = || servers.iter().all(|server| server.peek(key).is_none());
        eventually("it is deleted on its node", gone).await;
    }
}

#[tokio::test(start_paused = true)]
async fn flush_all_goes_through_a_thrown_switch() {
    let servers = new_servers(2);
    let client = in_memory(&servers).group("g", group()).build().unwrap();
    let group = client.group("g").unwrap();
    client.kill_switch().unwrap().throw();
    group.kill_switch().unwrap().throw();
    for server in &servers {
        server.insert("k", "v");
    }
    for flushed in group.flush_all().await.unwrap() {
        flushed.result.unwrap();
    }
    assert!(servers.iter().all(|server| server.peek("k").is_none()));
}

#[tokio::test(start_paused = true)]
async fn reads_that_load_go_to_their_loader_and_put_nothing_back() {
    let server = Server::new();
    let client = in_memory(std::slice::from_ref(&server))
        .group("g", group().prefix("g:"))
        .build()
        .unwrap();
    let boxed = |group: bool| -> Client<BoxedService> {
        match group {
            true => client.group("g").unwrap().boxed(),
            false => client.boxed(),
        }
    };
    for (of_group, prefix) in [(true, "g:"), (false, "")] {
        let client = boxed(of_group);
        let switch = client.kill_switch().unwrap();
        let loads = AtomicUsize::new(0);
        let load = |_| async {
            loads.fetch_add(1, Ordering::Relaxed);
            Ok::<_, std::io::Error>(Some("loaded"))
        };
        let read = |key: &'static str| client.get_or_load(key, Ttl::NEVER, move || load(()));
        assert_eq!(read("there").await.unwrap().unwrap(), "loaded");
        let there = || server.peek(format!("{prefix}there"));
        eventually("it is put back", || {
            there().is_some_and(|value| !value.is_empty())
        })
        .await;
        switch.throw();
        for _ in 0..3 {
            assert_eq!(read("there").await.unwrap().unwrap(), "loaded");
            assert_eq!(read("new").await.unwrap().unwrap(), "loaded");
        }
        assert_eq!(
            loads.load(Ordering::Relaxed),
            7,
            "each is loaded, each time"
        );
        let all = |missing: Vec<Key>| async move {
            let found = missing.into_iter().map(|key| (key, "many"));
            Ok::<_, std::io::Error>(found.collect::<HashMap<_, _>>())
        };
        let many = client
            .get_many_or_load(["there", "one", "two"], Ttl::NEVER, all)
            .await;
        assert_eq!(many.into_hits().len(), 3);
        sleep(Duration::from_secs(5)).await;
        for key in ["new", "one", "two"] {
            assert_eq!(server.peek(format!("{prefix}{key}")), None, "{key}");
        }
        // Loads change nothing: what was there is as good as before.
        switch.reset();
        assert_eq!(client.get("there").await.unwrap().unwrap(), "loaded");
        assert_eq!(loads.load(Ordering::Relaxed), 7);
    }
}

/// What is being loaded when the switch is thrown, or was begun under it, is not put back after a
/// write that was dropped meanwhile.
#[tokio::test(start_paused = true)]
async fn a_load_under_way_does_not_put_back_what_a_dropped_write_has_outdated() {
    let server = Server::new();
    let client = in_memory(std::slice::from_ref(&server))
        .group("g", group())
        .build()
        .unwrap();
    let group = client.group("g").unwrap();
    let switch = group.kill_switch().unwrap();
    for (key, thrown_first) in [("before", false), ("under", true)] {
        if thrown_first {
            switch.throw();
        }
        let loading = tokio::spawn({
            let group = group.clone();
            async move {
                let load = || async {
                    sleep(ms(500)).await;
                    Ok::<_, std::io::Error>(Some("old"))
                };
                group.get_or_load(key, Ttl::NEVER, load).await
            }
        });
        sleep(ms(100)).await;
        switch.throw();
        group.set(key, "new", Ttl::NEVER).await.unwrap();
        sleep(ms(100)).await;
        switch.reset();
        loading.await.unwrap().unwrap();
        sleep(Duration::from_secs(5)).await;
        assert_eq!(group.get(key).await.unwrap(), None, "{key}");
    }
}

#[tokio::test(start_paused = true)]
async fn requests_in_a_groups_queue_are_bypassed_when_its_switch_is_thrown() {
    let server = Server::new();
    let waits = group()
        .prefix("g:")
        .max_in_flight(1)
        .max_queue(5)
        .max_wait(ms(20));
    let client = in_memory(std::slice::from_ref(&server))
        .timeout(ms(500))
        .attempt_timeout(ms(200))
        .group("g", waits)
        .build()
        .unwrap();
    let group = client.group("g").unwrap();
    group.set("k", "old", Ttl::NEVER).await.unwrap();
    // One is given a place in time, and the other one's wait ends first.
    for takes in [ms(10), ms(50)] {
        server.insert("g:k", "old");
        server.delay(takes);
        let spawn = |operation: &'static str| {
            let group = group.clone();
            tokio::spawn(async move {
                match operation {
                    "set" => group.set("k", "new", Ttl::NEVER).await.map(|()| None),
                    _ => group.get("k").await,
                }
            })
        };
        let first = spawn("get");
        eventually("it is asked", || client.groups()[0].in_flight == 1).await;
        let waiting = [spawn("get"), spawn("set")];
        eventually("they wait", || client.groups()[0].queued == 2).await;
        group.kill_switch().unwrap().throw();
        assert_eq!(
            first.await.unwrap().unwrap().unwrap(),
            "old",
            "it was sent before"
        );
        for task in waiting {
            assert_eq!(task.await.unwrap().unwrap(), None);
        }
        server.delay(ms(0));
        group.kill_switch().unwrap().reset();
        assert_eq!(group.get("k").await.unwrap(), None);
        eventually("it is deleted", || server.peek("g:k").is_none()).await;
        eventually("the journal is worked off", || {
            client.nodes()[0].journal == 0
        })
        .await;
    }
    let set = |line: &&bytes::Bytes| line.starts_with(b"ms g:k ");
    assert_eq!(
        server.requests().iter().filter(set).count(),
        1,
        "no set but the first was sent"
    );
}

/// With short times to come back after, and a busy machine's patience otherwise.
fn builder(servers: &[Server]) -> ClientBuilder {
    let shortly = ms(100);
    patient(servers)
        .breaker(
            BreakerSettings::default()
                .reopening(shortly, shortly)
                .ramp(ms(300)),
        )
        .attempt_timeout(ms(150))
        .probe(ProbeSettings::default().period(ms(200)))
        .group("g", group())
}

async fn written_under_the_switch(group: &Client<BoxedService>, keys: &[Key]) {
    for (place, key) in keys.iter().enumerate() {
        match place % 4 {
            0 => group.set(key, "new", Ttl::NEVER).await.unwrap(),
            1 => drop(group.delete(key).await.unwrap()),
            2 => drop(group.replace(key, "new", Ttl::NEVER).await.unwrap()),
            _ => drop(group.add(key, "new", Ttl::NEVER).await.unwrap_err()),
        }
    }
}

/// The nodes well, out, and coming back; all three failure modes; the group's switch and the
/// client's.
#[tokio::test]
async fn nothing_that_was_written_under_the_switch_is_read_as_it_was_before() {
    for mode in [
        FailureMode::Redistribute,
        FailureMode::Cancel,
        FailureMode::Retry,
    ] {
        for whole in [false, true] {
            let servers = servers(3).await;
            let client = builder(&servers).failure_mode(mode).build().unwrap();
            let group = client.group("g").unwrap().boxed();
            let switch = match whole {
                true => client.kill_switch().unwrap().clone(),
                false => group.kill_switch().unwrap().clone(),
            };
            let keys = keys_of(&servers, 1, 17);
            let (touched, witness) = keys.split_at(16);
            let touched: Vec<_> = touched.chunks(4).collect();
            for key in &keys {
                group.set(key, "old", Ttl::NEVER).await.unwrap();
            }
            let nothing_old = |keys: Vec<Key>| {
                let group = group.clone();
                async move {
                    for outcome in group.get_many(&keys).await.outcomes() {
                        let read = outcome.value();
                        assert!(read.is_none(), "{mode:?}, {whole}: {read:?}");
                    }
                }
            };

            // The nodes are well.
            switch.throw();
            written_under_the_switch(&group, touched[0]).await;
            switch.reset();
            nothing_old(touched[0].to_vec()).await;

            // The node is going, which nobody knows yet.
            servers[1].stall();
            switch.throw();
            written_under_the_switch(&group, touched[1]).await;
            switch.reset();
            until_gone(&client, &witness[0]).await;

            // It is out, and may be asked by no one.
            switch.throw();
            written_under_the_switch(&group, touched[2]).await;
            switch.reset();
            if mode == FailureMode::Redistribute {
                nothing_old(touched[..3].concat()).await;
            }

            // It is coming back.
            switch.throw();
            servers[1].resume();
            let back = || state(&client, 1) != BreakerState::Open;
            eventually("it is coming back", back).await;
            written_under_the_switch(&group, touched[3]).await;
            switch.reset();
            nothing_old(touched.concat()).await;
            until_closed(&client, 1).await;
            nothing_old(touched.concat()).await;
            let worked_off = || client.nodes().iter().all(|node| node.journal == 0);
            eventually("the journals are worked off", worked_off).await;
            nothing_old(touched.concat()).await;
            assert_eq!(
                group.get(&witness[0]).await.unwrap().unwrap(),
                "old",
                "it was left alone"
            );
        }
    }
}

async fn until_gone(client: &Client, key: &Key) {
    let asks = async {
        while state(client, 1) != BreakerState::Open {
            let _ = timeout(ms(200), client.get(key)).await;
        }
    };
    timeout(PATIENCE, asks).await.expect("it opens");
}

/// Probes go on, and bring a node back that nobody asks because of the switch.
#[tokio::test]
async fn a_thrown_switch_stops_neither_probes_nor_keepers() {
    let servers = servers(2).await;
    let client = builder(&servers).build().unwrap();
    let keys = keys_of(&servers, 0, 10);
    for key in &keys {
        client.set(key, "v", Ttl::NEVER).await.unwrap();
    }
    client.kill_switch().unwrap().throw();
    client.delete(&keys[0]).await.unwrap();
    eventually("it is deleted under the switch", || {
        servers[0].peek(keys[0].as_bytes()).is_none()
    })
    .await;
    servers[0].refuse();
    until_open(&client, 0).await;
    client.delete(&keys[1]).await.unwrap();
    servers[0].accept().unwrap();
    until_closed(&client, 0).await;
    assert!(servers[0].peek(keys[1].as_bytes()).is_none());
    assert!(client.kill_switch().unwrap().is_thrown());
    assert_eq!(client.get(&keys[2]).await.unwrap(), None);
    client.kill_switch().unwrap().reset();
    assert_eq!(client.get(&keys[2]).await.unwrap().unwrap(), "v");
}

/// Nothing it does has to be waited for, so it is the client that has to give way.
#[tokio::test]
async fn a_task_that_asks_all_the_time_under_a_thrown_switch_lets_others_go_on() {
    let client = in_memory(&new_servers(1)).build().unwrap();
    client.kill_switch().unwrap().throw();
    let went_on = Arc::new(AtomicBool::new(false));
    let other = tokio::spawn({
        let went_on = went_on.clone();
        async move { went_on.store(true, Ordering::Relaxed) }
    });
    let mut asked = 0;
    while !went_on.load(Ordering::Relaxed) {
        assert!(asked < 10_000, "nobody else has had a turn");
        assert_eq!(client.get("k").await.unwrap(), None);
        asked += 1;
    }
    other.await.unwrap();
}

/// One key of one writer, whose versions only grow.
struct Story {
    key: Key,
    version: u64,
    /// Nothing older than this may be read.
    least: u64,
}

impl Story {
    /// Writes something, and takes what was acknowledged down.
    async fn go_on(&mut self, group: &Client<BoxedService>, random: &mut Rng) {
        self.version += 1;
        let value = self.version.to_string();
        // Most are sets, lest there be nothing to read.
        let acknowledged = match random.u8(..8) {
            0 => group.delete(&self.key).await.is_ok(),
            1 => group.replace(&self.key, value, Ttl::NEVER).await.is_ok(),
            // It is acknowledged only where it was stored: beside another value it changes nothing.
            2 => matches!(group.add(&self.key, value, Ttl::NEVER).await, Ok(true)),
            _ => group.set(&self.key, value, Ttl::NEVER).await.is_ok(),
        };
        if acknowledged {
            self.least = self.version;
        }
    }

    /// Says whether there was something.
    async fn check(&self, group: &Client<BoxedService>) -> bool {
        let Ok(Some(read)) = group.get(&self.key).await else {
            return false;
        };
        let read: u64 = std::str::from_utf8(&read).unwrap().parse().unwrap();
        let Self {
            key,
            version,
            least,
        } = self;
        let allowed = *least..=*version;
        assert!(
            allowed.contains(&read),
            "{key:?}: {read} is none of {allowed:?}"
        );
        true
    }
}

/// Switches that are flipped and nodes that come and go at random, while others write and read.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn never_an_older_version_than_the_last_one_written_whoever_flips_the_switches() {
    for seed in [1, 2, 3] {
        let servers = servers(3).await;
        let client = builder(&servers)
            .timeout(ms(400))
            .attempt_timeout(ms(60))
            .build()
            .unwrap();
        let group = client.group("g").unwrap().boxed();
        let stop = Arc::new(AtomicBool::new(false));
        let hits = Arc::new(AtomicUsize::new(0));
        let writers = (0..6).map(|writer| {
            let (client, group) = (client.boxed(), group.clone());
            let (stop, hits) = (stop.clone(), hits.clone());
            let mut random = Rng::with_seed(seed * 100 + writer);
            tokio::spawn(async move {
                let story = |n| Story {
                    key: Key::new(format!("{seed}-{writer}-{n}")).unwrap(),
                    version: 0,
                    least: 0,
                };
                let mut stories: Vec<_> = (0..8).map(story).collect();
                while !stop.load(Ordering::Relaxed) {
                    let place = random.usize(..stories.len());
                    let story = &mut stories[place];
                    // By the one or by the other: they share the nodes and their journals.
                    let by = if random.bool() { &client } else { &group };
                    story.go_on(by, &mut random).await;
                    for by in [&client, &group] {
                        let hit = story.check(by).await;
                        hits.fetch_add(usize::from(hit), Ordering::Relaxed);
                    }
                }
                stories
            })
        });
        let writers: Vec<_> = writers.collect();
        let mut random = Rng::with_seed(seed);
        let ends = Instant::now() + ms(2500);
        while Instant::now() < ends {
            let switch = match random.bool() {
                true => client.kill_switch(),
                false => group.kill_switch(),
            };
            match random.u8(..3) {
                0 => switch.unwrap().throw(),
                _ => switch.unwrap().reset(),
            }
            if random.u8(..40) == 0 {
                servers[random.usize(..3)].stall();
            }
            if random.u8(..20) == 0 {
                servers.iter().for_each(Server::resume);
            }
            sleep(ms(random.u64(1..8))).await;
        }
        client.kill_switch().unwrap().reset();
        group.kill_switch().unwrap().reset();
        servers.iter().for_each(Server::resume);
        stop.store(true, Ordering::Relaxed);
        let stories = timeout(PATIENCE, join_all(writers)).await.unwrap();
        for node in 0..3 {
            until_closed(&client, node).await;
        }
        assert!(
            hits.load(Ordering::Relaxed) > 50,
            "nothing was there to be read"
        );
        for mut story in stories.into_iter().flat_map(Result::unwrap) {
            story.check(&group).await;
            story.version += 1;
            let last = story.version.to_string();
            group.set(&story.key, last, Ttl::NEVER).await.unwrap();
            story.least = story.version;
            story.check(&group).await;
        }
    }
}
