//! What a server may have stored as compressed, against the decompression.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tower_memcached::fuzzing::decompress(data));
