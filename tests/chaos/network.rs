//! What can happen between a client and a memcached, done to the packets of real ones.

use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use tower_memcached::testing::{Flow, Memcached, Proxy, Toxics};
use tower_memcached::{BreakerState, Client, Key, Sent, Ttl};

use crate::support::calls::{Calls, gets};
use crate::support::netns::{self, FarNode, Packets};
use crate::support::{
    PATIENCE, addresses, alone, client, eventually, keys_of, memcacheds, raw, state,
    store_patiently, until_closed, until_open,
};

const MILLISECOND: Duration = Duration::from_millis(1);
/// The default timeout of an operation, and what a busy machine may add to it.
const IN_TIME: Duration = Duration::from_millis(150);
/// From healing to the first probe that is answered: one is due once in 1.2 s.
const ANSWERS_WITHIN: Duration = Duration::from_millis(1_500);
/// From healing until all is as it was.
const BACK_WITHIN: Duration = Duration::from_secs(5);

/// A far node and two near ones, a default client, and keys of the far one that are stored.
struct Cluster {
    far: FarNode,
    _near: Vec<Memcached>,
    client: Client,
    keys: Vec<Key>,
    near_keys: Vec<Key>,
}

impl Cluster {
    async fn start() -> Self {
        let (far, near) = (FarNode::start().await, memcacheds(2));
        let mut nodes = vec![far.address().to_owned()];
        nodes.extend(addresses(&near));
        let cluster = Self {
            client: client(&nodes),
            keys: keys_of(&nodes, 0, 100),
            near_keys: keys_of(&nodes, 1, 100),
            far,
            _near: near,
        };
        for key in cluster.keys.iter().chain(&cluster.near_keys) {
            store_patiently(&cluster.client, key, "v", Ttl::NEVER).await;
        }
        cluster
    }

    /// Gets of the far node's keys, 500 a second.
    async fn gets(&self, lasting: Duration) -> Calls {
        gets(&self.client, &self.keys, 2 * MILLISECOND, lasting).await
    }

    /// Heals the network, and sees to it that the far node is back as soon as it must be.
    async fn back_after_healing(&self) {
        self.far.heal();
        let healed = Instant::now();
        eventually("a probe is answered", || {
            state(&self.client, 0) != BreakerState::Open
        })
        .await;
        let answers = healed.elapsed();
        until_closed(&self.client, 0).await;
        let back = healed.elapsed();
        println!("a probe answered {answers:?} after healing, back after {back:?}");
        assert!(answers <= ANSWERS_WITHIN, "answers after {answers:?}");
        assert!(back <= BACK_WITHIN, "back after {back:?}");
    }
}

/// One far node alone, and a default client.
async fn lonely() -> (FarNode, Client, Key) {
    let far = FarNode::start().await;
    let client = client(&[far.address().to_owned()]);
    (far, client, Key::new("k").unwrap())
}

/// 19 of FAULTS.
#[test]
fn a_node_that_cannot_be_connected_to_is_known_within_a_second() {
    if netns::switched_off() {
        return;
    }
    alone(async {
        let (far, client, key) = lonely().await;
        far.rule(Packets::Requests, "tcp flags & (syn|ack) == syn drop");
        let began = Instant::now();
        let read = client.get(&key).await;
        let took = began.elapsed();
        assert!(read.is_err());
        assert!(took <= IN_TIME, "the call took {took:?}");
        until_open(&client, 0).await;
        let known = began.elapsed();
        println!("the call took {took:?}, the breaker opened after {known:?}");
        assert!(known < Duration::from_secs(1), "known after {known:?}");
        far.heal();
        until_closed(&client, 0).await;
        store_patiently(&client, &key, "v", Ttl::NEVER).await;
    });
}

/// 20 and 22 of FAULTS. The kernel would wait for seconds before it sends again on the old connection.
#[test]
fn a_black_holed_connection_is_given_up_and_a_healed_network_dialled_at_once() {
    if netns::switched_off() {
        return;
    }
    alone(async {
        let cluster = Cluster::start().await;
        cluster.far.black_hole();
        let calls = cluster.gets(Duration::from_secs(5)).await;
        println!("black hole: {}", calls.summary());
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
        assert_eq!(cluster.client.nodes()[0].connections, 0);
        cluster.back_after_healing().await;
    });
}

/// 21 of FAULTS: the server executes what it is sent, and nobody hears of it.
#[test]
fn writes_whose_replies_are_lost_are_in_doubt_and_not_repeated() {
    if netns::switched_off() {
        return;
    }
    alone(async {
        let (far, client, key) = lonely().await;
        store_patiently(&client, &key, "0", Ttl::NEVER).await;
        far.rule(Packets::Replies, "drop");
        let increments = (0..50).map(|_| client.increment(&key, 1));
        let outcomes = join_all(increments).await;
        let mut in_doubt = 0;
        for outcome in outcomes {
            match outcome.expect_err("replies are lost").sent() {
                Sent::No => {}
                Sent::Maybe => in_doubt += 1,
                sent => panic!("nobody can know that it was sent: {sent:?}"),
            }
        }
        assert!(in_doubt > 0, "none was sent");
        far.heal();
        let counted = raw::get(far.address(), "k").await.unwrap();
        println!("{in_doubt} in doubt, {counted} counted");
        let counted: u64 = counted.trim().parse().unwrap();
        assert!(
            (1..=in_doubt).contains(&counted),
            "{counted} of {in_doubt} in doubt"
        );
        until_closed(&client, 0).await;
    });
}

/// 23 of FAULTS: a lost segment is sent again after 200 ms; the call must not wait for that.
#[test]
fn with_1_percent_loss_calls_stay_fast() {
    if netns::switched_off() {
        return;
    }
    alone(async {
        let cluster = Cluster::start().await;
        cluster.far.lose(1);
        let calls = cluster.gets(Duration::from_secs(5)).await;
        println!("1 % loss: {}", calls.summary());
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        assert!(
            calls.percentile(99) <= 100 * MILLISECOND,
            "{}",
            calls.summary()
        );
        assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
        cluster.back_after_healing().await;
    });
}

/// 24 of FAULTS.
#[test]
fn with_20_percent_loss_the_node_is_out_and_calls_are_answered() {
    if netns::switched_off() {
        return;
    }
    alone(async {
        let cluster = Cluster::start().await;
        cluster.far.lose(20);
        let opened = until_open(&cluster.client, 0);
        let (calls, ()) = tokio::join!(cluster.gets(Duration::from_secs(5)), opened);
        println!("20 % loss: {}", calls.summary());
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        assert!(
            calls.percentile(99) <= 100 * MILLISECOND,
            "{}",
            calls.summary()
        );
        assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
        cluster.back_after_healing().await;
    });
}

/// 25 of FAULTS: every packet to the node is answered with a reset.
#[test]
fn resets_move_calls_at_once() {
    if netns::switched_off() {
        return;
    }
    alone(async {
        let cluster = Cluster::start().await;
        cluster.far.rule(Packets::Requests, "reject with tcp reset");
        let calls = cluster.gets(Duration::from_secs(2)).await;
        println!("resets: {}", calls.summary());
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        assert!(calls.percentile(99) <= IN_TIME, "{}", calls.summary());
        assert_ne!(state(&cluster.client, 0), BreakerState::Closed);
        cluster.back_after_healing().await;
    });
}

/// 26 of FAULTS: a router says that there is no such host.
#[test]
fn an_unreachable_node_is_out_and_back_when_it_is_reachable() {
    if netns::switched_off() {
        return;
    }
    alone(async {
        let cluster = Cluster::start().await;
        cluster
            .far
            .rule(Packets::Requests, "reject with icmpx type host-unreachable");
        let calls = cluster.gets(Duration::from_secs(2)).await;
        println!("unreachable: {}", calls.summary());
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
        assert_ne!(state(&cluster.client, 0), BreakerState::Closed);
        cluster.back_after_healing().await;
    });
}

/// 27 of FAULTS: 1 Mbit/s, through which half a megabyte takes four seconds.
#[test]
fn a_value_too_big_for_the_line_times_out_and_other_nodes_do_not_notice() {
    if netns::switched_off() {
        return;
    }
    alone(async {
        let cluster = Cluster::start().await;
        let big = &cluster.keys[0];
        let value = vec![b'x'; 500_000];
        store_patiently(&cluster.client, big, value, Ttl::NEVER).await;
        cluster.far.narrow("1mbit");
        let began = Instant::now();
        let read = cluster.client.get(big).await;
        let took = began.elapsed();
        // An error, or a miss where it was moved to.
        assert!(
            !matches!(read, Ok(Some(_))),
            "it came through after {took:?}"
        );
        assert!(took <= IN_TIME, "the call took {took:?}");
        let small = gets(
            &cluster.client,
            &cluster.near_keys,
            2 * MILLISECOND,
            Duration::from_secs(3),
        );
        let big_ones = async {
            let until = Instant::now() + Duration::from_secs(3);
            while Instant::now() < until {
                let _ = cluster.client.get(big).await;
                sleep(10 * MILLISECOND).await;
            }
        };
        let (small, ()) = tokio::join!(small, big_ones);
        println!("small values elsewhere: {}", small.summary());
        assert!(small.errors.is_empty(), "{}", small.summary());
        assert!(
            small.hits >= small.count() * 95 / 100,
            "{}",
            small.summary()
        );
        assert!(
            small.percentile(95) <= 20 * MILLISECOND,
            "{}",
            small.summary()
        );
        assert!(small.longest() <= IN_TIME, "{}", small.summary());
        cluster.back_after_healing().await;
        let back = async {
            while !matches!(cluster.client.get(&cluster.keys[1]).await, Ok(Some(_))) {
                sleep(10 * MILLISECOND).await;
            }
        };
        timeout(PATIENCE, back).await.expect("it serves again");
    });
}

/// Every reply is late, and none too late: a node that takes more than half of an attempt's time.
#[test]
fn a_node_that_is_always_slow_is_out() {
    alone(async {
        let nodes = memcacheds(3);
        let proxy = Proxy::listen(nodes[0].socket_address()).await.unwrap();
        let mut addresses = addresses(&nodes);
        addresses[0] = proxy.address().to_string();
        let client = client(&addresses);
        let keys = keys_of(&addresses, 0, 100);
        for key in &keys {
            store_patiently(&client, key, "v", Ttl::NEVER).await;
        }
        let slow = Toxics::new().latency(20 * MILLISECOND, Duration::ZERO);
        proxy.set(Flow::Downstream, slow);
        let calls = gets(&client, &keys, 2 * MILLISECOND, Duration::from_secs(30));
        tokio::select! {
            _ = calls => panic!("it stayed in"),
            () = until_open(&client, 0) => {}
        }
        let calls = gets(&client, &keys, 2 * MILLISECOND, MILLISECOND * 500).await;
        println!("out: {}", calls.summary());
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        assert!(
            calls.percentile(90) <= 10 * MILLISECOND,
            "it is waited for: {}",
            calls.summary()
        );
        proxy.heal().unwrap();
        until_closed(&client, 0).await;
    });
}

/// 28 of FAULTS: bytes come, so that the line is not dead, but no reply is ever complete in time.
#[test]
fn a_node_whose_replies_drip_is_out_and_calls_are_answered() {
    alone(async {
        let nodes = memcacheds(3);
        let proxy = Proxy::listen(nodes[0].socket_address()).await.unwrap();
        let mut addresses = addresses(&nodes);
        addresses[0] = proxy.address().to_string();
        let client = client(&addresses);
        let keys = keys_of(&addresses, 0, 100);
        for key in &keys {
            store_patiently(&client, key, "v", Ttl::NEVER).await;
        }
        let drip = Toxics::new().slice(1, 20 * MILLISECOND);
        proxy.set(Flow::Downstream, drip);
        let calls = gets(&client, &keys, 2 * MILLISECOND, Duration::from_secs(3)).await;
        println!("drip: {}", calls.summary());
        assert!(calls.errors.is_empty(), "{}", calls.summary());
        assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
        assert!(
            calls.percentile(90) <= 10 * MILLISECOND,
            "it is waited for: {}",
            calls.summary()
        );
        assert_ne!(state(&client, 0), BreakerState::Closed);
        proxy.heal().unwrap();
        until_closed(&client, 0).await;
    });
}

/// 29 of FAULTS: the reply has come in full, and then the end of the stream.
#[test]
fn a_reply_before_the_end_of_the_stream_is_kept_and_the_connection_retired() {
    alone(async {
        let node = Memcached::spawn(&[]).unwrap();
        let proxy = Proxy::listen(node.socket_address()).await.unwrap();
        let client = Client::builder()
            .nodes([proxy.address().to_string()])
            .timeout(Duration::from_secs(5))
            .attempt_timeout(Duration::from_secs(2))
            .build()
            .unwrap();
        let key = Key::new("k").unwrap();
        store_patiently(&client, &key, "v", Ttl::NEVER).await;
        for round in 0..10 {
            let before = proxy.connections_accepted();
            let read = {
                let (client, key) = (client.clone(), key.clone());
                let on_its_way = proxy.bytes_received(Flow::Downstream);
                let late = Toxics::new().latency(50 * MILLISECOND, Duration::ZERO);
                proxy.set(Flow::Downstream, late);
                let read = tokio::spawn(async move { client.get(key).await });
                eventually("the reply is on its way", || {
                    proxy.bytes_received(Flow::Downstream) > on_its_way
                })
                .await;
                proxy.half_close(Flow::Downstream);
                read.await.unwrap()
            };
            proxy.heal().unwrap();
            assert_eq!(read.unwrap().unwrap(), "v", "round {round}");
            let read = client.get(&key).await;
            let read = read.unwrap().unwrap();
            assert_eq!(read, "v", "round {round}, on another connection");
            assert!(proxy.connections_accepted() > before);
        }
        assert_eq!(state(&client, 0), BreakerState::Closed);
    });
}

/// 31 of FAULTS.
#[test]
fn an_interface_that_goes_down_and_comes_up_is_survived() {
    if netns::switched_off() {
        return;
    }
    alone(async {
        let cluster = Cluster::start().await;
        for _ in 0..2 {
            cluster.far.interface_down();
            let calls = cluster.gets(Duration::from_secs(2)).await;
            println!("interface down: {}", calls.summary());
            assert!(calls.errors.is_empty(), "{}", calls.summary());
            assert!(calls.longest() <= IN_TIME, "{}", calls.summary());
            assert_ne!(state(&cluster.client, 0), BreakerState::Closed);
            cluster.back_after_healing().await;
        }
    });
}

/// A clone outlives nothing: all sockets of a client to a black hole are gone when it is.
#[test]
fn a_client_dropped_in_a_black_hole_leaves_no_connection() {
    if netns::switched_off() {
        return;
    }
    alone(async {
        let cluster = Cluster::start().await;
        let address = cluster.far.address().to_owned();
        assert!(established(&address) >= 1);
        cluster.far.black_hole();
        cluster.gets(Duration::from_millis(300)).await;
        let Cluster { far, client, .. } = cluster;
        drop(client);
        eventually("its sockets are gone", || established(&address) == 0).await;
        drop(far);
    });
}

/// How many established connections of this machine lead there.
fn established(address: &str) -> usize {
    let (ip, port) = address.rsplit_once(':').unwrap();
    let ip: std::net::Ipv4Addr = ip.parse().unwrap();
    let port: u16 = port.parse().unwrap();
    let remote = format!("{:08X}:{port:04X}", u32::from(ip).swap_bytes());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table
        .lines()
        .filter(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            fields[2] == remote && fields[3] == "01"
        })
        .count()
}
