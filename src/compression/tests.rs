use std::io::Write as _;

use proptest::prelude::*;

use super::*;
use crate::key::Key;
use crate::ttl::Ttl;
use crate::value::ABSENT_FLAGS;

const BOTH: [Algorithm; 2] = [Algorithm::Lz4, Algorithm::Zstd];

fn settings(algorithm: Algorithm) -> CompressionSettings {
    CompressionSettings::default().algorithm(algorithm)
}

fn flag(settings: &CompressionSettings) -> u32 {
    match settings.algorithm {
        Algorithm::Zstd => settings.zstd_flag,
        _ => settings.lz4_flag,
    }
}

/// What `tests/data/frames/make.py` has made frames of.
fn lines() -> Vec<u8> {
    let line = |i| format!("{{\"id\":{},\"name\":\"user-{}\"}}\n", i % 200, i % 7);
    (0..5000).map(line).collect::<String>().into_bytes()
}

fn compressed(settings: &CompressionSettings, data: &[u8]) -> Payload {
    let mut payload = Payload::from(data);
    settings.compress(&mut payload).unwrap();
    payload
}

fn frame(algorithm: Algorithm, data: &[u8]) -> Vec<u8> {
    let frame = match algorithm {
        Algorithm::Zstd => super::zstd::compress(data, 1),
        _ => super::lz4::compress(data),
    };
    frame.unwrap()
}

#[test]
fn frames_of_other_writers_are_read() {
    let frames: [(_, &[u8], _); 5] = [
        (
            "tool.lz4",
            include_bytes!("../../tests/data/frames/tool.lz4"),
            Algorithm::Lz4,
        ),
        (
            "linked.lz4",
            include_bytes!("../../tests/data/frames/linked.lz4"),
            Algorithm::Lz4,
        ),
        (
            "python.lz4",
            include_bytes!("../../tests/data/frames/python.lz4"),
            Algorithm::Lz4,
        ),
        (
            "tool.zst",
            include_bytes!("../../tests/data/frames/tool.zst"),
            Algorithm::Zstd,
        ),
        (
            "python.zst",
            include_bytes!("../../tests/data/frames/python.zst"),
            Algorithm::Zstd,
        ),
    ];
    let lines = lines();
    for (name, frame, algorithm) in frames {
        let settings = settings(algorithm).max_decompressed(lines.len());
        let flag = flag(&settings);
        let expanded = settings.expand(frame, flag);
        assert!(
            expanded.as_ref() == Ok(&lines),
            "{name}: {:?}",
            expanded.err()
        );
        let settings = settings.max_decompressed(lines.len() - 1);
        assert_eq!(
            settings.expand(frame, flag),
            Err(Failure::TooLarge),
            "{name}"
        );
    }
}

#[test]
fn a_frame_that_is_cut_off_or_has_more_behind_it_is_none() {
    for algorithm in BOTH {
        let settings = settings(algorithm);
        let frame = frame(algorithm, &lines());
        for length in 0..frame.len() {
            let cut = settings.expand(&frame[..length], flag(&settings));
            assert!(
                matches!(cut, Err(Failure::Corrupt(_))),
                "{algorithm:?}: {length}: {cut:?}"
            );
        }
        let more = settings.expand(&[&frame[..], b"more"].concat(), flag(&settings));
        assert!(
            matches!(more, Err(Failure::Corrupt(_))),
            "{algorithm:?}: {more:?}"
        );
    }
}

#[test]
fn no_changed_bit_gives_another_value() {
    for algorithm in BOTH {
        let (settings, data) = (settings(algorithm), &lines()[..2048]);
        let mut frame = frame(algorithm, data);
        for bit in 0..frame.len() * 8 {
            frame[bit / 8] ^= 1 << (bit % 8);
            if let Ok(expanded) = settings.expand(&frame, flag(&settings)) {
                assert!(expanded == *data, "{algorithm:?}: bit {bit}");
            }
            frame[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn what_would_be_too_large_is_found_before_there_is_memory_for_it() {
    const MOST: usize = 64 << 10;
    let zeros = vec![0; 16 << 20];
    let mut unsized_lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
    unsized_lz4.write_all(&zeros).unwrap();
    let mut unsized_zstd = ::zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    unsized_zstd.write_all(&zeros).unwrap();
    let bombs = [
        (Algorithm::Lz4, frame(Algorithm::Lz4, &zeros)),
        (Algorithm::Lz4, unsized_lz4.finish().unwrap()),
        (Algorithm::Zstd, frame(Algorithm::Zstd, &zeros)),
        (Algorithm::Zstd, unsized_zstd.finish().unwrap()),
    ];
    for (algorithm, bomb) in bombs {
        let settings = settings(algorithm).max_decompressed(MOST);
        let expanded = settings.expand(&bomb, flag(&settings));
        assert_eq!(expanded, Err(Failure::TooLarge), "{algorithm:?}");
        let value = Value::new(bomb, flag(&settings));
        let error = settings.decompress(value).unwrap_err();
        assert_eq!(
            (error.kind(), error.sent()),
            (ErrorKind::ValueTooLarge, Sent::Yes)
        );
    }
}

#[test]
fn a_frame_that_lies_about_its_size_is_refused() {
    let data = lines();
    let truth = (data.len() as u64).to_le_bytes();
    for size in [data.len() - 1, data.len() + 1, 8 << 20] {
        let mut lz4 = frame(Algorithm::Lz4, &data);
        assert_eq!(lz4[6..14], truth);
        lz4[6..14].copy_from_slice(&(size as u64).to_le_bytes());
        lz4[14] = (twox_hash::XxHash32::oneshot(0, &lz4[4..14]) >> 8) as u8;
        let expanded = super::lz4::decompress(&lz4, 8 << 20);
        assert!(matches!(expanded, Err(Failure::Corrupt(_))), "{size}");

        let mut zstd = frame(Algorithm::Zstd, &data);
        assert_eq!(zstd[5..9], truth[..4]);
        zstd[5..9].copy_from_slice(&(size as u32).to_le_bytes());
        let expanded = super::zstd::decompress(&zstd, 8 << 20);
        assert!(matches!(expanded, Err(Failure::Corrupt(_))), "{size}");
    }
}

#[test]
fn only_what_gets_smaller_is_compressed() {
    for algorithm in BOTH {
        let settings = settings(algorithm).threshold(64).max_decompressed(4096);
        let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
            .take(2000)
            .collect();
        for as_it_is in [&noise[..], &[b'a'; 63], &[b'a'; 4097]] {
            assert_eq!(compressed(&settings, as_it_is), Payload::from(as_it_is));
        }
        for smaller in [&[b'a'; 64][..], &[b'a'; 4096]] {
            let payload = compressed(&settings, smaller);
            assert!(payload.data().len() < smaller.len());
            assert_eq!(payload.flags(), flag(&settings));
        }
    }
}

#[test]
fn the_callers_flags_stay_and_those_that_tell_are_not_shown() {
    for algorithm in BOTH {
        let settings = settings(algorithm).lz4_flag(0x10).zstd_flag(0x90);
        let mut payload = Payload::from(lines()).with_flags(0x0102_0406);
        settings.compress(&mut payload).unwrap();
        assert_eq!(payload.flags(), 0x0102_0406 | flag(&settings));
        let value = settings.decompress(payload.clone().into()).unwrap();
        assert_eq!((value.flags(), &value[..]), (0x0102_0406, &lines()[..]));
        // Written as if it were compressed: it would be read as something else.
        let error = settings.compress(&mut payload).unwrap_err();
        assert_eq!((error.kind(), error.sent()), (ErrorKind::Codec, Sent::No));
        // A third way, that somebody else knows.
        let error = settings.decompress(Value::new("v", 0x80)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Codec);
    }
}

#[test]
fn what_may_be_compressed_is_not_appended_to() {
    for mode in [StoreMode::Append, StoreMode::Prepend] {
        let mut request = Request::new(Operation::Store {
            mode,
            key: Key::new("k").unwrap(),
            payload: "v".into(),
            ttl: Ttl::NEVER,
        });
        let error = settings(Algorithm::None).write(&mut request).unwrap_err();
        assert_eq!(
            (error.kind(), error.sent()),
            (ErrorKind::Unsupported, Sent::No)
        );
    }
}

#[test]
fn settings_that_make_no_sense_are_named() {
    let settings = || settings(Algorithm::Zstd);
    for (settings, expected) in [
        (settings().threshold(63), "threshold: is under 64"),
        (settings().level(13), "level: is not from -7 to 12"),
        (
            settings().max_decompressed(0),
            "max_decompressed: must not be zero",
        ),
        (settings().lz4_flag(0), "lz4_flag: must not be zero"),
        (
            settings().lz4_flag(1 << 4).zstd_flag(1 << 4),
            "zstd_flag: is the same",
        ),
        (
            settings().zstd_flag(ABSENT_FLAGS),
            "zstd_flag: shares a bit with 0x4e4f4e45",
        ),
    ] {
        let error = Error::from(settings.validate().unwrap_err()).to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(settings().validate().is_ok());
}

proptest! {
    #[test]
    fn what_was_compressed_comes_back(
        parts in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..40), 1..400_usize), 1..20),
        which in 0..2_usize,
        level in -7..=12,
    ) {
        let repeated = parts.iter().flat_map(|(part, times)| part.repeat(*times));
        let data: Vec<u8> = repeated.collect();
        let settings = settings(BOTH[which]).level(level).threshold(64);
        let payload = compressed(&settings, &data);
        prop_assert!(payload.data().len() <= data.len());
        let value = settings.decompress(payload.into()).unwrap();
        prop_assert!(value == data[..]);
        prop_assert_eq!(value.flags(), 0);
    }

    #[test]
    fn any_bytes_expand_to_no_more_than_they_may(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        which in 0..2_usize,
        most in 1..5000_usize,
    ) {
        let settings = settings(BOTH[which]).max_decompressed(most);
        if let Ok(expanded) = settings.expand(&bytes, flag(&settings)) {
            prop_assert!(expanded.capacity() <= most);
        }
    }
}

/// A frame that does not say how large it is, of blocks of one byte, repeated.
fn repeated(blocks: impl IntoIterator<Item = u32>) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, 0x68];
    let mut blocks = blocks.into_iter().peekable();
    while let Some(times) = blocks.next() {
        let is_last = u32::from(blocks.peek().is_none());
        frame.extend_from_slice(&(is_last | 1 << 1 | times << 3).to_le_bytes()[..3]);
        frame.push(b'a');
    }
    frame
}

/// What is made of it costs time as well: it is not made again for each of many small frames.
#[test]
fn many_frames_behind_a_large_one_take_little_longer_than_by_themselves() {
    let settings = settings(Algorithm::Zstd);
    let small = repeated([1]).repeat(10_000);
    let large = repeated([128 << 10; 32]);
    let timed = |frames: &[u8], length: usize| {
        let begun = tokio::time::Instant::now();
        let data = settings.expand(frames, settings.zstd_flag).unwrap();
        assert!(data.len() == length && data.iter().all(|&byte| byte == b'a'));
        begun.elapsed()
    };
    let alone = timed(&small, 10_000);
    let behind = timed(&[&large[..], &small].concat(), 10_000 + (4 << 20));
    assert!(
        behind < 20 * alone + std::time::Duration::from_millis(500),
        "{alone:?}, {behind:?}"
    );
    // Nothing is lost where a frame is empty.
    let empty = repeated([0]);
    let data = settings.expand(
        &[&empty[..], &small, &empty, &small].concat(),
        settings.zstd_flag,
    );
    assert_eq!(data.unwrap().len(), 20_000);
    let none = settings.expand(&empty, settings.zstd_flag);
    assert_eq!(none.unwrap(), b"");
}
