//! Whether the programs compile for another architecture than the one at hand.
//!
//! Rust's standard library is checked from its sources, which the BPF object needs anyway, so that no further toolchain has
//! to be there. What is built of C takes a compiler for that architecture. Nothing is linked or run.

use std::path::Path;

use anyhow::Result;

use crate::{host, process};

const TARGET: &str = "aarch64-unknown-linux-gnu";

/// Checks anyportd and anyportctl for 64-bit ARM.
pub(crate) fn check(root: &Path) -> Result<()> {
    host::require(&[host::AARCH64_GCC])?;
    let mut cargo = process::cargo(root, "check");
    cargo
        .args(["--package", "anyport-userspace", "--bins", "--target", TARGET, "-Z", "build-std=std,panic_abort"])
        .arg("--target-dir")
        .arg(process::target_dir(root).join("aarch64"))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CC_aarch64_unknown_linux_gnu", host::AARCH64_GCC.program);
    process::exec(&mut cargo)
}
