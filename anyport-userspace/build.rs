//! Refuses to embed a BPF object that the sources no longer match.

#[cfg(feature = "daemon")]
#[path = "../xtask/src/source_hash.rs"]
mod source_hash;

#[cfg(feature = "daemon")]
use std::{fs, path::Path};

#[cfg(feature = "daemon")]
use source_hash::{LOCK, OBJECT, RECORD, SOURCES};

/// Without the daemon nothing is embedded.
#[cfg(not(feature = "daemon"))]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}

#[cfg(feature = "daemon")]
fn main() {
    let root = Path::new("..");
    for input in SOURCES.iter().chain(&[LOCK, OBJECT, RECORD]) {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../xtask/src/source_hash.rs");
    if let Err(problem) = check(root) {
        println!("cargo::error={problem}");
        println!("cargo::error=Run `cargo xtask build-ebpf`.");
    }
}

#[cfg(feature = "daemon")]
fn check(root: &Path) -> Result<(), String> {
    if !root.join(OBJECT).exists() {
        return Err(format!("{OBJECT} is missing."));
    }
    let recorded =
        fs::read_to_string(root.join(RECORD)).map_err(|error| format!("{RECORD} can't be read: {error}."))?;
    let current = source_hash::of(root)?;
    if recorded.trim_end() != current {
        return Err(format!(
            "{OBJECT} was built from other sources than those that are here now: \
             {RECORD} says {}, they are {current}.",
            recorded.trim_end()
        ));
    }
    Ok(())
}
