//! The one error of this crate. It answers the question a caller has: *what do I do next?*
//!
//! [`Error::kind`] says what happened, [`Error::sent`] whether the server may have executed the
//! request, [`Error::node`] where. A miss is never an error.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

/// What tower layers of any origin may return.
pub(crate) type BoxError = tower::BoxError;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, in terms of what the caller can do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The key is empty, over 250 bytes when encoded, or holds a space or control character.
    /// Nothing was sent. A bug in the caller.
    InvalidKey,
    /// The value is over the configured limit (nothing was sent), over the server's (it keeps no
    /// value for this key then, not even the old one), or a stored value is over the client's
    /// limit (it was skipped, the connection lives on).
    ValueTooLarge,
    /// A setting does not make sense; no client was built.
    InvalidConfiguration,
    /// The attempt's time or the operation's deadline ran out.
    Timeout,
    /// The node's circuit breaker is open, and the request is not moved: the failure mode or the
    /// operation forbids it, or more nodes are out than others may stand in for. Or what the node has
    /// for the key is old and being deleted. What was on its way when the breaker opened may have been
    /// executed ([`Error::sent`]); otherwise nothing was sent.
    NodeUnavailable,
    /// A bound of our own is reached: a queue or an in-flight limit. Nothing was sent.
    Overloaded,
    /// No connection could be made. Nothing was sent.
    ConnectionFailed,
    /// No connection could be made, because the server refuses this client's
    /// [credentials](crate::Credentials), or demands some and there are none. Nothing was sent.
    Unauthenticated,
    /// The connection ended under the request.
    ConnectionLost,
    /// The connection was closed because the server did not answer on it: no byte for the stall
    /// timeout, or several time-outs in a row.
    Unresponsive,
    /// The server's bytes are not the protocol, or not the answer to what was asked. The
    /// connection was closed.
    Protocol,
    /// The server answered `SERVER_ERROR`; for example it is out of memory.
    Server,
    /// The server answered `CLIENT_ERROR`: it refuses the request as it is.
    Rejected,
    /// `increment` or `decrement` of a value that is not a number.
    NotANumber,
    /// It cannot be done here: the server is too old for the meta protocol and is to be asked in no other
    /// ([`MINIMUM_VERSION`](crate::MINIMUM_VERSION)); the classic protocol, or a proxy, has no way to say
    /// it (nothing was sent; `docs/COMPATIBILITY.md` has the list) or the server does not know the command;
    /// it is not for this client, as to append to values that may be compressed (nothing was sent);
    /// or a value is compressed in a way that the crate is built without.
    Unsupported,
    /// A value could not be encoded (nothing was sent), or what was read is not what it should be: its
    /// client flags name another format, it does not decode, or it is damaged
    /// ([`Codec`](crate::Codec), [`CompressionSettings`](crate::CompressionSettings)). The server did
    /// what it was asked.
    Codec,
    /// The client is shut down, or is being [shut down](crate::Client::shutdown); or the runtime its
    /// connections live in is.
    Shutdown,
    /// A kill switch is thrown: the functional group does not use the cache now. Nothing was sent.
    Disabled,
    /// The read-through loader failed, panicked or ran out of time; [`source`](StdError::source)
    /// is the loader's own error where there is one.
    Load,
    /// A read-through load was not made, to protect the database: as many run or wait as may, none
    /// may start for now, or most of late have failed. Nothing was asked of the database.
    LoadShed,
    /// No tokio runtime to run in: with [`Executor::current`](crate::Executor::current) outside one.
    NoRuntime,
    /// The nodes could not be [discovered](crate::Discovery). Never an operation's error: see
    /// [`DiscoveryStatus`](crate::DiscoveryStatus).
    Discovery,
    /// A user-supplied layer failed, with an error that is not ours, or gave a response that does
    /// not fit the request.
    Layer,
}

impl ErrorKind {
    const fn describe(self) -> &'static str {
        match self {
            Self::InvalidKey => "invalid key",
            Self::ValueTooLarge => "value too large",
            Self::InvalidConfiguration => "invalid configuration",
            Self::Timeout => "timed out",
            Self::NodeUnavailable => "node unavailable",
            Self::Overloaded => "overloaded",
            Self::ConnectionFailed => "connecting failed",
            Self::Unauthenticated => "not authenticated",
            Self::ConnectionLost => "connection lost",
            Self::Unresponsive => "unresponsive",
            Self::Protocol => "protocol violation",
            Self::Server => "server error",
            Self::Rejected => "rejected by the server",
            Self::NotANumber => "not a number",
            Self::Unsupported => "not supported",
            Self::Codec => "not the expected value",
            Self::Shutdown => "shut down",
            Self::Disabled => "disabled",
            Self::Load => "load failed",
            Self::LoadShed => "load shed",
            Self::NoRuntime => "no tokio runtime",
            Self::Discovery => "discovery failed",
            Self::Layer => "layer failed",
        }
    }
}

/// Whether the server may have executed the request that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sent {
    /// No byte of it left this process: it was not executed and never will be.
    No,
    /// Some of it left; the server may have executed it, or may still do so, even much later.
    Maybe,
    /// The server answered it.
    Yes,
}

/// Whom a failure counts against. A time-out found late because our own threads were late, or one
/// that never left our queue, is the caller's error but no evidence against the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Charge {
    Node,
    Nobody,
    /// Found late: whether the node was in time is not known.
    OurLateness,
}

/// Why an operation failed.
///
/// One type for the whole crate, cheap to return (one pointer) and to clone, so that all callers
/// waiting for one load can share it. Decide with [`kind`](Self::kind), [`sent`](Self::sent) and
/// the predicates; the `Display` text is for people and not stable.
///
/// ```
/// use tower_memcached::{Error, Sent};
///
/// fn worth_another_try(error: &Error) -> bool {
///     error.is_timeout() && error.sent() == Sent::No
/// }
/// ```
#[derive(Clone)]
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    sent: Sent,
    charge: Charge,
    node: Option<Arc<str>>,
    message: Cow<'static, str>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            sent: Sent::No,
            charge: Charge::Nobody,
            node: None,
            message: message.into(),
            source: None,
        }))
    }

    pub(crate) fn message(&self) -> &str {
        &self.0.message
    }

    pub(crate) fn configuration(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::InvalidConfiguration, message)
    }

    pub(crate) fn with_sent(mut self, sent: Sent) -> Self {
        self.0.sent = sent;
        self
    }

    /// At least as much in doubt as an earlier attempt of the same request was.
    pub(crate) fn after_attempts(self, sent: Sent) -> Self {
        if sent <= self.0.sent {
            return self;
        }
        let mut error = self.with_sent(sent);
        let message = std::mem::take(&mut error.0.message);
        error.0.message = format!("{message}; an attempt before was sent").into();
        error
    }

    pub(crate) fn charged_to(mut self, charge: Charge) -> Self {
        self.0.charge = charge;
        self
    }

    /// Names the node; one that is named already stays, since it is nearer to the cause.
    pub(crate) fn at_node(mut self, node: &Arc<str>) -> Self {
        self.0.node.get_or_insert_with(|| node.clone());
        self
    }

    pub(crate) fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(Arc::from(source.into()));
        self
    }

    /// Takes an error out of a layer's box: ours as it was, and tower's own time-out and load
    /// shedding as what they are. Anything else is [`ErrorKind::Layer`], of which we cannot know
    /// whether the request was sent.
    pub(crate) fn from_boxed(error: BoxError) -> Self {
        let foreign = match error.downcast::<Self>() {
            Ok(own) => return *own,
            Err(foreign) => foreign,
        };
        if foreign.is::<tower::load_shed::error::Overloaded>() {
            return Self::new(ErrorKind::Overloaded, "a layer sheds load").with_source(foreign);
        }
        let error = if foreign.is::<tower::timeout::error::Elapsed>() {
            Self::new(ErrorKind::Timeout, "a layer's time ran out").charged_to(Charge::Node)
        } else {
            Self::new(ErrorKind::Layer, "a layer's own error")
        };
        error.with_sent(Sent::Maybe).with_source(foreign)
    }

    pub(crate) fn charge(&self) -> Charge {
        self.0.charge
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the server may have executed the request.
    #[must_use]
    pub fn sent(&self) -> Sent {
        self.0.sent
    }

    /// The node it happened at, as it was named in the configuration; `None` where no node was
    /// involved yet.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// The attempt's or the operation's time ran out.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        self.0.kind == ErrorKind::Timeout
    }

    /// The node cannot be reached or used now: its breaker is open, or the connection failed, was
    /// lost, or did not answer.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        matches!(
            self.0.kind,
            ErrorKind::NodeUnavailable
                | ErrorKind::ConnectionFailed
                | ErrorKind::Unauthenticated
                | ErrorKind::ConnectionLost
                | ErrorKind::Unresponsive
        )
    }

    /// Shed by a bound of our own, in front of a node or of the database; sending less is the
    /// remedy, sending again at once is not.
    #[must_use]
    pub fn is_overloaded(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Overloaded | ErrorKind::LoadShed)
    }

    /// The caller's own mistake (key, value, configuration): repeating it cannot help.
    #[must_use]
    pub fn is_caller_mistake(&self) -> bool {
        matches!(
            self.0.kind,
            ErrorKind::InvalidKey
                | ErrorKind::ValueTooLarge
                | ErrorKind::InvalidConfiguration
                | ErrorKind::NotANumber
                | ErrorKind::NoRuntime
        )
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.kind.describe())?;
        if let Some(node) = &self.0.node {
            write!(f, " at {node}")?;
        }
        if !self.0.message.is_empty() {
            write!(f, ": {}", self.0.message)?;
        }
        match (self.0.kind, self.0.sent) {
            (
                ErrorKind::Timeout | ErrorKind::ConnectionLost | ErrorKind::Unresponsive,
                Sent::No,
            ) => f.write_str(" (not sent)"),
            (_, Sent::Maybe) => f.write_str(" (may have been executed)"),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            kind,
            sent,
            charge: _,
            node,
            message,
            source,
        } = &*self.0;
        f.debug_struct("Error")
            .field("kind", kind)
            .field("sent", sent)
            .field("node", node)
            .field("message", message)
            .field("source", source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.0.source {
            Some(source) => Some(&**source),
            None => None,
        }
    }
}

/// A setting that makes no sense: which one, as it is called in a configuration, and why.
#[derive(Debug)]
pub(crate) struct Invalid {
    path: String,
    why: Cow<'static, str>,
}

impl Invalid {
    pub(crate) fn new(setting: impl Into<String>, why: impl Into<Cow<'static, str>>) -> Self {
        Self {
            path: setting.into(),
            why: why.into(),
        }
    }

    /// It is part of `settings`.
    pub(crate) fn under(mut self, settings: &str) -> Self {
        self.path.insert(0, '.');
        self.path.insert_str(0, settings);
        self
    }
}

/// Refuses a setting that may not be zero.
pub(crate) fn not_zero(setting: &str, is_zero: bool) -> Result<(), Invalid> {
    match is_zero {
        true => Err(Invalid::new(setting, "must not be zero")),
        false => Ok(()),
    }
}

impl From<Invalid> for Error {
    fn from(invalid: Invalid) -> Self {
        let Invalid { path, why } = invalid;
        Self::configuration(format!("{path}: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_kind_node_and_doubt() {
        let error = Error::new(ErrorKind::Timeout, "no answer within 30ms")
            .with_sent(Sent::Maybe)
            .at_node(&Arc::from("cache-a:11211"));
        assert_eq!(
            error.to_string(),
            "timed out at cache-a:11211: no answer within 30ms (may have been executed)"
        );
        assert!(error.is_timeout() && !error.is_unavailable());
    }

    #[test]
    fn survives_a_layers_box_and_tells_foreign_errors_apart() {
        let ours = Error::new(ErrorKind::Overloaded, "queue full");
        assert_eq!(
            Error::from_boxed(Box::new(ours)).kind(),
            ErrorKind::Overloaded
        );
        let elapsed = Error::from_boxed(Box::new(tower::timeout::error::Elapsed::new()));
        assert_eq!(
            (elapsed.kind(), elapsed.sent()),
            (ErrorKind::Timeout, Sent::Maybe)
        );
        let shed = Error::from_boxed(Box::new(tower::load_shed::error::Overloaded::new()));
        assert_eq!(
            (shed.kind(), shed.sent()),
            (ErrorKind::Overloaded, Sent::No)
        );
        let foreign = Error::from_boxed("elapsed".into());
        assert_eq!(foreign.kind(), ErrorKind::Layer);
        assert_eq!(foreign.sent(), Sent::Maybe);
        assert_eq!(
            foreign.source().map(ToString::to_string).as_deref(),
            Some("elapsed")
        );
    }

    #[test]
    fn is_one_pointer_wide() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }
}
