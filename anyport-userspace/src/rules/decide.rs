//! The reference decision about a packet, with which every back end is compared.

use std::net::IpAddr;

use anyport_common::flow::Transport;

use super::{Prefix, RuleSet, rule::Target, set::RuleRef};

/// What a rule set says of a packet.
#[derive(Clone, Copy, Debug)]
pub enum Decision<'a> {
    /// No rule matches: the packet is the host's.
    Unmatched,
    /// This rule leaves it to the host.
    Host(RuleRef<'a>),
    /// This rule steers it to its service.
    Steer(RuleRef<'a>),
}

/// The reference decision, which every back end must agree with: the first rule in order of precedence that matches the packet.
pub fn decide(rules: &RuleSet, address: IpAddr, transport: Transport, port: u16, source: IpAddr) -> Decision<'_> {
    rules
        .around(Prefix::host(address))
        .flat_map(|(prefix, rules)| rules.numbered(prefix))
        .filter(|rule| rule.terms.protocol.transports().contains(&transport) && rule.terms.is_about(source))
        .find_map(|rule| match rule.terms.target(port)? {
            Target::Host => Some(Decision::Host(rule)),
            Target::Service(_) => Some(Decision::Steer(rule)),
        })
        .unwrap_or(Decision::Unmatched)
}
