//! Typed values: what is stored is encoded, what is read is decoded, and the client flags say as what.
//!
//! ```no_run
//! # #[derive(serde::Serialize, serde::Deserialize)] struct User { name: String }
//! # async fn example(client: tower_memcached::Client) -> Result<(), tower_memcached::Error> {
//! use tower_memcached::{Json, Ttl, Typed};
//!
//! let users: Typed<User, Json> = client.typed(Json::default())?;
//! let ann = User { name: "Ann".into() };
//! users.set("user:1", &ann, Ttl::secs(60)).await?;
//! let user = users.get("user:1").await?;
//! # Ok(())
//! # }
//! ```

mod typed;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use typed::Typed;

use crate::compression::CompressionSettings;
use crate::error::{BoxError, Error, ErrorKind, Result, Sent};
use crate::value::{ABSENT_FLAGS, LEASE_FLAGS, Payload, Value};

/// Which client flags say that a value is in a format: those that a [`Codec`] writes, and accepts.
///
/// | a value that is | has of the bits `0x00f0_0000` | by default |
/// |---|---|---|
/// | [`Json`] | `0x0010_0000` | |
/// | [`Postcard`] | `0x0020_0000` | |
/// | neither, such as bytes written without a codec | none | an error to read |
///
/// The other bits say nothing of the format, and are 0 when written; two of them are the
/// [compression's](crate::CompressionSettings), and a client that has none does not decode what has these.
/// To share values with another client, say what that one
/// writes:
///
/// ```
/// use tower_memcached::{Format, Json};
///
/// // php-memcached with SERIALIZER_JSON: of the low four bits, 6.
/// let php = Json::default().with_format(Format::new(0xf, 6));
/// // A client that sets no flags: all are JSON, whatever they say.
/// let plain = Json::default().with_format(Format::UNTAGGED);
/// // Once it has set none, and now does.
/// let both = Json::default().with_format(Json::FORMAT.or_untagged());
/// ```
///
/// With an id of its own for each version of a schema, no version is taken for another one. That is of
/// use for formats that do not describe themselves, such as postcard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    mask: u32,
    id: u32,
    or_untagged: bool,
}

impl Format {
    /// No flags are written, and all are accepted.
    pub const UNTAGGED: Self = Self::new(0, 0);

    /// What has these flags where the mask has bits. An id that has others is refused by
    /// [`Client::typed`](crate::Client::typed).
    #[must_use]
    pub const fn new(mask: u32, id: u32) -> Self {
        Self {
            mask,
            id,
            or_untagged: false,
        }
    }

    /// Accepts also what has none of the mask's bits.
    #[must_use]
    pub const fn or_untagged(mut self) -> Self {
        self.or_untagged = true;
        self
    }

    /// The flags that are written.
    #[must_use]
    pub const fn id(&self) -> u32 {
        self.id
    }

    /// Whether a value with these flags is in this format.
    #[must_use]
    pub const fn accepts(&self, flags: u32) -> bool {
        let format = flags & self.mask;
        format == self.id || (self.or_untagged && format == 0)
    }

    fn validate(&self, compression: Option<&CompressionSettings>) -> Result<()> {
        let Self { mask, id, .. } = *self;
        let why = if id & !mask != 0 {
            format!("has bits that its mask {mask:#x} has not")
        } else if id == ABSENT_FLAGS {
            "is that of what is absent".to_owned()
        } else if id == LEASE_FLAGS {
            "is that of leases".to_owned()
        } else if compression.is_some_and(|settings| settings.mask() & mask != 0) {
            format!("has a mask, {mask:#x}, with a bit that says what is compressed")
        } else {
            return Ok(());
        };
        Err(Error::configuration(format!("the format {id:#x} {why}")))
    }

    /// What the flags say, as far as that is known.
    fn called(&self, flags: u32) -> &'static str {
        let format = flags & self.mask;
        match [(Json::FORMAT, "json"), (Postcard::FORMAT, "postcard")]
            .into_iter()
            .find(|(known, _)| known.mask == self.mask && known.id == format)
        {
            Some((_, name)) => name,
            None if format == 0 => "none",
            None => "unknown",
        }
    }
}

const MASK: u32 = 0x00f0_0000;

/// Makes bytes of values, and values of bytes. [`Json`] and [`Postcard`] are there; others take a few
/// lines.
pub trait Codec: Send + Sync + 'static {
    /// What errors call it.
    fn name(&self) -> &str;

    /// Which client flags say that a value is its.
    fn format(&self) -> Format;

    /// Encodes a value.
    ///
    /// # Errors
    /// Whatever the encoding fails with: the source of an
    /// [`ErrorKind::Codec`](crate::ErrorKind::Codec).
    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Vec<u8>, BoxError>;

    /// Decodes a value, of all the bytes. They may be anybody's: it must not panic.
    ///
    /// # Errors
    /// Whatever the decoding fails with: the source of an
    /// [`ErrorKind::Codec`](crate::ErrorKind::Codec).
    fn decode<T: DeserializeOwned>(&self, data: &[u8]) -> Result<T, BoxError>;
}

/// What is to be stored for a value.
fn encode<C: Codec, T: Serialize + ?Sized>(codec: &C, value: &T) -> Result<Payload> {
    match codec.encode(value) {
        Ok(data) => Ok(Payload::from(data).with_flags(codec.format().id())),
        Err(source) => {
            let message = format!("it cannot be encoded as {}", codec.name());
            Err(Error::new(ErrorKind::Codec, message).with_source(source))
        }
    }
}

/// What was stored. The bits of `unread` say that it is compressed, in a way that nobody has undone.
fn decode<C: Codec, T: DeserializeOwned>(codec: &C, value: &Value, unread: u32) -> Result<T> {
    let (format, flags, name) = (codec.format(), value.flags(), codec.name());
    if !format.accepts(flags) {
        let (id, called) = (format.id(), format.called(flags));
        let message = format!(
            "the client flags {flags:#x} say that the format is {called}, and not {name}, {id:#x}"
        );
        return Err(Error::new(ErrorKind::Codec, message).with_sent(Sent::Yes));
    }
    // A format without a mask takes all for its own.
    if format.mask != 0 && flags & unread & !format.mask != 0 {
        let message = format!(
            "the client flags {flags:#x} say that it is compressed, and the client has no compression"
        );
        return Err(Error::new(ErrorKind::Codec, message).with_sent(Sent::Yes));
    }
    codec.decode(value).map_err(|source| {
        let message = format!("it cannot be decoded as {name}");
        let error = Error::new(ErrorKind::Codec, message).with_sent(Sent::Yes);
        error.with_source(source)
    })
}

/// JSON: every language reads it, and fields may be added and removed as serde allows.
#[derive(Clone, Copy, Debug)]
pub struct Json {
    format: Format,
}

impl Json {
    /// The client flags by default: of the bits `0x00f0_0000`, `0x0010_0000`.
    pub const FORMAT: Format = Format::new(MASK, 0x0010_0000);

    /// With other client flags.
    #[must_use]
    pub fn with_format(self, format: Format) -> Self {
        Self { format }
    }
}

impl Default for Json {
    fn default() -> Self {
        let format = Self::FORMAT;
        Self { format }
    }
}

impl Codec for Json {
    fn name(&self) -> &str {
        "json"
    }

    fn format(&self) -> Format {
        self.format
    }

    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Vec<u8>, BoxError> {
        Ok(serde_json::to_vec(value)?)
    }

    fn decode<T: DeserializeOwned>(&self, data: &[u8]) -> Result<T, BoxError> {
        Ok(serde_json::from_slice(data)?)
    }
}

/// Postcard: small and fast, for Rust.
///
/// It does not describe itself. A type whose fields have changed may decode what was stored before to
/// nonsense, without an error: have another [`Format`] id, or another key, for each version.
#[derive(Clone, Copy, Debug)]
pub struct Postcard {
    format: Format,
}

impl Postcard {
    /// The client flags by default: of the bits `0x00f0_0000`, `0x0020_0000`.
    pub const FORMAT: Format = Format::new(MASK, 0x0020_0000);

    /// With other client flags.
    #[must_use]
    pub fn with_format(self, format: Format) -> Self {
        Self { format }
    }
}

impl Default for Postcard {
    fn default() -> Self {
        let format = Self::FORMAT;
        Self { format }
    }
}

impl Codec for Postcard {
    fn name(&self) -> &str {
        "postcard"
    }

    fn format(&self) -> Format {
        self.format
    }

    fn encode<T: Serialize + ?Sized>(&self, value: &T) -> Result<Vec<u8>, BoxError> {
        Ok(postcard::to_stdvec(value)?)
    }

    fn decode<T: DeserializeOwned>(&self, data: &[u8]) -> Result<T, BoxError> {
        match postcard::take_from_bytes(data)? {
            (value, []) => Ok(value),
            (_, more) => Err(format!("there are {} bytes more", more.len()).into()),
        }
    }
}
