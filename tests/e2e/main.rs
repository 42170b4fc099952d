//! The end-to-end tests: real programs, real packets, in namespaces of their own.
//!
//! What this machine lacks for them is printed, a line each. With `ANYPORT_REQUIRE=all` or `CI=true` that is a
//! failure; otherwise all tests count as ignored. Run by `cargo xtask test`. `ANYPORT_TEST_CASES` names a file of the cases to
//! run, `ANYPORT_TEST_PATIENCE` says how many times longer than usual to wait on a slow machine.
#![expect(
    clippy::print_stderr,
    reason = "says what is missing, which seed repeats the run, and how long something took"
)]

mod cases;

use std::{env, process::ExitCode};

use anyport_tests::{prerequisites, random};
use libtest_mimic::{Arguments, Trial};
use nix::unistd::getppid;

/// Tests at a time. They wait for daemons to start more than they compute.
const THREADS: usize = 5;

/// The one list of the modules with tests: declares them, and collects their tests in this order. `cargo fmt` does not
/// see modules that a macro declares, so `cargo xtask test` has rustfmt look at them by name.
macro_rules! suites {
    ($($name:ident)*) => {
        $(mod $name;)*

        fn all_trials() -> Vec<Trial> {
            let mut trials = Vec::new();
            $(trials.extend($name::trials());)*
            trials
        }
    };
}

suites! {
    steer guards foreign beside udp hostile_udp forward resets flows departures upstreams connections queues limits lists rules apply differential selftests
    wire fuzzed
    control described events explain state published malformed metrics page top pictures completion register library crash changed reload nodes announce restarts
    rights hostile hostile_api crowd interrupted starts load later answers backends doctor fleet kubernetes container
}

fn main() -> ExitCode {
    if let Some(name) = starts::name_to_hold() {
        starts::hold(&name);
        return ExitCode::SUCCESS;
    }
    let parent = getppid();
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(THREADS);
    let mut ignored = false;
    if !arguments.list {
        let mut missing = prerequisites::missing();
        missing.extend(prerequisites::example("service").err());
        for what in &missing {
            eprintln!("missing: {what}");
        }
        let required = env::var_os("ANYPORT_REQUIRE").is_some_and(|what| what == "all")
            || env::var_os("CI").is_some_and(|value| value == "true");
        if required && !missing.is_empty() {
            return ExitCode::FAILURE;
        }
        ignored = !missing.is_empty();
        if !ignored {
            prerequisites::isolate();
            eprintln!("random choices: repeat them with ANYPORT_SEED={}", random::seed());
        }
    }
    prerequisites::end_with(parent);
    let trials: Vec<_> = all_trials().into_iter().map(|trial| trial.with_ignored_flag(ignored)).collect();
    match cases::chosen(trials) {
        Ok(trials) => libtest_mimic::run(&arguments, trials).exit_code(),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
