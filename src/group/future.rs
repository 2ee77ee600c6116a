//! The path of one request through a group.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep};
use tower::Service;

use super::Shared;
use crate::bulkhead::BulkheadFuture;
use crate::error::{BoxError, Error, ErrorKind, Result, Sent};
use crate::executor::timer;
use crate::kill_switch::Bypassed;
use crate::request::{Purpose, Request};
use crate::response::Response;

pin_project! {
    /// The future of one request to a [`Group`](super::Group).
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
    pub(super) enum State<S>
    where
        S: Service<Request>,
    {
        Called {
            #[pin]
            future: BulkheadFuture<S, Request>,
            shared: Arc<Shared>,
            // From the kill switch.
            spared: bool,
            invalid: Vec<(usize, Error)>,
        },
        // Not sent, but to be made known to whoever keeps the journals.
        Withheld { service: S, request: Option<Request>, answer: Option<Result<Response>> },
        Noting {
            #[pin]
            future: S::Future,
            answer: Option<Result<Response>>,
        },
        Settled { answer: Option<Result<Response>> },
    }
}

impl<S: Service<Request>> State<S> {
    pub(super) fn settled(answer: Result<Response>) -> Self {
        let answer = Some(answer);
        Self::Settled { answer }
    }

    /// Has a request, with the prefix before its key, noted and not sent.
    pub(super) fn note(service: S, request: Request, answer: Result<Response>) -> Self {
        Self::Withheld {
            service,
            request: Some(request.with_purpose(Purpose::Note)),
            answer: Some(answer),
        }
    }

    pub(super) fn bypassed(service: S, request: Request, bypassed: Bypassed) -> Self {
        let Bypassed { answer, noted } = bypassed;
        match noted {
            true => Self::note(service, request, answer),
            false => Self::settled(answer),
        }
    }
}

impl<S: Service<Request>> GroupFuture<S> {
    pub(super) fn new(state: State<S>, ends: Option<Instant>) -> Self {
        Self {
            state,
            ends,
            timer: None,
        }
    }
}

/// What has become of keys that could not take the prefix.
pub(super) fn put_back(answer: &mut Result<Response>, invalid: &mut Vec<(usize, Error)>) {
    if let Ok(Response::Values(outcomes)) = answer {
        // In ascending order, so each goes back to its own place.
        for (place, error) in invalid.drain(..) {
            outcomes.insert(place.min(outcomes.len()), Err(error));
        }
    }
}

fn settle(answer: &mut Option<Result<Response>>) -> Poll<Result<Response>> {
    match answer.take() {
        Some(answer) => Poll::Ready(answer),
        None => panic!("polled after completion"),
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
                mut future,
                shared,
                spared,
                invalid,
            } => {
                // The switch may have been thrown while the request waited.
                if !*spared
                    && shared.kill_switch.is_thrown()
                    && let Some((service, request)) = future.as_mut().withdraw()
                {
                    let mut bypassed = shared.bypass(&request);
                    put_back(&mut bypassed.answer, invalid);
                    let state = State::bypassed(service, request, bypassed);
                    this.state.set(state);
                    return self.poll(cx);
                }
                let Poll::Ready(mut outcome) = future.as_mut().poll(cx) else {
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
                    let sent = match future.has_called() {
                        true => Sent::Maybe,
                        false => Sent::No,
                    };
                    // Ends what is below at once, should it still run.
                    this.state.set(State::Settled { answer: None });
                    return Poll::Ready(Err(error.with_sent(sent)));
                };
                put_back(&mut outcome, invalid);
                Poll::Ready(outcome)
            }
            StateProjection::Withheld {
                service,
                request,
                answer,
            } => {
                if let Err(error) = ready!(service.poll_ready(cx)) {
                    // Lost: whoever reads it as it was must not have been told otherwise.
                    return Poll::Ready(Err(Error::from_boxed(error.into())));
                }
                if let Some(request) = request.take() {
                    let future = service.call(request);
                    let answer = answer.take();
                    this.state.set(State::Noting { future, answer });
                    return self.poll(cx);
                }
                settle(answer)
            }
            StateProjection::Noting { future, answer } => {
                match ready!(future.poll(cx)).map_err(|error| Error::from_boxed(error.into())) {
                    // A layer between did not let it pass.
                    Err(error) if error.kind() != ErrorKind::Disabled => Poll::Ready(Err(error)),
                    // What whoever keeps journals says at once: that it has taken note.
                    _ => settle(answer),
                }
            }
            StateProjection::Settled { answer } => settle(answer),
        }
    }
}

impl<S: Service<Request>> fmt::Debug for GroupFuture<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupFuture").finish_non_exhaustive()
    }
}
