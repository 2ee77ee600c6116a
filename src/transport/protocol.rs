//! Which protocol a server is spoken to in.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

/// Which of memcached's protocols a node is spoken to in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum Protocol {
    /// Whichever the server knows; the default. Each connection begins with the question for the
    /// version and, unless that is too old, for the end of an empty batch of meta commands (`mn`): who
    /// answers both is asked in the meta protocol, anybody else in the classic one. The answer is
    /// remembered for the node and asked for anew with each connection, so that a server may be
    /// replaced by one of another version while the client runs.
    ///
    /// Without the feature `classic` it is the same as [`Meta`](Self::Meta).
    #[default]
    Auto,
    /// The meta protocol of memcached 1.6.13 and later, over pipelined connections: the fast one, and
    /// the only one that can say everything.
    Meta,
    /// The classic text protocol, over a pool of connections with one request at a time each: for
    /// servers before 1.6.13 and for proxies. It cannot say everything (see
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported)). It needs the feature `classic`.
    Classic,
}

impl Protocol {
    /// Its name in a configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Meta => "meta",
            Self::Classic => "classic",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a server has shown to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Meta,
    Classic {
        /// It is a proxy: it closes the connection on what it does not know, and what it says of
        /// itself is not said by the server that has the values.
        proxy: bool,
    },
}

/// The latest [`Dialect`] that is known of a node, if any.
#[derive(Debug, Default)]
pub(crate) struct Spoken(AtomicU8);

impl Spoken {
    pub(crate) fn get(&self) -> Option<Dialect> {
        match self.0.load(Ordering::Acquire) {
            1 => Some(Dialect::Meta),
            2 => Some(Dialect::Classic { proxy: false }),
            3 => Some(Dialect::Classic { proxy: true }),
            _ => None,
        }
    }

    pub(super) fn set(&self, dialect: Dialect) {
        let number = match dialect {
            Dialect::Meta => 1,
            Dialect::Classic { proxy: false } => 2,
            Dialect::Classic { proxy: true } => 3,
        };
        self.0.store(number, Ordering::Release);
    }
}
