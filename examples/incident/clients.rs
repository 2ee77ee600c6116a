//! The clients. They differ in configuration only: what the incident lacked is what the defaults
//! add.

use std::time::Duration;

use tower_memcached::{Client, FailureMode, Protocol, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    Naive,
    /// This crate's defaults, but for the mode; [`FailureMode::Redistribute`] is the default one.
    Resilient(FailureMode),
}

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Naive => "naive",
            Self::Resilient(FailureMode::Redistribute) => "redistribute",
            Self::Resilient(FailureMode::Cancel) => "cancel",
            Self::Resilient(FailureMode::Retry) => "retry",
        }
    }

    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Naive => "2.5 s time-outs, retry, no breaker, as in the incident",
            Self::Resilient(FailureMode::Redistribute) => "this crate's defaults",
            Self::Resilient(_) => "this crate's defaults but for the failure mode",
        }
    }

    pub(crate) fn client(self, nodes: &[String], protocol: Protocol) -> Result<Client> {
        let builder = Client::builder().nodes(nodes);
        match self {
            Self::Resilient(mode) => builder.failure_mode(mode).protocol(protocol),
            Self::Naive => {
                // The time-out is spymemcached's default. The rest takes away what would notice
                // that a node does not answer. What remains is that its breaker opens when a connect
                // is refused; in its mode a request waits for the node then, as it did in the incident.
                let timeout = Duration::from_millis(2_500);
                let never = Duration::from_secs(3_600);
                builder
                    .timeout(timeout)
                    .attempt_timeout(timeout)
                    .failure_mode(FailureMode::Retry)
                    .stall_timeout(never)
                    .connect_timeout(never)
                    .consecutive_timeouts(u32::MAX)
            }
        }
        .build()
    }
}
