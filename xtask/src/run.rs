//! `cargo xtask run`: from a checkout to a running daemon.

use std::{
    ffi::{OsStr, OsString},
    process::Command,
};

use anyhow::Result;

use crate::{host, process, programs::Programs};

/// Options of `cargo xtask run`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Arguments for anyportd.
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

/// Builds both programs and becomes the daemon; returns only if that failed.
pub(crate) fn run(options: &Options) -> Result<()> {
    let root = process::workspace()?;
    host::recommend(&[host::IP, host::BPFTOOL, host::IPTABLES, host::IPSET]);

    let programs = Programs::build(&root, "release")?;
    println!("\nIn another terminal:\n");
    println!("  export PATH=\"{}:$PATH\"", programs.directory.display());
    if process::is_root() {
        println!("  anyportctl status\n");
    } else {
        println!("  sudo env \"PATH=$PATH\" anyportctl status\n");
    }

    let mut daemon = if process::is_root() {
        Command::new(programs.daemon())
    } else {
        println!("The daemon needs root: it is started through sudo.");
        let mut sudo = Command::new("sudo");
        sudo.args([OsStr::new("-E"), OsStr::new("--"), programs.daemon().as_os_str()]);
        sudo
    };
    Err(process::become_command(daemon.args(&options.arguments)))
}
