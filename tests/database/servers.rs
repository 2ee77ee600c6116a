//! The PostgreSQL servers of the tests: each its own, and none left behind.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tokio_postgres::NoTls;

use crate::support::postgres::{is_running, processes_in};
use crate::support::{Database, PATIENCE, Postgres, eventually};

/// Set in a process of ours that is to start a server and die.
const DIES: &str = "TEST_DIES_WITH_A_SERVER";

fn assert_gone(pid: u32, directory: &Path) {
    assert!(!is_running(pid), "the server runs");
    let left = processes_in(directory);
    assert!(left.is_empty(), "processes are left: {left:?}");
    assert!(!directory.exists(), "its directory is left");
}

#[tokio::test]
async fn a_server_stops_when_it_is_dropped_and_its_directory_goes() {
    let server = Postgres::start().await;
    let (pid, directory) = (server.pid(), server.directory().to_owned());
    assert!(is_running(pid));
    assert!(directory.join("data").is_dir());
    // The owner and the server, and what works for it in the background.
    assert!(processes_in(&directory).len() > 2);

    // In the middle of something, too.
    let (client, connection) = server.config().connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    let busy = tokio::spawn(async move { client.batch_execute("SELECT pg_sleep(3600)").await });
    while server.connections().await == 0 {
        tokio::task::yield_now().await;
    }
    drop(server);
    assert_gone(pid, &directory);
    assert!(busy.await.unwrap().is_err());
}

#[tokio::test]
async fn a_test_that_panics_leaves_nothing() {
    let test = tokio::spawn(async {
        let server = Postgres::start().await;
        let this = (server.pid(), server.directory().to_owned());
        std::panic::panic_any(this);
    });
    let panic = test.await.unwrap_err().into_panic();
    let (pid, directory) = *panic.downcast::<(u32, PathBuf)>().unwrap();
    assert_gone(pid, &directory);
}

#[tokio::test]
async fn a_test_that_is_killed_leaves_nothing() {
    if env::var_os(DIES).is_some() {
        let server = Postgres::start().await;
        println!("\n{DIES} {} {}", server.pid(), server.directory().display());
        // No destructor runs, as after SIGKILL.
        std::process::abort();
    }
    let mut this = Command::new(env::current_exe().unwrap());
    this.args(["servers::a_test_that_is_killed_leaves_nothing", "--exact"]);
    let died = this.arg("--nocapture").env(DIES, "yes").output().unwrap();
    let output = String::from_utf8_lossy(&died.stdout);
    let line = output.lines().find_map(|line| line.strip_prefix(DIES));
    let (pid, directory) = line.and_then(|line| line.trim().split_once(' ')).unwrap();
    let (pid, directory) = (pid.parse().unwrap(), Path::new(directory));
    eventually("the server is gone", || {
        !directory.exists() && processes_in(directory).is_empty()
    })
    .await;
    assert_gone(pid, directory);
}

#[tokio::test]
async fn two_servers_are_not_in_each_others_way() {
    let (one, other) = tokio::join!(Postgres::start(), Postgres::start());
    let (one, other) = (Arc::new(one), Arc::new(other));
    let first = Database::on(&one, 2).await;
    let second = Database::on(&other, 2).await;
    first.insert(1).await.unwrap();
    assert_eq!(second.load(1).await.unwrap(), None);
    drop((first, one));
    second.insert(1).await.unwrap();
    assert!(second.load(1).await.unwrap().is_some());
}

#[tokio::test]
async fn two_pools_on_one_server_share_its_items_but_not_their_faults() {
    let server = Arc::new(Postgres::start().await);
    let first = Database::on(&server, 2).await;
    let second = Database::on(&server, 2).await;
    first.fill(1).await;
    first.fail_every(1);
    assert!(first.load(1).await.is_err());
    assert!(second.load(1).await.unwrap().is_some());
    assert_eq!(second.loads_started(), 1);
}

#[tokio::test]
async fn a_server_that_was_stopped_fails_and_comes_back_with_what_was_committed() {
    let database = Database::postgres().await;
    let server = database.server().unwrap();
    database.fill(1).await;
    assert_eq!(database.update(1).await.unwrap(), Some(2));
    let pid = server.pid();
    server.stop();
    assert!(!is_running(pid));
    let stopped = database.load(1).await;
    assert!(stopped.is_err(), "{stopped:?}");
    server.start_again().await;
    assert_ne!(server.pid(), pid);
    let item = database.load(1).await.unwrap().unwrap();
    assert_eq!(item.version, 2);
}

#[tokio::test]
async fn a_server_refuses_more_connections_than_it_was_started_for() {
    let server = Postgres::with_max_connections(3).await;
    let mut open = Vec::new();
    let refused = loop {
        match server.config().connect(NoTls).await {
            Ok((client, connection)) => {
                tokio::spawn(connection);
                open.push(client);
            }
            // That which asked whether it answers may not have gone yet.
            Err(_) if open.len() < 3 => tokio::task::yield_now().await,
            Err(error) => break error,
        }
        assert!(open.len() <= 3);
    };
    let code = refused.code().map(|code| code.code());
    assert_eq!(code, Some("53300"), "too_many_connections: {refused}");
    open.pop();
    let until = tokio::time::Instant::now() + PATIENCE;
    while server.config().connect(NoTls).await.is_err() {
        assert!(tokio::time::Instant::now() < until, "never free again");
        tokio::task::yield_now().await;
    }
}
