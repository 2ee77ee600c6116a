//! What a server may answer to a request of the classic protocol, memcache-async included.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tower_memcached::fuzzing::classic_reply(data));
