//! Replays what the fuzzer has found so far, so that plain `cargo test` guards it.
#![cfg(feature = "testing")]

use std::fs;
use std::path::Path;

use tower_memcached::fuzzing;

fn replay(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut inputs = 0;
    for entry in fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{corpus:?}: {error}")) {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        run(&fs::read(path).unwrap());
        inputs += 1;
    }
    assert!(
        inputs >= 20,
        "the corpus of {target} has only {inputs} inputs"
    );
}

#[test]
fn the_reply_parser_with_a_queue_in_flight() {
    replay("reply_parser", fuzzing::reply_parser);
}

#[test]
fn the_servers_parser() {
    replay("server_parser", fuzzing::server_parser);
}
