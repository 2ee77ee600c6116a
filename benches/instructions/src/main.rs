//! How many instructions things take: `scripts/instructions` counts them, with callgrind.
//!
//! Without a name it lists what there is, with how often each is done. With one it does that, in a
//! process of its own. Callgrind counts from `count_begins` to `count_ends`, but not inside of
//! `uncounted_` functions: the server's part, which is in this process and costs the client nothing.
//!
//! Everything is the same each time: time stands still, random numbers are seeded, there is one
//! thread, and there are no sockets. So no timer fires, and nothing that is done once a second is
//! counted. What is made at the first use has been made before.

#[path = "../../support/canned.rs"]
mod canned;
mod recorder;

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;
use tower::{Layer as _, Service, ServiceExt as _};
use tower_memcached::internals::{Placed, Replies, encode_request};
use tower_memcached::{
    Address, BulkheadLayer, Client, Executor, Key, Node, NodeSettings, NodeSpec, Operation,
    Pipelined, PipelinedSettings, Request, Response, Ring, Ttl,
};

use canned::Canned;

/// A name, how many operations are counted, and what does them.
type Scenario = (&'static str, usize, fn(usize));

const SCENARIOS: &[Scenario] = &[
    ("codec/encode_get", 10_000, encode_get),
    ("codec/encode_set", 10_000, encode_set),
    ("codec/parse_hit", 10_000, |count| parse(HIT, 1, count)),
    ("codec/parse_miss", 10_000, |count| {
        parse(b"EN\r\n", 1, count);
    }),
    ("codec/parse_64_hits", 500, |count| {
        parse(&HIT.repeat(64), 64, count);
    }),
    ("ring/3_nodes", 10_000, |count| ring(3, count)),
    ("ring/1000_nodes", 10_000, |count| ring(1_000, count)),
    ("service/alone", 10_000, service_alone),
    ("service/in_bulkhead", 10_000, service_in_bulkhead),
    ("service/in_node", 10_000, service_in_node),
    ("get/transport/1_task", 2_000, |count| transport(1, count)),
    ("get/transport/64_tasks", 6_400, |count| {
        transport(64, count)
    }),
    ("get/client/1_task", 2_000, |count| client_gets(1, 1, count)),
    ("get/client/64_tasks", 6_400, |count| {
        client_gets(1, 64, count)
    }),
    ("get/client/1_task/metrics", 2_000, |count| {
        recorder::install();
        client_gets(1, 1, count);
    }),
    ("get/client/64_tasks/metrics", 6_400, |count| {
        recorder::install();
        client_gets(1, 64, count);
    }),
    ("get/client/64_tasks/3_nodes", 6_400, |count| {
        client_gets(3, 64, count);
    }),
    ("set/client/64_tasks", 6_400, client_sets),
    ("get_many/client/100_keys", 100, get_many),
    ("get_or_load/client/hit", 2_000, get_or_load),
];

const HIT: &[u8] = b"VA 100 f0 O4711\r\n\
    vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv\
    vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv\r\n";

fn main() {
    fastrand::seed(4711);
    match std::env::args().nth(1) {
        None => {
            for (name, count, _) in SCENARIOS {
                println!("{name}\t{count}");
            }
        }
        Some(wanted) => {
            let found = SCENARIOS.iter().find(|(name, ..)| *name == wanted);
            let (_, count, run) = found.expect("the name of a scenario");
            run(*count);
        }
    }
}

/// Does it twice, and only the second time counts.
fn measure(count: usize, mut work: impl FnMut(usize)) {
    work(count);
    count_begins();
    work(count);
    count_ends();
}

/// Not the same code as below, or the two would become one.
#[inline(never)]
fn count_begins() {
    black_box("begins");
}

#[inline(never)]
fn count_ends() {
    black_box("ends");
}

/// Its time stands still early in a second, so that no time-out ends in the next one: to add times with a
/// carry is not the same number of instructions.
#[expect(
    clippy::disallowed_methods,
    reason = "there is no runtime yet that could be blocked"
)]
fn runtime() -> Runtime {
    let now = within_second();
    if now > Duration::from_millis(400) {
        std::thread::sleep(Duration::from_secs(1) - now);
    }
    let mut builder = Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().unwrap()
}

/// How far the clock is, as far as it can be seen.
fn within_second() -> Duration {
    let now = format!("{:?}", Instant::now());
    let (_, nanoseconds) = now.split_once("tv_nsec: ").expect("nanoseconds");
    let digits = nanoseconds.trim_end_matches(|other: char| !other.is_ascii_digit());
    Duration::from_nanos(digits.parse().expect("a number"))
}

/// For as long as the process is there, so that nothing has to be cloned while it counts.
fn keys() -> &'static [Key] {
    let name = |n| Key::new(format!("benchmark:{n:08}")).unwrap();
    Vec::leak((0..1_000).map(name).collect())
}

fn get(key: &Key) -> Request {
    Request::new(Operation::Get {
        key: key.clone(),
        with_cas: false,
    })
}

fn encode(operation: &Operation, count: usize) {
    let mut out = BytesMut::with_capacity(64 * 1024);
    measure(count, |count| {
        for opaque in 0..count {
            if out.len() > 32 * 1024 {
                out.clear();
            }
            encode_request(black_box(operation), opaque as u32, &mut out);
        }
    });
}

fn encode_get(count: usize) {
    encode(get(&keys()[0]).operation(), count);
}

fn encode_set(count: usize) {
    let set = Operation::Store {
        mode: tower_memcached::StoreMode::Set,
        key: keys()[0].clone(),
        payload: vec![b'v'; 100].into(),
        ttl: Ttl::secs(60),
    };
    encode(&set, count);
}

fn parse(bytes: &[u8], replies: usize, count: usize) {
    let mut parser = Replies::new(1024 * 1024);
    measure(count, |count| {
        for _ in 0..count {
            assert_eq!(parser.receive(black_box(bytes)), replies);
        }
    });
}

fn ring(nodes: usize, count: usize) {
    let node = |n| NodeSpec::new(&format!("10.0.{}.{}:11211", n / 250, n % 250)).unwrap();
    let nodes: Vec<_> = (0..nodes).map(node).collect();
    let (ring, keys) = (Placed::new(&Ring::default(), &nodes), keys());
    measure(count, |count| {
        for n in 0..count {
            black_box(ring.primary(black_box(&keys[n % keys.len()])));
        }
    });
}

/// Answers at once.
#[derive(Clone)]
struct Instantly;

impl Service<Request> for Instantly {
    type Response = Response;
    type Error = Infallible;
    type Future = Ready<Result<Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    #[inline(never)]
    fn call(&mut self, request: Request) -> Self::Future {
        black_box(&request);
        ready(Ok(Response::Value(None)))
    }
}

fn service<S>(service: impl FnOnce() -> S, count: usize)
where
    S: Service<Request, Response = Response, Error: std::fmt::Debug>,
{
    let runtime = runtime();
    let keys = keys();
    let mut service = runtime.block_on(async { service() });
    measure(count, |count| {
        runtime.block_on(async {
            for n in 0..count {
                let service = service.ready().await.unwrap();
                let answer = service.call(get(&keys[n % keys.len()])).await;
                black_box(answer.unwrap());
            }
        });
    });
}

fn service_alone(count: usize) {
    service(|| Instantly, count);
}

fn service_in_bulkhead(count: usize) {
    service(|| BulkheadLayer::new(64).layer(Instantly), count);
}

fn service_in_node(count: usize) {
    let node = || {
        let settings = NodeSettings::default();
        Node::new("node", Instantly, settings, &Executor::current()).unwrap()
    };
    service(node, count);
}

/// So many tasks, each with one operation at a time.
fn closed_loop<F, Fut>(tasks: usize, count: usize, operation: F)
where
    F: Fn(usize) -> Fut + Clone + 'static,
    Fut: Future<Output = ()> + 'static,
{
    let runtime = runtime();
    let local = tokio::task::LocalSet::new();
    measure(count, |count| {
        let spawn = |task| {
            let operation = operation.clone();
            local.spawn_local(async move {
                for round in 0..count / tasks {
                    operation(task * 31 + round).await;
                }
            })
        };
        let all: Vec<_> = (0..tasks).map(spawn).collect();
        local.block_on(&runtime, async {
            for task in all {
                task.await.unwrap();
            }
        });
    });
}

fn transport(tasks: usize, count: usize) {
    let connector = Arc::new(Canned);
    let (settings, address) = (PipelinedSettings::default(), "node-0".parse::<Address>());
    let transport =
        Pipelined::new(address.unwrap(), settings, connector, &Executor::current()).unwrap();
    let keys = keys();
    closed_loop(tasks, count, move |n| {
        let (mut transport, request) = (transport.clone(), get(&keys[n % keys.len()]));
        async move {
            let answer = transport.ready().await.unwrap().call(request).await;
            let Ok(Response::Value(Some(value))) = answer else {
                panic!("{answer:?}");
            };
            assert_eq!(value.len(), 100);
        }
    });
}

/// The same.
fn client(nodes: usize) -> &'static Client {
    let client = Client::builder()
        .nodes((0..nodes).map(|n| format!("node-{n}")))
        .connector(Canned)
        .executor(Executor::current())
        .build();
    Box::leak(Box::new(client.unwrap()))
}

fn client_gets(nodes: usize, tasks: usize, count: usize) {
    let (client, keys) = (client(nodes), keys());
    closed_loop(tasks, count, move |n| async move {
        let value = client.get(&keys[n % keys.len()]).await.unwrap();
        assert_eq!(value.unwrap().len(), 100);
    });
}

fn client_sets(count: usize) {
    let (client, keys) = (client(1), keys());
    closed_loop(64, count, move |n| async move {
        let value: &'static [u8] = &[b'v'; 100];
        let key = &keys[n % keys.len()];
        client.set(key, value, Ttl::secs(60)).await.unwrap();
    });
}

fn get_many(count: usize) {
    let (client, keys) = (client(1), keys());
    closed_loop(1, count, move |n| async move {
        let from = n * 7 % (keys.len() - 100);
        let values = client.get_many(&keys[from..from + 100]).await;
        let hits = values.iter().filter(|(_, found)| found.value().is_some());
        assert_eq!(hits.count(), 100);
    });
}

fn get_or_load(count: usize) {
    let (client, keys) = (client(1), keys());
    closed_loop(1, count, move |n| async move {
        let load = || async { Err::<Option<Vec<u8>>, _>(io::Error::other("no hit")) };
        let key = &keys[n % keys.len()];
        let value = client.get_or_load(key, Ttl::secs(60), load).await.unwrap();
        assert_eq!(value.unwrap().len(), 100);
    });
}
