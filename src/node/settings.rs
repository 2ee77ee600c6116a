//! The settings of a node.

use std::time::Duration;

use super::gate::GateSettings;
use super::probe::ProbeSettings;
use crate::error::{Invalid, not_zero};

/// The settings of a [`Node`](super::Node).
#[derive(Clone, Debug)]
pub struct NodeSettings {
    pub(super) attempt_timeout: Duration,
    pub(super) max_in_flight: usize,
    pub(super) adaptive_limit: bool,
    pub(super) breaker: BreakerSettings,
    pub(super) probe: ProbeSettings,
    pub(super) journal: JournalSettings,
}

impl Default for NodeSettings {
    fn default() -> Self {
        Self {
            attempt_timeout: Duration::from_millis(30),
            max_in_flight: 16_384,
            adaptive_limit: false,
            breaker: BreakerSettings::default(),
            probe: ProbeSettings::default(),
            journal: JournalSettings::default(),
        }
    }
}

impl NodeSettings {
    /// How long one attempt may take; 30 ms by default. Not enforced a second time around a
    /// [`Pipelined`](crate::Pipelined) transport, which does it itself with one timer per connection.
    #[must_use]
    pub fn attempt_timeout(mut self, timeout: Duration) -> Self {
        self.attempt_timeout = timeout;
        self
    }

    /// How many requests the node may have at once; 16,384 by default. Requests moved here from
    /// another node may use half of it.
    #[must_use]
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.max_in_flight = requests;
        self
    }

    /// Whether the node may have fewer while its answers are [slow](BreakerSettings::slow_call), all of
    /// them: what it can answer in half of that time, as far as its answers tell, but 32 in any case; not
    /// by default. It rises again while more are refused, by 3 % after each `slow_call` in which no
    /// answer was slow, by more after a second of these, and to [`max_in_flight`](Self::max_in_flight)
    /// after ten, whether or not any are. With a [`slow_call_rate`](BreakerSettings::slow_call_rate)
    /// over 100 it is never lowered.
    ///
    /// For nodes that can be overloaded: what is too much for one is refused at once, and the rest is
    /// answered in time, up to about three times what it can do. A load that is five times as much from
    /// one moment to the next still ejects it. It does not tell a node that has too much to do from one
    /// that is slow by itself, which refuses requests until its circuit breaker opens.
    #[must_use]
    pub fn adaptive_limit(mut self, adaptive: bool) -> Self {
        self.adaptive_limit = adaptive;
        self
    }

    /// When the circuit breaker opens, and how the node comes back.
    #[must_use]
    pub fn breaker(mut self, breaker: BreakerSettings) -> Self {
        self.breaker = breaker;
        self
    }

    pub(crate) fn timeouts_to_close(&self) -> u32 {
        self.breaker.consecutive_timeouts
    }

    /// How the node is tested.
    #[must_use]
    pub fn probe(mut self, probe: ProbeSettings) -> Self {
        self.probe = probe;
        self
    }

    /// What is remembered of keys written while the node could not be told.
    #[must_use]
    pub fn journal(mut self, journal: JournalSettings) -> Self {
        self.journal = journal;
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        not_zero("attempt_timeout", self.attempt_timeout.is_zero())?;
        not_zero("max_in_flight", self.max_in_flight == 0)?;
        let breaker = self.breaker.validate();
        breaker.map_err(|invalid| invalid.under("breaker"))?;
        let probe = self.probe.validate();
        probe.map_err(|invalid| invalid.under("probe"))
    }

    pub(super) fn gate(&self) -> GateSettings {
        let breaker = &self.breaker;
        GateSettings {
            success_threshold: self.probe.success_threshold,
            ramp: breaker.ramp,
            reopening: breaker.reopening,
            factor: 1.5,
            longest_reopening: breaker.longest_reopening,
            memory: Duration::from_secs(60),
        }
    }
}

/// When a node's circuit breaker opens, and how the node comes back.
///
/// Hard signals open it whatever is set here: a refused connect, a connect that is not answered, or
/// connections that answer nothing, unless other connections of the node do.
#[derive(Clone, Debug)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct BreakerSettings {
    pub(super) consecutive_timeouts: u32,
    pub(super) failure_rate: u32,
    pub(super) slow_call_rate: u32,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) slow_call: Option<Duration>,
    pub(super) minimum_requests: u32,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) reopening: Duration,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) longest_reopening: Duration,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) ramp: Duration,
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self {
            consecutive_timeouts: 3,
            failure_rate: 50,
            slow_call_rate: 80,
            slow_call: None,
            minimum_requests: 20,
            reopening: Duration::from_secs(1),
            longest_reopening: Duration::from_secs(30),
            ramp: Duration::from_secs(2),
        }
    }
}

impl BreakerSettings {
    /// How many time-outs in a row are too many; 3 by default. Their requests must have been sent
    /// over at least an attempt timeout, since a burst that times out together is one event; so 1 is as good as 2. A
    /// [`Pipelined`](crate::Pipelined) transport counts them connection by connection, and closes
    /// the connection; around any other service they open the breaker.
    #[must_use]
    pub fn consecutive_timeouts(mut self, timeouts: u32) -> Self {
        self.consecutive_timeouts = timeouts;
        self
    }

    /// Which share of requests, in percent, may fail by the node's fault over the last 10 s; from
    /// that on, 50 % by default, it opens. Over 100 is never. The failed ones must have been sent over at least eight
    /// attempt timeouts, or a second if that is less.
    #[must_use]
    pub fn failure_rate(mut self, percent: u32) -> Self {
        self.failure_rate = percent;
        self
    }

    /// Which share of requests, in percent, may be slow over the last 10 s; from that on, 80 % by
    /// default, it opens.
    /// Over 100 is never. The slow ones must have been sent over a second or more.
    #[must_use]
    pub fn slow_call_rate(mut self, percent: u32) -> Self {
        self.slow_call_rate = percent;
        self
    }

    /// From when on a request is slow; half the attempt timeout by default.
    #[must_use]
    pub fn slow_call(mut self, after: Duration) -> Self {
        self.slow_call = Some(after);
        self
    }

    /// How many requests there must have been in the last 10 s to judge by a share of them; 20 by
    /// default.
    #[must_use]
    pub fn minimum_requests(mut self, requests: u32) -> Self {
        self.minimum_requests = requests;
        self
    }

    /// How long a node is left alone before its first probe when it fails again within 60 s of its
    /// return; 1 s by default, times 1.5 for each further time up to `longest` (30 s by default),
    /// each +-20 %. The first time it is probed after 100 ms.
    #[must_use]
    pub fn reopening(mut self, first: Duration, longest: Duration) -> Self {
        self.reopening = first;
        self.longest_reopening = longest;
        self
    }

    /// Over how long a node that is back takes its keys back, one by one; 2 s by default. Zero is
    /// at once. Only with redistribution, where there is another node for them meanwhile.
    #[must_use]
    pub fn ramp(mut self, ramp: Duration) -> Self {
        self.ramp = ramp;
        self
    }

    fn validate(&self) -> Result<(), Invalid> {
        not_zero("consecutive_timeouts", self.consecutive_timeouts == 0)?;
        not_zero("failure_rate", self.failure_rate == 0)?;
        not_zero("slow_call_rate", self.slow_call_rate == 0)?;
        let slow_call = self.slow_call.unwrap_or(Duration::MAX);
        not_zero("slow_call", slow_call.is_zero())
    }
}

/// How much is remembered of keys that were written while a node could not be told, and what
/// happens when that is not enough.
///
/// Such keys are deleted on the node when it answers again; until then what it has for them is not
/// used. That is how this client never reads something older than what it has itself written.
#[derive(Clone, Debug)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct JournalSettings {
    pub(super) capacity: usize,
    pub(super) overflow: JournalOverflow,
}

/// What becomes of a node of which more keys would have to be remembered than there is room for:
/// something on it is old, and it is no longer known what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum JournalOverflow {
    /// The node takes no requests until it has been flushed by hand
    /// ([`Client::flush_all`](crate::Client::flush_all), which is carried out on a node that is out
    /// as soon as it answers), or has been restarted. No old value is read.
    #[default]
    Refuse,
    /// The node is flushed before it is readmitted, other clients' values included.
    Flush,
    /// The node serves what it has, old values included.
    Serve,
}

impl Default for JournalSettings {
    fn default() -> Self {
        Self {
            capacity: 100_000,
            overflow: JournalOverflow::default(),
        }
    }
}

impl JournalSettings {
    /// How many keys are remembered for each node; 100,000 by default, which take about 28 MiB when
    /// they are short.
    #[must_use]
    pub fn capacity(mut self, keys: usize) -> Self {
        self.capacity = keys;
        self
    }

    pub(crate) fn same_capacity(&self, other: &Self) -> bool {
        self.capacity == other.capacity
    }

    /// What becomes of a node with more; [`JournalOverflow::Refuse`] by default.
    #[must_use]
    pub fn overflow(mut self, overflow: JournalOverflow) -> Self {
        self.overflow = overflow;
        self
    }
}
