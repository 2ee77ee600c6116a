//! Nodes that are found, and known by their names wherever they are.

use std::time::Duration;

use tower_memcached::testing::Server;
use tower_memcached::{
    Address, BoxStream, Client, Connecting, Connector, Executor, Key, NodeSpec, Ring, Ttl,
};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Servers in this process: `10.0.0.1`, `10.0.1.1` and so on all lead to the second one.
struct Places(Vec<Server>);

impl Connector for Places {
    fn connect(&self, address: &Address) -> Connecting {
        let (host, _) = address.host_and_port().unwrap();
        let place: usize = host.rsplit('.').next().unwrap().parse().unwrap();
        let server = self.0[place].clone();
        Box::pin(async move {
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            tokio::spawn(server.serve(theirs));
            Ok(Box::new(ours) as BoxStream)
        })
    }
}

/// `cache-0` at `10.0.0.0`, and so on.
fn specs(places: &[(usize, &str)]) -> Vec<NodeSpec> {
    let spec = |(number, address): &(usize, &str)| {
        let spec = NodeSpec::new(&format!("cache-{number}")).unwrap();
        spec.at(address).unwrap()
    };
    places.iter().map(spec).collect()
}

fn client_of(servers: &[Server], nodes: Vec<NodeSpec>) -> Client {
    let client = Client::builder()
        .nodes(["10.0.0.0"])
        .connector(Places(servers.to_vec()))
        .executor(Executor::current())
        .build()
        .unwrap();
    client.set_node_specs(nodes).unwrap();
    client
}

fn keys_of(nodes: &[NodeSpec], index: usize, count: usize) -> Vec<Key> {
    let keys = (0..).map(|n| Key::new(format!("key-{n}")).unwrap());
    let own = keys.filter(|key| Ring::default().node_of(nodes, key) == Some(index));
    own.take(count).collect()
}

async fn read(client: &Client, key: &Key) -> Option<String> {
    let value = client.get(key).await.unwrap()?;
    Some(String::from_utf8(value.to_vec()).unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_node_that_moves_keeps_its_keys_and_is_asked_where_it_is() {
    let servers = [Server::new(), Server::new(), Server::new()];
    let before = specs(&[(0, "10.0.0.0"), (1, "10.0.0.1")]);
    let after = specs(&[(0, "10.0.0.0"), (1, "10.0.0.2")]);
    let client = client_of(&servers, before.clone());
    let fingerprint = client.ring_fingerprint();
    let keys = [keys_of(&before, 0, 20), keys_of(&before, 1, 20)];
    for key in keys.iter().flatten() {
        client.set(key, "v", Ttl::NEVER).await.unwrap();
    }
    client.set_node_specs(after.clone()).unwrap();
    assert_eq!(client.ring_fingerprint(), fingerprint);
    assert!(client.nodes().iter().all(|node| node.ring == fingerprint));
    for (index, keys) in keys.iter().enumerate() {
        for key in keys {
            assert_eq!(Ring::default().node_of(&after, key), Some(index));
            // The one that has moved is another server here, and empty.
            let found = client.get(key).await.unwrap().is_some();
            assert_eq!(found, index == 0);
            client.set(key, "w", Ttl::NEVER).await.unwrap();
        }
    }
    assert_eq!(servers[0].len(), 20);
    assert_eq!(servers[2].len(), 20);
    for key in &keys[1] {
        assert_eq!(servers[1].peek(key.as_bytes()).unwrap(), "v");
        assert_eq!(servers[2].peek(key.as_bytes()).unwrap(), "w");
    }
    tokio::time::sleep(ms(500)).await;
    assert_eq!(servers[1].open_connections(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_server_with_a_new_address_is_not_read_as_it_was_when_it_left() {
    let servers = [Server::new(), Server::new()];
    let both = specs(&[(0, "10.0.0.0"), (1, "10.0.0.1")]);
    let client = client_of(&servers, both.clone());
    let keys = keys_of(&both, 1, 10);
    for key in &keys {
        client.set(key, "1", Ttl::NEVER).await.unwrap();
    }
    client.set_node_specs(both[..1].to_vec()).unwrap();
    for key in &keys[..5] {
        client.set(key, "2", Ttl::NEVER).await.unwrap();
    }
    // The same server, which the client cannot know.
    client
        .set_node_specs(specs(&[(0, "10.0.0.0"), (1, "10.0.9.1")]))
        .unwrap();
    for key in &keys[..5] {
        assert_ne!(read(&client, key).await.as_deref(), Some("1"));
    }
    assert_eq!(read(&client, &keys[5]).await.as_deref(), Some("1"));
    tokio::time::sleep(ms(500)).await;
    assert_eq!(client.nodes()[1].journal, 0);
    for key in &keys[..5] {
        assert_eq!(servers[1].peek(key.as_bytes()), None, "it is deleted there");
    }
}

/// While it is one of the nodes under its new address its keys are written at another node, for the
/// list is another one again.
#[tokio::test(start_paused = true)]
async fn what_is_written_elsewhere_after_a_move_is_forgotten_at_the_new_address_too() {
    let servers = [Server::new(), Server::new(), Server::new()];
    let two = specs(&[(0, "10.0.0.0"), (1, "10.0.0.1")]);
    let client = client_of(&servers, two.clone());
    let three = specs(&[(0, "10.0.0.0"), (1, "10.0.9.1"), (2, "10.0.0.2")]);
    let key = &keys_of(&two, 1, 500)
        .into_iter()
        .find(|key| Ring::default().node_of(&three, key) == Some(2))
        .unwrap();
    client.set(key, "1", Ttl::NEVER).await.unwrap();
    client.set_node_specs(three.clone()).unwrap();
    client.set(key, "2", Ttl::NEVER).await.unwrap();
    client.set_node_specs(three[..2].to_vec()).unwrap();
    assert_eq!(read(&client, key).await, None);
}

#[tokio::test(start_paused = true)]
async fn nodes_that_change_places_are_believed_nothing_old() {
    let servers = [Server::new(), Server::new()];
    let straight = specs(&[(0, "10.0.0.0"), (1, "10.0.0.1")]);
    let crossed = specs(&[(0, "10.0.0.1"), (1, "10.0.0.0")]);
    let client = client_of(&servers, straight.clone());
    let keys = [keys_of(&straight, 0, 5), keys_of(&straight, 1, 5)].concat();
    for round in 0..6 {
        let (now, next) = (round.to_string(), (round + 1).to_string());
        for key in &keys {
            client.set(key, now.clone(), Ttl::NEVER).await.unwrap();
            assert_eq!(read(&client, key).await, Some(now.clone()), "{round}");
        }
        let nodes = [&crossed, &straight][round % 2].clone();
        client.set_node_specs(nodes).unwrap();
        for key in &keys {
            assert_eq!(read(&client, key).await, None, "{round}");
            client.set(key, next.clone(), Ttl::NEVER).await.unwrap();
            assert_eq!(read(&client, key).await, Some(next.clone()), "{round}");
        }
    }
}

#[test]
fn two_names_of_one_place_are_refused() {
    let servers = [Server::new()];
    let client = client_of(&servers, specs(&[(0, "10.0.0.0")]));
    let refused = client.set_node_specs(specs(&[(0, "10.0.0.0"), (1, "10.0.0.0")]));
    let error = refused.unwrap_err().to_string();
    assert!(
        error.contains("\"cache-1\" is at 10.0.0.0:11211"),
        "{error}"
    );
}
