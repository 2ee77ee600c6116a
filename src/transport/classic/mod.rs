//! The classic transport: memcached's text protocol from before the meta commands, for servers before
//! 1.6.13 and for proxies.
//!
//! Its replies cannot all be told apart (`STORED` says not whose), so a connection has one request at a
//! time, and a pool of them ([`pool`], by bb8) has as many as there may be. memcache-async speaks the
//! protocol; the `guard` beneath it lets nothing pass that is not the answer to what was asked, and
//! the `wire` knows whether a connection is still in step: one that is not is never used again.
//!
//! A CAS token goes over no connection that is newer than it ([`CasToken`](crate::CasToken)), so a
//! request with one looks for an older connection in the pool.
//!
//! A request is a task on the I/O executor ([`task`]): it takes a connection, asks, and hands the
//! connection back. Whoever waits for it may leave; it sees the exchange to its end all the same.

mod check;
mod encode;
#[cfg(feature = "testing")]
mod fuzz;
mod guard;
mod lease;
mod pool;
#[cfg(any(test, feature = "testing"))]
mod script;
mod task;
#[cfg(test)]
mod tests;
mod wire;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use tokio::sync::oneshot;
use tokio::time::Instant;

#[cfg(feature = "testing")]
pub use fuzz::fuzz_classic_reply;
use pool::Shared;
use task::{Job, Progress};

use super::site::{Site, own_end};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{LATE, Spawner, after};
use crate::key::Key;
use crate::kill_switch::noted;
use crate::protocol::check_value;
use crate::request::{Operation, Purpose, Request};
use crate::response::{CasOutcome, Response};

/// The classic connections of one node. They are closed when the last handle, and the last future made
/// by one, is dropped.
pub(super) struct Classic(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    spawner: Spawner,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl Classic {
    pub(super) fn at(site: Arc<Site>, spawner: Spawner, size: u32) -> Self {
        let shared = Arc::new(Shared::new(site, size));
        Self(Arc::new(Handle { shared, spawner }))
    }

    pub(super) fn request(&self, request: Request) -> ClassicFuture {
        ClassicFuture {
            step: Step::Start(self.0.clone()),
            request,
        }
    }

    /// Ends what waits or is in flight, and the connections with it: the node is out.
    pub(super) fn drain(&self, error: &Error) {
        self.0.shared.drain(error);
    }

    /// Ends what waits for a connection.
    pub(super) fn retire(&self, error: &Error) {
        self.0.shared.refuse(error);
    }

    pub(super) fn end_backoff(&self) {
        self.0.shared.end_backoff();
    }

    /// How many connections it may have.
    pub(super) fn connections(&self) -> usize {
        self.0.shared.size as usize
    }

    /// Requests that wait for a connection, or are in flight.
    pub(super) fn pending(&self) -> usize {
        self.0.shared.pending.load(Ordering::Relaxed)
    }

    pub(super) fn close(&self) {
        self.0.shared.close();
    }
}

/// A place among the requests of a node, until it is dropped.
struct Place {
    shared: Arc<Shared>,
    bytes: usize,
}

impl Place {
    fn take(shared: &Arc<Shared>, bytes: usize) -> Result<Self> {
        let limits = shared.site.settings.load().limits;
        let before = shared.pending.fetch_add(1, Ordering::Relaxed);
        let queued = shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        let place = Self {
            shared: shared.clone(),
            bytes,
        };
        let full = |what: &'static str| Err(Error::new(ErrorKind::Overloaded, what));
        if before >= limits.requests {
            return full("the node's queue is full");
        }
        if queued > 0 && queued + bytes > limits.queued_bytes {
            return full("the node's queue holds its limit of bytes");
        }
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.pending.fetch_sub(1, Ordering::Relaxed);
        self.shared.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The future of one request over classic connections.
#[derive(Debug)]
#[must_use = "futures do nothing unless polled"]
pub(super) struct ClassicFuture {
    step: Step,
    /// Kept to the end, should it have to be asked in another way.
    request: Request,
}

impl ClassicFuture {
    pub(super) fn into_request(self) -> Request {
        self.request
    }
}

enum Step {
    Start(Arc<Handle>),
    Waiting(Waiting),
    Done,
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start(..) => "Start",
            Self::Waiting(_) => "Waiting",
            Self::Done => "Done",
        })
    }
}

struct Waiting {
    handle: Arc<Handle>,
    outcome: oneshot::Receiver<Result<Response>>,
    progress: Arc<Progress>,
    /// The key, if it is a write whose doubt matters to others than its caller.
    written: Option<Key>,
    /// When the caller stops waiting if the task has not spoken by then.
    give_up_at: Instant,
}

enum Started {
    Waiting(Waiting),
    Answered(Response),
}

impl Future for ClassicFuture {
    type Output = Result<Response>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        if let Step::Start(..) = &self.step
            && let Step::Start(handle) = std::mem::replace(&mut self.step, Step::Done)
        {
            match start(handle, &self.request)? {
                Started::Waiting(waiting) => self.step = Step::Waiting(waiting),
                Started::Answered(response) => return Poll::Ready(Ok(response)),
            }
        }
        let Step::Waiting(waiting) = &mut self.step else {
            panic!("polled after completion");
        };
        let polled = waiting.poll(cx);
        if polled.is_ready() {
            self.step = Step::Done;
        }
        polled
    }
}

fn start(handle: Arc<Handle>, request: &Request) -> Result<Started> {
    let shared = &handle.shared;
    let site = &shared.site;
    let settings = site.settings.load();
    let operation = request.operation();
    let name = |error: Error| error.at_node(&site.name);

    if request.purpose() == Purpose::Note {
        return Err(name(noted()));
    }
    check_value(operation, settings.limits.value).map_err(name)?;
    if let Some(error) = wire::unsupported(operation) {
        return Err(name(error));
    }
    match operation {
        Operation::CompareAndSwap { token, .. } if token.node != site.number => {
            return Ok(Started::Answered(Response::Swapped(CasOutcome::Exists)));
        }
        Operation::GetMany { keys } if keys.is_empty() => {
            return Ok(Started::Answered(Response::Values(Vec::new())));
        }
        _ => {}
    }
    let now = Instant::now();
    let attempt_ends = after(now, settings.attempt_timeout);
    let own_ends = own_end(request, now).map_err(name)?;
    shared.refuses().map_or(Ok(()), Err)?;
    let place = Place::take(shared, operation.payload_len()).map_err(name)?;
    let (answer, outcome) = oneshot::channel();
    let progress = Arc::new(Progress::default());
    let job = Job {
        shared: shared.clone(),
        operation: operation.clone(),
        queued_at: now,
        own_ends,
        attempt_ends,
        answer: Some(answer),
        progress: progress.clone(),
        drained: shared.drained.subscribe(),
        place,
    };
    handle.spawner.spawn(job.run()).map_err(name)?;
    // The task should speak first; it may be late.
    let give_up_at = own_ends.map_or(attempt_ends, |ends| ends.min(attempt_ends));
    Ok(Started::Waiting(Waiting {
        outcome,
        progress,
        written: operation.written().cloned(),
        give_up_at: after(give_up_at, LATE * 2),
        handle,
    }))
}

impl Waiting {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response>> {
        let outcome = match Pin::new(&mut self.outcome).poll(cx) {
            Poll::Ready(Ok(outcome)) => outcome,
            Poll::Ready(Err(_gone)) => {
                let message = "the runtime of the connection has ended";
                let error = Error::new(ErrorKind::Shutdown, message);
                Err(error.with_sent(self.progress.sent()))
            }
            Poll::Pending if Instant::now() < self.give_up_at => return Poll::Pending,
            Poll::Pending => {
                self.leave();
                Err(task::timeout(self.progress.sent()))
            }
        };
        self.written = None;
        let site = &self.handle.shared.site;
        Poll::Ready(outcome.map_err(|error| error.at_node(&site.name)))
    }

    /// Nobody waits for it any more.
    fn leave(&mut self) {
        // Another connection may be faster than the one that this is on.
        if let Some(key) = self.written.take().filter(|_| self.progress.is_under_way()) {
            self.handle.shared.site.in_doubt(&[key]);
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.outcome.close();
        self.leave();
    }
}
