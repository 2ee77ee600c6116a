//! What a functional group is told.

use std::time::Duration;

use crate::bulkhead::Limits;
use crate::cluster::{ClusterSettings, FailureMode, RetryBudget};
use crate::compression::CompressionSettings;
use crate::config::NodeConfig;
use crate::error::{Invalid, not_zero};
use crate::key::{Key, MAX_KEY_LENGTH};
use crate::read_through::ReadThroughSettings;

/// The settings of a functional group: what it may take, and where it differs from the client. What is
/// not set here is as the client has it.
#[derive(Clone, Debug)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct GroupSettings {
    pub(crate) prefix: String,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(crate) timeout: Option<Duration>,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(crate) attempt_timeout: Option<Duration>,
    pub(crate) max_in_flight: Option<usize>,
    pub(crate) max_queue: usize,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(crate) max_wait: Duration,
    pub(crate) rate: Option<u32>,
    pub(crate) burst: Option<u32>,
    pub(crate) killed: bool,
    pub(crate) failure_mode: Option<FailureMode>,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(crate) failover_ttl: Option<Duration>,
    pub(crate) max_attempts: Option<u32>,
    pub(crate) retry_budget: Option<RetryBudget>,
    pub(crate) max_ejection_percent: Option<u32>,
    pub(crate) hedged_gets: Option<bool>,
    pub(crate) read_through: Option<ReadThroughSettings>,
    pub(crate) compression: Option<CompressionSettings>,
    pub(crate) nodes: Option<Vec<NodeConfig>>,
}

impl Default for GroupSettings {
    fn default() -> Self {
        Self {
            prefix: String::new(),
            timeout: None,
            attempt_timeout: None,
            max_in_flight: None,
            max_queue: 0,
            max_wait: Limits::DEFAULT_MAX_WAIT,
            rate: None,
            burst: None,
            killed: false,
            failure_mode: None,
            failover_ttl: None,
            max_attempts: None,
            retry_budget: None,
            max_ejection_percent: None,
            hedged_gets: None,
            read_through: None,
            compression: None,
            nodes: None,
        }
    }
}

impl GroupSettings {
    /// What goes before each of its keys; nothing by default. A key that is too long with it is an
    /// [`ErrorKind::InvalidKey`](crate::ErrorKind::InvalidKey) of the operation.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// How long each of its operations may take; never longer than the client's timeout.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// How long one attempt at one node may take; never longer than the client's attempt timeout. One
    /// that ends sooner than the client's would have is nobody's fault: no node is ejected for it.
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = Some(timeout);
        self
    }

    /// How many of its requests may be under way at once; no limit by default but the nodes' own.
    /// More wait in the [queue](Self::max_queue), or fail with
    /// [`ErrorKind::Overloaded`](crate::ErrorKind::Overloaded).
    #[must_use]
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.max_in_flight = Some(requests);
        self
    }

    /// How many requests may wait for one of those to end; none by default.
    #[must_use]
    pub fn max_queue(mut self, requests: usize) -> Self {
        self.max_queue = requests;
        self
    }

    /// How long a request may wait there, within its deadline; 50 ms by default.
    #[must_use]
    pub fn max_wait(mut self, time: Duration) -> Self {
        self.max_wait = time;
        self
    }

    /// How many requests it may make each second; no limit by default. More fail at once with
    /// [`ErrorKind::Overloaded`](crate::ErrorKind::Overloaded). In any one second there are no more than
    /// this and the [burst](Self::burst) together. A read that has to load makes up to two, the look-up
    /// and the lease; what is put back is not counted. A look-up that is refused, here or by
    /// [`max_in_flight`](Self::max_in_flight), is no hit: `get_or_load` then loads, as far as its
    /// [guard](crate::LoadGuard) lets it.
    #[must_use]
    pub fn rate(mut self, per_second: u32) -> Self {
        self.rate = Some(per_second);
        self
    }

    /// How many requests it may make at once after a while with fewer than the [rate](Self::rate); a
    /// tenth of the rate by default, and at least 1.
    #[must_use]
    pub fn burst(mut self, requests: u32) -> Self {
        self.burst = Some(requests);
        self
    }

    /// Whether its kill switch is thrown; not by default.
    #[must_use]
    pub fn killed(mut self, killed: bool) -> Self {
        self.killed = killed;
        self
    }

    /// What becomes of its requests whose node is out.
    #[must_use]
    pub fn failure_mode(mut self, mode: FailureMode) -> Self {
        self.failure_mode = Some(mode);
        self
    }

    /// How long one of its values may live on a node that is not its own.
    #[must_use]
    pub fn failover_ttl(mut self, ttl: Duration) -> Self {
        self.failover_ttl = Some(ttl);
        self
    }

    /// How many attempts each of its requests may make.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(attempts);
        self
    }

    /// What its retries and failovers may add to the load. Each group has a budget of its own, the
    /// client's settings for it included.
    #[must_use]
    pub fn retry_budget(mut self, budget: RetryBudget) -> Self {
        self.retry_budget = Some(budget);
        self
    }

    /// The share of nodes, in percent, that may be out with others standing in for them.
    #[must_use]
    pub fn max_ejection_percent(mut self, percent: u32) -> Self {
        self.max_ejection_percent = Some(percent);
        self
    }

    /// Whether its slow gets are sent a second time.
    #[must_use]
    pub fn hedged_gets(mut self, hedged: bool) -> Self {
        self.hedged_gets = Some(hedged);
        self
    }

    /// How its large values are compressed; as the client has it by default. Whatever these leave out has
    /// its default, and is not as the client has it. With
    /// [`Algorithm::None`](crate::Algorithm::None) they are only decompressed.
    #[must_use]
    pub fn compression(mut self, settings: CompressionSettings) -> Self {
        self.compression = Some(settings);
        self
    }

    /// How its values are loaded. Without a guard or a database of its own it loads by the client's
    /// guard; whatever else these leave out has its default, and is not as the client has it.
    #[must_use]
    pub fn read_through(mut self, settings: ReadThroughSettings) -> Self {
        self.read_through = Some(settings);
        self
    }

    /// Nodes of its own, which only it uses; without them it shares the client's nodes, and their
    /// connections.
    #[must_use]
    pub fn nodes<I>(mut self, nodes: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<String>,
    {
        self.nodes = Some(nodes.into_iter().map(NodeConfig::new).collect());
        self
    }

    /// Its bulkhead's.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            max_in_flight: self.max_in_flight.unwrap_or(usize::MAX),
            max_queue: self.max_queue,
            max_wait: self.max_wait,
        }
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        let refuse = |setting: &str, why: &'static str| Err(Invalid::new(setting, why));
        if self.prefix.len() >= MAX_KEY_LENGTH {
            return refuse("prefix", "leaves no room for a key");
        }
        if !self.prefix.is_empty() && Key::new(self.prefix.clone()).is_err() {
            return refuse("prefix", "is no part of a key");
        }
        not_zero("timeout", self.timeout == Some(Duration::ZERO))?;
        let attempt = self.attempt_timeout;
        not_zero("attempt_timeout", attempt == Some(Duration::ZERO))?;
        not_zero("max_in_flight", self.max_in_flight == Some(0))?;
        not_zero("rate", self.rate == Some(0))?;
        not_zero("burst", self.burst == Some(0))?;
        if self.burst.is_some() && self.rate.is_none() {
            return refuse("burst", "is no limit without a rate");
        }
        if self.max_queue > 0 && self.max_in_flight.is_none() {
            return refuse("max_queue", "is no limit without max_in_flight");
        }
        Ok(())
    }

    /// How its requests are sent, where the client's go by `client`.
    pub(crate) fn route(&self, client: &ClusterSettings) -> ClusterSettings {
        ClusterSettings {
            ring: client.ring.clone(),
            failure_mode: self.failure_mode.unwrap_or(client.failure_mode),
            failover_ttl: self.failover_ttl.unwrap_or(client.failover_ttl),
            max_attempts: self.max_attempts.unwrap_or(client.max_attempts),
            retry_budget: self.retry_budget.unwrap_or(client.retry_budget),
            max_ejection_percent: self
                .max_ejection_percent
                .unwrap_or(client.max_ejection_percent),
            hedged_gets: self.hedged_gets.unwrap_or(client.hedged_gets),
        }
    }
}
