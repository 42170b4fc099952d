use std::net::IpAddr;

use anyport_common::flow::Transport;

use super::{Rule, RuleSet, rule::Target};

/// What a rule set says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision<'a> {
    /// No rule has an opinion: the packet is the host's.
    Unmatched,
    /// This rule leaves it to the host.
    Host(&'a Rule),
    /// This rule steers it to its service.
    Steer(&'a Rule),
}

/// The reference decision, which every back end must agree with: the first rule in order of precedence that has
/// an opinion on the packet.
pub fn decide(rules: &RuleSet, address: IpAddr, transport: Transport, port: u16) -> Decision<'_> {
    rules
        .iter()
        .filter(|rule| rule.protocol.transports().contains(&transport))
        .filter(|rule| rule.prefix.contains(address))
        .find_map(|rule| match rule.target(port)? {
            Target::Host => Some(Decision::Host(rule)),
            Target::Service(_) => Some(Decision::Steer(rule)),
        })
        .unwrap_or(Decision::Unmatched)
}
