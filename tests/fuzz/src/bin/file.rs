//! Fuzz target: files of services and rules, see [`anyport_fuzz::file`].

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| anyport_fuzz::file(input));
