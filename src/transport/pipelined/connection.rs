//! A connection's task: connects when there is something to send, then reads, writes and keeps
//! the time of one connection until it ends, and so on until the last handle is gone.

use std::future::{Future, poll_fn};
use std::io::IoSlice;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWrite as _};
use tokio::time::{Instant, Sleep, sleep_until};

use super::alarm::Waiter;
use super::slot::{Node, Phase, Slot};
use crate::error::{Charge, Error, ErrorKind};
use crate::executor::{LATE, after};
use crate::protocol::{Batch, Parser, Reply, ServerVersion, Violation};
use crate::transport::greeting::Connected;
use crate::transport::site::{backoff, shut_down};
use crate::transport::{BoxStream, ConnectFailure, Event};

/// The size of the read buffer of a connection on which little comes: enough for a probe's reply.
const SMALL_BUFFER: usize = 4 * 1024;

/// Of one on which reads have filled it: a few hundred small replies.
const READ_BUFFER: usize = 64 * 1024;

/// Reads in a row before writes and timers get their turn.
const READS_IN_A_ROW: usize = 16;

/// Parts of one write. Linux takes 1,024; a few large values fill the socket anyway.
const WRITE_SLICES: usize = 32;

/// A connection that lived this long, or answered something in time, was a good one: its
/// successor is dialled at once.
const GOOD_LIFE: Duration = Duration::from_secs(1);

/// Why a connection ended.
enum End {
    /// The last handle is gone.
    Closed,
    /// The server closed it, or the network did.
    Lost(Error),
    /// It said something it should not have.
    Violated(Violation),
    /// It does not answer.
    Unresponsive(Error),
    /// The node is out.
    Drained(Error),
}

/// The task of slot `index`. What must happen at its end is armed before its first poll: a
/// runtime that is shut down drops what it is given.
pub(super) fn task(node: Arc<Node>, index: usize) -> impl Future<Output = ()> + Send {
    run(Guard { node, index })
}

async fn run(guard: Guard) {
    let (node, slot) = (&guard.node, guard.node.slot(guard.index));
    // Connects that failed, and connections that came to nothing, in a row.
    let mut failures = 0;
    // The connection before did not answer, nor has the present one so far.
    let mut suspect = false;
    let mut redial = false;
    loop {
        // A connection that ended because we wanted it to.
        let mut given_up = None;
        if !redial && !work(slot).await {
            return;
        }
        let Some(outcome) = connect_while_queueing(node, slot).await else {
            return;
        };
        let error = match outcome {
            Err((failure, error)) => {
                redial = false;
                let error = error.at_node(&node.site.name);
                if failure == ConnectFailure::OtherProtocol {
                    // Whoever waits is told to ask in that.
                    (suspect, failures) = (false, 0);
                    node.fail_all(slot, &error, Phase::Idle, None);
                    continue;
                }
                if suspect && failure.is_the_nodes() {
                    node.set_dead(&mut slot.lock(), true);
                }
                // The judgement first, so that what is moved now does not come back here.
                node.site.report(&Event::ConnectFailed {
                    failure,
                    error: &error,
                    others_up: node.site.up(),
                    untried: node.has_untried(),
                    most_dead: node.most_dead(),
                });
                error
            }
            Ok(connected) => {
                let since = Instant::now();
                let mut answered = false;
                let (end, stream) = serve(node, slot, connected, &mut answered).await;
                given_up = stream;
                suspect &= !answered;
                redial = answered || since.elapsed() > GOOD_LIFE;
                if redial {
                    failures = 0;
                }
                match end {
                    End::Closed => {
                        // Its cluster may go on, and want to know when that has ended.
                        let error = node.site.shut_down();
                        node.fail_all(slot, &error, Phase::Closed, given_up);
                        return;
                    }
                    End::Lost(error) => {
                        given_up = None;
                        error.at_node(&node.site.name)
                    }
                    End::Violated(violation) => Error::from(violation).at_node(&node.site.name),
                    End::Drained(error) => {
                        // Whatever is asked of it next is asked once it is known to answer.
                        (suspect, failures, redial) = (false, 0, false);
                        node.set_dead(&mut slot.lock(), false);
                        node.fail_all(slot, &error, Phase::Idle, given_up);
                        continue;
                    }
                    End::Unresponsive(error) => {
                        let error = error.at_node(&node.site.name);
                        let again = std::mem::replace(&mut suspect, true);
                        if again {
                            node.set_dead(&mut slot.lock(), true);
                        }
                        node.site.report(&Event::Unresponsive {
                            error: &error,
                            most_dead: again && node.most_dead(),
                        });
                        // What waited behind it has waited long enough.
                        node.fail_all(slot, &error, Phase::Connecting, given_up.take());
                        redial |= !again;
                        error
                    }
                }
            }
        };
        if redial {
            // What is queued goes over the next connection.
            node.fail_in_flight(slot, &error, Phase::Connecting, given_up);
        } else {
            let until = Instant::now() + backoff(failures);
            let broken = Phase::Broken {
                until,
                error: error.clone(),
            };
            node.fail_all(slot, &error, broken, given_up);
            failures = failures.saturating_add(1);
        }
    }
}

/// Ends what waits for a task that is dropped before its time, because its runtime was shut down
/// or it panicked. The next request starts a new one, if it can.
struct Guard {
    node: Arc<Node>,
    index: usize,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = self.node.slot(self.index);
        self.node.set_dead(&mut slot.lock(), false);
        let error = match slot.lock().phase {
            Phase::Closed => shut_down(),
            _ => Error::new(
                ErrorKind::Shutdown,
                "the runtime of the connection has ended",
            ),
        };
        let error = error.at_node(&self.node.site.name);
        self.node.fail_all(slot, &error, Phase::Unstarted, None);
    }
}

/// Waits until something is queued; false when the slot is closed.
async fn work(slot: &Slot) -> bool {
    poll_fn(|cx| {
        let mut state = slot.lock();
        match state.phase {
            Phase::Closed => Poll::Ready(false),
            _ if state.pipeline.has_queued() => {
                state.phase = Phase::Connecting;
                Poll::Ready(true)
            }
            _ => {
                state.park(cx.waker());
                Poll::Pending
            }
        }
    })
    .await
}

/// Connects, while requests queue up and may run out of time. `None` when the slot is closed.
async fn connect_while_queueing(
    node: &Node,
    slot: &Slot,
) -> Option<Result<Connected, (ConnectFailure, Error)>> {
    let mut connecting = pin!(node.site.connect(true));
    let mut timer = Timer::new();
    let mut woken = Vec::new();
    poll_fn(|cx| {
        if let Poll::Ready(outcome) = connecting.as_mut().poll(cx) {
            return Poll::Ready(Some(outcome));
        }
        loop {
            let mut state = slot.lock();
            if let Phase::Closed = state.phase {
                return Poll::Ready(None);
            }
            let now = Instant::now();
            if state
                .pipeline
                .earliest_deadline()
                .is_some_and(|due| due <= now)
            {
                state
                    .pipeline
                    .expire(now, Charge::Nobody, &mut woken, |_| {});
            }
            state.park(cx.waker());
            let next = state.pipeline.earliest_deadline();
            drop(state);
            woken.drain(..).for_each(Waiter::wake);
            if timer.poll(next, cx).is_pending() {
                return Poll::Pending;
            }
        }
    })
    .await
}

/// Runs one connection until it ends, and hands it back.
async fn serve(
    node: &Node,
    slot: &Slot,
    connected: Connected,
    answered: &mut bool,
) -> (End, Option<BoxStream>) {
    let up = node.site.connection_up();
    {
        let mut state = slot.lock();
        if let Phase::Closed = state.phase {
            return (End::Closed, None);
        }
        state.phase = Phase::Up;
        let version = connected.version;
        let opaque_on_miss = version.is_some_and(ServerVersion::has_opaque_on_miss);
        state.pipeline.connected(up.number, opaque_on_miss);
    }
    let mut connection = Connection::new(connected.stream, node);
    let end = poll_fn(|cx| connection.poll(node, slot, answered, cx)).await;
    (end, Some(connection.stream))
}

/// A timer that is moved only forward when it must be earlier; firing early costs one look.
struct Timer {
    sleep: Option<Pin<Box<Sleep>>>,
    armed: Option<Instant>,
}

impl Timer {
    fn new() -> Self {
        Self {
            sleep: None,
            armed: None,
        }
    }

    /// Ready when the time it was armed for has come.
    fn poll(&mut self, next: Option<Instant>, cx: &mut Context<'_>) -> Poll<Instant> {
        match (next, self.armed) {
            (Some(next), armed) if armed.is_none_or(|armed| next < armed) => {
                self.armed = Some(next);
                match &mut self.sleep {
                    Some(sleep) => sleep.as_mut().reset(next),
                    None => self.sleep = Some(Box::pin(sleep_until(next))),
                }
            }
            (_, None) => return Poll::Pending,
            _ => {}
        }
        match &mut self.sleep {
            Some(sleep) => {
                ready!(sleep.as_mut().poll(cx));
                let fired = self.armed.take();
                fired.map_or(Poll::Pending, Poll::Ready)
            }
            None => Poll::Pending,
        }
    }
}

/// Time-outs in a row, by when their requests were sent.
#[derive(Clone, Copy)]
struct Streak {
    first: Instant,
    last: Instant,
    count: u32,
}

struct Connection {
    stream: BoxStream,
    parser: Parser,
    input: BytesMut,
    /// The size of the read buffer; a quarter of it is the least room for a read.
    room: usize,
    batch: Batch,
    /// The task has let others run once since something was queued, so that they could queue
    /// more: the batch is written after one such yield.
    yielded: bool,
    /// Something was written since the stream was last flushed.
    unflushed: bool,
    timer: Timer,
    /// When the last byte came, or when it could first have come.
    heard_at: Instant,
    streak: Option<Streak>,
    attempt_timeout: Duration,
    stall_timeout: Duration,
    /// If anybody wants to know.
    slow_after: Option<Duration>,
    timeouts_to_close: u32,
    /// Kept for their memory.
    replies: Vec<Reply>,
    woken: Vec<Waiter>,
}

impl Connection {
    fn new(stream: BoxStream, node: &Node) -> Self {
        let settings = node.site.settings.load();
        Self {
            stream,
            parser: Parser::new(settings.limits.value),
            input: BytesMut::with_capacity(SMALL_BUFFER),
            room: SMALL_BUFFER,
            batch: Batch::default(),
            yielded: false,
            unflushed: false,
            timer: Timer::new(),
            heard_at: Instant::now(),
            streak: None,
            attempt_timeout: settings.attempt_timeout,
            stall_timeout: settings.stall_after(),
            slow_after: node.site.slow_after(),
            timeouts_to_close: settings.timeouts_to_close,
            replies: Vec::new(),
            woken: Vec::new(),
        }
    }

    /// The settings may have changed.
    fn refresh(&mut self, node: &Node) {
        let settings = node.site.settings.load();
        self.attempt_timeout = settings.attempt_timeout;
        self.stall_timeout = settings.stall_after();
        self.timeouts_to_close = settings.timeouts_to_close;
        self.slow_after = node.site.slow_after();
    }

    /// Reading comes first: what has arrived must be known before a time-out is judged, and
    /// before the end of the stream is.
    fn poll(
        &mut self,
        node: &Node,
        slot: &Slot,
        answered: &mut bool,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        self.refresh(node);
        let drained = match self.read(node, slot, answered, cx) {
            Ok(drained) => drained,
            Err(end) => return Poll::Ready(end),
        };
        match &slot.lock().phase {
            Phase::Closed => return Poll::Ready(End::Closed),
            Phase::Draining(error) => return Poll::Ready(End::Drained(error.clone())),
            _ => {}
        }
        if let Err(error) = self.write(node, slot, cx) {
            // Its last replies may still be on their way up.
            let end = self.read(node, slot, answered, cx).err();
            return Poll::Ready(end.unwrap_or_else(|| lost("writing failed", error)));
        }
        if !drained {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            let mut state = slot.lock();
            // Also while the socket takes nothing: what is queued then has a deadline, too.
            state.park(cx.waker());
            let pipeline = &state.pipeline;
            let stalls_at = pipeline
                .oldest_sent_at()
                .map(|oldest| self.stalls_at(oldest));
            let slow_at = self
                .slow_after
                .and_then(|slow_after| Some(after(pipeline.oldest_not_slow()?, slow_after)));
            let next = [pipeline.earliest_deadline(), stalls_at, slow_at]
                .into_iter()
                .flatten()
                .min();
            drop(state);
            let fired = ready!(self.timer.poll(next, cx));
            if let Some(end) = self.judge(slot, fired) {
                return Poll::Ready(end);
            }
        }
    }

    fn stalls_at(&self, oldest_sent_at: Instant) -> Instant {
        after(oldest_sent_at.max(self.heard_at), self.stall_timeout)
    }

    /// Reads until there is nothing more, and settles what was answered. False if there may be
    /// more, once writes had their turn.
    fn read(
        &mut self,
        node: &Node,
        slot: &Slot,
        answered: &mut bool,
        cx: &mut Context<'_>,
    ) -> Result<bool, End> {
        for _ in 0..READS_IN_A_ROW {
            let least = self.room / 4;
            if self.input.capacity() - self.input.len() < least {
                self.input.reserve(self.room - least);
            }
            let read = pin!(self.stream.read_buf(&mut self.input)).poll(cx);
            match read {
                Poll::Pending => return Ok(true),
                Poll::Ready(Ok(0)) => {
                    let error = std::io::ErrorKind::UnexpectedEof.into();
                    return Err(lost("the server closed it", error));
                }
                Poll::Ready(Ok(_)) => {
                    self.heard_at = Instant::now();
                    if self.input.len() == self.input.capacity() {
                        self.room = (self.room * 4).min(READ_BUFFER);
                    }
                }
                Poll::Ready(Err(error)) => return Err(lost("reading failed", error)),
            }
            self.settle(node, slot, answered).map_err(End::Violated)?;
        }
        Ok(false)
    }

    /// Parses without the lock, settles under it, wakes after it.
    fn settle(&mut self, node: &Node, slot: &Slot, answered: &mut bool) -> Result<(), Violation> {
        let mut parsed = Ok(());
        loop {
            match self.parser.parse(&mut self.input) {
                Ok(Some(reply)) => self.replies.push(reply),
                Ok(None) => break,
                Err(violation) => {
                    parsed = Err(violation);
                    break;
                }
            }
        }
        if !self.replies.is_empty() {
            let (mut timely, mut done) = (false, 0);
            let (mut slow, mut first_slow) = (0, None);
            let mut state = slot.lock();
            for reply in self.replies.drain(..) {
                match state.pipeline.reply(reply, &mut self.woken) {
                    Ok(matched) => {
                        timely |= matched.timely;
                        done += u32::from(matched.timely && matched.last);
                        slow += u32::from(matched.slow.is_some());
                        first_slow = first_slow.or(matched.slow);
                    }
                    Err(violation) => {
                        parsed = Err(violation);
                        break;
                    }
                }
            }
            if timely {
                node.set_dead(&mut state, false);
            }
            drop(state);
            if timely {
                self.streak = None;
                *answered = true;
            }
            if done > 0 {
                node.site.answered(done, self.heard_at);
            }
            if let Some(sent_at) = first_slow {
                node.site.report(&Event::Slow {
                    requests: slow,
                    sent_at,
                });
            }
            self.woken.drain(..).for_each(Waiter::wake);
        }
        parsed
    }

    /// Writes what is queued until the socket takes no more.
    fn write(&mut self, node: &Node, slot: &Slot, cx: &mut Context<'_>) -> std::io::Result<()> {
        loop {
            if self.batch.is_empty() {
                let mut state = slot.lock();
                if !state.pipeline.has_queued() {
                    self.yielded = false;
                    drop(state);
                    return self.flush(cx);
                }
                if !self.yielded {
                    self.yielded = true;
                    cx.waker().wake_by_ref();
                    return Ok(());
                }
                self.yielded = false;
                let (now, newest) = (Instant::now(), node.site.newest());
                let attempt = self.attempt_timeout;
                let (batch, woken) = (&mut self.batch, &mut self.woken);
                state.pipeline.take(batch, now, attempt, newest, woken);
                drop(state);
                self.woken.drain(..).for_each(Waiter::wake);
                continue;
            }
            let mut slices = [IoSlice::new(&[]); WRITE_SLICES];
            let filled = self.batch.slices(&mut slices);
            let stream = Pin::new(&mut self.stream);
            let written = match stream.poll_write_vectored(cx, &slices[..filled]) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(0)) => return Err(std::io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => written?,
            };
            self.batch.advance(written);
            self.unflushed = true;
            slot.lock().pipeline.wrote(written);
        }
    }

    /// A stream may keep what it took, TLS for one, until it is asked for it.
    fn flush(&mut self, cx: &mut Context<'_>) -> std::io::Result<()> {
        if self.unflushed
            && let Poll::Ready(flushed) = Pin::new(&mut self.stream).poll_flush(cx)
        {
            flushed?;
            self.unflushed = false;
        }
        Ok(())
    }

    /// Something was due at `due`: time-outs, slow answers, or the end of a stalled connection.
    fn judge(&mut self, slot: &Slot, due: Instant) -> Option<End> {
        let now = Instant::now();
        let late = now > due + LATE;
        let charge = match late {
            true => Charge::OurLateness,
            false => Charge::Node,
        };
        let streak = &mut self.streak;
        let mut state = slot.lock();
        state
            .pipeline
            .expire(now, charge, &mut self.woken, |sent_at| {
                let streak = streak.get_or_insert(Streak {
                    first: sent_at,
                    last: sent_at,
                    count: 0,
                });
                streak.last = streak.last.max(sent_at);
                streak.count += 1;
            });
        let oldest = state.pipeline.oldest_sent_at();
        if let Some(slow_after) = self.slow_after {
            state.pipeline.note_slow(now, slow_after, late);
        }
        drop(state);
        self.woken.drain(..).for_each(Waiter::wake);
        if late {
            // What we did not do in time says nothing about the server: it gets its time again.
            self.heard_at = now;
            return None;
        }
        if oldest.is_some_and(|oldest| self.stalls_at(oldest) <= now) {
            let message = format!("no byte received for {:?}", self.stall_timeout);
            return Some(unresponsive(message));
        }
        let streak = self.streak?;
        // A burst that times out together is one event, not many.
        let spread = streak.last - streak.first;
        if streak.count >= self.timeouts_to_close && spread >= self.attempt_timeout {
            let message = format!("{} time-outs in a row", streak.count);
            return Some(unresponsive(message));
        }
        None
    }
}

fn lost(what: &'static str, error: std::io::Error) -> End {
    let message = format!("{what}: {error}");
    let lost = Error::new(ErrorKind::ConnectionLost, message).charged_to(Charge::Node);
    End::Lost(lost.with_source(error))
}

fn unresponsive(message: String) -> End {
    let error = Error::new(ErrorKind::Unresponsive, message).charged_to(Charge::Node);
    End::Unresponsive(error)
}
