//! A memcached client that stays fast and correct while its cache is failing.
//!
//! ```no_run
//! # async fn example() -> Result<(), tower_memcached::Error> {
//! use tower_memcached::{Client, Ttl};
//!
//! let client = Client::builder()
//!     .nodes(["10.0.0.1:11211", "10.0.0.2:11211", "10.0.0.3:11211"])
//!     .build()?;
//! client.set("k", "v", Ttl::secs(60)).await?;
//! assert_eq!(client.get("k").await?.as_deref(), Some(&b"v"[..]));
//! # Ok(())
//! # }
//! ```
//!
//! # The stack
//!
//! ```text
//! application task
//!   |  client.get(key), client.get_or_load(key, ttl, loader)
//!   v
//! Client          typed operations; the deadline of each
//!   v
//! your layers     ClientBuilder::layer: any tower::Layer; GroupLayer, ReadThroughLayer, BulkheadLayer
//!   v
//! Cluster         hash ring, failure mode, retry budget
//!   v  one per node
//! Node            circuit breaker, readiness probe, journal, ramp, in-flight limit
//!   v
//! your layers     ClientBuilder::node_layer: any tower::Layer
//!   v ==== bounded queue: the only door to the I/O executor ====
//! Transport       Pipelined, many requests on few connections; or classic, a pool of connections
//!   v
//! Connector       TCP, Unix sockets, TLS, yours
//! ```
//!
//! Each is a [`tower::Service`] of [`Request`] with a [`Response`], usable around any other.
//!
//! # When a node fails
//!
//! Three time-outs in a row, or no byte for 60 ms while something is unanswered, close a
//! connection; a connect that is refused or not answered opens the node's circuit breaker, and
//! nobody waits for that node any more. What was on the way to it goes where the [`FailureMode`]
//! says, at once. A node that fails half of its requests, is slow, or fails its readiness probes is
//! taken out as well. Probes that write and read back a canary bring it back; what was written
//! elsewhere meanwhile is deleted on it first, so that nothing older is ever read.
//! `docs/FAILURE_MODES.md` has it step by step.
//!
//! # When the cache misses
//!
//! [`Client::get_or_load`] loads from the database, and sees to it that the database never gets more
//! loads than a [`LoadGuard`] lets pass, that of all who miss on a key one loads, and that what was
//! [invalidated](Client::invalidate) is not read any more. [`read_through`] has the parts, and
//! `docs/DATABASE_FALLBACK.md` how to choose the limits.
//!
//! # Which servers
//!
//! memcached 1.6.13 and later is asked in its meta protocol; older servers, and proxies, in the classic one:
//! [`Protocol`]. Nodes may be listed, or found ([`discovery`]). `docs/COMPATIBILITY.md` has what works with which.
//!
//! # Feature flags
//!
//! - `classic` (default): the classic protocol, over a pool of connections.
//! - `testing`: an in-process memcached with run-time faults, a TCP proxy with toxics, and control
//!   of real memcached processes, for tests.
//! - `tls`: connections over TLS, by rustls ([`ClientBuilder::tls`]).
//! - `srv`: [`discovery`] by `SRV` records.
//! - `serde`: [`Config`] and the settings in it as data, for a service's own TOML or YAML; values of one type,
//!   as JSON or postcard ([`Client::typed`]).
//! - `lz4`, `zstd`: compression ([`ClientBuilder::compression`]).
//!
//! `docs/CONFIGURATION.md` has every setting.

#![forbid(unsafe_code)]

mod bulkhead;
mod call;
mod client;
mod cluster;
#[cfg(feature = "serde")]
mod codec;
mod compression;
mod config;
pub mod discovery;
mod error;
mod executor;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod fuzzing;
mod group;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod internals;
mod key;
mod kill_switch;
mod node;
mod protocol;
mod rate;
pub mod read_through;
mod request;
mod response;
mod shutdown;
pub mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
mod transport;
mod ttl;
mod value;

pub use bulkhead::{Bulkhead, BulkheadFuture, BulkheadLayer};
pub use client::{
    BoxedService, Claim, Client, ClientBuilder, DefaultService, MultiGet, OnFailure, Outcome,
};
pub use cluster::{
    Cluster, ClusterFuture, ClusterSettings, FailureMode, NodeSpec, RetryBudget, Ring,
};
#[cfg(feature = "serde")]
pub use codec::{Codec, Format, Json, Postcard, Typed};
pub use compression::{
    Algorithm, Compressed, CompressedFuture, CompressionLayer, CompressionSettings,
};
pub use config::{Config, DiscoveryConfig, DiscoverySource, ExecutorConfig, NodeConfig};
pub use discovery::{Discovery, DiscoveryStatus};
pub use error::{Error, ErrorKind, Result, Sent};
pub use executor::Executor;
pub use group::{Group, GroupFuture, GroupLayer, GroupSettings, GroupStatus};
pub use key::{IntoKey, InvalidKey, Key, MAX_KEY_LENGTH};
pub use kill_switch::KillSwitch;
pub use node::{
    BreakerSettings, BreakerState, EjectionCause, JournalOverflow, JournalSettings, Node,
    NodeFuture, NodeLayer, NodeSettings, NodeStatus, ProbeSettings,
};
pub use protocol::{MINIMUM_VERSION, Violation};
pub use read_through::{
    BlockingLoader, LoadGuard, LoadLimits, LoadStatus, Loader, LoadsShed, ReadThrough,
    ReadThroughLayer, ReadThroughSettings,
};
pub use request::{Direction, LeaseTerms, Operation, Request, StoreMode};
pub use response::{CasOutcome, Found, LeaseState, Lookup, NodeResult, Response};
pub use shutdown::{ShutdownReport, UnflushedJournal};
#[cfg(feature = "tls")]
pub use transport::TlsConnector;
pub use transport::{
    Address, BoxStream, ByteStream, Connecting, Connector, Credentials, Pipelined, PipelinedFuture,
    PipelinedSettings, Protocol, SocketSettings, SystemConnector, TlsSettings, Transport,
    TransportFuture,
};
pub use ttl::Ttl;
pub use value::{CasToken, Payload, Value};

/// Compiles the README's example, and that of the guide.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
#[doc = include_str!("../docs/DATABASE_FALLBACK.md")]
struct Examples;
