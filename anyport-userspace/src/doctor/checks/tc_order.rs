//! Programs at the ingress of interfaces that see packets before anyport's.

use crate::{
    back_end::BackEnd,
    doctor::{Finding, Host, host::known},
    text::list_of,
};

/// The names of our programs.
pub(super) const OURS: [&str; 2] = ["anyport_eth", "anyport_ip"];

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    if host.back_end() != Some(BackEnd::Tc) {
        // Whenever it comes to be used, ours is put in front.
        return Ok(Vec::new());
    }
    let mut findings = Vec::new();
    for (interface, programs) in known(&host.tcx)? {
        let place = programs.iter().position(|name| OURS.contains(&name.as_str())).unwrap_or_default();
        if place > 0 {
            let finding = format!("tc programs on {interface} come before anyport's: {}", list_of(&programs[..place]));
            let why = "Unless they hand each packet on (TCX_NEXT), anyport does not see it and it is not steered.";
            let step = "stop anyportd and start it again, which puts its program in front";
            findings.push(Finding::warning(finding, why).by_hand(step));
        }
    }
    Ok(findings)
}
