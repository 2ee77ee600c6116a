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
    /// It had IPv4 addresses.
    had_v4: bool,
    /// How often in a row it has had none since.
    without_v4: u32,
}

/// So often in a row IPv6 alone is taken for half an answer: the resolver asks for both, and where one
/// question fails it has what the other brought.
const HALF_ANSWERS: u32 = 9;

impl Dns {
    pub(super) fn new(name: String, port: u16) -> Self {
        Self {
            name,
            port,
            asked: None,
            had_v4: false,
            without_v4: 0,
        }
    }

    fn found(&mut self, addresses: Vec<SocketAddr>) -> Found {
        let has_v4 = addresses.iter().any(SocketAddr::is_ipv4);
        if self.had_v4 && !has_v4 && !addresses.is_empty() && self.without_v4 < HALF_ANSWERS {
            self.without_v4 += 1;
            let message = format!("{}: it has no IPv4 addresses any more", self.name);
            return Err(failed(message));
        }
        if !addresses.is_empty() {
            self.had_v4 = has_v4;
        }
        self.without_v4 = 0;
        nodes(addresses)
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
            self.found(addresses)
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

    #[test]
    fn half_an_answer_does_not_make_other_nodes_of_them_unless_it_stays_so() {
        let addresses = |of: &[&str]| -> Vec<SocketAddr> {
            of.iter().map(|address| address.parse().unwrap()).collect()
        };
        let (both, half) = (
            addresses(&["[::1]:5", "10.0.0.1:5"]),
            addresses(&["[::1]:5"]),
        );
        let v4 = nodes(both.clone());
        let mut it = Dns::new("cache".to_owned(), 5);
        assert_eq!(
            it.found(half.clone()).unwrap(),
            nodes(half.clone()).unwrap()
        );
        for _ in 0..3 {
            assert_eq!(it.found(both.clone()).unwrap(), *v4.as_ref().unwrap());
            for _ in 0..HALF_ANSWERS {
                it.found(half.clone()).unwrap_err();
            }
        }
        assert_eq!(
            it.found(half.clone()).unwrap(),
            nodes(half.clone()).unwrap()
        );
        assert_eq!(it.found(half.clone()).unwrap(), nodes(half).unwrap());
    }
}
