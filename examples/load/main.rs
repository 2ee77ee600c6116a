//! How much load can the client take on a cluster, and what becomes of more than that?
//!
//! Puts open-loop loads on any cluster: a normal one, ten times that, all of it on one key, and more and more until it
//! breaks, which finds the knee, and then twice the load of the knee: there the client must shed, not queue. Prints
//! each second, draws each scenario, says where the knee is and what goodput is past it, and fails if that is too little.
//!
//! ```text
//! cargo run --release --features testing --example load
//! cargo run --release --features testing --example load -- --scenario ramp --servers 10.0.0.1:11211,10.0.0.2:11211
//! cargo run --release --features testing --example load -- --help
//! ```
//!
//! `options.rs` is the command line, `servers.rs` the cluster, `load.rs` the load and the service that it meets,
//! `scenarios.rs` what is done and what must come of it, `tally.rs` what has, `cpu.rs` what that took; `report.rs`
//! prints and `chart.rs` draws.

mod chart;
mod cpu;
mod load;
mod options;
mod report;
mod scenarios;
mod servers;
mod tally;

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;
use std::{env, fs};

use tokio::runtime::{Builder, Runtime};
use tower_memcached::Client;

use load::Target;
use options::{HELP, Options, Parsed};
use scenarios::{Run, Scenario, Stage};
use servers::Cluster;

fn main() -> ExitCode {
    let options = match options::parse(env::args().skip(1)) {
        Ok(Parsed::Run(options)) => options,
        Ok(Parsed::Help) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(mistake) => {
            eprintln!("load: {mistake} (see --help)");
            return ExitCode::from(2);
        }
    };
    match run_all(&options) {
        Ok(runs) => {
            let mut verdicts = runs.iter().flat_map(|run| &run.verdicts);
            match verdicts.all(|verdict| verdict.holds) {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_all(options: &Options) -> Result<Vec<Run>, Box<dyn Error>> {
    println!("{}", report::introduce(options));
    let service = Builder::new_multi_thread()
        .thread_name("service")
        .enable_all()
        .build()?;
    let runs = options.scenarios.iter();
    let runs = runs.map(|scenario| play(options, *scenario, &service));
    let runs: Vec<Run> = runs.collect::<Result<_, _>>()?;
    println!("{}", report::summary(&runs));
    fs::create_dir_all(&options.svg)?;
    for run in &runs {
        let file = format!("load-{}.svg", run.scenario.name());
        let file = options.svg.join(file);
        let failed = |error| format!("{}: {error}", file.display());
        chart::draw(&file, options, run).map_err(failed)?;
        println!("drawn in {}", file.display());
    }
    Ok(runs)
}

/// Each with servers and a client of its own, which know nothing of what was before.
fn play(options: &Options, scenario: Scenario, service: &Runtime) -> Result<Run, Box<dyn Error>> {
    let mut cluster = Cluster::start(options.servers.as_deref(), options.nodes)?;
    let capacity = options.capacity_in(scenario);
    if let Some(capacity) = capacity {
        cluster.limit(capacity)?;
    }
    let nodes = cluster.addresses();
    println!(
        "{}",
        report::header(scenario, nodes.len(), cluster.describe())
    );
    let mut builder = Client::builder()
        .nodes(&nodes)
        .timeout(options.deadline)
        .adaptive_limit(true);
    if let Some(limit) = options.max_in_flight {
        builder = builder.max_in_flight(limit);
    }
    let client = builder.build()?;
    service.block_on(async {
        let wanted = scenario.wanted();
        let times = (options.deadline, options.p99);
        let target = Target::new(client, wanted, times, cluster.processes());
        let filled = target.fill().await;
        filled.map_err(|error| format!("the cache could not be filled: {error}"))?;
        let run = Stage::new(options, &target, scenario).play(capacity).await;
        target.client.shutdown(Duration::from_secs(1)).await;
        Ok(run)
    })
}
