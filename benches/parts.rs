//! What the parts of a client cost, each for itself, for one operation. Only the single flight asks a
//! memcached, which is started here. `scripts/instructions` counts the instructions of most of these.
//!
//! - `codec`: a request to bytes, and bytes to replies. On some AMD processors `hit_4_KiB` takes six times as
//!   long where the value's copy is unluckily aligned: glibc copies what is over 2 KiB by `rep movsb`, unless
//!   `GLIBC_TUNABLES=glibc.cpu.x86_rep_movsb_threshold=1000000` is set.
//! - `ring`: the node of a key, among 3, 100 and 1,000.
//! - `breaker`: a request through a node whose service answers at once, with what is learnt from the
//!   answer; and the refusal by a node that is out. `alone` is the service without a node.
//! - `bulkhead`: the same service behind a bulkhead with places free, and one that yields behind a
//!   bulkhead of 8 places for 64 tasks, most of whom wait.
//! - `single_flight`: one call of `get_or_load` by 64 tasks: `hit`, and `one_load_for_all`, where all ask
//!   for the same key, which is loaded once.

mod support;

use std::convert::Infallible;
use std::fmt::Debug;
use std::hint::black_box;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futures::future::{FutureExt as _, join_all};
use tokio::task::yield_now;
use tower::{Layer as _, Service, ServiceExt as _, service_fn};
use tower_memcached::internals::{Placed, Replies, encode_request};
use tower_memcached::{
    BulkheadLayer, ErrorKind, Executor, Key, Node, NodeSettings, NodeSpec, Operation, Pipelined,
    PipelinedSettings, Request, Response, Ring, StoreMode, SystemConnector, Ttl,
};

use support::{client, closed_loop, keys, runtime, servers};

const MEBIBYTE: usize = 1024 * 1024;

fn get(key: &Key) -> Request {
    Request::new(Operation::Get {
        key: key.clone(),
        with_cas: false,
    })
}

fn hit(length: usize) -> Vec<u8> {
    let value = "v".repeat(length);
    format!("VA {length} f0 O4711\r\n{value}\r\n").into_bytes()
}

fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    let key = &keys()[0];
    let set = Operation::Store {
        mode: StoreMode::Set,
        key: key.clone(),
        payload: vec![b'v'; 100].into(),
        ttl: Ttl::secs(60),
    };
    for (name, operation) in [("get", get(key).operation()), ("set_100_B", &set)] {
        let mut out = BytesMut::with_capacity(64 * 1024);
        group.bench_function(BenchmarkId::new("encode", name), |bencher| {
            bencher.iter(|| {
                if out.len() > 32 * 1024 {
                    out.clear();
                }
                encode_request(black_box(operation), 4711, &mut out);
            });
        });
    }
    for (name, bytes, replies) in [
        ("miss", b"EN\r\n".to_vec(), 1),
        ("hit_100_B", hit(100), 1),
        ("hit_4_KiB", hit(4 * 1024), 1),
        ("hit_256_KiB", hit(256 * 1024), 1),
        ("64_hits", hit(100).repeat(64), 64),
    ] {
        let mut parser = Replies::new(MEBIBYTE);
        group.throughput(Throughput::Elements(replies as u64));
        group.bench_function(BenchmarkId::new("parse", name), |bencher| {
            bencher.iter(|| assert_eq!(parser.receive(black_box(&bytes)), replies));
        });
    }
}

fn ring(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring");
    let keys = keys();
    for count in [3, 100, 1_000] {
        let node = |n| NodeSpec::new(&format!("10.0.{}.{}:11211", n / 250, n % 250)).unwrap();
        let nodes: Vec<_> = (0..count).map(node).collect();
        let placed = Placed::new(&Ring::default(), &nodes);
        // Every key, so that the ring does not fit the smallest caches because one part is asked for.
        let mut keys = keys.iter().cycle();
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| keys.next().map(|key| placed.primary(black_box(key))));
        });
    }
}

/// One request at a time, for which nobody has to wait.
fn requests<S>(criterion: &mut Criterion, group: &str, name: &str, service: impl FnOnce() -> S)
where
    S: Service<Request, Response = Response, Error: Debug>,
{
    let runtime = runtime();
    // Entered once, for to enter it takes as long as what is measured.
    let _entered = runtime.enter();
    let key = &keys()[0];
    let mut service = service();
    criterion
        .benchmark_group(group)
        .bench_function(name, |bencher| {
            bencher.iter(|| {
                let answer = async {
                    let service = service.ready().await.unwrap();
                    service.call(black_box(get(key))).await.unwrap()
                };
                answer.now_or_never().unwrap()
            });
        });
}

async fn instantly(request: Request) -> Result<Response, Infallible> {
    black_box(request);
    Ok(Response::Value(None))
}

fn breaker(criterion: &mut Criterion) {
    requests(criterion, "breaker", "alone", || service_fn(instantly));
    requests(criterion, "breaker", "closed", || {
        let (settings, executor) = (NodeSettings::default(), Executor::current());
        Node::new("node", service_fn(instantly), settings, &executor).unwrap()
    });

    let runtime = runtime();
    let key = &keys()[0];
    // Nobody listens there any more.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let mut node = runtime.block_on(async {
        let transport = Pipelined::new(
            address.parse().unwrap(),
            PipelinedSettings::default(),
            Arc::new(SystemConnector::new()),
            &Executor::current(),
        );
        let (settings, executor) = (NodeSettings::default(), Executor::current());
        let mut node = Node::new("node", transport.unwrap(), settings, &executor).unwrap();
        node.call(get(key)).await.unwrap_err();
        assert!(node.is_open(), "a refused connect has not opened it");
        node
    });
    criterion
        .benchmark_group("breaker")
        .bench_function("open", |bencher| {
            bencher.iter(|| {
                let refused = runtime
                    .block_on(node.call(black_box(get(key))))
                    .unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::NodeUnavailable);
            });
        });
}

fn bulkhead(criterion: &mut Criterion) {
    requests(criterion, "bulkhead", "free", || {
        BulkheadLayer::new(64).layer(service_fn(instantly))
    });
    let queued = BulkheadLayer::new(8)
        .max_queue(64)
        .max_wait(Duration::from_secs(10))
        .layer(service_fn(async |number: usize| {
            yield_now().await;
            Ok::<_, Infallible>(number)
        }));
    let runtime = runtime();
    criterion
        .benchmark_group("bulkhead")
        .bench_function("64_for_8_places", |bencher| {
            bencher.iter_custom(|iterations| {
                let queued = queued.clone();
                closed_loop(&runtime, 64, iterations, move |number| {
                    let queued = queued.clone();
                    async move {
                        black_box(queued.oneshot(number).await.unwrap());
                    }
                })
            });
        });
}

fn single_flight(criterion: &mut Criterion) {
    const TASKS: usize = 64;
    let servers = servers(1);
    let runtime = runtime();
    let client = client(&servers, Executor::current());
    let keys = keys();
    let mut group = criterion.benchmark_group("single_flight");

    let stored = client.set(&keys[0], vec![b'v'; 100], Ttl::NEVER);
    runtime.block_on(stored).unwrap();
    group.bench_function("hit", |bencher| {
        bencher.iter_custom(|iterations| {
            let (client, keys) = (client.clone(), keys.clone());
            closed_loop(&runtime, TASKS, iterations, move |_| {
                let (client, keys) = (client.clone(), keys.clone());
                async move {
                    let load = || async { Err::<Option<&str>, _>(io::Error::other("no hit")) };
                    let value = client.get_or_load(&keys[0], Ttl::NEVER, load).await;
                    assert_eq!(black_box(value).unwrap().unwrap().len(), 100);
                }
            })
        });
    });

    let (mut asked, loaded) = (0, Arc::new(AtomicUsize::new(0)));
    group.throughput(Throughput::Elements(TASKS as u64));
    group.bench_function("one_load_for_all", |bencher| {
        bencher.iter(|| {
            let key = Key::new(format!("flight:{asked}")).unwrap();
            asked += 1;
            let calls = (0..TASKS).map(|_| {
                let (client, key, loaded) = (client.clone(), key.clone(), loaded.clone());
                async move {
                    let load = || async {
                        loaded.fetch_add(1, Ordering::Relaxed);
                        yield_now().await;
                        Ok::<_, io::Error>(Some(vec![b'v'; 100]))
                    };
                    let value = client.get_or_load(key, Ttl::secs(60), load).await;
                    assert_eq!(value.unwrap().unwrap().len(), 100);
                }
            });
            runtime.block_on(async {
                for call in join_all(calls.map(tokio::spawn)).await {
                    call.unwrap();
                }
            });
        });
    });
    assert_eq!(loaded.load(Ordering::Relaxed), asked);
}

criterion_group! {
    name = benches;
    config = support::settings(Duration::from_secs(1));
    targets = codec, ring, breaker, bulkhead, single_flight
}
criterion_main!(benches);
