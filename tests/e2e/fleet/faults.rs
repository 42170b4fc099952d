//! Faults at random, for a short while. `sim faults` has more of them.

use std::time::Duration;

use anyport_tests::faults::{Plan, run};
use libtest_mimic::Trial;

use crate::cases::trial;

pub(super) fn trials() -> Vec<Trial> {
    vec![trial("fleet::faults at random", at_random)]
}

fn at_random() {
    let report = run(&Plan { time: Duration::from_secs(35), nodes: 4 });
    eprint!("{report}");
    assert!(report.wrong.is_empty(), "{}", report.wrong.join("\n"));
}
