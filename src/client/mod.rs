//! The typed façade over a stack of layers.
//!
//! A [`Client`] turns each operation into a [`Request`], stamps its deadline on it, drives the
//! service to its end or to the deadline, and turns the [`Response`] back (`operations.rs`,
//! `claim.rs`).
//! [`ClientBuilder`] puts the default stack together (`builder.rs`).

mod builder;
mod claim;
mod events;
mod multi_get;
mod operate;
mod operations;
mod reconfigure;
mod shutdown;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use tower::util::BoxCloneSyncService;
use tower::{Layer, Service, ServiceExt as _};

pub use builder::ClientBuilder;
pub use claim::{Claim, OnFailure};
pub use multi_get::{MultiGet, Outcome};

use self::operate::Operate;
use self::reconfigure::{Declared, Reconfigure};
use crate::cluster::{Cluster, Control, NodeSpec};
#[cfg(feature = "serde")]
use crate::compression::CompressionSettings;
use crate::config::Config;
use crate::discovery::{Discovery, DiscoveryStatus};
use crate::error::{BoxError, Error, Invalid, Result};
use crate::executor::{AtomicDuration, Spawner};
use crate::group::{Group, GroupStatus};
use crate::kill_switch::KillSwitch;
use crate::node::NodeStatus;
use crate::read_through::{Engine, LoadGuard, Means, ReadThroughSettings};
use crate::request::Request;
use crate::response::{Response, misfit};
use crate::shutdown::shut_down;
use crate::transport::{Connector, Transport};

/// The stack that [`ClientBuilder::build`] makes when no layers are added.
pub type DefaultService = Cluster<Transport>;

/// The service of a [`Client::boxed`].
pub type BoxedService = BoxCloneSyncService<Request, Response, BoxError>;

/// A memcached client.
///
/// `Clone + Send + Sync` and cheap to clone; clones share connections, breakers and single
/// flights. Everything stops when the last clone is dropped: tasks, threads and sockets.
///
/// # Deadlines
/// Every operation ends within [`ClientBuilder::timeout`], whatever the network, the servers or a
/// layer do; [`get_or_load`](Self::get_or_load) may take its load timeout longer.
///
/// # Cancel safety
/// Every operation may be dropped at any await point: nothing leaks, and the connection stays in
/// step. A write that was dropped may or may not have been executed.
///
/// # Errors
/// [`Error::kind`] and [`Error::sent`] tell what to do next. A miss is not an error.
///
/// ```no_run
/// # async fn example() -> Result<(), tower_memcached::Error> {
/// use tower_memcached::{Client, Ttl};
///
/// let client = Client::builder().nodes(["10.0.0.1:11211", "10.0.0.2"]).build()?;
/// client.set("greeting", "hello", Ttl::secs(60)).await?;
/// assert_eq!(client.get("greeting").await?.as_deref(), Some(&b"hello"[..]));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Client<S = DefaultService> {
    service: S,
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    timeout: Arc<AtomicDuration>,
    /// There are no layers of the user's, nor a service.
    is_bare: bool,
    spawner: Option<Spawner>,
    cluster: Option<Arc<dyn Control>>,
    reads: Arc<Engine>,
    kill_switch: Option<KillSwitch>,
    groups: Arc<[Declared]>,
    live: Option<Arc<dyn Reconfigure>>,
    connector: Option<Arc<dyn Connector>>,
}

impl Client {
    /// Starts the configuration of a client.
    #[must_use]
    pub fn builder() -> ClientBuilder {
        ClientBuilder::new()
    }
}

impl<S> Client<S> {
    /// A client over a stack built by hand. Its [`nodes`](Self::nodes) are none, and the timeout
    /// is 100 ms unless changed ([`with_timeout`](Self::with_timeout)).
    pub fn from_service(service: S) -> Self {
        Self::assemble(service, Shared::default())
    }

    pub(crate) fn assemble(service: S, shared: Shared) -> Self {
        Self {
            service,
            shared: Arc::new(shared),
        }
    }

    /// The same client with another timeout for each operation; the connections are shared.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if it is zero.
    pub fn with_timeout(self, timeout: Duration) -> Result<Self> {
        if timeout.is_zero() {
            return Err(Error::configuration("the timeout is zero"));
        }
        let shared = Shared {
            timeout: Arc::new(AtomicDuration::new(timeout)),
            ..self.shared.again()
        };
        Ok(Self::assemble(self.service, shared))
    }

    /// The same client with other settings for what it loads, such as a functional group's; the
    /// connections are shared. So are loads under way: who joins one of the other's gets what comes of
    /// it, within the other's limits.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration), naming the setting that makes no sense.
    pub fn with_read_through(self, mut settings: ReadThroughSettings) -> Result<Self> {
        settings.validate()?;
        if let Some(name) = settings.database_name() {
            let guard = self.load_guard(name);
            let unknown = || Invalid::new("database", format!("there is no {name:?}"));
            settings = settings.clone().guard(guard.ok_or_else(unknown)?);
        }
        let shared = Shared {
            reads: self.shared.reads.with_settings(settings),
            ..self.shared.again()
        };
        Ok(Self::assemble(self.service, shared))
    }

    /// The same client with a layer around it, such as a functional group
    /// ([`GroupLayer`](crate::GroupLayer)); the connections are shared.
    pub fn layer<L>(&self, layer: L) -> Client<L::Service>
    where
        L: Layer<S>,
        S: Clone,
    {
        let shared = Shared {
            // The same key may mean something else behind the layer.
            reads: self.shared.reads.again(),
            groups: self.shared.groups.iter().map(Declared::again).collect(),
            is_bare: false,
            ..self.shared.again()
        };
        let tracker = self.shared.reads.tracker();
        let service = tracker.layering(|| layer.layer(self.service.clone()));
        Client::assemble(service, shared)
    }

    /// The same client with a type that can be named whatever its layers are, for one allocation
    /// a call.
    pub fn boxed(&self) -> Client<BoxedService>
    where
        S: Service<Request, Response = Response> + Clone + Send + Sync + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send,
    {
        let service = self.service.clone().map_err(Into::into);
        Client {
            service: BoxCloneSyncService::new(service),
            shared: self.shared.clone(),
        }
    }

    /// A functional group that was declared in the [builder](ClientBuilder::group): the same client for
    /// its keys, within its limits. As cheap as a clone; all that are had by one name are the same group.
    ///
    /// A group's loads are its own: the same key read through the client and through the group is loaded
    /// twice. Without a prefix its keys are the client's; then what the one invalidates is not given out by
    /// the other only with [leases](crate::ReadThroughSettings::leases), the default. Give groups prefixes.
    ///
    /// [`set_nodes`](Self::set_nodes) of a group is for one with nodes of its own, and
    /// [`shutdown`](Self::shutdown) ends the whole client.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if there is none of that
    /// name.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_memcached::{Client, FailureMode, GroupSettings};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), tower_memcached::Error> {
    /// let sessions = GroupSettings::default()
    ///     .prefix("session:")
    ///     .timeout(Duration::from_millis(20))
    ///     .max_in_flight(200)
    ///     .failure_mode(FailureMode::Cancel);
    /// let client = Client::builder()
    ///     .nodes(["127.0.0.1"])
    ///     .group("sessions", sessions)
    ///     .build()?;
    /// let sessions = client.group("sessions")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn group(&self, name: &str) -> Result<Client<Group<S>>>
    where
        S: Clone,
    {
        let mut groups = self.shared.groups.iter();
        let Some(declared) = groups.find(|declared| declared.is(name)) else {
            let message = format!("there is no group {name:?}");
            return Err(Error::configuration(message));
        };
        let shared = Shared {
            cluster: Some(declared.cluster.clone()),
            reads: declared.reads.clone(),
            kill_switch: Some(declared.group.kill_switch().clone()),
            // Groups are not nested.
            groups: Arc::new([]),
            ..self.shared.again()
        };
        let service = Group::new(self.service.clone(), declared.group.clone());
        Ok(Client::assemble(service, shared))
    }

    /// What each of the [declared](ClientBuilder::group) groups does now.
    #[must_use]
    pub fn groups(&self) -> Vec<GroupStatus> {
        let groups = self.shared.groups.iter();
        groups.map(|declared| declared.group.status()).collect()
    }

    /// Stops this client, its clones and all its groups from using the cache; of a
    /// [`group`](Self::group), that group. `None` for a client made [`from_service`](Self::from_service).
    #[must_use]
    pub fn kill_switch(&self) -> Option<&KillSwitch> {
        self.shared.kill_switch.as_ref()
    }

    /// The guard of a [database](ClientBuilder::database); `None` if there is none of that name.
    #[must_use]
    pub fn load_guard(&self, name: &str) -> Option<LoadGuard> {
        self.shared.live.as_ref()?.load_guard(name)
    }

    /// Takes other settings, at once and for all clones and groups: time-outs, limits, rates, failure
    /// modes, breakers, probes, kill switches, nodes and weights. Requests under way go on by those they
    /// began with, and none is dropped; places in queues, breakers, journals, and what retry budgets and
    /// unchanged rates have counted stay.
    ///
    /// Everything is as `config` says, the default where it says nothing; a kill switch that was thrown
    /// by hand too. Only the nodes stay if it has none, also those of a group (`nodes = []`); and the
    /// client's guard where it names no database, which then is that of groups without one, too.
    /// Clients made by [`with_timeout`](Self::with_timeout) and
    /// [`with_read_through`](Self::with_read_through) keep what they were made with, and so does a
    /// [`ReadThroughLayer`](crate::ReadThroughLayer).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration), and everything stays as
    /// it was: naming the setting that makes no sense, or the one that cannot be changed while the
    /// client runs. Those are `executor`, `load_executor`, `discovery`, `ring`, `connections`, `max_value_size`,
    /// `journal.capacity`, which groups and databases there are, and of a group the prefix and whether it
    /// has nodes of its own. Also for a client made [`from_service`](Self::from_service).
    /// [`ErrorKind::Shutdown`](crate::ErrorKind::Shutdown) once it is being [shut down](Self::shutdown);
    /// [`ErrorKind::Overloaded`](crate::ErrorKind::Overloaded) while somebody else reconfigures it.
    pub fn reconfigure(&self, config: Config) -> Result<()> {
        if self.shared.reads.tracker().refuses() {
            return Err(shut_down());
        }
        match &self.shared.live {
            Some(live) => live.reconfigure(config),
            None => Err(Error::configuration("this client's service is not ours")),
        }
    }

    /// The compression in force.
    #[cfg(feature = "serde")]
    pub(crate) fn compression(&self) -> Option<Arc<CompressionSettings>> {
        self.shared.reads.compression().get()
    }

    /// What the client believes of each of its nodes; none for a client made
    /// [`from_service`](Self::from_service).
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeStatus> {
        let cluster = self.shared.cluster.as_ref();
        cluster.map_or_else(Vec::new, |cluster| cluster.nodes())
    }

    /// What decides where this client's keys go, or a group's with nodes of its own, as a number: the ring,
    /// and the names and weights of the nodes ([`Ring::fingerprint`](crate::Ring::fingerprint)). Two
    /// services that share a cache look for the same key on different nodes unless they have the same
    /// one. It is in [`NodeStatus::ring`] and in the metric
    /// [`memcached_ring_fingerprint`](crate::telemetry::RING_FINGERPRINT), too.
    ///
    /// 0 while there are no nodes, and for a client made [`from_service`](Self::from_service).
    #[must_use]
    pub fn ring_fingerprint(&self) -> u64 {
        let cluster = self.shared.cluster.as_ref();
        cluster.map_or(0, |cluster| cluster.ring_fingerprint())
    }

    /// Each node's status, whenever its circuit breaker has changed its state; first of all, what
    /// each is now. For logs and dashboards.
    ///
    /// Like a `watch` channel it tells the latest: of states that follow each other faster than the
    /// stream is polled only the last is told. It does not keep the client alive, and ends with it;
    /// for a client made [`from_service`](Self::from_service) at once.
    ///
    /// ```no_run
    /// # async fn example(client: tower_memcached::Client) {
    /// use futures::StreamExt as _;
    ///
    /// let mut events = client.node_events();
    /// tokio::spawn(async move {
    ///     while let Some(status) = events.next().await {
    ///         println!("{} is {:?}: {:?}", status.node, status.state, status.cause);
    ///     }
    /// });
    /// # }
    /// ```
    pub fn node_events(&self) -> impl Stream<Item = NodeStatus> + Send + Unpin + use<S> {
        Box::pin(events::of(self.shared.cluster.as_ref()))
    }

    /// Replaces the nodes, at once for all clones. Only the keys move that the ring says must. A node
    /// that stays, by name and address, keeps its connections and its breaker, whatever its weight
    /// becomes.
    ///
    /// A node that is taken out gets no more requests. What it has been sent ends there, within an
    /// attempt's time; what was queued for it, and who waits for it, goes where its key belongs now.
    /// Then its connections and tasks are gone, after an attempt's time at the latest.
    ///
    /// # What may not be read any more
    /// A key that moves and comes back is not read as it was before it moved, if this client has
    /// changed it since; nor is it from a server that comes back into the list. For that the last
    /// eight other lists are remembered (a list that comes and goes counts once), and as many keys
    /// for each server as its journal holds. While there are any, each write of a key that belonged
    /// to another node in one of them deletes it there, too.
    ///
    /// A server of which its journal could not hold all comes back with its circuit breaker open, as
    /// after an outage: see [`JournalOverflow`](crate::JournalOverflow).
    ///
    /// A [discovery](Self::follow) that was followed is not any more.
    ///
    /// Not known is what a server got as part of a list that has been forgotten, or before this
    /// process began, and that two addresses are one server's. Flush such a server before you add it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if an address is none, there are no nodes or one is
    /// there twice, or the client was made [`from_service`](Self::from_service);
    /// [`ErrorKind::Shutdown`](crate::ErrorKind::Shutdown) once it is being [shut down](Self::shutdown).
    pub fn set_nodes<I>(&self, nodes: I) -> Result<()>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let specs = nodes.into_iter().map(|node| NodeSpec::new(node.as_ref()));
        self.set_node_specs(specs.collect::<Result<_>>()?)
    }

    /// [`set_nodes`](Self::set_nodes) with weights.
    ///
    /// # Errors
    /// As for `set_nodes`.
    pub fn set_node_specs(&self, specs: Vec<NodeSpec>) -> Result<()> {
        if self.shared.reads.tracker().refuses() {
            return Err(shut_down());
        }
        match &self.shared.cluster {
            Some(cluster) => cluster.set_nodes(specs),
            None => Err(Error::configuration("this client's service has no nodes")),
        }
    }

    /// Has the nodes be what a [discovery] finds, from now on and for all clones; of a
    /// [`group`](Self::group) with nodes of its own, that group's. Whoever comes last counts: another
    /// discovery, or nodes that are set by hand, take the place of this one.
    ///
    /// It runs on the client's executor. With [`Executor::current`](crate::Executor::current), outside
    /// of every runtime, it begins with the first request inside of one.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if a setting of it is
    /// zero, or the client was made [`from_service`](Self::from_service), or is a group that shares the
    /// client's nodes; [`ErrorKind::Shutdown`](crate::ErrorKind::Shutdown) once it is being
    /// [shut down](Self::shutdown). What it fails to find is told by [`discovery`](Self::discovery).
    ///
    /// [discovery]: crate::discovery
    pub fn follow(&self, discovery: Discovery) -> Result<()> {
        if self.shared.reads.tracker().refuses() {
            return Err(shut_down());
        }
        match (&self.shared.cluster, &self.shared.connector) {
            (Some(cluster), Some(connector)) => cluster.follow(discovery, connector.clone()),
            _ => Err(Error::configuration("this client's service has no nodes")),
        }
    }

    /// How the discovery does that the client, or the group with nodes of its own, follows, or the last
    /// one that it followed; `None` if there was none.
    #[must_use]
    pub fn discovery(&self) -> Option<DiscoveryStatus> {
        self.shared.cluster.as_ref()?.discovery()
    }
}

impl Shared {
    /// The same once more, to be changed in part.
    fn again(&self) -> Self {
        Self {
            timeout: self.timeout.clone(),
            is_bare: self.is_bare,
            spawner: self.spawner.clone(),
            cluster: self.cluster.clone(),
            reads: self.reads.clone(),
            kill_switch: self.kill_switch.clone(),
            groups: self.groups.clone(),
            live: self.live.clone(),
            connector: self.connector.clone(),
        }
    }
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            timeout: Arc::new(AtomicDuration::new(Duration::from_millis(100))),
            is_bare: false,
            spawner: None,
            cluster: None,
            reads: Engine::new(ReadThroughSettings::default(), Means::default()),
            kill_switch: None,
            groups: Arc::new([]),
            live: None,
            connector: None,
        }
    }
}

impl<S> Client<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    /// Sends any [`Request`], under this client's deadline or the request's own, if that is
    /// earlier.
    ///
    /// # Errors
    /// As the operation's; [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) at the deadline.
    #[inline]
    pub fn call(&self, request: Request) -> impl Future<Output = Result<Response>> + use<'_, S> {
        Operate::new(&self.shared, self.service.clone(), request, true)
    }

    /// The same as a part of an operation that is counted.
    fn perform(&self, request: Request) -> Operate<'_, S> {
        Operate::new(&self.shared, self.service.clone(), request, false)
    }
}

impl<S> fmt::Debug for Client<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("timeout", &self.shared.timeout.get())
            .field("nodes", &self.nodes())
            .finish_non_exhaustive()
    }
}
