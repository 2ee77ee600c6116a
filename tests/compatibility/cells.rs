//! What the suite is run against, and what is to come of it.

use std::fmt;

use tower_memcached::Protocol;

/// A protocol, a server, and a kind of connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) protocol: Protocol,
    pub(crate) server: Server,
    pub(crate) connection: Connection,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// The real one.
    Memcached,
    /// A real twemproxy, with two of the real ones behind it.
    Twemproxy,
    /// `testing::Server`, as it is, as an older one, and as a proxy.
    InProcess,
    InProcess1439,
    InProcessProxy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connection {
    Tcp,
    Unix,
    /// Over TCP.
    Tls,
    /// Over TCP, to a server that asks for a password.
    Password,
}

/// What a behaviour is to come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    Works,
    /// A typed error, unsent.
    Unsupported,
    /// It is done without.
    Lacks,
}

/// A protocol and a server, over each of these connections.
pub(crate) type Line = (Protocol, Server, &'static [Connection]);

/// The name of a behaviour, in which cells, and what comes of it there.
pub(crate) type Exception = (&'static str, fn(&Cell) -> bool, Expected);

/// The lines of the matrix.
pub(crate) const LINES: &[Line] = {
    use Connection::{Password, Tcp, Tls, Unix};
    const ALL: &[Connection] = &[Tcp, Unix, Tls, Password];
    use Protocol::{Auto, Classic, Meta};
    use Server::{InProcess, InProcess1439, InProcessProxy, Memcached, Twemproxy};
    &[
        (Auto, Memcached, ALL),
        (Meta, Memcached, ALL),
        (Meta, InProcess, ALL),
        (Classic, Memcached, ALL),
        (Classic, InProcess, ALL),
        (Classic, Twemproxy, &[Tcp, Unix]),
        (Auto, Twemproxy, &[Tcp, Unix]),
        (Auto, InProcess1439, &[Tcp, Unix]),
        (Auto, InProcessProxy, &[Tcp, Unix]),
    ]
};

/// What does not work.
pub(crate) const EXCEPTIONS: &[Exception] = &[
    ("`Key::binary`", Cell::is_classic, Expected::Unsupported),
    (
        "one load among several processes (leases)",
        Cell::is_proxied,
        Expected::Lacks,
    ),
    (
        "`stale_if_error`: an old value, marked as such, for none",
        Cell::is_classic,
        Expected::Lacks,
    ),
    ("`gets`, `cas`", Cell::is_proxied, Expected::Unsupported),
    ("`stats`", Cell::is_proxied, Expected::Unsupported),
    ("`flush_all`", Cell::is_proxied, Expected::Unsupported),
];

impl Cell {
    pub(crate) fn all() -> Vec<Self> {
        let cells = |&(protocol, server, connections): &Line| {
            connections.iter().map(move |&connection| Self {
                protocol,
                server,
                connection,
            })
        };
        LINES.iter().flat_map(cells).collect()
    }

    fn is_proxied(&self) -> bool {
        matches!(self.server, Server::Twemproxy | Server::InProcessProxy)
    }

    fn is_classic(&self) -> bool {
        match self.protocol {
            Protocol::Classic => true,
            Protocol::Auto => self.is_proxied() || self.server == Server::InProcess1439,
            Protocol::Meta => false,
        }
    }

    pub(crate) fn expected(&self, behaviour: &str) -> Expected {
        let exception = EXCEPTIONS
            .iter()
            .find(|(name, applies, _)| *name == behaviour && applies(self));
        exception.map_or(Expected::Works, |(_, _, expected)| *expected)
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (protocol, server) = (self.protocol, self.server);
        write!(f, "{protocol}, {server}, {}", self.connection)
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memcached => "memcached 1.6",
            Self::Twemproxy => "twemproxy 0.5",
            Self::InProcess => "in-process",
            Self::InProcess1439 => "in-process, as 1.4.39",
            Self::InProcessProxy => "in-process, as a proxy",
        })
    }
}

impl Connection {
    pub(crate) const ALL: [Self; 4] = [Self::Tcp, Self::Unix, Self::Tls, Self::Password];
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Unix => "Unix socket",
            Self::Tls => "TLS",
            Self::Password => "password",
        })
    }
}
