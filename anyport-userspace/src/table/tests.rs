//! Tests that compare the lookup table with the reference decision.

use std::collections::HashMap;

use anyport_common::{
    event::RING_BYTES,
    flow::{Flow, Version},
    table::{self, SEGMENT_BITS, SEGMENT_WORDS, Slot, Store, Verdict, Words},
};
use proptest::prelude::*;

use super::{OwnSegments, Reader, Receiver, Table};
use crate::rules::{
    Change, Decision, Draft, Origin, Prefix, PrefixRules, Rule, RuleSet, RuleText, ServiceName, SourceLists, decide,
    from_address,
    tests::arbitrary::{SERVICES, flow, rule, rules, source_lists},
};

/// The services in slots from 1 on, with the clients that they allow.
type Lists = [SourceLists; SERVICES.len()];

fn lists() -> impl Strategy<Value = Lists> {
    let some = || prop_oneof![Just(SourceLists::default()), source_lists()];
    [some(), some(), some()]
}

fn slot(name: &ServiceName) -> u16 {
    (1..).zip(SERVICES).find(|(_, it)| *it == name.as_str()).unwrap().0
}

fn find<'a>(lists: &'a Lists) -> impl Fn(&ServiceName) -> anyhow::Result<Receiver<'a>> + 'a {
    |name| Ok(Receiver { slot: slot(name), sources: &lists[usize::from(slot(name) - 1)] })
}

/// Gives each prefix that has changed new numbers, as the engine does.
fn number(change: &mut Change, next: &mut u32) {
    for (_, rules) in &mut change.added {
        rules.first_number = *next;
        *next += u32::try_from(rules.len()).unwrap();
    }
}

fn numbered(set: &RuleSet) -> (RuleSet, u32) {
    let mut change =
        Change { added: set.prefixes().map(|(prefix, rules)| (*prefix, rules.clone())).collect(), ..Change::default() };
    let mut next = 1;
    number(&mut change, &mut next);
    let mut set = RuleSet::default();
    set.apply(&change);
    (set, next)
}

fn expected(rules: &RuleSet, lists: &Lists, flow: &Flow) -> Verdict {
    if flow.port == 0 {
        return Verdict::Unmatched;
    }
    match decide(rules, from_address(flow.address), flow.transport, flow.port, from_address(flow.source)) {
        Decision::Unmatched => Verdict::Unmatched,
        Decision::Host(rule) => Verdict::Host { rule: rule.number },
        Decision::Steer(rule) => {
            let Receiver { slot: service, sources } = find(lists)(&rule.terms.service).unwrap();
            let rule = rule.number;
            if sources.allows(from_address(flow.source)) {
                Verdict::Steer { rule, service }
            } else {
                Verdict::Deny { rule }
            }
        }
    }
}

fn check(table: &Table, rules: &RuleSet, lists: &Lists, flows: &[Flow]) -> Result<(), TestCaseError> {
    let reader = table.reader();
    for flow in flows {
        prop_assert_eq!(
            reader.lookup(flow),
            expected(rules, lists, flow),
            "{:?} of {:?} under {:#?}",
            flow,
            lists,
            rules.iter().map(|it| format!("{} {}", it.number, it.to_rule())).collect::<Vec<_>>()
        );
    }
    Ok(())
}

/// Kernels with pages of 64 KiB take a ring buffer of whole pages only, and map whole pages.
#[test]
fn segments_and_events_are_whole_pages_of_any_size() {
    const PAGE: usize = 64 << 10;
    assert_eq!(SEGMENT_WORDS * size_of::<u64>() % PAGE, 0);
    assert_eq!(RING_BYTES % PAGE, 0);
}

/// Segments as a machine has them in memory whose words begin with their highest byte.
struct BigEndian(Vec<Vec<[u8; 8]>>);

impl BigEndian {
    fn of(reader: &Reader) -> Self {
        let segments = (0..).map_while(|number| reader.view.segment(number));
        let bytes = |segment| (0..1 << SEGMENT_BITS).map(|index| Words::word(&segment, index).to_be_bytes()).collect();
        Self(segments.map(bytes).collect())
    }
}

impl Store for BigEndian {
    type Segment<'a> = BigEndianSegment<'a>;

    fn segment(&self, number: u32) -> Option<BigEndianSegment<'_>> {
        self.0.get(number as usize).map(|segment| BigEndianSegment(segment))
    }
}

struct BigEndianSegment<'a>(&'a [[u8; 8]]);

impl Words for BigEndianSegment<'_> {
    fn word(&self, index: u32) -> u64 {
        u64::from_be_bytes(self.0[index as usize % SEGMENT_WORDS])
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    /// Kernel and daemon read words, never their bytes, so that the order of bytes does not matter to a table.
    #[test]
    fn lookup_does_not_depend_on_the_order_of_bytes(
        set in rules(30), lists in lists(), flows in prop::collection::vec(flow(), 100),
    ) {
        let (set, _) = numbered(&set);
        let mut table = Table::new(Box::new(OwnSegments::default()));
        table.make(set.view(), &find(&lists)).unwrap();
        table.commit();
        let reader = table.reader();
        let swapped = BigEndian::of(&reader);
        for flow in &flows {
            let root = if flow.address.version == Version::V4 { reader.v4 } else { reader.v6 };
            let verdict = table::lookup(&swapped, Slot(root), flow).unwrap_or(Verdict::Unmatched);
            prop_assert_eq!(verdict, expected(&set, &lists, flow));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn decides_as_the_reference(set in rules(30), lists in lists(), flows in prop::collection::vec(flow(), 100)) {
        let (set, _) = numbered(&set);
        let mut table = Table::new(Box::new(OwnSegments::default()));
        table.make(set.view(), &find(&lists)).unwrap();
        table.commit();
        check(&table, &set, &lists, &flows)?;
    }

    /// Change after change, some of which are undone, on the same table.
    #[test]
    fn changes_decide_as_the_reference(
        set in rules(60),
        lists in lists(),
        steps in prop::collection::vec((prop::collection::vec((rule(), any::<bool>()), 1..4), any::<bool>()), 1..30),
        flows in prop::collection::vec(flow(), 60),
    ) {
        let (mut set, mut next) = numbered(&set);
        let mut table = Table::new(Box::new(OwnSegments::default()));
        table.make(set.view(), &find(&lists)).unwrap();
        table.commit();
        for (rules, is_kept) in steps {
            let mut draft = Draft::of(&set);
            for (rule, is_added) in rules {
                let of_prefix = draft.prefix(rule.prefix);
                if is_added {
                    drop(of_prefix.insert(&rule));
                } else {
                    of_prefix.remove(|_| true);
                }
            }
            let mut change = draft.finish();
            number(&mut change, &mut next);
            let prefixes = change.prefixes();
            set.apply(&change);
            table.change(set.view(), &prefixes, &find(&lists)).unwrap();
            check(&table, &set, &lists, &flows)?;
            if is_kept {
                table.commit();
            } else {
                table.abort();
                set.apply(&change.inverse());
                check(&table, &set, &lists, &flows)?;
            }
        }
    }
}

/// A generator of numbers that are the same each time.
fn numbers(mut state: u64) -> impl FnMut() -> u64 {
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

fn simple(prefix: Prefix, service: &str) -> Rule {
    let json = format!("{{\"prefix\": \"{prefix}\", \"service\": \"{service}\"}}");
    serde_json::from_str::<RuleText>(&json).unwrap().into_rule(Origin::Added)
}

/// Thousands of prefixes of one shape, half of them made at once and half one by one, in order and at random.
#[test]
fn large_sets_decide_as_a_map() {
    let mut number_of = numbers(7);
    let everybody = Lists::default();
    let service = find(&everybody);
    let shapes: [(&str, &dyn Fn(u64) -> Prefix); 5] = [
        ("scattered /32", &|n| Prefix::from_bits(true, u128::from(n >> 32), 32)),
        ("dense /32", &|n| Prefix::from_bits(true, 0xc000_0000 | u128::from(n % 8192), 32)),
        ("scattered /128", &|n| Prefix::from_bits(false, u128::from(n) << 64 | u128::from(!n), 128)),
        ("one /64", &|n| Prefix::from_bits(false, 0x2001_0db8_u128 << 96 | u128::from(n), 128)),
        ("clusters", &|n| Prefix::from_bits(false, 1 << (n % 120) | u128::from(n >> 59), 128)),
    ];
    for (name, shape) in shapes {
        for is_sequential in [false, true] {
            let mut prefixes: Vec<Prefix> = (0..6_000).map(|_| shape(number_of())).collect();
            if is_sequential {
                prefixes.sort_by_key(Prefix::bounds);
            }
            let mut set = RuleSet::default();
            let rules: HashMap<Prefix, Rule> = prefixes
                .iter()
                .map(|it| (*it, simple(*it, SERVICES[usize::try_from(number_of() % 3).unwrap()])))
                .collect();
            for prefix in &prefixes[..3_000] {
                set.insert(&rules[prefix]).unwrap();
            }
            let (mut set, mut next) = numbered(&set);
            let mut table = Table::new(Box::new(OwnSegments::default()));
            table.make(set.view(), &service).unwrap();
            table.commit();
            for prefix in &prefixes[3_000..] {
                let mut draft = Draft::of(&set);
                draft.prefix(*prefix).insert(&rules[prefix]).unwrap();
                let mut change = draft.finish();
                number(&mut change, &mut next);
                set.apply(&change);
                table.change(set.view(), &change.prefixes(), &service).unwrap();
                table.commit();
            }
            let reader = table.reader();
            let judge = |prefix: &Prefix| {
                let flow = Flow {
                    source: prefix.first(),
                    address: prefix.first(),
                    transport: anyport_common::flow::Transport::Tcp,
                    port: 80,
                };
                reader.lookup(&flow)
            };
            for (prefix, rule) in &rules {
                let of_prefix: &PrefixRules = set.of_prefix(prefix).unwrap();
                let service = slot(&rule.terms.service);
                let expected = Verdict::Steer { rule: of_prefix.first_number, service };
                assert_eq!(judge(prefix), expected, "{name}: {prefix}");
                let (first, last) = prefix.bounds();
                for beside in [first.wrapping_sub(1), last.wrapping_add(1)] {
                    let beside = Prefix::from_bits(prefix.is_ipv4(), beside, prefix.len());
                    if !rules.contains_key(&beside) {
                        assert_eq!(judge(&beside), Verdict::Unmatched, "{name}: {beside}");
                    }
                }
            }
            let (used, all) = table.bytes();
            assert!(all <= used * 4 + (4 << 20), "{name}: {used} of {all} bytes are in use");
        }
    }
}
