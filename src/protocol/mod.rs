//! memcached's meta protocol: bytes to vocabulary and back, with no I/O in it.
//!
//! Three pieces, each usable (and fuzzed) alone:
//! - [`encode`] writes an [`Operation`](crate::Operation) as bytes;
//! - [`Parser`] turns received bytes into [`Reply`]s, within [`Limits`];
//! - [`Pipeline`] is the queue of requests of one connection: it gives each request its opaque,
//!   matches each reply to its request, and says of everything that did not get one whether it
//!   may have been executed.
//!
//! The transport owns sockets and timers and drives these.

mod encode;
mod pipeline;
mod reply;
mod version;

pub(crate) use pipeline::{Batch, Pipeline, Ticket};
#[cfg(feature = "classic")]
pub(crate) use pipeline::{MAX_STATS, too_large};
pub(crate) use reply::{Failure, Parser, Reply, TOO_MANY_CONNECTIONS};
#[cfg(feature = "classic")]
pub(crate) use reply::{find_line, number, unparsable};
pub use version::MINIMUM_VERSION;
pub(crate) use version::ServerVersion;

use thiserror::Error as ThisError;

use crate::error::{Charge, Error, ErrorKind, Result, Sent};
use crate::request::Operation;

/// The longest reply line we read. memcached's own are under 1 KiB, and it tolerates 2,048 bytes
/// in requests.
pub(crate) const MAX_LINE: usize = 2048;

/// Above this a value's announced length is taken for nonsense, not for a large value that could
/// be skipped: it is memcached's own largest item size (`-I 1024m`).
pub(crate) const ABSURD_LENGTH: u64 = 1 << 30;

/// What one connection may make us hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The longest value, in bytes, sent or received.
    pub(crate) value: usize,
    /// Requests queued or in flight.
    pub(crate) requests: usize,
    /// Bytes of requests queued.
    pub(crate) queued_bytes: usize,
}

/// Refuses a value that is longer than `limit` bytes before anything of it is sent.
pub(crate) fn check_value(operation: &Operation, limit: usize) -> Result<()> {
    let length = operation.payload_len();
    if length <= limit {
        return Ok(());
    }
    let message = format!("a value of {length} bytes is over the limit of {limit}");
    Err(Error::new(ErrorKind::ValueTooLarge, message))
}

/// Bytes that a memcached in step with us would not have sent. The connection is closed: after
/// the first such byte nothing on it can be trusted to be the answer to its request.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum Violation {
    /// A reply line that does not end.
    #[error("a reply line is over {MAX_LINE} bytes")]
    LineTooLong,
    /// A line that is no reply at all.
    #[error("not a memcached reply: {0:?}")]
    Unparsable(String),
    /// A value whose announced length no memcached could hold.
    #[error("a value of {0} bytes is announced")]
    AbsurdLength(u64),
    /// The bytes behind a value are not the end of a line.
    #[error("a value is not followed by the end of a line")]
    UnterminatedValue,
    /// A reply while nothing was asked.
    #[error("a reply nobody asked for: {0}")]
    Unsolicited(&'static str),
    /// A reply with another request's opaque, or with none.
    #[error("a reply carries the opaque {found:?} where {expected} was expected")]
    WrongOpaque {
        /// Of the oldest request in flight.
        expected: u32,
        /// In the reply.
        found: Option<u32>,
    },
    /// A reply of a kind that does not answer the request.
    #[error("{found} is no answer to {request}")]
    WrongKind {
        /// What was asked.
        request: &'static str,
        /// What came.
        found: &'static str,
    },
    /// An error line among the replies of a multi-key read: it carries no opaque, so it cannot be
    /// said whose it is.
    #[error("an error without an opaque in a multi-key read: {0}")]
    ErrorInBatch(String),
    /// A `CLIENT_ERROR` to a write: the server now takes the value's bytes for commands.
    #[error("a write was rejected, and its value may be taken for commands: {0}")]
    FramingLost(String),
}

impl From<Violation> for Error {
    fn from(violation: Violation) -> Self {
        Self::new(ErrorKind::Protocol, violation.to_string())
            .with_sent(Sent::Maybe)
            .charged_to(Charge::Node)
            .with_source(violation)
    }
}

#[cfg(feature = "classic")]
pub(crate) use encode::body;
pub(crate) use encode::encode;

#[cfg(test)]
mod tests;
