//! What all connections to one node have in common, whatever they speak.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::time::Instant;

use super::greeting::{Connected, Greeting, other_protocol};
use super::linger::Lingering;
use super::protocol::{Dialect, Protocol, Spoken};
use super::{Address, BoxStream, ConnectFailure, Connector, Event, Observer, PipelinedSettings};
use crate::error::{Error, ErrorKind, Result, Sent};
use crate::executor::{AtomicDuration, Spawner, after};
use crate::key::Key;
use crate::request::Request;
#[cfg(feature = "classic")]
use crate::value::CasToken;

/// What the connections to a node are made of.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) name: Arc<str>,
    pub(crate) address: Address,
    pub(crate) settings: PipelinedSettings,
    pub(crate) protocol: Protocol,
    /// What is known of what the server speaks, shared by all who ask it.
    pub(crate) spoken: Arc<Spoken>,
    /// How many classic connections there may be.
    pub(crate) pool_size: u32,
    pub(crate) connector: Arc<dyn Connector>,
    pub(crate) spawner: Spawner,
    pub(crate) observer: Option<Arc<dyn Observer>>,
}

/// It does not own the executor, whose threads would otherwise keep themselves running: the tasks of
/// its connections hold on to it.
pub(super) struct Site {
    pub(super) name: Arc<str>,
    address: Address,
    pub(super) settings: ArcSwap<PipelinedSettings>,
    /// Of these what every request looks at.
    pub(super) terms: Terms,
    pub(super) protocol: Protocol,
    pub(super) spoken: Arc<Spoken>,
    connector: Arc<dyn Connector>,
    observer: Option<Arc<dyn Observer>>,
    /// Tells the nodes of this process apart, for CAS tokens.
    pub(super) number: NonZeroU32,
    /// Connections are numbered as they are established; this is the newest one's number.
    newest: AtomicU32,
    up: AtomicUsize,
    /// Requests may go to the same server over connections that are none of these.
    retired: AtomicBool,
    /// How many connections [linger](Lingering).
    pub(super) lingering: AtomicUsize,
    /// True when the last handle is dropped, or the client shut down.
    pub(super) closing: watch::Sender<bool>,
    /// True or gone when its cluster is, which may be longer than it.
    cluster_closing: OnceLock<watch::Receiver<bool>>,
}

pub(super) struct Terms {
    attempt_timeout: AtomicDuration,
    max_value_size: AtomicUsize,
}

impl Terms {
    fn new(settings: &PipelinedSettings) -> Self {
        Self {
            attempt_timeout: AtomicDuration::new(settings.attempt_timeout),
            max_value_size: AtomicUsize::new(settings.limits.value),
        }
    }

    fn set(&self, settings: &PipelinedSettings) {
        self.attempt_timeout.set(settings.attempt_timeout);
        let largest = settings.limits.value;
        self.max_value_size.store(largest, Ordering::Relaxed);
    }

    pub(super) fn attempt_timeout(&self) -> Duration {
        self.attempt_timeout.get()
    }

    pub(super) fn max_value_size(&self) -> usize {
        self.max_value_size.load(Ordering::Relaxed)
    }
}

impl Site {
    /// The site, and where its tasks are to run.
    pub(super) fn new(parts: Parts) -> (Arc<Self>, Spawner) {
        let settings = parts.settings.over(&*parts.connector);
        let site = Self {
            name: parts.name,
            address: parts.address,
            terms: Terms::new(&settings),
            settings: ArcSwap::from_pointee(settings),
            protocol: parts.protocol,
            spoken: parts.spoken,
            connector: parts.connector,
            observer: parts.observer,
            number: next_number(),
            newest: AtomicU32::new(0),
            up: AtomicUsize::new(0),
            retired: AtomicBool::new(false),
            lingering: AtomicUsize::new(0),
            closing: watch::Sender::new(false),
            cluster_closing: OnceLock::new(),
        };
        (Arc::new(site), parts.spawner)
    }

    /// Makes a connection that is known to lead to a server that answers, in the meta protocol or in
    /// the classic one.
    pub(super) async fn connect(&self, meta: bool) -> Result<Connected, (ConnectFailure, Error)> {
        let spoken = self.spoken.get();
        let proxy = spoken == Some(Dialect::Classic { proxy: true });
        let settings = self.settings.load();
        let greeting = Greeting {
            connector: &*self.connector,
            address: &self.address,
            protocol: self.protocol,
            is_known_direct: matches!(
                spoken,
                Some(Dialect::Meta | Dialect::Classic { proxy: false })
            ),
            is_known_proxy: proxy && self.up() > 0,
            credentials: settings.credentials.clone(),
            within: settings.connect_within(),
        };
        let connected = greeting.connect().await?;
        self.spoken.set(connected.dialect);
        match (connected.dialect == Dialect::Meta) == meta {
            true => Ok(connected),
            false => Err(other_protocol()),
        }
    }

    /// Other settings from now on.
    pub(super) fn apply(&self, settings: PipelinedSettings) {
        let settings = settings.over(&*self.connector);
        self.terms.set(&settings);
        self.settings.store(Arc::new(settings));
    }

    pub(super) fn newest(&self) -> u32 {
        self.newest.load(Ordering::Acquire)
    }

    /// Counts a connection as up, for as long as what is returned lives, and gives it its number.
    pub(super) fn connection_up(self: &Arc<Self>) -> Up {
        self.up.fetch_add(1, Ordering::Relaxed);
        Up {
            site: self.clone(),
            number: self.newest.fetch_add(1, Ordering::AcqRel) + 1,
        }
    }

    pub(super) fn up(&self) -> usize {
        self.up.load(Ordering::Relaxed)
    }

    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    pub(super) fn report(&self, event: &Event<'_>) {
        if let Some(observer) = &self.observer {
            observer.observe(event);
        }
    }

    pub(super) fn answered(&self, requests: u32, now: Instant) {
        if let Some(observer) = &self.observer {
            observer.answered(requests, now);
        }
    }

    pub(super) fn slow_after(&self) -> Option<Duration> {
        self.observer.as_ref().map(|observer| observer.slow_after())
    }

    /// These may be executed after what is written later.
    pub(super) fn in_doubt(&self, keys: &[Key]) {
        if !keys.is_empty() {
            self.report(&Event::InDoubt {
                keys,
                lingers: false,
            });
        }
    }

    /// Writes of these keys were under way over a connection that has ended. `given_up` is that
    /// connection, if it has because we wanted it to: the server may still execute what was sent over
    /// it.
    pub(super) fn left_in_doubt(self: &Arc<Self>, keys: &[Key], given_up: Option<BoxStream>) {
        if keys.is_empty() {
            return;
        }
        let lingering = given_up.and_then(|stream| Lingering::new(self, keys, stream));
        self.report(&Event::InDoubt {
            keys,
            lingers: lingering.is_some(),
        });
        if let Some(lingering) = lingering {
            lingering.spawn();
        }
    }

    pub(super) fn lingers_until(&self, closing: watch::Receiver<bool>) {
        let _already = self.cluster_closing.set(closing);
    }

    /// Until when connections that were given up are waited for.
    pub(super) fn lingering_ends(&self) -> watch::Receiver<bool> {
        let cluster = self.cluster_closing.get();
        cluster.map_or_else(|| self.closing.subscribe(), Clone::clone)
    }

    /// What a token lacks only the unique number of, if a value is read now.
    #[cfg(feature = "classic")]
    pub(super) fn token(&self) -> CasToken {
        CasToken {
            node: self.number,
            connection: self.newest(),
            unique: 0,
        }
    }

    pub(super) fn shut_down(&self) -> Error {
        shut_down().at_node(&self.name)
    }
}

/// When whoever asks stops waiting, whatever time the node may have: at its deadline, or at the end of an
/// attempt that is to be shorter than the node's.
///
/// # Errors
/// [`ErrorKind::Timeout`], unsent, if that has passed.
pub(super) fn own_end(request: &Request, now: Instant) -> Result<Option<Instant>> {
    let attempt = request.attempt_timeout().map(|own| after(now, own));
    let end = [request.deadline(), attempt].into_iter().flatten().min();
    match end {
        Some(end) if end <= now => {
            let error = Error::new(ErrorKind::Timeout, "its deadline has passed");
            Err(error.with_sent(Sent::No))
        }
        end => Ok(end),
    }
}

pub(super) fn shut_down() -> Error {
    Error::new(ErrorKind::Shutdown, "the client is shut down")
}

/// A connection that is up.
pub(super) struct Up {
    site: Arc<Site>,
    pub(super) number: u32,
}

impl Drop for Up {
    fn drop(&mut self) {
        self.site.up.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The wait before a second connect; doubled with each further failure.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// The wait after so many connects have failed before. Half of it is fixed, half of it random, so that
/// many clients do not come back at once.
pub(super) fn backoff(failures: u32) -> Duration {
    let full = FIRST_BACKOFF
        .saturating_mul(1 << failures.min(16))
        .min(MAX_BACKOFF);
    full / 2 + (full / 2).mul_f64(fastrand::f64())
}

fn next_number() -> NonZeroU32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    loop {
        if let Some(number) = NonZeroU32::new(NEXT.fetch_add(1, Ordering::Relaxed)) {
            return number;
        }
    }
}
