//! What operations cost that can be counted without a clock: allocations, and bytes that are held.
//!
//! Everything that this process allocates is counted, on all of its threads; the servers are processes of their own.
//! One test at a time counts: the others wait for their turn. What the test harness does meanwhile can only add to a
//! count, so a count that must be exact is the least of several.
#![cfg(all(feature = "testing", target_os = "linux"))]

mod allocations;
#[path = "../../benches/idle/cluster.rs"]
mod cluster;
mod idle;
mod memory;
#[path = "../../benches/waiters/scenarios.rs"]
mod scenarios;
mod support;
mod topology;
mod waiters;
