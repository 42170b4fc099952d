//! What building the BPF object takes beyond stable Rust.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use crate::process;

/// Another compiler release gives another object from the same sources.
const RUSTC: &str = "1.95.0";
/// The newest that links with rustc's own LLVM; later ones want one of the system.
const BPF_LINKER: &str = "0.10.4";

/// The toolchain for the BPF object, all of it there.
pub(crate) struct Toolchain {
    /// Where core's sources are, below `library/`.
    pub(crate) rust_src: PathBuf,
}

impl Toolchain {
    /// Looks for every part and names the commands that install what is missing.
    pub(crate) fn find() -> Result<Self> {
        let sysroot = process::stdout(Command::new("rustc").args(["--print", "sysroot"]))?;
        let rust_src = Path::new(sysroot.trim_end()).join("lib/rustlib/src/rust");

        let mut missing = String::new();
        match version("rustc") {
            Some(version) if version == RUSTC => {}
            version => write!(
                missing,
                "\n  rustc {RUSTC} (here: {}): \
                 rustup toolchain install {RUSTC} --component rust-src, then `cargo +{RUSTC} xtask …`",
                version.as_deref().unwrap_or("none")
            )?,
        }
        if !rust_src.join("library/core/src/lib.rs").exists() {
            write!(missing, "\n  the sources of core: rustup component add rust-src")?;
        }
        match version("bpf-linker") {
            Some(version) if version == BPF_LINKER => {}
            version => write!(
                missing,
                "\n  bpf-linker {BPF_LINKER} (here: {}): \
                 cargo install bpf-linker --version {BPF_LINKER} --locked",
                version.as_deref().unwrap_or("none")
            )?,
        }
        if !missing.is_empty() {
            bail!("the BPF object can't be built on this machine, since it lacks{missing}");
        }
        Ok(Self { rust_src })
    }
}

/// The second word of what `PROGRAM --version` prints.
fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.split_whitespace().nth(1).map(str::to_owned)
}
