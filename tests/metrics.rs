//! What is counted. A recorder is there for the whole process, so this is a process of its own.
#![cfg(feature = "testing")]

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, SharedString, Unit};
use tokio::time::{Instant, sleep};
use tower_memcached::testing::Server;
use tower_memcached::{
    BreakerState, Client, Discovery, GroupLayer, GroupSettings, NodeSpec, OnFailure, Ttl, telemetry,
};

/// What has been told, by name and labels.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<HashMap<String, Arc<AtomicU64>>>>);

struct Recorded(Arc<AtomicU64>);

impl HistogramFn for Recorded {
    fn record(&self, _: f64) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Recorder {
    fn cell(&self, key: &Key) -> Arc<AtomicU64> {
        let label = |label: &metrics::Label| format!("{}={}", label.key(), label.value());
        let labels: Vec<_> = key.labels().map(label).collect();
        let name = format!("{}{{{}}}", key.name(), labels.join(","));
        self.0.lock().unwrap().entry(name).or_default().clone()
    }

    /// The sum over all whose name and labels contain each of these.
    fn told(&self, parts: &[&str]) -> u64 {
        let cells = self.0.lock().unwrap();
        let fitting = cells
            .iter()
            .filter(|(name, _)| parts.iter().all(|part| name.contains(part)));
        fitting.map(|(_, cell)| cell.load(Ordering::Relaxed)).sum()
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.cell(key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.cell(key))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Arc::new(Recorded(self.cell(key))))
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_recorder_installed_after_the_client_was_used_is_told_everything_and_no_key() {
    let servers = [Server::new(), Server::new(), Server::new()];
    let mut addresses = Vec::new();
    for server in &servers {
        addresses.push(server.listen().await.unwrap().to_string());
    }
    let client = Client::builder()
        .nodes(&addresses)
        .attempt_timeout(Duration::from_millis(100))
        .timeout(Duration::from_secs(2))
        .group("carts", GroupSettings::default().prefix("secret-"))
        .group("found", GroupSettings::default().nodes(&addresses[..1]))
        .build()
        .unwrap();
    let keys: Vec<_> = (0..30).map(|n| format!("secret-{n}")).collect();
    for key in &keys {
        client.set(key, "v", Ttl::NEVER).await.unwrap();
    }
    let recorder = Recorder::default();
    metrics::set_global_recorder(recorder.clone()).unwrap();

    // Handles from before know nothing of it; they are made anew every 10 s.
    let asked = Instant::now();
    let answered = [telemetry::REQUESTS, "operation=set", "outcome=answered"];
    let at = |address: &String| recorder.told(&[&answered[..], &[address]].concat());
    while addresses.iter().any(|address| at(address) == 0) {
        for key in &keys {
            client.set(key, "v", Ttl::NEVER).await.unwrap();
        }
        sleep(Duration::from_millis(50)).await;
    }
    assert!(
        asked.elapsed() < Duration::from_secs(14),
        "{:?}",
        asked.elapsed()
    );
    let told = || [&answered[..], &[telemetry::LATENCY]].map(|names| recorder.told(names));
    let before = told();
    for key in &keys {
        client.set(key, "v", Ttl::NEVER).await.unwrap();
    }
    assert_eq!(told(), before.map(|count| count + 30));
    for address in &addresses {
        let probed = [telemetry::PROBES, "result=success", address];
        assert!(recorder.told(&probed) > 0);
    }

    reads_that_load(&client, &recorder).await;
    claims(&client, &recorder).await;
    bypasses(&client, &recorder).await;
    discoveries(&client, &recorder, &addresses[0]).await;

    servers[1].stall();
    let node = format!("node={}", addresses[1]);
    while client.nodes()[1].state == BreakerState::Closed {
        for key in &keys {
            client.set(key, "w", Ttl::NEVER).await.unwrap();
        }
    }
    for key in &keys {
        client.set(key, "w", Ttl::NEVER).await.unwrap();
    }
    assert_eq!(recorder.told(&[telemetry::EJECTIONS, &node, "cause="]), 1);
    assert!(recorder.told(&[telemetry::FAILOVERS, &node]) > 0);
    until("the journal shows", || {
        recorder.told(&[telemetry::JOURNAL_KEYS, &node]) > 0
    })
    .await;
    assert!(recorder.told(&[telemetry::BREAKER_STATE, &node]) > 0);
    servers[1].resume();
    until("it is back", || {
        recorder.told(&[telemetry::READMISSIONS, &node]) == 1
    })
    .await;
    until("the journal is worked off", || {
        recorder.told(&[telemetry::JOURNAL_DELETIONS, &node]) > 0
    })
    .await;
    for name in [
        telemetry::IN_FLIGHT,
        telemetry::IN_FLIGHT_LIMIT,
        telemetry::QUEUE_DEPTH,
        telemetry::CONNECTIONS,
    ] {
        let names = recorder.0.lock().unwrap();
        assert!(names.keys().any(|known| known.starts_with(name)), "{name}");
    }

    // Of a node that is gone nothing is shown, at once and from then on.
    until("its connection shows", || {
        recorder.told(&[telemetry::CONNECTIONS, &node]) > 0
    })
    .await;
    client.set_nodes([&addresses[0]]).unwrap();
    let told = || {
        let gauges = [
            telemetry::IN_FLIGHT,
            telemetry::IN_FLIGHT_LIMIT,
            telemetry::QUEUE_DEPTH,
            telemetry::CONNECTIONS,
            telemetry::BREAKER_STATE,
            telemetry::JOURNAL_KEYS,
        ];
        gauges.map(|gauge| recorder.told(&[gauge, &node]))
    };
    assert_eq!(told(), [0; 6]);
    // Its keeper sets them each second.
    sleep(Duration::from_millis(1500)).await;
    assert_eq!(told(), [0; 6]);

    let names = recorder.0.lock().unwrap();
    assert!(
        names.keys().all(|name| !name.contains("secret")),
        "{names:?}"
    );
}

async fn reads_that_load(client: &Client, recorder: &Recorder) {
    let ended = |result| recorder.told(&[telemetry::READ_THROUGHS, result]);
    let load = || async { Ok::<_, std::io::Error>(Some("v")) };
    let read = || client.get_or_load("secret", Ttl::NEVER, load);
    read().await.unwrap();
    assert_eq!(ended("result=loaded"), 1);
    until("it is put back", || {
        recorder.told(&[telemetry::REFILLS, "result=stored"]) == 1
    })
    .await;
    read().await.unwrap();
    assert_eq!(ended("result=hit"), 1);

    let fails = || async { Err::<Option<&str>, _>(std::io::Error::other("no")) };
    let failed = client.get_or_load("secret-none", Ttl::NEVER, fails).await;
    assert!(failed.is_err());
    assert_eq!(ended("result=failed"), 1);
    let guarded = |result| recorder.told(&[telemetry::LOADS_ENDED, "guard=database", result]);
    assert_eq!(guarded("result=success"), 1);
    assert_eq!(guarded("result=failure"), 1);
    assert_eq!(recorder.told(&[telemetry::LOADS_DURATION]), 2);
}

async fn claims(client: &Client, recorder: &Recorder) {
    let claims = |result| recorder.told(&[telemetry::CLAIMS, result]);
    for _ in 0..3 {
        let claim = client.claim("secret-claim", Ttl::NEVER, OnFailure::Deny);
        assert!(claim.await.unwrap().error().is_none());
    }
    assert_eq!((claims("result=first"), claims("result=seen")), (1, 2));

    let full = client.layer(GroupLayer::new("full").max_in_flight(0));
    for failure in [OnFailure::Allow, OnFailure::Deny] {
        let claim = full.claim("secret-claim", Ttl::NEVER, failure).await;
        assert!(claim.unwrap().error().is_some());
    }
    let decides = |_| async { Ok::<_, std::io::Error>(true) };
    let claim = full.claim_or_else("secret-claim", Ttl::NEVER, decides);
    assert!(claim.await.unwrap().is_first());
    let fails = |_| async { Err::<bool, _>(std::io::Error::other("no")) };
    let claim = full.claim_or_else("secret-claim", Ttl::NEVER, fails).await;
    assert!(claim.is_err());
    for result in ["allowed", "denied", "fallback", "failed"] {
        let counted = recorder.told(&[telemetry::CLAIMS, &format!("result={result}")]);
        assert_eq!(counted, 1, "{result}");
    }
}

/// What a discovery finds, and that others can see which ring comes of it.
async fn discoveries(client: &Client, recorder: &Recorder, address: &str) {
    let found = client.group("found").unwrap();
    let shown = |of: &Client<_>| {
        let ring = f64::from_bits(recorder.told(&[telemetry::RING_FINGERPRINT, "group=found"]));
        ring == of.ring_fingerprint() as f64 && ring > 0.0
    };
    // By the nodes' own tasks, since nothing has changed.
    until("its ring shows", || shown(&found)).await;
    let (tell, lists) = futures::channel::mpsc::unbounded();
    found.follow(Discovery::stream(lists)).unwrap();
    let before = found.ring_fingerprint();
    let spec = NodeSpec::new("elsewhere").unwrap().at(address).unwrap();
    for list in [
        Ok(vec![spec.clone()]),
        Ok(vec![spec.clone()]),
        Ok(Vec::new()),
        Ok(vec![spec.clone(), spec]),
        Err(std::io::Error::other("no answer")),
    ] {
        tell.unbounded_send(list).unwrap();
    }
    let failures = |reason| {
        let reason = format!("reason={reason}");
        recorder.told(&[telemetry::DISCOVERY_FAILURES, "group=found", &reason])
    };
    until("all failures are counted", || failures("error") == 1).await;
    assert_eq!((failures("empty"), failures("invalid")), (1, 1));
    let changes = recorder.told(&[telemetry::DISCOVERY_CHANGES, "group=found"]);
    assert_eq!(changes, 1, "the same twice is one change");
    assert_ne!(found.ring_fingerprint(), before);
    assert!(shown(&found));
    let last = recorder.told(&[telemetry::DISCOVERY_LAST_FOUND, "group=found"]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let age = now.unwrap().as_secs_f64() - f64::from_bits(last);
    assert!((0.0..60.0).contains(&age), "{age}");
}

/// What a thrown switch keeps from the cache is counted: by group, or for the whole client.
async fn bypasses(client: &Client, recorder: &Recorder) {
    let carts = client.group("carts").unwrap();
    let bypassed = |group: &str, operation: &str| {
        let (group, operation) = (format!("group={group}"), format!("operation={operation}"));
        recorder.told(&[telemetry::BYPASSED, &group, &operation])
    };
    let use_it = || async {
        for _ in 0..3 {
            carts.set("cart", "v", Ttl::NEVER).await.unwrap();
            carts.delete("cart").await.unwrap();
            carts.get("cart").await.unwrap();
        }
        let _ = carts.add("cart", "v", Ttl::NEVER).await;
        let load = || async { Ok::<_, std::io::Error>(Some("v")) };
        carts.get_or_load("cart", Ttl::NEVER, load).await.unwrap();
        carts.version().await.unwrap();
    };
    use_it().await;
    assert_eq!(recorder.told(&[telemetry::BYPASSED]), 0);
    let (own, whole) = (carts.kill_switch().unwrap(), client.kill_switch().unwrap());
    for (switch, group) in [(own, "carts"), (whole, "client")] {
        switch.throw();
        use_it().await;
        switch.reset();
        for (operation, times) in [("set", 3), ("delete", 3), ("get", 3), ("add", 1)] {
            assert_eq!(bypassed(group, operation), times, "{group}: {operation}");
        }
        assert_eq!(bypassed(group, "version"), 0);
    }
    let before = recorder.told(&[telemetry::BYPASSED]);
    use_it().await;
    assert_eq!(recorder.told(&[telemetry::BYPASSED]), before);
}
