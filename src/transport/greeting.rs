//! Making a connection that is known to lead to a memcached that answers, and in what.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, timeout};

use super::credentials::{self, Credentials};
use super::protocol::Dialect;
use super::{Address, BoxStream, ConnectFailure, Connector, Protocol};
use crate::error::{Charge, Error, ErrorKind};
use crate::executor::LATE;
use crate::protocol::{
    self, MINIMUM_VERSION, Parser, Reply, ServerVersion, TOO_MANY_CONNECTIONS, Violation,
};

pub(super) struct Connected {
    pub(super) stream: BoxStream,
    /// `None` if it does not say, which only a proxy may.
    pub(super) version: Option<ServerVersion>,
    pub(super) dialect: Dialect,
}

type Failure = (ConnectFailure, Error);

/// What is asked of a server before anything else, and what that is to find out.
pub(super) struct Greeting<'a> {
    pub(super) connector: &'a dyn Connector,
    pub(super) address: &'a Address,
    pub(super) protocol: Protocol,
    pub(super) credentials: Option<Credentials>,
    /// Whether it is known to be no proxy: then both questions are asked at once.
    pub(super) is_known_direct: bool,
    /// Whether it is known, and still said by other connections, that it is a proxy.
    pub(super) is_known_proxy: bool,
    pub(super) within: Duration,
}

impl Greeting<'_> {
    /// Connects, and asks for the version: a connect that succeeds says nothing about the server (the
    /// kernel of a stopped one accepts a thousand), and what we send depends on what it is.
    pub(super) async fn connect(&self) -> Result<Connected, Failure> {
        let started = Instant::now();
        let within = self.within;
        match timeout(within, self.meet()).await {
            Ok(outcome) => outcome,
            Err(_elapsed) => {
                let late = started.elapsed() > within.saturating_add(LATE);
                let failure = if late {
                    ConnectFailure::Ours
                } else {
                    ConnectFailure::TimedOut
                };
                let message = format!("no connection that answers within {within:?}");
                Err((failure, blame(failure, failed(message))))
            }
        }
    }

    async fn dial(&self) -> Result<BoxStream, Failure> {
        let dialled = self.connector.connect(self.address).await;
        dialled.map_err(dial_failure)
    }

    async fn meet(&self) -> Result<Connected, Failure> {
        let classic = cfg!(feature = "classic") && self.protocol != Protocol::Meta;
        // Who wants a password answers only the last of several questions.
        if classic && self.is_known_direct && self.credentials.is_none() {
            let mut stream = self.dial().await?;
            if let Some((version, end)) = ask_both(&mut stream).await
                && let Some(dialect) = self.dialect(version, &end)
            {
                return Ok(Connected {
                    stream,
                    version,
                    dialect,
                });
            }
        }
        let mut mute = self.is_known_proxy;
        // It may close the connection on a question because it is a proxy, or because it is being restarted
        // just then: only who does so twice is a proxy.
        let mut closed = match self.is_known_proxy {
            true => 2,
            false => 0,
        };
        loop {
            let mut stream = self.dial().await?;
            let mut said = ask(&mut stream, b"version\r\n").await;
            if said.demands_credentials() {
                credentials::authenticate(&mut stream, self.credentials.as_ref()).await?;
                said = ask(&mut stream, b"version\r\n").await;
            }
            let version = match said {
                said if said.demands_credentials() => return Err(credentials::refused()),
                Said::Reply(Reply::Version(text)) => text,
                Said::Reply(Reply::Failure(_, text)) if text.contains(TOO_MANY_CONNECTIONS) => {
                    let full = ConnectFailure::Full;
                    return Err((full, blame(full, failed(text))));
                }
                // A proxy that does not know the command, or whose server is gone.
                Said::Reply(Reply::Failure(..)) if classic => return Ok(proxy(stream, None)),
                Said::Ended(_) if classic && mute => return self.meet_without_version().await,
                Said::Ended(_) if classic => {
                    mute = true;
                    continue;
                }
                said => return Err(said.instead_of("version")),
            };
            let known = ServerVersion::parse(&version);
            let modern = known.is_some_and(ServerVersion::is_supported);
            if !classic && !modern {
                let message =
                    format!("it is memcached {version:?}, and {MINIMUM_VERSION} is needed");
                let error = Error::new(ErrorKind::Unsupported, message);
                return Err((ConnectFailure::Other, error));
            }
            let dialect = if !classic {
                Dialect::Meta
            } else if closed == 2 {
                Dialect::Classic { proxy: true }
            } else {
                // Whether meta commands reach a server cannot be told by its version: a proxy may
                // pass that on.
                let said = ask(&mut stream, b"mn\r\n").await;
                let dialect = match &said {
                    Said::Reply(reply) => self.dialect(known, reply),
                    Said::Nonsense(_) | Said::Ended(_) => None,
                };
                let Some(dialect) = dialect else {
                    closed += 1;
                    continue;
                };
                dialect
            };
            return Ok(Connected {
                stream,
                version: known,
                dialect,
            });
        }
    }

    /// What a server of that version speaks that answers so to the end of an empty batch of meta
    /// commands; `None` if no server does.
    fn dialect(&self, version: Option<ServerVersion>, end: &Reply) -> Option<Dialect> {
        let modern = version.is_some_and(ServerVersion::is_supported);
        match end {
            Reply::BatchEnd if modern && self.protocol == Protocol::Auto => Some(Dialect::Meta),
            Reply::BatchEnd | Reply::Failure(protocol::Failure::UnknownCommand, _) => {
                Some(Dialect::Classic { proxy: false })
            }
            _ => None,
        }
    }

    async fn meet_without_version(&self) -> Result<Connected, Failure> {
        let mut stream = self.dial().await?;
        // All of them know this.
        match ask(&mut stream, b"get tower-memcached:greeting\r\n").await {
            // No proxy, but a server that has just come back: it is greeted as one the next time.
            said if said.demands_credentials() => {
                let message = "it closed before it answered, and then demanded credentials";
                Err((ConnectFailure::Other, failed(message)))
            }
            Said::Reply(Reply::StatsEnd | Reply::Failure(..)) => Ok(proxy(stream, None)),
            said => Err(said.instead_of("get")),
        }
    }
}

fn proxy(stream: BoxStream, version: Option<ServerVersion>) -> Connected {
    Connected {
        stream,
        version,
        dialect: Dialect::Classic { proxy: true },
    }
}

fn failed(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::ConnectionFailed, message).charged_to(Charge::Node)
}

/// It is to be asked in another protocol than this transport's.
pub(super) fn other_protocol() -> Failure {
    let message = "it speaks another protocol than before";
    let error = Error::new(ErrorKind::ConnectionFailed, message);
    (ConnectFailure::OtherProtocol, error)
}

fn dial_failure(error: io::Error) -> Failure {
    let failure = match error.kind() {
        io::ErrorKind::ConnectionRefused => ConnectFailure::Refused,
        io::ErrorKind::TimedOut => ConnectFailure::TimedOut,
        // No free local port, with a bind address or without; or that address is not ours.
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse | io::ErrorKind::OutOfMemory => {
            ConnectFailure::Ours
        }
        io::ErrorKind::ResourceBusy => ConnectFailure::Full,
        // ENFILE, EMFILE: too many open files.
        _ if cfg!(unix) && matches!(error.raw_os_error(), Some(23 | 24)) => ConnectFailure::Ours,
        _ => ConnectFailure::Other,
    };
    let failed = failed(error.to_string()).with_source(error);
    (failure, blame(failure, failed))
}

/// What is our own shortage, or an overload, is no evidence against the node.
fn blame(failure: ConnectFailure, error: Error) -> Error {
    match failure {
        ConnectFailure::Ours | ConnectFailure::Full => error.charged_to(Charge::Nobody),
        _ => error,
    }
}

/// What came upon a question.
enum Said {
    Reply(Reply),
    Nonsense(Violation),
    /// It closed the connection.
    Ended(io::Error),
}

impl Said {
    fn demands_credentials(&self) -> bool {
        matches!(self, Self::Reply(reply) if credentials::are_demanded(reply))
    }

    /// Where an answer to that question was wanted.
    fn instead_of(self, request: &'static str) -> Failure {
        let violation = match self {
            Self::Ended(error) => {
                let message = format!("it closed before it answered: {error}");
                return (ConnectFailure::Other, failed(message).with_source(error));
            }
            Self::Nonsense(violation) => violation,
            Self::Reply(reply) => Violation::WrongKind {
                request,
                found: reply.name(),
            },
        };
        let error = failed(format!("it does not answer like a memcached: {violation}"));
        (ConnectFailure::Other, error.with_source(violation))
    }
}

/// Asks for the version and for the end of an empty batch in one write; `None` unless both are answered.
async fn ask_both(stream: &mut BoxStream) -> Option<(Option<ServerVersion>, Reply)> {
    stream.write_all(b"version\r\nmn\r\n").await.ok()?;
    stream.flush().await.ok()?;
    let mut parser = Parser::new(0);
    let mut input = BytesMut::with_capacity(256);
    let mut version = None;
    loop {
        match (parser.parse(&mut input).ok()?, version) {
            (Some(Reply::Version(text)), None) => version = Some(ServerVersion::parse(&text)),
            (Some(end), Some(version)) if input.is_empty() => return Some((version, end)),
            (Some(_), _) => return None,
            (None, _) => {
                if stream.read_buf(&mut input).await.ok()? == 0 {
                    return None;
                }
            }
        }
    }
}

/// Asks something that has an answer of one line, and nothing behind it.
async fn ask(stream: &mut BoxStream, question: &[u8]) -> Said {
    // A server that is full says so and closes, so the write may fail while its reason waits to be
    // read.
    let written = match stream.write_all(question).await {
        Ok(()) => stream.flush().await,
        failed => failed,
    };
    let mut parser = Parser::new(0);
    let mut input = BytesMut::with_capacity(256);
    loop {
        match parser.parse(&mut input) {
            Ok(Some(reply)) if input.is_empty() => return Said::Reply(reply),
            Ok(Some(reply)) => return Said::Nonsense(Violation::Unsolicited(reply.name())),
            Ok(None) => {}
            Err(violation) => return Said::Nonsense(violation),
        }
        match stream.read_buf(&mut input).await {
            Ok(0) => {
                let ended = written.err();
                let ended = ended.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into());
                return Said::Ended(ended);
            }
            Ok(_) => {}
            Err(error) => return Said::Ended(error),
        }
    }
}
