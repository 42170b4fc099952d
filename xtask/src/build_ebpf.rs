//! `cargo xtask build-ebpf`: the objects in `anyport-ebpf/prebuilt`, the same bytes wherever they are built.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::{object, process, source_hash, toolchain::Toolchain};

const TARGET: &str = "bpfel-unknown-none";
/// The crate's binaries and where they are kept: the daemon's programs, and those that they are measured against.
const OBJECTS: [(&str, &str); 2] =
    [("anyport", source_hash::OBJECT), ("baselines", "anyport-ebpf/prebuilt/baselines.o")];

/// Options of `cargo xtask build-ebpf`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Build them, compare them with those in the repository and write nothing.
    #[arg(long)]
    check: bool,
}

/// Builds or checks the objects.
pub(crate) fn run(options: &Options) -> Result<()> {
    let root = process::workspace()?;
    let toolchain = Toolchain::find()?;
    if options.check {
        return check(&root, &toolchain);
    }
    let objects = build(&root, &toolchain)?;
    let sources = source_hash::of(&root).map_err(anyhow::Error::msg)?;
    for (path, object) in &objects {
        write(&root.join(path), object)?;
        println!("{path}: {}", describe(object));
    }
    write(&root.join(source_hash::RECORD), format!("{sources}\n").as_bytes())?;
    println!("{}: {sources}", source_hash::RECORD);
    Ok(())
}

/// Fails unless the committed objects are what the sources give.
pub(crate) fn check(root: &Path, toolchain: &Toolchain) -> Result<()> {
    let remedy = "Run `cargo xtask build-ebpf` and commit anyport-ebpf/prebuilt.";
    let recorded = fs::read_to_string(root.join(source_hash::RECORD))
        .with_context(|| format!("{} can't be read. {remedy}", source_hash::RECORD))?;
    let sources = source_hash::of(root).map_err(anyhow::Error::msg)?;
    if recorded.trim_end() != sources {
        bail!(
            "{} was recorded for other sources: it says {}, they are {sources}. {remedy}",
            source_hash::RECORD,
            recorded.trim_end()
        );
    }
    for (path, built) in build(root, toolchain)? {
        let committed = fs::read(root.join(path)).with_context(|| format!("{path} can't be read. {remedy}"))?;
        if built != committed {
            bail!(
                "{path} is not what the sources give, though it was recorded for them.\n  \
                 in the repository: {}\n  built from sources: {}\n{remedy}",
                describe(&committed),
                describe(&built)
            );
        }
        println!("{path} is what the sources give: {}", describe(&built));
    }
    Ok(())
}

/// A cargo command on the BPF crate for its own target, in a target directory of its own.
pub(crate) fn cargo(root: &Path, subcommand: &str, toolchain: &Toolchain) -> Result<Command> {
    let mut cargo = process::cargo(root, subcommand);
    cargo
        .args(["--package", "anyport-ebpf", "--bins", "--release"])
        .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(target_dir(root))
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags(root, toolchain)?)
        // The linker optimises the whole program; what the workspace wants for its other programs must not matter.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
    Ok(cargo)
}

/// Each object with the path that it belongs at.
fn build(root: &Path, toolchain: &Toolchain) -> Result<Vec<(&'static str, Vec<u8>)>> {
    process::exec(&mut cargo(root, "build", toolchain)?)?;
    let directory = target_dir(root).join(TARGET).join("release");
    let objects = OBJECTS.into_iter().map(|(name, path)| {
        let linked = directory.join(name);
        let linked = fs::read(&linked).with_context(|| format!("cargo left no {}", linked.display()))?;
        Ok((path, object::canonical(&linked)?))
    });
    objects.collect()
}

fn target_dir(root: &Path) -> PathBuf {
    process::target_dir(root).join("ebpf")
}

/// The compiler's flags, none of which let a path of this machine into the object.
fn flags(root: &Path, toolchain: &Toolchain) -> Result<OsString> {
    let mut flags = vec![
        OsString::from("-Cdebuginfo=2"),
        OsString::from("-Clink-arg=--btf"),
        // Else aya-ebpf takes the bindings of the building machine. They differ in what no program here looks at.
        OsString::from("--cfg=bpf_target_arch=\"x86_64\""),
    ];
    let mut remap = |from: &Path, to: &str| {
        let mut flag = OsString::from("--remap-path-prefix=");
        flag.push(from);
        flag.push("=");
        flag.push(to);
        flags.push(flag);
    };
    // Relative to where the linker runs, so that it finds the source lines which the verifier's log quotes.
    remap(root, ".");
    remap(&toolchain.rust_src, "rust");
    let registry = cargo_home()?.join("registry/src");
    let entries = fs::read_dir(&registry).with_context(|| format!("cannot read {}", registry.display()))?;
    for entry in entries {
        remap(&entry?.path(), "crates");
    }
    Ok(flags.join(OsStr::new("\u{1f}")))
}

fn cargo_home() -> Result<PathBuf> {
    match env::var_os("CARGO_HOME") {
        Some(home) => Ok(home.into()),
        None => Ok(env::home_dir().context("neither CARGO_HOME nor HOME is set")?.join(".cargo")),
    }
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}

fn describe(object: &[u8]) -> String {
    format!("{} bytes, sha256 {:x}", object.len(), Sha256::digest(object))
}
