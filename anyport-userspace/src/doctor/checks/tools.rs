//! Programs that the tproxy back end runs.

use crate::{
    back_end::BackEnd,
    doctor::{Finding, Host},
};

#[expect(clippy::unnecessary_wraps, reason = "other checks may not be able to look")]
pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    if host.back_end() != Some(BackEnd::Tproxy) {
        return Ok(Vec::new());
    }
    let mut findings = Vec::new();
    let missing = host.missing(&["iptables-restore", "iptables-save", "ip6tables-restore", "ip6tables-save"]);
    if !missing.is_empty() {
        let why = "tproxy steers by them: without, no rule can be added, changed or removed.";
        let finding = format!("not in PATH: {}", missing.join(", "));
        findings.push(Finding::broken(finding, why).by_hand("apt-get install iptables"));
    }
    if !host.missing(&["ipset"]).is_empty() {
        let why = "Without sets each prefix takes lines of its own in iptables, which every packet passes; 16,384 are the limit.";
        findings.push(Finding::note("not in PATH: ipset", why).by_hand("apt-get install ipset"));
    }
    Ok(findings)
}
