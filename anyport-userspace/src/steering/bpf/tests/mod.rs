//! Tests of the loaded BPF programs, and what the tests of this directory share.

mod counting;
pub(super) mod differential;
mod first_packet;
mod frames;

use std::{path::Path, process::Command, thread};

use aya::programs::Program;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use super::{BackEnd, PinDirectory, load, try_out};

/// Runs on a thread that has a network namespace of its own, with `lo` up, and mounts of its own.
pub(super) fn in_new_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        output("ip", "link set lo up");
        test();
    });
    thread.join().unwrap();
}

/// Runs with a directory of pins on a BPF file system of its own, at this path.
pub(super) fn with_pins(test: impl FnOnce(PinDirectory, &Path) + Send + 'static) {
    in_new_namespace(|| {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("bpf");
        test(PinDirectory::open(&path).unwrap(), &path);
    });
}

pub(super) fn output(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{program} {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_back_ends_can_be_tried_out() {
    in_new_namespace(|| {
        for back_end in [BackEnd::SkLookup, BackEnd::Tc] {
            try_out(back_end).unwrap();
        }
        output("ip", "link set lo down");
        let error = format!("{:#}", try_out(BackEnd::Tc).unwrap_err());
        assert!(error.contains("ip link set lo up"), "{error}");
    });
}

/// With and without the log calls, which are dead code when logging is off.
#[test]
fn the_verifier_takes_every_program() {
    for debug in [false, true] {
        let mut ebpf = load(debug).unwrap();
        let mut names: Vec<String> = Vec::new();
        for (name, program) in ebpf.programs_mut() {
            let loaded = match program {
                Program::SkLookup(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
                Program::SkReuseport(program) => program.load(),
                other => panic!("{name} is an unexpected {:?}", other.prog_type()),
            };
            loaded.unwrap_or_else(|error| panic!("{name}, debug {debug}: {error}"));
            names.push(name.to_owned());
        }
        names.sort();
        assert_eq!(names, ["anyport_eth", "anyport_explain", "anyport_ip", "anyport_refuse", "anyport_sk"]);
    }
}
