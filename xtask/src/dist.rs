//! `cargo xtask dist`: packages, a container image, and everything that they are made of.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    image, licences,
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
            packages::put(&program, &dist.join(name), 0o755)?;
        }
        packages::build(&root, &dist, &programs, Effort::Full)?;
        let licences = ["LICENSE", licences::NOTICES].map(|name| dist.join(name));
        image::build(&root, &programs, &licences, &dist.join(image::file_name()), Effort::Full)?;
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
        packages::put(&root.join("xtask/packaging").join(file), &dist.join(file), 0o644)?;
    }
    packages::put(&root.join("LICENSE"), &dist.join("LICENSE"), 0o644)?;
    for (from, to) in packages::documents(root)? {
        packages::put(&root.join(from), &dist.join(to), 0o644)?;
    }
    fs::write(dist.join(licences::NOTICES), licences::notices(root)?).context("write the notices of other crates")?;
    exec(pages.arg(dist))
}
