//! The end of a node: what its journal is waited for, and what is left of it.

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::gate::BreakerState;
use super::{Shared, keeper};
use crate::shutdown::UnflushedJournal;

impl Shared {
    /// Whether what it has to forget may be forgotten by then. Of connections over which a write may
    /// still be executed nobody knows when they end: they have until `patience`.
    pub(crate) fn is_forgetting(self: &Arc<Self>, until: Instant, patience: Instant) -> bool {
        let is_out = self.gate.state() == BreakerState::Open;
        if self.journal.len() == 0 || is_out || self.is_closed() {
            return false;
        }
        self.ensure_kept();
        let now = Instant::now();
        match self.journal.due(now) {
            Some(due) => due <= until,
            None => now < patience,
        }
    }

    /// Deletes everything that is in its journal, due or not, if it takes requests. What is in doubt
    /// stays there.
    pub(crate) async fn delete_once_more(self: &Arc<Self>) {
        if self.journal.len() == 0 || self.is_open() || self.is_closed() {
            return;
        }
        let (shared, (done, ended)) = (self.clone(), oneshot::channel::<()>());
        let deleting = async move {
            let deletions = shared.journal.every(Instant::now());
            for some in deletions.chunks(keeper::at_once(&shared)) {
                if keeper::delete(&shared, some).await.is_err() {
                    break;
                }
            }
            drop(done);
        };
        if self.spawner.spawn(deleting).is_ok() {
            // It ends with an error in any case: nothing is ever sent.
            let _ = ended.await;
        }
    }

    /// What it has yet to forget.
    pub(crate) fn unflushed(&self) -> Option<UnflushedJournal> {
        let unflushed = UnflushedJournal {
            node: self.name.clone(),
            keys: self.journal.len(),
            overflowed: self.journal.has_overflowed(),
            owes_a_flush: self.flush_wanted(),
        };
        let is_clean = unflushed.keys == 0 && !unflushed.overflowed && !unflushed.owes_a_flush;
        (!is_clean).then_some(unflushed)
    }
}
