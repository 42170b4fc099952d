//! Fuzz target: packets, see [`anyport_fuzz::packet`].

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| anyport_fuzz::packet(input));
