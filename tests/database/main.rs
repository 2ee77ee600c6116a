//! Reading through to real databases: SQLite in a file, and a PostgreSQL server that the test starts. What they are
//! and how to make them fail is in `support`. The caches are real memcached processes.
#![cfg(all(feature = "testing", target_os = "linux"))]

mod consistency;
mod databases;
mod read_through;
mod servers;
mod storm;
mod support;
