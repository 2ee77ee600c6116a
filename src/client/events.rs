//! The stream of node events.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use futures::Stream;
use futures::stream::unfold;
use tokio::sync::watch;

use crate::cluster::Control;
use crate::node::{BreakerState, NodeStatus};

struct Events {
    cluster: Weak<dyn Control>,
    changes: watch::Receiver<()>,
    told: HashMap<Arc<str>, (BreakerState, SystemTime)>,
    to_tell: VecDeque<NodeStatus>,
}

/// What [`Client::node_events`](super::Client::node_events) returns.
pub(super) fn of(
    cluster: Option<&Arc<dyn Control>>,
) -> impl Stream<Item = NodeStatus> + Send + use<> {
    let events = cluster.map(|cluster| {
        let mut changes = cluster.changes();
        // Each node's present state is the first thing to be told.
        changes.mark_changed();
        Events {
            cluster: Arc::downgrade(cluster),
            changes,
            told: HashMap::new(),
            to_tell: VecDeque::new(),
        }
    });
    unfold(events, |events| async move {
        let mut events = events?;
        let status = events.next().await?;
        Some((status, Some(events)))
    })
}

impl Events {
    async fn next(&mut self) -> Option<NodeStatus> {
        loop {
            if let Some(status) = self.to_tell.pop_front() {
                return Some(status);
            }
            self.changes.changed().await.ok()?;
            let nodes = self.cluster.upgrade()?.nodes();
            self.told
                .retain(|known, _| nodes.iter().any(|status| status.node == *known));
            for status in nodes {
                let now = (status.state, status.since);
                if self.told.insert(status.node.clone(), now) != Some(now) {
                    self.to_tell.push_back(status);
                }
            }
        }
    }
}
