//! Functional groups: what one part of a service caches, kept apart from what the others do.
//!
//! A group has a key prefix, a deadline, an in-flight limit, a rate and a kill switch of its own;
//! declared in the [builder](crate::ClientBuilder::group) it may have its own failure mode,
//! read-through settings and nodes besides ([`GroupSettings`]). One group that floods the cache, or must
//! stop using it, leaves the others alone. A [`GroupLayer`] is the part of it that needs no cluster, for
//! stacks built by hand:
//!
//! ```
//! use std::time::Duration;
//! use tower_memcached::{Client, GroupLayer, KillSwitch};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), tower_memcached::Error> {
//! let client = Client::builder().nodes(["127.0.0.1"]).build()?;
//! let kill_switch = KillSwitch::default();
//! let sessions = client.layer(
//!     GroupLayer::new("sessions")
//!         .prefix("session:")
//!         .timeout(Duration::from_millis(20))
//!         .max_in_flight(200)
//!         .kill_switch(kill_switch.clone()),
//! );
//! kill_switch.throw();
//! assert_eq!(sessions.get("42").await?, None);
//! # Ok(())
//! # }
//! ```

mod future;
mod settings;

use std::fmt;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::time::Instant;
use tower::{Layer, Service};

pub use self::future::GroupFuture;
use self::future::{State, put_back};
pub use self::settings::GroupSettings;
use crate::bulkhead::{Bulkhead, Room};
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::executor::after;
use crate::key::Key;
use crate::kill_switch::{Bypassed, KillSwitch, bypass, spares};
use crate::rate::Cells;
use crate::request::{Operation, Purpose, Request};
use crate::response::Response;
use crate::telemetry;

/// Makes a functional group of a stack; see [`Client::layer`](crate::Client::layer).
#[derive(Clone, Debug)]
pub struct GroupLayer {
    name: Arc<str>,
    prefix: Arc<[u8]>,
    settings: GroupSettings,
    kill_switch: KillSwitch,
}

impl GroupLayer {
    /// A group without a prefix, limit or deadline of its own; its errors name it.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            prefix: Arc::default(),
            settings: GroupSettings::default(),
            kill_switch: KillSwitch::default(),
        }
    }

    /// What goes before each of its keys. A key that is too long with it, or a prefix with a
    /// forbidden byte, is an [`ErrorKind::InvalidKey`] of the operation.
    #[must_use]
    pub fn prefix(mut self, prefix: impl AsRef<[u8]>) -> Self {
        self.prefix = prefix.as_ref().into();
        self
    }

    /// How long each of its operations may take; the client's timeout where that is shorter.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings = self.settings.timeout(timeout);
        self
    }

    /// How many of its requests may be under way at once, on all clones together; more wait in its
    /// [queue](Self::max_queue), or fail at once with [`ErrorKind::Overloaded`]. No limit by default.
    #[must_use]
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.settings = self.settings.max_in_flight(requests);
        self
    }

    /// How many of its requests may wait until one of those under way ends, in the order in which
    /// they came; 0 by default. To wait they need a tokio runtime: outside of every one it is an
    /// [`ErrorKind::NoRuntime`] instead.
    #[must_use]
    pub fn max_queue(mut self, requests: usize) -> Self {
        self.settings = self.settings.max_queue(requests);
        self
    }

    /// How long each may wait there before it fails with [`ErrorKind::Overloaded`]; 50 ms by default,
    /// half of a client's default timeout, and never longer than until its deadline.
    #[must_use]
    pub fn max_wait(mut self, time: Duration) -> Self {
        self.settings = self.settings.max_wait(time);
        self
    }

    /// How many requests it may make each second; more fail at once with [`ErrorKind::Overloaded`]. No
    /// limit by default, nor with 0. See [`GroupSettings::rate`].
    #[must_use]
    pub fn rate(mut self, per_second: u32) -> Self {
        self.settings = self.settings.rate(per_second);
        self
    }

    /// How many requests it may make at once after a while with fewer; see [`GroupSettings::burst`].
    #[must_use]
    pub fn burst(mut self, requests: u32) -> Self {
        self.settings = self.settings.burst(requests);
        self
    }

    /// The switch that stops it.
    #[must_use]
    pub fn kill_switch(mut self, switch: KillSwitch) -> Self {
        self.kill_switch = switch;
        self
    }
}

impl<S> Layer<S> for GroupLayer {
    type Service = Group<S>;

    fn layer(&self, inner: S) -> Group<S> {
        let shared = Shared {
            prefix: self.prefix.clone(),
            kill_switch: self.kill_switch.clone(),
            ..Shared::new(self.name.clone(), &self.settings, 0)
        };
        Group::new(inner, Arc::new(shared))
    }
}

/// What all services of one group share.
pub(crate) struct Shared {
    name: Arc<str>,
    /// What errors call it.
    title: String,
    prefix: Arc<[u8]>,
    /// [`Request::route`]; 0 leaves that to whoever is above.
    route: u32,
    kill_switch: KillSwitch,
    room: Arc<Room>,
    terms: ArcSwap<Terms>,
}

/// What of its settings is looked at for each request.
struct Terms {
    timeout: Option<Duration>,
    attempt_timeout: Option<Duration>,
    rate: (Option<u32>, Option<u32>),
    cells: Option<Arc<Cells>>,
}

impl Terms {
    /// The cells that were taken stay so while the rate is the same.
    fn new(settings: &GroupSettings, before: Option<&Self>) -> Self {
        let rate @ (per_second, burst) = (settings.rate, settings.burst);
        Self {
            timeout: settings.timeout,
            attempt_timeout: settings.attempt_timeout,
            rate,
            cells: match before {
                Some(before) if before.rate == rate => before.cells.clone(),
                _ => Cells::of(per_second, burst).map(Arc::new),
            },
        }
    }
}

impl Shared {
    pub(crate) fn new(name: Arc<str>, settings: &GroupSettings, route: u32) -> Self {
        let title = format!("the group {name:?}");
        let kill_switch = KillSwitch::default();
        kill_switch.set(settings.killed);
        Self {
            room: Room::of_group(&name, &title, settings.limits()),
            prefix: settings.prefix.as_bytes().into(),
            terms: ArcSwap::from_pointee(Terms::new(settings, None)),
            name,
            title,
            route,
            kill_switch,
        }
    }

    /// Other settings from now on, but for the prefix.
    pub(crate) fn apply(&self, settings: &GroupSettings) {
        self.kill_switch.set(settings.killed);
        self.room.set_limits(settings.limits());
        let terms = Terms::new(settings, Some(&self.terms.load()));
        self.terms.store(Arc::new(terms));
    }

    pub(crate) fn kill_switch(&self) -> &KillSwitch {
        &self.kill_switch
    }

    pub(crate) fn status(&self) -> GroupStatus {
        GroupStatus {
            group: self.name.clone(),
            killed: self.kill_switch.is_thrown(),
            in_flight: self.room.in_flight(),
            queued: self.room.queued(),
        }
    }

    /// What becomes of a request now that the switch is thrown.
    fn bypass(&self, request: &Request) -> Bypassed {
        bypass(request, &self.name, &self.title)
    }

    /// Puts the prefix before the request's keys. Keys of a multi-key read that cannot take it are
    /// left out, and returned.
    fn prefix(&self, request: &mut Request) -> Result<Vec<(usize, Error)>> {
        let prefix = &*self.prefix;
        let mut invalid = Vec::new();
        if prefix.is_empty() {
            return Ok(invalid);
        }
        match request.operation_mut() {
            Operation::Get { key, .. }
            | Operation::Lookup { key, .. }
            | Operation::GetAndTouch { key, .. }
            | Operation::Store { key, .. }
            | Operation::CompareAndSwap { key, .. }
            | Operation::Delete { key }
            | Operation::Touch { key, .. }
            | Operation::Arithmetic { key, .. } => *key = key.prefixed(prefix)?,
            Operation::GetMany { keys } => {
                let mut prefixed: Vec<Key> = Vec::with_capacity(keys.len());
                for (place, key) in keys.iter().enumerate() {
                    match key.prefixed(prefix) {
                        Ok(key) => prefixed.push(key),
                        Err(error) => invalid.push((place, error)),
                    }
                }
                *keys = prefixed.into();
            }
            Operation::Version | Operation::FlushAll | Operation::Stats => {}
        }
        Ok(invalid)
    }

    /// The rate is used up.
    fn refuse(&self) -> Error {
        telemetry::group_shed(&self.name, "rate");
        let message = format!("{} may make no more requests for now", self.title);
        Error::new(ErrorKind::Overloaded, message)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("name", &self.name)
            .field("room", &self.room)
            .finish_non_exhaustive()
    }
}

/// What a functional group does now: an entry of [`Client::groups`](crate::Client::groups).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupStatus {
    /// Its name.
    pub group: Arc<str>,
    /// Whether its kill switch is thrown.
    pub killed: bool,
    /// Requests under way.
    pub in_flight: usize,
    /// Requests that wait until one of those ends.
    pub queued: usize,
}

/// The service of a functional group: of a [`GroupLayer`], or of [`Client::group`](crate::Client::group).
///
/// # Readiness
/// `poll_ready` is always ready. The readiness of the service below is waited for in the future, as
/// one of the group's requests under way and within the group's deadline.
///
/// # Cancel safety
/// Dropping a [`GroupFuture`] gives its place back, be it in the queue or among those under way.
#[derive(Clone, Debug)]
pub struct Group<S> {
    bulkhead: Bulkhead<S>,
    shared: Arc<Shared>,
}

impl<S> Group<S> {
    pub(crate) fn new(inner: S, shared: Arc<Shared>) -> Self {
        Self {
            bulkhead: Bulkhead::in_room(inner, shared.room.clone()),
            shared,
        }
    }
}

impl<S> Group<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    fn begin(&self, mut request: Request, terms: &Terms) -> State<S> {
        let shared = &self.shared;
        if request.purpose() == Purpose::Note {
            // Of a group above. It takes nothing, and must not be lost.
            let noted = shared.prefix(&mut request);
            let answer = noted.and_then(|_| Err(Error::new(ErrorKind::Disabled, "it is noted")));
            return State::note(self.bulkhead.inner().clone(), request, answer);
        }
        let spared = spares(&request);
        if shared.kill_switch.is_thrown() && !spared {
            return match shared.prefix(&mut request) {
                Ok(mut invalid) => {
                    let mut bypassed = shared.bypass(&request);
                    put_back(&mut bypassed.answer, &mut invalid);
                    State::bypassed(self.bulkhead.inner().clone(), request, bypassed)
                }
                Err(error) => State::settled(Err(error)),
            };
        }
        let invalid = match shared.prefix(&mut request) {
            Ok(invalid) => invalid,
            Err(error) => return State::settled(Err(error)),
        };
        // What was loaded has been paid for.
        if let Some(cells) = &terms.cells
            && request.purpose() != Purpose::Refill
            && cells.take().is_err()
        {
            return State::settled(Err(shared.refuse()));
        }
        let deadline = request.deadline();
        State::Called {
            future: self.bulkhead.call_by(request, deadline),
            shared: shared.clone(),
            spared,
            invalid,
        }
    }
}

impl<S> Service<Request> for Group<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = Error;
    type Future = GroupFuture<S>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request) -> GroupFuture<S> {
        // It may have to wait.
        request.forget_time();
        let terms = self.shared.terms.load();
        let ends = terms.timeout.map(|timeout| after(Instant::now(), timeout));
        if let Some(ends) = ends {
            request = request.with_deadline(ends);
        }
        if let Some(attempt) = terms.attempt_timeout {
            request = request.with_attempt_timeout(attempt);
        }
        if self.shared.route != 0 {
            request = request.with_route(self.shared.route);
        }
        GroupFuture::new(self.begin(request, &terms), ends)
    }
}
