//! Watches what the client believes of its nodes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, interval};
use tower_memcached::{BreakerState, Client};

/// A circuit breaker that was seen in another state than before.
#[derive(Clone, Debug)]
pub(crate) struct Transition {
    /// From the start of the run.
    pub(crate) at: Duration,
    pub(crate) node: Arc<str>,
    pub(crate) state: BreakerState,
    /// Why it is not closed.
    pub(crate) cause: Option<String>,
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            at,
            node,
            state,
            cause,
        } = self;
        let at = at.as_secs_f64();
        write!(f, "      {at:.2} s: breaker of {node} {state:?}")?;
        match cause {
            Some(cause) => write!(f, ": {cause}"),
            None => Ok(()),
        }
    }
}

/// Looks every few milliseconds, without end, and tells of changes.
pub(crate) async fn watch(client: &Client, start: Instant, mut tell: impl FnMut(Transition)) {
    let states = || client.nodes().into_iter().map(|node| node.state);
    let mut known: Vec<_> = states().collect();
    let mut ticks = interval(Duration::from_millis(10));
    loop {
        ticks.tick().await;
        for (known, now) in known.iter_mut().zip(client.nodes()) {
            if std::mem::replace(known, now.state) == now.state {
                continue;
            }
            let cause = match now.state {
                BreakerState::Open => now.last_cause.map(|cause| cause.to_string()),
                _ => None,
            };
            tell(Transition {
                at: start.elapsed(),
                node: now.node,
                state: now.state,
                cause,
            });
        }
    }
}
