//! The client as its users have it: against the in-process server where a fault must be exact,
//! against real memcached where it is about memcached.
#![cfg(feature = "testing")]

mod authentication;
mod claims;
#[cfg(feature = "classic")]
mod classic;
mod config;
mod connectors;
mod deadlines;
mod failure_modes;
mod fallback;
mod group_edges;
mod groups;
mod health;
mod interleavings;
#[cfg(target_os = "linux")]
mod isolation;
mod kill_switches;
mod layers;
mod lifecycle;
mod nodes;
mod operations;
#[cfg(feature = "classic")]
mod protocols;
mod read_through;
mod real_memcached;
mod reconfigure;
mod shutdown;
mod sockets;
mod staleness;
mod storms;
mod subtleties;
mod support;
#[cfg(feature = "tls")]
mod tls;
#[cfg(all(feature = "serde", feature = "lz4", feature = "zstd"))]
mod values;
mod wire_faults;
