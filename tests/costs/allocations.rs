//! How often an operation asks for memory, through the whole default client: cluster, node, breaker, deadline, and
//! metrics that somebody takes.

use std::hint::black_box;

use tower_memcached::testing::Memcached;
use tower_memcached::{Client, GroupSettings, Ttl};

use super::support::{Count, executors, fill, memcached, patient, runtime, turn};

/// Operations that are counted together, after as many that warm up.
const OPERATIONS: usize = 1_000;

/// The least of so many counts counts.
const ROUNDS: usize = 5;

/// What grows once and for all, such as a queue, and what probes do beside: for each operation.
const BESIDE: f64 = 0.01;

/// Allocations for each operation, of any thread. The operations are done in groups of 10 at once.
async fn count(operation: impl AsyncFn(usize)) -> f64 {
    let many = async || {
        for index in 0..OPERATIONS {
            operation(index).await;
        }
    };
    many().await;
    let mut least = usize::MAX;
    for _ in 0..ROUNDS {
        let count = Count::begin();
        many().await;
        least = least.min(count.allocations());
    }
    least as f64 / OPERATIONS as f64
}

fn check(what: &str, counted: f64, expected: f64) {
    println!("{what}: {counted} allocations");
    assert!(
        (expected..=expected + BESIDE).contains(&counted),
        "{what}: {counted} allocations instead of {expected}"
    );
}

#[test]
fn probe() {
    let _turn = turn();
    for nodes in [1, 3] {
        let servers = memcached(nodes);
        for (name, executor) in executors() {
            let runtime = runtime();
            runtime.block_on(async {
                let client = patient(&servers, &executor)
                    .group("group", GroupSettings::default().prefix("group:"))
                    .build()
                    .unwrap();
                let keys: Vec<_> = (0..100).map(|n| format!("key-{n}")).collect();
                let long: Vec<_> = (0..100).map(|n| format!("{n:0>100}")).collect();
                fill(&client, &keys).await;
                fill(&client, &long).await;
                let group = client.group("group").unwrap();
                let say = |what: &str, counted: f64| println!("{nodes} {name} {what}: {counted}");
                let n = count(async |n| {
                    black_box(client.get(&keys[n % 100]).await.unwrap().unwrap());
                })
                .await;
                say("hit", n);
                let n = count(async |n| {
                    black_box(client.get(&long[n % 100]).await.unwrap().unwrap());
                })
                .await;
                say("long hit", n);
                let n = count(async |_| {
                    assert!(client.get("nothing").await.unwrap().is_none());
                })
                .await;
                say("miss", n);
                let n = count(async |n| {
                    let value: &'static [u8] = &[b'v'; 100];
                    client.set(&keys[n % 100], value, Ttl::NEVER).await.unwrap();
                })
                .await;
                say("set", n);
                let n = count(async |n| {
                    client.delete(&keys[n % 100]).await.unwrap();
                })
                .await;
                say("delete", n);
                fill(&client, &keys).await;
                for k in &keys {
                    group.set(k, vec![b'v'; 100], Ttl::NEVER).await.unwrap();
                }
                let n = count(async |n| {
                    black_box(group.get(&keys[n % 100]).await.unwrap().unwrap());
                })
                .await;
                say("group hit", n);
                let n = count(async |n| {
                    let load = || async { Ok::<Option<&'static str>, std::io::Error>(None) };
                    black_box(
                        client
                            .get_or_load(&keys[n % 100], Ttl::secs(60), load)
                            .await
                            .unwrap()
                            .unwrap(),
                    );
                })
                .await;
                say("get_or_load hit", n);
                let n = count(async |n| {
                    if n % 100 == 0 {
                        let m = client.get_many(&keys).await;
                        assert_eq!(m.errors().count(), 0);
                    }
                })
                .await;
                say("get_many per key", n);
            });
        }
    }
}
