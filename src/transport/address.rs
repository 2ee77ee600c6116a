//! Where a node is, as the user writes it.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::Error;

/// memcached's port.
const DEFAULT_PORT: u16 = 11211;

/// A node's address: `host`, `host:port`, `[v6]:port` or `unix:/path`. Without a port it is 11211.
///
/// A host name stays a name: it is resolved at each connect, so a new IP moves no key on the ring.
///
/// ```
/// use tower_memcached::Address;
///
/// let address: Address = "cache-a.example".parse()?;
/// assert_eq!(address.to_string(), "cache-a.example:11211");
/// assert!("cache-a:not-a-port".parse::<Address>().is_err());
/// # Ok::<(), tower_memcached::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address(Kind);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

impl Address {
    /// The host's name or IP (without brackets) and the port; `None` for a Unix socket.
    #[must_use]
    pub fn host_and_port(&self) -> Option<(&str, u16)> {
        match &self.0 {
            Kind::Tcp { host, port } => Some((host, *port)),
            Kind::Unix(_) => None,
        }
    }

    /// The Unix socket's path; `None` for TCP.
    #[must_use]
    pub fn unix_path(&self) -> Option<&Path> {
        match &self.0 {
            Kind::Tcp { .. } => None,
            Kind::Unix(path) => Some(path),
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |why: &str| Error::configuration(format!("the node address {text:?} {why}"));
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err(bad("has no path"))
            } else {
                Ok(Self(Kind::Unix(path.into())))
            };
        }
        let (host, port) = if let Some(bracketed) = text.strip_prefix('[') {
            let (host, rest) = bracketed
                .split_once(']')
                .ok_or_else(|| bad("lacks a closing bracket"))?;
            host.parse::<Ipv6Addr>()
                .map_err(|_| bad("has no IPv6 address between its brackets"))?;
            let port = match rest {
                "" => None,
                _ => Some(
                    rest.strip_prefix(':')
                        .ok_or_else(|| bad("has something other than a port behind its bracket"))?,
                ),
            };
            (host, port)
        } else if text.parse::<Ipv6Addr>().is_ok() {
            (text, None)
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        if host.is_empty() {
            return Err(bad("has no host"));
        }
        if host
            .bytes()
            .any(|byte| byte <= b' ' || b"/@".contains(&byte))
        {
            return Err(bad("has a host that cannot be one"));
        }
        let port = match port {
            None => DEFAULT_PORT,
            Some(digits) => digits
                .parse()
                .ok()
                .filter(|&port| port != 0)
                .ok_or_else(|| bad("has a port that is no number from 1 to 65535"))?,
        };
        Ok(Self(Kind::Tcp {
            host: host.to_owned(),
            port,
        }))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Kind::Tcp { host, port } => write!(f, "{host}:{port}"),
            Kind::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_forms_it_documents() {
        for (text, shown) in [
            ("10.0.0.1", "10.0.0.1:11211"),
            ("10.0.0.1:5", "10.0.0.1:5"),
            ("cache-a", "cache-a:11211"),
            ("[::1]:7", "[::1]:7"),
            ("[::1]", "[::1]:11211"),
            ("::1", "[::1]:11211"),
            ("unix:/run/m.sock", "unix:/run/m.sock"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn names_the_address_it_refuses() {
        for text in [
            "",
            ":11211",
            "host:",
            "host:0",
            "host:65536",
            "host:1:2",
            "[::1",
            "[::1]7",
            "[x]:1",
            "unix:",
            "two words:1",
            "memcached://h:1",
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert_eq!(error.kind(), crate::ErrorKind::InvalidConfiguration);
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }
}
