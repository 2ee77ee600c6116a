//! What a client makes of a database.

use tower_memcached::testing::Server;
use tower_memcached::{Client, Executor, Ttl};

use crate::support::{Database, Item, LoadError, on_each_database};

on_each_database!(what_is_not_in_the_cache_is_loaded_once_and_kept);

async fn what_is_not_in_the_cache_is_loaded_once_and_kept(database: Database) {
    database.fill(1).await;
    let server = Server::new();
    let address = server.listen().await.unwrap().to_string();
    let builder = Client::builder()
        .nodes([address])
        .executor(Executor::current());
    let client = builder.build().unwrap();
    let read = || {
        client.get_or_load("item:1", Ttl::secs(60), || async {
            let loaded = database.load(1).await?;
            Ok::<_, LoadError>(loaded.map(|item| item.encode()))
        })
    };
    for _ in 0..2 {
        let value = read().await.unwrap().unwrap();
        let item = Item::decode(&value).unwrap();
        assert_eq!((item.id, item.version), (1, 1));
    }
    assert_eq!(database.loads_started(), 1);

    assert_eq!(database.update(1).await.unwrap(), Some(2));
    client.delete("item:1").await.unwrap();
    let value = read().await.unwrap().unwrap();
    assert_eq!(Item::decode(&value).unwrap().version, 2);
    assert_eq!(database.loads_started(), 2);
}
