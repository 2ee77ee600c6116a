//! Chaos: real memcached processes that are stopped, killed, starved, cut off and brought back, under a client that
//! must not let its callers notice. How to run one of them, and how to read what it prints: `README.md` beside this file.
#![cfg(all(feature = "testing", target_os = "linux"))]

mod callers;
mod must_show;
mod network;
mod node;
mod rolling;
mod support;
