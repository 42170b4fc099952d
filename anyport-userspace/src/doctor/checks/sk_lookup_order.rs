//! Other `sk_lookup` programs of the network namespace.

use super::few;
use crate::{
    doctor::{Finding, Host, host::known},
    steering::BackEnd,
    sys::bpf::MAX_SK_LOOKUP,
};

/// The name of our program.
pub(super) const OURS: &str = "anyport_sk";

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    if !host.may_use(BackEnd::SkLookup) {
        return Ok(Vec::new());
    }
    let programs = known(&host.sk_lookup)?;
    let Some(place) = programs.iter().rposition(|name| name == OURS) else {
        return Ok(full(programs.len()).into_iter().collect());
    };
    let behind = &programs[place + 1..];
    if behind.is_empty() {
        return Ok(Vec::new());
    }
    let finding = format!("other sk_lookup programs run after anyport's: {}", few(behind));
    let why = "Where several select a socket, the last one wins: they may take what is steered.";
    Ok(vec![Finding::warning(finding, why).by_hand("stop anyportd and start it again, which puts its program last")])
}

fn full(attached: usize) -> Option<Finding> {
    (attached >= MAX_SK_LOOKUP).then(|| {
        let why = "The kernel takes no more in a network namespace, so anyport can't use sk-lookup; `auto` takes tc.";
        Finding::warning(format!("{attached} sk_lookup programs are attached already"), why)
            .by_hand("bpftool link, which shows what holds them (type netns, attach_type sk_lookup)")
    })
}
