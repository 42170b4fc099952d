//! `cargo xtask test`: formatting, lints, tests of every kind and the object, counted in one closing line.

use std::{
    env, fs,
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    aarch64, alerts, build_ebpf, dist, documents, host, kernel, layers, licences, module_docs,
    packages::{self, Effort},
    process::{self, exec},
    programs::Programs,
    tally::Tally,
    toolchain::Toolchain,
};

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run only the tests whose names contain this, and no other checks.
    filter: Option<String>,
    #[command(flatten)]
    kernel: kernel::KernelOptions,
}

/// Runs everything, whatever fails, and prints the sum as the last line.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let root = process::workspace()?;
    let mut session = Session::default();
    if !options.kernel.kernels.is_empty() {
        kernel::run(&mut session, &root, &options.kernel, options.filter.as_deref())?;
        return Ok(session.finish());
    }
    let tools = [host::IP, host::IPTABLES, host::BPFTOOL, host::DPKG_DEB, host::RPMBUILD, host::PROMTOOL];
    let packages = [&tools[..], &host::FOR_TESTS, &host::FOR_TESTS_HERE].concat();
    if let Err(error) = host::require(&packages) {
        session.check("programs that the tests use", || Err(error));
    }
    if options.filter.is_none() {
        checks(&mut session, &root);
    }
    // In one go, so that the dependencies are built once; the tests only run then.
    let built = session.check("building tests and programs", || {
        exec(host_crates(&root, "build").args(["--bins", "--tests", "--examples"]))
    });
    if built && options.filter.is_none() {
        packaging(&mut session, &root);
    }
    if built {
        tests(&mut session, &root, options.filter.as_deref())?;
    }
    Ok(session.finish())
}

/// All that needs no test to run.
fn checks(session: &mut Session, root: &Path) {
    session.check("layers of the daemon's modules", || layers::check(root));
    documents::checks(session, root);
    session.check("alerts", || alerts::check(root));
    session.check("licences and sources of crates", || licences::check(root));
    session.check("formatting", || exec(Command::new("cargo").current_dir(root).args(["fmt", "--all", "--check"])));
    session.check("formatting of the end-to-end tests", || formatting_of_end_to_end_tests(root));
    session.check("lints", || exec(host_crates(root, "clippy").args(["--all-targets", "--", "--deny", "warnings"])));
    for features in ["", "tokio", "daemon"] {
        session.check(&format!("lints of the library with the features `{features}` alone"), || {
            let mut clippy = process::cargo(root, "clippy");
            clippy.args([
                "--package",
                "anyport-userspace",
                "--lib",
                "--examples",
                "--no-default-features",
                "--features",
            ]);
            exec(clippy.args([features, "--", "--deny", "warnings"]))
        });
    }
    session.check("what each file is for", || module_docs::check(root));
    session.check("documentation of the code", || {
        let mut doc = host_crates(root, "doc");
        exec(doc.env("RUSTDOCFLAGS", "--deny warnings").args(["--no-deps", "--document-private-items"]))
    });
    match Toolchain::find() {
        Ok(toolchain) => {
            session.check("lints of the BPF programs", || {
                let mut clippy = build_ebpf::cargo(root, "clippy", &toolchain)?;
                exec(clippy.args(["--", "--deny", "warnings"]))
            });
            session.check("documentation of the BPF programs", || {
                let mut doc = build_ebpf::cargo(root, "doc", &toolchain)?;
                exec(doc.env("RUSTDOCFLAGS", "--deny warnings").args(["--no-deps", "--document-private-items"]))
            });
            session.check("the BPF object", || build_ebpf::check(root, &toolchain));
            session.check("the programs for 64-bit ARM", || aarch64::check(root));
        }
        Err(error) if nothing_may_be_left_out() => {
            session.check("the BPF object", || Err(error));
        }
        Err(error) => {
            session.leave_out("lints and documentation of the BPF programs, the BPF object, 64-bit ARM", 4, &error);
        }
    }
}

/// A macro declares their modules, which `cargo fmt` does not see.
fn formatting_of_end_to_end_tests(root: &Path) -> Result<()> {
    let directory = root.join("tests/e2e");
    let mut rustfmt = Command::new("rustfmt");
    rustfmt.current_dir(root).args(["--check", "--edition", "2024"]);
    for entry in fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            rustfmt.arg(path);
        }
    }
    exec(&mut rustfmt).context("run `rustfmt --edition 2024 tests/e2e/*.rs`")
}

/// The unit, and packages out of what the tests use.
fn packaging(session: &mut Session, root: &Path) {
    let programs = Programs::built(root, "debug");
    let dist = process::target_dir(root).join("dist-of-tests");
    session.check("the systemd unit", || packages::check_unit(root, &programs, &dist));
    session.check("packages", || {
        dist::fill(root, &dist, &mut Command::new(programs.directory.join("examples/pages")))?;
        packages::build(root, &dist, &programs, Effort::Least)?;
        packages::check(root, &dist)
    });
}

fn tests(session: &mut Session, root: &Path, filter: Option<&str>) -> Result<()> {
    let runner = |targets: &[&str]| {
        let mut cargo = host_crates(root, "test");
        cargo.arg("--no-fail-fast").args(targets).arg("--").args(filter);
        cargo
    };
    session.tests("unit and property tests", &runner(&["--lib", "--bins"]))?;
    if filter.is_none() {
        session.tests("documentation tests", &runner(&["--doc"]))?;
    }
    let mut end_to_end = runner(&["--test", "*"]);
    Programs::built(root, "debug").name_to(end_to_end.env("ANYPORT_REQUIRE", "all"));
    process::run_as_root(&mut end_to_end)?;
    session.tests("end-to-end tests", &end_to_end)?;
    if let Some(filter) = filter
        && session.tests == 0
    {
        session.check("the filter", || bail!("no test has `{filter}` in its name"));
    }
    Ok(())
}

/// A cargo command on all crates but the one that is for the BPF target only.
pub(crate) fn host_crates(root: &Path, subcommand: &str) -> Command {
    let mut cargo = process::cargo(root, subcommand);
    cargo.args(["--workspace", "--exclude", "anyport-ebpf"]);
    cargo
}

fn nothing_may_be_left_out() -> bool {
    env::var_os("CI").is_some_and(|ci| ci == "true")
        || env::var_os("ANYPORT_REQUIRE").is_some_and(|required| required == "all")
}

/// What came out so far.
#[derive(Default)]
pub(crate) struct Session {
    tally: Tally,
    /// Tests that ran or were skipped: the tally without the checks.
    tests: usize,
    /// What failed or was left out, to be said at the end.
    notes: Vec<String>,
}

impl Session {
    /// Counts as one: passed or failed.
    pub(crate) fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) -> bool {
        println!("\n=== {name}");
        let result = check();
        match &result {
            Ok(()) => self.tally.passed += 1,
            Err(error) => {
                self.tally.failed += 1;
                self.notes.push(format!("FAILED: {name}: {error:#}"));
            }
        }
        result.is_ok()
    }

    /// Counts as many as the runner counted.
    fn tests(&mut self, name: &str, runner: &Command) -> Result<()> {
        println!("\n=== {name}");
        let tally = Tally::of(runner)?;
        self.tally.add(&tally);
        self.tests += tally.passed + tally.failed + tally.skipped;
        if tally.failed > 0 {
            self.notes.push(format!("FAILED: {name}: {tally}"));
        }
        Ok(())
    }

    /// Counts what ran elsewhere, and says why it failed.
    pub(crate) fn count(&mut self, name: &str, tally: &Tally, result: Result<()>) {
        self.tally.add(tally);
        self.tests += tally.passed + tally.failed + tally.skipped;
        if let Err(error) = result {
            self.notes.push(format!("FAILED: {name}: {error:#}"));
        }
    }

    fn leave_out(&mut self, name: &str, checks: usize, why: &anyhow::Error) {
        self.tally.skipped += checks;
        self.notes.push(format!("LEFT OUT: {name}: {why:#}"));
    }

    fn finish(self) -> ExitCode {
        println!();
        for note in &self.notes {
            println!("{note}");
        }
        println!("{}", self.tally);
        if self.tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
