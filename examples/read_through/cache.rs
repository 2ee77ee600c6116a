//! The cache: three memcached servers in this process, which can be killed.

use std::io;

use tower_memcached::testing::Server;
use tower_memcached::{Client, Error};

const NODES: usize = 3;

pub(crate) struct Cache {
    nodes: Vec<Server>,
}

impl Cache {
    pub(crate) async fn start() -> io::Result<Self> {
        let nodes: Vec<_> = (0..NODES).map(|_| Server::new()).collect();
        for node in &nodes {
            node.listen().await?;
        }
        Ok(Self { nodes })
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        let addresses = self.nodes.iter().filter_map(Server::address);
        addresses.map(|address| address.to_string()).collect()
    }

    /// A client with all the defaults.
    pub(crate) fn client(&self) -> Result<Client, Error> {
        Client::builder().nodes(self.addresses()).build()
    }

    /// As if all of the processes had been killed: connections end, and no new ones are to be had.
    pub(crate) fn kill(&self) {
        self.nodes.iter().for_each(Server::refuse);
    }

    /// They are started again, and empty.
    pub(crate) fn restart(&self) -> io::Result<()> {
        for node in &self.nodes {
            node.restart_empty();
            node.accept()?;
        }
        Ok(())
    }
}
