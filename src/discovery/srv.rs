//! Targets by a name's `SRV` records.

use std::net::SocketAddr;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use hickory_resolver::Resolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RData;

use super::{Found, Look, failed};
use crate::cluster::NodeSpec;
use crate::error::Error;

pub(super) struct Srv {
    name: String,
    /// The system's if it is not said.
    server: Option<SocketAddr>,
}

impl Srv {
    pub(super) fn new(name: String, server: Option<SocketAddr>) -> Self {
        Self { name, server }
    }

    async fn ask(&self) -> Found {
        let at = |error: &dyn std::fmt::Display| failed(format!("{}: {error}", self.name));
        // Made anew each time: the system's configuration may have changed, and nothing may be
        // answered from a cache when a node is gone.
        let builder = match self.server {
            None => Resolver::builder_tokio().map_err(|error| at(&error))?,
            Some(server) => {
                let provider = TokioRuntimeProvider::default();
                Resolver::builder_with_config(configured(server), provider)
            }
        };
        let resolver = builder.build().map_err(|error| at(&error))?;
        let answer = resolver.srv_lookup(self.name.as_str()).await;
        let answer = answer.map_err(|error| at(&error))?;
        let mut specs = Vec::new();
        for record in answer.answers() {
            let RData::SRV(srv) = &record.data else {
                continue;
            };
            if srv.target.is_root() {
                // The service is decidedly not available there.
                continue;
            }
            let spec = node(&srv.target.to_ascii(), srv.port);
            specs.push(spec.map_err(|error| at(&error))?);
        }
        specs.sort_by(|one, other| one.name().cmp(other.name()));
        specs.dedup();
        Ok(specs)
    }
}

/// Of a domain name that ends with a dot. Names that differ in case are the same.
fn node(target: &str, port: u16) -> Result<NodeSpec, Error> {
    let host = target.trim_end_matches('.').to_ascii_lowercase();
    NodeSpec::new(&format!("{host}:{port}"))
}

fn configured(server: SocketAddr) -> ResolverConfig {
    let at = |mut connection: ConnectionConfig| {
        connection.port = server.port();
        connection
    };
    let connections = vec![at(ConnectionConfig::udp()), at(ConnectionConfig::tcp())];
    let server = NameServerConfig::new(server.ip(), true, connections);
    ResolverConfig::from_parts(None, Vec::new(), vec![server])
}

impl Look for Srv {
    fn look(&mut self) -> BoxFuture<'_, Found> {
        self.ask().boxed()
    }
}
