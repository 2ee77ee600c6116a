//! Which nodes there are, as one immutable snapshot that is swapped as a whole.
//!
//! A key that moves to another node leaves its old value behind. So a snapshot remembers a few
//! former [`Layout`]s, and with them the [`Book`]s of servers that are no nodes any more: a write
//! outdates its key wherever it was before.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::Arc;

use super::ring::{Continuum, NodeName, Ring, RingNode};
use crate::error::{Invalid, Result};
use crate::key::Key;
use crate::node::{Book, Node, Reason, Shared as NodeShared};
use crate::transport::{Address, Protocol};

/// A node as it is configured: its name as the user wrote it, where that is, and its share of the
/// keys.
///
/// The name alone decides which keys are its own. A node that [moves](Self::at) to another address
/// keeps them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    pub(crate) name: Arc<str>,
    /// The name as an address: what the ring knows it by.
    pub(crate) identity: Address,
    pub(crate) address: Address,
    pub(crate) weight: u32,
    /// Where it is not the client's.
    pub(crate) protocol: Option<Protocol>,
}

impl NodeSpec {
    /// A node of weight 1, at the address that is its name.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if `name` is no
    /// address (see [`Address`]).
    pub fn new(name: &str) -> Result<Self> {
        let address: Address = name.parse()?;
        Ok(Self {
            name: name.into(),
            identity: address.clone(),
            address,
            weight: 1,
            protocol: None,
        })
    }

    /// Connections to it are made to another address than its name: `cache-a` at `10.0.0.7` now. Its
    /// keys stay its own, wherever it is.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if `address` is
    /// none.
    ///
    /// ```
    /// use tower_memcached::NodeSpec;
    ///
    /// let spec = NodeSpec::new("cache-a:11211")?.at("10.0.0.7:11211")?;
    /// assert_eq!(&**spec.name(), "cache-a:11211");
    /// assert_eq!(spec.address().to_string(), "10.0.0.7:11211");
    /// # Ok::<(), tower_memcached::Error>(())
    /// ```
    pub fn at(mut self, address: &str) -> Result<Self> {
        self.address = address.parse()?;
        Ok(self)
    }

    /// Gives it a share of the keys in proportion to its weight.
    #[must_use]
    pub fn with_weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }

    /// Says which protocol it is asked in, if that is not what the client's other nodes are.
    #[must_use]
    pub fn with_protocol(mut self, protocol: Protocol) -> Self {
        self.protocol = Some(protocol);
        self
    }

    /// Its name, as it was written.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Where it is: what its name says, unless it is [elsewhere](Self::at).
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Whether the node of one is that of the other, with whatever share of the keys.
    pub(super) fn is_same_place(&self, other: &Self) -> bool {
        let of = |spec: &Self| (spec.name.clone(), spec.address.clone(), spec.protocol);
        of(self) == of(other)
    }

    fn ring_node(&self) -> RingNode<'_> {
        let name = match self.identity.host_and_port() {
            Some((host, port)) => NodeName::Tcp { host, port },
            None => NodeName::Unix(&self.name),
        };
        RingNode {
            name,
            weight: self.weight,
        }
    }
}

impl Ring {
    /// The index of the node that `key` belongs to, for tools and tests; `None` if there are no
    /// nodes. It builds the whole ring each time.
    #[must_use]
    pub fn node_of(&self, nodes: &[NodeSpec], key: &Key) -> Option<usize> {
        (!nodes.is_empty()).then(|| self.place(nodes).primary(key.as_bytes()))
    }

    pub(crate) fn place(&self, nodes: &[NodeSpec]) -> Continuum {
        let nodes: Vec<_> = nodes.iter().map(NodeSpec::ring_node).collect();
        self.build(&nodes)
    }

    /// A number for what decides where keys go: this ring, and the names and weights of the nodes.
    /// Wherever it is the same, for the same crate or another version of it, on any machine, the same
    /// key goes to the node of the same name; where it differs some keys do not, or might not when a
    /// node is out.
    ///
    /// Addresses do not count, nor does a default port that is written or not; of weights only their
    /// proportion does. Neither does the order of the nodes, as a rule: of a hundred nodes in 97 cases of
    /// a hundred. In the others two of them have a point of the ring in common, and whose the few keys
    /// there are depends on which comes first. 0 stands for no nodes. It builds the whole ring each time.
    ///
    /// It is less than 2^53, so that what passes it on as a floating-point number (metrics, JSON)
    /// passes on all of it.
    ///
    /// ```
    /// use tower_memcached::{NodeSpec, Ring};
    ///
    /// let nodes = |names: [&str; 2]| names.map(|name| NodeSpec::new(name).unwrap());
    /// let one = Ring::default().fingerprint(&nodes(["cache-a", "cache-b"]));
    /// let other = Ring::default().fingerprint(&nodes(["cache-b:11211", "cache-a"]));
    /// assert_eq!(one, other);
    /// assert_ne!(one, Ring::default().fingerprint(&nodes(["cache-a", "cache-c"])));
    /// ```
    #[must_use]
    pub fn fingerprint(&self, nodes: &[NodeSpec]) -> u64 {
        if nodes.is_empty() {
            return 0;
        }
        let divisor = nodes.iter().fold(0, |gcd, node| divisor(gcd, node.weight));
        let mut lines: Vec<_> = nodes
            .iter()
            .map(|node| format!("{} {}\n", node.identity, node.weight / divisor.max(1)))
            .collect();
        lines.sort_unstable();
        let mut text = format!("{}\n", self.label());
        for line in lines {
            text.push_str(&line);
        }
        // Whose a point is that several nodes have, the order of the list says.
        let ring: Vec<_> = nodes.iter().map(NodeSpec::ring_node).collect();
        for (hash, node) in self.build(&ring).shared_points() {
            let _infallible = writeln!(text, "{hash} {}", nodes[node].identity);
        }
        // FNV-1a of 64 bits, folded.
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        ((hash >> 53) ^ (hash & ((1 << 53) - 1))).max(1)
    }
}

/// The greatest common divisor; the other of the two if one is 0.
fn divisor(a: u32, b: u32) -> u32 {
    match b {
        0 => a,
        _ => divisor(b, a % b),
    }
}

/// Refuses lists that cannot be what the user means.
pub(crate) fn validate(specs: &[NodeSpec]) -> Result<(), Invalid> {
    let refuse = |why: &'static str| Err(Invalid::new("nodes", why));
    if specs.is_empty() {
        return refuse("there are no nodes");
    }
    let mut names = HashSet::with_capacity(specs.len());
    let mut addresses = HashSet::with_capacity(specs.len());
    if specs.len() > usize::from(u16::MAX) {
        return refuse("there are more than 65,535");
    }
    for (index, spec) in specs.iter().enumerate() {
        let name = &spec.name;
        let refuse = |why| Err(Invalid::new(format!("nodes[{index}]"), why));
        if spec.weight == 0 {
            return refuse(format!("{name:?} has the weight 0"));
        }
        if !names.insert(&spec.identity) {
            return refuse(format!("{name:?} is there twice"));
        }
        if !addresses.insert(&spec.address) {
            let address = &spec.address;
            return refuse(format!("{name:?} is at {address}, where another is"));
        }
    }
    Ok(())
}

/// How many former layouts are remembered.
pub(super) const FORMERS: usize = 8;

/// How many keys are remembered that were to be written before there were nodes: as many as of a node
/// that is out, by default.
const WRITTEN_NOWHERE: usize = 100_000;

#[derive(Debug)]
pub(super) struct Topology<S> {
    members: Box<[Member<S>]>,
    layout: Layout,
    /// Others that there were before, the latest first. What was written under these may still be
    /// where it was written.
    formers: Box<[Layout]>,
    /// Where there are no nodes yet: what they have to forget once they are found.
    nowhere: Option<Arc<Book>>,
}

#[derive(Debug)]
pub(super) struct Member<S> {
    pub(super) spec: NodeSpec,
    pub(super) node: Node<S>,
}

impl<S> Topology<S> {
    pub(super) fn new(ring: &Ring, members: Vec<Member<S>>) -> Self {
        Self {
            layout: Layout::new(ring, &members),
            nowhere: members
                .is_empty()
                .then(|| Arc::new(Book::new(WRITTEN_NOWHERE))),
            members: members.into(),
            formers: Box::default(),
        }
    }

    /// What comes after this one, laid out like that.
    pub(super) fn followed_by(&self, layout: Layout, members: Vec<Member<S>>) -> Self {
        let formers = std::iter::once(&self.layout).chain(&self.formers);
        let formers = formers
            .map(Layout::up_to_date)
            .filter(|former| !former.servers.is_empty() && !former.is_same(&layout));
        Self {
            nowhere: None,
            formers: formers.take(FORMERS).collect(),
            members: members.into(),
            layout,
        }
    }

    pub(super) fn members(&self) -> &[Member<S>] {
        &self.members
    }

    pub(super) fn is_made_of(&self, specs: &[NodeSpec]) -> bool {
        let members = self.members.iter().map(|member| &member.spec);
        members.eq(specs)
    }

    /// A key is written while there are no nodes: it is not, but nobody must read it as it was.
    pub(super) fn note(&self, key: &Key) {
        if let Some(nowhere) = &self.nowhere {
            nowhere.outdate(key, Reason::Outdated);
        }
    }

    /// What was written while there were no nodes.
    pub(super) fn nowhere(&self) -> Option<&Arc<Book>> {
        self.nowhere.as_ref()
    }

    /// What is known of the server at `address`, if it is one of the nodes, or was lately.
    pub(super) fn book_of(&self, address: &Address) -> Option<&Arc<Book>> {
        let layouts = std::iter::once(&self.layout).chain(&self.formers);
        let mut servers = layouts.flat_map(|layout| &layout.servers);
        servers
            .find(|server| server.address == *address)
            .map(|server| &server.book)
    }

    /// What is known of the server that was the node of that name, if one is, or was lately.
    pub(super) fn book_of_name(&self, spec: &NodeSpec) -> Option<&Arc<Book>> {
        let layouts = std::iter::once(&self.layout).chain(&self.formers);
        let mut servers = layouts.flat_map(|layout| &layout.servers);
        servers
            .find(|server| server.identity == spec.identity)
            .map(|server| &server.book)
    }

    /// The node at `address`.
    pub(super) fn at(&self, address: &Address) -> Option<&Node<S>> {
        let mut members = self.members.iter();
        let member = members.find(|member| member.spec.address == *address);
        member.map(|member| &member.node)
    }

    /// The key's own node; `None` if there are no nodes yet.
    pub(super) fn home(&self, key: &Key) -> Option<&Node<S>> {
        self.members
            .get(self.layout.home(key))
            .map(|member| &member.node)
    }

    /// The nodes that a key goes to, one after the other: its home, and then wherever the ring goes
    /// on to when that is out.
    pub(super) fn sequence<'a>(&'a self, key: &'a Key) -> impl Iterator<Item = &'a Node<S>> {
        let indexes = self.layout.continuum.sequence(key.as_bytes());
        indexes.map(|index| &self.members[index].node)
    }

    /// Of a key that is to be written at `node`, or nowhere: the servers that it went to when other
    /// nodes were there must not answer with what they got then. These are its home in each former
    /// layout and, if that was out lately, those after it.
    pub(super) fn outdate_former(&self, key: &Key, node: &NodeShared) {
        for former in &self.formers {
            for index in former.continuum.sequence(key.as_bytes()) {
                let book = &former.servers[index].book;
                if !Arc::ptr_eq(book, node.book()) {
                    book.outdate_sparing(key, Reason::Outdated, Some(node.book()));
                }
                if !book.may_be_elsewhere(key) {
                    break;
                }
            }
        }
    }

    /// Everything is being flushed: what servers have that are none of the nodes now goes, too, before
    /// they are asked again.
    pub(super) fn flush_former(&self) {
        let servers = self.formers.iter().flat_map(|former| &former.servers);
        servers.for_each(|server| server.book.flush_if_away());
    }

    /// Whether more nodes are out than others may stand in for.
    pub(super) fn too_many_open(&self, max_ejection_percent: u32) -> bool {
        let open = self.members.iter().filter(|member| member.node.is_open());
        let allowed = self.members.len() as u64 * u64::from(max_ejection_percent) / 100;
        open.count() as u64 > allowed
    }
}

/// Which servers there are and what is whose.
#[derive(Debug)]
pub(super) struct Layout {
    continuum: Arc<Continuum>,
    /// As the continuum counts them.
    servers: Box<[Server]>,
}

#[derive(Clone, Debug)]
struct Server {
    /// The node's name, as the ring knows it.
    identity: Address,
    address: Address,
    book: Arc<Book>,
}

impl Layout {
    pub(super) fn new<S>(ring: &Ring, members: &[Member<S>]) -> Self {
        let nodes: Vec<_> = members
            .iter()
            .map(|member| member.spec.ring_node())
            .collect();
        let server = |member: &Member<S>| Server {
            identity: member.spec.identity.clone(),
            address: member.spec.address.clone(),
            book: member.node.shared().book().clone(),
        };
        Self {
            continuum: Arc::new(ring.build(&nodes)),
            servers: members.iter().map(server).collect(),
        }
    }

    /// The index of the key's own node.
    pub(super) fn home(&self, key: &Key) -> usize {
        self.continuum.primary(key.as_bytes())
    }

    /// The same, with the books that are kept now.
    fn up_to_date(&self) -> Self {
        let server = |server: &Server| Server {
            identity: server.identity.clone(),
            address: server.address.clone(),
            book: server.book.current(),
        };
        Self {
            continuum: self.continuum.clone(),
            servers: self.servers.iter().map(server).collect(),
        }
    }

    /// Whether every key has the same servers in the same order.
    fn is_same(&self, other: &Self) -> bool {
        let is_same = |mine: usize, theirs: usize| {
            Arc::ptr_eq(&self.servers[mine].book, &other.servers[theirs].book)
        };
        self.servers.len() == other.servers.len()
            && self.continuum.is_same(&other.continuum, is_same)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::executor::Executor;
    use crate::node::NodeSettings;
    use crate::request::Request;
    use crate::response::Response;
    use tower::util::BoxCloneSyncService;

    type Service = BoxCloneSyncService<Request, Response, Error>;

    fn member(number: usize, weight: u32) -> Member<Service> {
        let never = tower::service_fn(|_: Request| std::future::pending());
        let spec = NodeSpec::new(&format!("node-{number}")).unwrap();
        let service = BoxCloneSyncService::new(never);
        let settings = NodeSettings::default();
        let node = Node::new(spec.name.clone(), service, settings, &Executor::current());
        Member {
            spec: spec.with_weight(weight),
            node: node.unwrap(),
        }
    }

    fn again(member: &Member<Service>, weight: u32) -> Member<Service> {
        Member {
            spec: member.spec.clone().with_weight(weight),
            node: member.node.clone(),
        }
    }

    fn followed_by(
        before: &Topology<Service>,
        ring: &Ring,
        members: Vec<Member<Service>>,
    ) -> Topology<Service> {
        before.followed_by(Layout::new(ring, &members), members)
    }

    #[test]
    fn lists_that_come_and_go_are_remembered_once() {
        let ring = Ring::default();
        let all: Vec<_> = (0..4).map(|number| member(number, 1)).collect();
        let of = |places: &[usize], weight| -> Vec<_> {
            let member = |&place: &usize| again(&all[place], weight);
            places.iter().map(member).collect()
        };
        let mut topology = Topology::new(&ring, of(&[0, 1], 1));
        for _ in 0..20 {
            // The same in another order, and with weights in the same proportion.
            for (places, weight) in [(&[0, 1, 2][..], 1), (&[2, 1, 0], 2), (&[1, 0], 3)] {
                topology = followed_by(&topology, &ring, of(places, weight));
            }
        }
        assert_eq!(topology.formers.len(), 1);
        assert_eq!(topology.formers[0].servers.len(), 3);
        for number in 4..100 {
            let mut members = of(&[0, 1], 1);
            members.push(member(number, 1));
            topology = followed_by(&topology, &ring, members);
        }
        assert_eq!(topology.formers.len(), FORMERS);
        assert!(topology.book_of(&"node-2".parse().unwrap()).is_none());
        assert!(topology.book_of(&"node-98".parse().unwrap()).is_some());
    }

    const LIBMEMCACHED: u64 = 7_585_177_067_546_827;
    const SPYMEMCACHED: u64 = 6_905_330_347_500_247;

    fn specs(names: &[(&str, u32)]) -> Vec<NodeSpec> {
        let spec = |(name, weight): &(&str, u32)| NodeSpec::new(name).unwrap().with_weight(*weight);
        names.iter().map(spec).collect()
    }

    /// Other versions of this crate, and other machines, have to come to the same.
    #[test]
    fn a_fingerprint_is_the_same_for_ever() {
        let nodes = specs(&[("cache-b:11212", 3), ("cache-a", 1), ("unix:/run/m", 1)]);
        assert_eq!(Ring::libmemcached().fingerprint(&nodes), LIBMEMCACHED);
        assert_eq!(Ring::spymemcached().fingerprint(&nodes), SPYMEMCACHED);
        assert_eq!(Ring::libmemcached().fingerprint(&[]), 0);
    }

    #[test]
    fn a_fingerprint_tells_what_decides_where_keys_go_and_nothing_else() {
        let ring = Ring::default();
        let of = |names: &[(&str, u32)]| ring.fingerprint(&specs(names));
        let one = of(&[("a", 1), ("b", 2)]);
        assert!(one > 0 && one < 1 << 53);
        assert_eq!(one, of(&[("b:11211", 2), ("a", 1)]));
        assert_eq!(one, of(&[("a", 3), ("b", 6)]));
        let moved: Vec<_> = specs(&[("a", 1), ("b", 2)])
            .into_iter()
            .map(|spec| {
                let address = format!("10.0.0.{}", spec.weight);
                spec.at(&address).unwrap()
            })
            .collect();
        assert_eq!(one, ring.fingerprint(&moved));
        for other in [
            &[("a", 1), ("b", 1)][..],
            &[("a", 2), ("b", 1)],
            &[("a", 1), ("c", 2)],
            &[("a", 1), ("b:11212", 2)],
            &[("a", 1)],
            &[("a", 1), ("b", 2), ("c", 1)],
        ] {
            assert_ne!(one, of(other), "{other:?}");
        }
        let nodes = specs(&[("a", 1), ("b", 2)]);
        assert_ne!(one, Ring::spymemcached().fingerprint(&nodes));
    }

    #[test]
    fn where_the_order_of_the_nodes_counts_a_fingerprint_tells() {
        // One in ten of such lists has two nodes on one point.
        let mut lists = (0..).map(|list| -> Vec<_> {
            let names = (1..200).map(|node| format!("10.0.{list}.{node}:5"));
            names.map(|name| NodeSpec::new(&name).unwrap()).collect()
        });
        let shared = |nodes: &Vec<NodeSpec>| {
            let nodes: Vec<_> = nodes.iter().map(NodeSpec::ring_node).collect();
            let ring = Ring::libmemcached().build(&nodes);
            ring.shared_points().count() > 0
        };
        let nodes = lists.find(shared).unwrap();
        let reversed: Vec<_> = nodes.iter().rev().cloned().collect();
        for ring in [Ring::libmemcached(), Ring::spymemcached()] {
            assert_ne!(ring.fingerprint(&nodes), ring.fingerprint(&reversed));
        }
    }

    #[test]
    fn books_that_have_moved_are_followed_and_do_not_pile_up() {
        let ring = Ring::default();
        let stays = member(0, 1);
        let mut topology = Topology::new(&ring, vec![again(&stays, 1), member(1, 1)]);
        let first = topology.members()[1].node.shared().book().clone();
        for _ in 0..20 {
            topology = followed_by(&topology, &ring, vec![again(&stays, 1)]);
            let back = member(1, 1);
            let book = topology.book_of(&back.spec.address).unwrap();
            back.node.shared().take_over(book);
            topology = followed_by(&topology, &ring, vec![again(&stays, 1), back]);
        }
        assert_eq!(topology.formers.len(), 1);
        let last = topology.members()[1].node.shared().book().clone();
        assert!(Arc::ptr_eq(&first.current(), &last));
        let key = Key::new("k").unwrap();
        first.outdate(&key, Reason::Outdated);
        assert!(topology.members()[1].node.shared().is_outdated(&key));
    }
}
