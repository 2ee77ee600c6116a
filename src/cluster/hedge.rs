//! Hedged gets: a second attempt beside a first one that takes unusually long, over another
//! connection of the same node. No other node has the value.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep};
use tower::Service;

use super::Shared;
use crate::error::BoxError;
use crate::executor::after;
use crate::node::{Node, NodeFuture};
use crate::request::{Operation, Purpose, Request};
use crate::response::Response;
use crate::telemetry::Event;

/// tokio's timers are no finer.
const LEAST_WAIT: Duration = Duration::from_millis(1);

pin_project! {
    /// Waits until the first attempt takes longer than 95 % of them do, and then makes another if
    /// the budget pays for it. Its output is an answer, or that there will be none from here.
    pub(super) struct Hedge<S>
    where
        S: Service<Request>,
    {
        shared: Arc<Shared<S>>,
        node: Node<S>,
        request: Request,
        #[pin]
        wait: Sleep,
        #[pin]
        attempt: Option<NodeFuture<S>>,
    }
}

impl<S: Service<Request> + Clone> Hedge<S> {
    /// `None` if there is nothing to be gained. Only where gets are hedged.
    pub(super) fn new(
        shared: &Arc<Shared<S>>,
        node: &Node<S>,
        request: &Request,
    ) -> Option<Pin<Box<Self>>> {
        let reads = matches!(
            request.operation(),
            Operation::Get { .. } | Operation::Lookup { lease: None, .. }
        );
        if !reads || node.shared().connections() < 2 {
            return None;
        }
        let wait = node.shared().p95()?.max(LEAST_WAIT);
        let wait = shared.spawner.sleep_until(after(Instant::now(), wait));
        let mut request = request.clone().with_purpose(Purpose::Hedge);
        // It will be later then.
        request.forget_time();
        Some(Box::pin(Self {
            shared: shared.clone(),
            node: node.clone(),
            request,
            wait: wait.ok()?,
            attempt: None,
        }))
    }
}

impl<S> Future for Hedge<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    type Output = Option<Response>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Response>> {
        let mut this = self.project();
        if this.attempt.is_none() {
            ready!(this.wait.poll(cx));
            let node = this.node.shared();
            if !this.shared.pay(node) {
                return Poll::Ready(None);
            }
            node.count(Event::Hedge);
            let attempt = NodeFuture::new(this.node.clone(), this.request.clone());
            this.attempt.set(Some(attempt));
        }
        match this.attempt.as_pin_mut() {
            Some(attempt) => attempt.poll(cx).map(Result::ok),
            None => Poll::Ready(None),
        }
    }
}
