//! The queue of requests of one connection, as a state machine without I/O, clocks or wakers of
//! its own.
//!
//! A request is *queued* by [`enqueue`](Pipeline::enqueue), *in flight* once
//! [`take`](Pipeline::take) has put it into a batch to be written, and *settled* by exactly one of
//! its reply, its time-out, or the end of its connection. Whoever asked holds a [`Ticket`] and
//! either [`poll`](Pipeline::poll)s the outcome out with it or [`abandon`](Pipeline::abandon)s it:
//! a queued request is then never written; one in flight keeps its place in the order of replies,
//! and its late reply is discarded.
//!
//! Replies come in the order of requests; each must also carry the opaque that its request was
//! given. `W` is whatever wakes a waiter.

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;
use std::num::{NonZeroU32, NonZeroUsize};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use slab::Slab;
use tokio::time::Instant;

use super::reply::{Code, Failure, Header, Reply};
use super::{Limits, Violation, encode, reply};
use crate::error::{Charge, Error, ErrorKind, Result, Sent};
use crate::executor::after;
use crate::key::Key;
use crate::request::Operation;
use crate::response::{CasOutcome, Found, LeaseState, Lookup, Response};
use crate::value::{CasToken, Value, is_absent, is_placeholder};

/// More counters than any memcached reports.
pub(crate) const MAX_STATS: usize = 4096;

/// What one batch holds, if it is more than one request, in bytes: about what a socket takes at
/// once.
const BATCH_SIZE: usize = 64 * 1024;

/// A buffer grown beyond this by a burst is not kept, in bytes.
const KEPT_CAPACITY: usize = 256 * 1024;

/// Nor is the room for more requests than this, once there are none.
const KEPT_REQUESTS: usize = 4096;

/// A claim on one request's outcome. Not `Clone`: it is used up by taking the outcome, or by
/// abandoning it.
#[derive(Debug)]
pub(crate) struct Ticket(Place);

/// Of a claim, in the table of claims. None takes no more memory than one.
#[derive(Clone, Copy, Debug)]
struct Place(NonZeroUsize);

impl Place {
    fn new(index: usize) -> Self {
        Self(NonZeroUsize::MIN.saturating_add(index))
    }

    fn index(self) -> usize {
        self.0.get() - 1
    }
}

/// Requests cut off the queue, to be written in order.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// The bytes of the requests, without large values.
    heads: BytesMut,
    bodies: VecDeque<Body>,
}

/// A large value, sent from where it is.
#[derive(Debug)]
struct Body {
    /// How many bytes of `heads` go before it.
    after: usize,
    value: Bytes,
    /// The `\r\n` behind it.
    end: &'static [u8],
}

impl Batch {
    /// One request, with its value if that is large, for a connection that carries one at a time.
    #[cfg(feature = "classic")]
    pub(crate) fn put(&mut self, request: impl FnOnce(&mut BytesMut) -> Option<Bytes>) {
        let before: usize = self.bodies.iter().map(|body| body.after).sum();
        if let Some(value) = request(&mut self.heads) {
            let after = self.heads.len() - before;
            let end = b"\r\n";
            self.bodies.push_back(Body { after, value, end });
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.heads.is_empty() && self.bodies.is_empty()
    }

    /// Fills `slices` with what is to be written next and says how many it filled.
    pub(crate) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut heads = &self.heads[..];
        let mut parts = slices.iter_mut();
        let mut filled = 0;
        let mut put = |part: &'a [u8]| {
            if part.is_empty() {
                return true;
            }
            let Some(slice) = parts.next() else {
                return false;
            };
            *slice = IoSlice::new(part);
            filled += 1;
            true
        };
        for body in &self.bodies {
            let (before, behind) = heads.split_at(body.after);
            heads = behind;
            if !(put(before) && put(&body.value) && put(body.end)) {
                return filled;
            }
        }
        put(heads);
        filled
    }

    /// Forgets what was written.
    pub(crate) fn advance(&mut self, mut written: usize) {
        while let Some(body) = self.bodies.front_mut() {
            let heads = written.min(body.after);
            self.heads.advance(heads);
            body.after -= heads;
            written -= heads;
            if body.after > 0 {
                return;
            }
            let value = written.min(body.value.len());
            body.value.advance(value);
            written -= value;
            let end = written.min(body.end.len());
            body.end = &body.end[end..];
            written -= end;
            if !body.value.is_empty() || !body.end.is_empty() {
                return;
            }
            self.bodies.pop_front();
        }
        self.heads.advance(written);
        if self.heads.is_empty() {
            // Back to the front of its memory, to be filled again.
            self.heads.clear();
            if self.heads.capacity() > KEPT_CAPACITY {
                self.heads = BytesMut::new();
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct Pipeline<W> {
    limits: Limits,
    /// The node's identity, for CAS tokens.
    node: NonZeroU32,
    /// What tickets point to.
    claims: Slab<Claim<W>>,
    /// Requests in order: the first `in_flight` of them are taken, the rest queued.
    requests: VecDeque<Entry>,
    in_flight: usize,
    /// Of how many of those in flight, from the oldest on, it was noted whether they are slow.
    slow: usize,
    /// The bytes of the queued ones.
    heads: BytesMut,
    /// Large values among the queued ones, in bytes.
    queued_bodies: usize,
    /// Queued requests whose caller is gone: they are left out when taken.
    dead: usize,
    /// Queued requests that are bound to a connection which may be replaced before they are taken.
    swaps: usize,
    next_serial: u64,
    next_opaque: u32,
    /// This connection's number among the node's, counted as established; 0 before the first.
    connection: u32,
    /// Misses carry an opaque too (a matter of the server's version).
    opaque_on_miss: bool,
    /// Positions in this connection's stream of sent bytes: up to where requests were taken, and
    /// up to where the kernel has them.
    taken: u64,
    written: u64,
    /// Nobody is to be released, and nothing judged, before this.
    earliest_deadline: Option<Instant>,
}

/// What a reply was matched to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Match {
    /// A request whose time has not run out.
    pub(crate) timely: bool,
    /// It is its only, or its last reply.
    pub(crate) last: bool,
    /// It came late, though not too late, for a request sent then.
    pub(crate) slow: Option<Instant>,
}

#[derive(Debug)]
enum Claim<W> {
    Waiting {
        waiter: Option<W>,
        /// The request's, by which it is found.
        serial: u64,
    },
    Settled(Result<Response>),
}

#[derive(Debug)]
struct Entry {
    /// Ascending along the queue.
    serial: u64,
    /// `None` once nobody waits for it any more: abandoned, or settled by its time-out.
    claim: Option<Place>,
    /// When its caller is released at the latest.
    deadline: Instant,
    /// When the server had the time of an attempt: an answer by then is a timely one, whether or
    /// not the caller had so much time.
    judge_at: Instant,
    /// Whether that is still to be judged. A caller who left of its own accord does not want it
    /// judged; one who left because of its deadline does.
    watched: bool,
    slow: bool,
    /// Boxed, as reads have none.
    write: Option<Box<Write>>,
    opaque: u32,
    expect: Expect,
    /// While queued: how many bytes of `heads` are its. Once taken: where it begins in the stream.
    extent: u64,
    /// Set when taken:
    sent_at: Option<Instant>,
    /// The node's newest connection then.
    newest: u32,
}

#[derive(Debug)]
struct Write {
    /// If its doubt matters to others than its caller.
    key: Option<Key>,
    /// A large value, while queued.
    body: Option<Bytes>,
}

/// What would answer a request, with what has come of it so far.
#[derive(Debug)]
enum Expect {
    Value {
        with_cas: bool,
    },
    Found,
    Values(Box<Batched>),
    Stored,
    Swapped {
        newest_allowed: u32,
    },
    Deleted,
    Touched,
    Counter,
    Version,
    Flushed,
    #[expect(
        clippy::box_collection,
        reason = "every request has room for the largest of these"
    )]
    Stats(Box<BTreeMap<String, String>>),
}

#[derive(Debug)]
struct Batched {
    count: usize,
    /// Replies come in the order of the keys, so the keys before this one are settled: those that
    /// nothing came for are misses.
    settled: usize,
    outcomes: Vec<Result<Option<Value>>>,
}

impl Expect {
    fn new(operation: &Operation) -> Self {
        match operation {
            Operation::Get { with_cas, .. } => Self::Value {
                with_cas: *with_cas,
            },
            Operation::GetAndTouch { .. } => Self::Value { with_cas: false },
            Operation::Lookup { .. } => Self::Found,
            Operation::GetMany { keys } => Self::Values(Box::new(Batched {
                count: keys.len(),
                settled: 0,
                outcomes: keys.iter().map(|_| Ok(None)).collect(),
            })),
            Operation::Store { .. } => Self::Stored,
            Operation::CompareAndSwap { token, .. } => Self::Swapped {
                newest_allowed: token.connection,
            },
            Operation::Delete { .. } => Self::Deleted,
            Operation::Touch { .. } => Self::Touched,
            Operation::Arithmetic { .. } => Self::Counter,
            Operation::Version => Self::Version,
            Operation::FlushAll => Self::Flushed,
            Operation::Stats => Self::Stats(Box::default()),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Value { .. } | Self::Found => "a read",
            Self::Values(_) => "a multi-key read",
            Self::Stored | Self::Swapped { .. } => "a write",
            Self::Deleted => "a delete",
            Self::Touched => "a touch",
            Self::Counter => "arithmetic",
            Self::Version => "version",
            Self::Flushed => "flush_all",
            Self::Stats(_) => "stats",
        }
    }
}

impl Entry {
    /// Its caller is gone; what comes for it is discarded.
    fn leave(&mut self, watched: bool) {
        self.claim = None;
        self.watched = watched;
        if let Expect::Values(batched) = &mut self.expect {
            batched.outcomes = Vec::new();
        }
    }

    fn written(&self) -> Option<&Key> {
        self.write.as_ref()?.key.as_ref()
    }

    fn take_body(&mut self) -> Option<Bytes> {
        self.write.as_mut()?.body.take()
    }

    /// Of its large value, while queued, in bytes.
    fn body_len(&self) -> usize {
        let body = self.write.as_ref().and_then(|write| write.body.as_ref());
        body.map_or(0, Bytes::len)
    }
}

impl<W> Pipeline<W> {
    pub(crate) fn new(limits: Limits, node: NonZeroU32) -> Self {
        Self {
            limits,
            node,
            claims: Slab::new(),
            requests: VecDeque::new(),
            in_flight: 0,
            slow: 0,
            heads: BytesMut::new(),
            queued_bodies: 0,
            dead: 0,
            swaps: 0,
            next_serial: 0,
            next_opaque: 1,
            connection: 0,
            opaque_on_miss: true,
            taken: 0,
            written: 0,
            earliest_deadline: None,
        }
    }

    /// Other limits for what comes from now on.
    pub(crate) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Begins a new connection: the number it has among the node's, and whether the server
    /// echoes opaques on misses. What is queued goes over it.
    pub(crate) fn connected(&mut self, number: u32, opaque_on_miss: bool) {
        debug_assert_eq!(self.in_flight, 0, "the old connection was closed first");
        self.connection = number;
        self.opaque_on_miss = opaque_on_miss;
        self.taken = 0;
        self.written = 0;
    }

    /// The number of the connection it sends over, or of the last one.
    pub(crate) fn connection(&self) -> u32 {
        self.connection
    }

    /// How many requests are queued or in flight.
    pub(crate) fn len(&self) -> usize {
        self.requests.len()
    }

    pub(crate) fn has_queued(&self) -> bool {
        self.requests.len() > self.in_flight
    }

    /// When the oldest request without a reply was taken, however long its caller has been gone.
    pub(crate) fn oldest_sent_at(&self) -> Option<Instant> {
        let oldest = self.requests.front().filter(|_| self.in_flight > 0)?;
        oldest.sent_at
    }

    /// [`expire`](Self::expire) has nothing to do before this.
    pub(crate) fn earliest_deadline(&self) -> Option<Instant> {
        self.earliest_deadline
    }

    /// Puts a request at the end of the queue. Its caller is released at `deadline`; the server is
    /// judged at `judge_at`, which is not before that.
    ///
    /// # Errors
    /// [`ErrorKind::Overloaded`] if the queue is full.
    pub(crate) fn enqueue(
        &mut self,
        operation: &Operation,
        deadline: Instant,
        judge_at: Instant,
        waiter: Option<W>,
    ) -> Result<Ticket> {
        if self.requests.len() >= self.limits.requests {
            return Err(Error::new(
                ErrorKind::Overloaded,
                "the connection's queue is full",
            ));
        }
        let queued = self.heads.len() + self.queued_bodies;
        if queued + operation.payload_len() > self.limits.queued_bytes && queued > 0 {
            return Err(Error::new(
                ErrorKind::Overloaded,
                "the connection's queue holds its limit of bytes",
            ));
        }
        let expect = Expect::new(operation);
        let opaque = self.next_opaque;
        let opaques = match &expect {
            Expect::Values(batched) => batched.count as u32,
            _ => 1,
        };
        self.next_opaque = opaque.wrapping_add(opaques);
        let before = self.heads.len();
        let body = encode(operation, opaque, &mut self.heads);
        self.queued_bodies += body.as_ref().map_or(0, Bytes::len);
        self.swaps += usize::from(matches!(expect, Expect::Swapped { .. }));
        let serial = self.next_serial;
        self.next_serial += 1;
        let claim = self.claims.insert(Claim::Waiting { waiter, serial });
        let claim = Place::new(claim);
        let key = operation.written().cloned();
        let write = (key.is_some() || body.is_some()).then(|| Box::new(Write { key, body }));
        self.requests.push_back(Entry {
            serial,
            claim: Some(claim),
            deadline,
            judge_at,
            watched: true,
            slow: false,
            write,
            opaque,
            expect,
            extent: (self.heads.len() - before) as u64,
            sent_at: None,
            newest: 0,
        });
        self.earliest_deadline = Some(
            self.earliest_deadline
                .map_or(deadline, |known| known.min(deadline)),
        );
        Ok(Ticket(claim))
    }

    /// The outcome, if there is one; it uses the ticket up. Otherwise `wait` is given the place
    /// for the waiter.
    pub(crate) fn poll(
        &mut self,
        ticket: &Ticket,
        wait: impl FnOnce(&mut Option<W>),
    ) -> Option<Result<Response>> {
        if let Claim::Waiting { waiter, .. } = &mut self.claims[ticket.0.index()] {
            wait(waiter);
            return None;
        }
        match self.take_claim(ticket) {
            Claim::Settled(outcome) => Some(outcome),
            Claim::Waiting { .. } => unreachable!("ruled out three lines above"),
        }
    }

    /// Takes the waiters that are `wanted`. Whoever is woken is to [poll](Self::poll) again.
    pub(crate) fn take_waiters(&mut self, mut wanted: impl FnMut(&W) -> bool) -> Vec<W> {
        let waiting = self.claims.iter_mut().filter_map(|(_, claim)| match claim {
            Claim::Waiting { waiter, .. } => waiter.take_if(|waiter| wanted(waiter)),
            Claim::Settled(_) => None,
        });
        waiting.collect()
    }

    fn take_claim(&mut self, ticket: &Ticket) -> Claim<W> {
        let claim = self.claims.remove(ticket.0.index());
        if self.claims.is_empty() && self.claims.capacity() > KEPT_REQUESTS {
            self.claims = Slab::new();
        }
        if self.requests.is_empty() && self.requests.capacity() > KEPT_REQUESTS {
            self.requests = VecDeque::new();
        }
        claim
    }

    /// The caller is gone. A queued request will not be written; one in flight keeps its place.
    /// Hands out its waiter, whose drop may run anything, and the key of a write in flight.
    pub(crate) fn abandon(&mut self, ticket: Ticket) -> (Option<W>, Option<Key>) {
        let (waiter, index) = self.release(&ticket);
        let written = index.and_then(|index| {
            let entry = &mut self.requests[index];
            entry.leave(false);
            entry.written().cloned()
        });
        (waiter, written)
    }

    /// The keys of the writes that are unanswered and that nobody waits for any more.
    pub(crate) fn abandoned(&self) -> Vec<Key> {
        let in_flight = self.requests.iter().take(self.in_flight);
        let left = in_flight.filter(|entry| entry.claim.is_none());
        left.filter_map(|entry| entry.written().cloned()).collect()
    }

    /// For a caller that finds its deadline passed before the connection's timer did: the outcome
    /// if there is one after all, else a time-out that is charged to nobody and tells whether the
    /// request was sent; and its waiter, whose drop may run anything. Uses the ticket up.
    pub(crate) fn give_up(&mut self, ticket: Ticket) -> (Result<Response>, Option<W>) {
        if let Some(outcome) = self.poll(&ticket, |_| {}) {
            return (outcome, None);
        }
        let (waiter, index) = self.release(&ticket);
        let Some(index) = index else {
            return (Err(timeout(Sent::No)), waiter);
        };
        let entry = &mut self.requests[index];
        let outcome = timed_out(entry, Charge::Nobody);
        entry.leave(true);
        (outcome, waiter)
    }

    /// Frees a claim: its waiter, and the index of its request if that is still there.
    fn release(&mut self, ticket: &Ticket) -> (Option<W>, Option<usize>) {
        let Claim::Waiting { waiter, serial } = self.take_claim(ticket) else {
            return (None, None);
        };
        let position = self
            .requests
            .binary_search_by_key(&serial, |entry| entry.serial);
        let Ok(index) = position else {
            return (waiter, None);
        };
        if index >= self.in_flight {
            self.dead += 1;
            self.requests[index].leave(false);
            self.sweep_if_worthwhile();
            return (waiter, None);
        }
        (waiter, Some(index))
    }

    /// Moves what is queued into `batch`, to be written in full before the next one: a batch's
    /// worth of it, so that what cannot be written soon can still be left out. An attempt that was
    /// sent `now` has until `now + attempt`, whatever it waited before. `newest` is the node's newest connection. Says whether there is anything to write, and
    /// hands out waiters of requests that were settled without being sent.
    pub(crate) fn take(
        &mut self,
        batch: &mut Batch,
        now: Instant,
        attempt: Duration,
        newest: u32,
        woken: &mut Vec<W>,
    ) -> bool {
        debug_assert!(batch.is_empty(), "the one before was written in full");
        if self.swaps > 0 {
            self.refuse_outdated_swaps(woken);
        }
        if self.dead > 0 {
            self.sweep();
        }
        if !self.has_queued() {
            return false;
        }
        let (mut heads, mut since_body, mut bodies) = (0, 0, 0);
        let mut taken = 0;
        for entry in self.requests.range_mut(self.in_flight..) {
            let head = entry.extent as usize;
            if taken > 0 && heads + bodies + head + entry.body_len() > BATCH_SIZE {
                break;
            }
            taken += 1;
            heads += head;
            self.swaps -= usize::from(matches!(entry.expect, Expect::Swapped { .. }));
            entry.judge_at = entry.judge_at.max(after(now, attempt));
            entry.extent = self.taken;
            entry.sent_at = Some(now);
            entry.newest = newest;
            self.taken += head as u64;
            since_body += head;
            if let Some(body) = entry.take_body() {
                self.taken += body.len() as u64 + 2;
                self.queued_bodies -= body.len();
                bodies += body.len();
                batch.bodies.push_back(Body {
                    after: std::mem::take(&mut since_body),
                    value: body,
                    end: b"\r\n",
                });
            }
        }
        if heads == self.heads.len() {
            std::mem::swap(&mut self.heads, &mut batch.heads);
        } else {
            batch.heads.extend_from_slice(&self.heads[..heads]);
            self.heads.advance(heads);
        }
        self.in_flight += taken;
        true
    }

    /// The kernel took so many more bytes.
    pub(crate) fn wrote(&mut self, bytes: usize) {
        self.written += bytes as u64;
    }

    /// Compare-and-swaps that may no longer go over this connection end as [`CasOutcome::Exists`].
    fn refuse_outdated_swaps(&mut self, woken: &mut Vec<W>) {
        for index in self.in_flight..self.requests.len() {
            let entry = &mut self.requests[index];
            if let Expect::Swapped { newest_allowed } = entry.expect
                && self.connection > newest_allowed
                && let Some(claim) = entry.claim.take()
            {
                let outcome = Ok(Response::Swapped(CasOutcome::Exists));
                woken.extend(settle(&mut self.claims, claim, outcome));
                self.dead += 1;
            }
        }
    }

    /// Callers that come and go while nothing can be taken must not fill the queue; nor must each
    /// of them cost a look at all the others.
    fn sweep_if_worthwhile(&mut self) {
        let queued = self.requests.len() - self.in_flight;
        if self.dead > 32.min(self.limits.requests / 8) && self.dead > queued / 2 {
            self.sweep();
        }
    }

    /// Drops the queued requests that nobody waits for.
    fn sweep(&mut self) {
        let mut alive = BytesMut::with_capacity(self.heads.len());
        let mut at = 0;
        self.dead = 0;
        self.swaps = 0;
        for entry in self.requests.split_off(self.in_flight) {
            let bytes = &self.heads[at..at + entry.extent as usize];
            at += bytes.len();
            if entry.claim.is_some() {
                alive.extend_from_slice(bytes);
                self.swaps += usize::from(matches!(entry.expect, Expect::Swapped { .. }));
                self.requests.push_back(entry);
            } else {
                self.queued_bodies -= entry.body_len();
            }
        }
        self.heads = alive;
    }

    /// Takes note of those in flight that have waited for `slow_after` by `now`: their answers will
    /// be slow ones, unless `now` is later than it should have been looked.
    pub(crate) fn note_slow(&mut self, now: Instant, slow_after: Duration, late: bool) {
        while self
            .oldest_not_slow()
            .is_some_and(|sent_at| after(sent_at, slow_after) <= now)
        {
            self.requests[self.slow].slow = !late;
            self.slow += 1;
        }
    }

    /// When the oldest request in flight of which nothing was [noted](Self::note_slow) was sent.
    pub(crate) fn oldest_not_slow(&self) -> Option<Instant> {
        let mut flying = self.requests.range(..self.in_flight);
        flying.nth(self.slow).and_then(|entry| entry.sent_at)
    }

    /// Matches a reply to the oldest request in flight, and hands out its waiter if that settles
    /// it.
    ///
    /// # Errors
    /// After a [`Violation`] the connection must be [closed](Self::close).
    pub(crate) fn reply(&mut self, reply: Reply, woken: &mut Vec<W>) -> Result<Match, Violation> {
        let Some(entry) = self.requests.front_mut().filter(|_| self.in_flight > 0) else {
            return Err(Violation::Unsolicited(reply.name()));
        };
        let token = CasToken {
            node: self.node,
            connection: entry.newest,
            unique: 0,
        };
        let (outcome, violation) = match answer(entry, reply, self.opaque_on_miss, token)? {
            Answer::More => {
                let timely = entry.watched;
                return Ok(Match {
                    timely,
                    last: false,
                    slow: None,
                });
            }
            Answer::Final(outcome) => (outcome, None),
            Answer::Fatal(outcome, violation) => (outcome, Some(violation)),
        };
        if let Some(claim) = entry.claim {
            woken.extend(settle(&mut self.claims, claim, outcome));
        }
        let timely = entry.watched;
        let slow = entry.sent_at.filter(|_| timely && entry.slow);
        self.requests.pop_front();
        self.in_flight -= 1;
        self.slow = self.slow.saturating_sub(1);
        let matched = Match {
            timely,
            last: true,
            slow,
        };
        violation.map_or(Ok(matched), Err)
    }

    /// Settles every request whose caller's deadline is not after `now`, as a time-out, and judges
    /// those that the server had an attempt's time for. `charge` says whether it can be blamed at
    /// all; `charged` is told when each request that it is blamed for was sent.
    pub(crate) fn expire(
        &mut self,
        now: Instant,
        charge: Charge,
        woken: &mut Vec<W>,
        mut charged: impl FnMut(Instant),
    ) {
        let mut earliest: Option<Instant> = None;
        for index in 0..self.requests.len() {
            let written = self.written;
            let entry = &mut self.requests[index];
            let mut charge_this = Charge::Nobody;
            if entry.watched && entry.judge_at <= now {
                entry.watched = false;
                if let Some(sent_at) = entry.sent_at
                    && entry.extent < written
                {
                    charge_this = charge;
                    if charge == Charge::Node {
                        charged(sent_at);
                    }
                }
            }
            if entry.deadline <= now
                && let Some(claim) = entry.claim.take()
            {
                self.dead += usize::from(entry.sent_at.is_none());
                let outcome = timed_out(entry, charge_this);
                woken.extend(settle(&mut self.claims, claim, outcome));
            }
            let release = entry.claim.map(|_| entry.deadline);
            let judge = entry.watched.then_some(entry.judge_at);
            earliest = [earliest, release, judge].into_iter().flatten().min();
        }
        self.earliest_deadline = earliest;
        self.sweep_if_worthwhile();
    }

    /// The connection has ended, and nothing will be written to it any more: everything in flight
    /// ends with `error`, which is given whether it may have been executed. What is queued stays
    /// for the next connection. Returns the keys of writes that may have been executed.
    pub(crate) fn close(&mut self, error: &Error, woken: &mut Vec<W>) -> Vec<Key> {
        let mut doubtful = Vec::new();
        for _ in 0..self.in_flight {
            let Some(mut entry) = self.requests.pop_front() else {
                break;
            };
            // Of what was taken the kernel may not have had a byte.
            let sent = if entry.extent < self.written {
                Sent::Maybe
            } else {
                Sent::No
            };
            if sent == Sent::Maybe {
                doubtful.extend(entry.write.take().and_then(|write| write.key));
            }
            if let Some(claim) = entry.claim {
                let outcome = interrupted(&mut entry, error.clone().with_sent(sent));
                woken.extend(settle(&mut self.claims, claim, outcome));
            }
        }
        self.in_flight = 0;
        self.slow = 0;
        self.taken = 0;
        self.written = 0;
        doubtful
    }

    /// Ends everything queued with `error`; nothing of it was sent.
    pub(crate) fn fail_queued(&mut self, error: &Error, woken: &mut Vec<W>) {
        for entry in self.requests.drain(self.in_flight..) {
            if let Some(claim) = entry.claim {
                let outcome = Err(error.clone().with_sent(Sent::No));
                woken.extend(settle(&mut self.claims, claim, outcome));
            }
        }
        self.heads.clear();
        self.queued_bodies = 0;
        self.dead = 0;
        self.swaps = 0;
    }
}

fn settle<W>(claims: &mut Slab<Claim<W>>, claim: Place, outcome: Result<Response>) -> Option<W> {
    match std::mem::replace(&mut claims[claim.index()], Claim::Settled(outcome)) {
        Claim::Waiting { waiter, .. } => waiter,
        Claim::Settled(_) => None,
    }
}

fn timeout(sent: Sent) -> Error {
    let message = match sent {
        Sent::No => "it waited in our queue for all of its time",
        Sent::Maybe | Sent::Yes => "no answer in time",
    };
    Error::new(ErrorKind::Timeout, message).with_sent(sent)
}

fn timed_out(entry: &mut Entry, charge: Charge) -> Result<Response> {
    // What is in a batch goes out as soon as the socket takes it, caller or not.
    let sent = match entry.sent_at {
        Some(_) => Sent::Maybe,
        None => Sent::No,
    };
    interrupted(entry, timeout(sent).charged_to(charge))
}

/// What a request that will get no further reply ends with: of a multi-key read, what has come is
/// kept.
fn interrupted(entry: &mut Entry, error: Error) -> Result<Response> {
    match &mut entry.expect {
        Expect::Values(batched) if batched.settled > 0 => {
            let mut outcomes = std::mem::take(&mut batched.outcomes);
            for outcome in outcomes.iter_mut().skip(batched.settled) {
                *outcome = Err(error.clone());
            }
            Ok(Response::Values(outcomes))
        }
        _ => Err(error),
    }
}

enum Answer {
    /// There is more to come.
    More,
    Final(Result<Response>),
    /// It is answered, and nothing behind it can be trusted.
    Fatal(Result<Response>, Violation),
}

/// What `reply` means to the request that is next in line; `token` lacks only the unique number.
fn answer(
    entry: &mut Entry,
    reply: Reply,
    opaque_on_miss: bool,
    token: CasToken,
) -> Result<Answer, Violation> {
    if let Expect::Values(batched) = &mut entry.expect {
        return batched.answer(entry.opaque, reply);
    }
    check_opaque(entry.opaque, &reply, opaque_on_miss)?;
    let response = match (&mut entry.expect, reply) {
        (Expect::Value { with_cas }, Reply::Value { header, data }) => {
            let cas = header.cas.filter(|_| *with_cas);
            let cas = cas.map(|unique| CasToken { unique, ..token });
            Response::Value(value(header, data, cas))
        }
        (
            Expect::Value { .. },
            Reply::Code {
                code: Code::Miss, ..
            },
        ) => Response::Value(None),
        (Expect::Found, Reply::Value { header, data }) => {
            let token = header.cas.map(|unique| CasToken { unique, ..token });
            Response::Found(Box::new(lookup(header, data, token)))
        }
        (
            Expect::Found,
            Reply::Code {
                code: Code::Miss, ..
            },
        ) => Response::Found(Box::new(Lookup::NOTHING)),
        (_, Reply::TooLarge { length, .. }) => return Ok(Answer::Final(Err(too_large(length)))),

        (Expect::Stored, Reply::Code { code, .. }) => match code {
            Code::Done => Response::Stored(true),
            // NF is what an append to nothing gets from some versions.
            Code::NotStored | Code::NotFound => Response::Stored(false),
            code => return Err(wrong_kind(entry, code)),
        },
        (Expect::Swapped { .. }, Reply::Code { code, .. }) => Response::Swapped(match code {
            Code::Done => CasOutcome::Stored,
            Code::Exists => CasOutcome::Exists,
            Code::NotFound => CasOutcome::NotFound,
            code => return Err(wrong_kind(entry, code)),
        }),
        (Expect::Deleted, Reply::Code { code, .. }) => match code {
            Code::Done => Response::Deleted(true),
            Code::NotFound => Response::Deleted(false),
            code => return Err(wrong_kind(entry, code)),
        },
        (Expect::Touched, Reply::Code { code, .. }) => match code {
            Code::Done => Response::Touched(true),
            Code::Miss => Response::Touched(false),
            code => return Err(wrong_kind(entry, code)),
        },
        (Expect::Counter, Reply::Value { data, .. }) => {
            // decr leaves spaces behind a number that got shorter.
            match reply::number(data.trim_ascii_end()) {
                Some(number) => Response::Counter(Some(number)),
                None => return Err(Violation::Unparsable(data.escape_ascii().to_string())),
            }
        }
        (
            Expect::Counter,
            Reply::Code {
                code: Code::NotFound,
                ..
            },
        ) => Response::Counter(None),

        (Expect::Version, Reply::Version(version)) => Response::Version(version),
        (Expect::Flushed, Reply::Ok) => Response::Flushed,
        // Each is told once: more of the same would go on for ever.
        (Expect::Stats(stats), Reply::Stat(name, counter))
            if stats.len() < MAX_STATS && !stats.contains_key(&name) =>
        {
            stats.insert(name, counter);
            return Ok(Answer::More);
        }
        (Expect::Stats(stats), Reply::StatsEnd) => Response::Stats(std::mem::take(&mut **stats)),

        (_, Reply::Failure(failure, text)) => return failed(entry, failure, text),
        (expect, reply) => {
            return Err(Violation::WrongKind {
                request: expect.name(),
                found: reply.name(),
            });
        }
    };
    Ok(Answer::Final(Ok(response)))
}

fn check_opaque(expected: u32, reply: &Reply, opaque_on_miss: bool) -> Result<(), Violation> {
    let found = match reply {
        // Before 1.6.18 a miss carries none. It can do no more harm than a miss, and a stream out
        // of step is found out by the next reply that carries one.
        Reply::Code {
            code: Code::Miss,
            header,
        } if !opaque_on_miss && header.opaque.is_none() => {
            return Ok(());
        }
        Reply::Value { header, .. }
        | Reply::TooLarge { header, .. }
        | Reply::Code { header, .. } => header.opaque,
        // The lines of the classic protocol carry none.
        _ => return Ok(()),
    };
    if found == Some(expected) {
        Ok(())
    } else {
        Err(Violation::WrongOpaque { expected, found })
    }
}

fn value(header: Header, data: Bytes, cas: Option<CasToken>) -> Option<Value> {
    let there = !is_nothing(&header, &data) && !is_absent(header.client_flags, &data);
    there.then(|| Value::new(data, header.client_flags).with_cas(cas))
}

fn lookup(header: Header, data: Bytes, token: Option<CasToken>) -> Lookup {
    let left = header.left.and_then(|left| u64::try_from(left).ok());
    let left = left.map(Duration::from_secs);
    let lease = match is_placeholder(header.client_flags, &data) {
        // Whatever the server says, the lease is not ours.
        true => LeaseState::Taken,
        false => header.lease.unwrap_or(LeaseState::Free),
    };
    let found = if is_nothing(&header, &data) {
        Found::Nothing
    } else if is_absent(header.client_flags, &data) {
        Found::Absent { left }
    } else {
        let value = Value::new(data, header.client_flags);
        Found::Value { value, left }
    };
    Lookup::new(found, token, lease)
}

/// Whether there is no value yet, or none any more: the placeholder of a lease, be it of one who asks
/// in the classic protocol, or what was marked as outdated.
#[inline]
fn is_nothing(header: &Header, data: &[u8]) -> bool {
    header.outdated
        || (header.lease.is_some() && data.is_empty())
        || is_placeholder(header.client_flags, data)
}

/// A value that was skipped.
pub(crate) fn too_large(length: u64) -> Error {
    let message = format!("the stored value has {length} bytes, over this client's limit");
    Error::new(ErrorKind::ValueTooLarge, message).with_sent(Sent::Yes)
}

fn wrong_kind(entry: &Entry, code: Code) -> Violation {
    let reply = Reply::Code {
        code,
        header: Header::default(),
    };
    Violation::WrongKind {
        request: entry.expect.name(),
        found: reply.name(),
    }
}

/// An error line, to a request that is not a multi-key read.
fn failed(entry: &Entry, failure: Failure, text: String) -> Result<Answer, Violation> {
    // We only send commands that every supported version knows.
    if failure == Failure::UnknownCommand {
        return Err(Violation::WrongKind {
            request: entry.expect.name(),
            found: "ERROR",
        });
    }
    let writes = matches!(entry.expect, Expect::Stored | Expect::Swapped { .. });
    let outcome = Err(failure.error(text.clone()));
    Ok(if failure == Failure::Client && writes {
        Answer::Fatal(outcome, Violation::FramingLost(text))
    } else {
        Answer::Final(outcome)
    })
}

impl Batched {
    /// Hits carry the opaque of their key and come in order; misses are silent; `MN` is the end.
    fn answer(&mut self, first: u32, reply: Reply) -> Result<Answer, Violation> {
        let (header, outcome) = match reply {
            Reply::Value { header, data } => (header, Ok(value(header, data, None))),
            Reply::TooLarge { header, length } => (header, Err(too_large(length))),
            Reply::BatchEnd => {
                let outcomes = std::mem::take(&mut self.outcomes);
                return Ok(Answer::Final(Ok(Response::Values(outcomes))));
            }
            Reply::Failure(_, text) => return Err(Violation::ErrorInBatch(text)),
            other => {
                return Err(Violation::WrongKind {
                    request: "a multi-key read",
                    found: other.name(),
                });
            }
        };
        let index = header
            .opaque
            .map(|opaque| opaque.wrapping_sub(first) as usize);
        match index.filter(|index| (self.settled..self.count).contains(index)) {
            Some(index) => {
                self.settled = index + 1;
                // Empty when its caller has gone or timed out: what comes late is discarded.
                if let Some(slot) = self.outcomes.get_mut(index) {
                    *slot = outcome;
                }
                Ok(Answer::More)
            }
            None => Err(Violation::WrongOpaque {
                expected: first.wrapping_add(self.settled as u32),
                found: header.opaque,
            }),
        }
    }
}
