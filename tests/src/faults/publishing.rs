//! A driver that publishes all the time, good sets and bad ones, while another client spoils the pointer now and then.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr},
};

use anyport::fleet::layout::Hash;
use serde_json::{Value, json};

use super::{
    CORE, EXTRA, HAND, POINTER,
    ledger::{Fault, Ledger, Span},
};
use crate::{
    backbone::Backbone,
    driver::{Driver, text},
    etcdctl::Etcdctl,
    host::Outcome,
    random::Random,
};

const BETWEEN: Span = (50, 800);
const SPOILT: Span = (100, 2_000);
/// Numbers after which the history is read, long before it loses any of them.
const READ_EVERY: u64 = 30;
/// Seconds that etcd is waited for.
const PATIENCE: u64 = 4;

/// What was published, and what became of it.
#[derive(Debug, Default)]
pub(super) struct Published {
    /// The sequences of those that were, by number.
    pub(super) done: BTreeMap<u64, u64>,
    /// Those of which it is not known, since etcd did not answer; with whether that was said.
    pub(super) unanswered: BTreeMap<u64, bool>,
    /// The numbers of sets by sequence, as etcd tells it.
    history: BTreeMap<u64, u64>,
    /// How often the pointer was another one meanwhile: by a change whose answer had been lost.
    pub(super) overtaken: u64,
    /// How often nonsense was not overwritten.
    pub(super) refused: u64,
    /// Sequences of pointers that nobody has published.
    pub(super) forged: BTreeSet<u64>,
    /// The prefixes of each set, by its hash.
    pub(super) prefixes: BTreeMap<String, Vec<String>>,
}

/// The driver, and the other client.
#[derive(Debug)]
pub(super) struct Publisher<'a> {
    driver: &'a Driver,
    client: Etcdctl,
    nodes: usize,
    random: Random,
    number: u64,
    /// At which number the history was read last.
    read_at: u64,
    pub(super) published: Published,
}

/// What became of an attempt.
#[derive(Debug, PartialEq)]
enum Attempt {
    Done,
    Unanswered,
    Overtaken,
    Refused,
}

impl<'a> Publisher<'a> {
    pub(super) fn new(driver: &'a Driver, client: Etcdctl, nodes: usize) -> Self {
        let (random, published) = (Random::new("publisher"), Published::default());
        Self { driver, client, nodes, random, number: 0, read_at: 0, published }
    }

    /// Publishes until the trouble is over, and what etcd has prevented from happening once has happened then. The pointer is
    /// readable, unless another client's change arrives late.
    pub(super) fn trouble(&mut self, ledger: &Ledger) {
        const ATTEMPTS: usize = 10;
        let _guard = ledger.guard();
        self.publish_until_over(ledger);
        for fault in [Fault::BadForOne, Fault::Compacted, Fault::Nonsense, Fault::NoSuchSet] {
            for _ in 0..ATTEMPTS {
                if !ledger.has_counted(fault) {
                    self.step(Some(fault), ledger);
                }
            }
        }
    }

    fn publish_until_over(&mut self, ledger: &Ledger) {
        use Fault::{BadForOne, Compacted, NoSuchSet, Nonsense};
        let mut steps = [None; 20];
        let faults = [BadForOne, BadForOne, Compacted, Compacted, Nonsense, NoSuchSet];
        steps.iter_mut().zip(faults).for_each(|(step, fault)| *step = Some(fault));
        loop {
            self.random.shuffle(&mut steps);
            for step in steps {
                if !ledger.wait(&mut self.random, BETWEEN) {
                    return;
                }
                self.step(step, ledger);
                if self.number - self.read_at > READ_EVERY {
                    self.read_history(ledger);
                }
            }
        }
    }

    fn step(&mut self, fault: Option<Fault>, ledger: &Ledger) {
        match fault {
            None => {
                self.publish_good(ledger);
            }
            Some(Fault::BadForOne) => {
                self.publish_bad(ledger);
            }
            Some(Fault::Compacted) => self.compact(ledger),
            Some(fault) => self.spoil(fault, ledger),
        }
    }

    /// Publishes a set that every node can take that has nothing against it by hand.
    pub(super) fn publish_good(&mut self, ledger: &Ledger) -> bool {
        let set = self.set();
        self.publish(set, ledger) == Attempt::Done
    }

    /// Publishes what holds an address of one node, which that one must refuse. Tells which, if it is published.
    pub(super) fn publish_bad(&mut self, ledger: &Ledger) -> Option<usize> {
        let (mut set, node) = (self.set(), self.random.below(self.nodes));
        set.push(Backbone::prefix_of(node));
        (self.publish(set, ledger) == Attempt::Done).then(|| {
            ledger.count(Fault::BadForOne);
            node
        })
    }

    /// The core, and some more. It may contradict what a node has by hand.
    fn set(&mut self) -> Vec<String> {
        let mut set: BTreeSet<String> = CORE.iter().map(|it| (*it).to_owned()).collect();
        for _ in 0..self.random.below(8) {
            let prefix = *self.random.pick(&EXTRA);
            let IpAddr::V4(address) = self.random.address(prefix) else { unreachable!("{prefix} is of IPv4") };
            let length = 27 + self.random.below(6);
            let network = address.to_bits() & (u32::MAX << (32 - length));
            set.insert(format!("{}/{length}", Ipv4Addr::from_bits(network)));
        }
        if self.random.below(6) == 0 {
            set.insert(HAND.to_owned());
        }
        set.into_iter().collect()
    }

    fn publish(&mut self, mut prefixes: Vec<String>, ledger: &Ledger) -> Attempt {
        self.number += 1;
        let number = self.number;
        // No two sets are the same.
        let mut set = format!("# {number}\n");
        for prefix in &prefixes {
            writeln!(set, "{prefix}").expect("a line");
        }
        prefixes.sort_unstable();
        self.published.prefixes.insert(Hash::of(&set).to_string(), prefixes);
        let file = self.driver.file("set", &set);
        let verb = format!("publish {file} --ring main --force --json --note p{number} --timeout {PATIENCE}s");
        let outcome = self.driver.run(&verb);
        let attempt = judge(&outcome).unwrap_or_else(|| {
            ledger.wrong(format_args!("publishing set {number}: {outcome}"));
            Attempt::Refused
        });
        match attempt {
            Attempt::Done => {
                let answer: Value = serde_json::from_str(&outcome.stdout).expect("JSON of anyportctl");
                self.published.done.insert(number, answer["sequence"].as_u64().expect("a sequence"));
            }
            Attempt::Unanswered => {
                self.published.unanswered.insert(number, outcome.stderr.contains("may have been made"));
            }
            Attempt::Overtaken => self.published.overtaken += 1,
            Attempt::Refused => self.published.refused += 1,
        }
        attempt
    }

    fn compact(&self, ledger: &Ledger) {
        let header = self.get(&["get", "--write-out=json", POINTER]);
        let revision = header.and_then(|it| it["header"]["revision"].as_u64());
        let done = revision.is_some_and(|it| self.etcdctl(&["compact", &it.to_string()]).status == 0);
        if done {
            ledger.count(Fault::Compacted);
        }
    }

    /// Writes what does not belong there over the pointer, and publishes again after a while.
    fn spoil(&mut self, fault: Fault, ledger: &Ledger) {
        let Some(mut pointer) = self.get(&["get", "--print-value-only", POINTER]) else { return };
        let value = if fault == Fault::NoSuchSet {
            let sequence = pointer["sequence"].as_u64().expect("a sequence") + 1;
            self.published.forged.insert(sequence);
            (pointer["sequence"], pointer["set"]) = (sequence.into(), json!(Hash::of("no such set").to_string()));
            pointer.to_string()
        } else {
            "nonsense".to_owned()
        };
        // Without an answer it may be there nevertheless.
        let is_there = self.etcdctl(&["put", "--", POINTER, &value]).status == 0;
        if is_there {
            ledger.count(fault);
        }
        ledger.wait(&mut self.random, SPOILT);
        let set = self.set();
        let attempt = self.publish(set, ledger);
        if fault == Fault::Nonsense {
            if is_there && attempt == Attempt::Done {
                ledger.wrong("nonsense in the pointer's place was overwritten unseen");
            }
            self.mend(ledger);
        }
    }

    /// Removes what can't be read, as the complaint about it says, and publishes. That takes a majority of the members, which is
    /// there at the latest when the trouble is over.
    pub(super) fn mend(&mut self, ledger: &Ledger) {
        const ATTEMPTS: usize = 30;
        for _ in 0..ATTEMPTS {
            if self.etcdctl(&["del", POINTER]).status == 0 && self.publish_good(ledger) {
                return;
            }
        }
        ledger.wrong(format_args!("etcd has not taken any of {ATTEMPTS} attempts to mend the pointer"));
    }

    /// The JSON that `etcdctl` gets, if it gets any.
    fn get(&self, arguments: &[&str]) -> Option<Value> {
        serde_json::from_str(&self.etcdctl(arguments).stdout).ok()
    }

    fn etcdctl(&self, arguments: &[&str]) -> Outcome {
        let limit = format!("--command-timeout={PATIENCE}s");
        self.client.run([&[limit.as_str()], arguments].concat())
    }

    /// Reads the history, which goes back 100 changes. It may grow, and does not change.
    fn read_history(&mut self, ledger: &Ledger) {
        let outcome = self.driver.run("history --ring main --json");
        let Ok(history) = serde_json::from_str::<Value>(&outcome.stdout) else { return };
        self.read_at = self.number;
        for entry in history.as_array().expect("records") {
            let number = text(&entry["note"]).trim_start_matches('p').parse().expect("the number of a set");
            let sequence = entry["sequence"].as_u64().expect("a sequence");
            let before = self.published.history.insert(sequence, number);
            if let Some(before) = before.filter(|it| *it != number) {
                ledger.wrong(format_args!("the sequence {sequence} was of set {before}, and is of set {number}"));
            }
        }
    }

    /// The history is one without gaps, in which every set is at most once, and each of which that was said.
    pub(super) fn check_history(&mut self, ledger: &Ledger) {
        self.read_history(ledger);
        let Published { done, forged, unanswered, history, .. } = &self.published;
        for ((first, before), (second, after)) in history.iter().zip(history.iter().skip(1)) {
            if before >= after {
                ledger.wrong(format_args!("set {after} came behind set {before}"));
            }
            if let Some(gap) = (first + 1..*second).find(|it| !forged.contains(it)) {
                ledger.wrong(format_args!("nothing has the sequence {gap}, between sets {before} and {after}"));
            }
        }
        for (number, sequence) in done.iter().filter(|(number, sequence)| history.get(sequence) != Some(number)) {
            ledger.wrong(format_args!("set {number} was published as {sequence}, and is not in the history"));
        }
        for number in history.values().filter(|it| unanswered.get(it) == Some(&false)) {
            ledger.wrong(format_args!("set {number} is in the history, and nobody was told that this may be"));
        }
    }
}

impl Published {
    /// How many sets are in the history though etcd did not answer.
    pub(super) fn came_true(&self) -> usize {
        self.history.values().filter(|it| self.unanswered.contains_key(it)).count()
    }
}

/// What became of an attempt to publish; nothing if that must not come of it.
fn judge(outcome: &Outcome) -> Option<Attempt> {
    let says = |what: &str| outcome.stderr.contains(what);
    match outcome.status {
        0 => Some(Attempt::Done),
        1 if says("was changed meanwhile") => Some(Attempt::Overtaken),
        1 if says("can't be read") && says("etcdctl del") => Some(Attempt::Refused),
        3 if says("does not answer") => Some(Attempt::Unanswered),
        _ => None,
    }
}
