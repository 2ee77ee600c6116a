//! Claims: one is the first, the policy decides where the cache cannot, and what is in doubt is
//! looked up. Under paused time, but for those against a real memcached.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep};
use tower::service_fn;
use tower_memcached::testing::{Flow, Memcached, Proxy, Server, Toxics};
use tower_memcached::{
    BoxedService, Claim, Client, Error, ErrorKind, Executor, FailureMode, GroupLayer, Key,
    KillSwitch, LoadGuard, LoadLimits, Loader, OnFailure, Operation, Payload, ProbeSettings,
    ReadThroughLayer, ReadThroughSettings, Request, Response, Sent, StoreMode, Ttl,
};

use crate::read_through::{BoxError, TTL, ms, secs};
use crate::support::{PATIENCE, eventually, in_memory, until_closed, until_open};

fn client(server: &Server) -> Client {
    in_memory(std::slice::from_ref(server)).build().unwrap()
}

async fn claim<S>(client: &Client<S>, failure: OnFailure) -> Claim
where
    S: tower::Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    client.claim("k", TTL, failure).await.unwrap()
}

/// Claims are executed, and their answer is lost with the connection.
fn lose_answers_to_claims(server: &Server) {
    let hangs_up = server.clone();
    server.rewrite_replies(move |line, reply| match line.starts_with(b"ms ") {
        true => {
            hangs_up.close_connections();
            Vec::new()
        }
        false => reply,
    });
}

/// What follows meets the server, and not the dialling.
async fn connected(client: &Client) {
    client.version().await.unwrap().remove(0).result.unwrap();
}

#[tokio::test]
async fn of_a_thousand_in_each_of_two_clients_one_is_the_first() {
    let memcached = Memcached::spawn(&[]).unwrap();
    let client = || {
        let builder = Client::builder().nodes([memcached.address()]);
        let builder = builder.executor(Executor::current()).timeout(PATIENCE);
        builder.attempt_timeout(PATIENCE).build().unwrap()
    };
    let (one, other) = (client(), client());
    for ttl in [TTL, Ttl::NEVER] {
        let claims = (0..2_000).map(|n| {
            let client = if n % 2 == 0 { &one } else { &other }.clone();
            tokio::spawn(async move { client.claim("k", ttl, OnFailure::Allow).await.unwrap() })
        });
        let claims = join_all(claims).await.into_iter().map(Result::unwrap);
        let (first, seen): (Vec<_>, Vec<_>) = claims.partition(Claim::is_first);
        assert_eq!(first.len(), 1);
        assert!(matches!(first[0], Claim::First));
        assert!(seen.iter().all(|claim| matches!(claim, Claim::Seen)));
        // Given back.
        assert!(other.delete("k").await.unwrap());
    }
    assert!(claim(&one, OnFailure::Deny).await.is_first());
}

#[tokio::test]
async fn whose_claim_it_is_is_read_over_the_next_connection_when_the_network_is_lost() {
    let memcached = Memcached::spawn(&[]).unwrap();
    let proxy = Proxy::listen(memcached.socket_address()).await.unwrap();
    let client = |address: String| {
        let builder = Client::builder().nodes([address]);
        let builder = builder.executor(Executor::current()).timeout(PATIENCE);
        // Only the loss of the connection ends what is on it.
        let builder = builder.attempt_timeout(PATIENCE).stall_timeout(PATIENCE);
        let probe = ProbeSettings::default().period(PATIENCE);
        builder.probe(probe).build().unwrap()
    };
    let direct = client(memcached.address());
    let through = client(proxy.address().to_string());
    for claimed_before in [false, true] {
        direct.delete("k").await.unwrap();
        connected(&through).await;
        let commands =
            async || direct.stats().await.unwrap().remove(0).result.unwrap()["cmd_set"].clone();
        if claimed_before {
            assert!(claim(&direct, OnFailure::Deny).await.is_first());
        }
        let before = commands().await;
        proxy.set(Flow::Downstream, Toxics::new().blackhole());
        let claimed = tokio::spawn({
            let through = through.clone();
            async move { claim(&through, OnFailure::Deny).await }
        });
        let until = Instant::now() + PATIENCE;
        while commands().await == before {
            assert!(Instant::now() < until, "never executed");
            sleep(ms(2)).await;
        }
        proxy.reset_connections();
        proxy.heal().unwrap();
        match claimed.await.unwrap() {
            Claim::First => assert!(!claimed_before),
            Claim::Seen => assert!(claimed_before),
            claim @ Claim::Unanswered { .. } => panic!("{claim:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_is_over_with_its_ttl() {
    let server = Server::new();
    let client = client(&server);
    let ttl = Ttl::secs(2);
    let claim = || async { client.claim("k", ttl, OnFailure::Deny).await.unwrap() };
    assert!(claim().await.is_first());
    assert!(!claim().await.is_first());
    sleep(secs(3)).await;
    assert!(claim().await.is_first());
}

/// Both policies and the fallback decide, each with this reason.
async fn decided_otherwise(client: &Client<BoxedService>, kind: ErrorKind) {
    for (failure, first) in [(OnFailure::Allow, true), (OnFailure::Deny, false)] {
        let claim = claim(client, failure).await;
        assert!(matches!(claim, Claim::Unanswered { .. }), "{claim:?}");
        assert_eq!(claim.error().unwrap().kind(), kind, "{claim:?}");
        assert_eq!(claim.is_first(), first);
    }
    for first in [true, false] {
        let fallback = |why: Error| async move {
            assert_eq!(why.kind(), kind);
            Ok::<_, Error>(first)
        };
        let claim = client.claim_or_else("k", TTL, fallback).await.unwrap();
        assert_eq!(claim.error().unwrap().kind(), kind, "{claim:?}");
        assert_eq!(claim.is_first(), first);
    }
}

#[tokio::test(start_paused = true)]
async fn whatever_keeps_the_cache_from_answering_is_the_policys() {
    let server = Server::new();
    let all = client(&server);
    connected(&all).await;

    let full = all.layer(GroupLayer::new("full").max_in_flight(0));
    decided_otherwise(&full.boxed(), ErrorKind::Overloaded).await;

    let switch = KillSwitch::default();
    let stopped = all.layer(GroupLayer::new("stopped").kill_switch(switch.clone()));
    switch.throw();
    decided_otherwise(&stopped.boxed(), ErrorKind::Disabled).await;
    switch.reset();
    assert!(server.is_empty());

    let foreign = service_fn(|_: Request| async { Err::<Response, BoxError>("no".into()) });
    decided_otherwise(&Client::from_service(foreign).boxed(), ErrorKind::Layer).await;

    server.rewrite_replies(|_, reply| match reply.starts_with(b"VERSION") {
        true => reply,
        false => b"SERVER_ERROR out of memory storing object\r\n".to_vec(),
    });
    decided_otherwise(&all.boxed(), ErrorKind::Server).await;
    server.heal().unwrap();
    server.restart_empty();

    server.refuse();
    until_open(&all, 0).await;
    decided_otherwise(&all.boxed(), ErrorKind::NodeUnavailable).await;
    server.accept().unwrap();
    until_closed(&all, 0).await;
    assert!(matches!(claim(&all, OnFailure::Deny).await, Claim::First));
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_waits_for_a_fallback_and_no_claim_begins_after_it() {
    let server = Server::new();
    let all = client(&server);
    server.refuse();
    let asked = Arc::new(AtomicUsize::new(0));
    let claiming = |client: Client| {
        let asked = asked.clone();
        async move {
            let fallback = |_| async move {
                asked.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(300)).await;
                Ok::<_, Error>(true)
            };
            client.claim_or_else("k", TTL, fallback).await
        }
    };
    let under_way = tokio::spawn(claiming(all.clone()));
    eventually("the fallback is asked", || {
        asked.load(Ordering::Relaxed) == 1
    })
    .await;
    let report = all.shutdown(Duration::from_millis(100)).await;
    assert_eq!((report.requests, report.loads), (0, 1), "{report}");
    let ended = under_way.await.unwrap().unwrap_err();
    assert_eq!(ended.kind(), ErrorKind::Shutdown);
    let late = claiming(all.clone()).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Shutdown);
    let late = all.claim("k", TTL, OnFailure::Allow).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Shutdown);
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_does_not_answer_costs_no_more_than_the_timeout_and_then_the_policy_decides() {
    for mode in [
        FailureMode::Redistribute,
        FailureMode::Cancel,
        FailureMode::Retry,
    ] {
        let server = Server::new();
        let builder = in_memory(std::slice::from_ref(&server)).failure_mode(mode);
        let client = builder.build().unwrap();
        connected(&client).await;
        server.stall();
        // While it is being noticed, and when it is out.
        for _ in 0..20 {
            let asked = Instant::now();
            let claim = claim(&client, OnFailure::Allow).await;
            assert!(claim.is_first() && claim.error().is_some(), "{claim:?}");
            assert!(asked.elapsed() <= ms(101), "{:?}", asked.elapsed());
        }
        until_open(&client, 0).await;
        assert!(!claim(&client, OnFailure::Deny).await.is_first());
    }
}

#[tokio::test(start_paused = true)]
async fn the_read_in_doubt_has_what_is_left_of_the_time() {
    let fails_late = service_fn(|request: Request| async move {
        match request.into_operation() {
            Operation::Store { .. } => {
                sleep(ms(70)).await;
                Err::<Response, BoxError>("in doubt".into())
            }
            _ => pending().await,
        }
    });
    let client = Client::from_service(fails_late);
    let asked = Instant::now();
    let claim = claim(&client, OnFailure::Deny).await;
    // What is told is why the claim failed, and not why the read did.
    assert_eq!(claim.error().unwrap().kind(), ErrorKind::Layer);
    assert!((ms(100)..=ms(101)).contains(&asked.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn a_claim_whose_answer_is_lost_is_found_to_be_ours() {
    let server = Server::new();
    let all = client(&server);
    connected(&all).await;
    lose_answers_to_claims(&server);
    let claimed = claim(&all, OnFailure::Deny).await;
    assert!(matches!(claimed, Claim::First), "{claimed:?}");

    // Under a group's prefix, too.
    let group = all.layer(GroupLayer::new("messages").prefix("m:"));
    let claimed = claim(&group, OnFailure::Deny).await;
    assert!(matches!(claimed, Claim::First), "{claimed:?}");
    assert!(server.peek("m:k").is_some());

    // Both are seen by whoever comes now, whether the answer is lost or not.
    for client in [all.boxed(), group.boxed()] {
        let again = claim(&client, OnFailure::Allow).await;
        assert!(matches!(again, Claim::Seen), "{again:?}");
    }
    server.heal().unwrap();
    for client in [all.boxed(), group.boxed()] {
        let again = claim(&client, OnFailure::Allow).await;
        assert!(matches!(again, Claim::Seen), "{again:?}");
    }
    // Nobody is about to delete them.
    assert_eq!(all.nodes()[0].journal, 0);
}

#[tokio::test(start_paused = true)]
async fn a_claim_whose_answer_is_lost_and_that_is_not_there_is_the_policys() {
    let server = Server::new();
    let client = client(&server);
    connected(&client).await;
    let evicts = server.clone();
    server.rewrite_replies(move |line, reply| match line.starts_with(b"ms ") {
        true => {
            evicts.restart_empty();
            Vec::new()
        }
        false => reply,
    });
    let claimed = claim(&client, OnFailure::Deny).await;
    assert_eq!(claimed.error().unwrap().sent(), Sent::Maybe, "{claimed:?}");
    assert!(server.commands_named("mg") > 0, "it was looked for");
    server.heal().unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_was_claimed_is_not_forgotten_because_a_later_claim_fails() {
    let server = Server::new();
    let client = client(&server);
    let switch = KillSwitch::default();
    let group = client.layer(GroupLayer::new("group").kill_switch(switch.clone()));
    assert!(claim(&group, OnFailure::Deny).await.is_first());
    let is_still_seen = || async {
        let claim = claim(&group, OnFailure::Allow).await;
        assert!(matches!(claim, Claim::Seen), "{claim:?}");
    };

    switch.throw();
    assert!(claim(&group, OnFailure::Deny).await.error().is_some());
    switch.reset();
    is_still_seen().await;

    // In doubt, with nothing to be read.
    server.stall();
    let doubtful = claim(&group, OnFailure::Deny).await;
    assert_eq!(doubtful.error().unwrap().sent(), Sent::Maybe);
    until_open(&client, 0).await;
    server.resume();
    until_closed(&client, 0).await;
    is_still_seen().await;

    server.refuse();
    until_open(&client, 0).await;
    assert!(claim(&group, OnFailure::Deny).await.error().is_some());
    server.accept().unwrap();
    until_closed(&client, 0).await;
    // Longer than anything in doubt is remembered for.
    sleep(secs(10)).await;
    is_still_seen().await;
}

#[tokio::test(start_paused = true)]
async fn what_was_allowed_in_doubt_and_executed_late_is_seen_until_it_is_given_back() {
    let server = Server::new();
    let client = client(&server);
    connected(&client).await;
    server.stall();
    let doubtful = claim(&client, OnFailure::Allow).await;
    assert_eq!(doubtful.error().unwrap().sent(), Sent::Maybe);
    assert!(doubtful.is_first());
    server.resume();
    eventually("it is executed after all", || server.peek("k").is_some()).await;
    until_closed(&client, 0).await;
    let again = claim(&client, OnFailure::Allow).await;
    assert!(matches!(again, Claim::Seen), "{again:?}");
    assert!(client.delete("k").await.unwrap());
    assert!(matches!(
        claim(&client, OnFailure::Deny).await,
        Claim::First
    ));
}

#[tokio::test(start_paused = true)]
async fn what_is_given_back_while_its_node_is_out_can_be_claimed_again() {
    let server = Server::new();
    let client = client(&server);
    assert!(claim(&client, OnFailure::Deny).await.is_first());
    server.refuse();
    until_open(&client, 0).await;
    client.delete("k").await.unwrap_err();
    server.accept().unwrap();
    until_closed(&client, 0).await;
    let until = Instant::now() + PATIENCE;
    while client.nodes()[0].journal > 0 {
        assert!(Instant::now() < until);
        sleep(ms(5)).await;
    }
    assert!(matches!(
        claim(&client, OnFailure::Deny).await,
        Claim::First
    ));
}

#[tokio::test(start_paused = true)]
async fn a_callers_mistake_is_an_error_and_nobody_elses_to_decide() {
    let server = Server::new();
    let client = client(&server);
    let never = |_| async { panic!("asked") as Result<bool, Error> };
    let long = "k".repeat(250);
    let group = client.layer(GroupLayer::new("group").prefix("prefix:"));
    for (client, key) in [
        (client.boxed(), "with space"),
        (client.boxed(), ""),
        (group.boxed(), &long),
    ] {
        let error = client.claim(key, TTL, OnFailure::Allow).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidKey);
        let error = client.claim_or_else(key, TTL, never).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidKey);
    }
    let builder = in_memory(std::slice::from_ref(&server)).max_value_size(31);
    let tiny = builder.build().unwrap();
    let error = tiny.claim("k", TTL, OnFailure::Allow).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ValueTooLarge);
    assert!(server.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_fallback_is_a_load_to_the_guard_and_to_the_clock() {
    let limits = LoadLimits::default().max_concurrent(1).max_queue(0);
    let guard = LoadGuard::new("database", limits).unwrap();
    let settings = ReadThroughSettings::default().guard(guard.clone());
    let server = Server::new();
    let client = client(&server)
        .with_read_through(settings.load_timeout(ms(300)))
        .unwrap();

    // It is not asked while the cache answers.
    let asked = AtomicUsize::new(0);
    let counted = |_| {
        asked.fetch_add(1, Ordering::Relaxed);
        async { Ok::<_, BoxError>(true) }
    };
    for first in [true, false] {
        let claim = client.claim_or_else("k", TTL, counted).await.unwrap();
        assert_eq!((claim.is_first(), claim.error().is_some()), (first, false));
    }
    assert_eq!(asked.load(Ordering::Relaxed), 0);

    server.refuse();
    until_open(&client, 0).await;
    let fails = |_| async { Err::<bool, _>(std::io::Error::other("no such table")) };
    let error = client.claim_or_else("k", TTL, fails).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Load);
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.to_string(), "no such table");

    let hangs = |_| pending::<Result<bool, BoxError>>();
    let begun = Instant::now();
    let slow = async {
        let error = client.claim_or_else("k", TTL, hangs).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Load);
        assert!((ms(300)..=ms(302)).contains(&begun.elapsed()));
    };
    let shed = async {
        sleep(ms(100)).await;
        let error = client.claim_or_else("k", TTL, counted).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::LoadShed);
    };
    tokio::join!(slow, shed);
    assert_eq!(asked.load(Ordering::Relaxed), 0);
    assert_eq!(guard.status().failed, 2);

    let claim = client.claim_or_else("k", TTL, counted).await.unwrap();
    assert!(claim.is_first() && claim.error().is_some());
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

/// Must not be asked.
struct Loads;

impl Loader for Loads {
    async fn load(&self, _: &Key) -> Result<Option<Payload>, BoxError> {
        panic!("a claim was loaded")
    }
}

#[tokio::test(start_paused = true)]
async fn the_read_in_doubt_is_not_loaded_by_a_layer_below() {
    let server = Server::new();
    let client = client(&server);
    connected(&client).await;
    let client = client.layer(ReadThroughLayer::new(Loads, TTL));
    lose_answers_to_claims(&server);
    assert!(matches!(
        claim(&client, OnFailure::Deny).await,
        Claim::First
    ));
    server.heal().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_claim_is_sent_once_and_read_only_in_doubt() {
    let sent = Arc::new(AtomicUsize::new(0));
    let unsent = service_fn({
        let sent = sent.clone();
        move |request: Request| {
            let claims = matches!(
                request.operation(),
                Operation::Store {
                    mode: StoreMode::Claim,
                    ..
                }
            );
            assert!(claims, "what was not sent needs no read");
            sent.fetch_add(1, Ordering::Relaxed);
            let shed = tower::load_shed::error::Overloaded::new();
            async move { Err::<Response, BoxError>(shed.into()) }
        }
    });
    let client = Client::from_service(unsent);
    let claim = claim(&client, OnFailure::Deny).await;
    assert_eq!(claim.error().unwrap().sent(), Sent::No);
    assert_eq!(sent.load(Ordering::Relaxed), 1);
}
