//! What the fuzz targets run, in the crate itself so that it is built and its corpora are replayed
//! by plain `cargo test` (`tests/fuzz_corpus.rs`). Not part of the public interface.

use std::num::NonZeroU32;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::Instant;

use crate::compression::CompressionSettings;
use crate::error::{Charge, Error, ErrorKind, Result};
use crate::key::Key;
use crate::protocol::{Batch, Limits, Parser, Pipeline, Ticket};
use crate::request::{Direction, LeaseTerms, Operation, StoreMode};
use crate::response::{Found, Response};
use crate::ttl::Ttl;

pub use crate::testing::fuzz_server_parser as server_parser;
#[cfg(feature = "classic")]
pub use crate::transport::fuzz_classic_reply as classic_reply;

const LIMITS: Limits = Limits {
    value: 256,
    requests: 64,
    queued_bytes: 64 * 1024,
};

/// The reply parser with a queue in flight, against any bytes in any pieces.
///
/// The first byte says how many of the next ones name an operation, or that its caller gives up at
/// once; the byte behind them is the size of the pieces in which the rest arrives.
///
/// # Panics
/// If a request ends twice or never, a hit was not in the bytes, or more is buffered than may be.
pub fn reply_parser(data: &[u8]) {
    let Some((&count, rest)) = data.split_first() else {
        return;
    };
    let script = &rest[..rest.len().min(usize::from(count % 32))];
    let rest = &rest[script.len()..];
    let Some((&piece, replies)) = rest.split_first() else {
        return;
    };

    let now = Instant::now();
    let mut pipeline = Pipeline::new(LIMITS, NonZeroU32::MIN);
    pipeline.connected(1, script.len() % 5 != 0);
    let (mut tickets, mut woken) = (Vec::new(), Vec::new());
    for (name, &byte) in script.iter().enumerate() {
        let deadline = now + Duration::from_millis(u64::from(byte));
        if let Ok(ticket) = pipeline.enqueue(&operation(byte), deadline, deadline, Some(name)) {
            tickets.push(Some(ticket));
        }
        if byte >= 128
            && let Some(Some(ticket)) = tickets.get_mut(name / 2).map(Option::take)
        {
            pipeline.abandon(ticket);
        }
        if byte % 3 == 0 {
            write_out(&mut pipeline, now, &mut woken);
        }
    }
    write_out(&mut pipeline, now, &mut woken);

    let (mut parser, mut input) = (Parser::new(LIMITS.value), BytesMut::new());
    let mut broken = None;
    'stream: for piece in replies.chunks(usize::from(piece).max(1)) {
        input.extend_from_slice(piece);
        loop {
            match parser.parse(&mut input) {
                Ok(Some(reply)) => {
                    if let Err(violation) = pipeline.reply(reply, &mut woken) {
                        broken = Some(violation);
                        break 'stream;
                    }
                }
                Ok(None) => break,
                Err(violation) => {
                    broken = Some(violation);
                    break 'stream;
                }
            }
        }
        assert!(
            input.len() <= crate::protocol::MAX_LINE + LIMITS.value + 256,
            "what cannot be used is not kept"
        );
    }
    let half = now + Duration::from_millis(64);
    pipeline.expire(half, Charge::Node, &mut woken, |sent_at| {
        assert_eq!(sent_at, now);
    });
    let error = match broken {
        Some(violation) => violation.into(),
        None => Error::new(ErrorKind::ConnectionLost, "the end"),
    };
    pipeline.close(&error, &mut woken);
    pipeline.fail_queued(&error, &mut woken);
    let names = woken.len();
    woken.sort_unstable();
    woken.dedup();
    assert_eq!(names, woken.len(), "nobody is woken twice");
    for ticket in tickets.into_iter().flatten() {
        check(settled(&mut pipeline, &ticket), replies);
    }
}

/// Decompression of any bytes with any client flags.
///
/// The first byte says as what they are flagged, and the next two how much may come of them.
///
/// # Panics
/// If more comes of them, or is allocated for it, than may.
pub fn decompress(data: &[u8]) {
    let Some(([flags, low, high], frame)) = data.split_first_chunk() else {
        return;
    };
    let most = usize::from(u16::from_le_bytes([*low, *high])) + 1;
    let settings = CompressionSettings::default()
        .lz4_flag(0b0010)
        .zstd_flag(0b1000)
        .max_decompressed(most);
    if let Ok(expanded) = settings.expand(frame, u32::from(*flags)) {
        assert!(expanded.capacity() <= most, "more than may be");
    }
}

fn write_out(pipeline: &mut Pipeline<usize>, now: Instant, woken: &mut Vec<usize>) {
    let mut batch = Batch::default();
    pipeline.take(&mut batch, now, Duration::ZERO, 1, woken);
    pipeline.wrote(7);
}

fn settled(pipeline: &mut Pipeline<usize>, ticket: &Ticket) -> Result<Response> {
    let outcome = pipeline.poll(ticket, |_| {});
    assert!(outcome.is_some(), "the connection's end settles everything");
    outcome.unwrap_or_else(|| Err(Error::new(ErrorKind::ConnectionLost, "unreachable")))
}

/// A value can only be one that came.
fn check(outcome: Result<Response>, replies: &[u8]) {
    let values = match outcome {
        Ok(Response::Value(Some(value))) => vec![value],
        Ok(Response::Found(lookup)) => match lookup.found {
            Found::Value { value, .. } => vec![value],
            Found::Nothing | Found::Absent { .. } | Found::Unreadable => return,
        },
        Ok(Response::Values(outcomes)) => outcomes
            .into_iter()
            .filter_map(|outcome| outcome.ok().flatten())
            .collect(),
        _ => return,
    };
    for value in values {
        assert!(
            value.is_empty() || replies.windows(value.len()).any(|part| *part == *value),
            "a value from nowhere"
        );
    }
}

pub(crate) fn operation(byte: u8) -> Operation {
    let key = || match Key::new([b'a' + byte % 26]) {
        Ok(key) => key,
        Err(_) => unreachable!("a letter is a key"),
    };
    let store = |mode, length: usize| Operation::Store {
        mode,
        key: key(),
        payload: vec![b'v'; length].into(),
        ttl: Ttl::secs(60),
    };
    match byte % 12 {
        0 => Operation::Get {
            key: key(),
            with_cas: false,
        },
        1 => Operation::Get {
            key: key(),
            with_cas: true,
        },
        2 => Operation::GetMany {
            keys: vec![key(); usize::from(byte / 12)].into(),
        },
        3 => store(StoreMode::Set, 3),
        4 => store(StoreMode::Append, 9_000),
        5 => Operation::Delete { key: key() },
        6 => Operation::Touch {
            key: key(),
            ttl: Ttl::NEVER,
        },
        7 => Operation::Arithmetic {
            key: key(),
            delta: 1,
            direction: Direction::Up,
        },
        8 => Operation::Version,
        9 => Operation::FlushAll,
        10 => Operation::Stats,
        _ if byte & 16 != 0 => Operation::Lookup {
            key: key(),
            lease: (byte & 32 != 0).then(|| LeaseTerms::new(Duration::from_secs(2))),
        },
        _ => Operation::GetAndTouch {
            key: key(),
            ttl: Ttl::secs(1),
        },
    }
}
