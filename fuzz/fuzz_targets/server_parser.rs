//! What a client may send, against the parser of the in-process test server.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tower_memcached::fuzzing::server_parser(data));
