//! What it costs to change the nodes.

use tower_memcached::{Client, Executor};

use super::scenarios::processor_time;
use super::support::{runtime, turn};

/// Names of so many nodes; the last one is another each time.
fn nodes(count: usize, last: usize) -> Vec<String> {
    let others = (1..count).map(|n| format!("cache-{n}"));
    others.chain([format!("other-{last}")]).collect()
}

/// What is quadratic costs each of them twenty times as much.
#[test]
fn changing_one_of_many_nodes_costs_each_what_it_costs_each_of_a_few() {
    let _turn = turn();
    runtime().block_on(async {
        let each = |count: usize| {
            let builder = Client::builder().executor(Executor::current());
            let client = builder.nodes(nodes(count, 0)).build().unwrap();
            let change = |last| {
                let before = processor_time();
                client.set_nodes(nodes(count, last)).unwrap();
                (processor_time() - before).as_secs_f64() * 1e6 / count as f64
            };
            (1..=4).map(change).fold(f64::INFINITY, f64::min)
        };
        let (few, many) = (each(20), each(400));
        println!("{few:.1} us for each of 20 nodes, {many:.1} us for each of 400");
        assert!(
            many <= few * 4.0,
            "{few} us for each of 20 nodes, {many} us of 400"
        );
    });
}
