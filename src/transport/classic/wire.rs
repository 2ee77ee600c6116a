//! One request and its answer, over a connection that nobody else uses meanwhile.
//!
//! [memcache-async](memcache_async) says and reads what it can say completely: get, gets, multi-key
//! get, incr, decr, version and flush_all. It does so over a [`Guard`], because by itself it believes
//! whatever it reads. Everything else it either has no words for (client flags, replace, prepend,
//! touch, stats), or sends with `noreply`: then a server that refuses the request says nothing, or
//! says it to the next one, and asking for the version behind it is no proof that it was done, since a
//! proxy may answer that by itself. So those are [encoded](encode) here, over the same guard, and each
//! write is acknowledged by its own reply.
//!
//! A get-and-touch is two steps, a `touch` and a `get` in one write: servers before 1.5.3 have no
//! `gat`, and twemproxy closes the connection on it. Another client may write or delete the key in
//! between. It is a miss if there was nothing at either moment; a value that was read may be one that
//! was written behind the touch, with the TTL its writer gave it.
//!
//! A look-up is a `gets` here, with a lease or without: what a lease takes besides are
//! [questions of their own](super::lease).
//!
//! An answer may make us hold, in all, as many values as keys were asked for, of up to the largest
//! length each: as with the pipelined transport, nothing that was not asked for.

use std::io;

use bytes::Bytes;
use memcache_async::ascii::Protocol;

use super::check::{Arrived, Check};
use super::encode::encode;
use super::guard::{Guard, Link};
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::protocol::{check_value, too_large};
use crate::request::{Direction, Operation};
use crate::response::{Found, LeaseState, Lookup, Response};
use crate::transport::BoxStream;
use crate::value::{CasToken, Value, is_absent, is_placeholder};

/// A connection that speaks the classic protocol.
pub(super) struct Wire {
    link: Link,
    /// The longest value that is sent or read, in bytes.
    max_value: usize,
}

impl Wire {
    pub(super) fn new(stream: BoxStream, max_value: usize) -> Self {
        Self {
            link: Link::new(stream),
            max_value,
        }
    }

    /// From the first byte given to the stream to the last one of its answer; and for ever once what
    /// comes next cannot be known: the connection must then be closed.
    pub(super) fn is_dirty(&self) -> bool {
        self.link.is_dirty()
    }

    /// Something of the present request, or of the last one, may have left this process.
    pub(super) fn has_sent(&self) -> bool {
        self.link.has_sent()
    }

    /// The bytes kept for what is received.
    #[cfg(feature = "testing")]
    pub(super) fn held(&self) -> usize {
        self.link.held()
    }

    pub(super) fn into_stream(self) -> BoxStream {
        self.link.into_stream()
    }

    /// Sends a request, and waits for its answer without an end: whoever calls this has a deadline.
    /// The tokens of values are `base` with the server's own number.
    ///
    /// Dropped, it leaves the connection [dirty](Self::is_dirty) if anything was sent.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] and [`ErrorKind::ValueTooLarge`] before anything is sent;
    /// [`ErrorKind::ConnectionLost`], also before anything is sent if the server has closed it
    /// meanwhile; [`ErrorKind::Protocol`]; and what the server answers.
    pub(super) async fn exchange(
        &mut self,
        operation: &Operation,
        base: CasToken,
    ) -> Result<Response> {
        check_value(operation, self.max_value)?;
        if let Operation::GetMany { keys } = operation
            && keys.is_empty()
        {
            return Ok(Response::Values(Vec::new()));
        }
        let check = check(operation, self.max_value)?;
        self.link.begin().await?;
        let mut guard = Guard::new(&mut self.link, check);
        guard.put(|out| encode(operation, out));
        let answer = ask(&mut guard, operation).await;
        let check = guard.finish()?;
        answer
            .ok()
            .and_then(|answer| answer.into_response(operation, &check, base))
            .unwrap_or_else(|| {
                Err(Error::new(
                    ErrorKind::Protocol,
                    "an answer that cannot be read",
                ))
            })
    }
}

/// Why a request cannot be made in the classic protocol.
pub(super) fn unsupported(operation: &Operation) -> Option<Error> {
    check(operation, usize::MAX).err()
}

/// Why a request cannot be made through a proxy, besides. It does not pass on what is said to all
/// servers, and which process of a server it asks is not known: after a restart that numbers its values
/// anew, and a token of the one before might fit a value that is another.
pub(super) fn unsupported_by_proxies(operation: &Operation) -> Option<Error> {
    let why = match operation {
        Operation::CompareAndSwap { .. } => {
            "through a proxy it is not known whether a token is still its server's"
        }
        Operation::FlushAll | Operation::Stats => "proxies do not pass this on to their servers",
        _ => return None,
    };
    Some(Error::new(ErrorKind::Unsupported, why))
}

/// How the answer to `operation` is read.
fn check(operation: &Operation, max_value: usize) -> Result<Check<'_>> {
    let keys = match operation {
        Operation::GetMany { keys } => &keys[..],
        _ => operation.key().map_or(&[][..], std::slice::from_ref),
    };
    if keys.iter().any(Key::is_binary) {
        let why = "the classic protocol has no base64 keys";
        return Err(Error::new(ErrorKind::Unsupported, why));
    }
    Ok(Check::new(operation, max_value))
}

/// What was answered, but for what memcache-async does not tell of values.
enum Answer {
    One(Option<Vec<u8>>),
    /// By the place of the key.
    Many(std::collections::HashMap<String, Vec<u8>>),
    Whole(Response),
}

async fn ask(guard: &mut Guard<'_, '_>, operation: &Operation) -> io::Result<Answer> {
    let one = |value: io::Result<Vec<u8>>| found(value).map(Answer::One);
    match operation {
        Operation::Get {
            key,
            with_cas: false,
        }
        | Operation::GetAndTouch { key, .. } => one(Protocol::new(guard).get(key.as_bytes()).await),
        Operation::Get { key, .. } | Operation::Lookup { key, .. } => {
            let gets = Protocol::new(guard).gets_cas(key.as_bytes()).await;
            one(gets.map(|(value, _)| value))
        }
        Operation::GetMany { keys } => {
            let keys: Vec<_> = keys.iter().map(Key::as_bytes).collect();
            let values = Protocol::new(guard).get_multi(&keys).await;
            values.map(Answer::Many)
        }
        Operation::Arithmetic {
            key,
            delta,
            direction,
        } => {
            let (mut protocol, key) = (Protocol::new(guard), key.as_bytes());
            let number = match direction {
                Direction::Up => protocol.increment(key, *delta).await,
                Direction::Down => protocol.decrement(key, *delta).await,
            };
            found(number).map(|number| Answer::Whole(Response::Counter(number)))
        }
        Operation::Version => {
            let version = Protocol::new(guard).version().await;
            version.map(|version| Answer::Whole(Response::Version(version)))
        }
        Operation::FlushAll => {
            let flushed = Protocol::new(guard).flush().await;
            flushed.map(|()| Answer::Whole(Response::Flushed))
        }
        _ => guard.ask().await.map(Answer::Whole),
    }
}

fn found<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl Answer {
    /// `None` if it is not what the check has seen.
    fn into_response(
        self,
        operation: &Operation,
        check: &Check<'_>,
        base: CasToken,
    ) -> Option<Result<Response>> {
        match self {
            Self::Whole(response) => Some(Ok(response)),
            Self::One(data) => {
                let values = check.values()?;
                let outcome = found_value(*values.arrived.first()?, data, base)?;
                if let Operation::Lookup { .. } = operation {
                    return Some(
                        outcome.map(|found| Response::Found(Box::new(found.into_lookup()))),
                    );
                }
                let outcome = outcome.map(FoundValue::into_value);
                // What came after a touch that found nothing was not there to be touched.
                let there = values.touched() != Some(false);
                Some(outcome.map(|value| Response::Value(value.filter(|_| there))))
            }
            Self::Many(mut data) => {
                let values = check.values()?;
                let mut place = itoa::Buffer::new();
                let outcomes = values.arrived.iter().enumerate().map(|(index, arrived)| {
                    let data = data.remove(place.format(index));
                    let found = found_value(*arrived, data, base)?;
                    Some(found.map(FoundValue::into_value))
                });
                let outcomes = outcomes.collect::<Option<_>>();
                outcomes.map(|outcomes| Ok(Response::Values(outcomes)))
            }
        }
    }
}

/// What was asked for at one place, from what the check has seen and what memcache-async has read.
fn found_value(
    arrived: Arrived,
    data: Option<Vec<u8>>,
    base: CasToken,
) -> Option<Result<FoundValue>> {
    match (arrived, data) {
        (Arrived::Nothing, None) => Some(Ok(FoundValue::Nothing)),
        (Arrived::TooLarge(length), None) => Some(Err(too_large(length))),
        (Arrived::Value { flags, cas }, Some(data)) => {
            let cas = cas.map(|unique| CasToken { unique, ..base });
            Some(Ok(match is_absent(flags, &data) {
                true => FoundValue::Absent(cas),
                false => {
                    let value = Value::new(Bytes::from(data), flags);
                    FoundValue::Value(value.with_cas(cas))
                }
            }))
        }
        _ => None,
    }
}

/// What is under a key.
enum FoundValue {
    Nothing,
    /// It is known that there is no such thing in the database.
    Absent(Option<CasToken>),
    Value(Value),
}

impl FoundValue {
    fn into_value(self) -> Option<Value> {
        match self {
            Self::Nothing | Self::Absent(_) => None,
            // Somebody loads it; there is no value yet.
            Self::Value(value) => Some(value).filter(|value| !is_placeholder(value.flags(), value)),
        }
    }

    /// What TTL is left is not told. The placeholder of a lease is a value still: whose it is is not for
    /// this to tell (see [`Looking`](super::lease::Looking)).
    fn into_lookup(self) -> Lookup {
        let (found, token) = match self {
            Self::Nothing => (Found::Nothing, None),
            Self::Absent(token) => (Found::Absent { left: None }, token),
            Self::Value(value) => {
                let token = value.cas();
                (Found::Value { value, left: None }, token)
            }
        };
        Lookup::new(found, token, LeaseState::Unknown)
    }
}
