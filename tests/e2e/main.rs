//! The end-to-end tests: real programs, real packets, in namespaces of their own.
//!
//! What this machine lacks for them is printed, a line each. With `ANYPORT_REQUIRE=all` or `CI=true` that is a
//! failure; otherwise all tests count as ignored. Run by `cargo xtask test`. `ANYPORT_TEST_CASES` names a file of the cases to
//! run, `ANYPORT_TEST_PATIENCE` says how many times longer than usual to wait on a slow machine.
#![expect(
    clippy::print_stderr,
    reason = "says what is missing, which seed repeats the run, and how long something took"
)]

mod announce;
mod apply;
mod backends;
mod cases;
mod changed;
mod connections;
mod control;
mod crash;
mod crowd;
mod differential;
mod doctor;
mod events;
mod explain;
mod fleet;
mod flows;
mod forward;
mod fuzzed;
mod interrupted;
mod kubernetes;
mod library;
mod limits;
mod lists;
mod load;
mod malformed;
mod metrics;
mod nodes;
mod queues;
mod register;
mod reload;
mod restarts;
mod rights;
mod rules;
mod selftests;
mod starts;
mod state;
mod steer;
mod top;
mod udp;
mod upstreams;
mod wire;

use std::{env, process::ExitCode};

use anyport_tests::{prerequisites, random};
use libtest_mimic::Arguments;
use nix::unistd::getppid;

/// Tests at a time. They wait for daemons to start more than they compute.
const THREADS: usize = 4;

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
    let mut trials = Vec::new();
    trials.extend(steer::trials());
    trials.extend(udp::trials());
    trials.extend(forward::trials());
    trials.extend(flows::trials());
    trials.extend(upstreams::trials());
    trials.extend(connections::trials());
    trials.extend(queues::trials());
    trials.extend(limits::trials());
    trials.extend(lists::trials());
    trials.extend(rules::trials());
    trials.extend(apply::trials());
    trials.extend(differential::trials());
    trials.extend(selftests::trials());
    trials.extend(wire::trials());
    trials.extend(fuzzed::trials());
    trials.extend(control::trials());
    trials.extend(events::trials());
    trials.extend(explain::trials());
    trials.extend(state::trials());
    trials.extend(malformed::trials());
    trials.extend(metrics::trials());
    trials.extend(top::trials());
    trials.extend(register::trials());
    trials.extend(library::trials());
    trials.extend(crash::trials());
    trials.extend(changed::trials());
    trials.extend(reload::trials());
    trials.extend(nodes::trials());
    trials.extend(announce::trials());
    trials.extend(restarts::trials());
    trials.extend(rights::trials());
    trials.extend(crowd::trials());
    trials.extend(interrupted::trials());
    trials.extend(starts::trials());
    trials.extend(load::trials());
    trials.extend(backends::trials());
    trials.extend(doctor::trials());
    trials.extend(fleet::trials());
    trials.extend(kubernetes::trials());
    let trials: Vec<_> = trials.into_iter().map(|trial| trial.with_ignored_flag(ignored)).collect();
    match cases::chosen(trials) {
        Ok(trials) => libtest_mimic::run(&arguments, trials).exit_code(),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
