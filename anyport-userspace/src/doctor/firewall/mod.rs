//! What the host's firewall does with the first packet of a client that is new to it.
//!
//! The chains are gone through as the kernel does, as far as they can be understood: what a match says that is not
//! understood, or that depends on the client, is left open. What is left open and could let a packet pass goes with what stops it
//! otherwise, so that people can judge it; a packet is only said to be stopped for certain if there is nothing of the kind.

mod iptables;
mod nftables;
#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, net::IpAddr};

use crate::rules::Prefix;

/// Chains call each other no deeper than this (`NFT_JUMP_STACK_SIZE`); for iptables there is no such number.
const DEEPEST: u8 = 16;
/// Ports that are tried, of those that rules name.
const MOST_PORTS: usize = 128;
/// A port of which no rule speaks, unless there are rules about all of them.
const ANY_PORT: u16 = 31_337;

/// A packet from a client that is new to the firewall, by an interface that is not `lo`, to an address that is local.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    pub(super) to: IpAddr,
    pub(super) protocol: &'static str,
    pub(super) port: u16,
}

/// A rule of which it is open whether it lets a packet pass.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Doubt {
    /// The rule, as its tool shows it.
    pub(super) rule: String,
    /// Its chain.
    pub(super) chain: String,
    /// The table of that.
    pub(super) table: String,
}

/// What becomes of a packet that is not let pass.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stopped {
    /// What is done to it.
    pub(super) how: How,
    /// The rule or the policy, as its tool shows it.
    pub(super) by: String,
    /// What shows the chain.
    pub(super) tool: Tool,
    /// The table, for nftables with its family.
    pub(super) table: String,
    /// The chain.
    pub(super) chain: String,
    /// What could let it pass before.
    pub(super) doubts: Vec<Doubt>,
}

/// How a packet is kept from its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum How {
    Dropped,
    /// Its destination is changed.
    Translated,
    /// Another transparent proxy takes it.
    Taken,
}

/// The tool that shows and changes a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tool {
    Iptables,
    Ip6tables,
    Nft,
}

/// All chains that a packet on its way in passes.
#[derive(Clone, Debug, Default)]
pub(super) struct Ruleset {
    /// The chains of hooks, in the order in which they are passed.
    hooks: Vec<Hook>,
    chains: Vec<Chain>,
    /// What could be read: tools that are not installed show nothing.
    tools: Vec<Tool>,
}

#[derive(Clone, Debug)]
struct Hook {
    /// prerouting before input, and then by priority.
    order: (u8, i64),
    chain: usize,
}

#[derive(Clone, Debug)]
struct Chain {
    tool: Tool,
    families: Families,
    table: String,
    name: String,
    drops_by_policy: bool,
    rules: Vec<Rule>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Families {
    V4,
    V6,
    Both,
}

#[derive(Clone, Debug)]
struct Rule {
    text: String,
    matches: Vec<Match>,
    action: Action,
}

/// A condition, and whether it has to hold or must not.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Match {
    what: What,
    negated: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    Destination(Vec<Prefix>),
    Source(Vec<Prefix>),
    Protocol(Vec<String>),
    Ports(Vec<(u16, u16)>),
    /// By which interface it comes in.
    Interface(String),
    /// By the type of the destination, which is `LOCAL`.
    ToType(Vec<String>),
    /// By the type of the source, which is `UNICAST` and not of this host.
    FromType(Vec<String>),
    /// By what it is on its link, which is `host` or `unicast`: meant for this host alone.
    PacketType(Vec<String>),
    /// These flags of TCP, and those of them that are set. The first packet has `SYN` alone.
    TcpFlags {
        of: Vec<String>,
        set: Vec<String>,
    },
    /// What connection tracking has done to it: nothing yet.
    Status,
    /// The states of connection tracking.
    States(Vec<String>),
    Ipv4(bool),
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Continue,
    Accept,
    Return,
    Stop(How),
    Jump(String),
    Goto(String),
    /// Something that may let it pass, such as a map of verdicts.
    MayAccept,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Answer {
    No,
    Maybe,
    Yes,
}

/// Where a walk through a chain ends.
enum WalkEnd {
    /// At its end, or at a return.
    Back,
    /// The packet goes on to the next hook, or may do so.
    Passed,
    Stopped(Box<Stopped>),
}

impl Ruleset {
    /// Reads the rules of iptables and of nftables, as far as the tools are there.
    pub(super) fn read() -> anyhow::Result<Self> {
        let mut ruleset = Self::default();
        let mut by_iptables = false;
        for (program, tool) in [("iptables-save", Tool::Iptables), ("ip6tables-save", Tool::Ip6tables)] {
            if let Some(text) = super::look::output(program, &[])? {
                by_iptables |= text.contains("(nf_tables)");
                iptables::read(&text, tool, &mut ruleset);
                ruleset.tools.push(tool);
            }
        }
        if let Some(text) = super::look::output("nft", &["-j", "list", "ruleset"])? {
            nftables::read(&serde_json::from_str(&text)?, by_iptables, &mut ruleset);
        }
        ruleset.hooks.sort_by_key(|hook| hook.order);
        Ok(ruleset)
    }

    /// Everything by which a packet is kept from its socket, with what could let it pass before.
    pub(super) fn stops<'a>(&'a self, packet: &'a Packet) -> impl Iterator<Item = Stopped> + 'a {
        let chains = self.hooks.iter().map(|hook| &self.chains[hook.chain]);
        chains.filter(|chain| chain.families.has(packet.to)).filter_map(|chain| {
            let mut doubts = Vec::new();
            let stopped = match self.walk(chain, packet, DEEPEST, &mut doubts) {
                WalkEnd::Stopped(stopped) => *stopped,
                WalkEnd::Back if chain.drops_by_policy => chain.stopped(How::Dropped, "its policy"),
                WalkEnd::Back | WalkEnd::Passed => return None,
            };
            Some(Stopped { doubts, ..stopped })
        })
    }

    /// The ports to try: those that rules name, at both ends of their ranges, and one that none names.
    pub(super) fn ports(&self) -> Vec<u16> {
        let rules = self.chains.iter().flat_map(|chain| &chain.rules);
        let mut named = BTreeSet::new();
        for (first, last) in rules.flat_map(|rule| &rule.matches).flat_map(Match::ports) {
            named.extend([*first, *last].into_iter().filter(|port| (1..u16::MAX).contains(port)));
        }
        let any = (ANY_PORT..u16::MAX).find(|port| !named.contains(port)).unwrap_or(ANY_PORT);
        std::iter::once(any).chain(named.into_iter().take(MOST_PORTS)).collect()
    }

    /// Whether a chain has this rule; nothing if the tool is not there to show it.
    pub(super) fn has(&self, tool: Tool, table: &str, chain: &str, rule: &str) -> Option<bool> {
        let here = |it: &&Chain| it.tool == tool && it.table == table && it.name == chain;
        let has = self.chains.iter().filter(here).any(|it| it.rules.iter().any(|it| it.text == rule));
        self.tools.contains(&tool).then_some(has)
    }

    /// Follows a packet through a chain. What is left open is taken not to match; rules that would have let it pass are doubts then.
    fn walk(&self, chain: &Chain, packet: &Packet, deepest: u8, doubts: &mut Vec<Doubt>) -> WalkEnd {
        for (place, rule) in chain.rules.iter().enumerate() {
            let answer = rule.matches.iter().map(|it| it.answer(packet)).min().unwrap_or(Answer::Yes);
            if answer == Answer::No {
                continue;
            }
            let is_certain = answer == Answer::Yes;
            match &rule.action {
                Action::Accept if is_certain => return WalkEnd::Passed,
                Action::Accept | Action::MayAccept => doubts.push(chain.doubt(rule)),
                Action::Return if is_certain => return WalkEnd::Back,
                // What comes next may be passed over, and then what is after the chain decides: too much to follow.
                Action::Return => return self.back_or(chain, packet, deepest, place, doubts),
                Action::Stop(how) if is_certain => {
                    return WalkEnd::Stopped(Box::new(chain.stopped(*how, &rule.text)));
                }
                Action::Continue | Action::Stop(_) => {}
                Action::Jump(name) | Action::Goto(name) => {
                    let is_goto = matches!(rule.action, Action::Goto(_));
                    let end = match self.chain(chain, name) {
                        Some(next) if deepest > 0 => self.walk(next, packet, deepest - 1, doubts),
                        _ => WalkEnd::Passed,
                    };
                    match end {
                        WalkEnd::Passed if is_certain => return WalkEnd::Passed,
                        WalkEnd::Passed => doubts.push(chain.doubt(rule)),
                        WalkEnd::Stopped(stopped) if is_certain => return WalkEnd::Stopped(stopped),
                        WalkEnd::Back if is_goto && is_certain => return WalkEnd::Back,
                        WalkEnd::Stopped(_) | WalkEnd::Back => {}
                    }
                }
            }
        }
        WalkEnd::Back
    }

    /// The end after a return of which it is open whether it happens: a stop only counts if the chain's rest does not let
    /// the packet pass, and as an end of the chain, since the caller may let it pass as well.
    fn back_or(&self, chain: &Chain, packet: &Packet, deepest: u8, after: usize, doubts: &mut Vec<Doubt>) -> WalkEnd {
        let rest = Chain { rules: chain.rules[after + 1..].to_vec(), ..chain.clone() };
        match self.walk(&rest, packet, deepest, doubts) {
            WalkEnd::Passed => {
                doubts.push(chain.doubt(&chain.rules[after]));
                WalkEnd::Back
            }
            WalkEnd::Back | WalkEnd::Stopped(_) => WalkEnd::Back,
        }
    }

    fn chain(&self, from: &Chain, name: &str) -> Option<&Chain> {
        self.chains.iter().find(|it| {
            it.name == name && it.table == from.table && it.tool == from.tool && it.families == from.families
        })
    }
}

impl Chain {
    fn stopped(&self, how: How, by: &str) -> Stopped {
        let (table, chain) = (self.table_shown(), self.name.clone());
        Stopped { how, by: by.to_owned(), tool: self.tool, table, chain, doubts: Vec::new() }
    }

    fn doubt(&self, rule: &Rule) -> Doubt {
        Doubt { rule: rule.text.clone(), chain: self.name.clone(), table: self.table_shown() }
    }

    /// The table, for nftables with its family.
    fn table_shown(&self) -> String {
        let Self { tool, families, table, .. } = self;
        match (tool, families) {
            (Tool::Iptables | Tool::Ip6tables, _) => table.clone(),
            (Tool::Nft, Families::V4) => format!("ip {table}"),
            (Tool::Nft, Families::V6) => format!("ip6 {table}"),
            (Tool::Nft, Families::Both) => format!("inet {table}"),
        }
    }
}

impl Families {
    fn has(self, address: IpAddr) -> bool {
        match self {
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
            Self::Both => true,
        }
    }
}

impl Match {
    fn yes(what: What) -> Self {
        Self { what, negated: false }
    }

    fn ports(&self) -> &[(u16, u16)] {
        match &self.what {
            What::Ports(ranges) => ranges,
            _ => &[],
        }
    }

    fn answer(&self, packet: &Packet) -> Answer {
        let has = |names: &[String], one: &str| names.iter().any(|name| name.eq_ignore_ascii_case(one));
        let holds = match &self.what {
            What::Destination(prefixes) => prefixes.iter().any(|prefix| prefix.contains(packet.to)),
            What::Source(prefixes) => return self.answer_of_source(prefixes, packet),
            What::Protocol(names) => has(names, packet.protocol),
            What::Ports(ranges) => ranges.iter().any(|(first, last)| (*first..=*last).contains(&packet.port)),
            What::Interface(name) if name == "lo" => false,
            What::ToType(types) => has(types, "local"),
            What::FromType(types) => has(types, "unicast"),
            What::PacketType(types) => has(types, "host") || has(types, "unicast"),
            What::TcpFlags { of, set } => {
                packet.protocol == "tcp" && has(of, "syn") == has(set, "syn") && set.iter().all(|it| it == "syn")
            }
            What::Status => false,
            What::States(states) => has(states, "new"),
            What::Ipv4(is_ipv4) => packet.to.is_ipv4() == *is_ipv4,
            What::Interface(_) | What::Unknown => return Answer::Maybe,
        };
        if holds == self.negated { Answer::No } else { Answer::Yes }
    }

    /// A client may have any address but those of loopback.
    fn answer_of_source(&self, prefixes: &[Prefix], packet: &Packet) -> Answer {
        let mut own = prefixes.iter().filter(|prefix| prefix.is_ipv4() == packet.to.is_ipv4());
        let holds = if own.clone().any(Prefix::is_everything) {
            true
        } else if own.all(|prefix| prefix.address().is_loopback()) {
            false
        } else {
            return Answer::Maybe;
        };
        if holds == self.negated { Answer::No } else { Answer::Yes }
    }
}
