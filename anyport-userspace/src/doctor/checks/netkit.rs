//! Interfaces that lose what tc has done to a packet.

use crate::{
    back_end::BackEnd,
    doctor::{Finding, Host},
};

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let netkit: Vec<&str> =
        host.links()?.iter().filter(|link| link.kind == "netkit").map(|link| link.name.as_str()).collect();
    if netkit.is_empty() || host.back_end() != Some(BackEnd::Tc) {
        return Ok(Vec::new());
    }
    let finding = format!("clients may come by netkit interfaces: {}", netkit.join(", "));
    let why = "A socket that a tc program gives to a packet is reported to be lost on the way through netkit \
               (github.com/cilium/cilium/issues/39892). sk-lookup is not concerned.";
    Ok(vec![Finding::warning(finding, why).by_hand("anyportd --steering sk-lookup")])
}
