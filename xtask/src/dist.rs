//! `cargo xtask dist`: everything that a package is made of.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    licences,
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
    let mut pages = process::cargo(&root, "run");
    pages.args(["--package", "anyport-userspace", "--example", "pages", "--"]);
    fill(&root, &dist, &mut pages)?;
    if !options.without_programs {
        let programs = Programs::build(&root, PACKAGED)?;
        for program in [programs.daemon(), programs.client()] {
            let name = program.file_name().context("copy a program without a name")?;
            copy(&program, &dist.join(name))?;
        }
        packages::build(&root, &dist, &programs, Effort::Full)?;
    }
    println!("{}", dist.display());
    Ok(())
}

/// Everything but the programs. `pages` writes the manual pages and completions into the directory that it is given.
pub(crate) fn fill(root: &Path, dist: &Path, pages: &mut Command) -> Result<()> {
    if dist.exists() {
        fs::remove_dir_all(dist).with_context(|| format!("empty {}", dist.display()))?;
    }
    fs::create_dir_all(dist).with_context(|| format!("make {}", dist.display()))?;
    for file in ["anyport.service", "anyport.socket", "anyport.sysusers", "anyport.tmpfiles"] {
        copy(&root.join("xtask/packaging").join(file), &dist.join(file))?;
    }
    copy(&root.join("LICENSE"), &dist.join("LICENSE"))?;
    for (from, to) in packages::documents(root)? {
        copy(&root.join(from), &dist.join(to))?;
    }
    fs::write(dist.join(licences::NOTICES), licences::notices(root)?).context("write the notices of other crates")?;
    exec(pages.arg(dist))
}

/// Copies a file, into a directory that is made if need be.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let attempt = || format!("copy {} to {}", from.display(), to.display());
    fs::create_dir_all(to.parent().unwrap_or(to)).with_context(attempt)?;
    fs::copy(from, to).with_context(attempt).map(drop)
}
