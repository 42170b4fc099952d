//! `cargo xtask dist`: everything that a package is made of.

use std::fs;

use anyhow::{Context as _, Result};

use crate::{
    process::{self, exec},
    programs::Programs,
};

/// Options of `cargo xtask dist`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Leave the programs out.
    #[arg(long)]
    without_programs: bool,
}

/// Fills `dist` in the directory of what is built, which is emptied before.
pub(crate) fn run(options: &Options) -> Result<()> {
    let root = process::workspace()?;
    let dist = process::target_dir(&root).join("dist");
    if dist.exists() {
        fs::remove_dir_all(&dist).with_context(|| format!("empty {}", dist.display()))?;
    }
    fs::create_dir_all(&dist).with_context(|| format!("make {}", dist.display()))?;
    let copy = |from: &std::path::Path| {
        let name = from.file_name().context("copy something without a name")?;
        fs::copy(from, dist.join(name)).with_context(|| format!("copy {}", from.display()))
    };
    let files = [
        "docs/anyport.toml",
        "docs/grafana.json",
        "docs/alerts.yml",
        "xtask/packaging/anyport.service",
        "LICENSE",
        "README.md",
    ];
    for file in files {
        copy(&root.join(file))?;
    }
    let mut pages = process::cargo(&root, "run");
    exec(pages.args(["--package", "anyport-userspace", "--example", "pages", "--"]).arg(&dist))?;
    if !options.without_programs {
        let programs = Programs::build(&root)?;
        copy(&programs.daemon())?;
        copy(&programs.client())?;
    }
    println!("{}", dist.display());
    Ok(())
}
