//! From rules to lines of iptables, in which the first match decides just as among the rules.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyport_common::flow::{Address, Flow, Transport};

use crate::{
    rules::{PortSet, Prefix},
    steering::{NumberedRule, Plan, ServiceSockets},
};

/// What the `multiport` match takes; a range counts as two.
const MULTIPORT_SLOTS: usize = 15;

/// An address family, which has tables and tools of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    fn has(self, prefix: &Prefix) -> bool {
        prefix.is_ipv4() == (self == Self::V4)
    }

    fn loopback(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }
}

/// What a line does with the packets that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Leaves them to the host.
    Return,
    /// Gives them to the socket that is bound there.
    Tproxy(SocketAddr),
    /// Drops them, since the service has no socket.
    Drop,
}

/// One line of the rules' chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    prefix: Prefix,
    transport: Transport,
    ports: Vec<(u16, u16)>,
    verdict: Verdict,
    rule: u32,
}

impl Line {
    /// Whether the line speaks of UDP to this address.
    pub(super) fn steers_udp_at(&self, address: IpAddr) -> bool {
        self.transport == Transport::Udp && self.prefix.contains(address)
    }
}

/// How the comment begins that ties a line to its rule.
pub(super) const COMMENT: &str = "anyport rule ";

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = name(self.transport);
        write!(f, "-d {} -p {transport} ", self.prefix)?;
        if let [(first, last)] = self.ports[..] {
            write!(f, "-m {transport} --dport {first}:{last}")?;
        } else {
            f.write_str("-m multiport --dports ")?;
            for (i, (first, last)) in self.ports.iter().enumerate() {
                let comma = if i == 0 { "" } else { "," };
                if first == last {
                    write!(f, "{comma}{first}")?;
                } else {
                    write!(f, "{comma}{first}:{last}")?;
                }
            }
        }
        write!(f, " -m comment --comment \"{COMMENT}{}\" -j ", self.rule)?;
        match self.verdict {
            Verdict::Return => f.write_str("RETURN"),
            Verdict::Drop => f.write_str("DROP"),
            Verdict::Tproxy(to) => {
                write!(f, "TPROXY --on-ip {} --on-port {}", to.ip(), to.port())
            }
        }
    }
}

/// The lines for a plan's rules of one family.
pub(super) fn lines(plan: &Plan, family: Family) -> anyhow::Result<Vec<Line>> {
    let mut lines = Vec::new();
    for NumberedRule { number, rule } in &plan.rules {
        if !family.has(&rule.prefix) {
            continue;
        }
        let service = plan.service(&rule.service)?;
        for transport in rule.protocol.transports() {
            let mut push = |ports: &PortSet, verdict| {
                lines.extend(split(ports).into_iter().map(|ports| Line {
                    prefix: rule.prefix,
                    transport: *transport,
                    ports,
                    verdict,
                    rule: *number,
                }));
            };
            push(&rule.except, Verdict::Return);
            push(&rule.ports, verdict(service, *transport, family));
        }
    }
    Ok(lines)
}

fn verdict(service: &ServiceSockets, transport: Transport, family: Family) -> Verdict {
    let address = match family {
        Family::V4 => Address::v4(0),
        Family::V6 => Address::v6(0, 0),
    };
    let offset = Flow { address, transport, port: 0 }.socket_offset();
    match &service.groups[offset as usize] {
        None => Verdict::Drop,
        // A socket at a wildcard address is found by any address of the packet's family.
        Some(group) if group.bound.ip().is_unspecified() => {
            Verdict::Tproxy(SocketAddr::new(family.loopback(), group.bound.port()))
        }
        Some(group) => Verdict::Tproxy(group.bound),
    }
}

/// Port ranges in portions that one line takes.
fn split(ports: &PortSet) -> Vec<Vec<(u16, u16)>> {
    let mut portions: Vec<Vec<(u16, u16)>> = Vec::new();
    let mut free = 0;
    for (first, last) in ports.ranges() {
        let slots = if first == last { 1 } else { 2 };
        match portions.last_mut() {
            Some(portion) if slots <= free => portion.push((*first, *last)),
            _ => {
                portions.push(vec![(*first, *last)]);
                free = MULTIPORT_SLOTS;
            }
        }
        free -= slots;
    }
    portions
}

/// The lines that come before the rules: the packets of sockets that have found their peer are left alone, as the
/// other back ends leave them alone. TPROXY by itself would drop those of sockets that are not transparent.
///
/// The match `socket` can't tell a connected UDP socket from a waiting one. Two kinds of waiting ones are told by
/// other means: `waiting` are the host's, over which the rules win; the transparent ones are anyport's, which only
/// send.
pub(super) fn guards(lines: &[Line], waiting: &[SocketAddr], rules_chain: &str) -> Vec<String> {
    let has = |transport| lines.iter().any(|line| line.transport == transport);
    let mut guards = Vec::new();
    if has(Transport::Tcp) {
        guards.push("-p tcp -m tcp ! --syn -m socket -j RETURN".to_owned());
    }
    if has(Transport::Udp) {
        guards.extend(
            waiting.iter().map(|at| format!("-d {} -p udp -m udp --dport {} -g {rules_chain}", at.ip(), at.port())),
        );
        guards.push(format!("-p udp -m socket --transparent -g {rules_chain}"));
        guards.push("-p udp -m socket -j RETURN".to_owned());
    }
    guards
}

fn name(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    }
}

#[cfg(test)]
mod tests;
