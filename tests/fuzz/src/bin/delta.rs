//! Fuzz target: what makes one set of a fleet out of another, see [`anyport_fuzz::delta`].

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| anyport_fuzz::delta(input));
