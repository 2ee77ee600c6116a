//! The path of one request through the cluster.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::sync::futures::OwnedNotified;
use tokio::time::{Instant, Sleep};
use tower::Service;

use super::hedge::Hedge;
use super::many::{Every, Many};
use super::place::{Errand, Placed};
use super::{After, Shared, Tries};
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::executor::after;
use crate::node::{Node, NodeFuture, Shared as NodeShared};
use crate::request::{Origin, Request};
use crate::response::Response;

pin_project! {
    /// The future of one request to a [`Cluster`](super::Cluster).
    #[must_use = "futures do nothing unless polled"]
    pub struct ClusterFuture<S>
    where
        S: Service<Request>,
    {
        #[pin]
        path: Path<S>,
    }
}

pin_project! {
    #[project = PathProjection]
    enum Path<S>
    where
        S: Service<Request>,
    {
        Single { #[pin] single: Single<S> },
        Many { many: Box<Many<S>> },
        Every { every: Box<Every<S>> },
        Settled { outcome: Option<Result<Response>> },
    }
}

impl<S> ClusterFuture<S>
where
    S: Service<Request> + Clone,
{
    pub(super) fn settled(outcome: Result<Response>) -> Self {
        let outcome = Some(outcome);
        let path = Path::Settled { outcome };
        Self { path }
    }

    pub(super) fn single(shared: &Arc<Shared<S>>, request: Request) -> Self {
        let Some(errand) = Errand::of(&request) else {
            let error = Error::new(ErrorKind::Layer, "an operation without a key to route by");
            return Self::settled(Err(error));
        };
        let mut hedge = None;
        let first = shared.first(errand, |node, origin| {
            hedge = Hedge::new(shared, node, &request);
            Attempt::new(node, shared.addressed(&request, origin))
        });
        let attempt = match first {
            Placed::At(attempt) => attempt,
            Placed::Settled(outcome) => return Self::settled(outcome),
        };
        let single = Single {
            shared: shared.clone(),
            request,
            tries: Tries::default(),
            attempt,
            hedge,
        };
        Self {
            path: Path::Single { single },
        }
    }

    pub(super) fn many(shared: &Arc<Shared<S>>, request: Request) -> Self {
        let many = Box::new(Many::new(shared, request));
        Self {
            path: Path::Many { many },
        }
    }

    pub(super) fn every(shared: &Arc<Shared<S>>, request: Request) -> Self {
        let every = Box::new(Every::new(shared, &request));
        Self {
            path: Path::Every { every },
        }
    }
}

impl<S> Future for ClusterFuture<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    type Output = Result<Response>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        match self.project().path.project() {
            PathProjection::Single { single } => single.poll(cx),
            PathProjection::Many { many } => many.poll(cx).map(Ok),
            PathProjection::Every { every } => every.poll(cx).map(Ok),
            PathProjection::Settled { outcome } => match outcome.take() {
                Some(outcome) => Poll::Ready(outcome),
                None => panic!("polled after completion"),
            },
        }
    }
}

impl<S: Service<Request>> fmt::Debug for ClusterFuture<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterFuture").finish_non_exhaustive()
    }
}

impl<S> Shared<S> {
    /// The request as a node gets it: away from home, what it writes lives only so long.
    pub(super) fn addressed(&self, request: &Request, origin: Origin) -> Request {
        let mut request = request.clone().with_origin(origin);
        if origin == Origin::Moved {
            request.operation_mut().cap_ttl(self.settings.failover_ttl);
        }
        request
    }

    /// The wait before `node` is asked again, after `delay` or else once it is back; not past the
    /// deadline.
    pub(super) fn wait(
        &self,
        delay: Option<Duration>,
        node: &Arc<NodeShared>,
        deadline: Option<Instant>,
    ) -> Result<Wait> {
        let due = after(Instant::now(), delay.unwrap_or(Duration::MAX));
        let due = deadline.map_or(due, |deadline| due.min(deadline));
        Ok(Wait {
            timer: self.spawner.sleep_until(due)?,
            back: delay.is_none().then(|| node.back()),
            node: node.clone(),
        })
    }
}

/// Those who waited for a node do not all come back at once, but over this long, or over half of
/// the time that is left to them.
const RETURN_OVER: Duration = Duration::from_millis(100);

pin_project! {
    /// A wait before an attempt is repeated: for a while, or until the node is back.
    pub(super) struct Wait {
        // Ends with the deadline at the latest.
        #[pin]
        timer: Sleep,
        #[pin]
        back: Option<OwnedNotified>,
        node: Arc<NodeShared>,
    }
}

impl Wait {
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        if let Some(back) = this.back.as_mut().as_pin_mut()
            && (!this.node.is_open() || back.poll(cx).is_ready())
        {
            this.back.set(None);
            let now = Instant::now();
            let left = this.timer.deadline().saturating_duration_since(now);
            let over = RETURN_OVER.min(left / 2);
            this.timer
                .as_mut()
                .reset(now + over.mul_f64(fastrand::f64()));
        }
        this.timer.poll(cx)
    }
}

pin_project! {
    /// One attempt at one node, after a wait if it is a repeated one.
    pub(super) struct Attempt<S>
    where
        S: Service<Request>,
    {
        #[pin]
        wait: Option<Wait>,
        #[pin]
        future: NodeFuture<S>,
    }
}

impl<S: Service<Request> + Clone> Attempt<S> {
    pub(super) fn new(node: &Node<S>, request: Request) -> Self {
        Self {
            wait: None,
            future: NodeFuture::new(node, request),
        }
    }

    /// The same once more: after `wait`, at the same node.
    pub(super) fn after(wait: Wait, node: &Node<S>, request: Request) -> Self {
        Self {
            wait: Some(wait),
            ..Self::new(node, request)
        }
    }
}

impl<S: Service<Request>> Attempt<S> {
    pub(super) fn node(&self) -> &Arc<NodeShared> {
        self.future.node()
    }
}

impl<S> Future for Attempt<S>
where
    S: Service<Request, Response = Response>,
    S::Error: Into<BoxError>,
{
    type Output = Result<Response>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let mut this = self.project();
        if let Some(wait) = this.wait.as_mut().as_pin_mut() {
            ready!(wait.poll(cx));
            this.wait.set(None);
        }
        this.future.poll(cx)
    }
}

pin_project! {
    /// A request with one key.
    struct Single<S>
    where
        S: Service<Request>,
    {
        shared: Arc<Shared<S>>,
        request: Request,
        tries: Tries,
        #[pin]
        attempt: Attempt<S>,
        // A second attempt beside the first.
        hedge: Option<Pin<Box<Hedge<S>>>>,
    }
}

impl<S> Future for Single<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    type Output = Result<Response>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let mut this = self.project();
        let (shared, request) = (&*this.shared, &*this.request);
        loop {
            let error = match this.attempt.as_mut().poll(cx) {
                Poll::Ready(Ok(response)) => return Poll::Ready(Ok(response)),
                Poll::Ready(Err(error)) => error,
                Poll::Pending => {
                    let hedge = this.hedge.as_mut();
                    let ahead = hedge.map(|hedge| hedge.as_mut().poll(cx));
                    return match ahead {
                        Some(Poll::Ready(Some(response))) => Poll::Ready(Ok(response)),
                        Some(Poll::Ready(None)) => {
                            *this.hedge = None;
                            Poll::Pending
                        }
                        Some(Poll::Pending) | None => Poll::Pending,
                    };
                }
            };
            *this.hedge = None;
            let failed_at = this.attempt.node().clone();
            let deadline = request.deadline();
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Poll::Ready(Err(error.after_attempts(this.tries.sent)));
            }
            let Some(errand) = Errand::of(request) else {
                return Poll::Ready(Err(error));
            };
            let next = match shared.after(errand.operation, &failed_at, &error, this.tries) {
                After::GiveUp => None,
                After::Move { paid } => shared.next(errand, this.tries, paid, |node, origin| {
                    Attempt::new(node, shared.addressed(request, origin))
                }),
                after @ (After::Repeat(_) | After::Await) => {
                    let delay = match after {
                        After::Repeat(delay) => Some(delay),
                        _ => None,
                    };
                    let wait = match shared.wait(delay, &failed_at, deadline) {
                        Ok(wait) => wait,
                        Err(_) => return Poll::Ready(Err(error.after_attempts(this.tries.sent))),
                    };
                    let again = |node: &Node<S>, origin| {
                        Attempt::after(wait, node, shared.addressed(request, origin))
                    };
                    match shared.first(errand, again) {
                        Placed::At(attempt) => Some(attempt),
                        Placed::Settled(outcome) => {
                            let sent = this.tries.sent;
                            let outcome = outcome.map_err(|error| error.after_attempts(sent));
                            return Poll::Ready(outcome);
                        }
                    }
                }
            };
            match next {
                Some(next) => this.attempt.set(next),
                None => return Poll::Ready(Err(error.after_attempts(this.tries.sent))),
            }
        }
    }
}
