//! Nothing takes longer for each who waits, the more there are.

use super::scenarios::{SCENARIOS, processor_time};
use super::support::turn;

const FEW: usize = 500;

/// What is quadratic costs each of them forty times as much.
const MANY: usize = 20_000;

/// For caches that are too small, tables that grow, and a machine that does other things.
const SLACK: f64 = 5.0;

#[test]
fn each_of_many_who_wait_costs_what_each_of_a_few_does() {
    let _turn = turn();
    for (name, scenario) in SCENARIOS {
        let each = |many: usize| {
            let before = processor_time();
            scenario(many);
            (processor_time() - before).as_secs_f64() * 1e6 / many as f64
        };
        each(FEW);
        let (few, many) = (each(FEW), each(MANY));
        println!("{name}: {few:.1} us for each of {FEW}, {many:.1} us for each of {MANY}");
        assert!(
            many <= few * SLACK,
            "{name}: {few} us for each of {FEW}, {many} us for each of {MANY}"
        );
    }
}
