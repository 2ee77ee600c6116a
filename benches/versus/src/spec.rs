//! What one measurement is of.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// How many keys there are.
pub const KEYS: usize = 10_000;
/// How many keys a multi-key read asks for.
pub const BATCH: usize = 100;
/// How many requests a loop over a raw connection writes before it reads their replies.
pub const RAW_DEPTH: usize = 64;

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contender {
    /// The default client, its I/O on the runtime of its callers.
    Current,
    /// The default client, its I/O on a thread of its own: the default.
    Dedicated,
    /// One node's connection, without client, cluster and breaker.
    Transport,
    /// The default client over three nodes, on the runtime of its callers.
    Ring3,
    /// Three nodes' connections without client, cluster and breaker: the caller chooses by the key.
    Transport3,
    /// memcache-async in a pool of bb8.
    MemcacheAsync,
    /// async-memcached in a pool of bb8.
    AsyncMemcached,
    /// memcache's client for tokio, with its own pool.
    Memcache,
    /// memcache's connections for tokio in a pool of bb8.
    MemcacheBb8,
    /// A loop over a blocking socket: so many requests are written, so many replies are read.
    Raw,
    /// The same on four connections, each with its thread.
    Raw4,
}

impl Contender {
    pub const PEERS: [Self; 4] = [
        Self::MemcacheAsync,
        Self::AsyncMemcached,
        Self::Memcache,
        Self::MemcacheBb8,
    ];

    pub fn is_peer(self) -> bool {
        Self::PEERS.contains(&self)
    }

    /// Whether it has no runtime.
    pub fn is_raw(self) -> bool {
        matches!(self, Self::Raw | Self::Raw4)
    }

    /// Whose runtime it takes, so that the two differ in nothing else.
    pub fn follows(self) -> Option<Self> {
        match self {
            Self::Transport => Some(Self::Current),
            Self::Transport3 => Some(Self::Ring3),
            _ => None,
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Current => "tower-memcached, Executor::current()",
            Self::Dedicated => "tower-memcached, a dedicated thread",
            Self::Transport => "its transport alone",
            Self::Ring3 => "tower-memcached, three nodes",
            Self::Transport3 => "three transports alone",
            Self::MemcacheAsync => "memcache-async + bb8",
            Self::AsyncMemcached => "async-memcached + bb8",
            Self::Memcache => "memcache (own pool)",
            Self::MemcacheBb8 => "memcache's connections + bb8",
            Self::Raw => "raw pipelining, 1 connection",
            Self::Raw4 => "raw pipelining, 4 connections",
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = serde_json::to_value(self).expect("a name");
        out.pad(name.as_str().expect("a name"))
    }
}

/// The runtime that the callers' tasks are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Runtime {
    /// tokio's current_thread.
    Single,
    /// tokio's multi_thread with two workers.
    Multi,
}

/// What a caller does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// Nine gets and one set in ten, one at a time.
    Mixed,
    /// [`BATCH`] keys in one call.
    GetMany,
    /// [`BATCH`] gets at once, by one task.
    Concurrent,
}

/// One cell of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cell {
    pub contender: Contender,
    /// None for those that have none.
    pub runtime: Option<Runtime>,
    /// The most connections a pool may have; none for what has no pool.
    pub pool: Option<usize>,
    pub work: Work,
    pub tasks: usize,
    /// The length of the values, in bytes.
    pub value: usize,
    /// Whether the server is in the same process, without a socket.
    pub in_memory: bool,
}

impl Cell {
    /// Runtime and pool, for the table.
    pub fn configuration(&self) -> String {
        let runtime = match self.runtime {
            None => "threads",
            Some(Runtime::Single) => "current_thread",
            Some(Runtime::Multi) => "multi_thread",
        };
        match self.pool {
            None => runtime.to_owned(),
            Some(pool) => format!("{runtime}, pool of {pool}"),
        }
    }
}

/// A cell, and how it is measured: what a child process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    pub cell: Cell,
    pub servers: Vec<SocketAddr>,
    /// Seconds.
    pub warm_up: f64,
    /// Seconds.
    pub duration: f64,
}

/// What a child process answers. Times are in microseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Operations (keys of multi-key reads) a second.
    pub throughput: f64,
    /// Of an operation (a call of a multi-key read).
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
    /// Of this process, user and system, for each operation (key).
    pub cpu: f64,
    /// Of this process, voluntary and not, for each operation (key).
    pub switches: f64,
    pub errors: u64,
    pub first_error: Option<String>,
}
