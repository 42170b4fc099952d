//! Steered prefixes inside of the network of a link, where hosts look for each other by themselves.

use crate::{
    doctor::{Finding, Host, host::known},
    host::InterfaceAddress,
    rules::Prefix,
};

/// Prefixes of which the steps tell.
const SHOWN: usize = 4;

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for own in known(&host.addresses)? {
        let InterfaceAddress { network, interface, .. } = own;
        let is_inside = |prefix: &&Prefix| prefix.is_within(network) && prefix.len() > network.len();
        let inside: Vec<Prefix> = host.steered().iter().map(|it| &it.prefix).filter(is_inside).copied().collect();
        if inside.is_empty() || interface == "lo" || (network.is_ipv4() && !ignores_arp(host, interface)?) {
            continue;
        }
        findings.push(describe(own, &inside));
    }
    Ok(findings)
}

/// Whether requests are answered for addresses of interfaces only (`arp_ignore` in net/ipv4/arp.c): 0 answers for whatever is local.
fn ignores_arp(host: &Host, interface: &str) -> anyhow::Result<bool> {
    let value = |scope: &str| host.number(&format!("net/ipv4/conf/{scope}/arp_ignore"));
    Ok(value("all")?.max(value(interface)?).is_some_and(|value| value > 0))
}

fn describe(InterfaceAddress { address, network, interface, .. }: &InterfaceAddress, inside: &[Prefix]) -> Finding {
    let first = inside[0];
    let more = if inside.len() > 1 { format!(" and {} more", inside.len() - 1) } else { String::new() };
    let (how, why) = if network.is_ipv4() {
        (
            "by ARP, and arp_ignore keeps Linux from answering",
            "With arp_ignore above 0 the kernel answers for addresses of interfaces only. Steered prefixes have local \
             routes, and no interface has their addresses.",
        )
    } else {
        (
            "by neighbour solicitations, which nobody answers",
            "Linux answers neighbour solicitations for addresses of interfaces only. Steered prefixes have local routes, \
             and no interface has their addresses. Clients on the link, and a router that believes that the prefix is \
             there, get no answer.",
        )
    };
    let finding = format!("{first}{more} is inside of {network} of {interface}, where hosts look for it {how}");
    let mut finding = Finding::warning(finding, why);
    if network.is_ipv4() {
        return finding
            .by_hand(format!("sysctl -w net.ipv4.conf.all.arp_ignore=0 net.ipv4.conf.{interface}.arp_ignore=0"));
    }
    for prefix in inside.iter().take(SHOWN) {
        finding =
            finding.by_hand(format!("on the router and the hosts of the link: ip -6 route add {prefix} via {address}"));
        if *prefix == Prefix::host(prefix.address()) {
            let address = prefix.address();
            finding = finding.by_hand(format!(
                "or here, where this host is a router: sysctl -w net.ipv6.conf.{interface}.proxy_ndp=1; \
                 ip -6 neigh add proxy {address} dev {interface}"
            ));
        }
    }
    finding
}
