//! The cluster under load.

use std::io;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tower_memcached::testing::{Flow, Memcached, Proxy, Server, Toxics};

use crate::cpu::Process;

/// What a reply to a get of one of our values takes on the wire, in bytes; one to a set is shorter.
const REPLY: u64 = 122;

pub(crate) struct Cluster {
    nodes: Nodes,
    /// One in front of each node, if its capacity is limited.
    proxies: Vec<Proxy>,
    /// For servers in this process and proxies: a thread of their own.
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
    /// `own` if there are some, else so many servers: real ones where memcached is installed. Not to be called
    /// inside a runtime.
    pub(crate) fn start(own: Option<&[String]>, nodes: usize) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("servers")
            .enable_all()
            .build()?;
        let nodes = match own {
            Some(own) => Nodes::Own(own.to_vec()),
            None if memcached_is_installed() => {
                let processes = (0..nodes).map(|_| Memcached::spawn(&["-m", "64", "-t", "1"]));
                Nodes::Memcached(processes.collect::<io::Result<_>>()?)
            }
            None => {
                let servers: Vec<_> = (0..nodes).map(|_| Server::new()).collect();
                for server in &servers {
                    runtime.block_on(server.listen())?;
                }
                Nodes::InProcess(servers)
            }
        };
        Ok(Self {
            nodes,
            proxies: Vec::new(),
            _runtime: Threads(Some(runtime)),
        })
    }

    /// Puts a proxy in front of each node of ours, which delivers about so many replies a second, in all. What is
    /// too much waits in its buffers and in those of the sockets, as behind a slow server or on a narrow line.
    pub(crate) fn limit(&mut self, replies_per_second: u64) -> io::Result<()> {
        let Some(runtime) = &self._runtime.0 else {
            return Ok(());
        };
        let upstreams = self.nodes.socket_addresses();
        let each = replies_per_second * REPLY / upstreams.len().max(1) as u64;
        for upstream in upstreams {
            let proxy = runtime.block_on(Proxy::listen(upstream))?;
            // In small pieces, evenly spread.
            let narrow = Toxics::new().bandwidth(each).slice(1_024, Duration::ZERO);
            proxy.set(Flow::Downstream, narrow);
            self.proxies.push(proxy);
        }
        Ok(())
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

    /// What they are, in words.
    pub(crate) fn describe(&self) -> &'static str {
        match (&self.nodes, self.proxies.is_empty()) {
            (Nodes::Own(_), _) => "servers of yours",
            (Nodes::Memcached(_), true) => "memcached processes (-t 1)",
            (Nodes::Memcached(_), false) => "memcached processes (-t 1), each behind a narrow line",
            (Nodes::InProcess(_), true) => "servers in this process, as memcached is not installed",
            (Nodes::InProcess(_), false) => {
                "servers in this process, as memcached is not installed, each behind a narrow line"
            }
        }
    }

    /// Those that are processes of ours.
    pub(crate) fn processes(&self) -> Vec<Process> {
        match &self.nodes {
            Nodes::Memcached(processes) => {
                let pids = processes.iter().map(Memcached::pid);
                pids.map(Process::new).collect()
            }
            Nodes::InProcess(_) | Nodes::Own(_) => Vec::new(),
        }
    }
}

fn memcached_is_installed() -> bool {
    let version = Command::new("memcached")
        .arg("-V")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    version.is_ok_and(|status| status.success())
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
}
