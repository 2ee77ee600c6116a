//! What a server may send, against the parser and the queue of requests in flight.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tower_memcached::fuzzing::reply_parser(data));
