//! The end of a cluster: what its nodes are waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use futures::future::{join, join_all};
use tokio::time::Instant;

use super::{Cluster, Pool};
use crate::error::Result;
use crate::executor::after;
use crate::node::{GRACE, Shared as NodeShared};
use crate::request::{Purpose, Request};
use crate::shutdown::{ShutdownReport, UnflushedJournal, Until};

/// How often the nodes are looked at. To be told by them would cost every request something.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How far a shutdown has come.
#[derive(Debug, Default)]
pub(super) struct Phase(AtomicU8);

const DRAINS: u8 = 1;
const CLOSED: u8 = 2;

impl Phase {
    /// Whether a request is not taken any more. What was loaded may be put back until the end.
    #[inline]
    pub(super) fn refuses(&self, request: &Request) -> bool {
        match self.0.load(Ordering::Acquire) {
            0 => false,
            DRAINS => request.purpose() != Purpose::Refill,
            _ => true,
        }
    }

    pub(super) fn has_begun(&self) -> bool {
        self.0.load(Ordering::Acquire) > 0
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) == CLOSED
    }

    fn advance(&self, phase: u8) {
        self.0.fetch_max(phase, Ordering::AcqRel);
    }
}

impl<S> Cluster<S> {
    /// Takes no new requests but those that put back what a
    /// [`ReadThroughLayer`](crate::ReadThroughLayer) has loaded, waits for those under way, has the
    /// nodes delete what may be old there, and closes every connection, all of it by the deadline; what
    /// is still under way then fails with [`ErrorKind::Shutdown`](crate::ErrorKind::Shutdown). Says
    /// what that is. [`Client::shutdown`](crate::Client::shutdown) has the details.
    ///
    /// This is for stacks built by hand: what layers above hold back is not known here. Once it has
    /// ended another call returns at once, with an empty report.
    ///
    /// # Cancel safety
    /// If it is dropped, new requests are refused all the same, and those under way go on.
    pub async fn shutdown(&self, deadline: Duration) -> ShutdownReport {
        let until = Until::new(deadline);
        let phase = &self.shared.phase;
        phase.advance(DRAINS);
        if phase.is_closed() {
            return ShutdownReport::default();
        }
        let last_word = async {
            join(self.unused(), self.delete_once_more()).await;
        };
        let spawner = Some(&self.shared.spawner);
        until.drain(spawner, self.settled(until), last_word).await;
        let report = ShutdownReport {
            requests: self.under_way(),
            journals: self.unflushed(),
            ..ShutdownReport::default()
        };
        self.close();
        report
    }

    fn under_way(&self) -> usize {
        let nodes = self.all_nodes();
        nodes.iter().map(|node| node.under_way()).sum()
    }

    /// Those as well that have been removed and still end what was sent there.
    fn all_nodes(&self) -> Vec<Arc<NodeShared>> {
        let retired = self.pools().flat_map(|pool| pool.retired());
        let mut nodes: Vec<_> = retired.collect();
        nodes.extend(self.nodes_shared());
        nodes
    }

    fn nodes_shared(&self) -> Vec<Arc<NodeShared>> {
        let of = |pool: &Arc<Pool<S>>| -> Vec<_> {
            let topology = pool.topology.load();
            let members = topology.members().iter();
            members.map(|member| member.node.shared().clone()).collect()
        };
        self.pools().flat_map(of).collect()
    }

    async fn look_again(&self) -> Result<()> {
        let due = after(Instant::now(), LOOK_EVERY);
        self.shared.spawner.sleep_until(due)?.await;
        Ok(())
    }

    /// Waits until nothing is under way.
    async fn unused(&self) {
        while self.under_way() > 0 && self.look_again().await.is_ok() {}
    }

    /// Waits until nothing is under way, and nodes have forgotten what they can be made to forget in
    /// time.
    pub(super) async fn settled(&self, until: Until) {
        self.unused().await;
        let patience = after(Instant::now(), GRACE);
        let forgetting = || {
            let nodes = self.nodes_shared();
            let mut nodes = nodes.iter();
            nodes.any(|node| node.is_forgetting(until.waits, patience))
        };
        while forgetting() && self.look_again().await.is_ok() {}
    }

    /// Deletes what is in the nodes' journals, whether what it should come after is over or not.
    pub(super) async fn delete_once_more(&self) {
        let nodes = self.nodes_shared();
        join_all(nodes.iter().map(|node| node.delete_once_more())).await;
    }

    pub(super) fn unflushed(&self) -> Vec<UnflushedJournal> {
        let nodes = self.nodes_shared();
        nodes.iter().filter_map(|node| node.unflushed()).collect()
    }

    /// Closes everything.
    pub(super) fn close(&self) {
        self.shared.phase.advance(CLOSED);
        for pool in self.pools() {
            pool.closing.send_replace(true);
        }
        for node in self.all_nodes() {
            node.close();
        }
    }
}
