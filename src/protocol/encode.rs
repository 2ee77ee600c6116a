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
            let flags: &[u8] = if *with_cas { b" v f c" } else { b" v f" };
            line(out, b"mg ", key, opaque, |line| line.put(flags));
        }
        Operation::Lookup { key, lease } => line(out, b"mg ", key, opaque, |line| {
            line.put(b" v f c t");
            if let Some(terms) = lease {
                line.seconds(b" N", terms.duration);
                if !terms.recache.is_zero() {
                    line.seconds(b" R", terms.recache);
                }
            }
        }),
        Operation::GetMany { keys } => {
            for (key, opaque) in keys.iter().zip((0..).map(|n| opaque.wrapping_add(n))) {
                line(out, b"mg ", key, opaque, |line| line.put(b" v f q"));
            }
            out.put_slice(b"mn\r\n");
        }
        Operation::GetAndTouch { key, ttl } => line(out, b"mg ", key, opaque, |line| {
            line.put(b" v f");
            line.ttl(*ttl);
        }),
        Operation::Touch { key, ttl } => line(out, b"mg ", key, opaque, |line| line.ttl(*ttl)),
        Operation::Store {
            mode,
            key,
            payload,
            ttl,
        } => {
            line(out, b"ms ", key, opaque, |line| {
                line.payload_length(payload);
                match mode {
                    StoreMode::Set => line.ttl(*ttl),
                    StoreMode::Add | StoreMode::Claim => {
                        line.put(b" ME");
                        line.ttl(*ttl);
                    }
                    StoreMode::Replace => {
                        line.put(b" MR");
                        line.ttl(*ttl);
                    }
                    // These keep the TTL that is there.
                    StoreMode::Append => line.put(b" MA"),
                    StoreMode::Prepend => line.put(b" MP"),
                }
            });
            return body(payload, out);
        }
        Operation::CompareAndSwap {
            key,
            payload,
            ttl,
            token,
        } => {
            line(out, b"ms ", key, opaque, |line| {
                line.payload_length(payload);
                line.ttl(*ttl);
                line.number(b" C", token.unique);
            });
            return body(payload, out);
        }
        Operation::Delete { key } => line(out, b"md ", key, opaque, |_| {}),
        Operation::Arithmetic {
            key,
            delta,
            direction,
        } => line(out, b"ma ", key, opaque, |line| {
            line.put(match direction {
                Direction::Up => b" v MI",
                Direction::Down => b" v MD",
            });
            line.number(b" D", *delta);
        }),
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

/// Room for a command and all the flags there are, in bytes.
const FLAGS: usize = 96;

/// Writes a meta command line, with what `flags` puts into it.
fn line(
    out: &mut BytesMut,
    command: &[u8; 3],
    key: &Key,
    opaque: u32,
    flags: impl FnOnce(&mut Line<'_>),
) {
    let (start, name) = (out.len(), key.as_bytes());
    // Once for the whole line: to append to the buffer piece by piece takes four times as long.
    out.resize(start + name.len() + FLAGS, 0);
    let mut line = Line(&mut out[start..]);
    line.put(command);
    line.put(name);
    flags(&mut line);
    if key.is_binary() {
        line.put(b" b");
    }
    line.number(b" O", opaque);
    line.put(CRLF);
    let left = line.0.len();
    out.truncate(out.len() - left);
}

/// The room that is left of a line in the making.
struct Line<'a>(&'a mut [u8]);

impl Line<'_> {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        let (here, left) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        here.copy_from_slice(bytes);
        self.0 = left;
    }

    fn number(&mut self, flag: &[u8; 2], number: impl itoa::Integer) {
        self.put(flag);
        self.put(itoa::Buffer::new().format(number).as_bytes());
    }

    fn ttl(&mut self, ttl: Ttl) {
        // Without T an item lives for ever; with `mg`, T0 is how that is said.
        self.number(b" T", ttl.wire());
    }

    /// A duration, as a TTL says it.
    fn seconds(&mut self, flag: &[u8; 2], duration: Duration) {
        self.number(flag, Ttl::from(duration).wire().max(1));
    }

    fn payload_length(&mut self, payload: &Payload) {
        self.put(b" ");
        self.put(itoa::Buffer::new().format(payload.data().len()).as_bytes());
        if payload.flags() != 0 {
            self.number(b" F", payload.flags());
        }
    }
}
