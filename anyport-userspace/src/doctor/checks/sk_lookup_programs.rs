//! Other `sk_lookup` programs of the network namespace.

use crate::{
    back_end::BackEnd,
    doctor::{Finding, Host, host::known},
    sys::bpf::MAX_SK_LOOKUP,
    text::list_of,
};

/// The name of our program.
pub(super) const OURS: &str = "anyport_sk";

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    if !host.may_use(BackEnd::SkLookup) {
        return Ok(Vec::new());
    }
    let programs = known(&host.sk_lookup)?;
    if !programs.iter().any(|name| name == OURS) {
        return Ok(full(programs.len()).into_iter().collect());
    }
    let others: Vec<&String> = programs.iter().filter(|name| *name != OURS).collect();
    if others.is_empty() {
        return Ok(Vec::new());
    }
    let finding = format!("other sk_lookup programs look sockets up beside anyport's: {}", list_of(&others));
    let why = "Anyport's choice of a socket replaces theirs, unless they were attached later and replace it on purpose \
               (BPF_SK_LOOKUP_F_REPLACE).";
    let step = "see that they select nothing in steered prefixes, or take them away: `bpftool link` shows the links (type netns), \
                `bpftool link detach id ID` ends one";
    Ok(vec![Finding::note(finding, why).by_hand(step)])
}

fn full(attached: usize) -> Option<Finding> {
    (attached >= MAX_SK_LOOKUP).then(|| {
        let why = "The kernel takes no more in a network namespace, so anyport can't use sk-lookup; `auto` takes tc.";
        Finding::warning(format!("{attached} sk_lookup programs are attached already"), why)
            .by_hand("bpftool link, which shows what holds them (type netns, attach_type sk_lookup)")
    })
}
