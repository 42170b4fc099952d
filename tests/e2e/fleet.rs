//! `anyportctl fleet` against a real etcd.

mod changes;
mod clusters;
mod faults;
mod hostile;
mod nodes;
mod real;
mod secured;
mod simulated;

use libtest_mimic::Trial;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(changes::trials());
    trials.extend(clusters::trials());
    trials.extend(faults::trials());
    trials.extend(hostile::trials());
    trials.extend(nodes::trials());
    trials.extend(real::trials());
    trials.extend(secured::trials());
    trials.extend(simulated::trials());
    trials
}
