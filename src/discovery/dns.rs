//! Addresses by a name.

use std::io;
use std::net::SocketAddr;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::net::lookup_host;

use super::{Found, Look, failed};
use crate::cluster::NodeSpec;

pub(super) struct Dns {
    name: String,
    port: u16,
    /// Under way: the system's resolver cannot be stopped, and may take longer than we wait. So there
    /// is never more than one.
    asked: Option<BoxFuture<'static, io::Result<Vec<SocketAddr>>>>,
}

impl Dns {
    pub(super) fn new(name: String, port: u16) -> Self {
        Self {
            name,
            port,
            asked: None,
        }
    }
}

impl Look for Dns {
    fn look(&mut self) -> BoxFuture<'_, Found> {
        let answer = async {
            let asked = self.asked.get_or_insert_with(|| {
                let place = (self.name.clone(), self.port);
                let asking = async move {
                    let found = lookup_host((place.0.as_str(), place.1)).await;
                    found.map(Iterator::collect)
                };
                asking.boxed()
            });
            let answer = asked.as_mut().await;
            self.asked = None;
            let addresses = answer.map_err(|error| failed(format!("{}: {error}", self.name)))?;
            nodes(addresses)
        };
        answer.boxed()
    }
}

/// Each address once, and of one kind.
fn nodes(mut addresses: Vec<SocketAddr>) -> Found {
    if addresses.iter().any(SocketAddr::is_ipv4) {
        addresses.retain(SocketAddr::is_ipv4);
    }
    addresses.sort_unstable();
    addresses.dedup();
    let specs = addresses.iter();
    specs
        .map(|address| NodeSpec::new(&address.to_string()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_with_addresses_of_both_kinds_is_one_node() {
        let addresses = ["[::1]:5", "10.0.0.2:5", "10.0.0.1:5", "10.0.0.2:5"];
        let addresses = addresses.map(|address| address.parse().unwrap());
        let names = |addresses: &[SocketAddr]| -> Vec<_> {
            let specs = nodes(addresses.to_vec()).unwrap().into_iter();
            specs.map(|spec| spec.name().to_string()).collect()
        };
        assert_eq!(names(&addresses), ["10.0.0.1:5", "10.0.0.2:5"]);
        assert_eq!(names(&addresses[..1]), ["[::1]:5"]);
        assert_eq!(nodes(Vec::new()).unwrap(), []);
    }
}
