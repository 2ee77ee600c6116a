//! The seam to the network: how a byte stream to an address is made.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};

use super::{Address, SocketSettings};
use crate::error::Result;

/// A byte stream to a server.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// What a [`Connector`] makes. Connecting is rare, so it is boxed and the client's type stays
/// simple.
pub type BoxStream = Box<dyn ByteStream>;

/// The making of a stream.
pub type Connecting = BoxFuture<'static, io::Result<BoxStream>>;

/// Makes byte streams to nodes. The default is [`SystemConnector`]; a network simulation, or a
/// fault-injecting test, brings its own.
///
/// The connecting future runs on the client's executor, is dropped when the connect timeout has
/// passed, and must not block: all that its node does waits for it, and a dedicated executor's threads
/// have a runtime of one thread each, where `tokio::task::block_in_place` panics. One connect at a time is made for each connection of a node.
pub trait Connector: Send + Sync + 'static {
    /// Starts connecting. An error counts against the node, except those that are this machine's
    /// own (too many open files, no free ports), and one of the kind
    /// [`ResourceBusy`](io::ErrorKind::ResourceBusy): the server is there, and has all the connections
    /// that it can take.
    fn connect(&self, address: &Address) -> Connecting;

    /// How long connecting by this may take, up to the server's first answer, where the client is told
    /// no [connect timeout](crate::ClientBuilder::connect_timeout); `None`, by default, is twice the
    /// attempt timeout. For what needs more round trips than a TCP connect, such as TLS.
    fn connect_timeout(&self) -> Option<Duration> {
        None
    }
}

/// TCP, with [options](SocketSettings), and Unix sockets. Host names are resolved at each connect, and
/// their addresses tried one after the other.
#[derive(Clone, Debug, Default)]
pub struct SystemConnector(SocketSettings);

impl SystemConnector {
    /// With the default options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With these options.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidConfiguration`](crate::ErrorKind::InvalidConfiguration) if the time of
    /// keepalive is none that systems take.
    pub fn with(settings: SocketSettings) -> Result<Self> {
        settings.validate()?;
        Ok(Self(settings))
    }
}

/// How long one of several addresses of a name may take before the next one is tried as well.
/// RFC 8305 (Happy Eyeballs) recommends 250 ms and permits down to 10; our whole connect is
/// allowed 60 ms by default.
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(15);

impl Connector for SystemConnector {
    fn connect(&self, address: &Address) -> Connecting {
        if let Some(path) = address.unix_path() {
            let path = path.to_owned();
            return Box::pin(async move { unix(&path).await });
        }
        let (host, port) = address
            .host_and_port()
            .map(|(host, port)| (host.to_owned(), port))
            .unwrap_or_default();
        let settings = self.0.clone();
        Box::pin(async move {
            let addresses = lookup_host((host.as_str(), port)).await?;
            let addresses = settings.reachable(addresses)?;
            let stream = first_to_connect(&settings, addresses).await?;
            Ok(Box::new(stream) as BoxStream)
        })
    }
}

/// Tries the addresses in order: the next one as soon as one fails, or is slow, without giving
/// the slow one up.
async fn first_to_connect(
    settings: &SocketSettings,
    addresses: Vec<SocketAddr>,
) -> io::Result<TcpStream> {
    use futures::StreamExt as _;
    use futures::stream::FuturesUnordered;

    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut left = addresses.into_iter();
    let mut trying = FuturesUnordered::new();
    loop {
        match left.next() {
            Some(address) => trying.push(settings.connect(address)),
            None if trying.is_empty() => return Err(failure),
            None => {}
        }
        let more = left.len() > 0;
        let outcome = if more {
            match tokio::time::timeout(NEXT_ADDRESS_AFTER, trying.next()).await {
                Ok(outcome) => outcome,
                Err(_slow) => continue,
            }
        } else {
            trying.next().await
        };
        match outcome {
            Some(Ok(stream)) => return Ok(stream),
            Some(Err(error)) => failure = error,
            None => {}
        }
    }
}

#[cfg(unix)]
async fn unix(path: &std::path::Path) -> io::Result<BoxStream> {
    Ok(Box::new(tokio::net::UnixStream::connect(path).await?))
}

#[cfg(not(unix))]
async fn unix(_path: &std::path::Path) -> io::Result<BoxStream> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "this system has no Unix sockets",
    ))
}
