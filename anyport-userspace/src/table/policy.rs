//! Policies: what holds for the ports, and where rules ask for it the clients, of an address.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    mem,
    sync::Arc,
};

use anyhow::bail;
use anyport_common::{
    flow::Transport,
    table::{KeySelector, STEPS, Slot, Verdict, port_key},
};
use smallvec::SmallVec;

use super::{
    arena::{Arena, Block},
    tree::{Halves, Piece, build, build_addresses, by_first_half},
};
use crate::rules::{PortSet, Prefix, PrefixRules, RuleSpec, ServiceName, SourceLists};

/// A service as the rules that steer to it see it.
#[derive(Clone, Copy, Debug)]
pub struct Receiver<'a> {
    /// Its slot. Another incarnation of the service, which may take others, has another one.
    pub slot: u16,
    /// Which clients it allows.
    pub sources: &'a SourceLists,
}

/// Finds a service by its name.
pub type Receivers<'a> = dyn Fn(&ServiceName) -> anyhow::Result<Receiver<'a>> + 'a;

/// The policies of a table. Prefixes share one where they say the same inside of the same.
#[derive(Debug, Default)]
pub(super) struct Policies {
    known: HashMap<Key, Policy>,
    next_id: u32,
    /// What was added since the last commit.
    created: Vec<Key>,
    /// During a full rebuild: what was known.
    aside: Option<HashMap<Key, Policy>>,
    /// Words of all policies, and how many of them were in use at the last check.
    words: u64,
    words_in_use: u64,
}

/// Rule specs are compared by their place in memory, which a policy holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    /// The clients of the two versions are different ones.
    is_ipv4: bool,
    own: SmallVec<[usize; 1]>,
    outer: Option<Outer>,
}

/// The policy of the prefix around, and its first rule's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Outer {
    policy: u32,
    first_number: u32,
}

#[derive(Debug)]
struct Policy {
    id: u32,
    offset: u32,
    blocks: Vec<Block>,
    matched: Arc<PortsOfTransports>,
    #[expect(dead_code, reason = "keeps the places in memory from being another's")]
    terms: SmallVec<[Arc<RuleSpec>; 1]>,
}

/// A prefix and its place among those around it, from the outside to the inside.
#[derive(Clone, Debug)]
pub(super) struct Level<'a> {
    pub(super) rules: &'a PrefixRules,
    outer: Outer,
    /// Its ports.
    pub(super) slot: Slot,
    /// The ports that it or a level around it matches.
    matched: Arc<PortsOfTransports>,
}

/// In the order of [`Transport::ALL`].
type PortsOfTransports = [PortSet; 2];

/// A rule and its number, which counts from the prefix's first one if it is one of the prefix's own.
#[derive(Clone, Copy)]
struct Match<'a> {
    terms: &'a RuleSpec,
    number: u32,
    is_relative: bool,
}

impl Policies {
    /// The policy of a prefix inside of those around it.
    pub(super) fn level<'a>(
        &mut self,
        arena: &mut Arena,
        around: &[Level<'a>],
        (prefix, rules): (&Prefix, &'a PrefixRules),
        services: &Receivers<'_>,
    ) -> anyhow::Result<Level<'a>> {
        // Where the prefix matches everything that the levels around it match, those are never asked.
        let is_asked = around.last().is_some_and(|it| !closes(rules, &it.matched));
        let around = if is_asked { around } else { &[] };
        let key = Key {
            is_ipv4: prefix.is_ipv4(),
            own: rules.iter().map(|it| Arc::as_ptr(&it.terms) as usize).collect(),
            outer: around.last().map(|it| it.outer),
        };
        if !self.known.contains_key(&key) {
            self.create(arena, key.clone(), around, rules, services)?;
        }
        let Policy { id, offset, matched, .. } =
            self.known.get(&key).ok_or_else(|| anyhow::anyhow!("a policy that was made is not there"))?;
        Ok(Level {
            rules,
            outer: Outer { policy: *id, first_number: rules.first_number },
            slot: Slot::ports(*offset, rules.first_number),
            matched: Arc::clone(matched),
        })
    }

    fn create(
        &mut self,
        arena: &mut Arena,
        key: Key,
        around: &[Level<'_>],
        rules: &PrefixRules,
        services: &Receivers<'_>,
    ) -> anyhow::Result<()> {
        let own = (0..).zip(rules.iter()).map(|(number, it)| Match { terms: &it.terms, number, is_relative: true });
        let others = around.iter().rev().flat_map(|level| {
            let numbers = level.rules.first_number..;
            numbers.zip(level.rules.iter()).map(|(number, it)| Match { terms: &it.terms, number, is_relative: false })
        });
        let matches: Vec<_> = own.chain(others).collect();
        let mark = arena.mark();
        let mut slots = [Slot::UNMATCHED; 2];
        for (transport, slot) in Transport::ALL.iter().zip(&mut slots) {
            let about: Vec<_> =
                matches.iter().copied().filter(|it| it.terms.protocol.transports().contains(transport)).collect();
            *slot = ports(arena, &about, key.is_ipv4, services)?;
        }
        let offset = arena.put(1, slots.map(|it| it.0))?;
        let blocks = arena.taken_since(mark);
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.words += words(&blocks);
        let terms = rules.iter().map(|it| Arc::clone(&it.terms)).collect();
        let own: Vec<&RuleSpec> = rules.iter().map(|it| &*it.terms).collect();
        let mut matched: PortsOfTransports = Transport::ALL.map(|transport| matched_ports(&own, transport));
        if let Some(outer) = around.last() {
            for (own, outer) in matched.iter_mut().zip(&*outer.matched) {
                *own = own.union(outer);
            }
        }
        self.known.insert(key.clone(), Policy { id, offset, blocks, matched: Arc::new(matched), terms });
        self.created.push(key);
        Ok(())
    }

    /// From here on nothing of what is known is used.
    pub(super) fn begin_anew(&mut self) {
        self.aside = Some(mem::take(&mut self.known));
        self.words = 0;
    }

    pub(super) fn commit(&mut self) {
        self.created.clear();
        if self.aside.take().is_some() {
            self.words_in_use = self.words;
        }
    }

    pub(super) fn abort(&mut self) {
        for key in self.created.drain(..) {
            if let Some(policy) = self.known.remove(&key) {
                self.words -= words(&policy.blocks);
            }
        }
        if let Some(known) = self.aside.take() {
            self.words = known.values().map(|it| words(&it.blocks)).sum();
            self.known = known;
        }
    }

    /// Whether there is so much that may not be in use any more that it is worth looking.
    pub(super) fn has_much_to_forget(&self) -> bool {
        const LITTLE: u64 = 1 << 15;
        self.words > 2 * self.words_in_use + LITTLE
    }

    /// Forgets the policies whose offset is not among these. To be called between changes.
    pub(super) fn forget_all_but(&mut self, arena: &mut Arena, in_use: &HashSet<u32>) {
        for (_, policy) in self.known.extract_if(|_, policy| !in_use.contains(&policy.offset)) {
            self.words -= words(&policy.blocks);
            for block in policy.blocks {
                arena.give_up(block);
            }
        }
        self.words_in_use = self.words;
    }
}

/// The ports of a transport that any of these rule specs match.
fn matched_ports(terms: &[&RuleSpec], transport: Transport) -> PortSet {
    let about = terms.iter().filter(|it| it.protocol.transports().contains(&transport));
    about.fold(PortSet::default(), |all, it| all.union(&it.matched_ports()))
}

/// Whether the rules match all of these ports, whichever the client is.
fn closes(rules: &PrefixRules, ports: &PortsOfTransports) -> bool {
    Transport::ALL.iter().zip(ports).all(|(transport, ports)| {
        let total = || rules.iter().map(|it| &*it.terms).filter(|it| it.source.is_none());
        // One rule is all there is, most of the time.
        let is_in_one = total().any(|it| it.protocol.transports().contains(transport) && ports.is_subset(&it.ports));
        ports.is_empty() || is_in_one || ports.is_subset(&matched_ports(&total().collect::<Vec<_>>(), *transport))
    })
}

fn words(blocks: &[Block]) -> u64 {
    blocks.iter().map(|it| 1 << it.order).sum()
}

/// The tree of the ports for matching rules in order of precedence.
fn ports(arena: &mut Arena, matches: &[Match<'_>], is_ipv4: bool, services: &Receivers<'_>) -> anyhow::Result<Slot> {
    // What a rule says changes only where one of its ranges begins or ends.
    let mut begins: Vec<(u16, usize)> = Vec::new();
    let mut ends: Vec<(u16, usize)> = Vec::new();
    let mut edges: Vec<u16> = vec![0];
    for (place, Match { terms, .. }) in matches.iter().enumerate() {
        for (first, last) in terms.matched_ports().ranges() {
            begins.push((*first, place));
            ends.extend(last.checked_add(1).map(|next| (next, place)));
        }
        for (first, last) in terms.ports.ranges().iter().chain(terms.except.ranges()) {
            edges.push(*first);
            edges.extend(last.checked_add(1));
        }
    }
    begins.sort_unstable();
    ends.sort_unstable();
    edges.sort_unstable();
    edges.dedup();
    let (mut begins, mut ends) = (begins.into_iter().peekable(), ends.into_iter().peekable());
    let mut active: BTreeSet<usize> = BTreeSet::new();
    let mut clients = Clients { is_ipv4, known: HashMap::new(), depth: 0 };
    let mut pieces: Vec<Piece> = Vec::with_capacity(edges.len());
    for port in edges {
        while let Some((_, place)) = ends.next_if(|(at, _)| *at <= port) {
            active.remove(&place);
        }
        while let Some((_, place)) = begins.next_if(|(at, _)| *at <= port) {
            active.insert(place);
        }
        let slot = clients.slot(arena, active.iter().map(|place| &matches[*place]), port, services)?;
        if pieces.last().is_none_or(|before| before.slot != slot) {
            pieces.push(Piece { first: port_key(port), slot });
        }
    }
    let built = build(arena, &pieces, u64::MAX, KeySelector::Same)?;
    if built.depth + clients.depth >= STEPS {
        bail!("the ports and sources of the rules need more steps than a lookup takes; use fewer of them");
    }
    Ok(built.slot)
}

/// The trees of clients that the ports of one policy lead to.
struct Clients {
    is_ipv4: bool,
    /// A slot of a service stands for the clients that it allows.
    known: HashMap<Vec<(Option<Prefix>, Slot)>, Slot>,
    depth: u32,
}

impl Clients {
    /// What applies at a port, given the rules that match it in order of precedence.
    fn slot<'a>(
        &mut self,
        arena: &mut Arena,
        matches: impl Iterator<Item = &'a Match<'a>>,
        port: u16,
        services: &Receivers<'_>,
    ) -> anyhow::Result<Slot> {
        let mut by_source = Vec::new();
        let mut answers = Vec::new();
        for matching in matches {
            let answer = matching.answer(port, services)?;
            by_source.push((matching.terms.source, answer.verdict));
            answers.push((matching.terms.source, answer));
            if matching.terms.source.is_none() {
                break;
            }
        }
        if let [(None, Answer { verdict, denial: None })] = answers[..] {
            return Ok(verdict);
        }
        if by_source.is_empty() {
            return Ok(Slot::UNMATCHED);
        }
        if let Some(slot) = self.known.get(&by_source) {
            return Ok(*slot);
        }
        let mut pieces = vec![Piece { first: (0, 0), slot: Slot::UNMATCHED }];
        // The first one decides, so it is painted last.
        for (source, answer) in answers.iter().rev() {
            let area = source.as_ref().map_or(EVERYBODY, halves);
            paint(&mut pieces, area, answer.verdict);
            let Some((sources, denied)) = answer.denial else { continue };
            for (first, last, _) in sources.ranges(self.is_ipv4).filter(|(_, _, is_taken)| !is_taken) {
                let (first, last) = self.halves(first, last);
                let (first, last) = (first.max(area.0), last.min(area.1));
                if first <= last {
                    paint(&mut pieces, (first, last), denied);
                }
            }
        }
        let built = build_addresses(arena, &pieces, KeySelector::Source)?;
        self.depth = self.depth.max(built.depth);
        self.known.insert(by_source, built.slot);
        Ok(built.slot)
    }

    /// A range of addresses, which are numbers, as keys of the tree.
    fn halves(&self, first: u128, last: u128) -> (Halves, Halves) {
        let rest = if self.is_ipv4 { 96 } else { 0 };
        let half = |bits: u128| u64::try_from(bits & u128::from(u64::MAX)).unwrap_or_default();
        let split = |bits: u128| (half(bits >> 64), half(bits));
        (split(first << rest), split(last << rest | ((1 << rest) - 1)))
    }
}

/// All clients.
const EVERYBODY: (Halves, Halves) = ((0, 0), (u64::MAX, u64::MAX));

/// What a rule says at a port.
#[derive(Clone, Copy)]
struct Answer<'a> {
    verdict: Slot,
    /// Where it is not for all clients: which clients it is for, and what it says of the others.
    denial: Option<(&'a SourceLists, Slot)>,
}

impl Match<'_> {
    fn answer<'s>(&self, port: u16, services: &Receivers<'s>) -> anyhow::Result<Answer<'s>> {
        let rule = self.number;
        let slot = |verdict| Slot::verdict(verdict, self.is_relative);
        if self.terms.except.contains(port) {
            return Ok(Answer { verdict: slot(Verdict::Host { rule }), denial: None });
        }
        let Receiver { slot: service, sources } = services(&self.terms.service)?;
        let denial = (!sources.is_empty()).then(|| (sources, slot(Verdict::Deny { rule })));
        Ok(Answer { verdict: slot(Verdict::Steer { rule, service }), denial })
    }
}

/// The first and the last address of a prefix.
pub(super) fn halves(prefix: &Prefix) -> (Halves, Halves) {
    let first = prefix.first();
    let hosts = |len: u8| u64::MAX.checked_shr(u32::from(len)).unwrap_or_default();
    let low = if prefix.is_ipv4() { 0 } else { prefix.len().saturating_sub(64) };
    ((first.high, first.low), (first.high | hosts(prefix.len().min(64)), first.low | hosts(low)))
}

/// The address behind this one.
pub(super) fn next((high, low): Halves) -> Option<Halves> {
    match low.checked_add(1) {
        Some(low) => Some((high, low)),
        None => Some((high.checked_add(1)?, 0)),
    }
}

fn paint(pieces: &mut Vec<Piece<Halves>>, (first, last): (Halves, Halves), slot: Slot) {
    let from = pieces.partition_point(|it| it.first < first);
    let to = pieces.partition_point(|it| it.first <= last);
    let behind = next(last).filter(|next| pieces.get(to).is_none_or(|it| it.first != *next));
    let behind = behind.map(|first| Piece { first, slot: pieces[to - 1].slot });
    pieces.splice(from..to, [Piece { first, slot }].into_iter().chain(behind));
}

/// Pieces for a tree of the first halves of addresses.
pub(super) fn firsts(arena: &mut Arena, pieces: &[Piece<Halves>]) -> anyhow::Result<Vec<Piece>> {
    Ok(by_first_half(arena, pieces)?.0)
}
