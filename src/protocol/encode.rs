//! Operations to bytes.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::key::Key;
use crate::request::{Direction, Operation, StoreMode};
use crate::ttl::Ttl;
use crate::value::Payload;

/// Values up to this many bytes are copied behind their command, so that many requests leave in
/// one contiguous write; larger ones are sent from where they are.
const INLINE_VALUE: usize = 4 * 1024;

const CRLF: &[u8] = b"\r\n";

/// Writes `operation` with the given opaque at the end of `out`.
///
/// A large value is not copied: it is returned, and belongs on the wire directly behind what was
/// written, followed by `\r\n`. A multi-key read uses one opaque for each key, from `opaque` on.
pub(crate) fn encode(operation: &Operation, opaque: u32, out: &mut BytesMut) -> Option<Bytes> {
    match operation {
        Operation::Get { key, with_cas } => {
            let mut line = Line::start(out, b"mg ", key);
            line.flags(if *with_cas { b" v f c" } else { b" v f" });
            line.end(opaque, key);
        }
        Operation::Lookup { key, lease } => {
            let mut line = Line::start(out, b"mg ", key);
            line.flags(b" v f c t");
            if let Some(terms) = lease {
                line.seconds(b" N", terms.duration);
                if !terms.recache.is_zero() {
                    line.seconds(b" R", terms.recache);
                }
            }
            line.end(opaque, key);
        }
        Operation::GetMany { keys } => {
            for (key, opaque) in keys.iter().zip((0..).map(|n| opaque.wrapping_add(n))) {
                let mut line = Line::start(out, b"mg ", key);
                line.flags(b" v f q");
                line.end(opaque, key);
            }
            out.put_slice(b"mn\r\n");
        }
        Operation::GetAndTouch { key, ttl } => {
            let mut line = Line::start(out, b"mg ", key);
            line.flags(b" v f");
            line.ttl(*ttl);
            line.end(opaque, key);
        }
        Operation::Touch { key, ttl } => {
            let mut line = Line::start(out, b"mg ", key);
            line.ttl(*ttl);
            line.end(opaque, key);
        }
        Operation::Store {
            mode,
            key,
            payload,
            ttl,
        } => {
            let mut line = Line::start(out, b"ms ", key);
            line.payload_length(payload);
            match mode {
                StoreMode::Set => line.ttl(*ttl),
                StoreMode::Add | StoreMode::Claim => {
                    line.flags(b" ME");
                    line.ttl(*ttl);
                }
                StoreMode::Replace => {
                    line.flags(b" MR");
                    line.ttl(*ttl);
                }
                // These keep the TTL that is there.
                StoreMode::Append => line.flags(b" MA"),
                StoreMode::Prepend => line.flags(b" MP"),
            }
            line.end(opaque, key);
            return body(payload, out);
        }
        Operation::CompareAndSwap {
            key,
            payload,
            ttl,
            token,
        } => {
            let mut line = Line::start(out, b"ms ", key);
            line.payload_length(payload);
            line.ttl(*ttl);
            line.number(b" C", token.unique);
            line.end(opaque, key);
            return body(payload, out);
        }
        Operation::Delete { key } => Line::start(out, b"md ", key).end(opaque, key),
        Operation::Arithmetic {
            key,
            delta,
            direction,
        } => {
            let mut line = Line::start(out, b"ma ", key);
            line.flags(match direction {
                Direction::Up => b" v MI",
                Direction::Down => b" v MD",
            });
            line.number(b" D", *delta);
            line.end(opaque, key);
        }
        Operation::Version => out.put_slice(b"version\r\n"),
        Operation::FlushAll => out.put_slice(b"flush_all\r\n"),
        Operation::Stats => out.put_slice(b"stats\r\n"),
    }
    None
}

/// Writes a value behind its command, or hands it out if it is large, to be sent from where it is.
pub(crate) fn body(payload: &Payload, out: &mut BytesMut) -> Option<Bytes> {
    let data = payload.data();
    if data.len() > INLINE_VALUE {
        return Some(data.clone());
    }
    out.reserve(data.len() + CRLF.len());
    out.put_slice(data);
    out.put_slice(CRLF);
    None
}

/// A meta command line in the making.
struct Line<'a>(&'a mut BytesMut);

impl<'a> Line<'a> {
    fn start(out: &'a mut BytesMut, command: &[u8], key: &Key) -> Self {
        // Enough for every flag there is, so that what follows never reallocates.
        out.reserve(key.as_bytes().len() + 96);
        out.put_slice(command);
        out.put_slice(key.as_bytes());
        Self(out)
    }

    fn flags(&mut self, flags: &[u8]) {
        self.0.put_slice(flags);
    }

    fn number(&mut self, flag: &[u8], number: impl itoa::Integer) {
        self.0.put_slice(flag);
        self.0
            .put_slice(itoa::Buffer::new().format(number).as_bytes());
    }

    fn ttl(&mut self, ttl: Ttl) {
        // Without T an item lives for ever; with `mg`, T0 is how that is said.
        self.number(b" T", ttl.wire());
    }

    /// A duration, as a TTL says it.
    fn seconds(&mut self, flag: &[u8], duration: Duration) {
        self.number(flag, Ttl::from(duration).wire().max(1));
    }

    fn payload_length(&mut self, payload: &Payload) {
        self.number(b" ", payload.data().len());
        if payload.flags() != 0 {
            self.number(b" F", payload.flags());
        }
    }

    fn end(mut self, opaque: u32, key: &Key) {
        if key.is_binary() {
            self.flags(b" b");
        }
        self.number(b" O", opaque);
        self.flags(CRLF);
    }
}
