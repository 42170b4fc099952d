//! Fuzz target: bodies of requests, see [`anyport_fuzz::api`].

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| anyport_fuzz::api(input));
