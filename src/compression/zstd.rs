//! Zstandard frames.

use std::io::Read as _;

use zstd::bulk::Compressor;
use zstd::stream::read::Decoder;
use zstd::zstd_safe::get_frame_content_size;

use super::{Failure, make_room};

/// The window that the format recommends every reader to have, 8 MiB, as a power of two. Without it
/// what other writers stream could not be read however short it is.
const WINDOW: u32 = 23;

pub(super) fn compress(data: &[u8], level: i32) -> Option<Vec<u8>> {
    let mut compressor = Compressor::new(level).ok()?;
    compressor.include_checksum(true).ok()?;
    compressor.compress(data).ok()
}

/// What a frame stands for, if that is no more than `most` bytes; never are more allocated for it,
/// besides a window of 8 MiB or `most` for one that does not say how large it is.
pub(super) fn decompress(frame: &[u8], most: usize) -> Result<Vec<u8>, Failure> {
    let size = get_frame_content_size(frame).map_err(|_| UNREADABLE)?;
    match size.map(usize::try_from) {
        Some(Ok(size)) if size <= most => {
            let data = zstd::bulk::decompress(frame, size).map_err(|_| UNREADABLE)?;
            match data.len() == size {
                true => Ok(data),
                false => Err(UNREADABLE),
            }
        }
        Some(_) => Err(Failure::TooLarge),
        None => stream(frame, most),
    }
}

fn stream(frame: &[u8], most: usize) -> Result<Vec<u8>, Failure> {
    const AT_LEAST: usize = 16 << 10;
    let window = most.next_power_of_two().trailing_zeros().clamp(WINDOW, 27);
    let mut decoder = Decoder::with_buffer(frame).map_err(|_| UNREADABLE)?;
    decoder.window_log_max(window).map_err(|_| UNREADABLE)?;
    let mut data = Vec::new();
    let mut written = 0;
    loop {
        // Each byte is made once, however little is read at a time: a frame may be followed by a hundred
        // thousand others, of a byte each.
        if written == data.len() {
            let room = written.max(AT_LEAST).min(most - written);
            if room == 0 {
                // There may be no more.
                return match decoder.read(&mut [0]) {
                    Ok(0) => Ok(data),
                    Ok(_) => Err(Failure::TooLarge),
                    Err(_) => Err(UNREADABLE),
                };
            }
            make_room(&mut data, written + room, most);
        }
        let read = decoder.read(&mut data[written..]).map_err(|_| UNREADABLE)?;
        written += read;
        if read == 0 {
            data.truncate(written);
            return Ok(data);
        }
    }
}

const UNREADABLE: Failure = Failure::Corrupt("it is no whole Zstandard frame");
