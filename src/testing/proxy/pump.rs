//! One direction of a connection: bytes in, a queue, and out again as the toxics want it.
//!
//! A chunk remembers when it arrived, not when it is due, so that new toxics hold for what is already on its way. The end
//! of the stream stands in the queue as well: it does not overtake the bytes before it.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::Instant;

use super::toxics::{Ending, Gate, Limit, Toxics};
use super::{Counters, State};

/// The most that is read at once.
const CHUNK: usize = 16 * 1_024;
/// What may be queued in one direction, with the memory that the queue itself takes.
const MOST_QUEUED: usize = 4 << 20;
const OVERHEAD: usize = size_of::<Chunk>();
/// Under a bandwidth of so many bytes a second, one byte is written at once.
const WRITES_PER_SECOND: u64 = 50;
/// How much of a bandwidth may be made up for after a late timer.
const CREDIT: Duration = Duration::from_millis(20);

struct Chunk {
    bytes: Bytes,
    /// Comes after the bytes, of which there are none.
    end: Option<Ending>,
    arrived: Instant,
    /// Counts the chunks of all connections from 1; an end has none.
    number: u64,
    luck: f64,
}

pub(super) struct Pump<'a> {
    /// Its direction's place in arrays of two.
    lane: usize,
    state: watch::Receiver<State>,
    counters: &'a Counters,
    /// Whether each lane's receiver has reset the connection, which only the first to touch the socket gets to know.
    was_reset: &'a [AtomicBool; 2],
    toxics: Toxics,
    generation: u64,
    half_closes: u64,
    random: fastrand::Rng,
    queue: VecDeque<Chunk>,
    queued: usize,
    /// Cut off the front of the queue and to be written now.
    outgoing: BytesMut,
    /// Bytes and chunks delivered under these toxics.
    passed: u64,
    chunks: u64,
    not_before: Instant,
    /// When the bandwidth would have delivered all that was.
    paid_until: Instant,
    /// There is nothing more to be read.
    ended: bool,
    /// Nothing more is delivered: the receiver has gone, or has got or is to get the end of the stream.
    shut: bool,
}

impl<'a> Pump<'a> {
    /// `half_closes` is as of when the connection began.
    pub(super) fn new(
        lane: usize,
        number: u64,
        state: watch::Receiver<State>,
        half_closes: u64,
        counters: &'a Counters,
        was_reset: &'a [AtomicBool; 2],
    ) -> Self {
        let now = Instant::now();
        let (toxics, generation) = {
            let lane = &state.borrow().lanes[lane];
            (lane.toxics, lane.generation)
        };
        Self {
            lane,
            state,
            counters,
            was_reset,
            toxics,
            generation,
            half_closes,
            random: fastrand::Rng::with_seed(number * 2 + lane as u64),
            queue: VecDeque::new(),
            queued: 0,
            outgoing: BytesMut::new(),
            passed: 0,
            chunks: 0,
            not_before: now,
            paid_until: now,
            ended: false,
            shut: false,
        }
    }

    /// Forwards until the end of the stream has been read and delivered, or the connection has to end.
    pub(super) async fn run<R, W>(mut self, mut reader: R, mut writer: W) -> Result<(), Ending>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut buffer = vec![0; CHUNK];
        loop {
            self.obey();
            let is_open = self.toxics.gate == Gate::Open;
            let mut due = None;
            if self.outgoing.is_empty() {
                if is_open && let Some(ending) = self.limit_reached() {
                    if ending != Ending::HalfClose {
                        return Err(ending);
                    }
                    self.shut_down(&mut writer).await;
                }
                if self.ended && self.queue.is_empty() {
                    return Ok(());
                }
                due = self.due().filter(|_| is_open);
                if due.is_some_and(|due| due <= Instant::now()) {
                    due = None;
                    match self.cut() {
                        None => {}
                        Some(Ending::HalfClose) => {
                            self.shut_down(&mut writer).await;
                            continue;
                        }
                        Some(ending) => return Err(ending),
                    }
                }
            }
            let can_write = is_open && !self.outgoing.is_empty();
            let can_read = !self.ended && self.queued < MOST_QUEUED;
            tokio::select! {
                biased;
                changed = self.state.changed() => changed.map_err(|_| Ending::Close)?,
                written = writer.write_buf(&mut self.outgoing), if can_write => self.written(&written),
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                read = reader.read(&mut buffer), if can_read => match read {
                    Ok(0) => self.end_of_stream(),
                    Ok(count) => self.arrived(&buffer[..count]),
                    Err(_) => self.push(Bytes::new(), Some(Ending::Reset)),
                },
            }
        }
    }

    /// Does what the proxy's state wants now.
    fn obey(&mut self) {
        let (toxics, generation, half_closes) = {
            let lane = &self.state.borrow_and_update().lanes[self.lane];
            (lane.toxics, lane.generation, lane.half_closes)
        };
        if self.generation != generation {
            self.generation = generation;
            self.toxics = toxics;
            (self.passed, self.chunks) = (0, 0);
            self.not_before = Instant::now();
            self.paid_until = self.not_before;
            if toxics.gate == Gate::Discard {
                self.drop_bytes();
            }
        }
        if self.half_closes != half_closes {
            self.half_closes = half_closes;
            if !self.shut {
                self.push(Bytes::new(), Some(Ending::HalfClose));
                self.shut = true;
            }
        }
    }

    fn arrived(&mut self, bytes: &[u8]) {
        self.counters.received[self.lane].fetch_add(bytes.len() as u64, Ordering::SeqCst);
        if !self.shut && self.toxics.gate != Gate::Discard {
            self.push(Bytes::copy_from_slice(bytes), None);
        }
    }

    fn end_of_stream(&mut self) {
        self.ended = true;
        if self.was_reset[1 - self.lane].load(Ordering::SeqCst) {
            self.push(Bytes::new(), Some(Ending::Reset));
        } else if !self.shut {
            self.push(Bytes::new(), Some(Ending::HalfClose));
            self.shut = true;
        }
    }

    fn push(&mut self, bytes: Bytes, end: Option<Ending>) {
        self.ended |= end == Some(Ending::Reset);
        self.queued += bytes.len() + OVERHEAD;
        let number = match end {
            None => self.counters.chunks[self.lane].fetch_add(1, Ordering::SeqCst) + 1,
            Some(_) => 0,
        };
        self.queue.push_back(Chunk {
            number,
            arrived: Instant::now(),
            luck: self.random.f64(),
            bytes,
            end,
        });
    }

    /// When the front chunk may be delivered, or some of it.
    fn due(&self) -> Option<Instant> {
        let chunk = self.queue.front()?;
        let delay = self.toxics.delay(chunk.number, chunk.luck);
        Some(
            later(chunk.arrived, delay)
                .max(self.not_before)
                .max(self.paid_until),
        )
    }

    /// Moves what may be written at once from the front of the queue to `outgoing`; or else it is the end's turn.
    fn cut(&mut self) -> Option<Ending> {
        let chunk = self.queue.front_mut()?;
        let mut size = chunk.bytes.len();
        if let Some((Limit::Bytes(limit), _)) = self.toxics.limit {
            size = at_most(size, limit - self.passed);
        }
        let now = Instant::now();
        if let Some((slice, pause)) = self.toxics.slice {
            size = size.min(slice);
            self.not_before = later(now, pause);
        }
        if let Some(rate) = self.toxics.bandwidth {
            size = at_most(size, (rate / WRITES_PER_SECOND).max(1));
            let start = now.checked_sub(CREDIT).unwrap_or(now).max(self.paid_until);
            self.paid_until = start + Duration::from_secs_f64(size as f64 / rate as f64);
        }
        self.outgoing.extend_from_slice(&chunk.bytes[..size]);
        self.toxics.corrupt(&mut self.outgoing, self.passed);
        self.passed += size as u64;
        self.queued -= size;
        chunk.bytes.advance(size);
        if !chunk.bytes.is_empty() {
            return None;
        }
        self.queued -= OVERHEAD;
        let end = self.queue.pop_front()?.end;
        self.chunks += u64::from(end.is_none());
        end
    }

    fn written(&mut self, written: &io::Result<usize>) {
        match written {
            Ok(count) => {
                self.counters.forwarded[self.lane].fetch_add(*count as u64, Ordering::SeqCst);
            }
            Err(error) => {
                // The sender gets to know through the other direction.
                self.shut = true;
                self.drop_bytes();
                if error.kind() == io::ErrorKind::ConnectionReset {
                    self.was_reset[self.lane].store(true, Ordering::SeqCst);
                }
            }
        }
    }

    fn limit_reached(&self) -> Option<Ending> {
        let (limit, ending) = self.toxics.limit?;
        let reached = match limit {
            Limit::Bytes(bytes) => self.passed >= bytes,
            Limit::Chunks(chunks) => self.chunks >= chunks,
        };
        reached.then_some(ending)
    }

    /// Delivers the end of the stream and nothing more.
    async fn shut_down<W: AsyncWrite + Unpin>(&mut self, writer: &mut W) {
        // A receiver that has gone needs no end.
        let _ = writer.shutdown().await;
        self.shut = true;
        self.drop_bytes();
    }

    /// Loses what is on its way.
    fn drop_bytes(&mut self) {
        self.outgoing.clear();
        self.queue.retain(|chunk| chunk.end.is_some());
        self.queued = self.queue.len() * OVERHEAD;
    }
}

fn at_most(size: usize, limit: u64) -> usize {
    usize::try_from(limit).map_or(size, |limit| size.min(limit))
}

/// The sum, or at least long after every test.
fn later(instant: Instant, by: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3_600);
    instant.checked_add(by).unwrap_or_else(|| instant + YEAR)
}
