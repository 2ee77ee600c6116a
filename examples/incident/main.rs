//! The incident this crate exists for, on your machine: one of three memcached nodes stops
//! answering, and comes back.
//!
//! Drives clients over the same timeline with the same requests, one after the other on the same
//! nodes: one configured as the incident's was, and this crate's, in one failure mode or in each.
//! Prints what became of the requests of each second, and draws all clients as `incident.svg`.
//!
//! ```text
//! cargo run --release --features testing --example incident
//! cargo run --release --features testing --example incident -- --mode all --fault flap
//! cargo run --release --features testing --example incident -- --help
//! ```
//!
//! `options.rs` is the command line, `faults.rs` what can go wrong, `servers.rs` the cluster to which
//! it does, `clients.rs` the clients, `load.rs` the requests; `tally.rs`, `latencies.rs` and
//! `failures.rs` what became of them, `breakers.rs` what the client thinks of its nodes meanwhile;
//! `report.rs` prints, `json.rs` writes and `chart.rs` draws.

mod breakers;
mod chart;
mod clients;
mod failures;
mod faults;
mod json;
mod latencies;
mod load;
mod options;
mod report;
mod servers;
mod tally;

use std::error::Error;
use std::fmt::Display;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use std::{env, fs, io};

use tokio::sync::{mpsc, watch};
use tokio::task::block_in_place;
use tokio::time::{Instant, sleep_until};

use clients::Contender;
use load::{Ended, Load};
use options::{HELP, Options, Parsed, Timeline};
use report::Run;
use servers::Cluster;
use tally::Tally;

fn main() -> ExitCode {
    let options = match options::parse(env::args().skip(1)) {
        Ok(Parsed::Run(options)) => options,
        Ok(Parsed::Help) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(mistake) => {
            eprintln!("incident: {mistake} (see --help)");
            return ExitCode::from(2);
        }
    };
    match incident(&options) {
        Ok(runs) if runs.iter().all(|run| run.summary.wrong == 0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("incident: {error}");
            ExitCode::FAILURE
        }
    }
}

fn incident(options: &Options) -> Result<Vec<Run>, Box<dyn Error>> {
    let outage = options.timeline.outage.as_ref();
    let cluster = Cluster::start(&options.servers, outage.map(|outage| outage.fault))?;
    let nodes = cluster.addresses();
    println!("{}", report::introduce(options, &nodes));

    let application = tokio::runtime::Runtime::new()?;
    let runs = application.block_on(drive_all(options, cluster))?;

    println!("{}", report::summary(&runs, outage.is_none()));
    println!("{}", report::errors(&runs));
    let failed = |file: &Path, error: &dyn Display| format!("{}: {error}", file.display());
    if let Some(file) = &options.json {
        let json = json::document(options, &nodes, &runs);
        fs::write(file, format!("{json:#}\n")).map_err(|error| failed(file, &error))?;
        println!("written to {}", file.display());
    }
    let file = &options.svg;
    chart::draw(file, options, &runs).map_err(|error| failed(file, &error))?;
    println!("drawn in {}", file.display());
    Ok(runs)
}

/// Drives one client after the other. Ctrl-C ends the watching of a user's servers; a run with
/// servers of ours it breaks off, and they are taken down.
async fn drive_all(options: &Options, mut cluster: Cluster) -> Result<Vec<Run>, Box<dyn Error>> {
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            stop.send_replace(true);
        }
        stop.closed().await;
    });
    let mut runs = Vec::new();
    for &contender in &options.contenders {
        let (run, returned) = drive(contender, options, cluster, &stopped).await?;
        cluster = returned;
        runs.push(run);
        if *stopped.borrow() {
            if options.timeline.outage.is_some() {
                return Err("interrupted".into());
            }
            break;
        }
    }
    Ok(runs)
}

async fn drive(
    contender: Contender,
    options: &Options,
    cluster: Cluster,
    stopped: &watch::Receiver<bool>,
) -> Result<(Run, Cluster), Box<dyn Error>> {
    let client = contender.client(&cluster.addresses(), options.protocol)?;
    let filled = load::fill(&client).await;
    filled.map_err(|error| format!("the cache could not be filled: {error}"))?;

    println!("{}", report::header(contender));
    let timeline = &options.timeline;
    let load = Load {
        rate: options.rate,
        seconds: timeline.seconds,
    };
    let start = Instant::now() + Duration::from_millis(100);
    let (ended, endings) = mpsc::channel(load.requests() as usize);
    let disturbing = disturb(cluster, timeline.clone(), start, stopped.clone());
    let disturbing = tokio::spawn(disturbing);
    tokio::spawn(load.run(client.clone(), start, stopped.clone(), ended));

    let mut transitions = Vec::new();
    let watching = breakers::watch(&client, start, |transition| {
        // In the naive client's failure mode, what its breakers do makes no difference.
        if contender != Contender::Naive {
            println!("{transition}");
            transitions.push(transition);
        }
    });
    let tally = tokio::select! {
        tally = collect(Tally::new(load), endings, timeline) => tally,
        () = watching => unreachable!("it watches without end"),
    };
    let cluster = disturbing.await??;
    client.shutdown(Duration::from_secs(1)).await;
    let run = Run {
        contender,
        summary: tally.summary(timeline),
        tally,
        transitions,
    };
    Ok((run, cluster))
}

/// Counts the requests as they end, and prints each second as soon as all of it is known.
async fn collect(
    mut tally: Tally,
    mut endings: mpsc::Receiver<Ended>,
    timeline: &Timeline,
) -> Tally {
    let mut printed = 0;
    while let Some(ended) = endings.recv().await {
        tally.record(&ended);
        while let Some(second) = tally.complete(printed) {
            println!("{}", report::row(printed, timeline.phase(printed), second));
            printed += 1;
        }
    }
    tally
}

/// Makes the fault, and ends it.
async fn disturb(
    mut cluster: Cluster,
    timeline: Timeline,
    start: Instant,
    mut stopped: watch::Receiver<bool>,
) -> io::Result<Cluster> {
    let Some(outage) = &timeline.outage else {
        return Ok(cluster);
    };
    for (second, fails) in outage.changes() {
        let moment = start + Duration::from_secs(second.into());
        if !until(moment, &mut stopped).await {
            // Whoever stops the run takes the servers down.
            break;
        }
        block_in_place(|| match fails {
            true => cluster.fail(),
            false => cluster.heal(),
        })?;
    }
    Ok(cluster)
}

/// True when the time has come, false when the run was stopped before.
async fn until(moment: Instant, stopped: &mut watch::Receiver<bool>) -> bool {
    tokio::select! {
        () = sleep_until(moment) => true,
        _ = stopped.wait_for(|stopped| *stopped) => false,
    }
}
