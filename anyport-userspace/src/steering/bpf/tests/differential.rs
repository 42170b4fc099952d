//! Random rules and random packets: the loaded programs decide as the reference does, those that steer by what they count, and
//! the one that explains by what it says.
//!
//! `ANYPORT_DECISIONS` says how many decisions each program makes; that many more are made by the table on the host.

use std::{
    cell::{Cell, RefCell},
    env,
    ops::Range,
    path::Path,
    sync::Arc,
};

use anyport_common::flow::{Flow, Transport};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use super::in_new_namespace;
use crate::{
    rules::{
        Change, Decision, Origin, RuleSet, RuleText, ServiceName, SourceLists, decide, from_address,
        tests::arbitrary::{SERVICES, flow, rules, source_lists},
        to_address,
    },
    steering::{
        BackEnd, Decided, Fate, Plan, ServiceSockets, Steering as _,
        bpf::{Bpf, Options},
    },
};

/// Decisions of each program, unless `ANYPORT_DECISIONS` says otherwise.
const DECISIONS: u32 = 100_000;
/// Flows for each set of rules.
const FLOWS: u32 = 500;

fn decisions() -> u32 {
    env::var("ANYPORT_DECISIONS").map_or(DECISIONS, |text| text.parse().expect("ANYPORT_DECISIONS is a number"))
}

/// The rules with numbers, of which none is 0.
fn numbered(rules: &RuleSet) -> (RuleSet, Range<u32>) {
    let mut next = 1;
    let mut added: Vec<_> = rules.prefixes().map(|(prefix, rules)| (*prefix, rules.clone())).collect();
    for (_, rules) in &mut added {
        rules.first_number = next;
        next += u32::try_from(rules.len()).unwrap();
    }
    let mut set = RuleSet::default();
    set.apply(&Change { removed: Vec::new(), added });
    (set, 1..next)
}

/// The services have no sockets, so that what they should get is dropped.
fn expected(rules: &RuleSet, services: &[ServiceSockets], flow: &Flow) -> (Fate, Option<u32>) {
    let source = from_address(flow.source);
    let takes = |name: &ServiceName| services.iter().any(|it| it.name == *name && it.sources.allows(source));
    match decide(rules, from_address(flow.address), flow.transport, flow.port, source) {
        Decision::Unmatched => (Fate::Unmatched, None),
        Decision::Host(rule) => (Fate::Host, Some(rule.number)),
        Decision::Steer(rule) if takes(&rule.terms.service) => (Fate::Drop, Some(rule.number)),
        Decision::Steer(rule) => (Fate::Deny, Some(rule.number)),
    }
}

pub(in crate::steering::bpf) fn open(back_end: BackEnd, bpffs: &Path) -> Bpf {
    let options = Options {
        bpffs: bpffs.to_owned(),
        interfaces: Vec::new(),
        debug: false,
        readers: Arc::default(),
        events: Arc::default(),
    };
    Bpf::open(back_end, &options).unwrap()
}

/// What was counted: packets that no rule matches, and that rules leave to the host; and of this rule, those that were dropped for
/// want of a socket, and for their source.
fn counted(bpf: &Bpf, rule: Option<u32>) -> [u64; 4] {
    let by_cpu = bpf.totals.get(&0, 0).unwrap();
    let [unmatched, excepted] = [0, 1].map(|at| by_cpu.iter().map(|totals: &[u64; 2]| totals[at]).sum());
    let of_rule = rule.map(bpf.counters().unwrap()).unwrap_or_default();
    assert_eq!((of_rule.steered, of_rule.assign_error), (0, 0));
    [unmatched, excepted, of_rule.no_socket, of_rule.denied]
}

fn agrees(back_end: BackEnd) {
    in_new_namespace(move || {
        let directory = tempfile::tempdir().unwrap();
        let bpf = RefCell::new(open(back_end, &directory.path().join("bpf")));
        let generations = Cell::new(0);
        let cases = Config {
            cases: decisions() / FLOWS,
            failure_persistence: None,
            // They are counted over all cases, of which there may be any number.
            max_local_rejects: u32::MAX,
            ..Config::default()
        };
        let lists = || prop_oneof![Just(SourceLists::default()), source_lists()];
        let strategy = (rules(40), [lists(), lists(), lists()], prop::collection::vec(flow(), FLOWS as usize));
        TestRunner::new(cases)
            .run(&strategy, |(rules, lists, flows)| {
                let (rules, numbers) = numbered(&rules);
                let service = |(slot, (name, sources)): (u16, (&str, SourceLists))| ServiceSockets {
                    slot,
                    name: name.parse().unwrap(),
                    groups: [const { None }; 4],
                    sources: Arc::new(sources),
                };
                let services: Vec<_> = (1..).zip(SERVICES.into_iter().zip(lists)).map(service).collect();
                let generation = generations.get() + 1;
                generations.set(generation);
                let mut bpf = bpf.borrow_mut();
                let plan = Plan {
                    generation,
                    rules: rules.view(),
                    changed: None,
                    fresh: &[numbers],
                    freed: &[],
                    moved: &[],
                    services: &services,
                };
                bpf.apply(&plan).unwrap();
                for flow in &flows {
                    let Decided { fate, rule, generation: judged_by, .. } = bpf.decide(flow).unwrap();
                    let listed =
                        || rules.iter().map(|it| format!("{} {}", it.number, it.to_rule())).collect::<Vec<_>>();
                    prop_assert_eq!(
                        (fate, rule),
                        expected(&rules, &services, flow),
                        "{:?} under {:#?}",
                        flow,
                        listed()
                    );
                    prop_assert_eq!(judged_by, Some(generation));
                    let before = counted(&bpf, rule);
                    bpf.run(flow);
                    let more = counted(&bpf, rule).into_iter().zip(before).map(|(now, before)| now - before);
                    let counters = [Fate::Unmatched, Fate::Host, Fate::Drop, Fate::Deny];
                    prop_assert_eq!(
                        more.collect::<Vec<_>>(),
                        counters.map(|it| u64::from(it == fate)),
                        "{:?} under {:#?}",
                        flow,
                        listed()
                    );
                }
                Ok(())
            })
            .unwrap();
        Box::new(bpf.into_inner()).detach().unwrap();
    });
}

#[test]
fn sk_lookup_decides_as_the_reference() {
    agrees(BackEnd::SkLookup);
}

#[test]
fn tc_decides_as_the_reference() {
    agrees(BackEnd::Tc);
}

/// Which clients a service allows may change while no rule does, even under the same slot.
#[test]
fn lists_change_with_the_plan() {
    in_new_namespace(|| {
        let directory = tempfile::tempdir().unwrap();
        let mut bpf = open(BackEnd::SkLookup, &directory.path().join("bpf"));
        let mut rules = RuleSet::default();
        let rule = r#"{"prefix": "192.0.2.0/24", "service": "a"}"#;
        rules.insert(&serde_json::from_str::<RuleText>(rule).unwrap().into_rule(Origin::Added)).unwrap();
        let (rules, numbers) = numbered(&rules);
        let address = |text: &str| to_address(text.parse().unwrap());
        let (source, address) = (address("198.51.100.1"), address("192.0.2.1"));
        let flow = Flow { source, address, transport: Transport::Tcp, port: 80 };
        for (generation, denied, fate) in
            [(1, None, Fate::Drop), (2, Some("198.51.100.0/24"), Fate::Deny), (3, None, Fate::Drop)]
        {
            let denied = denied.map(|it| it.parse().unwrap()).into_iter().collect();
            let sources = Arc::new(SourceLists::new(Vec::new(), denied));
            let services =
                [ServiceSockets { slot: 1, name: "a".parse().unwrap(), groups: [const { None }; 4], sources }];
            let plan = Plan {
                generation,
                rules: rules.view(),
                changed: (generation > 1).then_some(&[]),
                fresh: if generation > 1 { &[] } else { std::slice::from_ref(&numbers) },
                freed: &[],
                moved: &[],
                services: &services,
            };
            bpf.apply(&plan).unwrap();
            assert_eq!(bpf.decide(&flow).unwrap().fate, fate, "generation {generation}");
        }
        Box::new(bpf).detach().unwrap();
    });
}
