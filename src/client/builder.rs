//! The default stack, put together: the picture in the crate's documentation, as code.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use tower::layer::util::{Identity, Stack};
use tower::{Layer, Service};

use super::reconfigure::{Declared, Guards, Live};
use super::{Client, Shared};
use crate::cluster::{Cluster, Control, FailureMode, NodeSpec, RetryBudget, Ring, View};
use crate::compression::{CompressionSettings, Slot};
use crate::config::{Config, ExecutorConfig, GroupPlan, NodeConfig};
use crate::discovery::Discovery;
use crate::error::{BoxError, Invalid, Result};
use crate::executor::{AtomicDuration, Executor};
use crate::group::{self, GroupSettings};
use crate::node::{BreakerSettings, JournalSettings, Node, ProbeSettings};
use crate::read_through::{Engine, LoadLimits, Means, ReadThroughSettings};
use crate::request::Request;
use crate::response::Response;
use crate::shutdown::Tracker;
#[cfg(feature = "tls")]
use crate::transport::TlsConnector;
use crate::transport::{
    Connector, Credentials, Parts, Protocol, SocketSettings, SystemConnector, TlsSettings,
    Transport,
};

/// Configures and builds a [`Client`]. Nothing is checked, opened or started before
/// [`build`](Self::build).
pub struct ClientBuilder<L = Identity, N = Identity> {
    config: Config,
    /// Goes over that of `read_through`.
    load_timeout: Option<Duration>,
    /// Goes over the configuration's.
    executor: Option<Executor>,
    /// The same.
    load_executor: Option<Executor>,
    /// Instead of our own.
    connector: Option<Arc<dyn Connector>>,
    discovery: Option<Discovery>,
    layer: L,
    node_layer: N,
    /// A user's node layer may wait without end, so attempts are timed around it.
    times_attempts: bool,
    /// There are layers around the whole client.
    is_layered: bool,
}

impl ClientBuilder {
    pub(super) fn new() -> Self {
        Self {
            config: Config::default(),
            load_timeout: None,
            executor: None,
            load_executor: None,
            connector: None,
            discovery: None,
            layer: Identity::new(),
            node_layer: Identity::new(),
            times_attempts: false,
            is_layered: false,
        }
    }
}

impl<L, N> ClientBuilder<L, N> {
    /// Takes all settings from a [`Config`]. What the builder was told before of the same is
    /// forgotten; executors, connectors, discoveries and layers stay.
    #[must_use]
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self.load_timeout = None;
        self
    }

    /// Adds nodes: `host`, `host:port`, `[v6]:port` or `unix:/path`; the port is 11211 by default.
    /// What is written here is the node's name on the ring.
    #[must_use]
    pub fn nodes<I>(mut self, nodes: I) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let nodes = nodes.into_iter();
        let nodes = nodes.map(|node| NodeConfig::new(node.as_ref()));
        self.config.nodes.extend(nodes);
        self
    }

    /// Adds a node with a share of the keys in proportion to its weight; 1 is usual.
    #[must_use]
    pub fn weighted_node(mut self, node: impl AsRef<str>, weight: u32) -> Self {
        let node = NodeConfig::new(node.as_ref()).with_weight(weight);
        self.config.nodes.push(node);
        self
    }

    /// How long a whole operation may take, all attempts together; 100 ms by default.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.config.timeout = timeout;
        self
    }

    /// How long one attempt at one node may take; 30 ms by default, and never more than the
    /// timeout. The stall and connect timeouts are twice this unless set.
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.config.attempt_timeout = timeout;
        self
    }

    /// How [`Client::get_or_load`] loads what the cache does not have.
    #[must_use]
    pub fn read_through(mut self, settings: ReadThroughSettings) -> Self {
        self.config.read_through = settings;
        self
    }

    /// Declares a database that values are loaded from, and what it can bear. Settings refer to it by
    /// its name ([`ReadThroughSettings::database`]), so that all who load from it share one
    /// [`LoadGuard`](crate::LoadGuard): [`Client::load_guard`].
    #[must_use]
    pub fn database(mut self, name: impl Into<String>, limits: LoadLimits) -> Self {
        self.config.databases.insert(name.into(), limits);
        self
    }

    /// Declares a functional group, to be had from [`Client::group`].
    #[must_use]
    pub fn group(mut self, name: impl Into<String>, settings: GroupSettings) -> Self {
        self.config.groups.insert(name.into(), settings);
        self
    }

    /// How long [`Client::get_or_load`] may take to load, with all waiting for others; 1 s by default
    /// ([`ReadThroughSettings::load_timeout`], over which it goes).
    #[must_use]
    pub fn load_timeout(mut self, timeout: Duration) -> Self {
        self.load_timeout = Some(timeout);
        self
    }

    /// How many time-outs in a row close a connection, if their requests were sent over at least an
    /// attempt timeout; 3 by default. The connection is made anew at once; if that fails too, or
    /// the new one answers nothing either, the node's circuit breaker opens.
    #[must_use]
    pub fn consecutive_timeouts(mut self, timeouts: u32) -> Self {
        self.config.breaker = self.config.breaker.consecutive_timeouts(timeouts);
        self
    }

    /// When a node's circuit breaker opens, and how the node comes back.
    #[must_use]
    pub fn breaker(mut self, breaker: BreakerSettings) -> Self {
        self.config.breaker = breaker;
        self
    }

    /// What is remembered of keys that were written while a node could not be told.
    #[must_use]
    pub fn journal(mut self, journal: JournalSettings) -> Self {
        self.config.journal = journal;
        self
    }

    /// How long a connection may receive nothing while something on it is unanswered; twice the
    /// attempt timeout by default.
    #[must_use]
    pub fn stall_timeout(mut self, timeout: Duration) -> Self {
        self.config.stall_timeout = Some(timeout);
        self
    }

    /// How long connecting may take, up to the server's first answer; twice the attempt timeout by
    /// default, with TLS 250 ms ([`TlsSettings::connect_timeout`], which goes over this).
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.config.connect_timeout = Some(timeout);
        self
    }

    /// How many connections to each node; 1 by default (see
    /// [`PipelinedSettings::connections`](crate::PipelinedSettings::connections)).
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.config.connections = connections;
        self
    }

    /// Which protocol nodes are asked in; by default ([`Protocol::Auto`]) each in the one that it
    /// speaks. A node may have one of its own: [`NodeConfig::with_protocol`].
    #[must_use]
    pub fn protocol(mut self, protocol: Protocol) -> Self {
        self.config.protocol = protocol;
        self
    }

    /// Adds a node with settings of its own.
    #[must_use]
    pub fn node(mut self, node: NodeConfig) -> Self {
        self.config.nodes.push(node);
        self
    }

    /// How many connections there may be to a node that is asked in the [classic](Protocol::Classic)
    /// protocol, which has one request at a time on each; 16 by default. They are made as they are
    /// needed, and closed when none has needed them for a minute.
    #[must_use]
    pub fn pool_size(mut self, connections: u32) -> Self {
        self.config.pool_size = connections;
        self
    }

    /// The largest value to send or receive, in bytes; 1 MiB by default. A larger one that is
    /// stored on the server is an [`ErrorKind::ValueTooLarge`](crate::ErrorKind::ValueTooLarge) to
    /// read, and costs no memory.
    #[must_use]
    pub fn max_value_size(mut self, bytes: usize) -> Self {
        self.config.max_value_size = bytes;
        self
    }

    /// How large values are compressed; they are neither compressed nor decompressed by default, and
    /// client flags are the caller's alone.
    ///
    /// It is around the whole client: layers see what is on the wire. It computes on the task of the
    /// caller, whose time it takes: about 2 ms for each MiB that is decompressed, and 4 to 8 ms to
    /// compress it. `append` and `prepend` are then an
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported), since what is there may be compressed,
    /// and a payload with [client flags](crate::Payload::with_flags) that say that it is compressed is an
    /// [`ErrorKind::Codec`](crate::ErrorKind::Codec).
    #[must_use]
    pub fn compression(mut self, settings: CompressionSettings) -> Self {
        self.config.compression = Some(settings);
        self
    }

    /// How many requests each node may have at once, queued or sent; 16,384 by default. More fail
    /// at once with [`ErrorKind::Overloaded`](crate::ErrorKind::Overloaded).
    #[must_use]
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.config.max_in_flight = requests;
        self
    }

    /// Whether a node that answers late may have fewer, so that what is too much for it is refused at once
    /// and the rest is answered in time; not by default. See
    /// [`NodeSettings::adaptive_limit`](crate::NodeSettings::adaptive_limit).
    #[must_use]
    pub fn adaptive_limit(mut self, adaptive: bool) -> Self {
        self.config.adaptive_limit = adaptive;
        self
    }

    /// What becomes of requests whose node is out; [`FailureMode::Redistribute`] by default.
    #[must_use]
    pub fn failure_mode(mut self, mode: FailureMode) -> Self {
        self.config.failure_mode = mode;
        self
    }

    /// How long a value may live on a node that is not its own; 60 s by default.
    #[must_use]
    pub fn failover_ttl(mut self, ttl: Duration) -> Self {
        self.config.failover_ttl = ttl;
        self
    }

    /// How many attempts an operation may make; 3 by default.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.config.max_attempts = attempts;
        self
    }

    /// What all retries and failovers together may add to the load; 20 % of requests plus 10 a
    /// second by default.
    #[must_use]
    pub fn retry_budget(mut self, budget: RetryBudget) -> Self {
        self.config.retry_budget = budget;
        self
    }

    /// How keys are laid out over nodes; [`Ring::libmemcached`] by default. Clients of one cluster
    /// must agree on it.
    #[must_use]
    pub fn ring(mut self, ring: Ring) -> Self {
        self.config.ring = ring;
        self
    }

    /// With more than this share of the nodes out, rounded down, nothing is redistributed any more;
    /// 50 % by default (see
    /// [`ClusterSettings::max_ejection_percent`](crate::ClusterSettings::max_ejection_percent)).
    #[must_use]
    pub fn max_ejection_percent(mut self, percent: u32) -> Self {
        self.config.max_ejection_percent = percent;
        self
    }

    /// Whether a get that takes longer than 95 % of them is sent once more over another connection
    /// of the same node; not by default. It needs at least two
    /// [`connections`](Self::connections) (see
    /// [`ClusterSettings::hedged_gets`](crate::ClusterSettings::hedged_gets)).
    #[must_use]
    pub fn hedged_gets(mut self, hedged: bool) -> Self {
        self.config.hedged_gets = hedged;
        self
    }

    /// How a node is tested.
    #[must_use]
    pub fn probe(mut self, probe: ProbeSettings) -> Self {
        self.config.probe = probe;
        self
    }

    /// Where sockets, timers and probes run; one dedicated thread by default. Loaders never do (see
    /// [`load_executor`](Self::load_executor)).
    #[must_use]
    pub fn executor(mut self, executor: Executor) -> Self {
        self.executor = Some(executor);
        self
    }

    /// Where [`Client::get_or_load`] puts back what it has loaded, behind the answer, through the layers
    /// of the client; on the client's executor by default. Give one if a [`layer`](Self::layer) blocks or
    /// computes much (compresses, say), which would make I/O late. The threads of a dedicated one are
    /// apart from those for I/O.
    ///
    /// The loader itself is not run there but on its caller's task; one that is shared runs on
    /// [`ReadThroughLayer::executor`](crate::ReadThroughLayer::executor). Loads are bounded by their
    /// [`LoadGuard`](crate::LoadGuard), and what is put back by
    /// [`ReadThroughSettings::max_refills`](crate::ReadThroughSettings::max_refills).
    #[must_use]
    pub fn load_executor(mut self, executor: Executor) -> Self {
        self.load_executor = Some(executor);
        self
    }

    /// Options of TCP sockets: `TCP_NODELAY`, keepalive, the local address. They are those of our own
    /// connector: building with others than the defaults, and another
    /// [`connector`](Self::connector), is an error.
    #[must_use]
    pub fn socket(mut self, settings: SocketSettings) -> Self {
        self.config.socket = settings;
        self
    }

    /// Encrypts connections, those of probes too, whatever makes them: it goes around a
    /// [`connector`](Self::connector) as well. Needs the feature `tls`, without which building is an
    /// error. Certificates are read then, so that [`build`](Self::build) blocks for a moment.
    #[must_use]
    pub fn tls(mut self, settings: TlsSettings) -> Self {
        self.config.tls = Some(settings);
        self
    }

    /// A user and a password for servers that demand them (memcached's `-Y`), sent first on each
    /// connection, those of probes too. To a server that does not demand any they are not sent; so one
    /// client can be used while servers are switched over. They are sent as they are: whoever can read
    /// the network can read them, unless there is [`tls`](Self::tls).
    ///
    /// A server that refuses them, or demands some where there are none, fails connects as
    /// [`ErrorKind::Unauthenticated`](crate::ErrorKind::Unauthenticated), which ejects its node.
    /// [`reconfigure`](Client::reconfigure) with others is for connections that are made from then on.
    #[must_use]
    pub fn credentials(mut self, credentials: Credentials) -> Self {
        self.config.credentials = Some(credentials);
        self
    }

    /// How connections are made; TCP and Unix sockets by default.
    #[must_use]
    pub fn connector(mut self, connector: impl Connector) -> Self {
        self.connector = Some(Arc::new(connector));
        self
    }

    /// Has the nodes be what a [discovery](crate::discovery) finds. Nodes that are listed as well are
    /// used until it has found some; there may be none. It goes over the configuration's.
    #[must_use]
    pub fn discover(mut self, discovery: Discovery) -> Self {
        self.discovery = Some(discovery);
        self
    }

    /// Adds a layer around the whole client; the one added first is the outermost. It sees every
    /// request once. Its errors may be its own: they come back as
    /// [`ErrorKind::Layer`](crate::ErrorKind::Layer), with their source. Its service must be
    /// `Clone`; put a `tower::buffer::BufferLayer` around one that is not, such as `RateLimit`. What is
    /// put back after a load passes it on the [`load_executor`](Self::load_executor).
    #[must_use]
    pub fn layer<T>(self, layer: T) -> ClientBuilder<Stack<T, L>, N> {
        let Self {
            config,
            load_timeout,
            executor,
            load_executor,
            connector,
            discovery,
            layer: outer,
            node_layer,
            times_attempts,
            is_layered: _,
        } = self;
        ClientBuilder {
            config,
            load_timeout,
            executor,
            load_executor,
            connector,
            discovery,
            layer: Stack::new(layer, outer),
            node_layer,
            times_attempts,
            is_layered: true,
        }
    }

    /// Adds a layer to each node, between its circuit breaker and its connections; the one added
    /// first is the outermost. It sees each attempt, and the breaker sees what it makes of it.
    #[must_use]
    pub fn node_layer<T>(self, layer: T) -> ClientBuilder<L, Stack<T, N>> {
        let Self {
            config,
            load_timeout,
            executor,
            load_executor,
            connector,
            discovery,
            layer: whole,
            node_layer: outer,
            times_attempts: _,
            is_layered,
        } = self;
        ClientBuilder {
            config,
            load_timeout,
            executor,
            load_executor,
            connector,
            discovery,
            layer: whole,
            node_layer: Stack::new(layer, outer),
            times_attempts: true,
            is_layered,
        }
    }

    /// Builds the client. No I/O is done, and no network is needed; with a dedicated executor its
    /// threads are started.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration), naming what is
    /// wrong: no nodes and no discovery, an address that is none, a node twice, a zero timeout or limit.
    pub fn build<S>(self) -> Result<Client<L::Service>>
    where
        N: Layer<Transport, Service = S> + Send + Sync + 'static,
        S: Service<Request, Response = Response> + Clone + Send + Sync + 'static,
        S::Error: Into<BoxError>,
        L: Layer<Cluster<S>>,
        L::Service: Service<Request, Response = Response> + Clone,
    {
        let mut config = self.config;
        if let Some(timeout) = self.load_timeout {
            config.read_through = config.read_through.load_timeout(timeout);
        }
        let plan = config.plan()?;
        let discovery = self.discovery.or(plan.discovery);
        let nodes = match (plan.nodes, &discovery) {
            (Some(nodes), _) => nodes,
            // They have yet to be found.
            (None, Some(_)) => Vec::new(),
            (None, None) => return Err(Invalid::new("nodes", "there are no nodes").into()),
        };
        let executor = self.executor.unwrap_or_else(|| {
            let executor = config.executor.as_ref();
            executor.map_or_else(Executor::default, ExecutorConfig::make)
        });
        let connector = connector(&config, self.connector)?;
        let spawner = executor.start()?;

        let behind = match (&self.load_executor, &config.load_executor) {
            (Some(executor), _) => executor.start_for_loads()?,
            (None, Some(executor)) => executor.make().start_for_loads()?,
            (None, None) => spawner.clone(),
        };

        let live = Arc::new(ArcSwap::from_pointee((plan.node, plan.transport)));
        let (node_layer, times_attempts) = (self.node_layer, self.times_attempts);
        let (nodes_connector, nodes_spawner) = (connector.clone(), spawner.clone());
        let settings = live.clone();
        let (protocol, pool_size) = (config.protocol, config.pool_size);
        let factory = move |spec: &NodeSpec| {
            let (node, transport) = (*settings.load_full()).clone();
            let parts = Parts {
                name: spec.name.clone(),
                address: spec.address.clone(),
                settings: transport,
                protocol: spec.protocol.unwrap_or(protocol),
                spoken: Arc::default(),
                pool_size,
                connector: nodes_connector.clone(),
                spawner: nodes_spawner.for_node(),
                observer: None,
            };
            Node::over_transport(parts, node, &node_layer, times_attempts)
        };
        let routes = plan.groups.iter().map(GroupPlan::route);
        let routes = routes.collect::<Result<_, Invalid>>()?;
        let factory = Arc::new(factory);
        let cluster = Cluster::from_factory(plan.cluster, nodes, routes, spawner.clone(), factory)?;
        cluster.kill_switch().set(config.killed);

        let guards = Guards::new(&config.databases)?;
        let tracker = Arc::<Tracker>::default();
        let means = Means {
            spawner: Some(spawner.clone()),
            behind: Some(behind),
            tracker: tracker.clone(),
            compression: Slot::new(config.compression.as_ref()),
        };
        let reads = Engine::new(guards.resolve(&config.read_through), means);
        let view = |route| -> Arc<dyn Control> {
            let cluster = cluster.clone();
            Arc::new(View { cluster, route })
        };
        let declared = |(group, route): (&GroupPlan, u32)| {
            let (name, settings) = (group.name.clone(), &group.settings);
            let read_through = settings.read_through.as_ref();
            let read_through = guards.resolve(read_through.unwrap_or(&config.read_through));
            let compression = settings.compression.as_ref();
            let compression = Slot::new(compression.or(config.compression.as_ref()));
            Declared {
                reads: reads.of_group(read_through, compression),
                group: Arc::new(group::Shared::new(name.clone(), settings, route)),
                cluster: view(route),
                name,
            }
        };
        let groups: Arc<[_]> = plan.groups.iter().zip(1..).map(declared).collect();
        let parts = |declared: &Declared| (declared.group.clone(), declared.reads.clone());
        let timeout = Arc::new(AtomicDuration::new(config.timeout));
        let whole = view(0);
        if let Some(discovery) = discovery {
            whole.follow(discovery, connector.clone())?;
        }
        let shared = Shared {
            connector: Some(connector),
            timeout: timeout.clone(),
            is_bare: !self.is_layered && !times_attempts,
            spawner: Some(spawner),
            cluster: Some(whole),
            reads: reads.clone(),
            kill_switch: Some(cluster.kill_switch().clone()),
            live: Some(Arc::new(Live {
                config: Mutex::new(config),
                cluster: cluster.clone(),
                nodes: live,
                timeout,
                reads,
                groups: groups.iter().map(parts).collect(),
                guards,
            })),
            groups,
        };
        let service = tracker.layering(|| self.layer.layer(cluster));
        Ok(Client::assemble(service, shared))
    }
}

/// That of the user's or ours, with TLS around it if need be.
fn connector(config: &Config, own: Option<Arc<dyn Connector>>) -> Result<Arc<dyn Connector>> {
    let connector = match own {
        None => Arc::new(SystemConnector::with(config.socket.clone())?),
        Some(own) if config.socket == SocketSettings::default() => own,
        Some(_) => {
            let why = "cannot be set for another connector";
            return Err(Invalid::new("socket", why).into());
        }
    };
    #[cfg(feature = "tls")]
    if let Some(tls) = &config.tls {
        return Ok(Arc::new(TlsConnector::over(connector, tls)?));
    }
    Ok(connector)
}

impl<L, N> fmt::Debug for ClientBuilder<L, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBuilder")
            .field("config", &self.config)
            .field("executor", &self.executor)
            .field("load_executor", &self.load_executor)
            .finish_non_exhaustive()
    }
}
