#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tower_memcached::fuzzing::reply_parser(data));
