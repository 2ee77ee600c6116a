//! Compression: large values are stored as frames of LZ4 or Zstandard.
//!
//! What goes down is compressed, and what comes up is decompressed, on the task of whoever asks, and
//! never where I/O runs: a [`Client`](crate::Client) does it around its whole stack, and for what is
//! put back after a load on the task that has loaded it. For stacks built by hand there is a
//! [`CompressionLayer`].

mod layer;
#[cfg(feature = "lz4")]
mod lz4;
mod settings;
#[cfg(feature = "zstd")]
mod zstd;

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwapOption;

pub use layer::{Compressed, CompressedFuture, CompressionLayer};
pub use settings::{Algorithm, CompressionSettings};

use crate::error::{Error, ErrorKind, Result, Sent};
use crate::request::{Operation, Request, StoreMode};
use crate::response::{Found, Lookup, Response};
use crate::value::{Payload, Value};

/// The compression of a client or a group, if it has one; for all clones, while they run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Slot(Arc<Settings>);

#[derive(Debug, Default)]
struct Settings {
    /// Asked first: mostly there are none.
    are_there: AtomicBool,
    settings: ArcSwapOption<CompressionSettings>,
}

impl Slot {
    pub(crate) fn new(settings: Option<&CompressionSettings>) -> Self {
        let slot = Self::default();
        slot.set(settings);
        slot
    }

    pub(crate) fn set(&self, settings: Option<&CompressionSettings>) {
        self.0.settings.store(settings.cloned().map(Arc::new));
        self.0
            .are_there
            .store(settings.is_some(), Ordering::Release);
    }

    #[inline]
    pub(crate) fn get(&self) -> Option<Arc<CompressionSettings>> {
        match self.0.are_there.load(Ordering::Acquire) {
            true => self.0.settings.load_full(),
            false => None,
        }
    }
}

/// Why there is nothing to be had of a frame.
#[derive(Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "which there are depends on the features")]
pub(crate) enum Failure {
    TooLarge,
    Corrupt(&'static str),
    /// Which feature the crate would have to be built with.
    NotBuiltIn(&'static str),
}

#[cfg(not(feature = "lz4"))]
mod lz4 {
    use super::Failure;

    pub(super) fn compress(_: &[u8]) -> Option<Vec<u8>> {
        None
    }

    pub(super) fn decompress(_: &[u8], _: usize) -> Result<Vec<u8>, Failure> {
        Err(Failure::NotBuiltIn("lz4"))
    }
}

#[cfg(not(feature = "zstd"))]
mod zstd {
    use super::Failure;

    pub(super) fn compress(_: &[u8], _: i32) -> Option<Vec<u8>> {
        None
    }

    pub(super) fn decompress(_: &[u8], _: usize) -> Result<Vec<u8>, Failure> {
        Err(Failure::NotBuiltIn("zstd"))
    }
}

/// Zeros up to that length, growing as a vector does but to no more than `most`.
#[cfg(any(feature = "lz4", feature = "zstd"))]
fn make_room(output: &mut Vec<u8>, needed: usize, most: usize) {
    if needed > output.capacity() {
        let grown = needed.max(output.capacity().saturating_mul(2)).min(most);
        output.reserve_exact(grown - output.len());
    }
    if needed > output.len() {
        output.resize(needed, 0);
    }
}

impl CompressionSettings {
    /// Compresses what a request writes.
    pub(crate) fn write(&self, request: &mut Request) -> Result<()> {
        match request.operation_mut() {
            Operation::Store {
                mode: StoreMode::Append | StoreMode::Prepend,
                ..
            } => {
                let message =
                    "what is there may be compressed, and can be neither appended nor prepended to";
                Err(Error::new(ErrorKind::Unsupported, message))
            }
            Operation::Store { payload, .. } | Operation::CompareAndSwap { payload, .. } => {
                self.compress(payload)
            }
            _ => Ok(()),
        }
    }

    fn compress(&self, payload: &mut Payload) -> Result<()> {
        let (data, flags) = (payload.data(), payload.flags());
        if flags & self.mask() != 0 {
            let message = format!("the client flags {flags:#x} say that it is compressed already");
            return Err(Error::new(ErrorKind::Codec, message));
        }
        if data.len() < self.threshold || data.len() > self.max_decompressed {
            return Ok(());
        }
        let (compressed, flag) = match self.algorithm {
            Algorithm::Lz4 => (lz4::compress(data), self.lz4_flag),
            Algorithm::Zstd => (zstd::compress(data, self.level), self.zstd_flag),
            Algorithm::None => return Ok(()),
        };
        if let Some(compressed) = compressed
            && compressed.len() < data.len()
        {
            *payload = Payload::from(compressed).with_flags(flags | flag);
        }
        Ok(())
    }

    /// Decompresses what was read.
    pub(crate) fn read(&self, response: Response) -> Result<Response> {
        Ok(match response {
            Response::Value(Some(value)) => Response::Value(Some(self.decompress(value)?)),
            Response::Values(mut outcomes) => {
                for outcome in &mut outcomes {
                    if let Ok(value) = outcome
                        && let Some(compressed) = value.take_if(|value| self.concerns(value))
                    {
                        *outcome = self.decompress(compressed).map(Some);
                    }
                }
                Response::Values(outcomes)
            }
            Response::Found(mut lookup) => {
                self.read_found(&mut lookup);
                Response::Found(lookup)
            }
            other => other,
        })
    }

    /// The same of what was looked up: what cannot be decompressed is there, and of no use.
    pub(crate) fn read_found(&self, lookup: &mut Lookup) {
        if !matches!(&lookup.found, Found::Value { value, .. } if self.concerns(value)) {
            return;
        }
        if let Found::Value { value, left } = mem::replace(&mut lookup.found, Found::Unreadable)
            && let Ok(value) = self.decompress(value)
        {
            lookup.found = Found::Value { value, left };
        }
    }

    fn concerns(&self, value: &Value) -> bool {
        value.flags() & self.mask() != 0
    }

    fn decompress(&self, value: Value) -> Result<Value> {
        if !self.concerns(&value) {
            return Ok(value);
        }
        let flags = value.flags();
        match self.expand(&value, flags) {
            Ok(data) => Ok(value.recoded(data.into(), flags & !self.mask())),
            Err(failure) => Err(self.failed(failure, flags)),
        }
    }

    /// What a frame with these client flags stands for. Never are more bytes allocated for it than it may
    /// stand for.
    pub(crate) fn expand(&self, frame: &[u8], flags: u32) -> Result<Vec<u8>, Failure> {
        let (flag, most) = (flags & self.mask(), self.max_decompressed);
        if flag == self.lz4_flag {
            lz4::decompress(frame, most)
        } else if flag == self.zstd_flag {
            zstd::decompress(frame, most)
        } else {
            Err(Failure::Corrupt("the flags are of neither algorithm"))
        }
    }

    fn failed(&self, failure: Failure, flags: u32) -> Error {
        let most = self.max_decompressed;
        let (kind, message) = match failure {
            Failure::TooLarge => (
                ErrorKind::ValueTooLarge,
                format!("it would be over {most} bytes decompressed"),
            ),
            Failure::Corrupt(why) => (
                ErrorKind::Codec,
                format!("a value with the client flags {flags:#x} cannot be decompressed: {why}"),
            ),
            Failure::NotBuiltIn(feature) => (
                ErrorKind::Unsupported,
                format!("a value is compressed with {feature}, and the crate is built without it"),
            ),
        };
        Error::new(kind, message).with_sent(Sent::Yes)
    }
}

#[cfg(all(test, feature = "lz4", feature = "zstd"))]
mod tests;

#[cfg(all(test, not(feature = "zstd")))]
mod tests_without_zstd {
    use super::*;

    #[test]
    fn what_the_crate_cannot_decompress_is_unsupported_and_never_given_out() {
        let settings = CompressionSettings::default();
        let value = Value::new("a frame", settings.zstd_flag);
        let error = settings.decompress(value).unwrap_err();
        assert_eq!(
            (error.kind(), error.sent()),
            (ErrorKind::Unsupported, Sent::Yes)
        );
    }

    #[test]
    fn what_the_crate_cannot_compress_is_refused() {
        let settings = CompressionSettings::default().algorithm(Algorithm::Zstd);
        let error = Error::from(settings.validate().unwrap_err());
        assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
        assert!(
            error
                .to_string()
                .contains("algorithm: the crate is built without")
        );
    }
}
