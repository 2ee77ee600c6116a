//! Replays what fuzzing has found, without a fuzzer.

#![cfg(feature = "testing")]

use std::fs;
use std::path::Path;

use tower_memcached::fuzzing;

/// A corpus with fewer files was lost on the way, and its test would prove nothing.
const FEWEST_FILES: usize = 10;

fn replay(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let entries =
        fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("a readable corpus").path())
        .collect();
    files.sort_unstable();
    assert!(
        files.len() >= FEWEST_FILES,
        "{} has only {} files",
        corpus.display(),
        files.len()
    );
    for file in files {
        // Captured, and shown if this is the input that fails.
        println!("{}", file.display());
        run(&fs::read(&file).expect("a readable input"));
    }
}

#[test]
#[cfg(all(feature = "lz4", feature = "zstd"))]
fn the_decompression_survives_its_corpus() {
    replay("decompress", fuzzing::decompress);
}

#[test]
fn the_reply_parser_survives_its_corpus() {
    replay("reply_parser", fuzzing::reply_parser);
}

#[cfg(feature = "classic")]
#[test]
fn the_classic_wire_survives_its_corpus() {
    replay("classic_reply", fuzzing::classic_reply);
}

#[test]
fn the_server_parser_survives_its_corpus() {
    replay("server_parser", fuzzing::server_parser);
}
