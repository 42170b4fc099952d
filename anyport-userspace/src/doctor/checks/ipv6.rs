//! IPv6 switched off where prefixes of it are steered.

use crate::doctor::{Change, Finding, Host, Sysctl};

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    if host.steered().iter().all(|it| it.prefix.is_ipv4()) {
        return Ok(Vec::new());
    }
    let is_off = |interface: &str| {
        let disabled = host.number(&format!("net/ipv6/conf/{interface}/disable_ipv6"))?;
        anyhow::Ok(disabled.is_none_or(|it| it != 0))
    };
    let on = |interface: &str| Change::Sysctl {
        name: Sysctl::new(format!("net/ipv6/conf/{interface}/disable_ipv6")),
        value: "0".into(),
    };
    let mut findings = Vec::new();
    if is_off("lo")? {
        let why = "Local routes of IPv6 lead to lo. They went when it was switched off, and can't be added.";
        findings.push(
            Finding::broken("IPv6 is switched off on lo, and IPv6 prefixes are steered", why).by_change(on("lo")),
        );
    }
    let outer: Vec<_> = host.outer_links()?.filter(|link| link.controller.is_none()).collect();
    let off = outer.iter().map(|link| is_off(&link.name)).collect::<anyhow::Result<Vec<_>>>()?;
    if !off.is_empty() && off.iter().all(|is_off| *is_off) {
        let why = "Clients of IPv6 prefixes can't come by any of them.";
        let finding = "IPv6 is switched off on every interface but lo, and IPv6 prefixes are steered";
        findings
            .push(outer.iter().fold(Finding::warning(finding, why), |finding, link| finding.by_change(on(&link.name))));
    }
    Ok(findings)
}
