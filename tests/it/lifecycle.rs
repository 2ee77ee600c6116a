//! Building needs no network, dropping stops everything, and bad settings are named.

use std::time::Duration;

use tokio::time::Instant;
use tower_memcached::{Client, ErrorKind, Executor, NodeSpec, PipelinedSettings, Ttl};

use crate::support::{addresses, eventually, patient, server, servers};

#[test]
fn a_client_is_built_without_a_network_or_a_runtime() {
    let client = Client::builder()
        .nodes([
            "no-such-host.invalid",
            "192.0.2.1:1",
            "unix:/no/such/socket",
        ])
        .build()
        .unwrap();
    assert_eq!(client.nodes().len(), 3);
    let on_current = Client::builder()
        .nodes(["127.0.0.1"])
        .executor(Executor::current())
        .build()
        .unwrap();
    let outside = futures::executor::block_on(on_current.get("k")).unwrap_err();
    assert_eq!(outside.kind(), ErrorKind::NoRuntime);
}

#[test]
fn a_client_with_threads_of_its_own_works_outside_a_runtime() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(server());
    let client = Client::builder()
        .nodes([server.address().unwrap().to_string()])
        .timeout(Duration::from_secs(5))
        .attempt_timeout(Duration::from_secs(2))
        .build()
        .unwrap();
    futures::executor::block_on(async {
        client.set("k", "v", Ttl::NEVER).await.unwrap();
        assert_eq!(client.get("k").await.unwrap().unwrap(), "v");
        server.stall();
        let quick = client
            .clone()
            .with_timeout(Duration::from_millis(50))
            .unwrap();
        assert_eq!(quick.get("k").await.unwrap_err().kind(), ErrorKind::Timeout);
    });
}

#[test]
fn a_task_of_a_local_set_needs_no_runtime() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let servers = runtime.block_on(servers(1));
    let client = Client::builder()
        .nodes(addresses(&servers))
        .build()
        .unwrap();
    let get = async move { tokio::task::spawn_local(async move { client.get("k").await }).await };
    let got = futures::executor::block_on(tokio::task::LocalSet::new().run_until(get));
    assert_eq!(got.unwrap().unwrap(), None);
}

#[test]
fn a_service_starts_with_its_cache_down() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let servers = servers(1).await;
        servers[0].refuse();
        let client = patient(&servers).build().unwrap();
        let error = client.get("k").await.unwrap_err();
        assert!(error.is_unavailable(), "{error}");
        servers[0].accept().unwrap();
        crate::support::until_closed(&client, 0).await;
        assert_eq!(client.get("k").await.unwrap(), None);
    });
}

#[test]
fn what_makes_no_sense_is_refused_and_named() {
    let builder = || Client::builder().nodes(["127.0.0.1"]);
    let zero = Duration::ZERO;
    for (built, named) in [
        (Client::builder().build(), "no nodes"),
        (builder().nodes(["host:port"]).build(), "host:port"),
        (
            builder().nodes(["127.0.0.1:11211"]).build(),
            "127.0.0.1:11211",
        ),
        (builder().weighted_node("b", 0).build(), "weight"),
        (builder().timeout(zero).build(), "timeout: must not be zero"),
        (builder().attempt_timeout(zero).build(), "attempt_timeout"),
        (builder().connect_timeout(zero).build(), "connect_timeout"),
        (builder().stall_timeout(zero).build(), "stall_timeout"),
        (
            builder().load_timeout(zero).build(),
            "read_through.load_timeout",
        ),
        (builder().failover_ttl(zero).build(), "failover_ttl"),
        (builder().connections(0).build(), "connections"),
        (builder().max_in_flight(0).build(), "max_in_flight"),
        (builder().max_attempts(0).build(), "max_attempts"),
        (builder().max_value_size(2 << 30).build(), "1 GiB"),
    ] {
        let error = built
            .err()
            .unwrap_or_else(|| panic!("{named} was accepted"));
        assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
        assert!(
            error.to_string().contains(named),
            "{error} does not name {named}"
        );
    }
    assert!(NodeSpec::new("").is_err());
    let _ = PipelinedSettings::default();
}

#[tokio::test]
async fn dropping_the_last_handle_closes_every_connection() {
    let servers = servers(3).await;
    for executor in [Executor::current(), Executor::dedicated("dropped", 2)] {
        let client = patient(&servers)
            .executor(executor)
            .connections(2)
            .build()
            .unwrap();
        for _ in 0..2 {
            client.version().await.unwrap();
        }
        let open = || {
            servers
                .iter()
                .map(|server| server.open_connections())
                .sum::<usize>()
        };
        eventually("both connections of each are up", || open() == 6).await;
        let clone = client.clone();
        drop(client);
        clone.get("k").await.unwrap();
        // Inside an async context, which must not panic.
        drop(clone);
        eventually("they are closed", || open() == 0).await;
    }
}

#[tokio::test]
async fn dropping_a_client_whose_node_is_out_ends_its_probes() {
    let servers = servers(1).await;
    let client = patient(&servers).build().unwrap();
    client.get("k").await.unwrap();
    servers[0].refuse();
    crate::support::until_open(&client, 0).await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let with_client = metrics.num_alive_tasks();
    drop(client);
    eventually("its tasks end", || {
        metrics.num_alive_tasks() + 2 <= with_client
    })
    .await;
}

#[tokio::test]
async fn shutdown_waits_for_what_is_under_way_and_refuses_what_comes_after() {
    let server = server().await;
    server.insert("k", "v");
    let client = patient(std::slice::from_ref(&server)).build().unwrap();
    client.get("k").await.unwrap();
    server.delay(Duration::from_millis(100));
    let under_way = tokio::spawn({
        let client = client.clone();
        async move { client.get("k").await }
    });
    eventually("it is under way", || client.nodes()[0].in_flight == 1).await;
    client.shutdown(Duration::from_secs(5)).await;
    assert_eq!(under_way.await.unwrap().unwrap().unwrap(), "v");
    let error = client.get("k").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shutdown);
    eventually("it is closed", || server.open_connections() == 0).await;

    // What does not end in time is ended.
    let client = patient(std::slice::from_ref(&server)).build().unwrap();
    server.delay(Duration::ZERO);
    client.get("k").await.unwrap();
    server.stall();
    let under_way = tokio::spawn({
        let client = client.clone();
        async move { client.get("k").await }
    });
    eventually("it is under way", || client.nodes()[0].in_flight == 1).await;
    let started = Instant::now();
    client.shutdown(Duration::from_millis(50)).await;
    let error = under_way.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Shutdown, "{error}");
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_runtime_shut_down_under_the_client_is_an_error_and_not_a_hang() {
    let theirs = tokio::runtime::Runtime::new().unwrap();
    let ours = tokio::runtime::Runtime::new().unwrap();
    let servers = ours.block_on(servers(1));
    let client = Client::builder()
        .nodes(addresses(&servers))
        .executor(Executor::handle(theirs.handle().clone()))
        .timeout(Duration::from_secs(5))
        .attempt_timeout(Duration::from_secs(4))
        .stall_timeout(Duration::from_secs(10))
        .build()
        .unwrap();
    ours.block_on(async {
        client.get("k").await.unwrap();
        servers[0].stall();
        let pending = tokio::spawn({
            let client = client.clone();
            async move { client.get("k").await }
        });
        eventually("it is under way", || client.nodes()[0].in_flight == 1).await;
        let started = Instant::now();
        theirs.shutdown_background();
        let error = pending.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Shutdown, "{error}");
        let error = client.get("k").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Shutdown, "{error}");
        assert!(started.elapsed() < Duration::from_secs(3));
    });
}
