//! Throughput against a real memcached (`-t 1`, started here), closed loop, 100-byte values.
//!
//! Allocations on the path of one `get` of a key of up to 37 bytes that hits, client and transport
//! together: two, the request, which all layers share, and the value's own bytes. The key lives in the
//! request, the request is encoded into the connection's buffer, futures are unboxed, and the place for
//! the outcome is reused. A miss costs one. A longer key costs one more. `tests/costs` counts them.
//!
//! - `get`, `set`: so many tasks, each with one operation at a time. `current` runs connections on
//!   the application's own thread, `dedicated` on one of their own. `transport` is the bare
//!   pipelined transport without cluster, node and client.
//! - `get_many`: one task, 100 keys a call; `concurrent_gets` is the same with 100 gets.
//! - `get_values`, `set_values`: 64 tasks, values of 100 B, 4 KiB and 256 KiB.
//!
//! Criterion reports the time of one operation (or call); `thrpt` is operations (keys) a second.

mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futures::future::join_all;
use tower::{Service, ServiceExt as _};
use tower_memcached::{
    Client, Executor, Key, Operation, Pipelined, PipelinedSettings, Request, SystemConnector, Ttl,
};

use support::{KEYS, client, closed_loop, keys, runtime, servers};

async fn fill(client: &Client, keys: &[Key]) {
    for chunk in keys.chunks(500) {
        let sets = chunk
            .iter()
            .map(|key| client.set(key, vec![b'v'; 100], Ttl::NEVER));
        join_all(sets)
            .await
            .into_iter()
            .for_each(|stored| stored.unwrap());
    }
}

const CONCURRENCY: [usize; 4] = [1, 64, 256, 1024];

fn single_operations(criterion: &mut Criterion) {
    let one = servers(1);
    let three = servers(3);
    let keys = keys();
    for name in ["get", "set"] {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(1));
        for tasks in CONCURRENCY {
            for (stack, servers) in [("1-node", &one), ("3-nodes", &three)] {
                for (place, executor) in [
                    ("current", Executor::current()),
                    ("dedicated", Executor::dedicated("bench-io", 1)),
                ] {
                    let runtime = runtime();
                    let client = client(servers, executor);
                    runtime.block_on(fill(&client, &keys));
                    let id = BenchmarkId::new(format!("{stack}/{place}"), tasks);
                    group.bench_function(id, |bencher| {
                        bencher.iter_custom(|iterations| {
                            let (client, keys) = (client.clone(), keys.clone());
                            let set = name == "set";
                            closed_loop(&runtime, tasks, iterations, move |index| {
                                let (client, keys) = (client.clone(), keys.clone());
                                async move {
                                    let key = &keys[index];
                                    if set {
                                        let value: &'static [u8] = &[b'v'; 100];
                                        client.set(key, value, Ttl::NEVER).await.unwrap();
                                    } else {
                                        let value = client.get(key).await.unwrap();
                                        assert_eq!(black_box(value).unwrap().len(), 100);
                                    }
                                }
                            })
                        });
                    });
                }
            }
            if name == "get" {
                let runtime = runtime();
                let transport = Pipelined::new(
                    one[0].address().parse().unwrap(),
                    PipelinedSettings::default().attempt_timeout(Duration::from_secs(5)),
                    Arc::new(SystemConnector::new()),
                    &Executor::current(),
                )
                .unwrap();
                group.bench_function(BenchmarkId::new("transport/current", tasks), |bencher| {
                    bencher.iter_custom(|iterations| {
                        let (transport, keys) = (transport.clone(), keys.clone());
                        closed_loop(&runtime, tasks, iterations, move |index| {
                            let mut transport = transport.clone();
                            let key = keys[index].clone();
                            async move {
                                let operation = Operation::Get {
                                    key,
                                    with_cas: false,
                                };
                                let service = transport.ready().await.unwrap();
                                black_box(service.call(Request::new(operation)).await.unwrap());
                            }
                        })
                    });
                });
            }
        }
        group.finish();
    }
}

fn many_keys(criterion: &mut Criterion) {
    const BATCH: usize = 100;
    let keys = keys();
    let mut group = criterion.benchmark_group("get_many");
    group.throughput(Throughput::Elements(BATCH as u64));
    for (stack, servers) in [("1-node", servers(1)), ("3-nodes", servers(3))] {
        for (place, executor) in [
            ("current", Executor::current()),
            ("dedicated", Executor::dedicated("bench-io", 1)),
        ] {
            let runtime = runtime();
            let client = client(&servers, executor);
            runtime.block_on(fill(&client, &keys));
            let start = std::cell::Cell::new(0);
            let next = || {
                start.set((start.get() + BATCH) % KEYS);
                &keys[start.get()..start.get() + BATCH]
            };
            group.bench_function(BenchmarkId::new(stack, place), |bencher| {
                bencher.iter(|| {
                    let values = runtime.block_on(client.get_many(next()));
                    assert_eq!(values.errors().count(), 0);
                    black_box(values)
                });
            });
            group.bench_function(
                BenchmarkId::new(format!("{stack}/concurrent_gets"), place),
                |bencher| {
                    bencher.iter(|| {
                        let gets = next().iter().map(|key| client.get(key));
                        black_box(runtime.block_on(join_all(gets)))
                    });
                },
            );
        }
    }
    group.finish();
}

fn values(criterion: &mut Criterion) {
    const TASKS: usize = 64;
    let servers = servers(1);
    let keys = keys();
    for name in ["get_values", "set_values"] {
        let mut group = criterion.benchmark_group(name);
        for (size, label) in [(100, "100_B"), (4 * 1024, "4_KiB"), (256 * 1024, "256_KiB")] {
            group.throughput(Throughput::Bytes(size as u64));
            let runtime = runtime();
            let client = client(&servers, Executor::current());
            let value = Bytes::from(vec![b'v'; size]);
            runtime.block_on(async {
                for key in &keys[..TASKS] {
                    client.set(key, value.clone(), Ttl::NEVER).await.unwrap();
                }
            });
            group.bench_function(label, |bencher| {
                bencher.iter_custom(|iterations| {
                    let (client, keys, value) = (client.clone(), keys.clone(), value.clone());
                    let set = name == "set_values";
                    closed_loop(&runtime, TASKS, iterations, move |index| {
                        let (client, keys, value) = (client.clone(), keys.clone(), value.clone());
                        async move {
                            let key = &keys[index % TASKS];
                            if set {
                                client.set(key, value, Ttl::NEVER).await.unwrap();
                            } else {
                                let found = client.get(key).await.unwrap();
                                assert_eq!(black_box(found).unwrap().len(), size);
                            }
                        }
                    })
                });
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = support::settings(Duration::from_secs(2));
    targets = single_operations, many_keys, values
}
criterion_main!(benches);
