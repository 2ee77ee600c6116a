//! Many nodes as one cache: which node a key belongs to, and what happens when that node fails.
//!
//! [`Ring`] says where a key belongs. [`FailureMode`] says what becomes of a request whose node
//! is out. `route.rs` is the path of one request: choose, attempt, and on failure decide once, in
//! [`Shared::after`], whether to give up, to go to another node, or to wait for the same one.

mod budget;
mod hedge;
mod many;
mod place;
pub(crate) mod ring;
mod route;
mod shutdown;
mod topology;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use futures::future::BoxFuture;
use tokio::sync::watch;
use tower::Service;

use budget::Budget;
pub use budget::RetryBudget;
pub use ring::Ring;
pub use route::ClusterFuture;
use shutdown::Phase;
pub use topology::NodeSpec;
pub(crate) use topology::validate;
use topology::{Layout, Member, Topology};

use crate::discovery::{Discovery, DiscoveryStatus, Following, Target, drive};
use crate::error::{BoxError, Error, ErrorKind, Invalid, Result, Sent, not_zero};
use crate::executor::{Executor, Spawner};
use crate::kill_switch::{KillSwitch, bypass, noted, spares};
use crate::node::{
    BreakerState, EjectionCause, Node, NodeSettings, NodeStatus, Shared as NodeShared,
};
use crate::request::{Operation, Purpose, Request};
use crate::response::Response;
use crate::shutdown::{UnflushedJournal, Until, shut_down};
use crate::telemetry::{Event, RingMark};
use crate::transport::{Connector, PipelinedSettings};

/// What becomes of requests whose node's circuit breaker is open, and of attempts that fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum FailureMode {
    /// They go, at once, to the next healthy node on the ring for their key, if they may be moved
    /// ([`Operation::is_movable`]); otherwise they fail. What they write there lives at most for
    /// the failover TTL.
    #[default]
    Redistribute,
    /// They fail at once, unsent.
    Cancel,
    /// They wait for the same node, with jittered exponential backoff, until it is back or their
    /// deadline has passed.
    Retry,
}

/// The settings of a [`Cluster`].
#[derive(Clone, Debug)]
pub struct ClusterSettings {
    pub(crate) ring: Ring,
    pub(crate) failure_mode: FailureMode,
    pub(crate) failover_ttl: Duration,
    pub(crate) max_attempts: u32,
    pub(crate) retry_budget: RetryBudget,
    pub(crate) max_ejection_percent: u32,
    pub(crate) hedged_gets: bool,
}

impl Default for ClusterSettings {
    fn default() -> Self {
        Self {
            ring: Ring::default(),
            failure_mode: FailureMode::default(),
            failover_ttl: Duration::from_secs(60),
            max_attempts: 3,
            retry_budget: RetryBudget::default(),
            max_ejection_percent: 50,
            hedged_gets: false,
        }
    }
}

impl ClusterSettings {
    /// How keys are laid out over nodes; [`Ring::libmemcached`] by default.
    #[must_use]
    pub fn ring(mut self, ring: Ring) -> Self {
        self.ring = ring;
        self
    }

    /// [`FailureMode::Redistribute`] by default.
    #[must_use]
    pub fn failure_mode(mut self, mode: FailureMode) -> Self {
        self.failure_mode = mode;
        self
    }

    /// How long a value may live on a node that is not its own; 60 s by default.
    #[must_use]
    pub fn failover_ttl(mut self, ttl: Duration) -> Self {
        self.failover_ttl = ttl;
        self
    }

    /// How many attempts a request may make; 3 by default. In [`FailureMode::Retry`] only those
    /// count that were sent.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts;
        self
    }

    /// What all retries and failovers together may add; 20 % of requests plus 10 a second by
    /// default.
    #[must_use]
    pub fn retry_budget(mut self, budget: RetryBudget) -> Self {
        self.retry_budget = budget;
        self
    }

    /// With more than this share of the nodes out, rounded down, nothing is redistributed any more,
    /// lest the others go the same way: requests for nodes that are out fail at once. 50 % by
    /// default: 2 of 4 or 5, 1 of 2 or 3. A single node has nowhere to go to anyway.
    #[must_use]
    pub fn max_ejection_percent(mut self, percent: u32) -> Self {
        self.max_ejection_percent = percent;
        self
    }

    /// Whether a get that takes longer than 95 % of them is sent once more over another connection
    /// of the same node, and the first answer taken; not by default. It spends the retry budget,
    /// and needs at least two connections to a node. It helps where one of the server's threads, or
    /// one connection, is slow.
    #[must_use]
    pub fn hedged_gets(mut self, hedged: bool) -> Self {
        self.hedged_gets = hedged;
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        not_zero("max_attempts", self.max_attempts == 0)?;
        not_zero("failover_ttl", self.failover_ttl.is_zero())
    }
}

/// Makes the node of a specification.
pub(crate) type NodeFactory<S> = Arc<dyn Fn(&NodeSpec) -> Node<S> + Send + Sync>;

/// How one functional group's requests are sent.
pub(crate) struct GroupRoute {
    pub(crate) name: Arc<str>,
    pub(crate) settings: ClusterSettings,
    /// Nodes of its own; the cluster's if there are none.
    pub(crate) nodes: Option<Vec<NodeSpec>>,
}

/// Nodes, and where keys belong among them.
struct Pool<S> {
    topology: ArcSwap<Topology<S>>,
    /// Held while it is being replaced.
    replacing: Mutex<()>,
    retired: Mutex<Vec<Weak<NodeShared>>>,
    ring: Ring,
    /// What shows whether others have the same ring.
    mark: Arc<RingMark>,
    /// Where the nodes come from, unless they are set by hand.
    following: Arc<Following>,
    /// Starts to follow a discovery once there is a runtime to do that in.
    unstarted: Unstarted,
    factory: NodeFactory<S>,
    /// Told whenever a node's state changes, or the nodes do, of any pool of the cluster.
    changes: watch::Sender<()>,
    /// True once the cluster is shut down, and gone with it: not held by anything else.
    closing: watch::Sender<bool>,
}

/// How requests are sent to the nodes of a pool, by whom they are.
struct Shared<S> {
    pool: Arc<Pool<S>>,
    settings: ArcSwap<ClusterSettings>,
    /// Of these what every request looks at.
    hedges: AtomicBool,
    budget: Budget,
    spawner: Spawner,
    phase: Arc<Phase>,
    /// The routes of functional groups: [`Request::route`] from 1 on.
    groups: Vec<Arc<Self>>,
    /// That of the whole cluster.
    kill_switch: KillSwitch,
}

impl<S> Pool<S> {
    fn new(
        name: Arc<str>,
        ring: Ring,
        specs: Vec<NodeSpec>,
        factory: NodeFactory<S>,
        changes: watch::Sender<()>,
    ) -> Self {
        let closing = watch::Sender::new(false);
        let following = Arc::new(Following::new(name.clone()));
        let mark = Arc::new(RingMark::new(name));
        mark.set(ring.fingerprint(&specs));
        mark.show();
        let members = specs
            .into_iter()
            .map(|spec| {
                let node = factory(&spec);
                node.report_to(&changes);
                node.shared().is_on(&mark);
                node.shared().lingers_until(closing.subscribe());
                Member { node, spec }
            })
            .collect();
        Self {
            topology: ArcSwap::from_pointee(Topology::new(&ring, members)),
            replacing: Mutex::default(),
            retired: Mutex::default(),
            ring,
            mark,
            following,
            unstarted: Unstarted::default(),
            factory,
            changes,
            closing,
        }
    }
}

impl<S> Pool<S> {
    fn nodes(&self) -> Vec<NodeStatus> {
        let topology = self.topology.load();
        let members = topology.members().iter();
        members.map(|member| member.node.status()).collect()
    }

    /// Those that have been removed and still end what was sent there.
    fn retired(&self) -> Vec<Arc<NodeShared>> {
        let retired = self.retired.lock();
        let retired = retired.unwrap_or_else(PoisonError::into_inner);
        retired.iter().filter_map(Weak::upgrade).collect()
    }
}

impl<S: Clone> Pool<S> {
    /// By hand, or as found by the discovery whose turn that is. Says whether they have changed.
    fn set_nodes(&self, specs: &[NodeSpec], turn: Option<u64>) -> bool {
        if turn.is_none() {
            self.following.next_turn();
        }
        let (before, after) = {
            let replacing = self.replacing.lock();
            let _replacing = replacing.unwrap_or_else(PoisonError::into_inner);
            let current = self.topology.load_full();
            let outrun = turn.is_some_and(|turn| !self.following.is_turn_of(turn));
            if outrun || current.is_made_of(specs) {
                return false;
            }
            let member = |spec: &NodeSpec| Member {
                node: Self::known(&current, spec).unwrap_or_else(|| {
                    let node = (self.factory)(spec);
                    node.report_to(&self.changes);
                    node.shared().is_on(&self.mark);
                    node.shared().lingers_until(self.closing.subscribe());
                    node
                }),
                spec: spec.clone(),
            };
            let members: Vec<_> = specs.iter().map(member).collect();
            // What takes long first: from here on requests for a server that gets another node wait.
            let layout = Layout::new(&self.ring, &members);
            for Member { node, spec } in &members {
                let Some(book) = current.book_of(&spec.address) else {
                    continue;
                };
                if !Arc::ptr_eq(book, node.shared().book()) {
                    // With its book goes what tells the former node what it must not answer with.
                    if let Some(former) = current.at(&spec.address) {
                        former.shared().retire();
                    }
                    node.shared().take_over(book);
                }
            }
            // What is at another address now may be the same server, with what it had, or another one.
            // And what was to be written before there were nodes is, as ever, the key's home's to forget.
            for (index, Member { node, spec }) in members.iter().enumerate() {
                if let Some(former) = current.book_of_name(spec) {
                    node.shared().inherit(former, |_| true);
                }
                if let Some(nowhere) = current.nowhere() {
                    node.shared()
                        .inherit(nowhere, |key| layout.home(key) == index);
                }
            }
            self.mark.set(self.ring.fingerprint(specs));
            let next = Arc::new(current.followed_by(layout, members));
            (self.topology.swap(next.clone()), next)
        };
        self.mark.show();
        for member in before.members() {
            let id = member.node.shared().id();
            let mut kept = after.members().iter();
            if !kept.any(|kept| kept.node.shared().id() == id) {
                member.node.shared().retire();
                let retired = self.retired.lock();
                let mut retired = retired.unwrap_or_else(PoisonError::into_inner);
                retired.retain(|node| node.strong_count() > 0);
                retired.push(Arc::downgrade(member.node.shared()));
            }
        }
        self.changes.send_replace(());
        true
    }

    /// The node that stays.
    fn known(current: &Topology<S>, spec: &NodeSpec) -> Option<Node<S>> {
        let mut members = current.members().iter();
        let known = members.find(|known| known.spec.is_same_place(spec));
        known.map(|known| known.node.clone())
    }
}

/// A task that waits for a runtime to run in.
#[derive(Default)]
struct Unstarted {
    is_there: AtomicBool,
    task: Mutex<Option<BoxFuture<'static, ()>>>,
}

impl Unstarted {
    #[inline]
    fn is_there(&self) -> bool {
        self.is_there.load(Ordering::Acquire)
    }

    fn put(&self, task: BoxFuture<'static, ()>) {
        let before = self.lock().replace(task);
        self.is_there.store(true, Ordering::Release);
        drop(before);
    }

    fn start(&self, spawner: &Spawner) {
        if spawner.handle().is_err() {
            return;
        }
        let task = {
            let mut task = self.lock();
            self.is_there.store(false, Ordering::Release);
            task.take()
        };
        if let Some(task) = task {
            // There is a runtime. One that is shut down drops the task.
            let _spawned = spawner.spawn(task);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<BoxFuture<'static, ()>>> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> Shared<S> {
    fn apply(&self, settings: ClusterSettings) {
        self.budget.apply(settings.retry_budget);
        self.hedges.store(settings.hedged_gets, Ordering::Relaxed);
        self.settings.store(Arc::new(settings));
    }

    fn topology(&self) -> Guard<Arc<Topology<S>>> {
        self.pool.topology.load()
    }
}

/// A cluster of [`Node`]s: routing, failure modes and the retry budget.
///
/// A cheap handle; clones share everything.
///
/// # Readiness
/// `poll_ready` is always ready, because the node to be ready is known only with the key. What
/// cannot be taken now is an immediate typed error from `call`'s future.
///
/// # Cancel safety
/// Dropping a [`ClusterFuture`] drops the attempt it is making; nothing is left behind.
pub struct Cluster<S> {
    shared: Arc<Shared<S>>,
}

impl<S> Clone for Cluster<S> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
        }
    }
}

impl<S> fmt::Debug for Cluster<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("settings", &self.shared.settings.load())
            .finish_non_exhaustive()
    }
}

impl<S> Cluster<S> {
    /// A cluster of the nodes that `factory` makes of `specs`. It is kept, for nodes that come
    /// later ([`set_nodes`](Self::set_nodes)): it must make a new node each time, and not itself
    /// replace the nodes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`] if there are no nodes, one is there twice or has the
    /// weight 0, or a setting is zero.
    pub fn new(
        settings: ClusterSettings,
        specs: Vec<NodeSpec>,
        executor: &Executor,
        factory: impl Fn(&NodeSpec) -> Node<S> + Send + Sync + 'static,
    ) -> Result<Self> {
        topology::validate(&specs)?;
        let factory = Arc::new(factory);
        Self::from_factory(settings, specs, Vec::new(), executor.start()?, factory)
    }

    /// The first nodes, which have been validated, may be none: then they have yet to be found.
    pub(crate) fn from_factory(
        settings: ClusterSettings,
        specs: Vec<NodeSpec>,
        groups: Vec<GroupRoute>,
        spawner: Spawner,
        factory: NodeFactory<S>,
    ) -> Result<Self> {
        let phase = Arc::<Phase>::default();
        let changes = watch::Sender::new(());
        let kill_switch = KillSwitch::default();
        let pool = |name: Arc<str>, settings: &ClusterSettings, specs: Vec<NodeSpec>| {
            let (ring, factory) = (settings.ring.clone(), factory.clone());
            let pool = Pool::new(name, ring, specs, factory, changes.clone());
            Ok::<_, Error>(Arc::new(pool))
        };
        let route = |settings: ClusterSettings, pool, groups| {
            settings.validate()?;
            Ok::<_, Error>(Arc::new(Shared {
                pool,
                budget: Budget::new(settings.retry_budget),
                hedges: AtomicBool::new(settings.hedged_gets),
                settings: ArcSwap::from_pointee(settings),
                spawner: spawner.clone(),
                phase: phase.clone(),
                groups,
                kill_switch: kill_switch.clone(),
            }))
        };
        let main = pool("client".into(), &settings, specs)?;
        let groups = groups.into_iter().map(|group| {
            let pool = match group.nodes {
                Some(specs) => {
                    topology::validate(&specs)?;
                    pool(group.name, &group.settings, specs)?
                }
                None => main.clone(),
            };
            route(group.settings, pool, Vec::new())
        });
        let groups = groups.collect::<Result<_>>()?;
        Ok(Self {
            shared: route(settings, main, groups)?,
        })
    }

    /// Other settings from now on, for the cluster and its groups, in their order. The ring stays.
    pub(crate) fn apply(&self, settings: ClusterSettings, groups: Vec<ClusterSettings>) {
        self.shared.apply(settings);
        for (shared, settings) in self.shared.groups.iter().zip(groups) {
            shared.apply(settings);
        }
    }

    /// The same for every node; those that come later are made with them.
    pub(crate) fn apply_to_nodes(&self, node: &NodeSettings, transport: &PipelinedSettings) {
        for pool in self.pools() {
            let replacing = pool.replacing.lock();
            let _replacing = replacing.unwrap_or_else(PoisonError::into_inner);
            for member in pool.topology.load().members() {
                let (node, transport) = (node.clone(), transport.clone());
                member.node.shared().apply(node, transport);
            }
        }
    }

    /// The way of requests with that [`Request::route`].
    fn route(&self, route: u32) -> &Arc<Shared<S>> {
        let group = (route as usize).checked_sub(1);
        let group = group.and_then(|group| self.shared.groups.get(group));
        group.unwrap_or(&self.shared)
    }

    /// Each pool of nodes once.
    fn pools(&self) -> impl Iterator<Item = &Arc<Pool<S>>> {
        let main = &self.shared.pool;
        let own = self.shared.groups.iter().map(|group| &group.pool);
        std::iter::once(main).chain(own.filter(move |pool| !Arc::ptr_eq(pool, main)))
    }

    /// Stops the whole cluster from being used, its groups included.
    #[must_use]
    pub fn kill_switch(&self) -> &KillSwitch {
        &self.shared.kill_switch
    }

    /// Replaces the nodes, as [`Client::set_nodes`](crate::Client::set_nodes) says. One with the same
    /// name and address as before stays the node that it is.
    ///
    /// # Errors
    /// As for [`Cluster::new`]; the nodes then stay as they were.
    pub fn set_nodes(&self, specs: Vec<NodeSpec>) -> Result<()>
    where
        S: Clone,
    {
        self.set_nodes_of(0, specs)
    }

    /// Replaces the nodes of the cluster, unless they are to stay, and those that its groups have of
    /// their own, in the groups' order.
    pub(crate) fn set_all_nodes(
        &self,
        nodes: Option<Vec<NodeSpec>>,
        own: Vec<Option<Vec<NodeSpec>>>,
    ) -> Result<()>
    where
        S: Clone,
    {
        let of_groups = (1..).zip(own);
        for (route, nodes) in std::iter::once((0, nodes)).chain(of_groups) {
            if let Some(nodes) = nodes {
                self.set_nodes_of(route, nodes)?;
            }
        }
        Ok(())
    }

    fn set_nodes_of(&self, route: u32, specs: Vec<NodeSpec>) -> Result<()>
    where
        S: Clone,
    {
        self.replace_nodes(route, &specs, None).map(|_| ())
    }

    fn replace_nodes(&self, route: u32, specs: &[NodeSpec], turn: Option<u64>) -> Result<bool>
    where
        S: Clone,
    {
        topology::validate(specs)?;
        if self.shared.phase.has_begun() {
            return Err(shut_down());
        }
        let changed = self.route(route).pool.set_nodes(specs, turn);
        if self.shared.phase.is_closed() {
            // Those that are new as well.
            self.close();
        }
        Ok(changed)
    }

    /// What decides where its keys go, as a number: see
    /// [`Client::ring_fingerprint`](crate::Client::ring_fingerprint).
    #[must_use]
    pub fn ring_fingerprint(&self) -> u64 {
        self.shared.pool.mark.get()
    }

    /// What is believed of each node now, those that functional groups have of their own included.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeStatus> {
        self.pools().flat_map(|pool| pool.nodes()).collect()
    }
}

/// What a [`Client`](crate::Client) can do with its cluster besides sending requests, whatever
/// its nodes are made of.
pub(crate) trait Control: Send + Sync {
    fn nodes(&self) -> Vec<NodeStatus>;
    fn set_nodes(&self, specs: Vec<NodeSpec>) -> Result<()>;
    fn ring_fingerprint(&self) -> u64;
    /// Its nodes are what a discovery finds from now on.
    fn follow(&self, discovery: Discovery, connector: Arc<dyn Connector>) -> Result<()>;
    /// What the discovery whose turn that is has found. Says whether anything has changed.
    fn set_found(&self, specs: Vec<NodeSpec>, turn: u64) -> Result<bool>;
    fn discovery(&self) -> Option<DiscoveryStatus>;
    /// The nodes that are out because they cannot be connected to, or say nothing.
    fn unreachable(&self) -> BTreeSet<Arc<str>>;
    /// The parts of a shutdown that are the cluster's, for whoever takes no new requests.
    fn settled(&self, until: Until) -> BoxFuture<'_, ()>;
    fn delete_once_more(&self) -> BoxFuture<'_, ()>;
    fn unflushed(&self) -> Vec<UnflushedJournal>;
    fn close(&self);
    fn changes(&self) -> watch::Receiver<()>;
}

/// A cluster as the client sees it, or one of its groups.
pub(crate) struct View<S> {
    pub(crate) cluster: Cluster<S>,
    /// [`Request::route`]
    pub(crate) route: u32,
}

impl<S> View<S> {
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`] if these are the nodes of the whole client.
    fn own(&self) -> Result<&Arc<Pool<S>>> {
        let pool = &self.cluster.route(self.route).pool;
        if self.route > 0 && Arc::ptr_eq(pool, &self.cluster.shared.pool) {
            let message = "this group has no nodes of its own: it shares the client's";
            return Err(Error::configuration(message));
        }
        Ok(pool)
    }
}

impl<S: Clone + Send + Sync + 'static> Control for View<S> {
    fn nodes(&self) -> Vec<NodeStatus> {
        match self.route {
            0 => self.cluster.nodes(),
            group => self.cluster.route(group).pool.nodes(),
        }
    }

    fn set_nodes(&self, specs: Vec<NodeSpec>) -> Result<()> {
        self.own()?;
        self.cluster.set_nodes_of(self.route, specs)
    }

    fn follow(&self, discovery: Discovery, connector: Arc<dyn Connector>) -> Result<()> {
        discovery.validate()?;
        let pool = self.own()?;
        let (weak, route) = (Arc::downgrade(&self.cluster.shared), self.route);
        let upgrade = move || -> Option<Arc<dyn Control>> {
            let cluster = Cluster {
                shared: weak.upgrade()?,
            };
            Some(Arc::new(Self { cluster, route }))
        };
        let target = Target {
            upgrade: Box::new(upgrade),
            closing: pool.closing.subscribe(),
            changes: pool.changes.subscribe(),
            following: pool.following.clone(),
        };
        pool.unstarted
            .put(Box::pin(drive(target, discovery, connector)));
        pool.unstarted.start(&self.cluster.shared.spawner);
        Ok(())
    }

    fn set_found(&self, specs: Vec<NodeSpec>, turn: u64) -> Result<bool> {
        self.cluster.replace_nodes(self.route, &specs, Some(turn))
    }

    fn discovery(&self) -> Option<DiscoveryStatus> {
        self.cluster.route(self.route).pool.following.status()
    }

    fn unreachable(&self) -> BTreeSet<Arc<str>> {
        let nodes = self.cluster.route(self.route).pool.nodes().into_iter();
        let unreachable = nodes.filter(|node| {
            use EjectionCause::{ConnectFailed, Probe, Refused, Unresponsive};
            let cannot = matches!(
                node.cause,
                Some(Refused | ConnectFailed | Unresponsive | Probe)
            );
            node.state != BreakerState::Closed && cannot
        });
        unreachable.map(|node| node.node).collect()
    }

    fn ring_fingerprint(&self) -> u64 {
        self.cluster.route(self.route).pool.mark.get()
    }

    fn settled(&self, until: Until) -> BoxFuture<'_, ()> {
        Box::pin(self.cluster.settled(until))
    }

    fn delete_once_more(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.cluster.delete_once_more())
    }

    fn unflushed(&self) -> Vec<UnflushedJournal> {
        self.cluster.unflushed()
    }

    fn close(&self) {
        self.cluster.close();
    }

    fn changes(&self) -> watch::Receiver<()> {
        self.cluster.shared.pool.changes.subscribe()
    }
}

impl<S> Service<Request> for Cluster<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = Error;
    type Future = ClusterFuture<S>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> ClusterFuture<S> {
        let shared = self.route(request.route());
        if shared.pool.unstarted.is_there() {
            shared.pool.unstarted.start(&shared.spawner);
        }
        if shared.phase.refuses(&request) {
            return ClusterFuture::settled(Err(shut_down()));
        }
        if request.purpose() == Purpose::Note {
            shared.take_note(&request);
            return ClusterFuture::settled(Err(noted()));
        }
        if shared.kill_switch.is_thrown() && !spares(&request) {
            let bypassed = bypass(&request, "client", "the client");
            if bypassed.noted {
                shared.take_note(&request);
            }
            return ClusterFuture::settled(bypassed.answer);
        }
        shared.budget.deposit();
        match request.operation() {
            Operation::GetMany { .. } => ClusterFuture::many(shared, request),
            Operation::Version | Operation::FlushAll | Operation::Stats => {
                // Those that groups have of their own included.
                let own = shared.groups.iter().map(|group| &group.pool);
                let own = own.filter(|pool| !Arc::ptr_eq(pool, &shared.pool));
                ClusterFuture::every(std::iter::once(&shared.pool).chain(own), request)
            }
            _ => ClusterFuture::single(shared, request),
        }
    }
}

/// What is known of a request that has failed somewhere.
#[derive(Clone, Debug)]
struct Tries {
    /// Whether any of its attempts may have been executed.
    sent: Sent,
    /// Nodes not to go to again, by their id.
    spent: Vec<u64>,
    /// Attempts that may have reached a node.
    attempts: u32,
    /// Waits in a row, for the backoff.
    waits: u32,
    /// It was sent to its home a second time because a connection was lost under it.
    repeated: bool,
}

impl Default for Tries {
    fn default() -> Self {
        Self {
            sent: Sent::No,
            spent: Vec::new(),
            attempts: 0,
            waits: 0,
            repeated: false,
        }
    }
}

/// What to do after a failed attempt.
enum After {
    GiveUp,
    /// Go to another node than those spent, if there is one and the budget, where it must pay for
    /// that, has something left.
    Move {
        paid: bool,
    },
    /// The same again, after a while; or once the node is back.
    Wait(Option<Duration>),
}

/// The first wait in [`FailureMode::Retry`] is up to this, doubled each time: full jitter, so that
/// those who failed together do not come back together.
const FIRST_WAIT: Duration = Duration::from_millis(10);
const LONGEST_WAIT: Duration = Duration::from_secs(1);
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

impl<S> Shared<S> {
    /// Decides, once for every kind of request, what becomes of one whose attempt at `node`
    /// failed with `error`.
    fn after(
        &self,
        operation: &Operation,
        node: &NodeShared,
        error: &Error,
        tries: &mut Tries,
    ) -> After {
        use ErrorKind::{
            ConnectionFailed, ConnectionLost, Layer, NodeUnavailable, Protocol, Shutdown, Timeout,
            Unauthenticated, Unresponsive,
        };
        tries.sent = tries.sent.max(error.sent());
        let unsent = error.sent() == Sent::No;
        let kind = error.kind();
        if node.is_closed() {
            return After::GiveUp;
        }
        if node.is_retired() && unsent && matches!(kind, NodeUnavailable | Shutdown) {
            // It was not asked, and will not be: the request goes where its key belongs now.
            return After::Wait(Some(Duration::ZERO));
        }
        let failed_there = matches!(
            kind,
            Timeout
                | ConnectionFailed
                | Unauthenticated
                | ConnectionLost
                | Unresponsive
                | NodeUnavailable
                | Protocol
        ) || kind == Layer;
        if !failed_there {
            return After::GiveUp;
        }
        let settings = self.settings.load();
        let waits = settings.failure_mode == FailureMode::Retry && unsent;
        if kind != NodeUnavailable && !waits {
            tries.attempts += 1;
        }
        if tries.attempts >= settings.max_attempts {
            return After::GiveUp;
        }
        let open = node.is_open();
        // The connection is gone, not the node: once more over the next connection. That is safe
        // for what may run twice, and for what never left.
        if kind == ConnectionLost && !open && !tries.repeated && (operation.is_movable() || unsent)
        {
            // Once each, and all of them at once: a budget would only leave some of them behind.
            tries.repeated = true;
            node.count(Event::Retry);
            return After::Wait(Some(Duration::ZERO));
        }
        match settings.failure_mode {
            FailureMode::Cancel => After::GiveUp,
            FailureMode::Redistribute => {
                if !operation.is_movable() {
                    return After::GiveUp;
                }
                tries.spent.push(node.id());
                // What is moved because its node has opened is not a retry.
                After::Move { paid: !open }
            }
            FailureMode::Retry => {
                if !operation.is_movable() && !unsent {
                    return After::GiveUp;
                }
                if !unsent && !self.pay(node) {
                    return After::GiveUp;
                }
                if open {
                    return After::Wait(None);
                }
                let longest = FIRST_WAIT
                    .saturating_mul(1 << tries.waits.min(16))
                    .min(LONGEST_WAIT);
                tries.waits += 1;
                node.count(Event::Retry);
                After::Wait(Some(longest.mul_f64(fastrand::f64()).max(SHORTEST_WAIT)))
            }
        }
    }

    fn pay(&self, node: &NodeShared) -> bool {
        let paid = self.budget.withdraw();
        if !paid {
            node.count(Event::BudgetExhausted);
        }
        paid
    }
}
