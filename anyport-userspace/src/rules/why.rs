//! Explains in words why a rule decides about a flow, or why it does not.

use anyport_common::flow::Flow;

use super::{Prefix, Protocol, RuleRef, RuleSet, RuleSpec, from_address, rule::Target};

/// The rules whose prefixes contain the flow's destination, in order of precedence.
pub fn considered<'a>(rules: &'a RuleSet, flow: &Flow) -> impl Iterator<Item = RuleRef<'a>> + use<'a> {
    let host = Prefix::host(from_address(flow.address));
    rules.around(host).flat_map(|(prefix, rules)| rules.numbered(prefix))
}

/// Why one of these rules decides about the flow's first packet, or why it does not.
pub fn why(rule: &RuleRef<'_>, flow: &Flow, deciding: Option<&RuleRef<'_>>) -> String {
    let (port, client) = (flow.port, from_address(flow.source));
    let RuleSpec { protocol, ports, except, source, .. } = &**rule.terms;
    if !protocol.transports().contains(&flow.transport) {
        return format!("says nothing about {}", Protocol::from(flow.transport));
    }
    let Some(target) = rule.terms.target(port) else {
        let nor = if except.is_empty() { String::new() } else { format!(", nor among its exceptions {except}") };
        return format!("port {port} is not among its ports {ports}{nor}");
    };
    if let Some(source) = source.filter(|it| !it.contains(client)) {
        return format!("is about clients from {source} only, not {client}");
    }
    match deciding {
        Some(deciding) if deciding.prefix == rule.prefix && deciding.number == rule.number => match target {
            Target::Host => format!("decides: port {port} is among its exceptions {except}, so it is the host's"),
            Target::Service(service) => format!("decides: port {port} goes to {service}"),
        },
        // The numbers of a prefix's rules follow their order of precedence.
        Some(deciding) if (deciding.prefix, deciding.number) < (rule.prefix, rule.number) => {
            why_behind(rule, deciding, port)
        }
        _ => "matches and would come first, but the kernel did not decide by it".into(),
    }
}

/// Why a rule that matches comes after the one that decides.
fn why_behind(rule: &RuleRef<'_>, deciding: &RuleRef<'_>, port: u16) -> String {
    if deciding.prefix != rule.prefix {
        return format!("a longer prefix with a rule that matches port {port} comes first: {}", deciding.prefix);
    }
    let (here, there) = (rule.terms.matched_ports().count(), deciding.terms.matched_ports().count());
    if here != there {
        return format!("covers more ports of the same prefix than the rule that decides: {here}, not {there}");
    }
    match deciding.terms.source {
        Some(source) if rule.terms.source_len() < deciding.terms.source_len() => {
            format!("is about more clients than the rule that decides, which is about those from {source} only")
        }
        _ => "says the same of this packet as the rule that decides".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, sync::Arc};

    use anyport_common::flow::Transport;

    use super::*;
    use crate::rules::{Change, Decision, Origin, Rule, decide, lines, to_address};

    /// Rules with numbers as the engine gives them.
    fn numbered(text: &str) -> RuleSet {
        let mut rules = RuleSet::default();
        for ((prefix, terms), _) in lines::parse(text, Arc::new).unwrap() {
            rules.insert(&Rule { prefix, terms, origins: Origin::Added.into() }).unwrap();
        }
        let mut change = Change::default();
        for (prefix, rules) in rules.prefixes() {
            let mut rules = rules.clone();
            // Prefixes have numbers in any order.
            rules.first_number = 100 * u32::from(32 - prefix.len());
            change.added.push((*prefix, rules));
        }
        let mut rules = RuleSet::default();
        rules.apply(&change);
        rules
    }

    /// For each rule considered: its prefix and why.
    fn explained(rules: &str, protocol: Transport, address: &str, port: u16, source: &str) -> Vec<String> {
        let rules = numbered(rules);
        let [address, source]: [IpAddr; 2] = [address, source].map(|it| it.parse().unwrap());
        let flow = Flow { source: to_address(source), address: to_address(address), transport: protocol, port };
        let deciding = match decide(&rules, address, protocol, port, source) {
            Decision::Unmatched => None,
            Decision::Host(rule) | Decision::Steer(rule) => Some(rule),
        };
        let reasons =
            considered(&rules, &flow).map(|it| format!("{}: {}", it.prefix, why(&it, &flow, deciding.as_ref())));
        reasons.collect()
    }

    #[test]
    fn each_rule_says_why() {
        let rules = "192.0.2.0/24 tcp 1-65535 service=all
             192.0.2.0/24 tcp 80,443 service=web
             192.0.2.0/24 tcp 80,443 source=10.0.0.0/8 service=inside
             192.0.2.0/24 tcp 80,443 source=10.1.0.0/16 service=deep
             192.0.2.0/25 tcp 443 except=22 service=web
             192.0.2.0/26 udp service=names
             192.0.0.0/16 both except=22 service=all
             198.51.100.0/24 tcp service=all";
        assert_eq!(
            explained(rules, Transport::Tcp, "192.0.2.7", 80, "10.0.0.1"),
            [
                "192.0.2.0/26: says nothing about tcp",
                "192.0.2.0/25: port 80 is not among its ports 443, nor among its exceptions 22",
                "192.0.2.0/24: is about clients from 10.1.0.0/16 only, not 10.0.0.1",
                "192.0.2.0/24: decides: port 80 goes to inside",
                "192.0.2.0/24: is about more clients than the rule that decides, which is about those from 10.0.0.0/8 only",
                "192.0.2.0/24: covers more ports of the same prefix than the rule that decides: 65535, not 2",
                "192.0.0.0/16: a longer prefix with a rule that matches port 80 comes first: 192.0.2.0/24",
            ]
        );
        assert_eq!(
            explained(rules, Transport::Tcp, "192.0.2.7", 22, "192.0.2.1")[1],
            "192.0.2.0/25: decides: port 22 is among its exceptions 22, so it is the host's"
        );
        assert_eq!(
            explained(rules, Transport::Udp, "192.0.2.200", 53, "10.0.0.1"),
            [
                "192.0.2.0/24: says nothing about udp",
                "192.0.2.0/24: says nothing about udp",
                "192.0.2.0/24: says nothing about udp",
                "192.0.2.0/24: says nothing about udp",
                "192.0.0.0/16: decides: port 53 goes to all",
            ]
        );
        assert!(explained(rules, Transport::Tcp, "203.0.113.1", 80, "10.0.0.1").is_empty());
    }

    #[test]
    fn rules_that_agree_are_told_apart() {
        let rules = "192.0.2.0/24 tcp 80,443\n192.0.2.0/24 tcp 80,8080\n192.0.2.0/24 tcp 443";
        assert_eq!(
            explained(rules, Transport::Tcp, "192.0.2.7", 80, "10.0.0.1"),
            [
                "192.0.2.0/24: port 80 is not among its ports 443",
                "192.0.2.0/24: decides: port 80 goes to default",
                "192.0.2.0/24: says the same of this packet as the rule that decides",
            ]
        );
    }

    /// The kernel is asked, and not this model: what it does is shown even where it is wrong.
    #[test]
    fn a_kernel_that_decides_otherwise_is_not_hidden() {
        let rules = numbered("192.0.2.0/24\n192.0.2.0/25\n");
        let flow = Flow {
            source: to_address("10.0.0.1".parse().unwrap()),
            address: to_address("192.0.2.7".parse().unwrap()),
            transport: Transport::Tcp,
            port: 80,
        };
        let all: Vec<_> = considered(&rules, &flow).collect();
        assert!(why(&all[0], &flow, Some(&all[1])).contains("the kernel did not decide by it"));
        assert!(why(&all[1], &flow, None).contains("the kernel did not decide by it"));
    }
}
