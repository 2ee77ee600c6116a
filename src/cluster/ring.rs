//! The hash ring: which node a key lives on, and where it goes while that node is out.
//!
//! A [`Ring`] is the user's choice of rules. Given the nodes it builds a `Continuum`, an immutable table
//! of points that answers two questions without a lock: `Continuum::primary`, on every request, and
//! `Continuum::sequence`, when the primary cannot be used. The continuum knows nothing of health: a
//! caller takes the first healthy node of the sequence, so that an outage moves the keys of the node that
//! is out and no others.
//!
//! Both rings are *ketama*: a node's MD5 digests give its points, a key's MD5 digest gives a position, and
//! the key belongs to the first point at or after it. That much comes from libketama; the rest, on which
//! clients disagree, is said at [`Ring::libmemcached`] and [`Ring::spymemcached`].

use std::iter::{Chain, FusedIterator};
use std::ops::Range;
use std::slice;

use md5::block_api::compress;
use md5::{Digest, Md5};

#[cfg(test)]
mod tests;

/// Which hash ring maps keys to nodes. The default is [`Ring::libmemcached`].
///
/// All clients of a cluster must agree on the ring, on the nodes' names as they are written in the
/// configuration, and on their weights; otherwise they look for the same key on different nodes. A node is
/// known to the ring by the name it was given, never by the address that name resolves to, so a new
/// address moves no key.
///
/// ```
/// use tower_memcached::Ring;
///
/// assert_eq!(Ring::default(), Ring::libmemcached());
/// assert_ne!(Ring::default(), Ring::spymemcached());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(transparent)
)]
pub struct Ring {
    rules: Rules,
}

impl Ring {
    /// The ring of libmemcached's `MEMCACHED_BEHAVIOR_KETAMA_WEIGHTED`, and of the clients built upon it
    /// with that behaviour set.
    ///
    /// - A node is named by its host, followed by `:port` only where the port is not 11211.
    /// - It has `4 * floor(40 * n * weight / total)` points, in libmemcached's single-precision
    ///   arithmetic: about 160 each where all weights are equal. A node whose weight is under one
    ///   `40 * n`th of the total has none, and so is no key's home.
    /// - While a node is out, each of its keys goes to the owner of the next point of another node. Other
    ///   keys do not move. (libmemcached with automatic ejection rebuilds its ring instead, which can
    ///   also move keys of nodes that are well.)
    ///
    /// Two things to know. libmemcached's plain `MEMCACHED_BEHAVIOR_KETAMA`, without `WEIGHTED`, is
    /// another ring. And as weights are shares of the total, adding a node to unequally weighted ones
    /// can change the others' number of points too, and so move a few keys between them.
    ///
    /// Checked against libmemcached 1.1.4 and its public test tables. A Unix socket is named by
    /// `unix:/path`, as it was written, which libmemcached writes otherwise: those do not agree.
    pub fn libmemcached() -> Self {
        Self {
            rules: Rules::Libmemcached,
        }
    }

    /// The ring of the Java client spymemcached with its `KETAMA_HASH` and its default node key format.
    ///
    /// - A node is named by `host:port`, always with the port.
    /// - It has 160 points where all weights are equal; where they differ, the number that
    ///   [`Ring::libmemcached`] gives it, as in spymemcached's weighted `KetamaNodeLocator`.
    /// - While a node is out, its keys follow spymemcached's sequence: seven tries, each at a position
    ///   rehashed from the last and the key. Where spymemcached gives up after those, this goes on to the
    ///   remaining nodes in the order of their points.
    ///
    /// spymemcached names a node by Java's `InetSocketAddress::toString`, which for a resolved host name
    /// is `host/10.0.0.1:11211`, and which for IPv6 differs between Java releases. The two clients
    /// therefore agree where nodes are written as IPv4 addresses.
    ///
    /// Checked against spymemcached's public test tables, which are all unweighted.
    pub fn spymemcached() -> Self {
        Self {
            rules: Rules::Spymemcached,
        }
    }

    /// Places `nodes` on this ring. The continuum speaks of them by their index here.
    ///
    /// Where points of two nodes coincide, as all do of a node listed twice, libmemcached's goes to the
    /// lower index and spymemcached's to the higher, because there a later entry overwrites an earlier.
    ///
    /// A node without points (of weight 0, or too small a weight) is no key's primary, and comes last, by
    /// index, in every sequence.
    pub(crate) fn build(&self, nodes: &[RingNode<'_>]) -> Continuum {
        let mut points = Vec::with_capacity(nodes.len() * POINTS_PER_NODE);
        for (index, (node, digests)) in nodes.iter().zip(self.digests_per_node(nodes)).enumerate() {
            let name = self.name(node.name);
            for repetition in 0..digests {
                let digest = Md5::digest(format!("{name}-{repetition}"));
                let (hashes, _) = digest.as_chunks();
                points.extend(hashes.iter().map(|&hash| Point {
                    hash: u32::from_le_bytes(hash),
                    node: index as u32,
                }));
            }
        }
        match self.rules {
            Rules::Libmemcached => points.sort_unstable_by_key(|point| (point.hash, point.node)),
            Rules::Spymemcached => points.sort_unstable_by_key(|point| (point.hash, !point.node)),
        }
        Continuum::new(self.rules, nodes.len(), points)
    }

    /// What it is called in a fingerprint.
    pub(crate) fn label(&self) -> &'static str {
        match self.rules {
            Rules::Libmemcached => "libmemcached",
            Rules::Spymemcached => "spymemcached",
        }
    }

    /// What stands before `-0`, `-1`, … in the text whose digests are the node's points.
    fn name(&self, name: NodeName<'_>) -> String {
        match (self.rules, name) {
            (_, NodeName::Unix(written)) => written.to_owned(),
            (Rules::Libmemcached, NodeName::Tcp { host, port: 11211 }) => host.to_owned(),
            (_, NodeName::Tcp { host, port }) => format!("{host}:{port}"),
        }
    }

    /// How many digests, of four points each, every node contributes.
    fn digests_per_node(&self, nodes: &[RingNode<'_>]) -> Vec<u32> {
        let unweighted = nodes
            .windows(2)
            .all(|pair| pair[0].weight == pair[1].weight);
        if self.rules == Rules::Spymemcached && unweighted {
            return vec![DIGESTS_PER_NODE; nodes.len()];
        }
        let total = nodes.iter().map(|node| u64::from(node.weight)).sum::<u64>() as f32;
        let digests = |node: &RingNode<'_>| {
            // Each step is rounded to f32 as libmemcached's C and spymemcached's Java do, in their order.
            // It matters: 25 equal nodes get 39 digests each, not 40.
            let share = node.weight as f32 / total;
            let digests = share * POINTS_PER_NODE as f32 / 4.0 * nodes.len() as f32;
            // The cast makes 0 of the NaN that comes of weights that are all 0.
            ((f64::from(digests) + 1e-10) as f32).floor() as u32
        };
        nodes.iter().map(digests).collect()
    }
}

/// A node as the ring sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingNode<'a> {
    pub(crate) name: NodeName<'a>,
    /// The node's share of the keys, relative to the others'.
    pub(crate) weight: u32,
}

/// What the user called a node.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NodeName<'a> {
    /// A host name or an IP address (IPv6 without its brackets) and a port.
    Tcp { host: &'a str, port: u16 },
    /// A Unix socket, as written: `unix:/path`.
    Unix(&'a str),
}

/// Nodes placed on a ring: immutable, shared between threads without a lock.
#[derive(Debug)]
pub(crate) struct Continuum {
    rules: Rules,
    nodes: usize,
    /// Sorted by hash; of equal hashes the first is the one that keys belong to.
    points: Box<[Point]>,
    /// For each value of a hash's top bits the first point not before it, so that a search begins, on
    /// average, within one point of its end. `32 - shift` bits index it.
    index: Box<[u32]>,
    shift: u32,
}

impl Continuum {
    /// `points` are sorted.
    fn new(rules: Rules, nodes: usize, points: Vec<Point>) -> Self {
        // At least one bit, because a shift by all 32 would overflow.
        let bits = points.len().next_power_of_two().ilog2().clamp(1, 31);
        let shift = 32 - bits;
        let first = |top: u32| points.partition_point(|point| point.hash < top << shift) as u32;
        let index = (0..1 << bits).map(first).collect();
        Self {
            rules,
            nodes,
            points: points.into(),
            index,
            shift,
        }
    }

    /// The node that `key` lives on: one MD5 and an indexed search, or neither where there is one node.
    ///
    /// The index is that of the list the continuum was built from. Where that was empty there is nothing
    /// for the 0 that it answers to refer to.
    #[inline]
    pub(crate) fn primary(&self, key: &[u8]) -> usize {
        if self.nodes <= 1 {
            return 0;
        }
        self.owner(hash(key))
    }

    /// All nodes, each once, in the order in which `key` prefers them; the first is its primary.
    pub(crate) fn sequence<'a>(&'a self, key: &'a [u8]) -> Sequence<'a> {
        // Nothing to choose, nothing to hash.
        let hash = if self.nodes <= 1 { 0 } else { hash(key) };
        let tries = match self.rules {
            Rules::Libmemcached => 0..0,
            Rules::Spymemcached => 0..SPYMEMCACHED_TRIES,
        };
        let (before, after) = self.points.split_at(self.successor(hash));
        let walk = Walk {
            points: after.iter().chain(before),
        };
        Sequence {
            candidates: Tries {
                continuum: self,
                key,
                hash,
                tries,
            }
            .chain(walk)
            .chain(0..self.nodes),
            yielded: NodeSet::new(self.nodes),
            remaining: self.nodes,
        }
    }

    /// Whether its points are those of `other`, with nodes that are the same.
    pub(crate) fn is_same(&self, other: &Self, is_same: impl Fn(usize, usize) -> bool) -> bool {
        let same_points = || {
            let mut both = self.points.iter().zip(&other.points);
            both.all(|(mine, theirs)| {
                mine.hash == theirs.hash && is_same(mine.node as usize, theirs.node as usize)
            })
        };
        let (count, others) = (self.points.len(), other.points.len());
        // A ring of one node may have no points.
        self.nodes == other.nodes
            && count == others
            && match count {
                0 => (0..self.nodes).all(|node| is_same(node, node)),
                _ => same_points(),
            }
    }

    /// The points that several nodes have, and whose each is.
    pub(crate) fn shared_points(&self) -> impl Iterator<Item = (u32, usize)> {
        let shared = self.points.chunk_by(|one, next| one.hash == next.hash);
        let shared = shared.filter(|same| same.iter().any(|point| point.node != same[0].node));
        shared.map(|same| (same[0].hash, same[0].node as usize))
    }

    fn owner(&self, hash: u32) -> usize {
        match self.points.get(self.successor(hash)) {
            Some(point) => point.node as usize,
            // No node has a point; a sequence goes by index then.
            None => 0,
        }
    }

    /// The position of the first point at or after `hash`, around the end of the ring if need be.
    fn successor(&self, hash: u32) -> usize {
        let start = self.index[(hash >> self.shift) as usize] as usize;
        let position = self.points[start..]
            .iter()
            .position(|point| point.hash >= hash);
        position.map_or(0, |offset| start + offset)
    }
}

/// The iterator of [`Continuum::sequence`]. It allocates only where there are more than 64 nodes.
#[derive(Clone, Debug)]
pub(crate) struct Sequence<'a> {
    /// Tries, if the ring has any; then the points; then, for nodes without points, every index.
    candidates: Chain<Chain<Tries<'a>, Walk<'a>>, Range<usize>>,
    yielded: NodeSet,
    remaining: usize,
}

impl Iterator for Sequence<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        // Without this the end would be found only by walking the rest of the ring.
        if self.remaining == 0 {
            return None;
        }
        let node = self.candidates.find(|&node| self.yielded.insert(node))?;
        self.remaining -= 1;
        Some(node)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.remaining, Some(self.remaining))
    }
}

impl ExactSizeIterator for Sequence<'_> {}

impl FusedIterator for Sequence<'_> {}

/// The nodes that spymemcached tries, in turn, with repetitions: the owners of the key's hash and of six
/// rehashes of it.
#[derive(Clone, Debug)]
struct Tries<'a> {
    continuum: &'a Continuum,
    key: &'a [u8],
    hash: u32,
    tries: Range<u8>,
}

impl Iterator for Tries<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let this_try = self.tries.next()?;
        if this_try > 0 {
            // The digit is the number of the try before. spymemcached adds x ^ (x >> 32) of a hash x
            // held in 64 bits, which is x.
            let digit = b'0' + (this_try - 1);
            let digest = Md5::new()
                .chain_update([digit])
                .chain_update(self.key)
                .finalize();
            self.hash = self.hash.wrapping_add(leading_u32(digest.into()));
        }
        Some(self.continuum.owner(self.hash))
    }
}

/// Once around the ring: the owner of each point, with repetitions.
#[derive(Clone, Debug)]
struct Walk<'a> {
    points: Chain<slice::Iter<'a, Point>, slice::Iter<'a, Point>>,
}

impl Iterator for Walk<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        self.points.next().map(|point| point.node as usize)
    }
}

/// A set of node indexes.
#[derive(Clone, Debug)]
enum NodeSet {
    /// Of up to 64 nodes: no allocation.
    Few(u64),
    Many(Vec<bool>),
}

impl NodeSet {
    /// An empty set that can hold the nodes `0..nodes`.
    fn new(nodes: usize) -> Self {
        if nodes <= 64 {
            Self::Few(0)
        } else {
            Self::Many(vec![false; nodes])
        }
    }

    /// Whether `node` was not in the set before.
    fn insert(&mut self, node: usize) -> bool {
        match self {
            Self::Few(bits) => {
                let before = *bits;
                *bits |= 1 << node;
                *bits != before
            }
            Self::Many(members) => !std::mem::replace(&mut members[node], true),
        }
    }
}

/// One of the places a node has on the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Point {
    hash: u32,
    node: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
enum Rules {
    #[default]
    Libmemcached,
    Spymemcached,
}

/// libmemcached's `MEMCACHED_POINTS_PER_SERVER_KETAMA`, and spymemcached's default too.
const POINTS_PER_NODE: usize = 160;

/// A digest is four points.
const DIGESTS_PER_NODE: u32 = POINTS_PER_NODE as u32 / 4;

/// How often spymemcached's `KetamaNodeLocator::getSequence` looks for a node.
const SPYMEMCACHED_TRIES: u8 = 7;

/// A key's position on the ring: how its MD5 digest begins.
fn hash(key: &[u8]) -> u32 {
    if key.len() >= LENGTH_AT {
        return leading_u32(Md5::digest(key).into());
    }
    // Most keys are one block, and need nothing of what collects several.
    let mut block = [0; 64];
    block[..key.len()].copy_from_slice(key);
    block[key.len()] = 0x80;
    block[LENGTH_AT..].copy_from_slice(&(key.len() as u64 * 8).to_le_bytes());
    let mut state = INITIAL_STATE;
    compress(&mut state, &[block]);
    state[0]
}

/// Where MD5's last block has the length of all, in bits, behind a bit that is set.
const LENGTH_AT: usize = 56;

/// What MD5 begins with.
const INITIAL_STATE: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];

fn leading_u32(digest: [u8; 16]) -> u32 {
    let [a, b, c, d, ..] = digest;
    u32::from_le_bytes([a, b, c, d])
}
