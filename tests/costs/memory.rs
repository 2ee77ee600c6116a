//! What those who wait hold.

use tokio::task::JoinHandle;
use tower_memcached::testing::Memcached;
use tower_memcached::{Client, Executor, GroupSettings, Key, ProbeSettings, Result, Ttl, Value};

use super::support::{Count, PATIENCE, eventually, executors, memcached, patient, runtime, turn};

const WAITING: usize = 100_000;

/// Bytes for each.
const MOST: isize = 1_024;

/// Lets so many wait at one node, which is stopped meanwhile: no probe is to find that out.
fn roomy(servers: &[Memcached], executor: &Executor) -> Client {
    let never = PATIENCE * 100;
    let builder = patient(servers, executor)
        .max_in_flight(2 * WAITING)
        .timeout(PATIENCE * 4)
        .attempt_timeout(PATIENCE * 2);
    let probes = ProbeSettings::default().initial_delay(never).period(never);
    builder.probe(probes).build().unwrap()
}

/// Asks for so many keys at once, each in a task of its own, whose body is the get and nothing else.
fn ask(client: &Client, tasks: &mut Vec<JoinHandle<Result<Option<Value>>>>) {
    for n in 0..WAITING {
        let (client, key) = (client.clone(), Key::new(format!("key-{n}")).unwrap());
        tasks.push(tokio::spawn(async move { client.get(key).await }));
    }
}

/// What is counted is all that this process allocates for it: the task with its header, the key and a handle of the
/// client in it, the get's own future, its place among the requests, and its bytes that are not yet sent.
#[test]
fn a_get_that_waits_holds_little_and_gives_it_back() {
    let _turn = turn();
    for (name, executor) in executors() {
        let servers = memcached(1);
        runtime().block_on(async {
            let client = roomy(&servers, &executor);
            client.get("first").await.unwrap();
            let mut tasks = Vec::with_capacity(WAITING);
            servers[0].stop().unwrap();
            let count = Count::begin();
            ask(&client, &mut tasks);
            eventually("all wait", || client.nodes()[0].in_flight == WAITING).await;
            let each = count.bytes() / WAITING as isize;
            servers[0].cont().unwrap();
            for task in tasks.drain(..) {
                assert_eq!(task.await.unwrap().unwrap(), None);
            }
            let kept = count.bytes() / WAITING as isize;
            println!("{name}: {each} bytes for each that waits; {kept} kept");
            assert!(each <= MOST, "{name}: {each} bytes for each get that waits");
            assert!(kept <= MOST / 50, "{name}: {kept} bytes are kept for each");
        });
    }
}

/// What a caller's own future, or task, has to have room for.
#[test]
fn the_futures_of_operations_are_small() {
    let _turn = turn();
    let (name, executor) = executors().swap_remove(0);
    let servers = memcached(1);
    runtime().block_on(async {
        let group = GroupSettings::default().prefix("group:");
        let client = patient(&servers, &executor)
            .group("group", group)
            .build()
            .unwrap();
        let group = client.group("group").unwrap();
        let load = || async { Ok::<Option<&str>, std::io::Error>(None) };
        for (what, size, most) in [
            ("get", size_of_val(&client.get("k")), 900),
            ("set", size_of_val(&client.set("k", "v", Ttl::NEVER)), 1_000),
            ("delete", size_of_val(&client.delete("k")), 900),
            ("get_many", size_of_val(&client.get_many(["k"])), 1_000),
            ("a group's get", size_of_val(&group.get("k")), 1_200),
            (
                "a group's set",
                size_of_val(&group.set("k", "v", Ttl::NEVER)),
                1_300,
            ),
            (
                "get_or_load",
                size_of_val(&client.get_or_load("k", Ttl::NEVER, load)),
                2_048,
            ),
        ] {
            println!("{name}, {what}: {size} bytes");
            assert!(size <= most, "{what}: {size} bytes");
        }
    });
}
