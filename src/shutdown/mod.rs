//! The end of a client: what is still to be finished ([`Tracker`]), how long that is waited for
//! ([`Until`]), and what came of it ([`ShutdownReport`]).
//!
//! `src/client/shutdown.rs` puts the phases together, `src/cluster/shutdown.rs` has those of the
//! nodes.

mod report;
mod tracker;

use std::time::Duration;

use tokio::time::Instant;

pub use report::{ShutdownReport, UnflushedJournal};
pub(crate) use tracker::{Counted, Operating, Tracker, Work};

use crate::error::{Error, ErrorKind};
use crate::executor::{Spawner, after, until};

/// For the last deletions, which no longer wait for what they should come after.
const LAST_WORD: Duration = Duration::from_millis(250);

/// When a shutdown has to end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Until {
    /// Until then what is under way is waited for.
    pub(crate) waits: Instant,
    ends: Instant,
}

impl Until {
    pub(crate) fn new(deadline: Duration) -> Self {
        let now = Instant::now();
        let last_word = LAST_WORD.min(deadline / 4);
        Self {
            waits: after(now, deadline.saturating_sub(last_word)),
            ends: after(now, deadline),
        }
    }

    /// Waits for what is under way, and has the last word. Where there is no runtime to keep the time,
    /// nothing is waited for.
    pub(crate) async fn drain(
        self,
        spawner: Option<&Spawner>,
        under_way: impl Future<Output = ()>,
        last_word: impl Future<Output = ()>,
    ) {
        let drained = async {
            if until(spawner, self.waits, under_way).await.is_ok() {
                last_word.await;
            }
        };
        let _ = until(spawner, self.ends, drained).await;
    }
}

pub(crate) fn shut_down() -> Error {
    Error::new(ErrorKind::Shutdown, "the client is shut down")
}
