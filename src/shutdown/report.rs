//! What a shutdown has abandoned.

use std::fmt;
use std::sync::Arc;

/// What [`Client::shutdown`](crate::Client::shutdown) could not finish by its deadline.
///
/// Each thing is counted once: an operation that runs its own load is a load here, and no request.
/// A load, or a value that was not put back, may have held a lease besides; that is what other
/// processes notice of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShutdownReport {
    /// Operations that were still under way, those that waited for somebody else's load included.
    /// They end with [`ErrorKind::Shutdown`](crate::ErrorKind::Shutdown), and may have been executed if
    /// their error says so. From [`Cluster::shutdown`](crate::Cluster::shutdown): attempts at nodes,
    /// and waits for one, of which a multi-key read may have several.
    pub requests: usize,
    /// Loads that were still under way: those of `get_or_load`, which ends with
    /// [`ErrorKind::Shutdown`](crate::ErrorKind::Shutdown), and those of a
    /// [`ReadThroughLayer`](crate::ReadThroughLayer). They were dropped.
    pub loads: usize,
    /// Values that had been loaded and were not put into the cache: not yet, or not at all because as
    /// many were being written as may ([`max_refills`](crate::ReadThroughSettings::max_refills)).
    pub refills: usize,
    /// Leases that were neither used nor given up: until they expire, other processes wait for what
    /// nobody loads, for so long as their settings say.
    pub leases: usize,
    /// Nodes that may hold something older than what this client has written.
    pub journals: Vec<UnflushedJournal>,
}

/// A node on which not everything that is old could be deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnflushedJournal {
    /// The node, as it is named in the configuration.
    pub node: Arc<str>,
    /// Keys of which it may hold something old, or may still execute an old write.
    pub keys: usize,
    /// There were more than the journal holds: any other key may be old as well.
    pub overflowed: bool,
    /// [`flush_all`](crate::Client::flush_all) was asked for while it was out, and has not been made
    /// up for.
    pub owes_a_flush: bool,
}

impl ShutdownReport {
    /// Whether nothing was abandoned.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        *self == Self::default()
    }
}

/// For logs: `clean`, or what was abandoned, such as `abandoned 2 requests, 1 load; not deleted: 3 keys
/// at cache-a:11211`.
impl fmt::Display for ShutdownReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            requests,
            loads,
            refills,
            leases,
            journals,
        } = self;
        if self.is_clean() {
            return f.write_str("clean");
        }
        let mut before = "abandoned ";
        for (count, name) in [
            (requests, "request"),
            (loads, "load"),
            (refills, "refill"),
            (leases, "lease"),
        ] {
            if *count > 0 {
                write!(f, "{before}{}", Many(*count, name))?;
                before = ", ";
            }
        }
        before = match before {
            ", " => "; not deleted: ",
            _ => "not deleted: ",
        };
        for journal in journals {
            write!(f, "{before}{journal}")?;
            before = ", ";
        }
        Ok(())
    }
}

impl fmt::Display for UnflushedJournal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", Many(self.keys, "key"), self.node)?;
        if self.overflowed {
            f.write_str(" (and more than its journal holds)")?;
        }
        if self.owes_a_flush {
            f.write_str(" (to be flushed)")?;
        }
        Ok(())
    }
}

struct Many(usize, &'static str);

impl fmt::Display for Many {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(count, name) = self;
        write!(f, "{count} {name}{}", if *count == 1 { "" } else { "s" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(keys: usize, overflowed: bool, owes_a_flush: bool) -> UnflushedJournal {
        UnflushedJournal {
            node: Arc::from("a:1"),
            keys,
            overflowed,
            owes_a_flush,
        }
    }

    #[test]
    fn it_is_clean_if_nothing_was_abandoned_and_says_so() {
        let clean = ShutdownReport::default();
        assert!(clean.is_clean());
        assert_eq!(clean.to_string(), "clean");
        for report in [
            ShutdownReport {
                requests: 1,
                ..clean.clone()
            },
            ShutdownReport {
                loads: 1,
                ..clean.clone()
            },
            ShutdownReport {
                refills: 1,
                ..clean.clone()
            },
            ShutdownReport {
                leases: 1,
                ..clean.clone()
            },
            ShutdownReport {
                journals: vec![journal(0, true, false)],
                ..clean.clone()
            },
            ShutdownReport {
                journals: vec![journal(0, false, true)],
                ..clean
            },
        ] {
            assert!(!report.is_clean(), "{report}");
        }
    }

    #[test]
    fn it_says_what_was_abandoned_in_a_line() {
        let report = ShutdownReport {
            requests: 2,
            leases: 1,
            journals: vec![journal(3, true, false), journal(1, false, true)],
            ..ShutdownReport::default()
        };
        assert_eq!(
            report.to_string(),
            "abandoned 2 requests, 1 lease; not deleted: 3 keys at a:1 (and more than its journal \
             holds), 1 key at a:1 (to be flushed)"
        );
        let report = ShutdownReport {
            journals: vec![journal(1, false, false)],
            ..ShutdownReport::default()
        };
        assert_eq!(report.to_string(), "not deleted: 1 key at a:1");
    }
}
