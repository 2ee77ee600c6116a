//! What an outcome says about the node: the one place that decides it.

use crate::error::{Charge, Error, Result, Sent};
use crate::response::Response;

/// What came of a request, as far as the node is concerned.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verdict<'a> {
    /// It answered. Also with an error: out of memory, a value too large for it, a request it
    /// refuses; a server that says so is there.
    Answered,
    /// It did not do what it should: no answer in its time, a connection refused or lost, bytes
    /// that are not the protocol.
    Fault(&'a Error),
    /// It was not asked, or what failed is not its doing: our own queue or limit was full, the
    /// deadline had passed before it was sent, a layer of the user's failed, no file descriptors.
    NotTheNodes,
    /// The caller dropped the request.
    CallerLeft,
    /// The time-out was found late, because we were: whether an answer was in time is unknown.
    OurLateness,
}

impl<'a> Verdict<'a> {
    /// `None` is a request whose future was dropped.
    pub(super) fn of(outcome: Option<&'a Result<Response>>) -> Self {
        let error = match outcome {
            None => return Self::CallerLeft,
            Some(Err(error)) => error,
            // Of a multi-key read some keys may have come before it failed.
            Some(Ok(response)) => match response.partial_failure() {
                Some(error) => error,
                None => return Self::Answered,
            },
        };
        match error.charge() {
            Charge::Node => Self::Fault(error),
            Charge::OurLateness => Self::OurLateness,
            Charge::Nobody if error.sent() == Sent::Yes => Self::Answered,
            Charge::Nobody => Self::NotTheNodes,
        }
    }

    /// A label for metrics.
    pub(super) fn outcome(self) -> usize {
        match self {
            Self::Answered => 0,
            Self::Fault(error) if error.is_timeout() => 1,
            Self::Fault(_) => 2,
            Self::NotTheNodes => 3,
            Self::CallerLeft => 4,
            Self::OurLateness => 5,
        }
    }

    /// The [`outcome`](Self::outcome) of time-outs.
    pub(super) const TIMEOUT: usize = 1;

    /// The names of [`outcome`](Self::outcome)'s labels.
    pub(super) const OUTCOMES: [&'static str; 6] = [
        "answered", "timeout", "failed", "refused", "dropped", "late",
    ];
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn each_outcome_has_its_verdict() {
        let error =
            |kind, sent, charge| Err(Error::new(kind, "").with_sent(sent).charged_to(charge));
        let nodes = |kind, sent| error(kind, sent, Charge::Node);
        let nobodys = |kind, sent| error(kind, sent, Charge::Nobody);
        let partly = |failure: Result<Response>| {
            let outcomes = vec![Ok(None), failure.map(|_| None)];
            Ok(Response::Values(outcomes))
        };
        let cases = [
            // A miss, and a condition that did not hold, are answers.
            (Ok(Response::Value(None)), "answered"),
            (Ok(Response::Stored(false)), "answered"),
            (partly(Ok(Response::Value(None))), "answered"),
            // So is a refusal: a server that says so is there.
            (nobodys(ErrorKind::Server, Sent::Yes), "answered"),
            (nobodys(ErrorKind::Rejected, Sent::Yes), "answered"),
            (nobodys(ErrorKind::ValueTooLarge, Sent::Yes), "answered"),
            (nobodys(ErrorKind::NotANumber, Sent::Yes), "answered"),
            (nodes(ErrorKind::Timeout, Sent::Maybe), "timeout"),
            (partly(nodes(ErrorKind::Timeout, Sent::Maybe)), "timeout"),
            (nodes(ErrorKind::ConnectionFailed, Sent::No), "failed"),
            (nodes(ErrorKind::ConnectionLost, Sent::Maybe), "failed"),
            (nodes(ErrorKind::Unresponsive, Sent::Maybe), "failed"),
            (nodes(ErrorKind::Protocol, Sent::Maybe), "failed"),
            // Our own bounds, deadlines and layers.
            (nobodys(ErrorKind::Overloaded, Sent::No), "refused"),
            (nobodys(ErrorKind::NodeUnavailable, Sent::No), "refused"),
            (nobodys(ErrorKind::ConnectionFailed, Sent::No), "refused"),
            (nobodys(ErrorKind::Timeout, Sent::No), "refused"),
            (nobodys(ErrorKind::Timeout, Sent::Maybe), "refused"),
            (nobodys(ErrorKind::Layer, Sent::Maybe), "refused"),
            (nobodys(ErrorKind::Shutdown, Sent::Maybe), "refused"),
            (
                error(ErrorKind::Timeout, Sent::Maybe, Charge::OurLateness),
                "late",
            ),
        ];
        for (outcome, expected) in &cases {
            let verdict = Verdict::of(Some(outcome));
            assert_eq!(
                Verdict::OUTCOMES[verdict.outcome()],
                *expected,
                "{outcome:?}"
            );
        }
        let dropped = Verdict::of(None);
        assert_eq!(Verdict::OUTCOMES[dropped.outcome()], "dropped");
    }
}
