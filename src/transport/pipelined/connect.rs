//! Making a connection that is known to lead to a memcached that answers.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, timeout};

use super::super::{Address, BoxStream, Connector};
use crate::error::{Charge, Error, ErrorKind};
use crate::executor::LATE;
use crate::protocol::{MINIMUM_VERSION, Parser, Reply, ServerVersion, Violation};

/// Why there is no connection, as far as it matters to judging the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConnectFailure {
    /// Nothing listens there.
    Refused,
    /// No connection, or no answer to the first question, in time.
    TimedOut,
    /// Anything else that is the node's or the network's fault: unreachable, reset, an unknown
    /// name, not a memcached, one that is too old.
    Other,
    /// It has all the connections it can take. It may serve those well.
    Full,
    /// This machine's own shortage, or our own lateness.
    Ours,
}

impl ConnectFailure {
    /// Whether it says something about the node.
    pub(crate) fn is_the_nodes(self) -> bool {
        matches!(self, Self::Refused | Self::TimedOut | Self::Other)
    }
}

pub(super) struct Connected {
    pub(super) stream: BoxStream,
    pub(super) version: ServerVersion,
}

/// Connects, and asks for the version: a connect that succeeds says nothing about the server (the
/// kernel of a stopped one accepts a thousand), and what we send depends on what it is.
pub(super) async fn connect(
    connector: &dyn Connector,
    address: &Address,
    within: Duration,
) -> Result<Connected, (ConnectFailure, Error)> {
    let started = Instant::now();
    let attempt = async {
        let stream = connector.connect(address).await.map_err(dial_failure)?;
        greet(stream).await
    };
    match timeout(within, attempt).await {
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

fn failed(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::ConnectionFailed, message).charged_to(Charge::Node)
}

fn dial_failure(error: io::Error) -> (ConnectFailure, Error) {
    let failure = match error.kind() {
        io::ErrorKind::ConnectionRefused => ConnectFailure::Refused,
        io::ErrorKind::TimedOut => ConnectFailure::TimedOut,
        // No free local port.
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::OutOfMemory => ConnectFailure::Ours,
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

async fn greet(mut stream: BoxStream) -> Result<Connected, (ConnectFailure, Error)> {
    let broken = |error: io::Error| {
        let message = format!("it closed before it answered: {error}");
        (ConnectFailure::Other, failed(message).with_source(error))
    };
    let strange = |violation: Violation| {
        let error = failed(format!("it does not answer like a memcached: {violation}"));
        (ConnectFailure::Other, error.with_source(violation))
    };
    // A server that is full says so and closes, so the write may fail while its reason waits to be
    // read.
    let written = match stream.write_all(b"version\r\n").await {
        Ok(()) => stream.flush().await,
        failed => failed,
    };
    let mut parser = Parser::new(0);
    let mut input = BytesMut::with_capacity(256);
    let reply = loop {
        match parser.parse(&mut input) {
            Ok(Some(reply)) => break reply,
            Ok(None) => {}
            Err(violation) => return Err(strange(violation)),
        }
        if stream.read_buf(&mut input).await.map_err(broken)? == 0 {
            written.map_err(broken)?;
            return Err(broken(io::ErrorKind::UnexpectedEof.into()));
        }
    };
    let text = match reply {
        Reply::Version(text) if input.is_empty() => text,
        Reply::Failure(_, text) if text.contains("Too many open connections") => {
            let full = ConnectFailure::Full;
            return Err((full, blame(full, failed(text))));
        }
        other => {
            return Err(strange(Violation::WrongKind {
                request: "version",
                found: other.name(),
            }));
        }
    };
    match ServerVersion::parse(&text) {
        Some(version) if version.is_supported() => Ok(Connected { stream, version }),
        _ => {
            let message = format!("it is memcached {text:?}, and {MINIMUM_VERSION} is needed");
            let error = Error::new(ErrorKind::Unsupported, message);
            Err((ConnectFailure::Other, error))
        }
    }
}
