//! One operation, from its deadline's stamp to its end.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::task::coop::poll_proceed;
use tokio::time::{Instant, Sleep};
use tower::Service;

use crate::error::{BoxError, Error, ErrorKind, Result, Sent};
use crate::executor::{Spawner, after, timer};
use crate::request::Request;
use crate::response::Response;

thread_local! {
    /// When whatever is being polled on this thread will be woken at the latest.
    static WOKEN_BY: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// For a future that is about to say that it is pending: it has seen to it that the waker that it was
/// polled with is woken by then, in the caller's runtime.
#[inline]
pub(crate) fn promise_wake(by: Instant) {
    let before = WOKEN_BY.get();
    WOKEN_BY.set(Some(before.map_or(by, |before| before.min(by))));
}

/// What was promised does not hold any more, for whoever did is not polled again.
#[inline]
pub(crate) fn forget_wake() {
    WOKEN_BY.set(None);
}

pin_project! {
    /// Drives a service under a deadline that covers waiting for its readiness too.
    ///
    /// The timer is the caller's own, in the caller's runtime, so that no layer and no blocked I/O
    /// thread can hold the caller past its deadline. It is made only when a poll has to wait, and
    /// not even then if no layer of the user's is below and the transport has
    /// [promised](promise_wake) to wake the caller in time.
    #[must_use = "futures do nothing unless polled"]
    pub(crate) struct Call<'a, S>
    where
        S: Service<Request>,
    {
        #[pin]
        step: Step<S>,
        // From the first poll on.
        deadline: Option<Instant>,
        // Whether a promise of what is below can be trusted.
        alarmed: bool,
        spawner: Option<&'a Spawner>,
        // Boxed, for few need one.
        timer: Option<Pin<Box<Sleep>>>,
    }
}

pin_project! {
    #[project = StepProjection]
    enum Step<S>
    where
        S: Service<Request>,
    {
        // The request is gone once it has been asked.
        Waiting { service: S, request: Option<Request>, timeout: Duration },
        Called { #[pin] future: S::Future },
        Done,
    }
}

impl<'a, S: Service<Request>> Call<'a, S> {
    #[inline]
    pub(crate) fn new(
        service: S,
        request: Request,
        timeout: Duration,
        spawner: Option<&'a Spawner>,
    ) -> Self {
        Self {
            deadline: None,
            alarmed: request.is_alarmed(),
            step: Step::Waiting {
                service,
                request: Some(request),
                timeout,
            },
            spawner,
            timer: None,
        }
    }

    /// What it is about to ask.
    ///
    /// # Panics
    /// Once it has been asked.
    pub(crate) fn request_mut(self: Pin<&mut Self>) -> &mut Request {
        match self.project().step.project() {
            StepProjection::Waiting {
                request: Some(request),
                ..
            } => request,
            _ => panic!("asked already"),
        }
    }
}

impl<S> Future for Call<'_, S>
where
    S: Service<Request, Response = Response>,
    S::Error: Into<BoxError>,
{
    type Output = Result<Response>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        // Whoever never has to wait, for a switch is thrown or a node is out, has to let others go on.
        let coop = ready!(poll_proceed(cx));
        let mut this = self.project();
        let deadline = match (*this.deadline, this.step.as_mut().project()) {
            (Some(deadline), _) => deadline,
            (
                None,
                StepProjection::Waiting {
                    request: Some(request),
                    timeout,
                    ..
                },
            ) => {
                let now = Instant::now();
                let latest = after(now, *timeout);
                request.limit(latest);
                if *this.alarmed {
                    request.tell_time(now);
                }
                *this.deadline.insert(request.deadline().unwrap_or(latest))
            }
            (None, _) => panic!("polled after completion"),
        };
        // The service before the timer: at the deadline it may know more than that it has passed
        // (the node, whether it was sent, half of a multi-key read).
        let mut sent = Sent::Maybe;
        // Only what is promised in this very poll counts.
        forget_wake();
        let polled = loop {
            match this.step.as_mut().project() {
                StepProjection::Waiting {
                    service, request, ..
                } => {
                    match service.poll_ready(cx) {
                        Poll::Ready(Ok(())) => {}
                        Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                        Poll::Pending => {
                            sent = Sent::No;
                            break Poll::Pending;
                        }
                    }
                    let Some(request) = request.take() else {
                        panic!("polled after a panic");
                    };
                    let future = service.call(request);
                    this.step.set(Step::Called { future });
                }
                StepProjection::Called { future } => break future.poll(cx),
                StepProjection::Done => panic!("polled after completion"),
            }
        };
        let outcome = match polled {
            Poll::Ready(outcome) => outcome.map_err(|error| Error::from_boxed(error.into())),
            Poll::Pending => {
                let woken_by = WOKEN_BY.get().filter(|_| *this.alarmed);
                if this.timer.is_none() && woken_by.is_some_and(|by| by <= deadline) {
                    return Poll::Pending;
                }
                if this.timer.is_none() {
                    let timer = timer(*this.spawner, deadline)?;
                    *this.timer = Some(Box::pin(timer));
                }
                if let Some(timer) = this.timer {
                    ready!(timer.as_mut().poll(cx));
                }
                let message = "the operation's deadline has passed";
                Err(Error::new(ErrorKind::Timeout, message).with_sent(sent))
            }
        };
        this.step.set(Step::Done);
        coop.made_progress();
        Poll::Ready(outcome)
    }
}
