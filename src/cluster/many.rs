//! Requests that go to several nodes at once.
//!
//! A multi-key read is one batch for each node that its keys belong to. A batch that fails is
//! judged like any request, and what is to be tried again is batched anew by where each key goes
//! now. Its outcome is partial by design: each key has its own.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;
use tower::Service;

use super::place::{Errand, Placed};
use super::route::Wait;
use super::{After, Pool, Shared, Tries};
use crate::error::{BoxError, Error, ErrorKind, Result, Sent};
use crate::key::Key;
use crate::node::{Node, NodeFuture};
use crate::request::{Operation, Origin, Request};
use crate::response::{NodeResult, Response};
use crate::shutdown::shut_down;
use crate::value::Value;

/// The most keys in one batch: what a node answers in one go, before others get their turn.
const BATCH: usize = 128;

/// A multi-key read under way. Boxed whole: its parts are many.
pub(super) struct Many<S: Service<Request>> {
    shared: Arc<Shared<S>>,
    keys: Arc<[Key]>,
    deadline: Option<Instant>,
    attempt_timeout: Option<Duration>,
    /// Empty until one of them is known: what a node says of all the keys is taken as it is. Then a
    /// miss, of each that is not known.
    outcomes: Vec<Result<Option<Value>>>,
    batches: Vec<Batch<S>>,
    waiting: Vec<Waiting>,
    look_again: bool,
}

/// Keys that wait to be placed again.
struct Waiting {
    indexes: Vec<usize>,
    tries: Tries,
    wait: Pin<Box<Wait>>,
}

struct Batch<S: Service<Request>> {
    /// Which of the keys.
    indexes: Vec<usize>,
    tries: Tries,
    attempt: Pin<Box<NodeFuture<S>>>,
}

/// Keys on their way to one node.
struct Group<S> {
    node: Node<S>,
    origin: Origin,
    indexes: Vec<usize>,
}

impl<S: Service<Request> + Clone> Many<S> {
    pub(super) fn new(shared: &Arc<Shared<S>>, request: Request) -> Self {
        let (deadline, attempt_timeout) = (request.deadline(), request.attempt_timeout());
        let keys = match request.into_operation() {
            Operation::GetMany { keys } => keys,
            _ => Arc::default(),
        };
        let mut many = Self {
            shared: shared.clone(),
            outcomes: Vec::new(),
            keys,
            deadline,
            attempt_timeout,
            batches: Vec::new(),
            waiting: Vec::new(),
            look_again: false,
        };
        let all = 0..many.keys.len();
        many.send(all.collect(), Tries::default(), None);
        many
    }

    /// The part of the request that is about these keys.
    fn part(&self, indexes: &[usize]) -> Request {
        let keys = match indexes.len() == self.keys.len() {
            true => self.keys.clone(),
            false => indexes
                .iter()
                .map(|&index| self.keys[index].clone())
                .collect(),
        };
        let mut request = Request::new(Operation::GetMany { keys });
        if let Some(deadline) = self.deadline {
            request = request.with_deadline(deadline);
        }
        if let Some(attempt) = self.attempt_timeout {
            request = request.with_attempt_timeout(attempt);
        }
        request
    }

    /// Sends keys to where they go now; or, after they have failed with an error, to other nodes than
    /// those in `tries`, which has to be `paid` for or not.
    fn send(&mut self, indexes: Vec<usize>, tries: Tries, failed: Option<(Error, bool)>) {
        let operation = reads();
        let topology = self.shared.topology();
        let mut groups: Vec<Group<S>> = Vec::new();
        let all = indexes.len();
        for index in indexes {
            let key = &self.keys[index];
            let mut place = |node: &Node<S>, origin| {
                let id = node.shared().id();
                let has_room = |group: &&mut Group<S>| {
                    group.node.shared().id() == id
                        && group.origin == origin
                        && group.indexes.len() < BATCH
                };
                match groups.iter_mut().find(has_room) {
                    Some(group) => group.indexes.push(index),
                    None => {
                        let mut indexes = Vec::with_capacity(all.min(BATCH));
                        indexes.push(index);
                        groups.push(Group {
                            node: node.clone(),
                            origin,
                            indexes,
                        });
                    }
                }
            };
            // Nearly always: its home, of which there is nothing more to know.
            if failed.is_none()
                && let Some(home) = topology.home(key)
                && home.shared().is_untroubled()
            {
                place(home, Origin::Home);
                continue;
            }
            let errand = Errand::read(key, &operation);
            let outcome = match &failed {
                None => match self.shared.first(errand, place) {
                    Placed::At(()) => None,
                    Placed::Settled(Ok(_)) => Some(Ok(None)),
                    Placed::Settled(Err(error)) => Some(Err(error)),
                },
                Some((error, _)) => {
                    let placed = self.shared.next(errand, &tries, false, place);
                    placed.map_or(Some(Err(error.clone())), |()| None)
                }
            };
            if let Some(outcome) = outcome {
                self.settle(index, outcome);
            }
        }
        // However many nodes take over from it, a batch is one request to the budget.
        if let Some((error, true)) = &failed
            && let Some(group) = groups.first()
            && !self.shared.pay(group.node.shared())
        {
            for group in groups.drain(..) {
                self.give_up(group.indexes, error);
            }
        }
        for group in groups {
            let request = self.part(&group.indexes).with_origin(group.origin);
            self.batches.push(Batch {
                attempt: Box::pin(NodeFuture::new(group.node, request)),
                indexes: group.indexes,
                tries: tries.clone(),
            });
        }
    }

    fn settle(&mut self, index: usize, outcome: Result<Option<Value>>) {
        self.outcomes()[index] = outcome;
    }

    fn outcomes(&mut self) -> &mut Vec<Result<Option<Value>>> {
        self.outcomes.resize_with(self.keys.len(), || Ok(None));
        &mut self.outcomes
    }

    fn give_up(&mut self, indexes: Vec<usize>, error: &Error) {
        for index in indexes {
            self.settle(index, Err(error.clone()));
        }
    }
}

impl<S> Many<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Response> {
        let mut index = 0;
        while index < self.waiting.len() {
            let Poll::Ready(closed) = self.waiting[index].wait.as_mut().poll(cx) else {
                index += 1;
                continue;
            };
            let waited = self.waiting.swap_remove(index);
            if closed {
                self.give_up(waited.indexes, &shut_down());
            } else {
                self.send(waited.indexes, waited.tries, None);
            }
        }
        let mut index = 0;
        // Batches that take a failed one's keys are pushed behind, and polled in the same pass.
        while index < self.batches.len() {
            match self.batches[index].attempt.as_mut().poll(cx) {
                Poll::Pending => index += 1,
                Poll::Ready(outcome) => {
                    let batch = self.batches.swap_remove(index);
                    self.ended(batch, outcome);
                }
            }
        }
        if !self.batches.is_empty() || !self.waiting.is_empty() {
            let now = Instant::now();
            if self.deadline.is_none_or(|deadline| now < deadline) {
                if std::mem::take(&mut self.look_again) {
                    cx.waker().wake_by_ref();
                }
                return Poll::Pending;
            }
            let batches = std::mem::take(&mut self.batches).into_iter();
            let waiting = std::mem::take(&mut self.waiting).into_iter();
            let asked = batches.map(|batch| batch.indexes);
            for indexes in asked.chain(waiting.map(|waiting| waiting.indexes)) {
                self.give_up(indexes, &out_of_time());
            }
        }
        Poll::Ready(Response::Values(std::mem::take(self.outcomes())))
    }

    fn ended(&mut self, mut batch: Batch<S>, outcome: Result<Response>) {
        let mut failed = Vec::new();
        let mut failure = None;
        match outcome {
            Ok(Response::Values(outcomes)) if outcomes.len() == batch.indexes.len() => {
                let is_final = |error: &Error| error.kind() == ErrorKind::ValueTooLarge;
                let mut errors = outcomes.iter().filter_map(|outcome| outcome.as_ref().err());
                if outcomes.len() == self.keys.len() && errors.all(is_final) {
                    self.outcomes = outcomes;
                    return;
                }
                for (&index, outcome) in batch.indexes.iter().zip(outcomes) {
                    match outcome {
                        Err(error) if !is_final(&error) => {
                            failed.push(index);
                            failure = Some(error);
                        }
                        settled => self.settle(index, settled),
                    }
                }
            }
            Ok(_) => {
                failed = std::mem::take(&mut batch.indexes);
                failure = Some(Error::new(
                    ErrorKind::Layer,
                    "a layer's response does not fit a multi-key read",
                ));
            }
            Err(error) => {
                failed = std::mem::take(&mut batch.indexes);
                failure = Some(error);
            }
        }
        let Some(error) = failure else { return };
        let error = error.after_attempts(batch.tries.sent);
        if self
            .deadline
            .is_some_and(|deadline| deadline <= Instant::now())
        {
            return self.give_up(failed, &error);
        }
        let node = batch.attempt.node().clone();
        let mut tries = batch.tries;
        match self.shared.after(&reads(), &node, &error, &mut tries) {
            After::GiveUp => self.give_up(failed, &error),
            After::Move { paid } => self.send(failed, tries, Some((error, paid))),
            After::Wait(delay) => match self.shared.wait(delay, &node, self.deadline) {
                Ok(wait) => {
                    self.waiting.push(Waiting {
                        indexes: failed,
                        tries,
                        wait: Box::pin(wait),
                    });
                    // It has yet to be polled.
                    self.look_again = true;
                }
                Err(error) => self.give_up(failed, &error),
            },
        }
    }
}

/// What each key of a multi-key read is, when it comes to where it goes.
fn reads() -> Operation {
    Operation::GetMany {
        keys: Arc::default(),
    }
}

fn out_of_time() -> Error {
    Error::new(ErrorKind::Timeout, "no answer by the deadline").with_sent(Sent::Maybe)
}

/// A question that every node answers for itself. It is never moved or repeated.
pub(super) struct Every<S: Service<Request>> {
    deadline: Option<Instant>,
    answers: Vec<Option<NodeResult<Response>>>,
    attempts: Vec<Option<Pin<Box<NodeFuture<S>>>>>,
}

impl<S: Service<Request> + Clone> Every<S> {
    pub(super) fn new<'a>(pools: impl Iterator<Item = &'a Arc<Pool<S>>>, request: &Request) -> Self
    where
        S: 'a,
    {
        let mut attempts = Vec::new();
        for pool in pools {
            let topology = pool.topology.load();
            if matches!(request.operation(), Operation::FlushAll) {
                topology.flush_former();
            }
            let nodes = topology.members().iter().map(|member| &member.node);
            let attempt = |node: &Node<S>| {
                let attempt = NodeFuture::new(node.clone(), request.clone());
                Some(Box::pin(attempt))
            };
            attempts.extend(nodes.map(attempt));
        }
        Self {
            deadline: request.deadline(),
            answers: attempts.iter().map(|_| None).collect(),
            attempts,
        }
    }

    /// There are no nodes.
    pub(super) fn asks_nobody(&self) -> bool {
        self.attempts.is_empty()
    }
}

impl<S> Every<S>
where
    S: Service<Request, Response = Response> + Clone,
    S::Error: Into<BoxError>,
{
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Response> {
        let mut waiting = false;
        let overdue = self
            .deadline
            .is_some_and(|deadline| deadline <= Instant::now());
        for (place, answer) in self.attempts.iter_mut().zip(&mut self.answers) {
            let Some(attempt) = place else { continue };
            let result = match attempt.as_mut().poll(cx) {
                Poll::Ready(result) => result,
                Poll::Pending if overdue => Err(out_of_time()),
                Poll::Pending => {
                    waiting = true;
                    continue;
                }
            };
            let name = attempt.node().name().clone();
            let result = result.map_err(|error| error.at_node(&name));
            *answer = Some(NodeResult::new(name, result));
            *place = None;
        }
        if waiting {
            return Poll::Pending;
        }
        let answers = std::mem::take(&mut self.answers);
        Poll::Ready(Response::Nodes(answers.into_iter().flatten().collect()))
    }
}
