//! Options of TCP sockets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};

use crate::error::Invalid;

/// What Linux takes for the idle time before keepalive.
const LONGEST_KEEPALIVE: Duration = Duration::from_secs(32_767);

/// How TCP sockets are set up: see [`ClientBuilder::socket`](crate::ClientBuilder::socket). Unix sockets
/// have none of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct SocketSettings {
    nodelay: bool,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    keepalive: Option<Duration>,
    bind: Option<IpAddr>,
}

impl Default for SocketSettings {
    fn default() -> Self {
        Self {
            nodelay: true,
            keepalive: None,
            bind: None,
        }
    }
}

impl SocketSettings {
    /// Whether small writes leave at once (`TCP_NODELAY`); they do by default. Without it a write waits
    /// for the acknowledgement of the one before, which the other side may delay by 40 ms: more than an
    /// attempt has. Requests are batched already, so nothing is gained by turning it off.
    #[must_use]
    pub fn nodelay(mut self, nodelay: bool) -> Self {
        self.nodelay = nodelay;
        self
    }

    /// After so long without traffic the kernel asks the other one whether the connection still exists
    /// (`SO_KEEPALIVE`), in whole seconds from 1; it does not by default. How often it repeats the
    /// question, and when it gives up, is the system's (Linux: 9 times, 75 s apart).
    ///
    /// It keeps a firewall or NAT from forgetting an idle connection. Here each
    /// [probe](crate::ProbeSettings) is such traffic, once a second over one of the node's connections
    /// in turn, so it matters only where there are many connections, or probes are rare. It
    /// finds no server that hangs: the kernel of a stopped process answers for it. For that are the stall
    /// timeout and the probes.
    #[must_use]
    pub fn keepalive(mut self, idle: Duration) -> Self {
        self.keepalive = Some(idle);
        self
    }

    /// The local address that connections come from, for a host with several; the system's choice by
    /// default. Of a node's addresses only those of the same family are tried then, and a node that has
    /// none cannot be connected to. An address that is not this host's is no evidence against a node,
    /// and ejects none: each request fails, as
    /// [`ErrorKind::ConnectionFailed`](crate::ErrorKind::ConnectionFailed).
    #[must_use]
    pub fn bind(mut self, address: IpAddr) -> Self {
        self.bind = Some(address);
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        match self.keepalive {
            Some(idle) if !(Duration::from_secs(1)..=LONGEST_KEEPALIVE).contains(&idle) => {
                Err(Invalid::new("keepalive", "must be from 1 s to 32767 s"))
            }
            _ => Ok(()),
        }
    }

    /// Those of a node's addresses that can be reached from the local one.
    pub(super) fn reachable(
        &self,
        addresses: impl Iterator<Item = SocketAddr>,
    ) -> io::Result<Vec<SocketAddr>> {
        let (mut some, mut fitting) = (false, Vec::new());
        for address in addresses {
            some = true;
            if self
                .bind
                .is_none_or(|bind| bind.is_ipv4() == address.is_ipv4())
            {
                fitting.push(address);
            }
        }
        let why = match self.bind {
            _ if !fitting.is_empty() => return Ok(fitting),
            Some(bind) if some => {
                let family = if bind.is_ipv4() { "IPv4" } else { "IPv6" };
                format!("no address of it is {family}, as {bind} is, which is to be bound to")
            }
            _ => "the name has no address".to_owned(),
        };
        Err(io::Error::new(io::ErrorKind::NotFound, why))
    }

    pub(super) async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_nodelay(self.nodelay)?;
        if let Some(idle) = self.keepalive {
            SockRef::from(&socket).set_tcp_keepalive(&TcpKeepalive::new().with_time(idle))?;
        }
        if let Some(bind) = self.bind {
            socket.bind(SocketAddr::new(bind, 0))?;
        }
        socket.connect(address).await
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn only_addresses_of_the_bound_ones_family_are_tried() {
        let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, 1));
        let bound = |address: IpAddr| SocketSettings::default().bind(address);
        let any = SocketSettings::default().reachable([v6, v4].into_iter());
        assert_eq!(any.unwrap(), [v6, v4]);
        for (bind, fitting, other) in [(v4.ip(), v4, v6), (v6.ip(), v6, v4)] {
            let reachable = bound(bind).reachable([v6, v4].into_iter());
            assert_eq!(reachable.unwrap(), [fitting]);
            let error = bound(bind).reachable([other].into_iter()).unwrap_err();
            assert!(error.to_string().contains(&bind.to_string()), "{error}");
        }
        let error = bound(v4.ip()).reachable(std::iter::empty()).unwrap_err();
        assert_eq!(error.to_string(), "the name has no address");
    }

    // Only Linux has all of 127.0.0.0/8 without being told.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn sockets_have_the_options_that_they_were_told() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let settings = SocketSettings::default();
        let stream = settings.connect(address).await.unwrap();
        assert!(stream.nodelay().unwrap());
        assert!(!SockRef::from(&stream).keepalive().unwrap());
        let idle = Duration::from_secs(17);
        let bind = IpAddr::from([127, 0, 0, 2]);
        let settings = settings.nodelay(false).keepalive(idle).bind(bind);
        let stream = settings.connect(address).await.unwrap();
        assert!(!stream.nodelay().unwrap());
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), idle);
        assert_eq!(stream.local_addr().unwrap().ip(), bind);
    }

    #[test]
    fn keepalive_is_within_what_systems_take() {
        for (idle, good) in [
            (Duration::from_millis(999), false),
            (Duration::from_secs(1), true),
            (LONGEST_KEEPALIVE, true),
            (Duration::MAX, false),
        ] {
            let settings = SocketSettings::default().keepalive(idle);
            assert_eq!(settings.validate().is_ok(), good, "{idle:?}");
        }
    }
}
