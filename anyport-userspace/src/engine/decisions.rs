//! Asks the programs about rules that they should hold, some every second: a lookup table that another program has changed shows in no other way.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyport_common::flow::Flow;

use super::{Engine, explain::loopback};
use crate::{
    rules::{Prefix, PrefixRules, Protocol, RuleRef, to_address},
    steering::BackEnd,
};

/// After so many times all prefixes have been asked about.
const ROUND: usize = 50;
/// So many each time at least.
const FEWEST: usize = 64;
/// What it may take each time. With more rules than fit into that a round takes longer.
const LONGEST: Duration = Duration::from_millis(20);

/// Where the next questions begin.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Decisions {
    /// Behind this prefix.
    after: Option<Prefix>,
    /// Each round asks about other addresses and ports of the same rules.
    round: usize,
}

impl Engine {
    /// Asks about the next rules, and has the table made again by a full rebuild where an answer is wrong. With tproxy each answer would take
    /// a program to be started, so that one sees to its chains and sets alone.
    pub(super) fn check_decisions(&mut self) {
        let rules = self.desired.rules();
        let all = rules.prefix_count();
        if self.kernel.back_end() == BackEnd::Tproxy || all == 0 {
            return;
        }
        let Decisions { after, round } = self.decisions;
        let begun = Instant::now();
        let (mut last, mut wrong) = (None, None);
        for (prefix, rules) in rules.after(after).take(FEWEST.max(all.div_ceil(ROUND))) {
            last = Some(prefix);
            wrong = self.is_wrong(&prefix, rules, round);
            if wrong.is_some() || begun.elapsed() >= LONGEST {
                break;
            }
        }
        let is_over = last.is_none_or(|last| rules.after(Some(last)).next().is_none());
        self.decisions = if is_over {
            Decisions { after: None, round: round.wrapping_add(1) }
        } else {
            Decisions { after: last, round }
        };
        if let Some(what) = wrong {
            self.kernel.note_wrong(what);
        }
    }

    /// What is decided otherwise than a rule of this prefix demands.
    fn is_wrong(&self, prefix: &Prefix, rules: &PrefixRules, round: usize) -> Option<String> {
        let rule = rules.numbered(*prefix).nth(round % rules.len().max(1))?;
        let (flow, source, address) = question(&rule, round)?;
        let decided = match self.kernel.decide(&flow) {
            Ok(decided) => decided,
            Err(error) => return Some(format!("the answer of the programs about {address}: {error:#}")),
        };
        self.doubt(&decided, flow.transport, source, address)
            .map(|_| format!("the entry of the lookup table for {} {address}", Protocol::from(flow.transport)))
    }
}

/// A packet that the rule matches, and its source and destination.
fn question(rule: &RuleRef<'_>, round: usize) -> Option<(Flow, IpAddr, SocketAddr)> {
    let RuleRef { prefix, terms, .. } = rule;
    let transports = terms.protocol.transports();
    let transport = *transports.get(round % transports.len())?;
    let ranges = terms.ports.ranges();
    let (first, last) = *ranges.get(round % ranges.len())?;
    let port = if round.is_multiple_of(2) { first } else { last };
    let (low, high) = prefix.bounds();
    let bits = [low, high, low + (high - low) / 2][round % 3];
    let address = Prefix::from_bits(prefix.is_ipv4(), bits, u8::MAX).address();
    let source = terms.source.map_or(loopback(prefix.is_ipv4()), |source| source.address());
    let flow = Flow { source: to_address(source), address: to_address(address), transport, port };
    Some((flow, source, (address, port).into()))
}
