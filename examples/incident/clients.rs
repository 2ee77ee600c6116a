//! The two clients. They differ in configuration only: what the incident lacked is what the
//! defaults add.

use std::time::Duration;

use tower_memcached::{Client, FailureMode, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    Naive,
    Resilient,
}

impl Contender {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Naive => "naive",
            Self::Resilient => "resilient",
        }
    }

    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Naive => "as the incident's was configured: 2.5 s time-outs, retry, no breaker",
            Self::Resilient => "this crate's defaults",
        }
    }

    pub(crate) fn client(self, nodes: &[String]) -> Result<Client> {
        let builder = Client::builder().nodes(nodes);
        match self {
            Self::Resilient => builder,
            Self::Naive => {
                // The time-out is spymemcached's default. The rest takes away what would notice
                // that a node does not answer.
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
