//! What a cluster of 100 nodes costs that nobody asks anything: memory of each node, and processor time for probes.
//!
//! `cargo bench --features testing --bench idle`. The nodes are one memcached process that listens at 100 addresses; all
//! connections are up. It fails above 64 KiB for each node, or 1 % of a core.

mod cluster;

use std::alloc::System;
use std::process::ExitCode;
use std::time::Duration;

use cap::Cap;
use cluster::{measure, servers};
use tokio::runtime::Builder;
use tower_memcached::Executor;

/// Counts the bytes that are allocated.
#[global_allocator]
static ALLOCATED: Cap<System> = Cap::new(System, usize::MAX);

const TIME: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    let (_memcached, nodes) = servers();
    let mut all_met = true;
    println!(
        "{:>10} {:>16} {:>16} {:>10}",
        "executor", "allocated/node", "resident/node", "processor"
    );
    for (name, executor) in [
        ("current", Executor::current()),
        ("dedicated", Executor::dedicated("bench-io", 1)),
    ] {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let allocated = || ALLOCATED.allocated() as f64;
        let idle = runtime.block_on(measure(&nodes, executor, TIME, allocated));
        let met = idle.allocated <= 65_536.0 && idle.processor < 0.01;
        println!(
            "{name:>10} {:>12.1} KiB {:>12.1} KiB {:>8.2} % {}",
            idle.allocated / 1024.0,
            idle.resident / 1024.0,
            idle.processor * 100.0,
            if met { "met" } else { "NOT MET" },
        );
        all_met &= met;
    }
    if all_met {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
