//! The cache: three memcached servers in this process, which can be killed.

use std::io;
use std::time::Duration;

use tower_memcached::testing::Server;
use tower_memcached::{Client, Error, LoadGuard, LoadLimits, ReadThroughSettings};

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

    /// A client that loads no more than it is said to, and gives old values for a minute meanwhile.
    pub(crate) fn client(&self, limits: LoadLimits) -> Result<Client, Error> {
        let settings = ReadThroughSettings::default()
            .guard(LoadGuard::new("items", limits)?)
            .stale_while_revalidate(Duration::from_secs(60))
            .stale_if_error(Duration::from_secs(60))
            .negative_ttl(Duration::from_secs(10));
        Client::builder()
            .nodes(self.addresses())
            .read_through(settings)
            .build()
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
