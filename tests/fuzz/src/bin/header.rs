//! Fuzz target: PROXY headers, see [`anyport_fuzz::header`].

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| anyport_fuzz::header(input));
