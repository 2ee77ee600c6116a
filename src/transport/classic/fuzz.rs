//! What the fuzz target `classic_reply` runs.

use std::num::NonZeroU32;

use bytes::Bytes;
use futures::FutureExt as _;
use memchr::memmem;

use super::script::Script;
use super::wire::Wire;
use crate::error::ErrorKind;
use crate::fuzzing::operation;
use crate::key::Key;
use crate::request::Operation;
use crate::response::{Found, Response};
use crate::value::{CasToken, Value};

/// The longest value, in bytes.
const MAX_VALUE: usize = 256;

/// What may be kept of what was received and not looked at, in bytes.
const MAX_HELD: usize = 16 * 1024;

/// One request over the classic wire, memcache-async included, against any answer in any pieces.
///
/// The first byte names the operation, the second one is the size of the pieces in which the rest
/// arrives.
///
/// # Panics
/// If a value is not one that came under its key, a connection is called usable that is not, or more
/// is held than may be.
pub fn fuzz_classic_reply(data: &[u8]) {
    let [name, size, reply @ ..] = data else {
        return;
    };
    let operation = match name {
        255 => multi_get(usize::from(*size % 8)),
        _ => operation(*name),
    };
    let pieces = reply.chunks(usize::from(*size).max(1));
    let (script, _) = Script::new(pieces.map(Bytes::copy_from_slice));
    let base = CasToken {
        node: NonZeroU32::MIN,
        connection: 1,
        unique: 0,
    };
    let mut wire = Wire::new(Box::new(script.ending()), MAX_VALUE);
    let outcome = wire.exchange(&operation, base).now_or_never();
    let Some(outcome) = outcome else {
        panic!("it waits for a stream that is always ready");
    };
    assert!(wire.held() <= MAX_HELD, "more is held than may be");
    match &outcome {
        Ok(response) => {
            assert!(!wire.is_dirty(), "it is answered, and still under way");
            check(&operation, response, reply);
        }
        Err(error) => {
            let unusable = [ErrorKind::Protocol, ErrorKind::ConnectionLost];
            let sent = wire.has_sent();
            assert!(!sent || wire.is_dirty() || !unusable.contains(&error.kind()));
        }
    }
}

/// Of more keys than one, one of them twice.
fn multi_get(keys: usize) -> Operation {
    let letters = (b'a'..).take(keys).chain([b'a']);
    let keys = letters.map(|letter| match Key::new([letter]) {
        Ok(key) => key,
        Err(_) => unreachable!("a letter is a key"),
    });
    Operation::GetMany {
        keys: keys.collect(),
    }
}

/// A value can only be one that came, under its own key, with its flags and its length.
fn check(operation: &Operation, response: &Response, reply: &[u8]) {
    let came = |key: &Key, value: &Value| {
        let places = memmem::find_iter(reply, b"VALUE ");
        let mut values = places.map(|place| &reply[place + b"VALUE ".len()..]);
        values.any(|rest| {
            let Some(rest) = rest.strip_prefix(key.as_bytes()) else {
                return false;
            };
            let Some((line, data)) = memmem::find(rest, b"\r\n").map(|end| rest.split_at(end + 2))
            else {
                return false;
            };
            // Leading zeros are the same number.
            let text = String::from_utf8_lossy(line);
            let numbers = text.trim().split(' ').map(|number| number.parse().ok());
            let expected = [u64::from(value.flags()), value.len() as u64];
            let cas = value.cas().map(|token| token.unique);
            numbers.eq(expected.into_iter().chain(cas).map(Some))
                && data
                    .strip_prefix(&value[..])
                    .is_some_and(|end| end.starts_with(b"\r\n"))
        })
    };
    match (operation, response) {
        (Operation::GetMany { keys }, Response::Values(outcomes)) => {
            assert_eq!(keys.len(), outcomes.len());
            for (key, outcome) in keys.iter().zip(outcomes) {
                if let Ok(Some(value)) = outcome {
                    assert!(came(key, value), "a value from nowhere");
                }
            }
        }
        (Operation::Lookup { key, .. }, Response::Found(lookup)) => {
            if let Found::Value { value, .. } = &lookup.found {
                assert!(came(key, value), "a value from nowhere");
            }
        }
        (operation, Response::Value(Some(value))) => {
            let key = operation.key();
            assert!(
                key.is_some_and(|key| came(key, value)),
                "a value from nowhere"
            );
        }
        _ => {}
    }
}
