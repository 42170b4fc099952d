//! Rules sorted into groups: all prefixes of one length of which the same is said. Such prefixes are disjoint, so one
//! line can stand for all of them, and the order of the groups is that of the rules.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
};

use anyport_common::flow::{Flow, Transport};

use super::chain_rules::{Family, LineTarget};
use crate::{
    rules::{Prefix, PrefixRules, RuleSpec, RuleView, ServiceName, to_address},
    steering::ServiceSockets,
};

/// Up to here each prefix has lines of its own. A lookup in a set costs a packet as much as some ten lines do.
pub(super) const FEW: usize = 8;

/// What the prefixes of a group have in common. Sorted so that of groups that match a packet the first one decides.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) len: u8,
    pub(super) terms: Arc<RuleSpec>,
    pub(super) effect: Effect,
}

/// What becomes of the packets. The counter of a set's element can't distinguish them, so where a rule steers one transport
/// and drops another since its service has no socket for it, it belongs to two groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Effect {
    Steer,
    Drop,
}

/// The prefixes of a group and what becomes of their packets.
#[derive(Clone, Debug)]
pub(super) struct Group {
    /// By transport, at least one.
    pub(super) verdicts: Verdicts,
    pub(super) prefixes: Prefixes,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Prefixes {
    /// So few that each has its own lines.
    Few(Vec<Prefix>),
    /// A set in the kernel, and the number of its elements.
    Set { name: String, len: usize },
}

impl Prefixes {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Few(prefixes) => prefixes.len(),
            Self::Set { len, .. } => *len,
        }
    }

    /// The name of the set, if there is one.
    pub(super) fn set(&self) -> Option<&str> {
        match self {
            Self::Few(_) => None,
            Self::Set { name, .. } => Some(name),
        }
    }
}

pub(super) type Groups = BTreeMap<Key, Group>;
pub(super) type Verdicts = Vec<(Transport, LineTarget)>;

impl Key {
    /// Whether a rule of such a prefix belongs to the group. Rules that differ only in their route do so alike.
    pub(super) fn is_of(&self, terms: &Arc<RuleSpec>) -> bool {
        is_same(&self.terms, terms)
    }
}

fn is_same(a: &Arc<RuleSpec>, b: &Arc<RuleSpec>) -> bool {
    Arc::ptr_eq(a, b) || a.precedence() == b.precedence()
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        let terms = || {
            if Arc::ptr_eq(&self.terms, &other.terms) {
                Ordering::Equal
            } else {
                self.terms.precedence().cmp(&other.terms.precedence())
            }
        };
        let len = Reverse(self.len).cmp(&Reverse(other.len));
        len.then_with(terms).then(self.effect.cmp(&other.effect))
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Key {}

/// What becomes of what is steered to each service, in one family.
#[derive(Debug)]
pub(super) struct Sockets<'a>(HashMap<&'a ServiceName, [LineTarget; 2]>);

impl<'a> Sockets<'a> {
    /// `refusal`: where what is refused goes, TCP's and UDP's.
    pub(super) fn of(services: &'a [ServiceSockets], family: Family, refusal: Option<[SocketAddr; 2]>) -> Self {
        let verdict = |service: &ServiceSockets, transport: Transport| {
            let address = to_address(family.loopback());
            let offset = Flow { source: address, address, transport, port: 0 }.socket_offset();
            let refusal = refusal.map(|at| at[usize::from(transport == Transport::Udp)]);
            LineTarget::of(service.groups[offset as usize].as_ref(), family, refusal)
        };
        let verdicts = |service| Transport::ALL.map(|transport| verdict(service, transport));
        Self(services.iter().map(|service| (&service.name, verdicts(service))).collect())
    }

    /// What becomes of the packets of a rule, of each transport by which it has this effect.
    pub(super) fn verdicts(&self, terms: &RuleSpec, effect: Effect) -> anyhow::Result<Verdicts> {
        let Some(by_transport) = self.0.get(&terms.service) else {
            anyhow::bail!("the plan has no service {}", terms.service);
        };
        let verdicts = Transport::ALL.into_iter().zip(*by_transport);
        let of_terms = verdicts.filter(|(transport, _)| terms.protocol.transports().contains(transport));
        Ok(of_terms.filter(|(_, verdict)| verdict.drops() == (effect == Effect::Drop)).collect())
    }

    /// The groups to which a rule belongs.
    pub(super) fn keys(&self, len: u8, terms: &Arc<RuleSpec>) -> anyhow::Result<Vec<(Key, Verdicts)>> {
        let mut keys = Vec::with_capacity(1);
        for effect in [Effect::Steer, Effect::Drop] {
            let verdicts = self.verdicts(terms, effect)?;
            if !verdicts.is_empty() {
                keys.push((Key { len, terms: Arc::clone(terms), effect }, verdicts));
            }
        }
        Ok(keys)
    }
}

/// All rules of a family in groups, each with its prefixes in order.
pub(super) fn sort(
    rules: RuleView<'_>,
    family: Family,
    sockets: &Sockets<'_>,
) -> anyhow::Result<BTreeMap<Key, (Verdicts, Vec<Prefix>)>> {
    let mut groups: Vec<(Key, Verdicts, Vec<Prefix>)> = Vec::new();
    let mut positions: BTreeMap<Key, usize> = BTreeMap::new();
    // Most rules say what the previous one said.
    let mut last: Option<(u8, Arc<RuleSpec>, Vec<usize>)> = None;
    for (prefix, of_prefix) in rules.within(family.everything()) {
        for held in of_prefix {
            let is_as_before =
                last.as_ref().is_some_and(|(len, terms, _)| *len == prefix.len() && *terms == held.terms);
            if !is_as_before {
                let mut at = Vec::new();
                for (key, verdicts) in sockets.keys(prefix.len(), &held.terms)? {
                    let position = *positions.entry(key.clone()).or_insert(groups.len());
                    if position == groups.len() {
                        groups.push((key, verdicts, Vec::new()));
                    }
                    at.push(position);
                }
                last = Some((prefix.len(), Arc::clone(&held.terms), at));
            }
            for position in last.iter().flat_map(|(_, _, at)| at) {
                groups[*position].2.push(prefix);
            }
        }
    }
    Ok(groups.into_iter().map(|(key, verdicts, prefixes)| (key, (verdicts, prefixes))).collect())
}

/// The number of the rule that put a prefix into a group.
pub(super) fn number(rules: RuleView<'_>, prefix: Prefix, key: &Key) -> Option<u32> {
    let of_prefix: &PrefixRules = rules.of_prefix(&prefix)?;
    of_prefix.numbered(prefix).find(|rule| key.is_of(rule.terms)).map(|rule| rule.number)
}
