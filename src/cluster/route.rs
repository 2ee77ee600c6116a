//! The path of one request through the cluster.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::sync::futures::OwnedNotified;
use tokio::time::{Instant, Sleep};
use tower::Service;

use super::hedge::Hedge;
use super::many::{Every, Many};
use super::place::{Errand, Placed, no_nodes};
use super::{After, Pool, Shared, Tries};
use crate::error::{BoxError, Error, ErrorKind, Result};
use crate::executor::after;
use crate::node::{Node, NodeFuture, Shared as NodeShared};
use crate::request::{Origin, Request};
use crate::response::Response;
use crate::shutdown::shut_down;

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
            return Self::settled(Err(unroutable()));
        };
        let (node, origin) = match shared.first(errand, at) {
            Placed::At(place) => place,
            Placed::Settled(outcome) => return Self::settled(outcome),
        };
        let (mut hedge, mut trouble) = (None, None);
        let request = match origin {
            Origin::Home => {
                if shared.hedges.load(Ordering::Relaxed) {
                    hedge = Hedge::new(shared, &node, &request);
                }
                request.with_origin(origin)
            }
            Origin::Moved => {
                let moved = shared.moved_away(&request);
                trouble = Some(Box::new(Trouble::of_moved(request)));
                moved
            }
        };
        Self {
            path: Path::Single {
                single: Single {
                    shared: shared.clone(),
                    attempt: NodeFuture::new(node, request),
                    trouble,
                    hedge,
                },
            },
        }
    }

    pub(super) fn many(shared: &Arc<Shared<S>>, request: Request) -> Self {
        let many = Box::new(Many::new(shared, request));
        Self {
            path: Path::Many { many },
        }
    }

    pub(super) fn every<'a>(pools: impl Iterator<Item = &'a Arc<Pool<S>>>, request: Request) -> Self
    where
        S: 'a,
    {
        let every = Box::new(Every::new(pools, &request));
        if every.asks_nobody() {
            return Self::settled(Err(no_nodes()));
        }
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

/// Where a request is placed.
fn at<S: Clone>(node: &Node<S>, origin: Origin) -> (Node<S>, Origin) {
    (node.clone(), origin)
}

impl<S> Shared<S> {
    /// The request as a node gets it that is not its key's home: what it writes lives only so long there.
    fn moved_away(&self, request: &Request) -> Request {
        let mut request = request.clone().with_origin(Origin::Moved);
        let lifetime = self.settings.load().failover_ttl;
        request.operation_mut().cap_ttl(lifetime);
        request
    }

    /// The wait before a request is placed again that failed at `node`: for `delay`, or else until
    /// that is back; not past the deadline.
    ///
    /// # Errors
    /// [`ErrorKind::Overloaded`] if as many wait for it as may.
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
            until_back: delay.is_none(),
            called: node.back(),
            place: Waiting::new(node)?,
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
        until_back: bool,
        // The node is back, has been removed, or is closed.
        #[pin]
        called: OwnedNotified,
        place: Waiting,
    }
}

/// A place among those who wait for a node.
struct Waiting(Arc<NodeShared>);

impl Waiting {
    fn new(node: &Arc<NodeShared>) -> Result<Self> {
        node.wait()?;
        Ok(Self(node.clone()))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.wait_ends();
    }
}

impl Future for Wait {
    /// Whether there is nothing to wait for any more: the client is shut down.
    type Output = bool;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<bool> {
        let mut this = self.project();
        let node = &this.place.0;
        let mut called = false;
        while this.called.as_mut().poll(cx).is_ready() {
            called = true;
            this.called.set(node.back());
        }
        if node.is_closed() {
            return Poll::Ready(true);
        }
        if *this.until_back && (called || !node.is_open() || node.is_retired()) {
            *this.until_back = false;
            let now = Instant::now();
            let left = this.timer.deadline().saturating_duration_since(now);
            let over = RETURN_OVER.min(left / 2);
            this.timer
                .as_mut()
                .reset(now + over.mul_f64(fastrand::f64()));
        }
        this.timer.poll(cx).map(|()| false)
    }
}

pin_project! {
    /// A request with one key.
    #[project = SingleParts]
    struct Single<S>
    where
        S: Service<Request>,
    {
        shared: Arc<Shared<S>>,
        #[pin]
        attempt: NodeFuture<S>,
        // What few requests have, so that all others are small.
        trouble: Option<Box<Trouble>>,
        // A second attempt beside the first.
        hedge: Option<Pin<Box<Hedge<S>>>>,
    }
}

/// Of a request that has been moved, or has failed somewhere.
#[derive(Default)]
struct Trouble {
    tries: Tries,
    /// What was asked, while there is no attempt that asks just that: it is away from home, or has yet
    /// to be made again.
    asked: Option<Request>,
    /// Before the next attempt, which goes where the key belongs then.
    wait: Option<Pin<Box<Wait>>>,
}

impl Trouble {
    fn of_moved(asked: Request) -> Self {
        Self {
            asked: Some(asked),
            ..Self::default()
        }
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
        loop {
            if let Some(trouble) = this.trouble
                && let Some(wait) = &mut trouble.wait
            {
                let closed = ready!(wait.as_mut().poll(cx));
                if let Some(outcome) = this.wait_ends(closed) {
                    return Poll::Ready(outcome);
                }
            }
            match this.attempt.as_mut().poll(cx) {
                Poll::Ready(Ok(response)) => {
                    return Poll::Ready(Ok(match this.trouble {
                        None => response,
                        Some(_) => this.answered(response),
                    }));
                }
                Poll::Ready(Err(error)) => {
                    if let Some(error) = this.failed(error) {
                        return Poll::Ready(Err(error));
                    }
                }
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
            }
        }
    }
}

impl<S> SingleParts<'_, S>
where
    S: Service<Request> + Clone,
{
    /// Sends it where its key belongs now, unless that settles it.
    #[cold]
    fn wait_ends(&mut self, closed: bool) -> Option<Result<Response>> {
        let trouble = self.trouble.get_or_insert_default();
        trouble.wait = None;
        let sent = trouble.tries.sent;
        if closed {
            return Some(Err(shut_down().after_attempts(sent)));
        }
        let asked = self.take_asked();
        let Some(errand) = Errand::of(&asked) else {
            return Some(Err(unroutable()));
        };
        match self.shared.first(errand, at) {
            Placed::At((node, origin)) => {
                self.send(asked, node, origin);
                None
            }
            Placed::Settled(outcome) => Some(outcome.map_err(|error| error.after_attempts(sent))),
        }
    }

    /// Decides what becomes of it now; its error, if it ends with that.
    #[cold]
    fn failed(&mut self, error: Error) -> Option<Error> {
        *self.hedge = None;
        let failed_at = self.attempt.node().clone();
        let asked = self.take_asked();
        let tries = &mut self.trouble.get_or_insert_default().tries;
        let deadline = asked.deadline();
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Some(error.after_attempts(tries.sent));
        }
        let Some(errand) = Errand::of(&asked) else {
            return Some(unroutable());
        };
        let next = match self
            .shared
            .after(errand.operation, &failed_at, &error, tries)
        {
            After::GiveUp => None,
            After::Move { paid } => self.shared.next(errand, tries, paid, at),
            After::Wait(delay) => match self.shared.wait(delay, &failed_at, deadline) {
                Ok(wait) => {
                    let trouble = self.trouble.get_or_insert_default();
                    trouble.wait = Some(Box::pin(wait));
                    trouble.asked = Some(asked);
                    return None;
                }
                Err(error) => return Some(error.after_attempts(tries.sent)),
            },
        };
        match next {
            Some((node, origin)) => {
                self.send(asked, node, origin);
                None
            }
            None => Some(error.after_attempts(tries.sent)),
        }
    }

    fn send(&mut self, asked: Request, node: Node<S>, origin: Origin) {
        let trouble = self.trouble.get_or_insert_default();
        let request = match origin {
            Origin::Home => asked.with_origin(origin),
            Origin::Moved => {
                let moved = self.shared.moved_away(&asked);
                trouble.asked = Some(asked);
                moved
            }
        };
        self.attempt.set(NodeFuture::new(node, request));
    }

    /// What it was asked first, for another attempt.
    fn take_asked(&mut self) -> Request {
        let asked = self
            .trouble
            .as_mut()
            .and_then(|trouble| trouble.asked.take());
        let mut asked = asked.unwrap_or_else(|| self.attempt.request().clone());
        // It is later now.
        asked.forget_time();
        asked
    }

    #[cold]
    fn answered(&self, response: Response) -> Response {
        let asked = self
            .trouble
            .as_ref()
            .and_then(|trouble| trouble.asked.as_ref());
        let Some(asked) = asked else {
            return response;
        };
        if let Some(errand) = Errand::of(asked) {
            self.shared.moved(errand, self.attempt.node());
        }
        response.answered_away()
    }
}

fn unroutable() -> Error {
    Error::new(ErrorKind::Layer, "an operation without a key to route by")
}
