//! What the loaded program counts and notes, packet by packet.

use std::{
    net::{Ipv4Addr, TcpListener},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyport_common::{
    flow::{Address, Flow, Transport},
    maps::BATCH_ENTRIES,
};

use tempfile::TempDir;

use super::{differential::open, in_new_namespace};
use crate::{
    rules::{Change, Origin, Prefix, PrefixRules, RuleSet, RuleText, ServiceName},
    steering::{BackEnd, Fate, GroupSocket, Holder, Plan, ServiceSockets, Steering as _, bpf::Bpf},
};

/// Enough that packets are batched.
const RULES: u32 = 100;

/// A program that steers 192.0.2.0 and the addresses behind it, each by a rule of its own.
struct Steered {
    bpf: Bpf,
    services: [ServiceSockets; 1],
    generation: u64,
    _directory: TempDir,
}

impl Steered {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let bound = listener.local_addr().unwrap();
        let group = GroupSocket { cookie: 0, bound, holder: Holder::Us(Arc::new(listener.into())) };
        let groups = [Some(group), None, None, None];
        let services =
            [ServiceSockets { slot: 1, name: ServiceName::default_service(), groups, sources: Arc::default() }];
        let bpf = open(BackEnd::SkLookup, &directory.path().join("bpf"));
        let mut steered = Self { bpf, services, generation: 0, _directory: directory };
        steered.apply(1, slice_of(&(1..RULES + 1)), &[]);
        steered
    }

    /// Rules with numbers from `first` on.
    fn apply(&mut self, first: u32, fresh: &[Range<u32>], moved: &[(u32, u32)]) {
        let rule = |number: u32| {
            let prefix = Prefix::from_bits(true, 0xc000_0200 + u128::from(number), 32);
            let mut rules = PrefixRules::default();
            rules.first_number = first + number;
            let text = serde_json::from_str::<RuleText>(&format!("{{\"prefix\": \"{prefix}\"}}")).unwrap();
            rules.insert(&text.into_rule(Origin::Added)).unwrap();
            (prefix, rules)
        };
        let mut rules = RuleSet::default();
        rules.apply(&Change { removed: Vec::new(), added: (0..RULES).map(rule).collect() });
        self.generation += 1;
        let plan = Plan {
            generation: self.generation,
            rules: rules.view(),
            changed: None,
            fresh,
            freed: &[],
            moved,
            services: &self.services,
        };
        self.bpf.apply(&plan).unwrap();
    }

    /// Runs the program on a packet for which the rule at this place decides.
    fn packet(&self, place: u32) {
        self.bpf.run(&flow(place));
    }

    /// What was counted for the rules with these numbers.
    fn counted(&self, numbers: Range<u32>) -> Vec<u64> {
        let counters = self.bpf.counters().unwrap();
        numbers.map(|number| counters(number).steered).collect()
    }
}

/// A flow for which the rule at this place decides.
fn flow(place: u32) -> Flow {
    Flow {
        source: Address::v4(0x7f00_0001),
        address: Address::v4(0xc000_0200 + place),
        transport: Transport::Tcp,
        port: 80,
    }
}

/// Runs with a program at work, and takes it out of the kernel.
fn with_program(test: impl FnOnce(&mut Steered) + Send + 'static) {
    in_new_namespace(|| {
        let mut steered = Steered::new();
        test(&mut steered);
        Box::new(steered.bpf).detach().unwrap();
    });
}

fn slice_of(range: &Range<u32>) -> &[Range<u32>] {
    std::slice::from_ref(range)
}

#[test]
fn drops_of_all_rules_are_added_up() {
    with_program(|steered| {
        steered.packet(0);
        assert_eq!(steered.bpf.dropped().unwrap(), Some(0));
        steered.services[0].groups = [const { None }; 4];
        steered.apply(1, &[], &[]);
        for place in [0, RULES - 1, RULES - 1] {
            steered.packet(place);
        }
        assert_eq!(steered.bpf.dropped().unwrap(), Some(3));
    });
}

#[test]
fn each_packet_is_counted_once() {
    with_program(|steered| {
        let mut expected = vec![0; RULES as usize];
        for packet in 0..5 * BATCH_ENTRIES {
            let place = packet * packet % RULES as usize;
            steered.packet(u32::try_from(place).unwrap());
            expected[place] += 1;
            assert_eq!(steered.counted(1..RULES + 1), expected, "after packet {packet}");
        }
    });
}

#[test]
fn what_is_batched_goes_on_with_the_rule_and_not_with_its_number() {
    with_program(|steered| {
        for packets in [1, 7, BATCH_ENTRIES as u64 + 3] {
            (0..packets).for_each(|_| steered.packet(4));
            // The rules have others' numbers now, the fifth one goes on under another.
            let all = 1..2 * RULES + 1;
            steered.apply(RULES + 1, slice_of(&(RULES + 1..all.end)), &[(5, RULES + 5)]);
            let mut expected = vec![0; RULES as usize];
            expected[4] = packets;
            assert_eq!(steered.counted(RULES + 1..all.end), expected);
            // And now all is new, with numbers of which a batch still holds packets.
            steered.apply(1, slice_of(&all), &[]);
            expected[4] = 0;
            assert_eq!(steered.counted(1..RULES + 1), expected);
            (0..BATCH_ENTRIES as u64 * 2).for_each(|_| steered.packet(9));
            expected[9] = BATCH_ENTRIES as u64 * 2;
            assert_eq!(steered.counted(1..RULES + 1), expected);
            steered.apply(1, slice_of(&all), &[]);
        }
    });
}

#[test]
fn readings_never_go_back_while_packets_come() {
    const PACKETS: u64 = 20_000;
    with_program(|steered| {
        let is_done = AtomicBool::new(false);
        thread::scope(|scope| {
            let senders = [0, 1].map(|place| {
                let steered = &*steered;
                scope.spawn(move || (0..PACKETS).for_each(|_| steered.packet(place)))
            });
            let reader = scope.spawn(|| {
                let mut before = vec![0; 2];
                while !is_done.load(Ordering::Relaxed) {
                    let now = steered.counted(1..3);
                    assert!(now.iter().zip(&before).all(|(now, before)| now >= before), "{now:?} after {before:?}");
                    before = now;
                }
            });
            for sender in senders {
                sender.join().unwrap();
            }
            is_done.store(true, Ordering::Relaxed);
            reader.join().unwrap();
        });
        assert_eq!(steered.counted(1..3), [PACKETS; 2]);
    });
}

/// Neither is an explanation counted as a packet, nor a packet taken for what is explained, nor one explanation for another.
#[test]
fn explanations_and_packets_do_not_meet() {
    const ROUNDS: u32 = 20_000;
    with_program(|steered| {
        let is_done = AtomicBool::new(false);
        let packets: u64 = thread::scope(|scope| {
            let explaining = [0, 1].map(|first| {
                let steered = &*steered;
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let place = (2 * round + first) % RULES;
                        let decided = steered.bpf.decide(&flow(place)).unwrap();
                        assert_eq!((decided.fate, decided.rule), (Fate::Steer, Some(1 + place)));
                    }
                })
            });
            let sender = scope.spawn(|| {
                let mut packets = 0;
                while !is_done.load(Ordering::Relaxed) {
                    steered.packet(RULES - 1);
                    packets += 1;
                }
                packets
            });
            for thread in explaining {
                thread.join().unwrap();
            }
            is_done.store(true, Ordering::Relaxed);
            sender.join().unwrap()
        });
        let mut expected = vec![0; RULES as usize];
        expected[RULES as usize - 1] = packets;
        assert_eq!(steered.counted(1..RULES + 1), expected);
    });
}
