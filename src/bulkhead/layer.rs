//! The bulkhead around any service.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep};
use tower::{Layer, Service};

use super::room::{Limits, Place, Room, Ticket};
use crate::error::{BoxError, Error, Result};
use crate::executor::{after, timer};

/// Lets only so many requests into a service at once, and only so many wait, each for so long. The
/// others fail at once, so that a service that hangs takes no more of its callers with it.
///
/// Each service that is made by [`layer`](Layer::layer) has places of its own, and shares them with
/// its clones, as tower's `ConcurrencyLimitLayer` has it. Unlike that one it does not keep its callers
/// waiting in `poll_ready`, where nothing bounds how many they are and for how long: overload is an
/// error.
///
/// It fits around any service: a whole client's ([`ClientBuilder::layer`](crate::ClientBuilder::layer)),
/// one node's ([`ClientBuilder::node_layer`](crate::ClientBuilder::node_layer)), or one that has nothing
/// to do with a cache.
///
/// ```
/// use std::time::Duration;
/// use tower::{Layer as _, ServiceExt as _};
/// use tower_memcached::{BulkheadLayer, ErrorKind, Sent};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), tower_memcached::Error> {
/// let slow = tower::service_fn(|seconds: u64| async move {
///     tokio::time::sleep(Duration::from_secs(seconds)).await;
///     Ok::<_, std::io::Error>("done")
/// });
/// let bulkhead = BulkheadLayer::new(1)
///     .name("reports")
///     .max_queue(1)
///     .max_wait(Duration::from_millis(10))
///     .layer(slow);
///
/// let hangs = tokio::spawn(bulkhead.clone().oneshot(3600));
/// tokio::task::yield_now().await;
/// // It waits for 10 ms in vain.
/// let error = bulkhead.clone().oneshot(0).await.unwrap_err();
/// assert_eq!(error.kind(), ErrorKind::Overloaded);
/// assert_eq!(error.sent(), Sent::No);
///
/// // Dropped at any point, a request gives its place back.
/// hangs.abort();
/// assert_eq!(bulkhead.oneshot(0).await?, "done");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct BulkheadLayer {
    name: Option<Arc<str>>,
    limits: Limits,
}

impl BulkheadLayer {
    /// So many requests at once, and none that waits. 0 lets nobody in, and 2^31 - 1 are the most
    /// there can be.
    #[must_use]
    pub fn new(max_in_flight: usize) -> Self {
        Self {
            name: None,
            limits: Limits::of(max_in_flight),
        }
    }

    /// How many requests may wait until one of those inside ends; 0 by default. They have their turn
    /// in the order in which they came, and nobody who comes later is let in before them.
    #[must_use]
    pub fn max_queue(mut self, requests: usize) -> Self {
        self.limits.max_queue = requests;
        self
    }

    /// How long a request may wait for its turn; 50 ms by default, half of a client's default timeout,
    /// so that there is time left for what it has waited for. It has no effect without a
    /// [queue](Self::max_queue).
    #[must_use]
    pub fn max_wait(mut self, time: Duration) -> Self {
        self.limits.max_wait = time;
        self
    }

    /// What errors call it.
    #[must_use]
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = Some(name.into());
        self
    }
}

impl<S> Layer<S> for BulkheadLayer {
    type Service = Bulkhead<S>;

    fn layer(&self, inner: S) -> Bulkhead<S> {
        let title = match &self.name {
            Some(name) => format!("the bulkhead {name:?}"),
            None => "the bulkhead".into(),
        };
        Bulkhead::titled(inner, title, self.limits)
    }
}

/// The service of a [`BulkheadLayer`]. Clones share its places.
///
/// # Readiness
/// `poll_ready` is always ready. The readiness of the service below is waited for in the future and
/// within a place, by a clone of it, which is then called. So those who wait for a service that is
/// never ready are bounded, too. How long they do so is not: that is for a timeout around this, or
/// within it.
///
/// # Errors
/// [`ErrorKind::Overloaded`](crate::ErrorKind::Overloaded), unsent, if all places are taken and as many
/// wait as may, or the wait was in vain. [`ErrorKind::NoRuntime`](crate::ErrorKind::NoRuntime) if it
/// would have to wait outside of every tokio runtime. Errors of the service below that are not ours
/// are an [`ErrorKind::Layer`](crate::ErrorKind::Layer).
///
/// # Cancel safety
/// A place is taken by `call`, or when it is the request's turn. It is given back when the future
/// ends or is dropped, wherever it is, and when the service below panics.
#[derive(Clone, Debug)]
pub struct Bulkhead<S> {
    inner: S,
    room: Arc<Room>,
}

impl<S> Bulkhead<S> {
    pub(crate) fn in_room(inner: S, room: Arc<Room>) -> Self {
        Self { inner, room }
    }

    fn titled(inner: S, title: String, limits: Limits) -> Self {
        Self {
            inner,
            room: Room::new(title, limits),
        }
    }

    /// Requests inside now.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.room.in_flight()
    }

    /// Requests that wait for their turn now.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.room.queued()
    }

    /// Takes over the limits of a layer, for all clones, while requests go on; its name stays.
    ///
    /// With more places those who wait enter at once. With fewer those inside go on, and nobody enters
    /// until enough of them have left. Those who wait go on waiting as long as they were to.
    pub fn set_limits(&self, layer: &BulkheadLayer) {
        self.room.set_limits(layer.limits);
    }

    pub(crate) fn inner(&self) -> &S {
        &self.inner
    }

    #[cfg(test)]
    pub(super) fn room(&self) -> &Arc<Room> {
        &self.room
    }

    /// `call`, where a request waits for its turn until `deadline` at most.
    pub(crate) fn call_by<R>(&self, request: R, deadline: Option<Instant>) -> BulkheadFuture<S, R>
    where
        S: Service<R> + Clone,
    {
        let step = if let Some(place) = self.room.try_enter() {
            Step::Entered {
                service: self.inner.clone(),
                request,
                place,
            }
        } else if let Some(ticket) = self.room.line_up() {
            let moment = after(Instant::now(), self.room.max_wait());
            Step::Queued {
                ticket,
                moment: deadline.map_or(moment, |deadline| deadline.min(moment)),
                timer: None,
                service: self.inner.clone(),
                request,
            }
        } else {
            Step::Refused {
                error: self.room.full(),
            }
        };
        BulkheadFuture { step }
    }
}

impl<S, R> Service<R> for Bulkhead<S>
where
    S: Service<R> + Clone,
    S::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = Error;
    type Future = BulkheadFuture<S, R>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: R) -> BulkheadFuture<S, R> {
        self.call_by(request, None)
    }
}

pin_project! {
    /// The future of one request to a [`Bulkhead`].
    #[must_use = "futures do nothing unless polled"]
    pub struct BulkheadFuture<S, R>
    where
        S: Service<R>,
    {
        #[pin]
        step: Step<S, R>,
    }
}

pin_project! {
    // The place is the last to be dropped: who gets it next finds what was done in it ended.
    #[project = StepProjection]
    #[project_replace = StepReplacement]
    enum Step<S, R>
    where
        S: Service<R>,
    {
        Queued {
            ticket: Ticket,
            moment: Instant,
            // Boxed, since few wait, and all would have to carry it.
            timer: Option<Pin<Box<Sleep>>>,
            service: S,
            request: R,
        },
        Entered { service: S, request: R, place: Place },
        Called {
            #[pin]
            future: S::Future,
            place: Place,
        },
        Refused { error: Error },
        Done,
    }
}

impl<S: Service<R>, R> BulkheadFuture<S, R> {
    /// Whether the service below has got the request.
    pub(crate) fn has_called(&self) -> bool {
        matches!(self.step, Step::Called { .. } | Step::Done)
    }

    /// Takes the request back, unless the service below has got it, and gives its place back. The
    /// future is not to be polled then.
    pub(crate) fn withdraw(self: Pin<&mut Self>) -> Option<(S, R)> {
        if !matches!(self.step, Step::Queued { .. } | Step::Entered { .. }) {
            return None;
        }
        match self.project().step.project_replace(Step::Done) {
            StepReplacement::Queued {
                service, request, ..
            }
            | StepReplacement::Entered {
                service, request, ..
            } => Some((service, request)),
            _ => unreachable!("matched above"),
        }
    }
}

impl<S, R> Future for BulkheadFuture<S, R>
where
    S: Service<R>,
    S::Error: Into<BoxError>,
{
    type Output = Result<S::Response>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut step = self.project().step;
        let foreign = |error: S::Error| Error::from_boxed(error.into());
        let outcome = loop {
            match step.as_mut().project() {
                StepProjection::Queued {
                    ticket,
                    moment,
                    timer,
                    ..
                } => {
                    let Poll::Ready(place) = ticket.poll_turn(cx) else {
                        let timer = match timer {
                            Some(timer) => timer,
                            None => match self::timer(None, *moment) {
                                Ok(made) => timer.insert(Box::pin(made)),
                                Err(error) => break Err(error),
                            },
                        };
                        ready!(timer.as_mut().poll(cx));
                        break Err(ticket.room().none_ended());
                    };
                    let StepReplacement::Queued {
                        service, request, ..
                    } = step.as_mut().project_replace(Step::Done)
                    else {
                        unreachable!("matched above");
                    };
                    step.set(Step::Entered {
                        service,
                        request,
                        place,
                    });
                }
                StepProjection::Entered { service, .. } => {
                    if let Err(error) = ready!(service.poll_ready(cx)) {
                        break Err(foreign(error));
                    }
                    let StepReplacement::Entered {
                        mut service,
                        request,
                        place,
                    } = step.as_mut().project_replace(Step::Done)
                    else {
                        unreachable!("matched above");
                    };
                    let future = service.call(request);
                    step.set(Step::Called { future, place });
                }
                StepProjection::Called { future, .. } => {
                    break ready!(future.poll(cx)).map_err(foreign);
                }
                StepProjection::Refused { .. } => {
                    let StepReplacement::Refused { error } =
                        step.as_mut().project_replace(Step::Done)
                    else {
                        unreachable!("matched above");
                    };
                    return Poll::Ready(Err(error));
                }
                StepProjection::Done => panic!("polled after completion"),
            }
        };
        step.set(Step::Done);
        Poll::Ready(outcome)
    }
}

impl<S: Service<R>, R> fmt::Debug for BulkheadFuture<S, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BulkheadFuture").finish_non_exhaustive()
    }
}
