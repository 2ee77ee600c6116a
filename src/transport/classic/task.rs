//! One request, from the wait for a connection to its answer.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::oneshot::Sender;
use tokio::sync::{oneshot, watch};
use tokio::task::coop::unconstrained;
use tokio::time::{Instant, sleep_until};

use super::Place;
use super::lease::{Company, Looking, Next};
use super::pool::{Lent, Shared};
use super::wire::{self, Wire};
use crate::error::{Charge, Error, ErrorKind, Result, Sent};
use crate::executor::{LATE, after};
use crate::key::Key;
use crate::request::Operation;
use crate::response::{CasOutcome, Response};
use crate::transport::BoxStream;

/// How far a request has come, for whoever waits for it.
#[derive(Debug, Default)]
pub(super) struct Progress(AtomicU8);

impl Progress {
    const QUEUED: u8 = 0;
    const SENT: u8 = 1;
    const DONE: u8 = 2;

    /// Whether it may have left this process.
    pub(super) fn sent(&self) -> Sent {
        match self.0.load(Ordering::Acquire) {
            Self::QUEUED => Sent::No,
            _ => Sent::Maybe,
        }
    }

    /// Whether it is being executed, as far as is known.
    pub(super) fn is_under_way(&self) -> bool {
        self.0.load(Ordering::Acquire) == Self::SENT
    }

    fn set(&self, progress: u8) {
        self.0.store(progress, Ordering::Release);
    }
}

pub(super) fn timeout(sent: Sent) -> Error {
    let message = match sent {
        Sent::No => "it waited for a connection for all of its time",
        Sent::Maybe | Sent::Yes => "no answer in time",
    };
    Error::new(ErrorKind::Timeout, message).with_sent(sent)
}

/// What is to be done for one request.
pub(super) struct Job {
    pub(super) shared: Arc<Shared>,
    pub(super) operation: Operation,
    pub(super) queued_at: Instant,
    /// When its caller wants to be released, whatever the node may have.
    pub(super) own_ends: Option<Instant>,
    pub(super) attempt_ends: Instant,
    /// Gone once its caller has been told.
    pub(super) answer: Option<oneshot::Sender<Result<Response>>>,
    pub(super) progress: Arc<Progress>,
    /// Changes when what is in flight has to end.
    pub(super) drained: watch::Receiver<Option<Error>>,
    #[expect(dead_code, reason = "its drop gives the place back")]
    pub(super) place: Place,
}

/// How an exchange ended.
enum End {
    Answered(Result<Response>),
    /// The node is out, or the client shut down.
    Drained(Error),
    /// No answer for as long as a connection may be silent.
    Silent,
}

impl Job {
    pub(super) async fn run(mut self) {
        // Connections that the token does not fit.
        let mut unfit = 0;
        // A connection of the pool may turn out to have ended meanwhile; nothing was sent then.
        loop {
            let lent = match self.borrow().await {
                Some(Ok(lent)) => lent,
                Some(Err(error)) if unfit > 0 && error.kind() == ErrorKind::Timeout => {
                    return self.tell(Ok(Response::Swapped(CasOutcome::Exists)));
                }
                Some(Err(error)) => return self.tell(Err(error)),
                // Its caller has left.
                None => return,
            };
            if let Some(error) = self.has_been_drained() {
                drop(lent);
                return self.tell(Err(error));
            }
            match self.fits(&lent) {
                Fits::Yes => {}
                Fits::Never(outcome) => {
                    drop(lent);
                    return self.tell(outcome);
                }
                Fits::Another => {
                    drop(lent);
                    unfit += 1;
                    // The pool gives the one that has waited longest. Once all that waited were looked
                    // at, the right one is in use.
                    if unfit % self.shared.size == 0 {
                        let (now, released_at) = (Instant::now(), self.released_at());
                        // While others are idle, the wait for a connection has no end of its own.
                        if released_at <= now {
                            return self.tell(Ok(Response::Swapped(CasOutcome::Exists)));
                        }
                        sleep_until(after(now, PAUSE).min(released_at)).await;
                    }
                    continue;
                }
            }
            match self.exchange(lent).await {
                Exchanged::Nothing => return,
                Exchanged::Again => {}
                Exchanged::Redial => return self.redial().await,
            }
        }
    }

    /// Whether the node can be reached at all is to be known soon, whoever asks it next.
    async fn redial(mut self) {
        let within = self.shared.site.settings.load().connect_within();
        (self.own_ends, self.attempt_ends) = (None, after(Instant::now(), within));
        drop(self.wait_for_connection().await);
    }

    fn tell(&mut self, outcome: Result<Response>) {
        if let Some(answer) = self.answer.take() {
            let _left = answer.send(outcome);
        }
    }

    /// When its caller is released at the latest while it has not been sent.
    fn released_at(&self) -> Instant {
        let own = self.own_ends.unwrap_or(self.attempt_ends);
        own.min(self.attempt_ends)
    }

    /// Takes a connection; `None` if its caller leaves meanwhile.
    async fn borrow(&mut self) -> Option<Result<Lent>> {
        let mut answer = self.answer.take()?;
        let borrowed = {
            let mut waiting = pin!(self.wait_for_connection());
            poll_fn(|cx| {
                if answer.poll_closed(cx).is_ready() {
                    return Poll::Ready(None);
                }
                waiting.as_mut().poll(cx).map(Some)
            })
            .await
        };
        self.answer = Some(answer);
        borrowed
    }

    /// Why it is not to be sent any more.
    fn has_been_drained(&self) -> Option<Error> {
        let drained = self.drained.has_changed().unwrap_or(true);
        let error = drained.then(|| self.drained.borrow().clone())?;
        let error = error.unwrap_or_else(|| self.shared.site.shut_down());
        Some(error.with_sent(Sent::No))
    }

    async fn wait_for_connection(&self) -> Result<Lent> {
        let mut released = pin!(sleep_until(self.released_at()));
        let mut turn = None;
        let mut its_turn = pin!(self.shared.turns.clone().acquire_owned());
        loop {
            let refused = self.has_been_drained();
            if let Some(error) = refused.or_else(|| self.shared.refuses()) {
                return Err(error);
            }
            let generation = self.shared.generation()?;
            let mut ended = generation.ended.subscribe();
            let mut has_ended = pin!(ended.wait_for(Option::is_some));
            let mut getting = pin!(generation.pool.get_owned());
            let got = poll_fn(|cx| {
                if let Poll::Ready(ended) = has_ended.as_mut().poll(cx) {
                    let error = ended.ok().and_then(|ended| ended.clone()).flatten();
                    return Poll::Ready(error.map_or(Ok(None), Err));
                }
                if turn.is_none()
                    && let Poll::Ready(acquired) = its_turn.as_mut().poll(cx)
                {
                    turn = acquired.ok();
                }
                if turn.is_some()
                    && let Poll::Ready(got) = getting.as_mut().poll(cx)
                {
                    // Nothing only after the longest time that one may wait.
                    return Poll::Ready(got.map(Some).map_err(|_| timeout(Sent::No)));
                }
                released.as_mut().poll(cx).map(|()| Err(timeout(Sent::No)))
            })
            .await;
            let got = got.map_err(|error| error.with_sent(Sent::No))?;
            if let Some(connection) = got
                && let Some(turn) = turn.take()
            {
                return Ok(Lent {
                    connection,
                    turn,
                    generation: generation.clone(),
                });
            }
        }
    }

    /// Whether it is for this connection to be asked.
    fn fits(&self, lent: &Lent) -> Fits {
        match &self.operation {
            _ if lent.connection.company == Company::Proxied => {
                let error = wire::unsupported_by_proxies(&self.operation);
                error.map_or(Fits::Yes, |error| Fits::Never(Err(error)))
            }
            // A newer one may lead to another process than the one that the token is from.
            Operation::CompareAndSwap { token, .. }
                if lent.connection.up.number > token.connection =>
            {
                match lent.generation.first.load(Ordering::Acquire) <= token.connection {
                    true => Fits::Another,
                    false => Fits::Never(Ok(Response::Swapped(CasOutcome::Exists))),
                }
            }
            _ => Fits::Yes,
        }
    }
}

/// Whether a connection may be asked.
enum Fits {
    Yes,
    /// Another of the pool may.
    Another,
    /// None may; this is the outcome.
    Never(Result<Response>),
}

/// Between two looks at all connections that wait for one that a token fits.
const PAUSE: Duration = Duration::from_millis(1);

/// What is left to do after an exchange.
enum Exchanged {
    Nothing,
    /// Nothing was sent: the connection had ended in the pool.
    Again,
    /// The connection did not answer.
    Redial,
}

/// A write under way; should its task be dropped with its runtime, it stays in doubt.
struct Doubt<'a> {
    shared: &'a Arc<Shared>,
    key: Option<Key>,
}

impl Doubt<'_> {
    /// It was answered, or never sent.
    fn settle(&mut self) {
        self.key = None;
    }

    fn stays(&mut self, given_up: Option<BoxStream>) {
        let key = self.key.take();
        self.shared.site.left_in_doubt(key.as_slice(), given_up);
    }
}

impl Drop for Doubt<'_> {
    fn drop(&mut self) {
        self.stays(None);
    }
}

/// Whether it was not sent for what it is, and not for what the connection is.
fn is_refused_here(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ValueTooLarge | ErrorKind::Unsupported
    )
}

/// When what is due of an exchange that is not answered.
struct Times {
    /// Its caller is told.
    release_at: Instant,
    /// The server has had an attempt's time.
    judge_at: Instant,
    judged: bool,
    /// The connection is given up.
    ends_at: Instant,
    /// It has been given more time once, because we were late.
    extended: bool,
}

impl Job {
    async fn exchange(&mut self, mut lent: Lent) -> Exchanged {
        let Some(mut wire) = lent.connection.wire.take() else {
            return Exchanged::Again;
        };
        let shared = self.shared.clone();
        let mut doubt = Doubt {
            shared: &shared,
            key: self.operation.written().cloned(),
        };
        self.progress.set(Progress::SENT);
        let max_value = shared.site.settings.load().limits.value;
        let mut looking = Looking::new(&self.operation, lent.connection.company, max_value);
        let (end, sent_at, times) = loop {
            // The server has its time for each question, and the caller for all of them.
            let sent_at = Instant::now();
            let mut times = self.times(sent_at);
            let question = looking.as_ref().map(Looking::question);
            let mut end = self
                .converse(&mut wire, question, &mut times, sent_at)
                .await;
            if let (Some(looking), End::Answered(Ok(answer))) = (&mut looking, &mut end) {
                match looking.answered(answer) {
                    Next::Answer(found) => *answer = found,
                    // Nobody would use the lease.
                    Next::Question if self.answer.as_ref().is_none_or(Sender::is_closed) => {}
                    Next::Question => {
                        lent.connection.answered = true;
                        if !times.judged {
                            shared.answered(sent_at);
                        }
                        continue;
                    }
                }
            }
            break (end, sent_at, times);
        };
        let sent = match wire.has_sent() {
            true => Sent::Maybe,
            false => Sent::No,
        };
        if sent == Sent::No {
            doubt.settle();
        }
        let (outcome, left) = match end {
            End::Answered(outcome) => {
                match outcome.as_ref().map_or_else(Error::sent, |_| Sent::Yes) {
                    Sent::Yes => {
                        doubt.settle();
                        lent.connection.answered = true;
                        if !times.judged {
                            shared.answered(sent_at);
                        }
                        if !wire.is_dirty() {
                            lent.connection.wire = Some(wire);
                            lent.connection.used_at = Instant::now();
                        }
                    }
                    Sent::No if outcome.as_ref().is_err_and(is_refused_here) => {
                        lent.connection.wire = Some(wire);
                    }
                    sent => {
                        if let Err(error) = &outcome {
                            shared.lost(&lent, error);
                        }
                        // It had ended while it waited in the pool.
                        if sent == Sent::No && lent.connection.answered {
                            self.progress.set(Progress::QUEUED);
                            return Exchanged::Again;
                        }
                        doubt.stays(Some(wire.into_stream()));
                    }
                }
                (outcome, Exchanged::Nothing)
            }
            End::Drained(error) => {
                doubt.stays(Some(wire.into_stream()));
                (Err(error.with_sent(sent)), Exchanged::Nothing)
            }
            End::Silent => {
                let stall = shared.site.settings.load().stall_after();
                let message = format!("no answer for {stall:?}");
                let error = Error::new(ErrorKind::Unresponsive, message)
                    .charged_to(Charge::Node)
                    .at_node(&shared.site.name);
                shared.unresponsive(&lent, &error);
                doubt.stays(Some(wire.into_stream()));
                (Err(error.with_sent(sent)), Exchanged::Redial)
            }
        };
        // Whoever is told finds the connection in the pool again, and the doubt noted.
        self.progress.set(Progress::DONE);
        drop(lent);
        self.tell(outcome);
        left
    }

    fn times(&self, sent_at: Instant) -> Times {
        let settings = self.shared.site.settings.load();
        let judge_at = after(sent_at, settings.attempt_timeout);
        // Without a wait worth mentioning the server's time and the caller's end together.
        let waited = sent_at.saturating_duration_since(self.queued_at) > LATE;
        let attempt_ends = if waited { self.attempt_ends } else { judge_at };
        Times {
            release_at: self
                .own_ends
                .map_or(attempt_ends, |own| own.min(attempt_ends)),
            judge_at,
            judged: false,
            ends_at: after(sent_at, settings.stall_after()).max(judge_at),
            extended: false,
        }
    }

    /// Asks the question, or else what its caller asks, and waits for the answer until there is one, or nobody wants it any more.
    async fn converse(
        &mut self,
        wire: &mut Wire,
        question: Option<&Operation>,
        times: &mut Times,
        sent_at: Instant,
    ) -> End {
        let Self {
            shared,
            operation,
            answer,
            drained,
            ..
        } = self;
        let mut exchange = pin!(wire.exchange(question.unwrap_or(operation), shared.site.token()));
        let mut has_drained = pin!(drained.changed());
        let mut timer = pin!(sleep_until(times.release_at.min(times.judge_at)));
        poll_fn(|cx| {
            // What has arrived must be known before a time-out is judged.
            if let Poll::Ready(outcome) = exchange.as_mut().poll(cx) {
                return Poll::Ready(End::Answered(outcome));
            }
            // Also when it is our turn that is over, as with a server that never stops talking: tokio's
            // own would then not say that they are due.
            if pin!(unconstrained(has_drained.as_mut()))
                .poll(cx)
                .is_ready()
            {
                let error = shared.drained.borrow().clone();
                let error = error.unwrap_or_else(|| shared.site.shut_down());
                return Poll::Ready(End::Drained(error));
            }
            while pin!(unconstrained(timer.as_mut())).poll(cx).is_ready() {
                let (now, due) = (Instant::now(), timer.deadline());
                let late = now > due + LATE;
                if times.release_at <= now
                    && let Some(answer) = answer.take()
                {
                    let charge = match (late, times.judge_at <= now) {
                        (true, _) => Charge::OurLateness,
                        (false, true) => Charge::Node,
                        (false, false) => Charge::Nobody,
                    };
                    let _left = answer.send(Err(timeout(Sent::Maybe).charged_to(charge)));
                }
                if times.judge_at <= now && !std::mem::replace(&mut times.judged, true) && !late {
                    shared.suspect(sent_at);
                }
                if times.ends_at <= now {
                    if !late || std::mem::replace(&mut times.extended, true) {
                        return Poll::Ready(End::Silent);
                    }
                    // What we did not do in time says nothing about the server: it gets its time again.
                    times.ends_at = after(now, shared.site.settings.load().stall_after());
                }
                let release = answer.as_ref().map(|_| times.release_at);
                let judge = (!times.judged).then_some(times.judge_at);
                let next = [release, judge].into_iter().flatten().min();
                timer.as_mut().reset(next.unwrap_or(times.ends_at));
            }
            Poll::Pending
        })
        .await
    }
}
