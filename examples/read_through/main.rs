//! A small service that reads through a cache to a real database, and the storm that such a service
//! fears: the whole cache dies under load, and comes back empty.
//!
//! ```text
//! cargo run --release --features testing --example read_through
//! curl -i http://127.0.0.1:8080/items/1
//! curl -i -X PUT -d '{"name": "new"}' -H 'content-type: application/json' http://127.0.0.1:8080/items/1
//!
//! cargo run --release --features testing --example read_through -- --storm
//! cargo run --release --features testing --example read_through -- --help
//! ```
//!
//! `options.rs` is the command line, `items` the table and its database, `store.rs` what it costs to
//! ask it, `cache.rs` the nodes of the cache, `service.rs` the service; `storm.rs` is the load and
//! the outage, `http.rs` the client it asks the service with, `tally.rs` what became of it, and
//! `report.rs` prints that.

mod cache;
mod http;
#[allow(dead_code, reason = "tests/database uses the rest of it")]
mod items;
mod options;
mod report;
mod service;
mod store;
mod storm;
mod tally;

use std::env;
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::ctrl_c;
use tokio::sync::oneshot;
use tokio::time::timeout;

use cache::Cache;
use options::{HELP, Options, Parsed};
use service::Service;
use store::Store;

/// How long requests under way have when the service ends.
const DRAIN: Duration = Duration::from_secs(2);

#[tokio::main]
async fn main() -> ExitCode {
    let options = match options::parse(env::args().skip(1)) {
        Ok(Parsed::Run(options)) => options,
        Ok(Parsed::Help) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(mistake) => {
            eprintln!("read_through: {mistake} (see --help)");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("read_through: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<(), Box<dyn Error>> {
    let store = Store::open(
        options.postgres.as_deref(),
        options.items,
        options.load_cost,
    );
    let store = Arc::new(store.await?);
    let cache = Cache::start().await?;
    let client = cache.client(options.limits())?;
    let service = Service::new(client.clone(), store.clone());
    println!("{}", report::introduce(&options, &store, &cache));

    let listener = TcpListener::bind(options.listen).await?;
    let address = listener.local_addr()?;
    let (end, ended) = oneshot::channel::<()>();
    let serving = axum::serve(listener, service.router()).with_graceful_shutdown(async {
        let _ = ended.await;
    });
    let serving = tokio::spawn(serving.into_future());
    println!("listening on http://{address}; Ctrl-C ends it\n");

    let storm = async {
        match &options.storm {
            Some(storm) => storm::run(storm, options.items, address, &cache, &store).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        interrupted = ctrl_c() => interrupted?,
        summary = storm => println!("{}", summary?),
    }
    drop(end);
    // Whoever keeps a connection open is not waited for longer than that.
    if let Ok(served) = timeout(DRAIN, serving).await {
        served??;
    }
    client.shutdown(Duration::from_secs(1)).await;
    // A query that takes longer does not keep us, either.
    let _ = timeout(DRAIN, store.idle()).await;
    Ok(())
}
