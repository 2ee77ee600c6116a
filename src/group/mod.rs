//! Functional groups: what one part of a service caches, kept apart from what the others do.
//!
//! A group has a key prefix, a deadline and an in-flight limit of its own, and a kill switch. One
//! group that floods the cache, or must stop using it, leaves the others alone:
//!
//! ```
//! use std::time::Duration;
//! use tower_memcached::{Client, Executor, GroupLayer, KillSwitch};
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
//! assert!(sessions.get("42").await.is_err());
//! # Ok(())
//! # }
//! ```

mod settings;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep};
use tower::{Layer, Service};

use crate::error::{BoxError, Error, ErrorKind, Result, Sent};
use crate::executor::{after, timer};
use crate::key::Key;
use crate::kill_switch::KillSwitch;
use crate::request::{Operation, Purpose, Request};
use crate::response::Response;

pub use settings::GroupSettings;

/// Makes a functional group of a stack; see [`Client::layer`](crate::Client::layer).
#[derive(Clone, Debug)]
pub struct GroupLayer {
    name: Arc<str>,
    prefix: Arc<[u8]>,
    timeout: Option<Duration>,
    max_in_flight: usize,
    kill_switch: KillSwitch,
    /// [`Request::route`]; 0 leaves that to whoever is above.
    route: u32,
}

impl GroupLayer {
    /// A group without a prefix, limit or deadline of its own; its errors name it.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            prefix: Arc::default(),
            timeout: None,
            max_in_flight: usize::MAX,
            kill_switch: KillSwitch::default(),
            route: 0,
        }
    }

    /// Its requests go by the route that the cluster has for it.
    #[expect(dead_code, reason = "groups are declared in the builder next")]
    pub(crate) fn route(mut self, route: u32) -> Self {
        self.route = route;
        self
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
        self.timeout = Some(timeout);
        self
    }

    /// How many of its requests may be under way at once, on all clones together; more fail at
    /// once with [`ErrorKind::Overloaded`]. No limit by default.
    #[must_use]
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.max_in_flight = requests;
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
        Group {
            inner,
            layer: self.clone(),
            in_flight: Arc::default(),
        }
    }
}

/// The service of a [`GroupLayer`].
///
/// # Readiness
/// That of the service below. The group's own limit is an immediate error from `call`.
///
/// # Cancel safety
/// Dropping a [`GroupFuture`] gives its place back.
#[derive(Clone, Debug)]
pub struct Group<S> {
    inner: S,
    layer: GroupLayer,
    in_flight: Arc<AtomicUsize>,
}

/// A place among the group's requests under way.
struct Permit(Arc<AtomicUsize>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<S> Group<S> {
    fn admit(&self) -> Result<Permit> {
        let layer = &self.layer;
        let refuse = |kind, why: &str| {
            let name = &layer.name;
            Err(Error::new(kind, format!("the group {name:?} {why}")))
        };
        if layer.kill_switch.is_thrown() {
            return refuse(ErrorKind::Disabled, "is stopped by its kill switch");
        }
        let before = self.in_flight.fetch_add(1, Ordering::Relaxed);
        let permit = Permit(self.in_flight.clone());
        if before >= layer.max_in_flight {
            return refuse(ErrorKind::Overloaded, "has all the requests it may have");
        }
        Ok(permit)
    }

    /// Puts the prefix before the request's keys. Keys of a multi-key read that cannot take it are
    /// left out, and returned.
    fn prefix(&self, request: &mut Request) -> Result<Vec<(usize, Error)>> {
        let prefix = &*self.layer.prefix;
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
}

impl<S> Service<Request> for Group<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = Error;
    type Future = GroupFuture<S>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        if self.layer.kill_switch.is_thrown() {
            return Poll::Ready(Ok(()));
        }
        let ready = self.inner.poll_ready(cx);
        ready.map_err(|error| Error::from_boxed(error.into()))
    }

    fn call(&mut self, mut request: Request) -> GroupFuture<S> {
        let ends = self
            .layer
            .timeout
            .map(|timeout| after(Instant::now(), timeout));
        if let Some(ends) = ends {
            request = request.with_deadline(ends);
        }
        if self.layer.route != 0 {
            request = request.with_route(self.layer.route);
        }
        let admitted = self
            .admit()
            .and_then(|permit| Ok((permit, self.prefix(&mut request)?)));
        GroupFuture {
            state: match admitted {
                Ok((permit, invalid)) => State::Called {
                    future: self.inner.call(request),
                    _permit: permit,
                    invalid,
                },
                // What it would have changed must not be read as it was.
                Err(error) if withheld(&error, &request) => match self.prefix(&mut request) {
                    Ok(_) => State::Withheld {
                        // Not the one that was not asked whether it is ready.
                        service: self.inner.clone(),
                        request: Some(request.with_purpose(Purpose::Note)),
                        error: Some(error),
                    },
                    Err(error) => State::Refused { error: Some(error) },
                },
                Err(error) => State::Refused { error: Some(error) },
            },
            ends,
            timer: None,
        }
    }
}

fn withheld(error: &Error, request: &Request) -> bool {
    error.kind() == ErrorKind::Disabled
        && request.operation().written().is_some()
        && request.purpose() != Purpose::Refill
}

pin_project! {
    /// The future of one request to a [`Group`].
    #[must_use = "futures do nothing unless polled"]
    pub struct GroupFuture<S>
    where
        S: Service<Request>,
    {
        #[pin]
        state: State<S>,
        // The group's own deadline, for a layer below that does not keep to the request's.
        ends: Option<Instant>,
        #[pin]
        timer: Option<Sleep>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<S>
    where
        S: Service<Request>,
    {
        Called {
            #[pin]
            future: S::Future,
            _permit: Permit,
            invalid: Vec<(usize, Error)>,
        },
        // Not sent, but made known to whoever keeps the journals.
        Withheld { service: S, request: Option<Request>, error: Option<Error> },
        Noting {
            #[pin]
            future: S::Future,
            error: Option<Error>,
        },
        Refused { error: Option<Error> },
    }
}

impl<S> Future for GroupFuture<S>
where
    S: Service<Request, Response = Response>,
    S::Error: Into<BoxError>,
{
    type Output = Result<Response>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let mut this = self.as_mut().project();
        match this.state.as_mut().project() {
            StateProjection::Called {
                future, invalid, ..
            } => {
                let Poll::Ready(mut outcome) = future.poll(cx) else {
                    let Some(ends) = *this.ends else {
                        return Poll::Pending;
                    };
                    if this.timer.is_none() {
                        // Outside of every runtime the client's own deadline has to do.
                        this.timer.set(timer(None, ends).ok());
                    }
                    match this.timer.as_mut().as_pin_mut() {
                        Some(timer) => ready!(timer.poll(cx)),
                        None => return Poll::Pending,
                    }
                    let error = Error::new(ErrorKind::Timeout, "the group's deadline has passed");
                    return Poll::Ready(Err(error.with_sent(Sent::Maybe)));
                };
                if let Ok(Response::Values(outcomes)) = &mut outcome {
                    // In ascending order, so each goes back to its own place.
                    for (place, error) in invalid.drain(..) {
                        outcomes.insert(place.min(outcomes.len()), Err(error));
                    }
                }
                Poll::Ready(outcome.map_err(|error| Error::from_boxed(error.into())))
            }
            StateProjection::Withheld {
                service,
                request,
                error,
            } => {
                let ready = ready!(service.poll_ready(cx)).is_ok();
                let (request, mut error) = (request.take(), error.take());
                if ready && let Some(request) = request {
                    let future = service.call(request);
                    let error = error.take();
                    this.state.set(State::Noting { future, error });
                    return self.poll(cx);
                }
                match error {
                    Some(error) => Poll::Ready(Err(error)),
                    None => panic!("polled after completion"),
                }
            }
            StateProjection::Noting { future, error } => {
                // It ends with what the cluster says at once: that it has taken note.
                let _ = ready!(future.poll(cx));
                match error.take() {
                    Some(error) => Poll::Ready(Err(error)),
                    None => panic!("polled after completion"),
                }
            }
            StateProjection::Refused { error } => match error.take() {
                Some(error) => Poll::Ready(Err(error)),
                None => panic!("polled after completion"),
            },
        }
    }
}

impl<S: Service<Request>> fmt::Debug for GroupFuture<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupFuture").finish_non_exhaustive()
    }
}
