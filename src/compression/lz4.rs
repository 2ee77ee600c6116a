//! LZ4 frames (version 1.6.1 of the format).
//!
//! They are read here, and not by the library's reader, which takes a frame that is cut off between two
//! blocks for a whole one, and sets up to 12 MiB aside for a frame of 20 bytes that says it has large
//! blocks.

use std::io::Write as _;

use lz4_flex::block::{DecompressError, decompress_into_with_dict};
use lz4_flex::frame::{FrameEncoder, FrameInfo};
use twox_hash::XxHash32;

use super::{Failure, make_room};

const MAGIC: u32 = 0x184d_2204;

/// How far back a block may refer to those before it.
const WINDOW: usize = 64 * 1024;

/// A compressed byte stands for no more bytes than that.
const MOST_EXPANSION: usize = 255;

pub(super) fn compress(data: &[u8]) -> Option<Vec<u8>> {
    let info = FrameInfo::new()
        .content_size(Some(data.len() as u64))
        .content_checksum(true);
    let mut encoder = FrameEncoder::with_frame_info(info, Vec::with_capacity(data.len() / 2));
    encoder.write_all(data).ok()?;
    encoder.finish().ok()
}

/// What is yet to be read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Failure> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(CUT_OFF)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Failure> {
        Ok(self.take(1)?[0])
    }

    fn word(&mut self) -> Result<u32, Failure> {
        let bytes = self.take(4)?.iter().rev();
        Ok(bytes.fold(0, |word, &byte| word << 8 | u32::from(byte)))
    }
}

const CUT_OFF: Failure = Failure::Corrupt("it is cut off");

fn checksum(data: &[u8]) -> u32 {
    XxHash32::oneshot(0, data)
}

/// What the head of a frame says.
struct Head {
    linked: bool,
    block_checksums: bool,
    checksum: bool,
    most_in_block: usize,
    size: Option<usize>,
}

impl Head {
    fn read(input: &mut Input<'_>, most: usize) -> Result<Self, Failure> {
        if input.word()? != MAGIC {
            return Err(Failure::Corrupt("it is no LZ4 frame"));
        }
        let descriptor = input.0;
        let (flags, block) = (input.byte()?, input.byte()?);
        let most_in_block = match block {
            0x40 => 64 << 10,
            0x50 => 256 << 10,
            0x60 => 1 << 20,
            0x70 => 4 << 20,
            _ => return Err(Failure::Corrupt("it has blocks of unknown size")),
        };
        if flags >> 6 != 1 || flags & 0b10 != 0 {
            return Err(Failure::Corrupt("it is of another version"));
        }
        let size = match flags & 0b1000 != 0 {
            true => {
                let (low, high) = (input.word()?, input.word()?);
                Some(u64::from(high) << 32 | u64::from(low))
            }
            false => None,
        };
        if flags & 0b1 != 0 {
            return Err(Failure::Corrupt("it needs a dictionary"));
        }
        let length = descriptor.len() - input.0.len();
        let expected = (checksum(&descriptor[..length]) >> 8) as u8;
        if input.byte()? != expected {
            return Err(Failure::Corrupt("its head has another checksum"));
        }
        let size = match size.map(usize::try_from) {
            Some(Ok(size)) if size <= most => Some(size),
            Some(_) => return Err(Failure::TooLarge),
            None => None,
        };
        Ok(Self {
            linked: flags & 0b10_0000 == 0,
            block_checksums: flags & 0b1_0000 != 0,
            checksum: flags & 0b100 != 0,
            most_in_block,
            size,
        })
    }
}

/// What a frame stands for, if that is no more than `most` bytes; never are more allocated.
pub(super) fn decompress(frame: &[u8], most: usize) -> Result<Vec<u8>, Failure> {
    let mut input = Input(frame);
    let head = Head::read(&mut input, most)?;
    let mut output = Vec::new();
    // Those that can come of so few bytes.
    let possible = frame.len().saturating_mul(MOST_EXPANSION);
    output.reserve_exact(head.size.unwrap_or_default().min(possible));
    let most = head.size.unwrap_or(most);
    // Behind that there may be zeros, made once for all blocks.
    let mut written = 0;
    loop {
        let word = input.word()?;
        if word == 0 {
            break;
        }
        let (length, is_raw) = ((word & 0x7fff_ffff) as usize, word >> 31 == 1);
        if length > head.most_in_block {
            return Err(Failure::Corrupt("a block of it is too large"));
        }
        let block = input.take(length)?;
        if head.block_checksums && input.word()? != checksum(block) {
            return Err(Failure::Corrupt("a block of it has another checksum"));
        }
        let left = most - written;
        if is_raw {
            if length > left {
                return Err(head.overrun());
            }
            make_room(&mut output, written + length, most);
            output[written..written + length].copy_from_slice(block);
            written += length;
            continue;
        }
        let possible = length.saturating_mul(MOST_EXPANSION);
        let room = possible.min(head.most_in_block).min(left);
        make_room(&mut output, written + room, most);
        let (before, target) = output[..written + room].split_at_mut(written);
        let window = match head.linked {
            true => &before[written.saturating_sub(WINDOW)..],
            false => &[],
        };
        match decompress_into_with_dict(block, target, window) {
            Ok(length) => written += length,
            Err(DecompressError::OutputTooSmall { .. }) if room == left => {
                return Err(head.overrun());
            }
            Err(_) => return Err(Failure::Corrupt("a block of it cannot be read")),
        }
    }
    output.truncate(written);
    if head.checksum && input.word()? != checksum(&output) {
        return Err(Failure::Corrupt("it has another checksum"));
    }
    if !input.0.is_empty() {
        return Err(Failure::Corrupt("there is more behind it"));
    }
    if head.size.is_some_and(|size| size != output.len()) {
        return Err(OTHER_SIZE);
    }
    Ok(output)
}

const OTHER_SIZE: Failure = Failure::Corrupt("it is not as large as it says");

impl Head {
    /// There is more than there may be.
    fn overrun(&self) -> Failure {
        match self.size {
            Some(_) => OTHER_SIZE,
            None => Failure::TooLarge,
        }
    }
}
