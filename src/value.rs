//! Values: what is stored, and what comes back.

use std::fmt;
use std::num::NonZeroU32;
use std::ops::Deref;

use bytes::Bytes;
use memchr::memmem;

/// A value as the cache had it: bytes, the client flags stored with them, and a CAS token when it
/// was asked for ([`Client::gets`](crate::Client::gets)). Dereferences to `[u8]`.
#[derive(Clone, PartialEq, Eq)]
pub struct Value {
    data: Bytes,
    flags: u32,
    cas: Option<CasToken>,
    stale: bool,
}

impl Value {
    /// A value made by hand, for layers and tests.
    #[must_use]
    pub fn new(data: impl Into<Bytes>, flags: u32) -> Self {
        Self {
            data: data.into(),
            flags,
            cas: None,
            stale: false,
        }
    }

    pub(crate) fn into_stale(mut self) -> Self {
        self.stale = true;
        self
    }

    /// The same value with other bytes, and the client flags that say what these are.
    pub(crate) fn recoded(self, data: Bytes, flags: u32) -> Self {
        Self {
            data,
            flags,
            ..self
        }
    }

    pub(crate) fn with_cas(mut self, cas: Option<CasToken>) -> Self {
        self.cas = cas;
        self
    }

    /// The 32-bit client flags stored with the value; 0 unless the writer set them
    /// ([`Payload::with_flags`]).
    #[must_use]
    pub fn flags(&self) -> u32 {
        self.flags
    }

    /// The token for [`Client::cas`](crate::Client::cas); present on values from `gets`.
    #[must_use]
    pub fn cas(&self) -> Option<CasToken> {
        self.cas
    }

    /// Whether it is past its TTL, and was given all the same, because it is being loaded anew or
    /// cannot be: only a [read-through](crate::read_through) that was told to does that.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    /// The bytes, without copying.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        self.data
    }
}

impl Deref for Value {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.data
    }
}

impl AsRef<[u8]> for Value {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl From<Value> for Bytes {
    fn from(value: Value) -> Self {
        value.data
    }
}

impl PartialEq<[u8]> for Value {
    fn eq(&self, other: &[u8]) -> bool {
        *self.data == *other
    }
}

impl PartialEq<&[u8]> for Value {
    fn eq(&self, other: &&[u8]) -> bool {
        *self.data == **other
    }
}

impl<const N: usize> PartialEq<&[u8; N]> for Value {
    fn eq(&self, other: &&[u8; N]) -> bool {
        *self.data == other[..]
    }
}

impl PartialEq<str> for Value {
    fn eq(&self, other: &str) -> bool {
        *self.data == *other.as_bytes()
    }
}

impl PartialEq<&str> for Value {
    fn eq(&self, other: &&str) -> bool {
        *self.data == *other.as_bytes()
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Value")
            .field("data", &self.data)
            .field("flags", &self.flags)
            .field("cas", &self.cas)
            .field("stale", &self.stale)
            .finish()
    }
}

/// What is to be stored: bytes and client flags. Every writing operation takes
/// `impl Into<Payload>`: text, byte literals, slices, vectors, [`Bytes`], or a [`Value`] that was
/// read (with its flags). Only [`Bytes`] and owned vectors and strings avoid a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    data: Bytes,
    flags: u32,
}

impl Payload {
    /// Sets the client flags stored with the bytes, 0 by default. memcached keeps 32 bits and
    /// silently truncates more, so there are no more here.
    #[must_use]
    pub fn with_flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    /// The bytes to be stored.
    #[must_use]
    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// The client flags to be stored.
    #[must_use]
    pub fn flags(&self) -> u32 {
        self.flags
    }
}

impl Payload {
    /// Says that the database has nothing under this key. Reads take it for a miss; only a
    /// [read-through](crate::read_through) tells it from one.
    pub(crate) fn absent() -> Self {
        Self::from(Bytes::from_static(ABSENT)).with_flags(ABSENT_FLAGS)
    }
}

impl From<Bytes> for Payload {
    fn from(data: Bytes) -> Self {
        Self { data, flags: 0 }
    }
}

impl From<&Bytes> for Payload {
    fn from(data: &Bytes) -> Self {
        data.clone().into()
    }
}

impl From<Vec<u8>> for Payload {
    fn from(data: Vec<u8>) -> Self {
        Bytes::from(data).into()
    }
}

impl From<String> for Payload {
    fn from(data: String) -> Self {
        Bytes::from(data).into()
    }
}

impl From<&[u8]> for Payload {
    fn from(data: &[u8]) -> Self {
        Bytes::copy_from_slice(data).into()
    }
}

impl<const N: usize> From<&[u8; N]> for Payload {
    fn from(data: &[u8; N]) -> Self {
        data[..].into()
    }
}

impl From<&str> for Payload {
    fn from(data: &str) -> Self {
        data.as_bytes().into()
    }
}

impl From<&String> for Payload {
    fn from(data: &String) -> Self {
        data.as_bytes().into()
    }
}

impl From<Value> for Payload {
    fn from(value: Value) -> Self {
        Self {
            data: value.data,
            flags: value.flags,
        }
    }
}

impl From<Payload> for Value {
    fn from(payload: Payload) -> Self {
        Self::new(payload.data, payload.flags)
    }
}

/// What is stored in place of a value that the database does not have: `Payload::absent`.
pub(crate) const ABSENT: &[u8] = b"tower-memcached: absent";

/// Its client flags, "NONE" in ASCII. It takes both to be taken for one.
pub(crate) const ABSENT_FLAGS: u32 = 0x4e4f_4e45;

/// Whether it says that the database has nothing.
#[inline]
pub(crate) fn is_absent(flags: u32, data: &[u8]) -> bool {
    // Also if somebody has appended or prepended to it: nobody has written that as a value.
    flags == ABSENT_FLAGS && memmem::find(data, ABSENT).is_some()
}

/// What is stored in place of a value that somebody is loading, where the protocol has no leases of its
/// own. Reads take it for a miss. No two are alike.
#[derive(Debug)]
#[cfg(feature = "classic")]
pub(crate) struct Placeholder(Bytes);

const PLACEHOLDER: &[u8] = b"tower-memcached: lease ";

/// Its client flags, "HELD" in ASCII. None of its bits is missing in [`ABSENT_FLAGS`], which formats and
/// compression keep clear of.
pub(crate) const LEASE_FLAGS: u32 = 0x4845_4c44;

#[cfg(feature = "classic")]
impl Placeholder {
    /// In bytes.
    pub(crate) const LENGTH: usize = PLACEHOLDER.len() + 32;

    pub(crate) fn random() -> Self {
        let nonce = format!("{:032x}", fastrand::u128(..));
        Self([PLACEHOLDER, nonce.as_bytes()].concat().into())
    }

    pub(crate) fn payload(&self) -> Payload {
        Payload::from(&self.0).with_flags(LEASE_FLAGS)
    }

    /// Whether it is this one, as it was stored.
    pub(crate) fn is(&self, value: &Value) -> bool {
        value.flags == LEASE_FLAGS && value.data == self.0
    }
}

/// Whether it is the placeholder of a lease.
#[inline]
pub(crate) fn is_placeholder(flags: u32, data: &[u8]) -> bool {
    // Also if somebody has appended or prepended to it, as above.
    flags == LEASE_FLAGS && memmem::find(data, PLACEHOLDER).is_some()
}

/// Identifies a version of a value *at one node, as of one moment*.
///
/// The number the server gives is not enough: a restarted memcached counts from 1 again, and an
/// old number then matches another value (measured; the store succeeds). So a token remembers the
/// node and the newest connection to it at that time, and is only ever sent over a connection
/// that is no newer. Anywhere else [`Client::cas`](crate::Client::cas) answers
/// [`CasOutcome::Exists`](crate::CasOutcome::Exists) without sending it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CasToken {
    pub(crate) node: NonZeroU32,
    /// The newest connection number of the node when the read was sent.
    pub(crate) connection: u32,
    pub(crate) unique: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_made_from_what_callers_have() {
        let owned = String::from("v");
        let slice: &[u8] = b"v";
        for payload in [
            Payload::from("v"),
            Payload::from(b"v"),
            Payload::from(slice),
            Payload::from(&owned),
            Payload::from(owned.clone()),
            Payload::from(vec![b'v']),
            Payload::from(Bytes::from_static(b"v")),
            Payload::from(Value::new("v", 0)),
        ] {
            assert_eq!(payload, Payload::from("v"));
        }
        assert_eq!(Payload::from(Value::new("v", 7)).flags(), 7);
    }

    #[test]
    fn a_value_compares_with_bytes_and_text() {
        let value = Value::new("abc", 0);
        assert_eq!(value, "abc");
        assert_eq!(value, b"abc");
        assert_eq!(&value[1..], b"bc");
    }
}
