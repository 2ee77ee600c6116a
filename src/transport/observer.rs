//! What a transport tells whoever judges its node.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::Error;
use crate::key::Key;

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
    /// It answers, but is to be asked in another protocol.
    OtherProtocol,
}

impl ConnectFailure {
    /// Whether it says something about the node.
    pub(crate) fn is_the_nodes(self) -> bool {
        matches!(self, Self::Refused | Self::TimedOut | Self::Other)
    }
}

/// What happened to a node's connections, for whoever judges the node.
#[derive(Debug)]
pub(crate) enum Event<'a> {
    /// Connecting failed, while so many other connections of the node are up, and others have yet
    /// to be tried or not.
    ConnectFailed {
        failure: ConnectFailure,
        error: &'a Error,
        others_up: usize,
        untried: bool,
        most_dead: bool,
    },
    /// A connection was closed because it did not answer. `most_dead`: most of the node's
    /// connections did not, and nor did those made in their place.
    Unresponsive { error: &'a Error, most_dead: bool },
    /// So many of the requests [answered](Observer::answered), the first of them sent then, should
    /// have been sooner.
    Slow { requests: u32, sent_at: Instant },
    /// Keys of writes that may have been executed, or may still be. `lingers`: the end of that doubt
    /// will be told.
    InDoubt { keys: &'a [Key], lingers: bool },
    /// The end of a doubt that lingers: they will not be executed any more. Unless that is not
    /// `certain`, because it was not waited for any longer.
    DoubtEnds { keys: &'a [Key], certain: bool },
}

/// Whoever judges a node by what its connections do.
pub(crate) trait Observer: Send + Sync {
    /// So many requests were answered in time.
    fn answered(&self, requests: u32, now: Instant);

    /// From when on a request is [slow](Event::Slow).
    fn slow_after(&self) -> Duration;

    fn observe(&self, event: &Event<'_>);
}
