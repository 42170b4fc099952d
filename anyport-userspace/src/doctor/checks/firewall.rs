//! The host's own firewall.

use std::collections::BTreeMap;

use crate::{
    doctor::{
        Finding, Host, Severity, Steered,
        firewall::{Doubt, How, Packet, Ruleset, Stopped, Tool},
        host::known,
    },
    rules::{Prefix, Protocol},
    text::list_of,
};

/// Prefixes that are tried.
const TRIED: usize = 256;

/// What is stopped in the same way.
#[derive(Default)]
struct Victims {
    prefixes: Vec<Prefix>,
    protocols: Vec<&'static str>,
    /// Ports that rules name.
    ports: Vec<u16>,
    /// Whether this befalls ports of which no rule speaks.
    all: bool,
}

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let ruleset = known(&host.firewall)?;
    let mut stopped: BTreeMap<Stopped, Victims> = BTreeMap::new();
    for steered in host.steered().iter().take(TRIED) {
        try_out(ruleset, steered, &mut stopped);
    }
    Ok(stopped.iter().map(|(stopped, victims)| describe(stopped, victims)).collect())
}

fn try_out(ruleset: &Ruleset, steered: &Steered, stopped: &mut BTreeMap<Stopped, Victims>) {
    let protocols: &[&'static str] = match steered.protocol {
        Protocol::Tcp => &["tcp"],
        Protocol::Udp => &["udp"],
        Protocol::Both => &["tcp", "udp"],
    };
    for protocol in protocols {
        for (place, port) in ruleset.ports().into_iter().enumerate().filter(|(_, port)| steered.ports.contains(*port)) {
            let packet = Packet { to: steered.prefix.address(), protocol, port };
            for found in ruleset.stops(&packet) {
                let victims = stopped.entry(found).or_default();
                victims.all |= place == 0;
                push_new(&mut victims.prefixes, steered.prefix);
                push_new(&mut victims.protocols, protocol);
                push_new(&mut victims.ports, port);
            }
        }
    }
}

fn push_new<T: PartialEq>(items: &mut Vec<T>, item: T) {
    if !items.contains(&item) {
        items.push(item);
    }
}

fn describe(stopped: &Stopped, victims: &Victims) -> Finding {
    let Stopped { how, by, tool, table, chain, doubts } = stopped;
    let becomes = match how {
        How::Dropped => "is dropped",
        How::Translated => "gets another destination",
        How::Taken => "is taken by another proxy",
    };
    let what = format!("{} to {}", victims.protocols.join(" and "), list_of(&victims.prefixes));
    let ports = if victims.all { String::new() } else { format!(" on port {}", list_of(&victims.ports)) };
    let tool_name = match tool {
        Tool::Iptables => "iptables",
        Tool::Ip6tables => "ip6tables",
        Tool::Nft => "nft",
    };
    let unless = unless(doubts);
    let finding =
        format!("{what}{ports} {becomes} by the firewall{unless}: {by} in {chain} of the table {table} ({tool_name})");
    let why = match how {
        _ if !doubts.is_empty() => {
            "Whether the rule lets a packet pass depends on the client or its interface, or is more than doctor understands."
        }
        How::Dropped => "Steered packets pass the chains PREROUTING and INPUT like any others that are for this host.",
        How::Translated => {
            "A destination that is translated is no steered one any more. Docker does so to the ports that it \
                            publishes, at every local address."
        }
        How::Taken => "A TPROXY rule of another program gives the packet another socket.",
    };
    let severity = match victims.all {
        _ if !doubts.is_empty() => Severity::Note,
        true => Severity::Broken,
        // A rule about one port may well be meant so, and all others are steered.
        false => Severity::Warning,
    };
    let steps = victims.prefixes.iter().map(|prefix| allow(*tool, table, chain, prefix));
    steps.fold(Finding::new(severity, finding, why), Finding::by_hand)
}

/// What could let the packets pass.
fn unless(doubts: &[Doubt]) -> String {
    let shown = |Doubt { rule, chain, table }: &Doubt| format!("{rule} in {chain} of the table {table}");
    match doubts {
        [] => String::new(),
        doubts => {
            format!(", unless a rule lets it pass before ({})", list_of(&doubts.iter().map(shown).collect::<Vec<_>>()))
        }
    }
}

/// What lets packets to a prefix pass a chain, before anything else in it.
fn allow(tool: Tool, table: &str, chain: &str, prefix: &Prefix) -> String {
    match tool {
        Tool::Iptables => format!("iptables -t {table} -I {chain} -d {prefix} -j ACCEPT"),
        Tool::Ip6tables => format!("ip6tables -t {table} -I {chain} -d {prefix} -j ACCEPT"),
        Tool::Nft => {
            let version = if prefix.is_ipv4() { "ip" } else { "ip6" };
            format!("nft insert rule {table} {chain} {version} daddr {prefix} accept")
        }
    }
}
