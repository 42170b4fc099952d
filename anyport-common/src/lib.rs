//! What anyport's BPF programs and its user space must agree on.
//!
//! Everything here is `no_std`, without allocation and free of `unsafe`, so that the code that runs in the
//! kernel is the very code that is tested, property-tested and fuzzed on the host.

#![no_std]
#![expect(
    clippy::inline_always,
    reason = "BPF programs are one function each; calls cost and split what the verifier knows"
)]

#[cfg(test)]
extern crate std;

pub mod event;
pub mod explain;
pub mod flow;
pub mod maps;
pub mod packet;
pub mod table;
