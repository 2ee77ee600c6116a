//! Compatibility with the tables of the clients whose rings these are, and what any ring must hold.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const VECTORS: &str = include_str!("../../../tests/data/ketama_vectors.tsv");

#[test]
fn every_row_of_the_compatibility_tables_holds() {
    let mut rows = BTreeMap::<&str, usize>::new();
    for (number, line) in VECTORS
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.starts_with('#'))
    {
        let &[set, key, hash, point, expected] = &line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("line {}: not five columns: {line}", number + 1);
        };
        *rows.entry(set).or_default() += 1;
        assert_eq!(
            hash.parse(),
            Ok(super::hash(key.as_bytes())),
            "hash of {line}"
        );
        let Some((ring, servers)) = servers_of(set) else {
            assert_eq!((point, expected), ("-", "-"), "{line}");
            continue;
        };
        let continuum = ring.build(&tcp_nodes(&servers));
        let key = key.as_bytes();
        if point != "-" {
            let found = continuum.points[continuum.successor(super::hash(key))];
            assert_eq!(point.parse(), Ok(found.hash), "point of {line}");
        }
        if set == "spy_seq_4" {
            let tries: Vec<_> = tries(&continuum, key)
                .map(|node| node.to_string())
                .collect();
            assert_eq!(tries.join(","), expected, "tries of {line}");
        } else {
            let (host, port, _) = &servers[continuum.primary(key)];
            assert_eq!(format!("{host}:{port}"), expected, "server of {line}");
        }
    }
    let expected = [
        ("hash_ketama", 7),
        ("lm_weighted", 34),
        ("lmo_w3_eq", 34),
        ("lmo_w3_host", 34),
        ("lmo_w4", 34),
        ("spy_4", 6),
        ("spy_5", 3),
        ("spy_8", 163),
        ("spy_seq_4", 2),
    ];
    assert_eq!(rows, BTreeMap::from(expected));
}

#[test]
fn keys_of_any_length_have_their_digests_hash() {
    for length in 0..=crate::key::MAX_KEY_LENGTH {
        let key: Vec<u8> = (0..length).map(|n| (n * 37 + length) as u8).collect();
        let digest = leading_u32(Md5::digest(&key).into());
        assert_eq!(super::hash(&key), digest, "{length} bytes");
    }
}

#[test]
fn points_are_counted_in_libmemcacheds_single_precision() {
    let (ring, servers) = servers_of("lm_weighted").unwrap();
    let counts = points_per_node(&ring.build(&tcp_nodes(&servers)));
    assert_eq!(counts, [176, 88, 56, 104, 296, 236, 280, 28]);

    // 1/25 in f32 is a little short, so every one of 25 equal nodes loses a digest; spymemcached, which
    // does not divide where there are no weights, keeps them all.
    let servers = equal_servers(25);
    let counts = points_per_node(&Ring::libmemcached().build(&tcp_nodes(&servers)));
    assert_eq!(counts, [156; 25]);
    let counts = points_per_node(&Ring::spymemcached().build(&tcp_nodes(&servers)));
    assert_eq!(counts, [160; 25]);
}

#[test]
fn spymemcached_with_weights_counts_as_libmemcached_does() {
    let (_, servers) = servers_of("lm_weighted").unwrap();
    let counts = points_per_node(&Ring::spymemcached().build(&tcp_nodes(&servers)));
    assert_eq!(counts, [176, 88, 56, 104, 296, 236, 280, 28]);
}

#[test]
fn a_node_is_named_as_its_client_names_it() {
    let default_port = NodeName::Tcp {
        host: "cache-a.example",
        port: 11211,
    };
    let other_port = NodeName::Tcp {
        host: "10.0.0.1",
        port: 21001,
    };
    let socket = NodeName::Unix("unix:/run/memcached.sock");
    let name = |ring: Ring| [default_port, other_port, socket].map(|node| ring.name(node));
    assert_eq!(
        name(Ring::libmemcached()),
        [
            "cache-a.example",
            "10.0.0.1:21001",
            "unix:/run/memcached.sock"
        ]
    );
    assert_eq!(
        name(Ring::spymemcached()),
        [
            "cache-a.example:11211",
            "10.0.0.1:21001",
            "unix:/run/memcached.sock"
        ]
    );
}

#[test]
fn a_node_listed_twice_is_resolved_as_its_client_resolves_it() {
    let mut servers = equal_servers(3);
    servers.push(servers[0].clone());
    let libmemcached = Ring::libmemcached().build(&tcp_nodes(&servers));
    let spymemcached = Ring::spymemcached().build(&tcp_nodes(&servers));
    let mut shared = 0;
    for key in keys(500) {
        let order: Vec<_> = libmemcached.sequence(&key).collect();
        if order[0] == 0 {
            shared += 1;
            assert_eq!(order[1], 3, "its twin holds the same points");
        }
        assert_ne!(libmemcached.primary(&key), 3);
        assert_ne!(spymemcached.primary(&key), 0);
    }
    assert!(shared > 0);
}

#[test]
fn a_node_without_points_is_no_home_but_the_last_resort() {
    // 1 of 7001, times 40 x 8, is under one digest: too small a weight is as none.
    for weight in [0, 1] {
        let mut servers = equal_servers(8);
        servers.iter_mut().for_each(|server| server.2 = 1000);
        servers[2].2 = weight;
        for ring in rings() {
            let continuum = ring.build(&tcp_nodes(&servers));
            assert_eq!(points_per_node(&continuum)[2], 0);
            for key in keys(200) {
                // spymemcached's tries and libmemcached's walk end here alike.
                assert_eq!(continuum.sequence(&key).last(), Some(2));
            }
        }
    }
}

#[test]
fn a_ring_without_points_goes_by_index() {
    let mut servers = equal_servers(3);
    servers.iter_mut().for_each(|server| server.2 = 0);
    let continuum = Ring::libmemcached().build(&tcp_nodes(&servers));
    assert_eq!(continuum.primary(b"key"), 0);
    assert_eq!(continuum.sequence(b"key").collect::<Vec<_>>(), [0, 1, 2]);
}

#[test]
fn one_node_or_none_needs_no_hash_and_does_not_panic() {
    for ring in rings() {
        let one = ring.build(&tcp_nodes(&equal_servers(1)));
        assert_eq!(one.primary(b"key"), 0);
        assert_eq!(one.sequence(b"key").collect::<Vec<_>>(), [0]);
        let none = ring.build(&[]);
        assert_eq!(none.primary(b"key"), 0);
        assert_eq!(none.sequence(b"key").count(), 0);
    }
}

#[test]
fn a_sequence_of_up_to_64_nodes_needs_no_allocation() {
    let yielded = |count| {
        let servers = equal_servers(count);
        Ring::default()
            .build(&tcp_nodes(&servers))
            .sequence(b"key")
            .yielded
    };
    assert!(matches!(yielded(64), NodeSet::Few(_)));
    assert!(matches!(yielded(65), NodeSet::Many(_)));
}

#[test]
fn a_fifth_node_takes_a_fifth_of_the_keys() {
    for ring in rings() {
        let servers = equal_servers(5);
        let before = ring.build(&tcp_nodes(&servers[..4]));
        let after = ring.build(&tcp_nodes(&servers));
        let moved = keys(5000)
            .filter(|key| before.primary(key) != after.primary(key))
            .count();
        assert!(
            (800..=1200).contains(&moved),
            "{ring:?}: {moved} of 5000 moved"
        );
    }
}

#[test]
fn a_continuum_is_shared_between_threads() {
    fn shared<T: Send + Sync + 'static>() {}
    shared::<Continuum>();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_sequence_is_the_primary_and_then_every_other_node_once(
        ring in any_ring(),
        weights in vec(0_u32..1000, 1..80),
        keys in vec(any_key(), 1..8),
    ) {
        let continuum = ring.build(&tcp_nodes(&weighted_servers(&weights)));
        for key in &keys {
            let sequence = continuum.sequence(key);
            prop_assert_eq!(sequence.len(), weights.len());
            let mut order: Vec<_> = sequence.collect();
            prop_assert_eq!(order[0], continuum.primary(key));
            order.sort_unstable();
            prop_assert!(order.into_iter().eq(0..weights.len()));
        }
    }

    #[test]
    fn a_node_that_is_out_moves_its_own_keys_only(
        ring in any_ring(),
        weights in vec(1_u32..1000, 2..80),
        out in any::<prop::sample::Index>(),
        keys in vec(any_key(), 1..50),
    ) {
        let out = out.index(weights.len());
        let continuum = ring.build(&tcp_nodes(&weighted_servers(&weights)));
        for key in &keys {
            let home = continuum.sequence(key).find(|&node| node != out);
            if continuum.primary(key) == out {
                prop_assert_eq!(home, continuum.sequence(key).nth(1));
            } else {
                prop_assert_eq!(home, Some(continuum.primary(key)));
            }
        }
    }

    #[test]
    fn skipping_a_node_is_as_if_the_ring_never_had_it(
        count in 2..20_usize,
        out in any::<prop::sample::Index>(),
        keys in vec(any_key(), 1..50),
    ) {
        let servers = equal_servers(count);
        let out = out.index(count);
        let mut without = servers.clone();
        without.remove(out);
        let continuum = Ring::libmemcached().build(&tcp_nodes(&servers));
        let smaller = Ring::libmemcached().build(&tcp_nodes(&without));
        for key in &keys {
            let kept: Vec<_> = continuum.sequence(key).filter(|&node| node != out).collect();
            let expected: Vec<_> = smaller.sequence(key).map(|node| node + usize::from(node >= out)).collect();
            prop_assert_eq!(kept, expected);
        }
    }

    #[test]
    fn an_added_node_takes_its_share_and_moves_nothing_else(
        ring in any_ring(),
        // Not as far as 25, where libmemcached's rounding takes points from every node.
        count in 1..24_usize,
        keys in vec(any_key(), 1..50),
    ) {
        let servers = equal_servers(count + 1);
        let before = ring.build(&tcp_nodes(&servers[..count]));
        let after = ring.build(&tcp_nodes(&servers));
        for key in &keys {
            let node = after.primary(key);
            prop_assert!(node == count || node == before.primary(key));
        }
        let share = shares(&after)[count] * (count + 1) as f64;
        prop_assert!((0.5..1.5).contains(&share), "{} of an equal share", share);
    }

    #[test]
    fn shares_follow_weights(ring in any_ring(), weights in vec(1_u32..10, 2..10)) {
        let continuum = ring.build(&tcp_nodes(&weighted_servers(&weights)));
        let total: u32 = weights.iter().sum();
        let (points, shares) = (points_per_node(&continuum), shares(&continuum));
        for (node, &weight) in weights.iter().enumerate() {
            let expected = f64::from(weight) / f64::from(total);
            let digests = expected * 40.0 * weights.len() as f64;
            prop_assert!((digests - (points[node] / 4) as f64).abs() <= 1.0);
            // Up to one digest is lost to rounding; arcs between n points vary by 1/sqrt(n), of which six.
            let tolerance = 1.0 / digests + 6.0 / (points[node] as f64).sqrt();
            let share = shares[node] / expected;
            prop_assert!((share - 1.0).abs() < tolerance, "node {}: {} of its weight's share", node, share);
        }
    }

    #[test]
    fn a_keys_home_is_the_same_in_every_process_and_order_of_nodes(
        ring in any_ring(),
        weights in vec(1_u32..10, 1..10),
        rotation in any::<prop::sample::Index>(),
        keys in vec(any_key(), 1..20),
    ) {
        let servers = weighted_servers(&weights);
        let mut rotated = servers.clone();
        rotated.rotate_left(rotation.index(servers.len()));
        let (here, there) = (ring.build(&tcp_nodes(&servers)), ring.build(&tcp_nodes(&rotated)));
        prop_assert_eq!(&ring.build(&tcp_nodes(&servers)).points, &here.points);
        for key in &keys {
            let named_here = here.sequence(key).map(|node| &servers[node]);
            let named_there = there.sequence(key).map(|node| &rotated[node]);
            prop_assert!(named_here.eq(named_there));
        }
    }

    #[test]
    fn the_indexed_search_finds_what_a_plain_one_finds(
        hashes in vec(any_hash(), 1..40),
        hash in any_hash(),
        near in any::<prop::sample::Index>(),
    ) {
        let mut points: Vec<_> = hashes.iter().map(|&hash| Point { hash, node: 0 }).collect();
        points.sort_unstable_by_key(|point| point.hash);
        let continuum = Continuum::new(Rules::Libmemcached, 1, points.clone());
        let near = *near.get(&hashes);
        for hash in [hash, near, near.wrapping_sub(1), near.wrapping_add(1), 0, u32::MAX] {
            let plain = points.partition_point(|point| point.hash < hash) % points.len();
            prop_assert_eq!(continuum.successor(hash), plain);
        }
    }
}

/// Host, port, weight.
type Server = (String, u16, u32);

/// The ring and the servers that a set of the tables is about; none for a set of bare hashes.
fn servers_of(set: &str) -> Option<(Ring, Vec<Server>)> {
    let local = |ports: Range<u16>| {
        ports
            .map(|port| ("127.0.0.1".to_owned(), port, 1))
            .collect()
    };
    let ten = |weights: [u32; 8]| {
        let server = |(last, weight)| (format!("10.0.1.{last}"), 11211, weight);
        (1..).zip(weights).map(server).collect::<Vec<_>>()
    };
    Some(match set {
        "hash_ketama" => return None,
        "lm_weighted" => (
            Ring::libmemcached(),
            ten([600, 300, 200, 350, 1000, 800, 950, 100]),
        ),
        "lmo_w3_eq" => (Ring::libmemcached(), local(21001..21004)),
        "lmo_w3_host" => {
            let server = |letter| (format!("cache-{letter}.example"), 11211, 1);
            (Ring::libmemcached(), ["a", "b", "c"].map(server).to_vec())
        }
        "lmo_w4" => {
            let mut servers: Vec<Server> = local(21001..21005);
            servers[1].2 = 2;
            servers[2].2 = 3;
            (Ring::libmemcached(), servers)
        }
        "spy_4" | "spy_seq_4" => (Ring::spymemcached(), local(10000..10004)),
        "spy_5" => (Ring::spymemcached(), local(10000..10005)),
        "spy_8" => (Ring::spymemcached(), ten([1; 8])),
        unknown => panic!("a set that this test does not know: {unknown}"),
    })
}

fn tcp_nodes<'a>(servers: &'a [Server]) -> Vec<RingNode<'a>> {
    let node = |(host, port, weight): &'a Server| RingNode {
        name: NodeName::Tcp { host, port: *port },
        weight: *weight,
    };
    servers.iter().map(node).collect()
}

fn weighted_servers(weights: &[u32]) -> Vec<Server> {
    let server = |(index, &weight)| (format!("cache-{index}.example"), 11211, weight);
    weights.iter().enumerate().map(server).collect()
}

fn equal_servers(count: usize) -> Vec<Server> {
    weighted_servers(&vec![1; count])
}

fn rings() -> [Ring; 2] {
    [Ring::libmemcached(), Ring::spymemcached()]
}

fn any_ring() -> impl Strategy<Value = Ring> {
    prop::sample::select(rings().to_vec())
}

fn any_key() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 1..40)
}

/// Hashes of which many lie where an entry of the continuum's index begins or ends.
fn any_hash() -> impl Strategy<Value = u32> {
    let edge = (0..64_u32).prop_map(|top| top << 26);
    prop_oneof![
        any::<u32>(),
        edge.clone(),
        edge.prop_map(|hash| hash.wrapping_sub(1))
    ]
}

fn keys(count: usize) -> impl Iterator<Item = Vec<u8>> {
    (0..count).map(|number| format!("user/{number}/profile").into_bytes())
}

fn tries<'a>(continuum: &'a Continuum, key: &'a [u8]) -> Tries<'a> {
    Tries {
        continuum,
        key,
        hash: super::hash(key),
        tries: 0..SPYMEMCACHED_TRIES,
    }
}

fn points_per_node(continuum: &Continuum) -> Vec<usize> {
    let mut counts = vec![0; continuum.nodes];
    for point in &continuum.points {
        counts[point.node as usize] += 1;
    }
    counts
}

/// Which part of all hashes each node owns.
fn shares(continuum: &Continuum) -> Vec<f64> {
    let mut shares = vec![0.0; continuum.nodes];
    let points = &continuum.points;
    for (position, point) in points.iter().enumerate() {
        let previous = points[(position + points.len() - 1) % points.len()];
        shares[point.node as usize] +=
            f64::from(point.hash.wrapping_sub(previous.hash)) / f64::from(u32::MAX);
    }
    shares
}
