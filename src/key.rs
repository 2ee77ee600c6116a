//! Keys that cannot carry commands: parsed once, then trusted everywhere.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use thiserror::Error as ThisError;

use crate::error::{Error, ErrorKind, Result};

/// The longest key memcached takes, in bytes as sent (`KEY_MAX_LENGTH` in its source).
pub const MAX_KEY_LENGTH: usize = 250;

/// Keys up to this long live in the [`Key`] itself, without an allocation; it makes a key 40 bytes.
const INLINE: usize = 37;

/// A memcached key: 1 to 250 bytes as sent, none of them a space or a control character.
///
/// Parse it once and reuse it: cloning never allocates. Every operation also takes `&str`,
/// `String`, byte slices and vectors through [`IntoKey`]; an invalid key is an error of the
/// operation and nothing is sent.
///
/// ```
/// use tower_memcached::Key;
///
/// let key = Key::new("user:42")?;
/// assert_eq!(key.as_bytes(), b"user:42");
/// assert!(Key::new("user 42\r\nflush_all").is_err());
/// # Ok::<(), tower_memcached::Error>(())
/// ```
#[derive(Clone)]
pub struct Key(Repr);

#[derive(Clone)]
enum Repr {
    Inline {
        len: u8,
        binary: bool,
        bytes: [u8; INLINE],
    },
    Shared {
        binary: bool,
        bytes: Arc<[u8]>,
    },
}

/// What is wrong with a key; the [`source`](std::error::Error::source) of
/// [`ErrorKind::InvalidKey`].
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum InvalidKey {
    /// No bytes at all.
    #[error("the key is empty")]
    Empty,
    /// Longer than the server takes.
    #[error("the key {start:?}... is {length} bytes as sent, over the limit of 250")]
    TooLong {
        /// Its length in bytes as sent.
        length: usize,
        /// How it begins.
        start: String,
    },
    /// A byte that would end the key, or the command.
    #[error(
        "the key {key:?} holds the byte 0x{byte:02x} at offset {offset}: no spaces or control characters"
    )]
    Forbidden {
        /// The offending byte.
        byte: u8,
        /// Where it is.
        offset: usize,
        /// The key, escaped.
        key: String,
    },
}

impl From<InvalidKey> for Error {
    fn from(invalid: InvalidKey) -> Self {
        Self::new(ErrorKind::InvalidKey, invalid.to_string()).with_source(invalid)
    }
}

fn printable(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

impl Key {
    /// Checks and keeps a key given as text or bytes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidKey`] if it is empty, over 250 bytes, or holds a space or a control
    /// character (bytes up to 0x20, and 0x7f). Bytes from 0x80 on are allowed: memcached does not
    /// interpret them.
    pub fn new(key: impl AsRef<[u8]>) -> Result<Self> {
        let key = key.as_ref();
        Self::check(key)?;
        Ok(Self::from_checked(key, false))
    }

    /// A key of arbitrary bytes, sent base64-encoded (the meta protocol's `b` flag) and stored by
    /// the server as the bytes themselves. At most 186 bytes: the limit of 250 is on what is sent.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidKey`] if it is empty or too long.
    pub fn binary(key: impl AsRef<[u8]>) -> Result<Self> {
        let encoded = BASE64.encode(key.as_ref());
        Self::check(encoded.as_bytes())?;
        Ok(Self::from_checked(encoded.as_bytes(), true))
    }

    /// The same for the same bytes, in every map and run of this process.
    pub(crate) fn fixed_hash(&self) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        hasher.write(self.as_bytes());
        hasher.finish()
    }

    fn check(key: &[u8]) -> Result<(), InvalidKey> {
        if key.is_empty() {
            return Err(InvalidKey::Empty);
        }
        if key.len() > MAX_KEY_LENGTH {
            return Err(InvalidKey::TooLong {
                length: key.len(),
                start: printable(&key[..32]),
            });
        }
        match key.iter().position(|&byte| byte <= b' ' || byte == 0x7f) {
            Some(offset) => Err(InvalidKey::Forbidden {
                byte: key[offset],
                offset,
                key: printable(key),
            }),
            None => Ok(()),
        }
    }

    fn from_checked(key: &[u8], binary: bool) -> Self {
        if key.len() <= INLINE {
            let mut bytes = [0; INLINE];
            bytes[..key.len()].copy_from_slice(key);
            Self(Repr::Inline {
                len: key.len() as u8,
                binary,
                bytes,
            })
        } else {
            Self(Repr::Shared {
                binary,
                bytes: key.into(),
            })
        }
    }

    /// The key as it is sent, and as the ring hashes it: for a [`binary`](Self::binary) key its
    /// base64 text.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Repr::Inline { len, bytes, .. } => &bytes[..usize::from(*len)],
            Repr::Shared { bytes, .. } => bytes,
        }
    }

    /// Whether it is sent base64-encoded.
    #[must_use]
    pub fn is_binary(&self) -> bool {
        match &self.0 {
            Repr::Inline { binary, .. } | Repr::Shared { binary, .. } => *binary,
        }
    }

    /// This key with `prefix` before it, as a functional group names its keys.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidKey`] if the result is too long or the prefix holds a forbidden byte.
    pub fn prefixed(&self, prefix: impl AsRef<[u8]>) -> Result<Self> {
        if self.is_binary() {
            // It was encoded by us a moment ago, so decoding cannot fail; if it did, the key
            // would be invalid, which is what the error says.
            let raw = BASE64.decode(self.as_bytes()).unwrap_or_default();
            return Self::binary([prefix.as_ref(), &raw].concat());
        }
        let (prefix, own) = (prefix.as_ref(), self.as_bytes());
        // On the stack: a group does this for each of its requests.
        let mut joined = [0; MAX_KEY_LENGTH];
        match joined.get_mut(..prefix.len() + own.len()) {
            Some(joined) => {
                let (before, behind) = joined.split_at_mut(prefix.len());
                before.copy_from_slice(prefix);
                behind.copy_from_slice(own);
                Self::new(joined)
            }
            None => Self::new([prefix, own].concat()),
        }
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes() && self.is_binary() == other.is_binary()
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_bytes().hash(state);
        self.is_binary().hash(state);
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(self.as_bytes()))
    }
}

/// What every operation takes as a key. A [`Key`] is passed on as it is; text and bytes are
/// checked first.
pub trait IntoKey {
    /// Checks and converts.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidKey`], as for [`Key::new`].
    fn into_key(self) -> Result<Key>;
}

impl IntoKey for Key {
    fn into_key(self) -> Result<Key> {
        Ok(self)
    }
}

impl IntoKey for &Key {
    fn into_key(self) -> Result<Key> {
        Ok(self.clone())
    }
}

macro_rules! into_key {
    ($($kind:ty),*) => {$(
        impl IntoKey for $kind {
            fn into_key(self) -> Result<Key> {
                Key::new(AsRef::<[u8]>::as_ref(&*self))
            }
        }
    )*};
}
into_key!(
    &str,
    &&str,
    std::borrow::Cow<'_, str>,
    String,
    &String,
    &[u8],
    Vec<u8>,
    &Vec<u8>,
    Bytes,
    &Bytes
);

impl<const N: usize> IntoKey for &[u8; N] {
    fn into_key(self) -> Result<Key> {
        Key::new(self)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    fn invalid(key: &[u8]) -> InvalidKey {
        let error = Key::new(key).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidKey);
        error
            .source()
            .and_then(|source| source.downcast_ref::<InvalidKey>())
            .unwrap()
            .clone()
    }

    #[test]
    fn refuses_what_could_carry_a_command_and_names_it() {
        assert_eq!(invalid(b""), InvalidKey::Empty);
        for byte in (0..=b' ').chain([0x7f]) {
            let found = invalid(&[b'k', byte, b'x']);
            assert!(
                matches!(found, InvalidKey::Forbidden { byte: b, offset: 1, .. } if b == byte),
                "{byte}: {found:?}"
            );
        }
        let injected = Key::new("k\r\nflush_all").unwrap_err().to_string();
        assert!(
            injected.contains(r"k\\r\\nflush_all") && injected.contains("0x0d"),
            "{injected}"
        );
    }

    #[test]
    fn takes_250_bytes_and_refuses_251() {
        for length in [1, INLINE, INLINE + 1, MAX_KEY_LENGTH] {
            let key = Key::new(vec![b'k'; length]).unwrap();
            assert_eq!(key.as_bytes().len(), length);
            assert_eq!(key, key.clone());
        }
        assert!(matches!(
            invalid(&[b'k'; MAX_KEY_LENGTH + 1]),
            InvalidKey::TooLong { length: 251, .. }
        ));
    }

    #[test]
    fn the_limit_is_on_the_encoded_key() {
        assert_eq!(Key::binary([0; 186]).unwrap().as_bytes().len(), 248);
        assert!(Key::binary([0; 187]).is_err());
        assert_ne!(Key::binary("k").unwrap(), Key::new("aw==").unwrap());
    }

    #[test]
    fn a_prefix_is_checked_like_the_rest() {
        let key = Key::new("42").unwrap();
        assert_eq!(key.prefixed("user:").unwrap().as_bytes(), b"user:42");
        assert!(key.prefixed("a b").is_err());
        assert!(key.prefixed([b'p'; 249]).is_err());
        let binary = Key::binary(b"\x00").unwrap().prefixed(b"\xff").unwrap();
        assert_eq!(binary, Key::binary(b"\xff\x00").unwrap());
    }

    #[test]
    fn is_small_enough_to_pass_by_value() {
        assert_eq!(size_of::<Key>(), 40);
    }
}
