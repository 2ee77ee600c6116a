//! What clients leave behind when they are gone: no threads, no file descriptors, no tasks and no memory,
//! however often they come and go, wherever they run, and whatever they are in the middle of.
//!
//! All of that is counted for the whole process, so there is one test only, which does one thing after
//! the other.
#![cfg(all(feature = "testing", target_os = "linux"))]

use std::alloc::System;
use std::fmt;
use std::fs::read_dir;
use std::time::Duration;

use cap::Cap;
use futures::future::join_all;
use tokio::runtime::{Builder, Handle};
use tokio::time::{Instant, sleep};
use tower::BoxError;
use tower_memcached::testing::{Memcached, Server};
use tower_memcached::{
    BlockingLoader, Client, ClientBuilder, Discovery, ErrorKind, Executor, GroupLayer, Key, Loader,
    NodeSpec, Payload, ReadThroughLayer, Ttl,
};

/// Counts the bytes that are allocated.
#[global_allocator]
static ALLOCATED: Cap<System> = Cap::new(System, usize::MAX);

const PATIENCE: Duration = Duration::from_secs(20);
const TTL: Ttl = Ttl::secs(60);

/// What the process has.
#[derive(Clone, Copy)]
struct Held {
    threads: usize,
    descriptors: usize,
    tasks: usize,
    bytes: usize,
}

impl Held {
    fn now() -> Self {
        let count = |of| read_dir(of).unwrap().count();
        Self {
            threads: count("/proc/self/task"),
            descriptors: count("/proc/self/fd"),
            tasks: Handle::current().metrics().num_alive_tasks(),
            bytes: ALLOCATED.allocated(),
        }
    }

    /// What is allocated once for all grows a little, as queues and tables do. It is less than what a
    /// client, or one of its connections, takes up, for each time that there was one.
    fn is_no_more_than(&self, before: &Self) -> bool {
        const GROWTH: usize = 32 * 1024;
        self.threads <= before.threads
            && self.descriptors <= before.descriptors
            && self.tasks <= before.tasks
            && self.bytes <= before.bytes + GROWTH
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            threads,
            descriptors,
            tasks,
            bytes,
        } = self;
        write!(
            f,
            "{threads} threads, {descriptors} descriptors, {tasks} tasks, {bytes} bytes"
        )
    }
}

/// Waits until the process has no more than before.
async fn all_is_given_back(what: &str, before: &Held) -> Held {
    let begun = Instant::now();
    loop {
        let now = Held::now();
        if now.is_no_more_than(before) {
            return now;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "{what}: {now} instead of {before}"
        );
        sleep(Duration::from_millis(5)).await;
    }
}

/// Does something again and again, some of it at once. What is left after the first of it is the baseline.
async fn again_and_again(what: &str, times: usize, cycle: impl AsyncFn(usize)) {
    const AT_ONCE: usize = 5;
    let some = async |times: usize| {
        for batch in 0..times / AT_ONCE {
            let one = |number| cycle(batch * AT_ONCE + number);
            join_all((0..AT_ONCE).map(one)).await;
        }
    };
    let begun = Instant::now();
    some((times / 10).max(AT_ONCE)).await;
    let before = settled().await;
    some(times).await;
    let after = all_is_given_back(what, &before).await;
    println!(
        "{what}, {times} times in {:?}: {before}; then {after}",
        begun.elapsed()
    );
}

/// What is held when nothing comes to an end any more.
async fn settled() -> Held {
    let begun = Instant::now();
    let mut least = Held::now();
    let mut since = begun;
    while since.elapsed() < Duration::from_millis(100) {
        assert!(begun.elapsed() < PATIENCE, "it never settles: {least}");
        sleep(Duration::from_millis(5)).await;
        let now = Held::now();
        let fewer = now.threads < least.threads
            || now.descriptors < least.descriptors
            || now.tasks < least.tasks
            || now.bytes < least.bytes;
        if fewer {
            least = Held {
                threads: now.threads.min(least.threads),
                descriptors: now.descriptors.min(least.descriptors),
                tasks: now.tasks.min(least.tasks),
                bytes: now.bytes.min(least.bytes),
            };
            since = Instant::now();
        }
    }
    least
}

/// A real memcached, and one in this process.
struct Nodes {
    memcached: Memcached,
    server: Server,
}

impl Nodes {
    fn addresses(&self) -> [String; 2] {
        let server = self.server.address().unwrap().to_string();
        [self.memcached.address(), server]
    }

    fn builder(&self, executor: &Executor) -> ClientBuilder {
        self.outside(executor).nodes([&self.addresses()[1]])
    }

    /// Without the one in this process, whose memory is that of this process, too.
    fn outside(&self, executor: &Executor) -> ClientBuilder {
        Client::builder()
            .nodes([self.memcached.address()])
            .executor(executor.clone())
            .timeout(Duration::from_secs(5))
            .attempt_timeout(Duration::from_secs(2))
    }
}

type MakeExecutor = fn() -> Executor;

/// Each with threads of its own, if with any.
fn executors() -> [(&'static str, MakeExecutor); 4] {
    [
        ("default", Executor::default),
        ("two-threads", || Executor::dedicated("two", 2)),
        ("current", Executor::current),
        ("handle", || Executor::handle(Handle::current())),
    ]
}

async fn use_it(client: &Client) {
    for n in 0..4 {
        client.set(format!("k{n}"), "v", TTL).await.unwrap();
    }
    let values = client.get_many((0..4).map(|n| format!("k{n}"))).await;
    assert_eq!(values.errors().count(), 0);
    // Where nodes change it may be a miss: written beside a home that is still being cleaned.
    let value = client.get("k0").await.unwrap();
    assert!(value.is_none_or(|value| value == "v"));
}

async fn load() -> Result<Option<&'static str>, BoxError> {
    Ok(Some("loaded"))
}

#[derive(Clone)]
struct Database;

impl Loader for Database {
    async fn load(&self, _: &Key) -> Result<Option<Payload>, BoxError> {
        tokio::task::yield_now().await;
        Ok(Some("loaded".into()))
    }
}

#[test]
fn clients_that_come_and_go_leave_nothing_behind() {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let nodes = Nodes {
            memcached: Memcached::spawn(&[]).unwrap(),
            server: Server::new(),
        };
        nodes.server.listen().await.unwrap();
        they_are_used_and_dropped(&nodes).await;
        they_are_shut_down(&nodes).await;
        they_are_dropped_in_use(&nodes).await;
        they_have_groups_and_load(&nodes).await;
        they_have_shared_loaders(&nodes).await;
        their_nodes_change(&nodes).await;
        their_nodes_are_found(&nodes).await;
        their_node_is_stalled(&nodes).await;
        their_node_is_not_there(&nodes).await;
    });
}

/// What a client follows ends with it, whether it waits, is being asked or has found something.
async fn their_nodes_are_found(nodes: &Nodes) {
    for (name, executor) in executors() {
        again_and_again(&format!("{name}, nodes are found"), 100, async |number| {
            let address = nodes.memcached.address();
            let discovery = Discovery::polled(move || {
                let found = NodeSpec::new(&address).map(|spec| vec![spec]);
                async move {
                    match number % 3 {
                        0 => std::future::pending().await,
                        _ => found,
                    }
                }
            });
            let client = Client::builder()
                .discover(discovery)
                .executor(executor())
                .timeout(Duration::from_secs(5))
                .attempt_timeout(Duration::from_secs(2))
                .build()
                .unwrap();
            let found = async || client.get("k").await.is_ok();
            let until = Instant::now() + PATIENCE;
            while number % 3 == 1 && !found().await {
                assert!(Instant::now() < until, "no node is found");
                sleep(Duration::from_millis(1)).await;
            }
            if number % 2 == 0 {
                let address = nodes.memcached.address();
                let spec = NodeSpec::new(&address).unwrap();
                client.follow(Discovery::fixed(vec![spec])).unwrap();
            }
        })
        .await;
    }
}

async fn they_are_used_and_dropped(nodes: &Nodes) {
    for (name, executor) in executors() {
        let times = if name == "default" { 1_000 } else { 300 };
        again_and_again(&format!("{name}, used and dropped"), times, async |_| {
            let client = nodes.builder(&executor()).build().unwrap();
            use_it(&client).await;
        })
        .await;
    }
    again_and_again("never used", 300, async |_| {
        drop(nodes.builder(&Executor::default()).build().unwrap());
    })
    .await;
}

async fn they_are_shut_down(nodes: &Nodes) {
    for (name, executor) in executors() {
        again_and_again(&format!("{name}, shut down"), 100, async |_| {
            let client = nodes.builder(&executor()).build().unwrap();
            use_it(&client).await;
            client.shutdown(Duration::from_secs(1)).await;
            let error = client.get("k0").await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Shutdown);
        })
        .await;
    }
}

/// Requests on their way, and their callers, go with the client or before it.
async fn they_are_dropped_in_use(nodes: &Nodes) {
    for (name, executor) in executors() {
        again_and_again(&format!("{name}, dropped in use"), 200, async |number| {
            let client = nodes.builder(&executor()).connections(2).build().unwrap();
            if number % 2 == 0 {
                client.version().await.unwrap();
            }
            let mut calls: Vec<_> = (0..20)
                .map(|n| {
                    let client = client.clone();
                    Box::pin(async move { client.set(format!("k{n}"), "v", TTL).await })
                })
                .collect();
            drop(client);
            for call in &mut calls {
                let _either = futures::poll!(call);
            }
        })
        .await;
    }
}

async fn they_have_groups_and_load(nodes: &Nodes) {
    for (name, executor) in executors() {
        again_and_again(&format!("{name}, groups that load"), 100, async |number| {
            let builder = nodes.outside(&executor());
            let builder = match number % 2 {
                0 => builder.load_executor(Executor::dedicated("behind", 1)),
                _ => builder,
            };
            let client = builder.build().unwrap();
            let group = client.layer(GroupLayer::new("group").prefix("group:"));
            for n in 0..4 {
                let key = format!("{name}:{number}:{n}");
                let loaded = group.get_or_load(&key, TTL, load).await.unwrap();
                assert_eq!(loaded.unwrap(), "loaded");
            }
            let many = group.get_many_or_load(["a", "b"], TTL, async |keys: Vec<Key>| {
                Ok::<_, BoxError>(keys.into_iter().map(|key| (key, "loaded")))
            });
            assert_eq!(many.await.errors().count(), 0);
            // What was loaded is still being put back.
        })
        .await;
    }
}

async fn they_have_shared_loaders(nodes: &Nodes) {
    again_and_again("a shared loader", 200, async |number| {
        let io = Executor::default();
        let layer = ReadThroughLayer::new(Database, TTL);
        let layer = match number % 3 {
            0 => layer,
            1 => layer.executor(&Executor::dedicated("loads", 2)).unwrap(),
            _ => layer.executor(&io).unwrap(),
        };
        let client = nodes.outside(&io).layer(layer).build().unwrap();
        let read = client.get(format!("shared:{number}")).await.unwrap();
        assert_eq!(read.unwrap(), "loaded");
    })
    .await;
    again_and_again("a blocking loader", 200, async |number| {
        let load = |_: &Key| Ok::<_, BoxError>(Some("loaded"));
        let layer = ReadThroughLayer::new(BlockingLoader::new("blocks", 2, load).unwrap(), TTL);
        let client = nodes.outside(&Executor::default()).layer(layer).build();
        let client = client.unwrap();
        let read = client.get(format!("blocking:{number}")).await.unwrap();
        assert_eq!(read.unwrap(), "loaded");
        // Its caller leaves while it loads.
        let mut call = Box::pin(client.get(format!("left:{number}")));
        let _either = futures::poll!(&mut call);
    })
    .await;
}

/// Nodes come and go under a client that stays.
async fn their_nodes_change(nodes: &Nodes) {
    for (name, executor) in executors() {
        let [first, second] = nodes.addresses();
        let client = nodes.builder(&executor()).build().unwrap();
        // Not at once: they would change the nodes under each other.
        let turn = tokio::sync::Mutex::new(());
        again_and_again(&format!("{name}, nodes that change"), 100, async |_| {
            let _turn = turn.lock().await;
            client.set_nodes([&first]).unwrap();
            use_it(&client).await;
            client.set_nodes([&first, &second]).unwrap();
            use_it(&client).await;
        })
        .await;
    }
}

/// Connections are given up, made anew, watched until the server has closed them, and probed.
async fn their_node_is_stalled(nodes: &Nodes) {
    for (name, executor) in executors() {
        again_and_again(&format!("{name}, a stalled node"), 50, async |number| {
            let server = Server::new();
            server.listen().await.unwrap();
            let address = server.address().unwrap().to_string();
            let builder = Client::builder().nodes([address, nodes.memcached.address()]);
            let builder = builder.timeout(Duration::from_millis(60));
            let builder = builder.attempt_timeout(Duration::from_millis(5));
            let client = builder.executor(executor()).build().unwrap();
            let sets = || {
                let set = |n| client.set(format!("k{n}"), "v", TTL);
                join_all((0..20).map(set))
            };
            sets().await;
            server.stall();
            sets().await;
            // Some of them leave while the breaker opens, others while the node is probed.
            sleep(Duration::from_millis(40 * (number as u64 % 5))).await;
            let _each_ends = sets().await;
            drop(client);
            server.shutdown();
        })
        .await;
    }
}

async fn their_node_is_not_there(nodes: &Nodes) {
    for (name, executor) in executors() {
        again_and_again(
            &format!("{name}, a node that is not there"),
            50,
            async |_| {
                let builder = nodes.outside(&executor()).nodes(["127.0.0.1:1"]);
                let client = builder.build().unwrap();
                let sets = (0..20).map(|n| client.set(format!("k{n}"), "v", TTL));
                for set in join_all(sets).await {
                    set.unwrap();
                }
                let loads = (0..20).map(|n| client.get_or_load(format!("l{n}"), TTL, load));
                for loaded in join_all(loads).await {
                    assert_eq!(loaded.unwrap().unwrap(), "loaded");
                }
            },
        )
        .await;
    }
}
