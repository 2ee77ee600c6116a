//! The readiness probe: whether a node does what requests need of it.
//!
//! A connect that succeeds says nothing, and neither does an answer to `version`: a server can
//! give both while no get is answered. So the probe writes a canary item and reads it back, over a
//! connection of its own, larger than one packet, with a value that was never written before.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, Either, select};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tower::Service;

use super::Shared;
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::key::Key;
use crate::request::{Operation, Request, StoreMode};
use crate::response::Response;
use crate::telemetry;
use crate::ttl::Ttl;

/// Needs two packets on an Ethernet.
pub(super) const CANARY_SIZE: usize = 2048;

/// A canary left behind goes by itself.
const CANARY_TTL: Ttl = Ttl::secs(60);

/// The first probe after opening, and the next one after a first success.
const SOON: Duration = Duration::from_millis(100);

/// One probe of one node.
pub(super) type Probe = Box<dyn Fn() -> BoxFuture<'static, Result<()>> + Send + Sync>;

/// How an open node is tested, in the words of a readiness probe.
#[derive(Clone, Debug)]
pub struct ProbeSettings {
    pub(super) period: Duration,
    pub(super) timeout: Option<Duration>,
    pub(super) success_threshold: u32,
}

impl Default for ProbeSettings {
    fn default() -> Self {
        Self {
            period: Duration::from_secs(1),
            timeout: None,
            success_threshold: 2,
        }
    }
}

impl ProbeSettings {
    /// The time between probes of an open node; 1 s by default, each +-20 %. The first comes
    /// 100 ms after the breaker opened, and another 100 ms after a first success.
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

    /// How many probes in a row must succeed before the node takes requests again; 2 by default.
    #[must_use]
    pub fn success_threshold(mut self, successes: u32) -> Self {
        self.success_threshold = successes;
        self
    }

    pub(super) fn validate(&self) -> Result<()> {
        let zero = self.period.is_zero() || self.timeout.is_some_and(|timeout| timeout.is_zero());
        if zero || self.success_threshold == 0 {
            let message = "the probe's period, timeout and success threshold must not be zero";
            return Err(Error::configuration(message));
        }
        Ok(())
    }
}

/// The key this process probes with; no two clients share one.
pub(super) fn canary_key() -> Key {
    let key = format!("tower-memcached:canary:{:016x}", fastrand::u64(..));
    match Key::new(key) {
        Ok(key) => key,
        Err(_) => unreachable!("39 letters, digits, colons and hyphens"),
    }
}

/// Writes a fresh value and reads it back.
pub(super) async fn canary<S>(service: S, key: Key) -> Result<()>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    let mut value = vec![b'c'; CANARY_SIZE];
    value[..8].copy_from_slice(&fastrand::u64(..).to_be_bytes());
    let value = Bytes::from(value);
    let write = Operation::Store {
        mode: StoreMode::Set,
        key: key.clone(),
        payload: value.clone().into(),
        ttl: CANARY_TTL,
    };
    let read = Operation::Get {
        key,
        with_cas: false,
    };
    let written = match Request::new(write).ask(service.clone()).await {
        Ok(Response::Stored(stored)) => stored,
        Ok(_) => false,
        // A server without memory for it, or for items so large, answers, and may well serve what
        // it has.
        Err(error) if matches!(error.kind(), ErrorKind::Server | ErrorKind::ValueTooLarge) => {
            Request::new(read).ask(service).await?;
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    match Request::new(read).ask(service).await? {
        Response::Value(Some(read)) if written && *read == *value => Ok(()),
        _ => Err(Error::new(
            ErrorKind::Protocol,
            "the canary was not read back as it was written",
        )),
    }
}

/// Probes an open node until it is closed, or nobody uses it any more. It holds on to the node
/// only while it probes.
async fn until_ready(
    mut running: Running,
    settings: ProbeSettings,
    mut in_use: watch::Receiver<()>,
) {
    running.begun = true;
    let mut wait = SOON;
    loop {
        let unused = std::pin::pin!(in_use.changed());
        let tick = std::pin::pin!(sleep(wait));
        if let Either::Left(_) = select(unused, tick).await {
            return;
        }
        let Some(shared) = running.node.upgrade() else {
            return;
        };
        let within = settings.timeout.unwrap_or(shared.probe_within);
        let outcome = match timeout(within, (shared.probe)()).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::new(ErrorKind::Timeout, "the probe was not answered")),
        };
        telemetry::probed(&shared.name, outcome.is_ok());
        wait = match outcome {
            Ok(()) if shared.probe_succeeded() => return,
            Ok(()) => SOON,
            Err(error) => {
                shared.breaker.probe_failed(&error.at_node(&shared.name));
                settings.period.mul_f64(0.8 + 0.4 * fastrand::f64())
            }
        };
    }
}

/// Says that the probing task is gone, however it went, so that another can be started. Made
/// before the task's first poll: a runtime that is shut down drops what it is given.
struct Running {
    node: Weak<Shared>,
    begun: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(shared) = self.node.upgrade() {
            shared.probing_ended();
            // It panicked, or the node was opened again while it ended. A task that never began
            // was refused by its runtime, which would refuse the next one as well.
            if self.begun && shared.is_open() {
                shared.ensure_probing();
            }
        }
    }
}

/// Boxes a probe.
pub(super) fn boxed<F, Fut>(probe: F) -> Probe
where
    F: Fn() -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<()>> + Send + 'static,
{
    Box::new(move || Box::pin(probe()))
}

pub(super) fn spawn(shared: &Arc<Shared>) -> Result<()> {
    let settings = shared.settings.probe.clone();
    let running = Running {
        node: Arc::downgrade(shared),
        begun: false,
    };
    let task = until_ready(running, settings, shared.in_use.subscribe());
    shared.spawner.spawn(task)
}
