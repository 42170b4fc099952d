//! What happens to etcd's members. A majority may be lost.

use std::sync::{Mutex, MutexGuard};

use super::ledger::{Fault, Ledger, Span};
use crate::{etcd::Etcd, random::Random};

const BETWEEN: Span = (1_500, 7_000);
const LASTING: Span = (500, 6_000);
const LONG: Span = (10_000, 25_000);

/// Makes trouble for one member, and ends it.
pub(super) fn trouble(etcd: &Mutex<Etcd>, member: usize, ledger: &Ledger) {
    let _guard = ledger.guard();
    let mut random = Random::new(&format!("member {member}"));
    let mut faults = [Fault::MemberKilled, Fault::MemberRestarted, Fault::MemberFrozen, Fault::MemberParted];
    let mut has_all_happened = false;
    loop {
        random.shuffle(&mut faults);
        for fault in faults {
            if !ledger.goes_on(&mut random, BETWEEN, has_all_happened) {
                return;
            }
            ledger.count(fault);
            suffer(etcd, member, fault, || {
                ledger.wait_mostly(&mut random, LASTING, LONG);
            });
        }
        has_all_happened = true;
    }
}

fn suffer(etcd: &Mutex<Etcd>, member: usize, fault: Fault, last: impl FnOnce()) {
    let etcd = || -> MutexGuard<'_, Etcd> { etcd.lock().expect("a cluster") };
    match fault {
        Fault::MemberFrozen => {
            etcd().freeze(member);
            last();
            etcd().thaw(member);
        }
        Fault::MemberParted => {
            etcd().part(member);
            last();
            etcd().rejoin(member);
        }
        Fault::MemberKilled => {
            etcd().kill(member);
            last();
            etcd().start_again(member);
        }
        _ => {
            let mut etcd = etcd();
            etcd.kill(member);
            etcd.start_again(member);
        }
    }
}
