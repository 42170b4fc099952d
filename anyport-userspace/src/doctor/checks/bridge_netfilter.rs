//! Bridged packets that pass the chains of iptables twice.

use crate::{
    back_end::BackEnd,
    doctor::{Change, Finding, Host, Sysctl},
};

const SWITCHES: [(&str, &str, bool); 2] =
    [("net/bridge/bridge-nf-call-iptables", "IPv4", true), ("net/bridge/bridge-nf-call-ip6tables", "IPv6", false)];

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let links = host.links()?;
    let has_ports = |index| links.iter().any(|port| port.controller == Some(index));
    let bridges: Vec<&str> =
        links.iter().filter(|it| it.kind == "bridge" && has_ports(it.index)).map(|it| it.name.as_str()).collect();
    if bridges.is_empty() || !host.may_use(BackEnd::Tproxy) {
        return Ok(Vec::new());
    }
    let mut findings = Vec::new();
    for (path, version, is_ipv4) in SWITCHES {
        if host.number(path)?.unwrap_or_default() == 0 {
            continue;
        }
        let name = Sysctl::new(path);
        let finding = format!("{name}=1, and clients come by the bridge {}", bridges.join(", "));
        if host.back_end().is_none() {
            let why =
                "With tproxy, which is used where BPF is not to be had, clients behind a bridge would be refused.";
            findings.push(Finding::note(finding, why));
        } else if host.steered().iter().any(|it| it.prefix.is_ipv4() == is_ipv4) {
            let why = format!(
                "The bridge sends {version} packets through iptables before they are routed, and the socket that tproxy gives \
                 them there is lost: clients behind a bridge are refused. Docker may set it back."
            );
            findings.push(Finding::broken(finding, why).by_change(Change::Sysctl { name, value: "0".into() }));
        }
    }
    Ok(findings)
}
