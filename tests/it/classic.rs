//! The guarantees over classic connections: one request at a time each, and a bounded pool of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use futures::{FutureExt as _, poll};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout};
use tower_memcached::testing::Server;
use tower_memcached::{
    BreakerState, CasOutcome, Client, ClientBuilder, ErrorKind, Executor, FailureMode,
    ProbeSettings, Protocol, Sent, Ttl,
};

use crate::support::{
    PATIENCE, eventually, in_memory, patient, server, servers, until_closed, until_open,
};

const TTL: Ttl = Ttl::secs(60);

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// One node in this process, asked in the classic protocol, that nobody probes.
fn classic(server: &Server) -> ClientBuilder {
    in_memory(std::slice::from_ref(server))
        .protocol(Protocol::Classic)
        .probe(ProbeSettings::default().initial_delay(Duration::from_secs(3_600)))
}

/// The same for requests that are asked once, whose time-outs condemn no node.
fn of_one_attempt(server: &Server) -> ClientBuilder {
    classic(server)
        .timeout(ms(200))
        .max_attempts(1)
        .consecutive_timeouts(u32::MAX)
        .failure_mode(FailureMode::Cancel)
}

#[tokio::test(start_paused = true)]
async fn a_thousand_requests_share_the_pools_connections_and_all_are_answered() {
    let server = Server::new();
    let client: Client = classic(&server)
        .pool_size(7)
        .timeout(Duration::from_secs(5))
        .attempt_timeout(Duration::from_secs(5))
        .build()
        .unwrap();
    let most = Arc::new(AtomicUsize::new(0));
    let calls = (0..1_000).map(|n| {
        let (client, server, most) = (client.clone(), server.clone(), most.clone());
        tokio::spawn(async move {
            let key = format!("k{n}");
            client.set(&key, format!("v{n}"), TTL).await.unwrap();
            most.fetch_max(server.open_connections(), Ordering::Relaxed);
            let value = client.get(&key).await.unwrap().unwrap();
            assert_eq!(value, *format!("v{n}"));
        })
    });
    for call in join_all(calls).await {
        call.unwrap();
    }
    assert_eq!(server.connections_accepted(), 7);
    assert_eq!(most.load(Ordering::Relaxed), 7);
    assert_eq!(client.nodes()[0].connections, 7);
}

#[tokio::test(start_paused = true)]
async fn there_are_never_more_connections_than_the_pool_may_have_whatever_becomes_of_them() {
    let server = Server::new();
    let client: Client = classic(&server)
        .pool_size(4)
        .consecutive_timeouts(u32::MAX)
        .build()
        .unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..40)
        .map(|caller| {
            let (client, ended) = (client.clone(), ended.clone());
            tokio::spawn(async move {
                while !ended.load(Ordering::Relaxed) {
                    let call = client.get(format!("k{caller}"));
                    let _either = timeout(ms(1 + caller % 5), call).await;
                    sleep(ms(caller % 3 + 1)).await;
                }
            })
        })
        .collect();
    for round in 0..300 {
        match round % 5 {
            0 => server.close_connections(),
            1 => server.delay(ms(round % 7)),
            2 => server.answer_garbage("NONSENSE\r\n"),
            3 => server.heal().unwrap(),
            _ => server.reset_connections(),
        }
        for _ in 0..5 {
            // What the client has; the server notices an end a moment later.
            assert!(client.nodes()[0].connections <= 4, "{:?}", client.nodes());
            sleep(ms(1)).await;
        }
    }
    ended.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_is_an_error_at_once_and_takes_nothing_back() {
    let server = Server::new();
    let client: Client = classic(&server)
        .pool_size(2)
        .max_in_flight(10)
        .max_attempts(1)
        .build()
        .unwrap();
    client.set("k", "v", TTL).await.unwrap();
    for _ in 0..3 {
        server.delay(ms(5));
        let mut waiting: Vec<_> = (0..10).map(|_| Box::pin(client.get("k"))).collect();
        for call in &mut waiting {
            assert!(poll!(call.as_mut()).is_pending());
        }
        let began = Instant::now();
        let error = client.get("k").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Overloaded, "{error}");
        assert_eq!(error.sent(), Sent::No);
        assert_eq!(began.elapsed(), Duration::ZERO);
        server.delay(Duration::ZERO);
        for read in join_all(waiting).await {
            assert_eq!(read.unwrap().unwrap(), "v");
        }
    }
}

#[tokio::test]
async fn a_refused_connect_is_told_at_once_and_as_what_it_is() {
    let server = server().await;
    server.refuse();
    let client: Client = patient(std::slice::from_ref(&server))
        .protocol(Protocol::Classic)
        .max_attempts(1)
        .build()
        .unwrap();
    let began = Instant::now();
    let calls = (0..50).map(|_| client.get("k"));
    for outcome in join_all(calls).await {
        let error = outcome.unwrap_err();
        assert_eq!(error.sent(), Sent::No);
        let message = error.to_string();
        assert!(message.contains("refused"), "{message}");
    }
    assert!(began.elapsed() < Duration::from_secs(1), "not a time-out");
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_costs_no_connection_where_the_answer_comes_in_time() {
    let server = Server::new();
    let client: Client = classic(&server).pool_size(1).build().unwrap();
    client.set("a", "of a", TTL).await.unwrap();
    client.set("b", "of b", TTL).await.unwrap();
    server.delay(ms(10));
    for _ in 0..10 {
        let mut left = Box::pin(client.get("a"));
        assert!(poll!(left.as_mut()).is_pending());
        sleep(ms(5)).await;
        drop(left);
        let value = client.get("b").await.unwrap().unwrap();
        assert_eq!(value, "of b");
    }
    assert_eq!(server.connections_accepted(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_did_not_answer_is_closed_and_never_used_again() {
    let server = Server::new();
    let client: Client = of_one_attempt(&server)
        .pool_size(1)
        .attempt_timeout(ms(30))
        .stall_timeout(ms(60))
        .build()
        .unwrap();
    client.set("a", "of a", TTL).await.unwrap();
    client.set("b", "of b", TTL).await.unwrap();
    server.delay(ms(90));
    let error = client.get("a").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(error.sent(), Sent::Maybe);
    sleep(ms(31)).await;
    server.delay(Duration::ZERO);
    let mut reads = 0;
    let value = loop {
        reads += 1;
        match client.get("b").await {
            Ok(value) => break value,
            Err(error) => assert!(reads < 50, "{error}"),
        }
        sleep(ms(20)).await;
    };
    assert_eq!(value.unwrap(), "of b");
    assert!(server.connections_accepted() > 1);
    eventually("the old one is closed", || server.open_connections() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_dropped_at_any_moment_leaves_the_rest_in_step() {
    let server = Server::new();
    let client: Client = classic(&server)
        .pool_size(2)
        .timeout(Duration::from_secs(2))
        .build()
        .unwrap();
    for n in 0..10 {
        client
            .set(format!("k{n}"), format!("v{n}"), TTL)
            .await
            .unwrap();
    }
    for turns in 0..40 {
        let mut calls: Vec<_> = (0..6)
            .map(|n| {
                let client = &client;
                async move {
                    match n % 3 {
                        0 => drop(client.get(format!("k{n}")).await),
                        1 => drop(client.set("other", vec![b'x'; 30_000], TTL).await),
                        _ => drop(client.get_many(["k1", "k2", "missing"]).await),
                    }
                }
                .boxed()
            })
            .collect();
        for _ in 0..turns {
            for call in &mut calls {
                if poll!(call.as_mut()).is_ready() {
                    *call = std::future::pending().boxed();
                }
            }
            yield_now().await;
        }
        drop(calls);
        for n in 0..10 {
            let value = client.get(format!("k{n}")).await.unwrap().unwrap();
            assert_eq!(value, *format!("v{n}"), "after {turns} turns");
        }
        assert!(server.open_connections() <= 2);
    }
    assert_eq!(server.connections_accepted(), 2, "none had to be given up");
    assert_eq!(client.nodes()[0].in_flight, 0);
}

#[tokio::test(start_paused = true)]
async fn after_a_restart_nothing_fails_and_what_was_idle_is_not_kept() {
    let server = Server::new();
    let client: Client = classic(&server).pool_size(8).build().unwrap();
    for _ in 0..10 {
        let calls = (0..50).map(|n| client.set(format!("k{n}"), "v", TTL));
        for outcome in join_all(calls).await {
            outcome.unwrap();
        }
        assert_eq!(client.nodes()[0].connections, 8);
        server.restart_empty();
        client.set("k", "v", TTL).await.unwrap();
        // The others were the old process's.
        assert_eq!(client.nodes()[0].connections, 1);
        assert_eq!(server.open_connections(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn connections_that_nobody_uses_are_closed_after_a_while() {
    let server = Server::new();
    let client: Client = classic(&server).pool_size(8).build().unwrap();
    let calls = (0..50).map(|n| client.set(format!("k{n}"), "v", TTL));
    join_all(calls).await;
    assert_eq!(client.nodes()[0].connections, 8);
    sleep(Duration::from_secs(50)).await;
    assert_eq!(client.nodes()[0].connections, 8);
    sleep(Duration::from_secs(60)).await;
    assert_eq!(client.nodes()[0].connections, 0);
    client.set("k", "v", TTL).await.unwrap();
    assert_eq!(client.nodes()[0].connections, 1);
}

#[tokio::test(start_paused = true)]
async fn a_token_from_before_a_restart_is_not_sent() {
    let server = Server::new();
    let client: Client = classic(&server).pool_size(3).build().unwrap();
    client.set("k", "v", TTL).await.unwrap();
    let old = client.gets("k").await.unwrap().unwrap().cas().unwrap();
    server.restart_empty();
    client.set("k", "w", TTL).await.unwrap();
    let sent = server.commands_named("cas");
    let outcome = client.cas("k", "x", TTL, old).await.unwrap();
    assert_eq!(outcome, CasOutcome::Exists);
    assert_eq!(server.commands_named("cas"), sent);
    let new = client.gets("k").await.unwrap().unwrap().cas().unwrap();
    let outcome = client.cas("k", "x", TTL, new).await.unwrap();
    assert_eq!(outcome, CasOutcome::Stored);
}

#[tokio::test(start_paused = true)]
async fn a_token_waits_for_its_connection_as_long_as_any_request_and_no_longer() {
    let server = Server::new();
    let client: Client = of_one_attempt(&server)
        .pool_size(2)
        .attempt_timeout(ms(50))
        .stall_timeout(ms(500))
        .build()
        .unwrap();
    client.set("k", "v", TTL).await.unwrap();
    let token = client.gets("k").await.unwrap().unwrap().cas().unwrap();
    server.delay(ms(400));
    let on_the_first = client.get("k").await.unwrap_err();
    assert_eq!(on_the_first.kind(), ErrorKind::Timeout);
    server.delay(Duration::ZERO);
    client.get("k").await.unwrap().unwrap();
    assert_eq!(server.connections_accepted(), 2, "the second one is idle");

    let (asked, sent) = (Instant::now(), server.commands_named("cas"));
    let outcome = client.cas("k", "w", TTL, token).await.unwrap();
    assert_eq!(outcome, CasOutcome::Exists);
    assert_eq!(server.commands_named("cas"), sent);
    assert!(asked.elapsed() <= ms(55), "{:?}", asked.elapsed());

    // The connection answers at last, and is the token's still.
    sleep(ms(400)).await;
    let outcome = client.cas("k", "w", TTL, token).await.unwrap();
    assert_eq!(outcome, CasOutcome::Stored);
}

#[tokio::test(start_paused = true)]
async fn what_was_queued_when_a_node_opens_moves_and_is_not_sent() {
    let servers = [Server::new(), Server::new(), Server::new()];
    let client: Client = in_memory(&servers)
        .protocol(Protocol::Classic)
        .pool_size(2)
        .timeout(Duration::from_secs(2))
        .build()
        .unwrap();
    join_all((0..60).map(|n| client.set(format!("k{n}"), "v", TTL))).await;
    servers[0].stall();
    let sets_before = servers[0].commands_named("set");
    let began = Instant::now();
    let calls = (0..60).map(|n| client.set(format!("k{n}"), "w", TTL));
    for outcome in join_all(calls).await {
        outcome.unwrap();
    }
    assert!(began.elapsed() < ms(500), "{:?}", began.elapsed());
    until_open(&client, 0).await;
    assert_eq!(servers[0].commands_named("set"), sets_before);
    for n in 0..60 {
        let value = client.get(format!("k{n}")).await.unwrap();
        assert_eq!(value.unwrap(), "w");
    }
    servers[0].resume();
    until_closed(&client, 0).await;
    sleep(Duration::from_secs(10)).await;
    for n in 0..60 {
        let value = client.get(format!("k{n}")).await.unwrap();
        assert!(value.is_none_or(|value| value == "w"), "k{n}");
    }
}

#[tokio::test]
async fn a_client_that_is_shut_down_or_dropped_leaves_no_task_and_no_connection() {
    let server = server().await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let only = std::slice::from_ref(&server);
    for shuts_down in [true, false] {
        let build = || -> Client {
            let builder = patient(only).protocol(Protocol::Classic).pool_size(5);
            builder.build().unwrap()
        };
        let before = metrics.num_alive_tasks();
        let client = build();
        for outcome in join_all((0..50).map(|n| client.set(format!("k{n}"), "v", TTL))).await {
            outcome.unwrap();
        }
        server.stall();
        let mut late: Vec<_> = (0..20).map(|_| Box::pin(client.get("k1"))).collect();
        for call in &mut late {
            assert!(poll!(call.as_mut()).is_pending());
        }
        sleep(ms(20)).await;
        if shuts_down {
            client.shutdown(ms(50)).await;
            for call in late {
                let outcome = timeout(PATIENCE, call).await.expect("ended");
                assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Shutdown);
            }
        } else {
            drop(late);
        }
        drop(client);
        server.resume();
        eventually("all connections are closed", || {
            server.open_connections() == 0
        })
        .await;
        eventually("all tasks have ended", || {
            metrics.num_alive_tasks() <= before
        })
        .await;
    }
}

/// The threads of the application do nothing else for a while.
#[test]
#[expect(clippy::disallowed_methods, reason = "it is to block")]
fn an_application_that_blocks_makes_no_io_late() {
    let elsewhere = tokio::runtime::Runtime::new().unwrap();
    let servers = elsewhere.block_on(servers(2));
    let client: Client = patient(&servers)
        .protocol(Protocol::Classic)
        .executor(Executor::dedicated("classic", 1))
        .probe(
            ProbeSettings::default()
                .initial_delay(ms(10))
                .period(ms(50)),
        )
        .build()
        .unwrap();
    let application = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let application = application.unwrap();
    application.block_on(async {
        join_all((0..20).map(|n| client.set(format!("k{n}"), format!("v{n}"), TTL))).await;
        let probed: Vec<_> = servers.iter().map(|s| s.commands_named("set")).collect();
        for _ in 0..3 {
            let asked = || -> u64 { servers.iter().map(|s| s.commands_named("get")).sum() };
            let before = asked();
            let calls = (0..20).map(|n| {
                let client = client.clone();
                tokio::spawn(async move { client.get(format!("k{n}")).await })
            });
            let calls: Vec<_> = calls.collect();
            tokio::task::yield_now().await;
            std::thread::sleep(ms(400));
            let now = asked();
            assert!(now >= before + 20, "they were asked meanwhile: {now}");
            for (n, read) in join_all(calls).await.into_iter().enumerate() {
                assert_eq!(read.unwrap().unwrap().unwrap(), *format!("v{n}"));
            }
        }
        for (server, before) in servers.iter().zip(probed) {
            assert!(
                server.commands_named("set") > before,
                "it was probed meanwhile"
            );
        }
        assert!(
            client
                .nodes()
                .iter()
                .all(|node| node.state == BreakerState::Closed)
        );
    });
}
