//! What nodes cost that nobody asks anything.

use std::time::Duration;

use super::cluster::{NODES, measure, servers};
use super::support::{executors, held, runtime, turn};

#[test]
fn a_hundred_idle_nodes_cost_little_memory_and_next_to_no_processor_time() {
    let _turn = turn();
    let (_memcached, nodes) = servers();
    assert_eq!(nodes.len(), NODES);
    for (name, executor) in executors() {
        let time = Duration::from_secs(3);
        let idle = runtime().block_on(measure(&nodes, executor, time, || held() as f64));
        println!(
            "{name}: {:.0} bytes allocated, {:.0} resident for each node; {:.2} % of a core",
            idle.allocated,
            idle.resident,
            idle.processor * 100.0
        );
        assert!(
            idle.allocated <= 65_536.0,
            "{name}: {} bytes for each node",
            idle.allocated
        );
        // Unoptimised, and beside others; benches/idle holds it to 1 %.
        assert!(
            idle.processor < 0.15,
            "{name}: {} of a core",
            idle.processor
        );
    }
}
