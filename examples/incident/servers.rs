//! The cluster under test, and the fault of its first node.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tower_memcached::testing::{Flow, Memcached, Proxy, Server, Toxics};

use crate::faults::{Fault, SLOWER_BY};
use crate::options::Servers;

const NODES: usize = 3;

pub(crate) struct Cluster {
    nodes: Nodes,
    /// One in front of each node, if the fault is one of the network.
    proxies: Vec<Proxy>,
    /// `None` if it is not ours to make.
    fault: Option<Fault>,
    /// For servers in this process and proxies: a thread of their own, as other machines would
    /// have.
    _runtime: Threads,
}

enum Nodes {
    InProcess(Vec<Server>),
    Memcached(Vec<Memcached>),
    Own(Vec<String>),
}

/// A runtime that can be dropped inside another.
struct Threads(Option<Runtime>);

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Cluster {
    /// Starts the servers. Not to be called inside a runtime.
    pub(crate) fn start(servers: &Servers, fault: Option<Fault>) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("servers")
            .enable_all()
            .build()?;
        let nodes = match servers {
            Servers::InProcess => {
                let servers: Vec<_> = (0..NODES).map(|_| Server::new()).collect();
                for server in &servers {
                    runtime.block_on(server.listen())?;
                }
                Nodes::InProcess(servers)
            }
            Servers::Memcached => {
                let processes = (0..NODES).map(|_| Memcached::spawn(&["-m", "64", "-t", "1"]));
                Nodes::Memcached(processes.collect::<io::Result<_>>()?)
            }
            Servers::Own(addresses) => Nodes::Own(addresses.clone()),
        };
        let proxies = match fault {
            Some(fault) if fault.is_of_the_network() => {
                let upstreams = nodes.socket_addresses().into_iter();
                let proxies = upstreams.map(|upstream| runtime.block_on(Proxy::listen(upstream)));
                proxies.collect::<io::Result<_>>()?
            }
            _ => Vec::new(),
        };
        Ok(Self {
            nodes,
            proxies,
            fault,
            _runtime: Threads(Some(runtime)),
        })
    }

    /// Where clients connect to.
    pub(crate) fn addresses(&self) -> Vec<String> {
        let addresses = match (&self.nodes, &*self.proxies) {
            (Nodes::Own(addresses), _) => return addresses.clone(),
            (nodes, []) => nodes.socket_addresses(),
            (_, proxies) => proxies.iter().map(Proxy::address).collect(),
        };
        addresses.iter().map(SocketAddr::to_string).collect()
    }

    /// Makes the first node fail. Blocks for a moment, as does [`heal`](Self::heal).
    pub(crate) fn fail(&mut self) -> io::Result<()> {
        let slow = Toxics::new().latency(SLOWER_BY, Duration::ZERO);
        match self.fault {
            None => {}
            Some(Fault::Stop | Fault::Flap) => self.nodes.stop_first()?,
            Some(Fault::Kill) => self.nodes.kill_first()?,
            Some(Fault::Slow) => self.proxies[0].set(Flow::Downstream, slow),
            Some(Fault::Blackhole) => self.proxies[0].set(Flow::Both, Toxics::new().blackhole()),
        }
        Ok(())
    }

    /// Makes it work again.
    pub(crate) fn heal(&mut self) -> io::Result<()> {
        match self.fault {
            None => Ok(()),
            Some(Fault::Stop | Fault::Flap) => self.nodes.continue_first(),
            Some(Fault::Kill) => self.nodes.restart_first(),
            Some(Fault::Slow | Fault::Blackhole) => self.proxies[0].heal(),
        }
    }
}

impl Nodes {
    /// Of servers of ours.
    fn socket_addresses(&self) -> Vec<SocketAddr> {
        match self {
            Self::InProcess(servers) => servers.iter().filter_map(Server::address).collect(),
            Self::Memcached(processes) => processes.iter().map(Memcached::socket_address).collect(),
            Self::Own(_) => Vec::new(),
        }
    }

    fn stop_first(&mut self) -> io::Result<()> {
        match self {
            Self::InProcess(servers) => servers[0].stall(),
            Self::Memcached(processes) => processes[0].stop()?,
            Self::Own(_) => {}
        }
        Ok(())
    }

    fn continue_first(&mut self) -> io::Result<()> {
        match self {
            Self::InProcess(servers) => servers[0].resume(),
            Self::Memcached(processes) => processes[0].cont()?,
            Self::Own(_) => {}
        }
        Ok(())
    }

    fn kill_first(&mut self) -> io::Result<()> {
        match self {
            Self::InProcess(servers) => servers[0].refuse(),
            Self::Memcached(processes) => processes[0].kill()?,
            Self::Own(_) => {}
        }
        Ok(())
    }

    fn restart_first(&mut self) -> io::Result<()> {
        match self {
            Self::InProcess(servers) => {
                servers[0].restart_empty();
                servers[0].accept()?;
            }
            Self::Memcached(processes) => processes[0].restart()?,
            Self::Own(_) => {}
        }
        Ok(())
    }
}
