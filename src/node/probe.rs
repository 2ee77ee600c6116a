//! The readiness probe: whether a node does what requests need of it.
//!
//! A connect that succeeds says nothing, and neither does an answer to `version`: a server can
//! give both while no get is answered. So the probe writes a canary item and reads it back, larger
//! than one packet, with a value that was never written before.

use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::error::{Charge, Error, ErrorKind, Invalid, Result, not_zero};
use crate::key::Key;
use crate::request::{Operation, Request, StoreMode};
use crate::response::Response;
use crate::ttl::Ttl;

/// Needs two packets on an Ethernet.
pub(super) const CANARY_SIZE: usize = 2048;

/// A canary left behind goes by itself.
const CANARY_TTL: Ttl = Ttl::secs(60);

/// A way to ask a node that does not lead through its breaker.
pub(super) type Asker = Box<dyn Fn(Request) -> BoxFuture<'static, Result<Response>> + Send + Sync>;

/// How a node is tested, in the words of a readiness probe.
///
/// While the node takes requests the probe goes over the connections that requests use; a node that
/// is out is probed over a fresh connection each time, and nothing else brings it back.
#[derive(Clone, Debug)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct ProbeSettings {
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) initial_delay: Duration,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) period: Duration,
    #[cfg_attr(feature = "serde", serde(with = "humantime_serde"))]
    pub(super) timeout: Option<Duration>,
    pub(super) failure_threshold: u32,
    pub(super) success_threshold: u32,
}

impl Default for ProbeSettings {
    fn default() -> Self {
        Self {
            initial_delay: Duration::from_secs(1),
            period: Duration::from_secs(1),
            timeout: None,
            failure_threshold: 3,
            success_threshold: 2,
        }
    }
}

impl ProbeSettings {
    /// The time before the first probe, counted from when the client is built, or first used where
    /// its runtime is not known before; 1 s by default.
    #[must_use]
    pub fn initial_delay(mut self, delay: Duration) -> Self {
        self.initial_delay = delay;
        self
    }

    /// The time between probes; 1 s by default, each +-20 %, and up to 5 % of it earlier where that
    /// wakes the probes of several nodes together. After the breaker has opened the first
    /// comes after 100 ms (later if it opens again and again, see
    /// [`BreakerSettings::reopening`](crate::BreakerSettings::reopening)), and after a first success
    /// the next one, too.
    #[must_use]
    pub fn period(mut self, period: Duration) -> Self {
        self.period = period;
        self
    }

    /// How long one probe may take, connecting, writing and reading together. By default as long as
    /// requests would have for these: the connect timeout and two attempts.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// How many probes in a row must fail to open the breaker of a node that takes requests; 3 by
    /// default.
    #[must_use]
    pub fn failure_threshold(mut self, failures: u32) -> Self {
        self.failure_threshold = failures;
        self
    }

    /// How many probes in a row must succeed before the node takes requests again; 2 by default.
    #[must_use]
    pub fn success_threshold(mut self, successes: u32) -> Self {
        self.success_threshold = successes;
        self
    }

    pub(super) fn validate(&self) -> Result<(), Invalid> {
        not_zero("period", self.period.is_zero())?;
        not_zero(
            "timeout",
            self.timeout.is_some_and(|timeout| timeout.is_zero()),
        )?;
        not_zero("success_threshold", self.success_threshold == 0)?;
        not_zero("failure_threshold", self.failure_threshold == 0)
    }

    /// A period, give or take a fifth, so that many clients do not probe at once.
    pub(super) fn next(&self) -> Duration {
        jittered(self.period)
    }
}

pub(super) fn jittered(wait: Duration) -> Duration {
    let seconds = wait.as_secs_f64() * (0.8 + 0.4 * fastrand::f64());
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// The key this client probes this node with; no two share one.
pub(super) fn canary_key() -> Key {
    let key = format!("tower-memcached:canary:{:016x}", fastrand::u64(..));
    match Key::new(key) {
        Ok(key) => key,
        Err(_) => unreachable!("39 letters, digits, colons and hyphens"),
    }
}

/// Writes a fresh value of that size and reads it back.
pub(super) async fn canary(ask: &Asker, key: &Key, size: usize) -> Result<()> {
    let mut value = vec![b'c'; size];
    let fresh = fastrand::u64(..).to_be_bytes();
    value
        .iter_mut()
        .zip(fresh)
        .for_each(|(byte, fresh)| *byte = fresh);
    let value = Bytes::from(value);
    let write = Operation::Store {
        mode: StoreMode::Set,
        key: key.clone(),
        payload: value.clone().into(),
        ttl: CANARY_TTL,
    };
    let read = Operation::Get {
        key: key.clone(),
        with_cas: false,
    };
    let written = match ask(Request::new(write)).await {
        Ok(Response::Stored(stored)) => stored,
        Ok(_) => false,
        // A server without memory for it, or for items so large, answers, and may well serve what
        // it has.
        Err(error) if matches!(error.kind(), ErrorKind::Server | ErrorKind::ValueTooLarge) => {
            ask(Request::new(read)).await?;
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    match ask(Request::new(read)).await? {
        Response::Value(Some(read)) if written && *read == *value => Ok(()),
        _ => {
            let message = "the canary was not read back as it was written";
            Err(Error::new(ErrorKind::Protocol, message).charged_to(Charge::Node))
        }
    }
}
