//! The databases of the tests do what the tests rely on: they keep, count and fail.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};

use crate::support::{
    CONNECTIONS, Database, Item, LoadError, Postgres, eventually, name_of, on_each_database,
};

const MOMENT: Duration = Duration::from_millis(50);

on_each_database!(
    what_is_written_is_read,
    many_are_read_in_one_query,
    concurrent_updates_each_have_a_version_of_their_own,
    threads_that_block_read_the_same,
    a_load_that_hangs_answers_what_it_had_read_before,
    loads_are_late_by_what_they_are_told,
    every_nth_load_fails,
    a_load_that_panics_gives_its_connection_back,
    a_load_that_is_dropped_gives_its_connection_back,
    loads_and_connections_are_counted,
    what_hangs_does_not_keep_a_test_from_ending,
);

fn item(id: i64, version: i64) -> Item {
    Item {
        id,
        name: name_of(id),
        version,
    }
}

async fn what_is_written_is_read(database: Database) {
    assert_eq!(database.load(1).await.unwrap(), None);
    assert!(database.insert(1).await.unwrap());
    assert!(!database.insert(1).await.unwrap());
    assert_eq!(database.load(1).await.unwrap(), Some(item(1, 1)));
    assert_eq!(database.update(1).await.unwrap(), Some(2));
    assert_eq!(database.load(1).await.unwrap(), Some(item(1, 2)));
    assert_eq!(database.update(2).await.unwrap(), None);
    assert!(database.delete(1).await.unwrap());
    assert!(!database.delete(1).await.unwrap());
    assert_eq!(database.load(1).await.unwrap(), None);

    let one = item(1, 7);
    assert_eq!(Item::decode(one.encode().as_bytes()).unwrap(), one);
    assert!(Item::decode(b"{}").is_err());
}

async fn many_are_read_in_one_query(database: Database) {
    database.fill(3).await;
    let loaded = database.load_many(&[1, 3, 5]).await.unwrap();
    let expected = [(1, item(1, 1)), (3, item(3, 1))];
    assert_eq!(loaded, expected.into());
    assert_eq!(database.load_many(&[]).await.unwrap(), [].into());
    assert_eq!(database.loads_started(), 2);
    // Filling is not starting anew.
    database.update(1).await.unwrap();
    database.fill(4).await;
    let loaded = database.load_many(&[1, 4]).await.unwrap();
    assert_eq!((loaded[&1].version, loaded[&4].version), (2, 1));
}

async fn concurrent_updates_each_have_a_version_of_their_own(database: Database) {
    database.fill(1).await;
    let update = || async {
        let mut versions = Vec::new();
        for _ in 0..10 {
            let version = database.update(1).await.unwrap().unwrap();
            // Committed: whoever reads after that reads this or a later one.
            let read = database.load(1).await.unwrap().unwrap();
            assert!(read.version >= version, "{read:?} after {version}");
            versions.push(version);
        }
        versions
    };
    let mut versions = join_all((0..20).map(|_| update())).await.concat();
    versions.sort_unstable();
    assert_eq!(versions, (2..=201).collect::<Vec<_>>());
}

async fn threads_that_block_read_the_same(database: Database) {
    database.fill(3).await;
    database.delay(Duration::from_millis(1));
    let threads: Vec<_> = (0..2 * CONNECTIONS)
        .map(|_| {
            let database = database.clone();
            std::thread::spawn(move || {
                let many = database.load_many_blocking(&[1, 2]).unwrap();
                (database.load_blocking(3).unwrap(), many.len())
            })
        })
        .collect();
    let read = spawn_blocking(|| threads.into_iter().map(|thread| thread.join().unwrap()));
    for read in read.await.unwrap() {
        assert_eq!(read, (Some(item(3, 1)), 2));
    }
    database.fail_every(1);
    let failing = spawn_blocking(move || database.load_blocking(3));
    assert!(matches!(failing.await.unwrap(), Err(LoadError::Told)));
}

async fn a_load_that_hangs_answers_what_it_had_read_before(database: Database) {
    database.fill(1).await;
    database.hang();
    let load = tokio::spawn({
        let database = database.clone();
        async move { database.load(1).await }
    });
    eventually("it has read", || database.loads_read() == 1).await;
    assert_eq!(database.update(1).await.unwrap(), Some(2));
    assert!(!load.is_finished());
    database.release();
    assert_eq!(load.await.unwrap().unwrap(), Some(item(1, 1)));
    assert_eq!(database.load(1).await.unwrap(), Some(item(1, 2)));
}

async fn loads_are_late_by_what_they_are_told(database: Database) {
    database.fill(1).await;
    database.delay(MOMENT);
    let begun = Instant::now();
    database.load(1).await.unwrap();
    database.load_many(&[1]).await.unwrap();
    assert!(begun.elapsed() >= 2 * MOMENT);
    database.delay(Duration::from_secs(3600));
    let late = timeout(MOMENT, database.load(1)).await;
    assert!(late.is_err(), "{late:?}");
}

async fn every_nth_load_fails(database: Database) {
    database.fill(1).await;
    database.fail_every(3);
    let mut fail = Vec::new();
    for _ in 0..6 {
        let loaded = database.load(1).await;
        assert!(matches!(loaded, Ok(Some(_)) | Err(LoadError::Told)));
        fail.push(loaded.is_err());
    }
    assert_eq!(fail, [false, false, true, false, false, true]);
    database.heal();
    for _ in 0..3 {
        assert!(database.load(1).await.is_ok());
    }
}

async fn a_load_that_panics_gives_its_connection_back(database: Database) {
    database.fill(1).await;
    database.panic_every(1);
    for _ in 0..=CONNECTIONS {
        let database = database.clone();
        let load = tokio::spawn(async move { database.load(1).await });
        assert!(load.await.unwrap_err().is_panic());
    }
    database.heal();
    assert!(database.load(1).await.is_ok());
    let counts = (database.loads_running(), database.connections_in_use());
    assert_eq!(counts, (0, 0));
}

async fn a_load_that_is_dropped_gives_its_connection_back(database: Database) {
    database.fill(1).await;
    database.delay(MOMENT);
    for _ in 0..=CONNECTIONS {
        let dropped = timeout(Duration::from_millis(5), database.load(1)).await;
        assert!(dropped.is_err(), "{dropped:?}");
    }
    eventually("all are done", || {
        (database.loads_running(), database.connections_in_use()) == (0, 0)
    })
    .await;
    assert!(database.load(1).await.is_ok());
}

async fn loads_and_connections_are_counted(database: Database) {
    database.fill(1).await;
    assert_eq!(database.loads_started(), 0);
    database.hang();
    let many = CONNECTIONS as usize + 3;
    let loads: Vec<_> = (0..many)
        .map(|_| {
            let database = database.clone();
            tokio::spawn(async move { database.load(1).await })
        })
        .collect();
    // The others wait for a connection, and there are no more.
    let (connections, all) = (CONNECTIONS as usize, Duration::from_secs(3600));
    eventually("all wait", || {
        database.loads_read() == connections as u64 && database.loads_running() == many
    })
    .await;
    assert_eq!(database.connections_in_use(), connections);
    assert_eq!(database.loads_started(), many);
    assert_eq!(database.most_loads_within(all), many);
    if let Some(server) = database.server() {
        assert!(server.connections().await <= i64::from(CONNECTIONS));
    }
    database.release();
    for load in loads {
        load.await.unwrap().unwrap();
    }
    assert_eq!(database.loads_running(), 0);
    assert_eq!(database.connections_in_use(), 0);
    assert_eq!(database.loads_read(), many as u64);
    assert_eq!(database.most_loads_running(), many);
    assert_eq!(database.most_connections_in_use(), connections);

    database.forget();
    assert_eq!(database.most_loads_running(), 0);
    assert_eq!(database.most_connections_in_use(), 0);
    assert_eq!(database.most_loads_within(all), 0);
    database.load(1).await.unwrap();
    tokio::time::sleep(MOMENT).await;
    database.load(1).await.unwrap();
    assert_eq!(database.most_loads_within(MOMENT), 1);
    assert_eq!(database.most_loads_within(all), 2);
    assert_eq!(database.most_loads_running(), 1);
}

/// With SQLite a load that hangs holds a thread, which the test's runtime waits for.
async fn what_hangs_does_not_keep_a_test_from_ending(database: Database) {
    database.fill(1).await;
    database.hang();
    let load = tokio::spawn({
        let database = database.clone();
        async move { database.load(1).await }
    });
    eventually("it has read", || database.loads_read() == 1).await;
    drop((load, database));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_has_the_connections_it_is_asked_for() {
    let sqlite = Database::sqlite_with(2).await;
    let server = Arc::new(Postgres::start().await);
    let postgres = Database::on(&server, 2).await;
    for database in [sqlite, postgres] {
        database.fill(1).await;
        database.delay(Duration::from_millis(5));
        join_all((0..10).map(|_| database.load(1))).await;
        assert_eq!(database.most_connections_in_use(), 2);
    }
}
