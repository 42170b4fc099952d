//! `cargo xtask test --kernel`: the end-to-end tests on other kernels, in virtual machines.
//!
//! Kernels and the root file system are Debian's packages; what is made of them is kept below `target/kernels`.

mod apt;
mod cases;
mod image;
mod linux;
mod machine;
mod outcome;
mod record;
mod versions;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    host,
    process::{self, exec},
    test::{self, Session},
};
use linux::Linux;
use machine::{Accelerator, Disks};
use outcome::Outcome;

/// Room for the cases that go in and the results that come out.
const EXCHANGE: u64 = 32 << 20;
/// How long a machine may take where it is emulated, for a brief pass and for a whole one.
const LIMITS: [Duration; 2] = [Duration::from_mins(10), Duration::from_mins(45)];

/// Which kernels, and how much.
#[derive(clap::Args)]
pub(crate) struct KernelOptions {
    /// Test on these kernels, in virtual machines: `all`, `newest`, a series (6.1) or a release (6.12.95+deb12) of Debian.
    #[arg(long = "kernel", value_name = "VERSION", value_delimiter = ',', conflicts_with = "filter")]
    pub(crate) kernels: Vec<String>,
    /// Only a few cases of each back end.
    #[arg(long, requires = "kernels")]
    brief: bool,
    /// Write what was seen into docs/kernels.md.
    #[arg(long, requires = "kernels")]
    record: bool,
}

/// Boots each kernel and runs the tests there.
pub(crate) fn run(session: &mut Session, root: &Path, options: &KernelOptions) -> Result<()> {
    if !process::is_root() {
        bail!("making a root file system takes root: start this by `sudo --preserve-env=PATH`, or as root");
    }
    host::require(&host::FOR_KERNELS)?;
    let store = process::target_dir(root).join("kernels");
    fs::create_dir_all(&store).with_context(|| format!("create {}", store.display()))?;
    let mut kernels = Vec::new();
    for name in versions::named(&options.kernels) {
        session.check(&format!("Linux {name}: download"), || {
            let package = versions::find(&store.join("apt"), &name)?;
            let linux = Linux::of(&store, &package)?;
            kernels.push((name.clone(), package.release, linux));
            Ok(())
        });
    }
    let mut lab = None;
    session.check("tests and the root file system", || {
        lab = Some(Lab::build(root, &store)?);
        Ok(())
    });
    let Some(lab) = lab else { return Ok(()) };
    let mut accelerator = None;
    let mut seen = Vec::new();
    for (name, release, linux) in kernels {
        let what = format!("Linux {name}: {release} with {}", cases::back_ends(&release).join(", "));
        println!("\n=== {what}");
        let accelerator = *accelerator.get_or_insert_with(|| Accelerator::usable(&linux));
        match lab.test(&release, &linux, accelerator, options.brief) {
            Ok(outcome) => {
                session.count(&what, &outcome.tally, outcome.check());
                seen.push((name, outcome));
            }
            Err(error) => {
                session.check(&what, || Err(error));
            }
        }
    }
    if options.record {
        session.check("the record", || {
            if seen.len() < versions::named(&options.kernels).len() {
                bail!("not all kernels were run, so docs/kernels.md stays as it is");
            }
            record::write(root, &seen)
        });
    }
    Ok(())
}

/// What all machines share.
struct Lab {
    store: PathBuf,
    root: PathBuf,
    programs: PathBuf,
}

impl Lab {
    fn build(root: &Path, store: &Path) -> Result<Self> {
        exec(test::host_crates(root, "build").args(["--bins", "--examples"]))?;
        let tests = image::test_program(&mut process::cargo(root, "test"))?;
        let programs = image::programs(store, &process::target_dir(root).join("debug"), &tests)?;
        Ok(Self { root: image::root(store)?, programs, store: store.to_owned() })
    }

    fn test(&self, release: &str, linux: &Linux, accelerator: Accelerator, brief: bool) -> Result<Outcome> {
        let cases = cases::list(release, brief);
        let exchange = self.store.join("exchange");
        fs::write(&exchange, &cases).with_context(|| format!("write {}", exchange.display()))?;
        fs::File::options().write(true).open(&exchange)?.set_len(EXCHANGE)?;
        let disks = Disks { root: &self.root, programs: &self.programs, exchange: &exchange };
        let run = machine::boot(linux, &disks, accelerator, LIMITS[usize::from(!brief)])?;
        println!("The machine ran for {} s.", run.time.as_secs());
        let outcome = Outcome::read(&run, &exchange, &self.store.join("results").join(release))?;
        fs::remove_file(&exchange)?;
        Ok(outcome)
    }
}
