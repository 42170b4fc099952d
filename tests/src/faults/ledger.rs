//! What has gone wrong: on purpose, counted, and otherwise.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use crate::random::Random;

/// What goes wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A member of etcd is killed, and started again after a while.
    MemberKilled,
    /// The same, at once.
    MemberRestarted,
    /// One does nothing for a while, though its connections stay.
    MemberFrozen,
    /// One and the others hear nothing of each other for a while; clients reach all of them.
    MemberParted,
    /// etcd forgets all that was.
    Compacted,
    /// A node does not reach etcd for a while.
    CableCut,
    /// The process of a node that serves is killed; its keeper starts another one.
    ServerKilled,
    /// A copy of the program takes over.
    TakenOver,
    /// The process that serves does nothing for a while.
    ServerFrozen,
    /// The owner of a registered socket is killed.
    OwnerKilled,
    /// It ends by itself.
    OwnerEnded,
    /// A service and a rule are added to a node by hand, or removed again.
    ChangedByHand,
    /// A set is published that one node must not take.
    BadForOne,
    /// What is no pointer stands in the pointer's place.
    Nonsense,
    /// The pointer leads to a set that is not there.
    NoSuchSet,
    /// A node reports that it has seen far higher sequences, or refuses what nobody has published.
    ForgedClaim,
    /// One writes its own words, or nonsense, where another one's report stands.
    ReportOverwritten,
    /// One removes another one's report.
    ReportRemoved,
}

impl Fault {
    /// Each with what it is called.
    pub const ALL: [(Self, &str); 18] = [
        (Self::MemberKilled, "etcd member killed"),
        (Self::MemberRestarted, "etcd member restarted"),
        (Self::MemberFrozen, "etcd member frozen"),
        (Self::MemberParted, "etcd member parted from the others"),
        (Self::Compacted, "etcd compacted"),
        (Self::CableCut, "node cut off from etcd"),
        (Self::ServerKilled, "node's server killed"),
        (Self::TakenOver, "node's server taken over"),
        (Self::ServerFrozen, "node's server frozen"),
        (Self::OwnerKilled, "owner of a registered socket killed"),
        (Self::OwnerEnded, "owner of a registered socket ended"),
        (Self::ChangedByHand, "rules and services of a node changed by hand"),
        (Self::BadForOne, "set published that one node must refuse"),
        (Self::Nonsense, "pointer overwritten with nonsense"),
        (Self::NoSuchSet, "pointer overwritten with one to no set"),
        (Self::ForgedClaim, "claim of sequences that were never there"),
        (Self::ReportOverwritten, "report overwritten by another node"),
        (Self::ReportRemoved, "report removed by another node"),
    ];
}

/// How long something takes: milliseconds at least and at most.
pub(super) type Span = (usize, usize);

/// Shared by all who make trouble.
#[derive(Debug)]
pub(super) struct Ledger {
    end: Instant,
    /// A thread has panicked.
    is_broken: AtomicBool,
    counts: Mutex<BTreeMap<Fault, u64>>,
    wrong: Mutex<Vec<String>>,
}

impl Ledger {
    /// Of trouble that takes so long from now on.
    pub(super) fn new(time: Duration) -> Self {
        let (counts, wrong) = (Mutex::default(), Mutex::default());
        Self { end: Instant::now() + time, is_broken: AtomicBool::new(false), counts, wrong }
    }

    /// To be kept by every thread, so that the others end when it panics.
    pub(super) fn guard(&self) -> Guard<'_> {
        Guard(self)
    }

    pub(super) fn is_over(&self) -> bool {
        self.end <= Instant::now() || self.is_broken.load(Relaxed)
    }

    /// Waits for a random while, at most until the trouble is over. Says whether it goes on: then, too, while not everything
    /// has happened yet.
    pub(super) fn goes_on(&self, random: &mut Random, span: Span, has_all_happened: bool) -> bool {
        let is_time = self.wait(random, span);
        is_time || !(has_all_happened || self.is_broken.load(Relaxed))
    }

    /// Waits for a random while, at most until the trouble is over. Says whether it is not.
    pub(super) fn wait(&self, random: &mut Random, (least, most): Span) -> bool {
        const SLICE: Duration = Duration::from_millis(50);
        let millis = least + random.below(most - least);
        let until = Instant::now() + Duration::from_millis(millis.try_into().expect("milliseconds"));
        while Instant::now() < until && !self.is_over() {
            sleep(SLICE.min(until.saturating_duration_since(Instant::now())));
        }
        !self.is_over()
    }

    /// The same for one of two times, of which the second one is rare.
    pub(super) fn wait_mostly(&self, random: &mut Random, usual: Span, rare: Span) {
        let span = if random.below(8) == 0 { rare } else { usual };
        self.wait(random, span);
    }

    pub(super) fn count(&self, fault: Fault) {
        *self.counts.lock().expect("counts").entry(fault).or_default() += 1;
    }

    pub(super) fn has_counted(&self, fault: Fault) -> bool {
        self.counts.lock().expect("counts").contains_key(&fault)
    }

    /// Something that must not have happened.
    pub(super) fn wrong(&self, what: impl fmt::Display) {
        self.wrong.lock().expect("a list").push(what.to_string());
    }

    /// All that was counted, and all that was wrong.
    pub(super) fn close(self) -> (BTreeMap<Fault, u64>, Vec<String>) {
        (self.counts.into_inner().expect("counts"), self.wrong.into_inner().expect("a list"))
    }
}

/// Ends the trouble should its thread panic.
#[derive(Debug)]
pub(super) struct Guard<'a>(&'a Ledger);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.is_broken.store(true, Relaxed);
        }
    }
}
