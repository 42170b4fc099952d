//! `cargo xtask fuzz`: libFuzzer over the targets of `tests/fuzz`, on stable Rust.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::process::{self, exec};

const TARGETS: [&str; 5] = ["packet", "api", "file", "header", "delta"];

/// What makes rustc count which paths are taken and what is compared, as `cargo fuzz` sets it.
const COVERAGE: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg=fuzzing",
];

/// Options of `cargo xtask fuzz`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How often each target is executed.
    #[arg(long, default_value_t = 1_000_000)]
    runs: u64,
    /// Only this target.
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
}

/// Fuzzes every target and keeps in its corpus the fewest inputs that reach all code that was reached.
pub(crate) fn run(options: &Options) -> Result<()> {
    let root = process::workspace()?;
    let work = process::target_dir(&root).join("fuzz");
    let binaries = build(&root, &work)?;
    for target in TARGETS.into_iter().filter(|name| options.target.as_ref().is_none_or(|it| it == name)) {
        println!("\n=== {target}: {} executions", options.runs);
        let corpus = root.join("tests/fuzz/corpus").join(target);
        let found = empty(&work.join(target).join("found"))?;
        let fewest = empty(&work.join(target).join("fewest"))?;
        let findings = work.join(target).join("finding-");
        let binary = binaries.join(target);

        let mut fuzz = Command::new(&binary);
        fuzz.arg(format!("-runs={}", options.runs))
            .arg(format!("-artifact_prefix={}", findings.display()))
            .args(["-verbosity=0", "-print_final_stats=1", "-timeout=5"])
            .args([&found, &corpus]);
        exec(&mut fuzz).with_context(|| {
            format!(
                "target `{target}` has a finding; repeat it with `{} {}*`, and add the input to {}",
                binary.display(),
                findings.display(),
                corpus.display()
            )
        })?;
        exec(
            Command::new(&binary)
                .args(["-verbosity=0", "-use_counters=0", "-set_cover_merge=1"])
                .args([&fewest, &corpus, &found]),
        )?;
        replace(&corpus, &fewest)?;
    }
    Ok(())
}

/// Builds the targets with overflow checks and debug assertions, apart from everything else.
fn build(root: &Path, work: &Path) -> Result<PathBuf> {
    let target = process::host_target()?;
    let mut cargo = process::cargo(root, "build");
    cargo
        .args(["--package", "anyport-fuzz", "--features", "libfuzzer", "--release"])
        // With a target, the flags are not for build scripts.
        .args(["--target", &target, "--target-dir"])
        .arg(work)
        .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\u{1f}"))
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "true")
        .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "true")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "line-tables-only");
    exec(&mut cargo).context("the fuzz targets can't be built (libFuzzer itself needs a C++ compiler: g++)")?;
    Ok(work.join(target).join("release"))
}

fn empty(directory: &Path) -> Result<PathBuf> {
    if directory.exists() {
        fs::remove_dir_all(directory)?;
    }
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory.to_owned())
}

fn replace(corpus: &Path, fewest: &Path) -> Result<()> {
    empty(corpus)?;
    let mut inputs = 0;
    for entry in fs::read_dir(fewest)? {
        let entry = entry?;
        fs::copy(entry.path(), corpus.join(entry.file_name()))?;
        inputs += 1;
    }
    println!("{} holds {inputs} inputs.", corpus.display());
    Ok(())
}
