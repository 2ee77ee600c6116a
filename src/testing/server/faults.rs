//! What can be made to go wrong, as one value that every connection watches.
//!
//! A fault is a state ("replies are late"), set through a watch channel, so that it holds at once for open and future
//! connections. What happens once ("reset the connection now") is a [`Signal`] in each connection's own queue instead:
//! two of them in quick succession are two events.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::manner::Manner;

/// What a new connection meets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Admission {
    /// It is served.
    #[default]
    Serve,
    /// Nobody listens: the connect fails with `ECONNREFUSED`, as after a crash. A stream given to
    /// [`Server::serve`](super::Server::serve) is dropped.
    Refuse,
    /// The connect succeeds and nothing is ever answered, as with memcached's `-o no_maxconns_fast` at its connection
    /// limit.
    Silent,
    /// `ERROR Too many open connections` and the end, as memcached does at its connection limit.
    TooMany,
}

/// A hook that turns the true reply to a request line into what is sent.
pub(super) type Rewrite = Arc<dyn Fn(&[u8], Vec<u8>) -> Vec<u8> + Send + Sync>;

/// The state of all faults.
#[derive(Clone, Default)]
pub(super) struct Faults {
    /// The server is gone for good.
    pub(super) shut_down: bool,
    pub(super) stalled: bool,
    pub(super) admission: Admission,
    /// Every nth reply is so late.
    pub(super) delay: Option<(u32, Duration)>,
    pub(super) rewrite: Option<Rewrite>,
    /// A reply is cut after so many bytes, and the connection with it.
    pub(super) cut: Option<usize>,
    /// What the server pretends to be, which is no fault: healing leaves it.
    pub(super) manner: Arc<Manner>,
}

impl fmt::Debug for Faults {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Faults")
            .field("shut_down", &self.shut_down)
            .field("stalled", &self.stalled)
            .field("admission", &self.admission)
            .field("delay", &self.delay)
            .field("rewrite", &self.rewrite.is_some())
            .field("cut", &self.cut)
            .field("manner", &self.manner)
            .finish()
    }
}

/// Something that happens to an open connection once.
#[derive(Clone, Debug)]
pub(super) enum Signal {
    Close,
    Reset,
    /// Bytes nobody asked for.
    Push(Bytes),
}
