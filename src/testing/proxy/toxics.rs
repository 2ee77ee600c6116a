//! What can be made to go wrong in one direction, as one value that every connection watches.

use std::time::Duration;

/// A direction of the connections of a [`Proxy`](super::Proxy).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flow {
    /// From the client to the server: requests.
    Upstream,
    /// From the server to the client: replies.
    Downstream,
    /// Either.
    Both,
}

impl Flow {
    /// The places of its directions in arrays of two.
    pub(super) fn lanes(self) -> std::ops::RangeInclusive<usize> {
        match self {
            Self::Upstream => 0..=0,
            Self::Downstream => 1..=1,
            Self::Both => 0..=1,
        }
    }
}

/// How a connection ends at the limit of [`Toxics::limit_data`] and [`Toxics::limit_chunks`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// Both directions are closed on both sides, as by a process that ends. The peers see the end of the stream.
    Close,
    /// The receiver sees the end of the stream (FIN), and what the sender goes on to send is lost. The other direction
    /// stays open.
    HalfClose,
    /// Both sides see `ECONNRESET`.
    Reset,
}

/// What is wrong with one direction of a network, for [`Proxy::set`](super::Proxy::set). Any of it can be combined.
///
/// A *chunk* is what arrived at the proxy in one piece, of at most 16 KiB. On an otherwise idle connection that is what
/// the sender wrote in one go; what several writes sent in quick succession may be one chunk.
///
/// ```
/// use std::time::Duration;
///
/// use tower_memcached::testing::Toxics;
///
/// // A slow and narrow line.
/// let toxics = Toxics::new()
///     .latency(Duration::from_millis(50), Duration::from_millis(10))
///     .bandwidth(100_000);
/// assert_ne!(toxics, Toxics::new());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Toxics {
    latency: Duration,
    jitter: Duration,
    /// Every nth chunk is so much later.
    late: Option<(u32, Duration)>,
    pub(super) gate: Gate,
    pub(super) bandwidth: Option<u64>,
    pub(super) slice: Option<(usize, Duration)>,
    corrupt: Option<(Place, u8)>,
    pub(super) limit: Option<(Limit, Ending)>,
}

/// Whether bytes pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Gate {
    #[default]
    Open,
    Hold,
    Discard,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Every(u64),
    At(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    Bytes(u64),
    Chunks(u64),
}

impl Toxics {
    /// None: what goes in comes out, at once.
    pub fn new() -> Self {
        Self::default()
    }

    /// Delivers each chunk `latency` and a random part of `jitter` after it arrived, in order. It does not limit the
    /// throughput, until 4 MiB are on the way. The random numbers are the same for the nth connection of any proxy.
    pub fn latency(mut self, latency: Duration, jitter: Duration) -> Self {
        (self.latency, self.jitter) = (latency, jitter);
        self
    }

    /// Delivers every `nth` chunk `by` later, like a segment that was lost and sent again, counted over all connections
    /// since the proxy began. What follows on the same connection waits for it. Zero is never.
    pub fn late_every(mut self, nth: u32, by: Duration) -> Self {
        self.late = (nth > 0).then_some((nth, by));
        self
    }

    /// Delivers nothing, while the connections stay open and new ones are accepted: an unplugged cable, or a firewall
    /// that drops packets. As TCP sends lost segments again, what arrives meanwhile, the end of the stream included, is
    /// delivered when this ends, even if the sender has long closed the connection. After 4 MiB nothing more is taken
    /// from the sender.
    pub fn blackhole(mut self) -> Self {
        self.gate = Gate::Hold;
        self
    }

    /// As [`blackhole`](Self::blackhole), but what arrives or is on the way is lost for good; only the end of the stream
    /// waits. A connection that outlives this has a gap, as TCP never has and only a broken relay makes.
    pub fn discard(mut self) -> Self {
        self.gate = Gate::Discard;
        self
    }

    /// Delivers at most so many bytes a second on each connection. Zero is no limit.
    pub fn bandwidth(mut self, bytes_per_second: u64) -> Self {
        self.bandwidth = (bytes_per_second > 0).then_some(bytes_per_second);
        self
    }

    /// Delivers at most `bytes` at a time, as segments of their own, with a pause after each: with 1 byte a slow drip,
    /// without a pause a test of parsers. Zero bytes is no slicing.
    pub fn slice(mut self, bytes: usize, pause: Duration) -> Self {
        self.slice = (bytes > 0).then_some((bytes, pause));
        self
    }

    /// Delivers every `nth` byte XOR `mask`, counted on each connection from when the toxics were set. Zero is never.
    pub fn corrupt_every(mut self, nth: u64, mask: u8) -> Self {
        self.corrupt = (nth > 0).then_some((Place::Every(nth), mask));
        self
    }

    /// Delivers the byte after the first `offset` bytes XOR `mask`, counted on each connection from when the toxics were
    /// set.
    pub fn corrupt_at(mut self, offset: u64, mask: u8) -> Self {
        self.corrupt = Some((Place::At(offset), mask));
        self
    }

    /// Ends each connection once so many bytes were delivered, counted from when the toxics were set; with zero, at once.
    pub fn limit_data(mut self, bytes: u64, ending: Ending) -> Self {
        self.limit = Some((Limit::Bytes(bytes), ending));
        self
    }

    /// Ends each connection once so many chunks were delivered, counted from when the toxics were set: with one,
    /// downstream, to a client that waits for each reply, that is after the next full reply.
    pub fn limit_chunks(mut self, chunks: u64, ending: Ending) -> Self {
        self.limit = Some((Limit::Chunks(chunks), ending));
        self
    }

    /// How long a chunk is on its way; `number` counts the chunks from 1, and `luck` is less than 1.
    pub(super) fn delay(&self, number: u64, luck: f64) -> Duration {
        let late = match self.late {
            Some((nth, by)) if number > 0 && number.is_multiple_of(nth.into()) => by,
            _ => Duration::ZERO,
        };
        let jitter = self.jitter.mul_f64(luck);
        self.latency.saturating_add(jitter).saturating_add(late)
    }

    /// Corrupts bytes that begin at `offset`.
    pub(super) fn corrupt(&self, bytes: &mut [u8], offset: u64) {
        let Some((place, mask)) = self.corrupt else {
            return;
        };
        for (byte, position) in bytes.iter_mut().zip(offset..) {
            let hit = match place {
                Place::Every(nth) => (position + 1).is_multiple_of(nth),
                Place::At(wanted) => position == wanted,
            };
            if hit {
                *byte ^= mask;
            }
        }
    }
}
