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

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tokio::io::DuplexStream;
    use tokio::task::JoinHandle;

    use super::*;

    /// What was written in one go, and when, in milliseconds since the rig was made. The end is an empty write.
    type Writes = Vec<(u64, Vec<u8>)>;

    struct Recorder {
        writes: Writes,
        began: Instant,
        /// Bytes it takes at once.
        most: usize,
        fails_with: Option<io::ErrorKind>,
    }

    impl Recorder {
        fn record(&mut self, bytes: &[u8]) {
            let now = self.began.elapsed().as_millis();
            self.writes.push((now as u64, bytes.to_vec()));
        }
    }

    impl AsyncWrite for &mut Recorder {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            if let Some(kind) = self.fails_with {
                return Poll::Ready(Err(kind.into()));
            }
            let size = bytes.len().min(self.most);
            self.record(&bytes[..size]);
            Poll::Ready(Ok(size))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.record(b"");
            Poll::Ready(Ok(()))
        }
    }

    struct Rig {
        state: watch::Sender<State>,
        sender: DuplexStream,
        pump: JoinHandle<(Writes, Result<(), Ending>)>,
    }

    impl Rig {
        fn set(&self, toxics: Toxics) {
            self.state.send_modify(|state| {
                state.lanes[0].toxics = toxics;
                state.lanes[0].generation += 1;
            });
        }
    }

    fn watched(toxics: Toxics) -> (watch::Sender<State>, watch::Receiver<State>) {
        let mut lanes: [super::super::Lane; 2] = Default::default();
        lanes[0].toxics = toxics;
        watch::channel(State {
            upstream: ([127, 0, 0, 1], 1).into(),
            resets_new: false,
            lanes,
            closes: 0,
            resets: 0,
        })
    }

    /// The upstream pump of the connection of this number, under tokio's clock.
    fn rig(number: u64, toxics: Toxics, most: usize, fails_with: Option<io::ErrorKind>) -> Rig {
        let (state, receiver) = watched(toxics);
        let (sender, reader) = tokio::io::duplex(1 << 16);
        let pump = tokio::spawn(async move {
            let mut recorder = Recorder {
                writes: Vec::new(),
                began: Instant::now(),
                most,
                fails_with,
            };
            let (counters, was_reset) = (Counters::default(), Default::default());
            let ended = Pump::new(0, number, receiver, 0, &counters, &was_reset)
                .run(reader, &mut recorder)
                .await;
            let received = counters.received[0].load(Ordering::SeqCst);
            let forwarded = counters.forwarded[0].load(Ordering::SeqCst);
            assert!(forwarded <= received);
            (recorder.writes, ended)
        });
        Rig {
            state,
            sender,
            pump,
        }
    }

    /// What becomes of chunks sent 10 ms apart, and of the end after them.
    async fn pumped(number: u64, toxics: Toxics, chunks: &[&str]) -> Writes {
        let mut rig = rig(number, toxics, usize::MAX, None);
        for chunk in chunks {
            let sent = rig.sender.write_all(chunk.as_bytes()).await;
            sent.expect("it can be written");
            tokio::time::sleep(ms(10)).await;
        }
        drop(rig.sender);
        let (writes, ended) = rig.pump.await.expect("no panic");
        assert_eq!(ended, Ok(()));
        writes
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn writes(expected: &[(u64, &str)]) -> Writes {
        let write = |&(at, bytes): &(u64, &str)| (at, bytes.as_bytes().to_vec());
        expected.iter().map(write).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn chunks_are_delivered_when_they_are_due() {
        let chunks = ["a", "b", "c"];
        let sound = pumped(1, Toxics::new(), &chunks).await;
        assert_eq!(sound, writes(&[(0, "a"), (10, "b"), (20, "c"), (30, "")]));
        let late = pumped(1, Toxics::new().latency(ms(25), ms(0)), &chunks).await;
        assert_eq!(late, writes(&[(25, "a"), (35, "b"), (45, "c"), (55, "")]));
        // The end is no chunk.
        let late = pumped(1, Toxics::new().late_every(2, ms(50)), &chunks).await;
        assert_eq!(late, writes(&[(0, "a"), (60, "b"), (60, "c"), (60, "")]));
    }

    #[tokio::test(start_paused = true)]
    async fn jitter_is_the_same_for_the_same_connection() {
        let toxics = Toxics::new().latency(ms(5), ms(100));
        let chunks = ["a", "b", "c", "d", "e", "f"];
        let first = pumped(1, toxics, &chunks).await;
        assert_eq!(first, pumped(1, toxics, &chunks).await);
        assert_ne!(first, pumped(2, toxics, &chunks).await);
        let received: Vec<u8> = first.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
        assert_eq!(received, b"abcdef");
        for ((at, _), sent) in first.iter().zip((0..).step_by(10)) {
            assert!(
                *at >= sent + 5 && *at <= 50 + 106,
                "sent at {sent}, delivered at {at}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn slices_are_written_one_by_one() {
        let paused = pumped(1, Toxics::new().slice(2, ms(7)), &["abcde"]).await;
        assert_eq!(paused, writes(&[(0, "ab"), (7, "cd"), (14, "e"), (21, "")]));
        let at_once = pumped(1, Toxics::new().slice(2, ms(0)), &["abcde", "f"]).await;
        assert_eq!(
            at_once,
            writes(&[(0, "ab"), (0, "cd"), (0, "e"), (10, "f"), (20, "")])
        );
    }

    #[tokio::test(start_paused = true)]
    async fn bandwidth_is_kept_however_much_is_sent() {
        let second = "x".repeat(10_000);
        let written = pumped(1, Toxics::new().bandwidth(10_000), &[&second, &second]).await;
        let mut sum = 0;
        for (at, bytes) in &written {
            // What one write may hold, and the credit.
            assert!(sum <= at * 10 + 200, "{sum} bytes after {at} ms");
            sum += bytes.len() as u64;
        }
        assert_eq!(sum, 20_000);
        let (end, _) = written.last().expect("an end");
        assert!((1_950..=2_050).contains(end), "it took {end} ms");
        // Idleness is not made up for.
        let mut rig = rig(1, Toxics::new().bandwidth(10_000), usize::MAX, None);
        tokio::time::sleep(ms(5_000)).await;
        let sent = rig.sender.write_all(second.as_bytes()).await;
        sent.expect("it can be written");
        drop(rig.sender);
        let (written, _) = rig.pump.await.expect("no panic");
        let (end, _) = written.last().expect("an end");
        assert!((5_950..=6_050).contains(end), "it ended after {end} ms");
        // Less than one byte in a fiftieth of a second.
        let slow = pumped(1, Toxics::new().bandwidth(2), &["abc"]).await;
        assert_eq!(
            slow,
            writes(&[(0, "a"), (500, "b"), (1_000, "c"), (1_500, "")])
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_receiver_gets_every_byte_once() {
        let toxics = Toxics::new().corrupt_every(2, 0x20);
        let mut rig = rig(1, toxics, 3, None);
        let sent = rig.sender.write_all(b"aaaaaaaa").await;
        sent.expect("it can be written");
        drop(rig.sender);
        let (written, ended) = rig.pump.await.expect("no panic");
        assert_eq!(
            written,
            writes(&[(0, "aAa"), (0, "AaA"), (0, "aA"), (0, "")])
        );
        assert_eq!(ended, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_receiver_that_has_gone_does_not_stop_the_sender() {
        let mut rig = rig(1, Toxics::new(), 1, Some(io::ErrorKind::BrokenPipe));
        // More than is ever queued.
        for _ in 0..100 {
            let sent = rig.sender.write_all(&[0; 1 << 16]).await;
            sent.expect("it can be written");
        }
        drop(rig.sender);
        assert_eq!(rig.pump.await.expect("no panic"), (Vec::new(), Ok(())));
    }

    #[tokio::test(start_paused = true)]
    async fn new_toxics_hold_for_what_is_on_its_way() {
        let mut rig = rig(
            1,
            Toxics::new().latency(Duration::MAX, ms(0)),
            usize::MAX,
            None,
        );
        let sent = rig.sender.write_all(b"a").await;
        sent.expect("it can be written");
        tokio::time::sleep(ms(10)).await;
        rig.set(Toxics::new().latency(ms(15), ms(0)));
        tokio::time::sleep(ms(10)).await;
        drop(rig.state);
        let (written, ended) = rig.pump.await.expect("no panic");
        assert_eq!(written, writes(&[(15, "a")]));
        assert_eq!(
            ended,
            Err(Ending::Close),
            "without a handle everything ends"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn discarding_spares_the_end() {
        let toxics = Toxics::new().latency(Duration::MAX, ms(0));
        let mut rig = rig(1, toxics, usize::MAX, None);
        let sent = rig.sender.write_all(b"lost").await;
        sent.expect("it can be written");
        drop(std::mem::replace(&mut rig.sender, tokio::io::duplex(1).0));
        tokio::time::sleep(ms(10)).await;
        rig.set(Toxics::new().discard());
        tokio::time::sleep(ms(10)).await;
        rig.set(Toxics::new());
        let (written, ended) = rig.pump.await.expect("no panic");
        assert_eq!((written, ended), (writes(&[(20, "")]), Ok(())));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_follows_the_end() {
        let mut rig = rig(1, Toxics::new().latency(ms(15), ms(0)), usize::MAX, None);
        for (half_closes, bytes) in [
            (1, b"in time"),
            (1, b"too old"),
            (2, b"too new"),
            (2, b"at last"),
        ] {
            let sent = rig.sender.write_all(bytes).await;
            sent.expect("it can be written");
            tokio::time::sleep(ms(10)).await;
            rig.state
                .send_modify(|state| state.lanes[0].half_closes = half_closes);
        }
        drop(rig.sender);
        let (written, ended) = rig.pump.await.expect("no panic");
        assert_eq!(written, writes(&[(15, "in time"), (25, "")]));
        assert_eq!(ended, Ok(()));
    }

    #[tokio::test]
    async fn a_reset_that_a_write_met_is_no_mere_end() {
        let (_state, receiver) = watched(Toxics::new());
        let (counters, was_reset) = (Counters::default(), Default::default());
        let pump = |lane| Pump::new(lane, 1, receiver.clone(), 0, &counters, &was_reset);
        let mut gone = Recorder {
            writes: Vec::new(),
            began: Instant::now(),
            most: 1,
            fails_with: Some(io::ErrorKind::ConnectionReset),
        };
        // The kernel reports a reset once. Whoever reads next is told of an end.
        assert_eq!(pump(0).run(&b"bytes"[..], &mut gone).await, Ok(()));
        let ended = pump(1).run(&b""[..], tokio::io::sink()).await;
        assert_eq!(ended, Err(Ending::Reset));
    }
}
