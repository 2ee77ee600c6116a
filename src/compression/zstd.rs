//! Zstandard frames.

use std::io::Read as _;

use zstd::bulk::Compressor;
use zstd::stream::read::Decoder;
use zstd::zstd_safe::get_frame_content_size;

use super::Failure;

/// The window that the format recommends every reader to have, 8 MiB, as a power of two. Without it
/// what other writers stream could not be read however short it is.
const WINDOW: u32 = 23;

pub(super) fn compress(data: &[u8], level: i32) -> Option<Vec<u8>> {
    let mut compressor = Compressor::new(level).ok()?;
    compressor.include_checksum(true).ok()?;
    compressor.compress(data).ok()
}

/// What a frame stands for, if that is no more than `most` bytes. Never are more allocated for it; and
/// 8 MiB or `most` for the window of one that does not say how large it is.
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
    let window = most.next_power_of_two().trailing_zeros().clamp(WINDOW, 27);
    let read = || {
        let mut decoder = Decoder::with_buffer(frame)?;
        decoder.window_log_max(window)?;
        let (mut data, most) = (Vec::new(), most as u64);
        decoder
            .take(most.saturating_add(1))
            .read_to_end(&mut data)?;
        Ok::<_, std::io::Error>(data)
    };
    match read() {
        Ok(data) if data.len() > most => Err(Failure::TooLarge),
        Ok(data) => Ok(data),
        Err(_) => Err(UNREADABLE),
    }
}

const UNREADABLE: Failure = Failure::Corrupt("it is no whole Zstandard frame");
