//! The example in `docs/lookup-table.md`: its words are those that the compiler writes.

use std::{collections::HashMap, fmt::Write as _, sync::Arc};

use anyport_common::{
    flow::{Flow, Transport, Version},
    table::{CacheLine, LINE_SLOTS, LINE_WORDS, SEGMENT_WORDS, Slot, SlotKind, Store as _, Verdict, Words as _},
};

use super::{OwnSegments, Reader, Receiver, Table};
use crate::rules::{Change, Origin, Prefix, RuleSet, RuleSpec, RuleText, SourceLists};

/// The rules of the example, in order of address. Services `web` and `shop` have the slots 1 and 2.
const RULES: [(&str, &str, &str); 5] = [
    ("192.0.2.10/32", "1-65535", "web"),
    ("192.0.2.77/32", "1-65535", "web"),
    ("192.0.2.78/32", "1-65535", "web"),
    ("192.0.2.130/32", "1-65535", "web"),
    ("192.0.2.200/32", "80,443", "shop"),
];
const DOCUMENT: &str = include_str!("../../../docs/lookup-table.md");

fn compiled() -> Table {
    let mut rules = RuleSet::default();
    // Rules that say the same share it, as in the engine.
    let mut shared: HashMap<(&str, &str), Arc<RuleSpec>> = HashMap::new();
    for (prefix, ports, service) in RULES {
        let json = format!("{{\"prefix\": \"{prefix}\", \"ports\": \"{ports}\", \"service\": \"{service}\"}}");
        let mut rule = serde_json::from_str::<RuleText>(&json).unwrap().into_rule(Origin::Added);
        rule.terms = Arc::clone(shared.entry((ports, service)).or_insert(rule.terms));
        rules.insert(&rule).unwrap();
    }
    let mut change =
        Change { added: rules.prefixes().map(|(it, rules)| (*it, rules.clone())).collect(), ..Change::default() };
    for (number, prefix) in (1..).zip(RULES.map(|it| it.0.parse::<Prefix>().unwrap())) {
        let of_prefix = change.added.iter_mut().find(|(it, _)| *it == prefix).unwrap();
        of_prefix.1.first_number = number;
    }
    let mut rules = RuleSet::default();
    rules.apply(&change);
    let everybody = SourceLists::default();
    let mut table = Table::new(Box::new(OwnSegments::default()));
    let slot = |name: &str| if name == "web" { 1 } else { 2 };
    table.make(rules.view(), &|name| Ok(Receiver { slot: slot(name.as_str()), sources: &everybody })).unwrap();
    table.commit();
    table
}

/// A table as the page shows it: each word that is in use, and what it says.
fn shown(reader: &Reader) -> String {
    let root = Slot(reader.v4);
    let mut words = Vec::new();
    nodes(reader, root, &mut words);
    words.sort();
    words.dedup();
    let mut text = format!("root      {:016x}  {}\n", root.0, describe(root));
    for (at, meaning) in words {
        let _ = writeln!(text, "word {at:<4} {:016x}  {meaning}", word(reader, at));
    }
    text
}

fn word(reader: &Reader, at: u32) -> u64 {
    reader.view.segment(0).unwrap().word(at % u32::try_from(SEGMENT_WORDS).unwrap())
}

/// The words of a node and of those below it.
fn nodes(reader: &Reader, slot: Slot, words: &mut Vec<(u32, String)>) {
    let at = slot.offset();
    match slot.kind().unwrap() {
        SlotKind::Verdict => {}
        SlotKind::Ports => {
            for (place, transport) in ["tcp", "udp"].into_iter().enumerate() {
                let at = at + u32::try_from(place).unwrap();
                let of_transport = Slot(word(reader, at));
                words.push((at, format!("{transport}: {}", describe(of_transport))));
                nodes(reader, of_transport, words);
            }
        }
        SlotKind::Sorted => {
            let slots = 1 << slot.order();
            for place in 0..slots {
                let key = word(reader, at + place);
                let is_used = place + 1 < slots;
                words.push((at + place, if is_used { format!("key {}", place + 1) } else { "unused".to_owned() }));
                let below = Slot(word(reader, at + slots + place));
                words.push((at + slots + place, format!("slot {place}: {}", describe(below))));
                if !is_used || key != u64::MAX {
                    nodes(reader, below, words);
                }
            }
        }
        SlotKind::Index => {
            for place in 0..1 << slot.width() {
                let below = Slot(word(reader, at + place));
                words.push((at + place, format!("slot {place}: {}", describe(below))));
                nodes(reader, below, words);
            }
        }
        SlotKind::CacheLines => {
            for number in 0..1 << slot.width() {
                let at = at + number * LINE_WORDS;
                let line = CacheLine(std::array::from_fn(|place| word(reader, at + u32::try_from(place).unwrap())));
                lines(at, &line, words);
                for (_, below) in line.slots() {
                    nodes(reader, below, words);
                }
            }
        }
    }
}

/// The eight words of a cache line.
fn lines(at: u32, line: &CacheLine, words: &mut Vec<(u32, String)>) {
    let slots: Vec<_> = line.slots().collect();
    let keys = |places: std::ops::Range<usize>| {
        let keys = slots[places].iter().map(|(key, _)| format!("{key:04x}"));
        keys.collect::<Vec<_>>().join(", ")
    };
    let of_ports: String =
        slots.iter().map(|(_, slot)| if slot.kind() == Some(SlotKind::Ports) { '0' } else { '1' }).collect();
    words.push((at, format!("keys 1 to 4: {}", keys(1..5))));
    words.push((at + 1, format!("keys 5 to 7: {}; slots 0 to 7 are no ports: {of_ports}", keys(5..8))));
    words.push((at + 2, "bits 32 to 47 of slots 0 to 3".to_owned()));
    words.push((at + 3, "bits 32 to 47 of slots 4 to 7".to_owned()));
    for pair in 0..LINE_SLOTS / 2 {
        let of = |place: u32| describe(slots[place as usize].1);
        let text = format!("slots {} and {}: {}; {}", 2 * pair, 2 * pair + 1, of(2 * pair), of(2 * pair + 1));
        words.push((at + 4 + pair, text));
    }
}

/// A slot in words.
fn describe(slot: Slot) -> String {
    let at = slot.offset();
    match slot.kind().unwrap() {
        SlotKind::Verdict => match slot.to_verdict(0) {
            Verdict::Unmatched => "no rule".to_owned(),
            Verdict::Steer { rule, service } => format!("steer to service {service}, rule + {rule}"),
            other => format!("{other:?}"),
        },
        SlotKind::Ports => format!("ports {at}, rule {}", slot.first_number()),
        SlotKind::Sorted => format!("sorted node of {} slots at {at}", 1 << slot.order()),
        SlotKind::Index => format!("index of {} slots at {at}", 1 << slot.width()),
        SlotKind::CacheLines if slot.width() == 0 => format!("line at {at}, behind {} bits of the key", slot.skip()),
        SlotKind::CacheLines => format!("{} lines at {at}, behind {} bits of the key", 1 << slot.width(), slot.skip()),
    }
}

#[test]
fn words_of_the_documented_example_are_those_of_the_compiler() {
    let shown = shown(&compiled().reader());
    assert!(DOCUMENT.contains(&shown), "docs/lookup-table.md has to show:\n{shown}");
}

/// The lookups that the page shows.
#[test]
fn documented_lookups_find_the_documented_rules() {
    let reader = compiled().reader();
    let judge = |address: &str, port| {
        let prefix: Prefix = format!("{address}/32").parse().unwrap();
        let address = prefix.first();
        assert_eq!(address.version, Version::V4);
        reader.lookup(&Flow { source: address, address, transport: Transport::Tcp, port })
    };
    assert_eq!(judge("192.0.2.77", 31337), Verdict::Steer { rule: 2, service: 1 });
    assert_eq!(judge("192.0.2.200", 443), Verdict::Steer { rule: 5, service: 2 });
    assert_eq!(judge("192.0.2.200", 444), Verdict::Unmatched);
    assert_eq!(judge("192.0.2.76", 31337), Verdict::Unmatched);
}
