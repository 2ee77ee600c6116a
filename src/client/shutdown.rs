//! The end of a client.

use std::time::Duration;

use futures::future::join;

use super::Client;
use crate::shutdown::{ShutdownReport, Until};

impl<S> Client<S> {
    /// Ends everything, by then: this client, its clones, and what was derived from it by
    /// [`group`](Self::group), [`layer`](Self::layer), [`with_timeout`](Self::with_timeout),
    /// [`with_read_through`](Self::with_read_through) and [`boxed`](Self::boxed). Says what was
    /// abandoned.
    ///
    /// 1. From the first poll on no new operation begins: each fails at once with
    ///    [`ErrorKind::Shutdown`](crate::ErrorKind::Shutdown), unsent. So does
    ///    [`get_or_load`](Self::get_or_load), which loads nothing then. What a loader asks of this
    ///    client is an operation of its own.
    /// 2. What is under way may go on until it ends, whatever it needs of the cache for that:
    ///    requests, those that wait for their node or are repeated, loads and those who wait for
    ///    them. What is loaded is put back, and leases that are not used are given up.
    /// 3. Meanwhile what may be old is deleted on the nodes. A write in doubt is waited for, to be
    ///    deleted once more after it (2 s, or the end of the connection it was sent over if that
    ///    comes within these), if the deadline is later than that. A node that is out is not waited
    ///    for: what it has to forget is reported.
    /// 4. When all that is done, and at the deadline at the latest, what is still to be deleted is
    ///    deleted once more where that can be done, and everything is closed: tasks,
    ///    connections, probes. What was still under way fails with `Shutdown` at that moment. What a
    ///    layer of yours holds back ends when that lets go of it, or at its own deadline.
    ///
    /// A closure on a thread of a [`BlockingLoader`](crate::BlockingLoader) runs to its end, as it
    /// always does. Dedicated threads stop when the last handle is dropped.
    ///
    /// For the last deletions a quarter of the time is kept, 250 ms at most. With `Duration::ZERO`
    /// nothing is waited for. Where there is no runtime to keep the time either: with
    /// [`Executor::current`](crate::Executor::current), outside of one.
    ///
    /// A client made [`from_service`](Self::from_service) finishes its own operations, loads and
    /// refills; its service stays as it is, as it is the user's. A
    /// [`ReadThroughLayer`](crate::ReadThroughLayer) belongs to the client that it was made part of by
    /// [`ClientBuilder::layer`](crate::ClientBuilder::layer) or `layer`; one in a stack built by hand
    /// belongs to none.
    ///
    /// Several may shut a client down at once: the first whose deadline comes, or who finds that all
    /// is done, closes it for all, and they have the same report. Whoever calls later has it at once.
    ///
    /// # Cancel safety
    /// If it is dropped, no new operation begins all the same, and what is under way goes on. A later
    /// call, or the drop of the last handle, ends it.
    ///
    /// ```no_run
    /// # async fn example(client: tower_memcached::Client) {
    /// use std::time::Duration;
    ///
    /// let report = client.shutdown(Duration::from_secs(5)).await;
    /// if !report.is_clean() {
    ///     eprintln!("the cache client was shut down: {report}");
    /// }
    /// # }
    /// ```
    pub async fn shutdown(&self, deadline: Duration) -> ShutdownReport {
        let shared = &*self.shared;
        let (tracker, cluster) = (shared.reads.tracker(), shared.cluster.as_ref());
        let until = Until::new(deadline);
        tracker.refuse();
        if let Some(report) = tracker.report() {
            return report.clone();
        }
        let under_way = async {
            tracker.idle().await;
            if let Some(cluster) = cluster {
                cluster.settled(until).await;
            }
        };
        let last_word = async {
            let deleted = async {
                if let Some(cluster) = cluster {
                    cluster.delete_once_more().await;
                }
            };
            join(tracker.idle(), deleted).await;
        };
        let drained = until.drain(shared.spawner.as_ref(), under_way, last_word);
        let _ = tracker.unless_closed(drained).await;
        let report = tracker.close(|| ShutdownReport {
            journals: cluster.map_or_else(Vec::new, |cluster| cluster.unflushed()),
            ..tracker.under_way()
        });
        if let Some(cluster) = cluster {
            cluster.close();
        }
        report.clone()
    }
}
