//! Every operation, against the in-process server and real memcached alike.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tower_memcached::testing::{Memcached, Server};
use tower_memcached::{
    CasOutcome, Client, ClientBuilder, ErrorKind, Executor, Key, Outcome, Payload, Ttl,
};

use crate::support::{patient, servers};

fn builder(nodes: &[String]) -> ClientBuilder {
    Client::builder()
        .nodes(nodes)
        .timeout(Duration::from_secs(10))
        .attempt_timeout(Duration::from_secs(5))
}

async fn every_operation(client: Client) {
    assert_eq!(client.get("k").await.unwrap(), None);
    client.set("k", "v", Ttl::secs(60)).await.unwrap();
    assert_eq!(client.get("k").await.unwrap().unwrap(), "v");
    assert!(!client.add("k", "w", Ttl::secs(60)).await.unwrap());
    assert!(client.add("added", b"w", Ttl::secs(60)).await.unwrap());
    assert!(
        client
            .replace("k", vec![1, 2], Ttl::secs(60))
            .await
            .unwrap()
    );
    assert!(!client.replace("missing", "w", Ttl::secs(60)).await.unwrap());
    assert!(client.append("k", b"\r\n").await.unwrap());
    assert!(client.prepend("k", [0_u8; 1].as_slice()).await.unwrap());
    assert!(!client.append("missing", "w").await.unwrap());
    assert_eq!(client.get("k").await.unwrap().unwrap(), b"\x00\x01\x02\r\n");

    let flagged = Payload::from("flagged").with_flags(u32::MAX);
    client.set("flags", flagged, Ttl::NEVER).await.unwrap();
    assert_eq!(
        client.get("flags").await.unwrap().unwrap().flags(),
        u32::MAX
    );

    let read = client.gets("k").await.unwrap().unwrap();
    assert_eq!(client.get("k").await.unwrap().unwrap().cas(), None);
    let token = read.cas().unwrap();
    let swap = |value: &'static str, token| client.cas("k", value, Ttl::NEVER, token);
    assert_eq!(swap("new", token).await.unwrap(), CasOutcome::Stored);
    assert_eq!(swap("newer", token).await.unwrap(), CasOutcome::Exists);
    assert!(client.delete("k").await.unwrap());
    assert_eq!(swap("newest", token).await.unwrap(), CasOutcome::NotFound);
    assert!(!client.delete("k").await.unwrap());

    client.set("n", "10", Ttl::NEVER).await.unwrap();
    assert_eq!(client.increment("n", 5).await.unwrap(), Some(15));
    assert_eq!(client.decrement("n", 7).await.unwrap(), Some(8));
    assert_eq!(client.get("n").await.unwrap().unwrap()[..1], *b"8");
    assert_eq!(client.decrement("n", 100).await.unwrap(), Some(0));
    assert_eq!(client.increment("missing", 1).await.unwrap(), None);
    client
        .set("n", u64::MAX.to_string(), Ttl::NEVER)
        .await
        .unwrap();
    assert_eq!(client.increment("n", 1).await.unwrap(), Some(0));
    let error = client.increment("flags", 1).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotANumber);

    assert!(client.touch("n", Ttl::secs(60)).await.unwrap());
    assert!(!client.touch("missing", Ttl::secs(60)).await.unwrap());
    // The server leaves the spaces of the longer number.
    let counter = client
        .get_and_touch("n", Ttl::NEVER)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(counter.trim_ascii_end(), b"0");
    assert_eq!(
        client.get_and_touch("missing", Ttl::NEVER).await.unwrap(),
        None
    );
    // Expired at once, where the protocol's 0 would be for ever.
    assert!(client.touch("n", Ttl::secs(0)).await.unwrap());
    assert_eq!(client.get("n").await.unwrap(), None);
    client
        .set("n", "1", Ttl::secs(60 * 60 * 24 * 60))
        .await
        .unwrap();
    assert_eq!(
        client.get("n").await.unwrap().unwrap(),
        "1",
        "60 days are not a date in 1970"
    );

    let binary = Key::binary([0, 10, 13, 32, 255]).unwrap();
    client.set(&binary, "b", Ttl::NEVER).await.unwrap();
    assert_eq!(client.get(&binary).await.unwrap().unwrap(), "b");
    assert_eq!(
        client.get_many([&binary]).await.outcomes()[0]
            .value()
            .unwrap(),
        &"b"
    );
    let longest = "x".repeat(250);
    client.set(&longest, "long", Ttl::NEVER).await.unwrap();
    assert_eq!(client.get(&longest).await.unwrap().unwrap(), "long");
    for size in [0, 1, 4096, 4097, 65_536, 900_000] {
        let value = vec![b'z'; size];
        client
            .set("sized", value.clone(), Ttl::NEVER)
            .await
            .unwrap();
        assert_eq!(client.get("sized").await.unwrap().unwrap(), &value[..]);
    }

    let nodes = client.nodes().len();
    for answer in client.version().await.unwrap() {
        assert_eq!(answer.result.unwrap(), "1.6.18");
    }
    let stats = client.stats().await.unwrap();
    assert_eq!(stats.len(), nodes);
    assert!(stats[0].result.as_ref().unwrap().contains_key("curr_items"));
    client
        .flush_all()
        .await
        .unwrap()
        .into_iter()
        .for_each(|answer| answer.result.unwrap());
    assert_eq!(client.get("n").await.unwrap(), None);
}

#[tokio::test]
async fn all_work_on_the_in_process_server() {
    let servers = servers(3).await;
    let nodes: Vec<_> = servers
        .iter()
        .map(|server| server.address().unwrap().to_string())
        .collect();
    every_operation(builder(&nodes).build().unwrap()).await;
    let one = &nodes[..1];
    every_operation(builder(one).executor(Executor::current()).build().unwrap()).await;
    every_operation(builder(one).connections(4).build().unwrap()).await;
}

#[tokio::test]
async fn all_work_on_real_memcached() {
    let servers: Vec<_> = (0..3).map(|_| Memcached::spawn(&[]).unwrap()).collect();
    let nodes: Vec<_> = servers.iter().map(Memcached::address).collect();
    every_operation(builder(&nodes).build().unwrap()).await;
    every_operation(
        builder(&nodes)
            .executor(Executor::current())
            .connections(3)
            .build()
            .unwrap(),
    )
    .await;
}

#[tokio::test]
async fn many_keys_come_back_in_order_each_with_its_own_outcome() {
    let servers = servers(3).await;
    let client = patient(&servers).build().unwrap();
    let keys: Vec<String> = (0..1000).map(|n| format!("key-{n}")).collect();
    let sets = keys
        .iter()
        .step_by(2)
        .map(|key| client.set(key, key, Ttl::NEVER));
    join_all(sets)
        .await
        .into_iter()
        .for_each(|stored| stored.unwrap());
    // Repeated keys and invalid ones among them.
    let asked: Vec<&str> = keys
        .iter()
        .flat_map(|key| [key.as_str(), "not a key", key.as_str()])
        .collect();
    let many = client.get_many(&asked[..]).await;
    assert_eq!(many.len(), 3000);
    for (n, outcomes) in many.outcomes().chunks(3).enumerate() {
        for outcome in [&outcomes[0], &outcomes[2]] {
            match outcome {
                Outcome::Hit(value) => assert!(n % 2 == 0 && *value == keys[n].as_str()),
                Outcome::Miss => assert!(n % 2 == 1),
                Outcome::Error(error) => panic!("{error}"),
            }
        }
        assert!(
            matches!(&outcomes[1], Outcome::Error(error) if error.kind() == ErrorKind::InvalidKey)
        );
    }
    assert_eq!(many.into_hits().len(), 500);
    assert!(client.get_many([] as [&str; 0]).await.is_empty());
    let reads: u64 = servers.iter().map(Server::connections_accepted).sum();
    assert_eq!(reads, 3, "one connection to each node");
}

#[tokio::test]
async fn a_value_that_is_not_there_is_loaded_once_and_kept() {
    let servers = servers(1).await;
    let client = patient(&servers).build().unwrap();
    let loads = AtomicUsize::new(0);
    let text = String::from("borrowed by the loader");
    let load = || async {
        loads.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(20)).await;
        Ok::<_, std::io::Error>(Some(text.as_str()))
    };
    let callers = (0..1000).map(|_| client.get_or_load("k", Ttl::secs(60), load));
    for value in join_all(callers).await {
        assert_eq!(value.unwrap().unwrap(), "borrowed by the loader");
    }
    assert_eq!(loads.load(Ordering::Relaxed), 1);
    assert_eq!(
        client.get("k").await.unwrap().unwrap(),
        "borrowed by the loader"
    );
    client.get_or_load("k", Ttl::secs(60), load).await.unwrap();
    assert_eq!(loads.load(Ordering::Relaxed), 1, "it is in the cache now");
    let nothing = || async { Ok::<Option<&str>, std::io::Error>(None) };
    assert_eq!(
        client
            .get_or_load("none", Ttl::secs(60), nothing)
            .await
            .unwrap(),
        None
    );
}

#[tokio::test]
async fn a_cache_that_is_down_is_loaded_around() {
    let servers = servers(1).await;
    servers[0].refuse();
    let client = patient(&servers).build().unwrap();
    let load = || async { Ok::<_, std::io::Error>(Some("from the database")) };
    for _ in 0..10 {
        let value = client.get_or_load("k", Ttl::secs(60), load).await.unwrap();
        assert_eq!(value.unwrap(), "from the database");
    }
    let error = client
        .get_or_load("not a key", Ttl::NEVER, load)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidKey);
}
