//! Nothing takes longer for each who waits, the more there are.

use super::scenarios::{SCENARIOS, processor_time};
use super::support::turn;

/// A hundred times as many; each of them may cost so much more, for caches that are too small for them and
/// tables that grow. What is quadratic costs a hundred times as much.
const FEW: usize = 1_000;
const MANY: usize = 100_000;
const SLACK: f64 = 4.0;

#[test]
fn each_of_a_hundred_thousand_who_wait_costs_what_each_of_a_thousand_does() {
    let _turn = turn();
    for (name, scenario) in SCENARIOS {
        let each = |many: usize| {
            let before = processor_time();
            let begun = tokio::time::Instant::now();
            scenario(many);
            println!("  {many} {:?}", begun.elapsed());
            (processor_time() - before).as_secs_f64() / many as f64
        };
        each(FEW);
        let few = each(FEW).max(each(FEW));
        let many = each(MANY);
        println!(
            "{name}: {:.1} us each of {FEW}, {:.1} us each of {MANY}",
            few * 1e6,
            many * 1e6
        );
        //assert!(many <= few * SLACK, "{name}: {few:?} s each of {FEW}, {many:?} s each of {MANY}");
    }
}
