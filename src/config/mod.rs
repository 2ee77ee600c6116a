//! Everything that a [`ClientBuilder`](crate::ClientBuilder) can be told, as plain data.
//!
//! A builder is a [`Config`] with methods, and what cannot be data besides (executors, connectors,
//! layers): what one of the two says is what the other says. With the feature `serde` a service
//! keeps it in its own TOML or YAML:
//!
//! ```
//! # #[cfg(feature = "serde")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use tower_memcached::{Client, Config};
//!
//! let config: Config = toml::from_str(
//!     r#"
//!     nodes = ["10.0.0.1:11211", { address = "10.0.0.2", weight = 2 }]
//!     timeout = "80ms"
//!     failure_mode = "redistribute"
//!
//!     [databases.items]
//!     max_concurrent = 32
//!
//!     [read_through]
//!     database = "items"
//!
//!     [groups.sessions]
//!     prefix = "session:"
//!     timeout = "20ms"
//!     max_in_flight = 200
//!     "#,
//! )?;
//! let client = Client::builder().config(config).build()?;
//! let sessions = client.group("sessions")?;
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "serde"))]
//! # fn main() {}
//! ```

mod discovery;
mod node;
mod plan;

use std::collections::BTreeMap;
use std::time::Duration;

pub use discovery::{DiscoveryConfig, DiscoverySource};
pub use node::NodeConfig;
pub(crate) use plan::{GroupPlan, Plan};

use crate::cluster::{ClusterSettings, FailureMode, RetryBudget, Ring};
use crate::compression::CompressionSettings;
use crate::executor::Executor;
use crate::group::GroupSettings;
use crate::node::{BreakerSettings, JournalSettings, ProbeSettings};
use crate::read_through::{LoadLimits, ReadThroughSettings};
use crate::transport::{Credentials, PipelinedSettings, Protocol, SocketSettings, TlsSettings};

/// What a client is told: see the [builder](crate::ClientBuilder)'s methods of the same names for what
/// each means, and `docs/CONFIGURATION.md` for all of them in tables: defaults, units, what a wrong one
/// does and the metric that shows it, and what can be changed at run time.
///
/// As data (feature `serde`) every field may be left out, and then has its default; a field that does
/// not exist is refused. Durations are written as `"50ms"` or `"1m 30s"`, choices in
/// `snake_case`.
///
/// Nothing is checked before a client is [built](crate::ClientBuilder::build) or
/// [reconfigured](crate::Client::reconfigure) with it; the error then names the field that makes no
/// sense, such as `groups.sessions.timeout`.
#[derive(Clone, Debug)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
#[non_exhaustive]
pub struct Config {
    /// The nodes: an address, or `{ address, weight }`. None in
    /// [`reconfigure`](crate::Client::reconfigure) leaves them as they are, for services that discover
    /// them.
    pub nodes: Vec<NodeConfig>,
    /// Where nodes are found, unless the builder is given a
    /// [`Discovery`](crate::Discovery); nowhere by default. The `nodes` beside it are used until it has
    /// found some, and in [`reconfigure`](crate::Client::reconfigure) not at all.
    pub discovery: Option<DiscoveryConfig>,
    /// How long a whole operation may take; 100 ms by default.
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub timeout: Duration,
    /// How long one attempt at one node may take; 30 ms by default.
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub attempt_timeout: Duration,
    /// How long a connection may receive nothing while something on it is unanswered; twice the
    /// attempt timeout by default.
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub stall_timeout: Option<Duration>,
    /// How long connecting may take; twice the attempt timeout by default, with TLS 250 ms.
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub connect_timeout: Option<Duration>,
    /// Options of TCP sockets.
    pub socket: SocketSettings,
    /// Encryption; none by default. Needs the feature `tls`: without it, building a client with this
    /// is an error.
    pub tls: Option<TlsSettings>,
    /// Who this client is, to servers that want to know; nobody by default.
    pub credentials: Option<Credentials>,
    /// Which protocol nodes are asked in; by default each in the one that it speaks.
    pub protocol: Protocol,
    /// Connections to each node that is asked in the meta protocol; 1 by default.
    pub connections: usize,
    /// Connections that there may be to each node that is asked in the classic protocol; 16 by default.
    pub pool_size: u32,
    /// Requests that each node may have at once; 16,384 by default.
    pub max_in_flight: usize,
    /// Whether a node that answers late may have fewer; not by default.
    pub adaptive_limit: bool,
    /// The largest value to send or receive, in bytes; 1 MiB by default.
    pub max_value_size: usize,
    /// How large values are compressed; neither compressed nor decompressed by default.
    pub compression: Option<CompressionSettings>,
    /// What becomes of requests whose node is out; redistribute by default.
    pub failure_mode: FailureMode,
    /// How long a value may live on a node that is not its own; 60 s by default.
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub failover_ttl: Duration,
    /// Attempts that a request may make; 3 by default.
    pub max_attempts: u32,
    /// What all retries and failovers may add to the load; 20 % and 10 a second by default.
    pub retry_budget: RetryBudget,
    /// The share of nodes, in percent, that may be out with others standing in for them; 50 by
    /// default.
    pub max_ejection_percent: u32,
    /// Whether slow gets are sent a second time; not by default.
    pub hedged_gets: bool,
    /// How keys are laid out over nodes; libmemcached's way by default.
    pub ring: Ring,
    /// When a node's circuit breaker opens, and how the node comes back.
    pub breaker: BreakerSettings,
    /// How nodes are tested.
    pub probe: ProbeSettings,
    /// What is remembered of keys that were written while a node could not be told.
    pub journal: JournalSettings,
    /// Whether the whole client's [kill switch](crate::Client::kill_switch) is thrown; not by default.
    pub killed: bool,
    /// Where sockets, timers and probes run, unless the builder is given an
    /// [`Executor`]; one dedicated thread by default.
    pub executor: Option<ExecutorConfig>,
    /// Where what was loaded is put back, unless the builder is given a
    /// [`load_executor`](crate::ClientBuilder::load_executor); where I/O runs by default.
    pub load_executor: Option<ExecutorConfig>,
    /// How values are loaded.
    pub read_through: ReadThroughSettings,
    /// Databases that values are loaded from, by the names that
    /// [`ReadThroughSettings::database`] calls them, and what each can bear.
    pub databases: BTreeMap<String, LoadLimits>,
    /// Functional groups, by the names that [`Client::group`](crate::Client::group) calls them.
    pub groups: BTreeMap<String, GroupSettings>,
}

impl Default for Config {
    fn default() -> Self {
        let cluster = ClusterSettings::default();
        let transport = PipelinedSettings::default();
        Self {
            nodes: Vec::new(),
            discovery: None,
            timeout: Duration::from_millis(100),
            attempt_timeout: Duration::from_millis(30),
            stall_timeout: None,
            connect_timeout: None,
            protocol: Protocol::Auto,
            socket: SocketSettings::default(),
            tls: None,
            credentials: None,
            connections: transport.connections,
            pool_size: 16,
            max_in_flight: transport.limits.requests,
            adaptive_limit: false,
            max_value_size: transport.limits.value,
            compression: None,
            failure_mode: cluster.failure_mode,
            failover_ttl: cluster.failover_ttl,
            max_attempts: cluster.max_attempts,
            retry_budget: cluster.retry_budget,
            max_ejection_percent: cluster.max_ejection_percent,
            hedged_gets: cluster.hedged_gets,
            ring: cluster.ring,
            breaker: BreakerSettings::default(),
            probe: ProbeSettings::default(),
            journal: JournalSettings::default(),
            killed: false,
            executor: None,
            load_executor: None,
            read_through: ReadThroughSettings::default(),
            databases: BTreeMap::new(),
            groups: BTreeMap::new(),
        }
    }
}

/// An [`Executor`] as data.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", try_from = "data::Executor")
)]
#[non_exhaustive]
pub enum ExecutorConfig {
    /// [`Executor::dedicated`].
    Dedicated {
        /// What its threads are named; `memcached-io` by default.
        name: String,
        /// How many there are; 1 by default.
        threads: usize,
    },
    /// [`Executor::current`].
    Current,
}

#[cfg(feature = "serde")]
mod data {
    use super::ExecutorConfig;

    /// What serde would derive does not refuse fields beside a kind that has none.
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Executor {
        kind: Kind,
        name: Option<String>,
        threads: Option<usize>,
    }

    #[derive(serde::Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        Dedicated,
        Current,
    }

    impl TryFrom<Executor> for ExecutorConfig {
        type Error = &'static str;

        fn try_from(executor: Executor) -> Result<Self, Self::Error> {
            let Executor {
                kind,
                name,
                threads,
            } = executor;
            match kind {
                Kind::Dedicated => Ok(Self::Dedicated {
                    name: name.unwrap_or_else(|| "memcached-io".to_owned()),
                    threads: threads.unwrap_or(1),
                }),
                Kind::Current if name.is_some() => {
                    Err("unknown field `name` of the kind `current`")
                }
                Kind::Current if threads.is_some() => {
                    Err("unknown field `threads` of the kind `current`")
                }
                Kind::Current => Ok(Self::Current),
            }
        }
    }
}

impl ExecutorConfig {
    pub(crate) fn make(&self) -> Executor {
        match self {
            Self::Dedicated { name, threads } => Executor::dedicated(name.clone(), *threads),
            Self::Current => Executor::current(),
        }
    }
}
