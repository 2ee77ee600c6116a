//! What is compressed, and how that is told.

use crate::error::{Invalid, not_zero};
use crate::value::ABSENT_FLAGS;

/// How values are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum Algorithm {
    /// Not at all. What others have compressed is read.
    None,
    /// As an LZ4 frame (feature `lz4`): the fastest.
    Lz4,
    /// As a Zstandard frame (feature `zstd`): the smallest.
    Zstd,
}

impl Algorithm {
    const fn is_built_in(self) -> bool {
        match self {
            Self::None => true,
            Self::Lz4 => cfg!(feature = "lz4"),
            Self::Zstd => cfg!(feature = "zstd"),
        }
    }
}

/// Which values are compressed, how, and how that is told to whoever reads them.
///
/// What is stored is a whole frame of the algorithm's own standard, with its size and a checksum, as
/// the tools `lz4` and `zstd` and the libraries of every language read and write it. Which one it is
/// is in the value's client flags. Frames are read whatever [`algorithm`](Self::algorithm) is, if the
/// crate has the feature for it, so that values of both may be in one cache.
///
/// To introduce it, first have all clients read what none writes yet (`Algorithm::None`, the default),
/// then have them write it. To end it have them write none (`Algorithm::None`) again: a client that has no
/// settings, or other flags, gives out what is compressed as it is.
///
/// # Flags
///
/// | a value that is | has all of these bits, and no other of them | by default |
/// |---|---|---|
/// | an LZ4 frame | [`lz4_flag`](Self::lz4_flag) | `0x1000_0000` |
/// | a Zstandard frame | [`zstd_flag`](Self::zstd_flag) | `0x2000_0000` |
/// | as it is | none | |
///
/// The other bits are the caller's own. These two are used by no client that we know of: libmemcached's
/// PHP and Python clients use the low 16 bits, spymemcached and Dalli the low ones too.
///
/// ```
/// use tower_memcached::{Algorithm, CompressionSettings};
///
/// let settings = CompressionSettings::default()
///     .algorithm(Algorithm::Zstd)
///     .threshold(4096)
///     .max_decompressed(4 << 20);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
pub struct CompressionSettings {
    pub(super) algorithm: Algorithm,
    pub(super) threshold: usize,
    pub(super) level: i32,
    pub(super) max_decompressed: usize,
    pub(super) lz4_flag: u32,
    pub(super) zstd_flag: u32,
}

/// What is shorter may be a number, which memcached has to be able to count up.
const LEAST_THRESHOLD: usize = 64;

/// The levels of Zstandard that are not for archives: 1 MiB takes 7 ms at 3, 80 ms at 12, and more beyond.
const LEVELS: std::ops::RangeInclusive<i32> = -7..=12;

impl Default for CompressionSettings {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::None,
            threshold: 1024,
            level: 1,
            max_decompressed: 8 << 20,
            lz4_flag: 0x1000_0000,
            zstd_flag: 0x2000_0000,
        }
    }
}

impl CompressionSettings {
    /// How values are compressed; not at all by default.
    #[must_use]
    pub fn algorithm(mut self, algorithm: Algorithm) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// Values of so many bytes and more are compressed, and stored so if they are smaller then; 1,024 by
    /// default, and at least 64.
    ///
    /// Measured with JSON (compressing, decompressing, and what is left), on one core of a server:
    ///
    /// | bytes | LZ4 | Zstandard, level 1 |
    /// |---|---|---|
    /// | 256 | 1 us, 0.2 us, 71 % | 14 us, 11 us, 55 % |
    /// | 1,024 | 2 us, 1 us, 45 % | 15 us, 11 us, 30 % |
    /// | 4,096 | 6 us, 3 us, 35 % | 23 us, 14 us, 19 % |
    /// | 65,536 | 68 us, 38 us, 30 % | 121 us, 56 us, 16 % |
    /// | 1 MiB | 7 ms, 2 ms, 29 % | 4 ms, 1.5 ms, 17 % |
    ///
    /// At 1,024 bytes both cost less than the answer of a node in the same data centre, and save more
    /// than half.
    #[must_use]
    pub fn threshold(mut self, bytes: usize) -> Self {
        self.threshold = bytes;
        self
    }

    /// How much Zstandard tries, from -7, which is fast, to 12, which is slow; 1 by default. LZ4 has no
    /// levels here.
    #[must_use]
    pub fn level(mut self, level: i32) -> Self {
        self.level = level;
        self
    }

    /// The largest value, in bytes, that comes of one that was compressed; 8 MiB by default. A larger one
    /// is an [`ErrorKind::ValueTooLarge`](crate::ErrorKind::ValueTooLarge) to read, found before there is
    /// memory for more, and is not compressed when it is written. How large it may be on the wire is the
    /// client's [`max_value_size`](crate::ClientBuilder::max_value_size). It is for each value: of many keys
    /// that are read at once each may take as much.
    #[must_use]
    pub fn max_decompressed(mut self, bytes: usize) -> Self {
        self.max_decompressed = bytes;
        self
    }

    /// The client flags of an LZ4 frame: one bit or several, `0x1000_0000` by default.
    #[must_use]
    pub fn lz4_flag(mut self, bits: u32) -> Self {
        self.lz4_flag = bits;
        self
    }

    /// The client flags of a Zstandard frame: one bit or several, `0x2000_0000` by default.
    #[must_use]
    pub fn zstd_flag(mut self, bits: u32) -> Self {
        self.zstd_flag = bits;
        self
    }

    pub(crate) fn validate(&self) -> Result<(), Invalid> {
        if !self.algorithm.is_built_in() {
            let why = "the crate is built without the feature of that name";
            return Err(Invalid::new("algorithm", why));
        }
        if self.threshold < LEAST_THRESHOLD {
            let why = format!("is under {LEAST_THRESHOLD}: numbers would be compressed, too");
            return Err(Invalid::new("threshold", why));
        }
        if !LEVELS.contains(&self.level) {
            let why = format!("is not from {} to {}", LEVELS.start(), LEVELS.end());
            return Err(Invalid::new("level", why));
        }
        not_zero("max_decompressed", self.max_decompressed == 0)?;
        for (setting, flag) in [("lz4_flag", self.lz4_flag), ("zstd_flag", self.zstd_flag)] {
            not_zero(setting, flag == 0)?;
            if flag & ABSENT_FLAGS != 0 {
                let why =
                    format!("shares a bit with {ABSENT_FLAGS:#x}, the flags of what is absent");
                return Err(Invalid::new(setting, why));
            }
        }
        if self.lz4_flag == self.zstd_flag {
            return Err(Invalid::new("zstd_flag", "is the same as lz4_flag"));
        }
        Ok(())
    }

    /// The bits that tell.
    pub(crate) fn mask(&self) -> u32 {
        self.lz4_flag | self.zstd_flag
    }
}
