//! Where a request for a key goes now, and what the other nodes have to forget because of it.
//!
//! A key's home answers for it unless its breaker is open, it has not taken the key back yet, or it
//! may hold something older than what this client has written. With redistribution the next node on
//! the ring that has none of these troubles answers instead.
//!
//! Three rules keep an old value from being read (guarantee G7). A write that lands anywhere is
//! entered first in the journal of every node before that on the key's way round the ring, for
//! these will be asked again once they are back. And of every node behind it that may have answered
//! for the key lately, for it may be asked again in the next outage. And of every server that was
//! the key's home when there were other nodes, or stood in for that lately, for these may be again.

use super::topology::Topology;
use super::{FailureMode, Shared, Tries};
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::node::{Admission, Node, Reason, Shared as NodeShared};
use crate::request::{Operation, Origin, Purpose, Request};
use crate::response::{CasOutcome, Response};
use crate::telemetry::Event;

/// Of a request that comes before the first nodes have been found.
pub(super) fn no_nodes() -> Error {
    let message = "discovery has found no nodes yet";
    Error::new(ErrorKind::NodeUnavailable, message)
}

/// What became of placing a request.
pub(super) enum Placed<T> {
    At(T),
    /// No node has to be asked, or none can be.
    Settled(Result<Response>),
}

/// What is to be placed.
#[derive(Clone, Copy)]
pub(super) struct Errand<'a> {
    pub(super) key: &'a Key,
    pub(super) operation: &'a Operation,
    /// It puts back what was loaded: nothing has changed, and nobody has to forget anything.
    refills: bool,
}

impl<'a> Errand<'a> {
    /// `None` if it has no key to be placed by.
    pub(super) fn of(request: &'a Request) -> Option<Self> {
        Some(Self {
            key: request.operation().key()?,
            operation: request.operation(),
            refills: request.purpose() == Purpose::Refill,
        })
    }

    /// One key of a multi-key read.
    pub(super) fn read(key: &'a Key, operation: &'a Operation) -> Self {
        Self {
            key,
            operation,
            refills: false,
        }
    }

    /// Whether another node than its home may do it. What was loaded goes where a lookup would go;
    /// if that is not the node whose token it has, it is refused there.
    fn is_movable(&self) -> bool {
        self.operation.is_movable() || self.refills
    }

    /// Whether what it does leaves something behind that has a TTL.
    fn lasts(&self) -> bool {
        self.operation.lasts() || self.refills
    }

    /// The key, if an older value of it must not be read after this.
    fn written(&self) -> Option<&'a Key> {
        self.operation.written().filter(|_| !self.refills)
    }

    fn changes(&self) -> bool {
        self.operation.changes() && !self.refills
    }
}

/// What a node is to a key now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It answers for it.
    Good,
    /// It is out.
    Out,
    /// It is back, but has not taken this key back yet.
    Deferred,
    /// What it has for it may be old.
    Outdated,
}

fn standing<S>(node: &Node<S>, key: &Key) -> Standing {
    let node = node.shared();
    if node.is_untroubled() {
        return Standing::Good;
    }
    match node.admits(key) {
        Admission::Refused => Standing::Out,
        // Deferred or not: it is not asked where nobody else can be, either.
        _ if node.is_outdated(key) => Standing::Outdated,
        Admission::Deferred => Standing::Deferred,
        Admission::Admitted => Standing::Good,
    }
}

/// The nodes before `node` on a key's way round the ring.
fn before<'a, S>(
    topology: &'a Topology<S>,
    key: &'a Key,
    node: &'a NodeShared,
) -> impl Iterator<Item = &'a Node<S>> {
    let sequence = topology.sequence(key);
    sequence.take_while(|other| other.shared().id() != node.id())
}

impl<S> Shared<S> {
    /// Hands the node that a new request for `key` goes to, and as whose request, to `start`.
    pub(super) fn first<T>(
        &self,
        errand: Errand<'_>,
        start: impl FnOnce(&Node<S>, Origin) -> T,
    ) -> Placed<T> {
        let topology = self.topology();
        let Some(home) = topology.home(errand.key) else {
            self.forget_everywhere(&topology, errand);
            return Placed::Settled(Err(no_nodes()));
        };
        let standing = standing(home, errand.key);
        if standing == Standing::Good {
            self.forget_elsewhere(&topology, errand, home);
            return Placed::At(start(home, Origin::Home));
        }
        // Nobody may ask it for a long time, so whether it is seen to is looked to here.
        home.shared().ensure_kept();
        let redistributes = self.settings.load().failure_mode == FailureMode::Redistribute;
        let too_many = redistributes && self.too_many_open(&topology);
        let refuge = (redistributes && !too_many)
            .then(|| self.refuge(&topology, errand, &[]))
            .flatten();
        if let Some(refuge) = refuge
            && errand.is_movable()
        {
            self.move_to(&topology, errand, refuge);
            return Placed::At(start(refuge, Origin::Moved));
        }
        let unavailable = |why: &'static str| {
            let error = Error::new(ErrorKind::NodeUnavailable, why);
            Placed::Settled(Err(error.at_node(home.name())))
        };
        if standing == Standing::Outdated
            && let Some(miss) = errand.operation.miss()
        {
            return Placed::Settled(Ok(miss));
        }
        match standing {
            Standing::Out if too_many && errand.is_movable() => {
                self.forget_everywhere(&topology, errand);
                unavailable("it is out, and more nodes are than others may stand in for")
            }
            // An open home refuses it at once; what then happens is a matter of the failure mode.
            Standing::Out => {
                self.forget_everywhere(&topology, errand);
                Placed::At(start(home, Origin::Home))
            }
            // It must not succeed beside an original that it cannot see.
            Standing::Deferred if refuge.is_some() && errand.operation.is_add() => {
                unavailable("it is back, but not yet for this key")
            }
            // The value that it is to take the place of is as good as gone.
            Standing::Outdated if errand.operation.is_swap() => {
                Placed::Settled(Ok(Response::Swapped(CasOutcome::Exists)))
            }
            Standing::Outdated if !errand.operation.is_movable() => {
                unavailable("what it has for this key is old, and being deleted")
            }
            Standing::Good | Standing::Deferred | Standing::Outdated => {
                self.forget_elsewhere(&topology, errand, home);
                Placed::At(start(home, Origin::Home))
            }
        }
    }

    /// The same for a request that has failed at the nodes in `tries`; `None` if there is no
    /// other node for it, or the budget does not pay for going there.
    pub(super) fn next<T>(
        &self,
        errand: Errand<'_>,
        tries: &Tries,
        paid: bool,
        start: impl FnOnce(&Node<S>, Origin) -> T,
    ) -> Option<T> {
        let topology = self.topology();
        if self.too_many_open(&topology) {
            return None;
        }
        let home = topology.home(errand.key)?;
        // The topology may have changed, and the key's home with it.
        if !tries.spent.contains(&home.shared().id())
            && standing(home, errand.key) == Standing::Good
        {
            if paid && !self.pay(home.shared()) {
                return None;
            }
            self.forget_elsewhere(&topology, errand, home);
            return Some(start(home, Origin::Home));
        }
        let refuge = self.refuge(&topology, errand, &tries.spent)?;
        if paid && !self.pay(home.shared()) {
            return None;
        }
        self.move_to(&topology, errand, refuge);
        Some(start(refuge, Origin::Moved))
    }

    fn too_many_open(&self, topology: &Topology<S>) -> bool {
        topology.too_many_open(self.settings.load().max_ejection_percent)
    }

    /// The node, other than its home, that answers for a key.
    fn refuge<'a>(
        &self,
        topology: &'a Topology<S>,
        errand: Errand<'a>,
        spent: &[u64],
    ) -> Option<&'a Node<S>> {
        let stands = |good: fn(Standing) -> bool| {
            let mut others = topology.sequence(errand.key).skip(1);
            others.find(|node| {
                !spent.contains(&node.shared().id()) && good(standing(node, errand.key))
            })
        };
        let good = stands(|standing| standing == Standing::Good);
        // What is written whatever was there may be deleted again: it will be a miss.
        good.or_else(|| {
            let blind = errand.operation.is_blind();
            stands(|standing| standing == Standing::Outdated).filter(|_| blind)
        })
    }

    /// What is done before a request goes to a node that is not its key's home.
    fn move_to(&self, topology: &Topology<S>, errand: Errand<'_>, refuge: &Node<S>) {
        if let Some(home) = topology.home(errand.key) {
            home.shared().count(Event::Failover);
        }
        self.leave_at(topology, errand, refuge.shared());
        if let Some(key) = errand.written() {
            for node in before(topology, key, refuge.shared()) {
                node.shared().outdate(key, Reason::Outdated);
            }
        }
        self.forget_elsewhere(topology, errand, refuge);
    }

    /// What has been written on a node that is not its key's home lives from now on.
    pub(super) fn moved(&self, errand: Errand<'_>, to: &NodeShared) {
        self.leave_at(&self.topology(), errand, to);
    }

    /// The nodes that a request has gone past remember that something of its key is at `to`.
    fn leave_at(&self, topology: &Topology<S>, errand: Errand<'_>, to: &NodeShared) {
        if errand.lasts() {
            for node in before(topology, errand.key, to) {
                let lifetime = self.settings.load().failover_ttl;
                node.shared().left_elsewhere(errand.key, lifetime);
            }
        }
    }

    /// The nodes besides `node` that may have answered for the key lately: those that it went to
    /// when there were others, and those behind it on its way, for in the next outage they must not
    /// answer with what they got in the last one.
    fn forget_elsewhere(&self, topology: &Topology<S>, errand: Errand<'_>, node: &Node<S>) {
        if !errand.changes() {
            return;
        }
        topology.outdate_former(errand.key, node.shared());
        if !node.shared().may_be_elsewhere(errand.key) {
            return;
        }
        let behind = topology.sequence(errand.key);
        let behind = behind.skip_while(|other| other.shared().id() != node.shared().id());
        for other in behind.skip(1) {
            other.shared().outdate(errand.key, Reason::Outdated);
            if !other.shared().may_be_elsewhere(errand.key) {
                break;
            }
        }
    }

    /// Of a write that is not made.
    pub(super) fn take_note(&self, request: &Request) {
        if let Some(errand) = Errand::of(request) {
            self.forget_everywhere(&self.topology(), errand);
        }
    }

    /// A write that no node is asked for.
    fn forget_everywhere(&self, topology: &Topology<S>, errand: Errand<'_>) {
        if let Some(key) = errand.written() {
            let Some(home) = topology.home(key) else {
                topology.note(key);
                return;
            };
            // Nothing else may be asked of it for long.
            home.shared().ensure_kept();
            home.shared().outdate(errand.key, Reason::Outdated);
            self.forget_elsewhere(topology, errand, home);
        }
    }
}
