//! One operation of a client, from its first poll to its end.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::future::BoxFuture;
use pin_project_lite::pin_project;
use tokio::time::Instant;
use tower::Service;

use super::Shared;
use crate::call::Call;
use crate::error::{BoxError, Result};
use crate::executor::after;
use crate::request::Request;
use crate::response::Response;
use crate::shutdown::Operating;

pin_project! {
    /// Sends a request through the client's service. A named future rather than nested async functions,
    /// each of which would move, and make room for, all that is below it.
    #[must_use = "futures do nothing unless polled"]
    pub(super) struct Operate<'a, S>
    where
        S: Service<Request>,
    {
        shared: &'a Shared,
        #[pin]
        call: Call<'a, S>,
        // Behind the call, for they are dropped in this order: an operation is under way until all that
        // is below it is gone, and has noted what it leaves in doubt.
        operating: Option<Operating<'a>>,
        step: Step<'a>,
    }
}

enum Step<'a> {
    /// Not polled yet. Whether it is to be counted: a part of an operation is not.
    New {
        counts: bool,
    },
    /// What is being loaded for the key is old now. That, too, has to be done by the deadline.
    Outdating(BoxFuture<'a, ()>),
    Called,
    Done,
}

impl<'a, S: Service<Request>> Operate<'a, S> {
    #[inline]
    pub(super) fn new(shared: &'a Shared, service: S, request: Request, counts: bool) -> Self {
        Self {
            shared,
            operating: None,
            step: Step::New { counts },
            call: Call::new(
                service,
                request.with_alarm(shared.is_bare),
                shared.timeout.get(),
                shared.spawner.as_ref(),
            ),
        }
    }
}

impl<S> Future for Operate<'_, S>
where
    S: Service<Request, Response = Response>,
    S::Error: Into<BoxError>,
{
    type Output = Result<Response>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let mut this = self.project();
        let shared = *this.shared;
        let prepared = match &mut *this.step {
            Step::Called => Ok(()),
            Step::Done => panic!("polled after completion"),
            step => ready!(prepare(
                shared,
                step,
                this.operating,
                this.call.as_mut(),
                cx
            )),
        };
        let outcome = match prepared {
            Ok(()) => ready!(this.call.poll(cx)),
            Err(error) => Err(error),
        };
        *this.step = Step::Done;
        *this.operating = None;
        let response = outcome?;
        // As it is now: what others have written meanwhile may be compressed in another way than before.
        Poll::Ready(match shared.reads.compression().get() {
            Some(compression) => compression.read(response),
            None => Ok(response),
        })
    }
}

/// Everything that comes before the request may be sent.
fn prepare<'a, S>(
    shared: &'a Shared,
    step: &mut Step<'a>,
    operating: &mut Option<Operating<'a>>,
    call: Pin<&mut Call<'a, S>>,
    cx: &mut Context<'_>,
) -> Poll<Result<()>>
where
    S: Service<Request>,
{
    let request = call.request_mut();
    if let Step::New { counts } = *step {
        if counts {
            *operating = Some(shared.reads.tracker().operate()?);
        }
        if request.operation().changes()
            && let Some(outdating) = outdate(shared, request)
        {
            *step = Step::Outdating(outdating);
        }
    }
    if let Step::Outdating(outdating) = step {
        ready!(outdating.as_mut().poll(cx));
    }
    *step = Step::Called;
    Poll::Ready(match shared.reads.compression().get() {
        Some(compression) => compression.write(request),
        None => Ok(()),
    })
}

/// Nobody gets what is being loaded for the request's key any more. What there is to wait for then has
/// half of the request's time.
fn outdate<'a>(shared: &'a Shared, request: &mut Request) -> Option<BoxFuture<'a, ()>> {
    let (now, timeout) = (Instant::now(), shared.timeout.get());
    request.limit(after(now, timeout));
    let half = after(now, timeout / 2);
    let by = request.deadline().map_or(half, |ends| ends.min(half));
    shared.reads.forget(request.operation().key()?, by)
}
