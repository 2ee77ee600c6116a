//! How often an operation asks for memory, through the whole default client: cluster, node, breaker, deadline, and
//! metrics that somebody takes.

use std::hint::black_box;

use tower_memcached::{Client, Executor, GroupSettings, Ttl};

use super::support::{Count, executors, memcached, patient, runtime, turn};

/// Operations that are counted together, after as many that warm up.
const OPERATIONS: usize = 1_000;

/// The least of so many counts counts.
const ROUNDS: usize = 3;

/// What grows once in a while, such as a table, and what probes do beside: for each operation.
const BESIDE: f64 = 0.01;

/// Keys that are there, each with 100 bytes.
const KEYS: usize = 100;

/// Allocations of all threads for each operation.
async fn count(operations: usize, operation: impl AsyncFn(usize)) -> f64 {
    let many = async || {
        for index in 0..operations {
            operation(index % KEYS).await;
        }
    };
    many().await;
    let mut least = usize::MAX;
    for _ in 0..ROUNDS {
        let count = Count::begin();
        many().await;
        least = least.min(count.allocations());
    }
    least as f64 / operations as f64
}

fn check(what: &str, counted: f64, expected: f64) {
    assert!(
        (expected..=expected + BESIDE).contains(&counted),
        "{what}: {counted} allocations instead of {expected}"
    );
}

async fn load() -> Result<Option<&'static str>, std::io::Error> {
    Ok(None)
}

/// A client of so many nodes, with a group, for every executor.
fn each_client(nodes: usize, operations: impl AsyncFn(&str, &Client)) {
    let _turn = turn();
    let servers = memcached(nodes);
    for (name, executor) in executors() {
        runtime().block_on(async {
            let client = client(&servers, &executor);
            operations(&format!("{nodes} nodes, {name}"), &client).await;
        });
    }
}

fn client(servers: &[tower_memcached::testing::Memcached], executor: &Executor) -> Client {
    let group = GroupSettings::default().prefix("group:");
    patient(servers, executor)
        .group("group", group)
        .build()
        .unwrap()
}

/// Writes these keys.
async fn filled(client: &Client, key: impl Fn(usize) -> String) -> Vec<String> {
    let keys: Vec<_> = (0..KEYS).map(key).collect();
    for key in &keys {
        client.set(key, vec![b'v'; 100], Ttl::NEVER).await.unwrap();
    }
    keys
}

async fn gets(name: &str, client: &Client) {
    let keys = filled(client, |n| format!("key-{n}")).await;
    let hit = count(OPERATIONS, async |n| {
        black_box(client.get(&keys[n]).await.unwrap().unwrap());
    });
    check(&format!("{name}: a hit"), hit.await, 2.0);
    let miss = count(OPERATIONS, async |_| {
        assert!(client.get("nothing").await.unwrap().is_none());
    });
    check(&format!("{name}: a miss"), miss.await, 1.0);
}

#[test]
fn a_get_allocates_its_request_and_the_value_if_it_hits() {
    each_client(1, gets);
}

#[test]
fn with_three_nodes_it_is_the_same() {
    each_client(3, gets);
}

#[test]
fn a_long_key_is_one_allocation_more_and_a_prefix_none() {
    each_client(1, async |name, client| {
        let long = filled(client, |n| format!("{n:0>100}")).await;
        let counted = count(OPERATIONS / 2, async |n| {
            black_box(client.get(&long[n]).await.unwrap().unwrap());
        });
        check(&format!("{name}: a long key"), counted.await, 3.0);

        let group = client.group("group").unwrap();
        let keys = filled(client, |n| format!("group:{n}")).await;
        let counted = count(OPERATIONS / 2, async |n| {
            let key = keys[n].strip_prefix("group:").unwrap();
            black_box(group.get(key).await.unwrap().unwrap());
        });
        check(&format!("{name}: in a group"), counted.await, 2.0);
    });
}

/// What is written is kept until it is known to be written; a value that is borrowed is copied, and a copy that is
/// shared is counted.
#[test]
fn a_write_allocates_its_request_its_key_and_a_borrowed_value_twice() {
    each_client(1, async |name, client| {
        let keys = filled(client, |n| format!("key-{n}")).await;
        let counted = count(OPERATIONS / 2, async |n| {
            let value = bytes::Bytes::from_static(&[b'v'; 100]);
            client.set(&keys[n], value, Ttl::NEVER).await.unwrap();
        });
        check(
            &format!("{name}: a set of shared bytes"),
            counted.await,
            2.0,
        );
        let counted = count(OPERATIONS / 2, async |n| {
            client
                .set(&keys[n], &[b'v'; 100], Ttl::NEVER)
                .await
                .unwrap();
        });
        check(
            &format!("{name}: a set of borrowed bytes"),
            counted.await,
            3.0,
        );
        let counted = count(OPERATIONS / 2, async |n| {
            client.delete(&keys[n]).await.unwrap();
        });
        check(&format!("{name}: a delete"), counted.await, 2.0);
    });
}

#[test]
fn a_read_of_many_allocates_its_values_and_a_few_for_each_node() {
    for (nodes, most) in [(1, 1.3), (3, 1.5)] {
        each_client(nodes, async |name, client| {
            let keys = filled(client, |n| format!("key-{n}")).await;
            let counted = count(20, async |_| {
                let values = client.get_many(&keys).await;
                assert_eq!((values.len(), values.errors().count()), (KEYS, 0));
            });
            let each = counted.await / KEYS as f64;
            println!("{name}: {each} for each key of {KEYS}");
            assert!((1.0..=most).contains(&each), "{name}: {each} for each key");
        });
    }
}

/// The loader is not asked, but it might have been.
#[test]
fn a_read_through_that_hits_allocates_no_more_than_five_times() {
    each_client(1, async |name, client| {
        let keys = filled(client, |n| format!("key-{n}")).await;
        let counted = count(OPERATIONS / 2, async |n| {
            let read = client.get_or_load(&keys[n], Ttl::secs(60), load).await;
            black_box(read.unwrap().unwrap());
        });
        let counted = counted.await;
        println!("{name}: {counted} for each hit");
        assert!(
            (1.0..=5.0 + BESIDE).contains(&counted),
            "{name}: {counted} allocations"
        );
    });
}
