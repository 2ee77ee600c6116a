//! What it costs that many wait at the same time: nothing that grows with how many they are.
//!
//! `cargo bench --features testing --bench waiters`. First the throughput of a closed loop of gets (100-byte values,
//! real memcached `-t 1`) with 100 to 100,000 tasks, medians of three rounds, taken in turns; it fails if one number of
//! tasks reaches less than half of what another does. Then what each of many who wait costs in processor time, in
//! situations that end for all of them at once; it fails if each of 100,000 costs more than four times what each of
//! 1,000 does.
//!
//! The servers are processes of their own; processor time is that of this process.

mod scenarios;

use std::cell::Cell;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use scenarios::{SCENARIOS, memcached, processor_time, roomy, runtime};
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep};
use tower_memcached::{Executor, Key, Ttl};

const TASKS: [usize; 4] = [100, 1_000, 10_000, 100_000];
const ROUNDS: usize = 3;
const WARM_UP: Duration = Duration::from_secs(1);
const MEASURED: Duration = Duration::from_secs(2);
const KEYS: usize = 10_000;

/// Gets a second, and the processor time of each.
#[derive(Clone, Copy)]
struct Throughput {
    gets: f64,
    processor: Duration,
}

fn closed_loop(executor: Executor, tasks: usize, server: &str) -> Throughput {
    runtime().block_on(LocalSet::new().run_until(async {
        let client = roomy(server, tasks.max(1_000))
            .executor(executor)
            .build()
            .unwrap();
        let keys: Rc<[Key]> = (0..KEYS)
            .map(|n| Key::new(format!("benchmark:{n:08}")).unwrap())
            .collect();
        for chunk in keys.chunks(500) {
            let sets = chunk
                .iter()
                .map(|key| client.set(key, vec![b'v'; 100], Ttl::NEVER));
            for stored in futures::future::join_all(sets).await {
                stored.unwrap();
            }
        }
        let done = Rc::new(Cell::new(0_u64));
        for task in 0..tasks {
            let (client, keys, done) = (client.clone(), keys.clone(), done.clone());
            // Ends with the set of tasks.
            tokio::task::spawn_local(async move {
                for round in 0.. {
                    let key = &keys[(task * 7919 + round * 31) % KEYS];
                    assert!(client.get(key).await.unwrap().is_some());
                    done.set(done.get() + 1);
                }
            });
        }
        sleep(WARM_UP).await;
        let (began, spent, before) = (Instant::now(), processor_time(), done.get());
        sleep(MEASURED).await;
        let gets = (done.get() - before) as f64;
        Throughput {
            gets: gets / began.elapsed().as_secs_f64(),
            processor: (processor_time() - spent).div_f64(gets),
        }
    }))
}

/// Says whether no number of tasks reaches less than half of what another does.
fn throughput(name: &str, executor: impl Fn() -> Executor) -> bool {
    let server = memcached();
    let mut rounds = TASKS.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for (tasks, round) in TASKS.into_iter().zip(&mut rounds) {
            round.push(closed_loop(executor(), tasks, &server.address()));
        }
    }
    println!(
        "\nclosed loop, {name} executor\n{:>9} {:>12} {:>14}",
        "tasks", "gets/s", "processor/get"
    );
    let medians = TASKS.into_iter().zip(rounds).map(|(tasks, mut rounds)| {
        rounds.sort_by(|one, other| one.gets.total_cmp(&other.gets));
        let median = rounds[ROUNDS / 2];
        println!(
            "{tasks:>9} {:>12.0} {:>11.2} us",
            median.gets,
            median.processor.as_secs_f64() * 1e6
        );
        median.gets
    });
    let medians: Vec<_> = medians.collect();
    let most = medians.iter().copied().fold(0.0, f64::max);
    let least = medians.iter().copied().fold(f64::INFINITY, f64::min);
    let met = most <= least * 2.0;
    println!(
        "most / least: {:.2} (at most 2): {}",
        most / least,
        verdict(met)
    );
    met
}

fn situations() -> bool {
    const FEW: usize = 1_000;
    const MANY: usize = 100_000;
    const MOST: f64 = 4.0;
    println!(
        "\nprocessor time for each who waits\n{:>20} {FEW:>12} {MANY:>12} {:>7}",
        "", "ratio"
    );
    let mut all_met = true;
    for (name, scenario) in SCENARIOS {
        let each = |many: usize| {
            let mut rounds = [(); ROUNDS].map(|()| {
                let before = processor_time();
                scenario(many);
                (processor_time() - before).as_secs_f64() * 1e6 / many as f64
            });
            rounds.sort_by(f64::total_cmp);
            rounds[ROUNDS / 2]
        };
        let (few, many) = (each(FEW), each(MANY));
        let met = many <= few * MOST;
        println!(
            "{name:>20} {few:>9.2} us {many:>9.2} us {:>7.2} {}",
            many / few,
            verdict(met)
        );
        all_met &= met;
    }
    all_met
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "NOT MET" }
}

fn main() -> ExitCode {
    let current = throughput("current", Executor::current);
    let dedicated = throughput("dedicated", || Executor::dedicated("bench-io", 1));
    match situations() && current && dedicated {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
