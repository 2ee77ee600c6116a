//! The client in one page: `cargo run --features testing --example quickstart`, or with the
//! address of a memcached of your own: `... --example quickstart -- 127.0.0.1:11211`.

use std::time::Duration;

use tower_memcached::testing::Server;
use tower_memcached::{Client, Ttl};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Without an address, a memcached inside this process.
    let server = Server::new();
    let address = match std::env::args().nth(1) {
        Some(address) => address,
        None => server.listen().await?.to_string(),
    };
    let client = Client::builder().nodes([address]).build()?;

    client.set("greeting", "hello", Ttl::secs(60)).await?;
    println!("get: {:?}", client.get("greeting").await?);

    // Replaces the value only if nobody else has since it was read.
    if let Some(token) = client.gets("greeting").await?.and_then(|read| read.cas()) {
        let outcome = client.cas("greeting", "hi", Ttl::secs(60), token).await?;
        println!("cas: {outcome:?}");
    }

    // Each key has an outcome of its own: a hit, a miss or an error.
    for (key, outcome) in client.get_many(["greeting", "nothing"]).await.iter() {
        println!("get_many: {key} {outcome:?}");
    }

    // On a miss one caller asks the database, all wait for it, and the cache is filled.
    let load = || async { Ok::<_, std::io::Error>(Some("from the database")) };
    let user = client.get_or_load("user:1", Ttl::secs(60), load).await?;
    println!("get_or_load: {user:?}");

    for node in client.nodes() {
        println!(
            "{}: breaker {:?}, {} connections",
            node.node, node.state, node.connections
        );
    }
    client.shutdown(Duration::from_secs(1)).await;
    Ok(())
}
