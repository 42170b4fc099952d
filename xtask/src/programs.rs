//! Building anyportd and anyportctl, and `cargo xtask demo`, `bench` and `sim`, which show and measure them.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
    slice::from_ref,
};

use anyhow::Result;

use crate::{
    host,
    process::{self, exec},
};

/// The profile of what is packaged and measured.
pub(crate) const PACKAGED: &str = "packaged";

/// Options of `cargo xtask demo` and `soak`.
#[derive(clap::Args)]
pub(crate) struct DemoOptions {
    /// Arguments for the program.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Options of `cargo xtask bench` and `sim`.
#[derive(clap::Args)]
pub(crate) struct BenchOptions {
    /// What to measure or simulate.
    name: OsString,
    /// Further arguments for that.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// anyportd and anyportctl as cargo built them.
pub(crate) struct Programs {
    /// Where both are.
    pub(crate) directory: PathBuf,
}

impl Programs {
    /// Builds them with a profile of Cargo.toml: `release`, or [`PACKAGED`].
    pub(crate) fn build(root: &Path, profile: &str) -> Result<Self> {
        let mut cargo = process::cargo(root, "build");
        exec(cargo.args(["--profile", profile, "--package", "anyport-userspace", "--bins"]))?;
        Ok(Self::built(root, profile))
    }

    /// Those that cargo has built already.
    pub(crate) fn built(root: &Path, profile_directory: &str) -> Self {
        Self { directory: process::target_dir(root).join(profile_directory) }
    }

    /// The daemon.
    pub(crate) fn daemon(&self) -> PathBuf {
        self.directory.join("anyportd")
    }

    /// The daemon's client.
    pub(crate) fn client(&self) -> PathBuf {
        self.directory.join("anyportctl")
    }

    /// Tells tests, demonstration and measurements which programs are meant.
    pub(crate) fn name_to(&self, command: &mut Command) {
        command.env("ANYPORTD", self.daemon()).env("ANYPORTCTL", self.client());
    }
}

/// Builds and runs the demonstration.
pub(crate) fn demo(options: &DemoOptions) -> Result<()> {
    host::require(&[host::IP, host::BPFTOOL, host::IPTABLES])?;
    show("demo", &options.arguments)
}

/// Builds and runs the long test.
pub(crate) fn soak(options: &DemoOptions) -> Result<()> {
    host::require(&[&[host::IP, host::IPTABLES, host::BPFTOOL][..], &host::FOR_TESTS].concat())?;
    show("soak", &options.arguments)
}

/// Builds and runs a measurement.
pub(crate) fn bench(options: &BenchOptions) -> Result<()> {
    run("bench", options)
}

/// Builds and runs a simulation.
pub(crate) fn sim(options: &BenchOptions) -> Result<()> {
    run("sim", options)
}

fn run(binary: &str, BenchOptions { name, arguments }: &BenchOptions) -> Result<()> {
    host::require(&[&[host::IP, host::IPTABLES, host::BPFTOOL][..], &host::FOR_TESTS].concat())?;
    show(binary, &[from_ref(name), arguments].concat())
}

fn show(binary: &str, arguments: &[OsString]) -> Result<()> {
    let root = process::workspace()?;
    let programs = Programs::build(&root, PACKAGED)?;
    let mut cargo = process::cargo(&root, "run");
    cargo.args(["--quiet", "--profile", PACKAGED, "--package", "anyport-tests", "--bin", binary, "--"]);
    programs.name_to(cargo.args(arguments));
    process::run_as_root(&mut cargo)?;
    Err(process::become_command(&mut cargo))
}
