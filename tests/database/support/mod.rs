//! What the tests share: real databases that can be counted on to fail.

pub(crate) mod database;
#[path = "../../../examples/read_through/items/mod.rs"]
pub(crate) mod items;
pub(crate) mod postgres;

use std::time::Duration;

use tokio::time::Instant;

pub(crate) use database::{CONNECTIONS, Database, LoadError, name_of};
pub(crate) use items::Item;
pub(crate) use postgres::Postgres;

/// Far more than anything here takes on a busy machine; a test that gets there has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until a condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Makes of each `async fn test(database: Database)` two tests, `sqlite::test` and
/// `postgres::test`.
macro_rules! on_each_database {
    ($($test:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$test(crate::support::Database::sqlite().await).await;
            })+
        }

        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$test(crate::support::Database::postgres().await).await;
            })+
        }
    };
}
pub(crate) use on_each_database;
