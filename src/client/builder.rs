//! The default stack, put together: the picture in the crate's documentation, as code.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tower::layer::util::{Identity, Stack};
use tower::{Layer, Service};

use super::{Client, Shared};
use crate::cluster::{Cluster, ClusterSettings, FailureMode, NodeSpec, RetryBudget, Ring};
use crate::error::{BoxError, Error, Result};
use crate::executor::Executor;
use crate::node::{BreakerSettings, JournalSettings, Node, NodeSettings, ProbeSettings};
use crate::read_through::{Engine, ReadThroughSettings};
use crate::request::Request;
use crate::response::Response;
use crate::transport::{Connector, Parts, Pipelined, PipelinedSettings, SystemConnector};

/// Configures and builds a [`Client`]. Nothing is checked, opened or started before
/// [`build`](Self::build).
pub struct ClientBuilder<L = Identity, N = Identity> {
    nodes: Vec<Result<NodeSpec>>,
    timeout: Duration,
    read_through: ReadThroughSettings,
    load_timeout: Option<Duration>,
    attempt_timeout: Duration,
    cluster: ClusterSettings,
    node: NodeSettings,
    transport: PipelinedSettings,
    executor: Executor,
    connector: Arc<dyn Connector>,
    layer: L,
    node_layer: N,
    /// A user's node layer may wait without end, so attempts are timed around it.
    times_attempts: bool,
}

impl ClientBuilder {
    pub(super) fn new() -> Self {
        Self {
            nodes: Vec::new(),
            timeout: Duration::from_millis(100),
            read_through: ReadThroughSettings::default(),
            load_timeout: None,
            attempt_timeout: Duration::from_millis(30),
            cluster: ClusterSettings::default(),
            node: NodeSettings::default(),
            transport: PipelinedSettings::default(),
            executor: Executor::default(),
            connector: Arc::new(SystemConnector::new()),
            layer: Identity::new(),
            node_layer: Identity::new(),
            times_attempts: false,
        }
    }
}

impl<L, N> ClientBuilder<L, N> {
    /// Adds nodes: `host`, `host:port`, `[v6]:port` or `unix:/path`; the port is 11211 by default.
    /// What is written here is the node's name on the ring.
    #[must_use]
    pub fn nodes<I>(mut self, nodes: I) -> Self
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        let specs = nodes.into_iter().map(|node| NodeSpec::new(node.as_ref()));
        self.nodes.extend(specs);
        self
    }

    /// Adds a node with a share of the keys in proportion to its weight; 1 is usual.
    #[must_use]
    pub fn weighted_node(mut self, node: impl AsRef<str>, weight: u32) -> Self {
        let spec = NodeSpec::new(node.as_ref());
        self.nodes.push(spec.map(|spec| spec.with_weight(weight)));
        self
    }

    /// How long a whole operation may take, all attempts together; 100 ms by default.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How long one attempt at one node may take; 30 ms by default, and never more than the
    /// timeout. The stall and connect timeouts are twice this unless set.
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = timeout;
        self
    }

    /// How [`Client::get_or_load`] loads what the cache does not have.
    #[must_use]
    pub fn read_through(mut self, settings: ReadThroughSettings) -> Self {
        self.read_through = settings;
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
        self.node = self.node.consecutive_timeouts(timeouts);
        self
    }

    /// When a node's circuit breaker opens, and how the node comes back.
    #[must_use]
    pub fn breaker(mut self, breaker: BreakerSettings) -> Self {
        self.node = self.node.breaker(breaker);
        self
    }

    /// What is remembered of keys that were written while a node could not be told.
    #[must_use]
    pub fn journal(mut self, journal: JournalSettings) -> Self {
        self.node = self.node.journal(journal);
        self
    }

    /// How long a connection may receive nothing while something on it is unanswered; twice the
    /// attempt timeout by default.
    #[must_use]
    pub fn stall_timeout(mut self, timeout: Duration) -> Self {
        self.transport = self.transport.stall_timeout(timeout);
        self
    }

    /// How long connecting may take, up to the server's first answer; twice the attempt timeout by
    /// default.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.transport = self.transport.connect_timeout(timeout);
        self
    }

    /// How many connections to each node; 1 by default (see [`PipelinedSettings::connections`]).
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.transport = self.transport.connections(connections);
        self
    }

    /// The largest value to send or receive, in bytes; 1 MiB by default. A larger one that is
    /// stored on the server is an [`ErrorKind::ValueTooLarge`](crate::ErrorKind::ValueTooLarge) to
    /// read, and costs no memory.
    #[must_use]
    pub fn max_value_size(mut self, bytes: usize) -> Self {
        self.transport = self.transport.max_value_size(bytes);
        self
    }

    /// How many requests each node may have at once, queued or sent; 16,384 by default. More fail
    /// at once with [`ErrorKind::Overloaded`](crate::ErrorKind::Overloaded).
    #[must_use]
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.node = self.node.max_in_flight(requests);
        self.transport = self.transport.max_requests(requests);
        self
    }

    /// What becomes of requests whose node is out; [`FailureMode::Redistribute`] by default.
    #[must_use]
    pub fn failure_mode(mut self, mode: FailureMode) -> Self {
        self.cluster = self.cluster.failure_mode(mode);
        self
    }

    /// How long a value may live on a node that is not its own; 60 s by default.
    #[must_use]
    pub fn failover_ttl(mut self, ttl: Duration) -> Self {
        self.cluster = self.cluster.failover_ttl(ttl);
        self
    }

    /// How many attempts an operation may make; 3 by default.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.cluster = self.cluster.max_attempts(attempts);
        self
    }

    /// What all retries and failovers together may add to the load; 20 % of requests plus 10 a
    /// second by default.
    #[must_use]
    pub fn retry_budget(mut self, budget: RetryBudget) -> Self {
        self.cluster = self.cluster.retry_budget(budget);
        self
    }

    /// How keys are laid out over nodes; [`Ring::libmemcached`] by default. Clients of one cluster
    /// must agree on it.
    #[must_use]
    pub fn ring(mut self, ring: Ring) -> Self {
        self.cluster = self.cluster.ring(ring);
        self
    }

    /// With more than this share of the nodes out, rounded down, nothing is redistributed any more;
    /// 50 % by default (see [`ClusterSettings::max_ejection_percent`]).
    #[must_use]
    pub fn max_ejection_percent(mut self, percent: u32) -> Self {
        self.cluster = self.cluster.max_ejection_percent(percent);
        self
    }

    /// Whether a get that takes longer than 95 % of them is sent once more over another connection
    /// of the same node; not by default. It needs at least two
    /// [`connections`](Self::connections) (see [`ClusterSettings::hedged_gets`]).
    #[must_use]
    pub fn hedged_gets(mut self, hedged: bool) -> Self {
        self.cluster = self.cluster.hedged_gets(hedged);
        self
    }

    /// How a node is tested.
    #[must_use]
    pub fn probe(mut self, probe: ProbeSettings) -> Self {
        self.node = self.node.probe(probe);
        self
    }

    /// Where sockets, timers and probes run; one dedicated thread by default.
    #[must_use]
    pub fn executor(mut self, executor: Executor) -> Self {
        self.executor = executor;
        self
    }

    /// How connections are made; TCP and Unix sockets by default.
    #[must_use]
    pub fn connector(mut self, connector: impl Connector) -> Self {
        self.connector = Arc::new(connector);
        self
    }

    /// Adds a layer around the whole client; the one added first is the outermost. It sees every
    /// request once. Its errors may be its own: they come back as
    /// [`ErrorKind::Layer`](crate::ErrorKind::Layer), with their source. Its service must be
    /// `Clone`; put a `tower::buffer::BufferLayer` around one that is not, such as `RateLimit`.
    #[must_use]
    pub fn layer<T>(self, layer: T) -> ClientBuilder<Stack<T, L>, N> {
        let Self {
            nodes,
            timeout,
            read_through,
            load_timeout,
            attempt_timeout,
            cluster,
            node,
            transport,
            executor,
            connector,
            layer: outer,
            node_layer,
            times_attempts,
        } = self;
        ClientBuilder {
            nodes,
            timeout,
            read_through,
            load_timeout,
            attempt_timeout,
            cluster,
            node,
            transport,
            executor,
            connector,
            layer: Stack::new(layer, outer),
            node_layer,
            times_attempts,
        }
    }

    /// Adds a layer to each node, between its circuit breaker and its connections; the one added
    /// first is the outermost. It sees each attempt, and the breaker sees what it makes of it.
    #[must_use]
    pub fn node_layer<T>(self, layer: T) -> ClientBuilder<L, Stack<T, N>> {
        let Self {
            nodes,
            timeout,
            read_through,
            load_timeout,
            attempt_timeout,
            cluster,
            node,
            transport,
            executor,
            connector,
            layer: whole,
            node_layer: outer,
            times_attempts: _,
        } = self;
        ClientBuilder {
            nodes,
            timeout,
            read_through,
            load_timeout,
            attempt_timeout,
            cluster,
            node,
            transport,
            executor,
            connector,
            layer: whole,
            node_layer: Stack::new(layer, outer),
            times_attempts: true,
        }
    }

    /// Builds the client. No I/O is done, and no network is needed; with a dedicated executor its
    /// threads are started.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration), naming what is
    /// wrong: no nodes, an address that is none, a node twice, a zero timeout or limit.
    pub fn build<S>(self) -> Result<Client<L::Service>>
    where
        N: Layer<Pipelined, Service = S> + Send + Sync + 'static,
        S: Service<Request, Response = Response> + Clone + Send + Sync + 'static,
        S::Error: Into<BoxError>,
        L: Layer<Cluster<S>>,
        L::Service: Service<Request, Response = Response> + Clone,
    {
        if self.timeout.is_zero() {
            return Err(Error::configuration("the timeout is zero"));
        }
        let mut read_through = self.read_through;
        if let Some(timeout) = self.load_timeout {
            read_through = read_through.load_timeout(timeout);
        }
        read_through.validate()?;
        let attempt_timeout = self.attempt_timeout.min(self.timeout);
        let timeouts = self.node.timeouts_to_close();
        let transport = self.transport.attempt_timeout(attempt_timeout);
        let transport = transport.timeouts_to_close(timeouts);
        let node = self.node.attempt_timeout(attempt_timeout);
        node.validate()?;
        transport.validate()?;
        let specs = self.nodes.into_iter().collect::<Result<Vec<_>>>()?;
        self.cluster.validate()?;
        if self.cluster.hedged_gets && transport.connections < 2 {
            let message = "hedged gets need at least two connections to a node";
            return Err(Error::configuration(message));
        }

        let spawner = self.executor.start()?;
        let (node_layer, times_attempts) = (self.node_layer, self.times_attempts);
        let (connector, nodes_spawner) = (self.connector, spawner.clone());
        let factory = move |spec: &NodeSpec| {
            let parts = Parts {
                name: spec.name.clone(),
                address: spec.address.clone(),
                settings: transport.clone(),
                connector: connector.clone(),
                spawner: nodes_spawner.clone(),
                observer: None,
            };
            Node::over_transport(parts, node.clone(), &node_layer, times_attempts)
        };
        let cluster = Cluster::from_factory(
            self.cluster,
            specs,
            Vec::new(),
            spawner.clone(),
            Arc::new(factory),
        )?;
        let shared = Shared {
            timeout: self.timeout,
            reads: Engine::new(read_through, Some(spawner.clone())),
            spawner: Some(spawner),
            cluster: Some(Arc::new(cluster.clone())),
        };
        Ok(Client::assemble(self.layer.layer(cluster), shared))
    }
}

impl<L, N> fmt::Debug for ClientBuilder<L, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientBuilder")
            .field("nodes", &self.nodes)
            .field("timeout", &self.timeout)
            .field("attempt_timeout", &self.attempt_timeout)
            .field("cluster", &self.cluster)
            .field("node", &self.node)
            .field("transport", &self.transport)
            .field("executor", &self.executor)
            .finish_non_exhaustive()
    }
}
