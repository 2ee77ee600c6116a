//! One connection: bytes in, requests executed, replies out, faults applied on the way.
//!
//! Reading and writing go on side by side, so a late reply does not keep later requests from being read. Replies pass
//! two queues, as in memcached: a batch is *unflushed* until all that was read is executed, and then *ready* to be sent.
//! While a value is incomplete nothing is flushed, and a command can throw unflushed replies away.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::Shared;
use super::execute::Then;
use super::faults::{Admission, Faults, Signal};
use super::parser::{Parsed, Parser};

/// memcached's read buffer: it executes at most so many bytes of commands in one go.
const READ_BUFFER: usize = 16 * 1_024;
/// Unsent bytes at which nothing more is read or executed until the peer has taken some.
const MOST_UNSENT: usize = 1 << 20;
/// Requests after which memcached interrupts a batch to serve other connections, sending what it has.
const YIELD_AFTER: u32 = 21;

/// A reply, or several in a row.
#[derive(Debug)]
struct Chunk {
    bytes: BytesMut,
    /// Not to be sent before.
    due: Option<Instant>,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Not yet.
    Open,
    /// When everything ready is written.
    Drained,
    Now,
    Reset,
}

struct Connection {
    shared: Arc<Shared>,
    faults: watch::Receiver<Faults>,
    current: Faults,
    epoch: u64,
    parser: Parser,
    input: BytesMut,
    reply: BytesMut,
    unflushed: VecDeque<Chunk>,
    ready: VecDeque<Chunk>,
    unsent: usize,
    end: End,
}

/// Serves `stream` until it ends. `arm_reset` makes dropping the stream reset it.
pub(super) async fn serve<S>(shared: Arc<Shared>, mut stream: S, arm_reset: fn(&S))
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    // Registered before the faults are read: whoever refuses connections from here on sees this one, and closes it.
    let (registration, mut signals) = shared.register();
    let faults = shared.faults.subscribe();
    let current = faults.borrow().clone();
    if current.shut_down {
        return;
    }
    match current.admission {
        Admission::Silent => return stay_silent(faults, signals, stream, arm_reset).await,
        Admission::TooMany => {
            // The peer may be gone already, which is what this answer is about to achieve anyway.
            let _ = stream
                .write_all(b"ERROR Too many open connections\r\n")
                .await;
            let _ = stream.shutdown().await;
            return;
        }
        Admission::Refuse => return,
        Admission::Serve => {}
    }
    let mut connection = Connection {
        parser: Parser::new(shared.largest_item, current.manner.credentials.is_none()),
        epoch: registration.epoch,
        shared: Arc::clone(&shared),
        faults,
        current,
        input: BytesMut::new(),
        reply: BytesMut::new(),
        unflushed: VecDeque::new(),
        ready: VecDeque::new(),
        unsent: 0,
        end: End::Open,
    };
    let (mut reader, mut writer) = tokio::io::split(stream);
    connection.run(&mut reader, &mut writer, &mut signals).await;
    if connection.end == End::Reset {
        arm_reset(&reader.unsplit(writer));
    } else if connection.end == End::Drained {
        let _ = writer.shutdown().await;
    }
}

/// Holds the connection open until something ends it.
async fn stay_silent<S>(
    mut faults: watch::Receiver<Faults>,
    mut signals: mpsc::UnboundedReceiver<Signal>,
    mut stream: S,
    arm_reset: fn(&S),
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        tokio::select! {
            signal = signals.recv() => match signal {
                Some(Signal::Push(bytes)) => {
                    if stream.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
                Some(Signal::Reset) => return arm_reset(&stream),
                Some(Signal::Close) | None => return,
            },
            changed = faults.changed() => if changed.is_err() || faults.borrow().shut_down {
                return;
            },
        }
    }
}

impl Connection {
    async fn run<R, W>(
        &mut self,
        reader: &mut R,
        writer: &mut W,
        signals: &mut mpsc::UnboundedReceiver<Signal>,
    ) where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            self.work();
            match self.end {
                End::Now | End::Reset => return,
                End::Drained if self.ready.is_empty() => return,
                End::Drained | End::Open => {}
            }
            let running = !self.current.stalled;
            let can_read = running && self.end == End::Open && self.unsent < MOST_UNSENT;
            let due = self.ready.front().and_then(|chunk| chunk.due);
            let is_due = due.is_none_or(|due| due <= Instant::now());
            let can_write = running && is_due && !self.ready.is_empty();
            if can_read {
                let wanted = self.parser.missing(self.input.len());
                self.input
                    .reserve(if wanted > 0 { wanted } else { READ_BUFFER });
            }
            tokio::select! {
                biased;
                signal = signals.recv() => self.obey(signal),
                _ = self.faults.changed() => self.current = self.faults.borrow_and_update().clone(),
                written = write_front(&mut self.ready, writer), if can_write => match written {
                    Ok(written) => self.unsent -= written,
                    Err(_) => self.end = End::Now,
                },
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if running && !is_due => {}
                read = reader.read_buf(&mut self.input), if can_read => match read {
                    Ok(0) => self.end = End::Drained,
                    Ok(_) => {}
                    Err(_) => self.end = End::Now,
                },
            }
            if self.faults.has_changed().unwrap_or(false) {
                self.current = self.faults.borrow_and_update().clone();
            }
            if self.current.shut_down {
                self.end = End::Now;
            }
        }
    }

    fn obey(&mut self, signal: Option<Signal>) {
        match signal {
            Some(Signal::Close) | None => self.end = End::Now,
            Some(Signal::Reset) => self.end = End::Reset,
            Some(Signal::Push(bytes)) => {
                self.unsent += bytes.len();
                // Ahead of what is not due, which is never half written.
                let now = Instant::now();
                let waiting = self
                    .ready
                    .iter()
                    .position(|chunk| chunk.due.is_some_and(|due| due > now));
                let chunk = Chunk {
                    bytes: BytesMut::from(&bytes[..]),
                    due: None,
                };
                self.ready
                    .insert(waiting.unwrap_or(self.ready.len()), chunk);
            }
        }
    }

    /// Executes what has been read.
    fn work(&mut self) {
        let arrived = Instant::now();
        let mut executed = 0;
        while self.end == End::Open && !self.current.stalled {
            if self.unsent >= MOST_UNSENT {
                // The rest of the input waits until the peer has taken some, so it must get some.
                self.flush();
                return;
            }
            match self.parser.next(&mut self.input, &self.current.manner) {
                Parsed::Incomplete => break,
                Parsed::Close => self.end = End::Now,
                Parsed::Request(request) => {
                    let executed_as = self.shared.execute(
                        &request,
                        &mut self.reply,
                        self.epoch,
                        &self.current.manner.version,
                    );
                    let Some(then) = executed_as else {
                        self.end = End::Now;
                        break;
                    };
                    if then == Then::Discard {
                        self.unsent -= self
                            .unflushed
                            .drain(..)
                            .map(|chunk| chunk.bytes.len())
                            .sum::<usize>();
                    }
                    self.answer(&request.line, arrived);
                    executed += 1;
                    if then == Then::Flush || executed % YIELD_AFTER == 0 {
                        self.flush();
                    }
                    match then {
                        Then::Close => {
                            self.flush();
                            self.end = End::Drained;
                        }
                        Then::Abort => self.end = End::Now,
                        Then::Continue | Then::Flush | Then::Discard => {}
                    }
                    // A fault that was set meanwhile holds from the next request on.
                    if self.faults.has_changed().unwrap_or(false) {
                        self.current = self.faults.borrow_and_update().clone();
                    }
                }
            }
        }
        if !self.parser.awaits_value() {
            self.flush();
        }
    }

    /// Queues the reply, changed as the faults want it.
    fn answer(&mut self, line: &[u8], arrived: Instant) {
        let mut bytes = self.reply.split();
        if let Some(rewrite) = &self.current.rewrite {
            bytes = BytesMut::from(&rewrite(line, bytes.to_vec())[..]);
        }
        if bytes.is_empty() {
            return;
        }
        let due = self
            .current
            .delay
            .and_then(|delay| self.shared.is_late(delay))
            .map(|by: Duration| arrived + by);
        let cut = self.current.cut;
        bytes.truncate(cut.unwrap_or(usize::MAX));
        self.unsent += bytes.len();
        match self.unflushed.back_mut() {
            _ if bytes.is_empty() => {}
            Some(last) if due.is_none() && last.due.is_none() => last.bytes.unsplit(bytes),
            _ => self.unflushed.push_back(Chunk { bytes, due }),
        }
        if cut.is_some() {
            self.flush();
            self.end = End::Drained;
        }
    }

    fn flush(&mut self) {
        self.ready.append(&mut self.unflushed);
    }
}

/// Writes some of the front chunk.
async fn write_front<W: AsyncWrite + Unpin>(
    ready: &mut VecDeque<Chunk>,
    writer: &mut W,
) -> std::io::Result<usize> {
    let Some(chunk) = ready.front_mut() else {
        return Ok(0);
    };
    let written = writer.write_buf(&mut chunk.bytes).await?;
    if written == 0 {
        return Err(std::io::ErrorKind::WriteZero.into());
    }
    if chunk.bytes.is_empty() {
        ready.pop_front();
    }
    Ok(written)
}
