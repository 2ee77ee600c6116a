//! The cluster under test, and the fault of its first node.

use std::io;

use tokio::runtime::{Builder, Runtime};
use tower_memcached::testing::{Memcached, Server};

use crate::options::{Fault, Servers};

const NODES: usize = 3;

pub(crate) enum Cluster {
    InProcess {
        servers: Vec<Server>,
        fault: Fault,
        /// A thread of their own, as other machines would have.
        _runtime: Threads,
    },
    Memcached {
        processes: Vec<Memcached>,
        fault: Fault,
    },
    Own(Vec<String>),
}

/// A runtime that can be dropped inside another.
pub(crate) struct Threads(Option<Runtime>);

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Cluster {
    /// Starts the servers. Not to be called inside a runtime.
    pub(crate) fn start(servers: &Servers) -> io::Result<Self> {
        Ok(match servers {
            Servers::InProcess(fault) => {
                let runtime = Builder::new_multi_thread()
                    .worker_threads(1)
                    .thread_name("servers")
                    .enable_all()
                    .build()?;
                let servers: Vec<_> = (0..NODES).map(|_| Server::new()).collect();
                for server in &servers {
                    runtime.block_on(server.listen())?;
                }
                Self::InProcess {
                    servers,
                    fault: *fault,
                    _runtime: Threads(Some(runtime)),
                }
            }
            Servers::Memcached(fault) => {
                let processes = (0..NODES).map(|_| Memcached::spawn(&["-m", "64", "-t", "1"]));
                Self::Memcached {
                    processes: processes.collect::<io::Result<_>>()?,
                    fault: *fault,
                }
            }
            Servers::Own(addresses) => Self::Own(addresses.clone()),
        })
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        match self {
            Self::InProcess { servers, .. } => {
                let addresses = servers.iter().filter_map(Server::address);
                addresses.map(|address| address.to_string()).collect()
            }
            Self::Memcached { processes, .. } => processes.iter().map(Memcached::address).collect(),
            Self::Own(addresses) => addresses.clone(),
        }
    }

    /// Begins the fault of the first node. Blocks for a moment, as does [`heal`](Self::heal).
    pub(crate) fn fail(&mut self) -> io::Result<()> {
        match self {
            Self::InProcess { servers, fault, .. } => match fault {
                Fault::Stop => servers[0].stall(),
                Fault::Kill => servers[0].refuse(),
            },
            Self::Memcached { processes, fault } => match fault {
                Fault::Stop => processes[0].stop()?,
                Fault::Kill => processes[0].kill()?,
            },
            Self::Own(_) => {}
        }
        Ok(())
    }

    pub(crate) fn heal(&mut self) -> io::Result<()> {
        match self {
            Self::InProcess { servers, fault, .. } => match fault {
                Fault::Stop => servers[0].resume(),
                Fault::Kill => {
                    servers[0].restart_empty();
                    servers[0].accept()?;
                }
            },
            Self::Memcached { processes, fault } => match fault {
                Fault::Stop => processes[0].cont()?,
                Fault::Kill => processes[0].restart()?,
            },
            Self::Own(_) => {}
        }
        Ok(())
    }
}
