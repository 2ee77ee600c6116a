//! Commands that memcache-async has no words for, or sends without asking for a reply.

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::key::Key;
use crate::protocol::body;
use crate::request::{Operation, StoreMode};
use crate::ttl::Ttl;
use crate::value::Payload;

const CRLF: &[u8] = b"\r\n";

/// A second of January 1970: the first number that is taken for a date.
const LONG_AGO: i64 = 60 * 60 * 24 * 30 + 1;

/// Writes `operation` at the end of `out`, if it is one of those. Of a get-and-touch it is the touch,
/// with which that begins.
///
/// A large value is not copied: it is returned, and belongs on the wire directly behind what was
/// written, followed by `\r\n`.
pub(super) fn encode(operation: &Operation, out: &mut BytesMut) -> Option<Bytes> {
    match operation {
        Operation::Store {
            mode,
            key,
            payload,
            ttl,
        } => {
            let (command, ttl): (&[u8], _) = match mode {
                StoreMode::Set => (b"set ", expiry(*ttl)),
                StoreMode::Add | StoreMode::Claim => (b"add ", expiry(*ttl)),
                StoreMode::Replace => (b"replace ", expiry(*ttl)),
                // These keep the TTL, and the flags, that are there; the fields must be.
                StoreMode::Append => (b"append ", 0),
                StoreMode::Prepend => (b"prepend ", 0),
            };
            store(out, command, key, payload, ttl);
            out.put_slice(CRLF);
            return body(payload, out);
        }
        Operation::CompareAndSwap {
            key,
            payload,
            ttl,
            token,
        } => {
            store(out, b"cas ", key, payload, expiry(*ttl));
            number(out, token.unique);
            out.put_slice(CRLF);
            return body(payload, out);
        }
        Operation::Touch { key, ttl } | Operation::GetAndTouch { key, ttl } => {
            start(out, b"touch ", key);
            number(out, expiry(*ttl));
            out.put_slice(CRLF);
        }
        Operation::Delete { key } => {
            start(out, b"delete ", key);
            out.put_slice(CRLF);
        }
        Operation::Stats => out.put_slice(b"stats\r\n"),
        Operation::Get { .. }
        | Operation::GetMany { .. }
        | Operation::Lookup { .. }
        | Operation::Arithmetic { .. }
        | Operation::Version
        | Operation::FlushAll => {}
    }
    None
}

/// Proxies close the connection on a negative one.
fn expiry(ttl: Ttl) -> i64 {
    match ttl.wire() {
        ..0 => LONG_AGO,
        expiry => expiry,
    }
}

fn start(out: &mut BytesMut, command: &[u8], key: &Key) {
    // Enough for every number there may be behind it.
    out.reserve(command.len() + key.as_bytes().len() + 96);
    out.put_slice(command);
    out.put_slice(key.as_bytes());
}

fn store(out: &mut BytesMut, command: &[u8], key: &Key, payload: &Payload, ttl: i64) {
    start(out, command, key);
    number(out, payload.flags());
    number(out, ttl);
    number(out, payload.data().len());
}

fn number(out: &mut BytesMut, number: impl itoa::Integer) {
    out.put_u8(b' ');
    out.put_slice(itoa::Buffer::new().format(number).as_bytes());
}
