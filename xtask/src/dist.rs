//! `cargo xtask dist`: everything that a package is made of.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    packages::{self, Effort},
    process::{self, exec},
    programs::{PACKAGED, Programs},
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
    fill(&root, &dist)?;
    if !options.without_programs {
        let programs = Programs::build(&root, PACKAGED)?;
        for program in [programs.daemon(), programs.client()] {
            copy(&program, &dist)?;
        }
        packages::build(&root, &dist, &programs, Effort::Full)?;
    }
    println!("{}", dist.display());
    Ok(())
}

/// Everything but the programs.
pub(crate) fn fill(root: &Path, dist: &Path) -> Result<()> {
    if dist.exists() {
        fs::remove_dir_all(dist).with_context(|| format!("empty {}", dist.display()))?;
    }
    fs::create_dir_all(dist).with_context(|| format!("make {}", dist.display()))?;
    let packaging = ["anyport.service", "anyport.socket", "anyport.sysusers", "anyport.tmpfiles"]
        .map(|it| format!("xtask/packaging/{it}"));
    let documents = ["docs/anyport.toml", "docs/grafana.json", "docs/alerts.yml", "LICENSE", "README.md"];
    for file in documents.into_iter().chain(packaging.iter().map(String::as_str)) {
        copy(&root.join(file), dist)?;
    }
    let mut pages = process::cargo(root, "run");
    exec(pages.args(["--package", "anyport-userspace", "--example", "pages", "--"]).arg(dist))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let name = from.file_name().context("copy something without a name")?;
    fs::copy(from, to.join(name)).with_context(|| format!("copy {}", from.display())).map(drop)
}
