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
    collections::BTreeMap,
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    host,
    process::{self, exec},
    test::{self, Session},
};
use cases::Selection;
use linux::Linux;
use machine::{Accelerator, Disks};
use outcome::Outcome;

/// Room for the cases that go in and the results that come out.
const EXCHANGE: u64 = 32 << 20;
/// How long a machine may take where it is emulated, for a brief pass and for a whole one.
const LIMITS: [Duration; 2] = [Duration::from_mins(15), Duration::from_hours(3)];

/// Which kernels, and how much.
#[derive(clap::Args)]
pub(crate) struct KernelOptions {
    /// Test on these kernels, in virtual machines: `all`, `newest`, a series (6.1) or a release (6.12.95+deb12) of Debian.
    #[arg(long = "kernel", value_name = "VERSION", value_delimiter = ',')]
    pub(crate) kernels: Vec<String>,
    /// Only a few cases of each back end.
    #[arg(long, requires = "kernels")]
    brief: bool,
    /// Write what was seen into docs/kernels.md; what it says of other kernels, and with a filter of other cases, stays.
    #[arg(long, requires = "kernels")]
    record: bool,
}

/// Boots each kernel and runs the tests there.
pub(crate) fn run(session: &mut Session, root: &Path, options: &KernelOptions, filter: Option<&str>) -> Result<()> {
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
            kernels.push(Kernel { name: name.clone(), release: package.release, linux });
            Ok(())
        });
    }
    let mut lab = None;
    session.check("tests and the root file system", || {
        lab = Some(Lab::build(root, &store)?);
        Ok(())
    });
    let Some(lab) = lab else { return Ok(()) };
    let mut seen = Vec::new();
    for (name, what, outcome) in lab.test_all(kernels, &Selection { brief: options.brief, filter }) {
        println!("\n=== {what}");
        match outcome {
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
            let extent = match (filter, options.brief) {
                (Some(_), _) => record::Extent::Some,
                (None, true) => record::Extent::Brief,
                (None, false) => record::Extent::Whole,
            };
            record::write(root, &seen, extent)
        });
    }
    Ok(())
}

/// A kernel to test.
struct Kernel {
    /// As it was asked for.
    name: String,
    release: String,
    linux: Linux,
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
        // Of the same crates: with a package alone, the features of what it uses differ, and all is built once more.
        let tests = image::test_program(&mut test::host_crates(root, "test"))?;
        let programs = image::programs(store, &process::target_dir(root).join("debug"), &tests)?;
        Ok(Self { root: image::root(store)?, programs, store: store.to_owned() })
    }

    /// As many machines at a time as there are processors, since each of them keeps about one busy. In the order of the kernels.
    fn test_all(&self, kernels: Vec<Kernel>, selection: &Selection<'_>) -> Vec<(String, String, Result<Outcome>)> {
        let Some(first) = kernels.first() else { return Vec::new() };
        let accelerator = Accelerator::usable(&first.linux);
        let at_once = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let (waiting, done) = (Mutex::new(kernels.into_iter().enumerate()), Mutex::new(BTreeMap::new()));
        let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
        thread::scope(|scope| {
            for _ in 0..at_once {
                scope.spawn(|| {
                    while let Some((at, Kernel { name, release, linux })) = next() {
                        let what = format!("Linux {name}: {release} with {}", cases::back_ends(&release).join(", "));
                        let outcome = self.test(&name, &release, &linux, accelerator, selection);
                        done.lock().unwrap_or_else(PoisonError::into_inner).insert(at, (name, what, outcome));
                    }
                });
            }
        });
        done.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
    }

    fn test(
        &self,
        name: &str,
        release: &str,
        linux: &Linux,
        accelerator: Accelerator,
        selection: &Selection<'_>,
    ) -> Result<Outcome> {
        let cases = cases::list(release, selection);
        let exchange = self.store.join(format!("exchange-{release}"));
        fs::write(&exchange, &cases).with_context(|| format!("write {}", exchange.display()))?;
        fs::File::options().write(true).open(&exchange)?.set_len(EXCHANGE)?;
        let disks = Disks { root: &self.root, programs: &self.programs, exchange: &exchange };
        let limit = LIMITS[usize::from(!selection.brief)];
        let run = machine::until_begun(name, || machine::boot(name, linux, &disks, accelerator, limit))?;
        let outcome = Outcome::read(&run, &exchange, &self.store.join("results").join(release))?;
        fs::remove_file(&exchange)?;
        Ok(outcome)
    }
}
