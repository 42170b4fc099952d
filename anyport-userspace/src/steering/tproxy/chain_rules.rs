//! From groups of rules to lines of iptables, in which the first match decides just as among the rules.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyport_common::flow::Transport;

use super::groups::{Groups, Key, Prefixes, Verdicts, number};
use crate::{
    rules::{PortSet, Prefix, RuleView},
    steering::GroupSocket,
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
    pub(super) fn has(self, address: IpAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }

    pub(super) fn everything(self) -> Prefix {
        Prefix::from_bits(self == Self::V4, 0, 0)
    }

    pub(super) fn loopback(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }
}

/// What a line does with the packets that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum LineTarget {
    /// Leaves them to the host.
    Return,
    /// Gives them to the socket that is bound there.
    Tproxy(SocketAddr),
    /// Drops them, since the service has no socket.
    Drop,
    /// As [`Self::Drop`], and has them refused by giving them to a socket of ours and a mark, see [`super::refusal`].
    Refuse(SocketAddr),
}

/// The bit of the mark by which packets are recognized that are to be refused, with its mask.
pub(super) const REFUSE_MARK: &str = "0x1000/0x1000";

impl LineTarget {
    /// What becomes of what is steered to this socket.
    pub(super) fn of(socket: Option<&GroupSocket>, family: Family, refusal: Option<SocketAddr>) -> Self {
        match socket {
            None => refusal.map_or(Self::Drop, Self::Refuse),
            // A socket at a wildcard address is found by any address of the packet's family.
            Some(group) if group.bound.ip().is_unspecified() => {
                Self::Tproxy(SocketAddr::new(family.loopback(), group.bound.port()))
            }
            Some(group) => Self::Tproxy(group.bound),
        }
    }

    /// Whether no service gets them.
    pub(super) fn drops(self) -> bool {
        matches!(self, Self::Drop | Self::Refuse(_))
    }
}

/// Where a packet of a line goes to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Destination {
    /// Into this prefix, which a rule of this number put there; nothing for the rule of a previous plan.
    Prefix(Prefix, Option<u32>),
    /// Into one of the prefixes of this set.
    Set(String),
}

/// One line of the rules' chain.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ChainRule {
    pub(super) destination: Destination,
    pub(super) source: Option<Prefix>,
    pub(super) transport: Transport,
    pub(super) ports: Vec<(u16, u16)>,
    pub(super) verdict: LineTarget,
}

impl ChainRule {
    /// The same, counted for no rule.
    #[must_use]
    pub(super) fn without_number(&self) -> Self {
        let mut line = self.clone();
        if let Destination::Prefix(_, number) = &mut line.destination {
            *number = None;
        }
        line
    }
}

/// How the comment begins that ties a line to its rule.
pub(super) const COMMENT: &str = "anyport rule ";

impl fmt::Display for ChainRule {
    /// The set comes last, so that its elements count only packets that everything else on the line has matched, and
    /// not those that are left to the host.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { destination, source, transport, ports, verdict } = self;
        let transport = name(*transport);
        if let Some(source) = source {
            write!(f, "-s {source} ")?;
        }
        if let Destination::Prefix(prefix, _) = destination {
            write!(f, "-d {prefix} ")?;
        }
        write!(f, "-p {transport} ")?;
        if let [(first, last)] = ports[..] {
            write!(f, "-m {transport} --dport {first}:{last}")?;
        } else {
            f.write_str("-m multiport --dports ")?;
            for (i, (first, last)) in ports.iter().enumerate() {
                let comma = if i == 0 { "" } else { "," };
                if first == last {
                    write!(f, "{comma}{first}")?;
                } else {
                    write!(f, "{comma}{first}:{last}")?;
                }
            }
        }
        match destination {
            Destination::Prefix(_, Some(number)) => write!(f, " -m comment --comment \"{COMMENT}{number}\"")?,
            Destination::Prefix(_, None) => {}
            Destination::Set(set) => {
                write!(f, " -m set --match-set {set} dst")?;
                if *verdict == LineTarget::Return {
                    f.write_str(" ! --update-counters")?;
                }
            }
        }
        match verdict {
            LineTarget::Return => f.write_str(" -j RETURN"),
            LineTarget::Drop => f.write_str(" -j DROP"),
            LineTarget::Tproxy(to) => write!(f, " -j TPROXY --on-ip {} --on-port {}", to.ip(), to.port()),
            LineTarget::Refuse(at) => {
                let (ip, port) = (at.ip(), at.port());
                write!(f, " -j TPROXY --on-ip {ip} --on-port {port} --tproxy-mark {REFUSE_MARK}")
            }
        }
    }
}

/// The lines for groups of these rules.
pub(super) fn lines(groups: &Groups, rules: RuleView<'_>) -> Vec<ChainRule> {
    groups.iter().flat_map(|(key, group)| of_group(key, &group.verdicts, &group.prefixes, rules)).collect()
}

/// The lines of one group. No packet matches two of them, so that none asks a set twice, which might change between.
pub(super) fn of_group(key: &Key, verdicts: &Verdicts, prefixes: &Prefixes, rules: RuleView<'_>) -> Vec<ChainRule> {
    let destinations: Vec<_> = match prefixes {
        Prefixes::Set { name, .. } => vec![Destination::Set(name.clone())],
        Prefixes::Few(few) => {
            few.iter().map(|prefix| Destination::Prefix(*prefix, number(rules, *prefix, key))).collect()
        }
    };
    let terms = &key.terms;
    let excepted = split(terms.except.ranges());
    let steered = split(&without(&terms.ports, &terms.except));
    let mut lines = Vec::new();
    for destination in destinations {
        for (transport, verdict) in verdicts {
            let excepted = excepted.iter().map(|ports| (ports, LineTarget::Return));
            let steered = steered.iter().map(|ports| (ports, *verdict));
            lines.extend(excepted.chain(steered).map(|(ports, verdict)| ChainRule {
                destination: destination.clone(),
                source: terms.source,
                transport: *transport,
                ports: ports.clone(),
                verdict,
            }));
        }
    }
    lines
}

/// The ports that are in the one set and not in the other, as ranges.
fn without(ports: &PortSet, except: &PortSet) -> Vec<(u16, u16)> {
    let mut ranges = Vec::new();
    for (first, last) in ports.ranges() {
        let mut from = u32::from(*first);
        for (hole, end) in except.ranges().iter().filter(|(hole, end)| end >= first && hole <= last) {
            if u32::from(*hole) > from {
                ranges.push((from, u32::from(*hole) - 1));
            }
            from = u32::from(*end) + 1;
        }
        if from <= u32::from(*last) {
            ranges.push((from, u32::from(*last)));
        }
    }
    let port = |port: u32| u16::try_from(port).unwrap_or(u16::MAX);
    ranges.into_iter().map(|(first, last)| (port(first), port(last))).collect()
}

/// Port ranges in portions that one line takes.
fn split(ranges: &[(u16, u16)]) -> Vec<Vec<(u16, u16)>> {
    let mut portions: Vec<Vec<(u16, u16)>> = Vec::new();
    let mut free = 0;
    for (first, last) in ranges {
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
/// The match `socket` can't distinguish a connected UDP socket from a waiting one. Two kinds of waiting ones are recognized
/// by other means: `waiting` are the host's, over which the rules win; the transparent ones are anyport's, which only send.
pub(super) fn guards(lines: &[ChainRule], waiting: &[SocketAddr], rules_chain: &str) -> Vec<String> {
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

pub(super) fn name(transport: Transport) -> &'static str {
    match transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    }
}

#[cfg(test)]
mod tests;
