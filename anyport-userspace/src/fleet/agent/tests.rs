//! An agent with a source and a target that are made for it, in a time that passes at once.

use std::{
    collections::HashMap,
    future::pending,
    mem,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyhow::anyhow;
use tokio::{sync::Notify, task::JoinHandle, time::sleep};

use super::{Agent, Error, Identity, Source, Target};
use crate::{
    api::{FleetView, Problem, ProblemKind},
    back_end::BackEnd,
    fleet::{Condition, FleetBoard, LineEdits},
    fleet::{
        delta::Delta,
        layout::{Hash, Pointer, STEP, Seen, Time},
        report::{Health, Report},
        signing::{NodeKey, PublicKeys, SigningKey},
    },
    store::FleetState,
};

/// What is in etcd.
#[derive(Debug, Default)]
struct World {
    pointer: Option<Pointer>,
    /// What the pointer can't be read for.
    nonsense: Option<&'static str>,
    is_away: bool,
    /// Whether sets never come.
    is_slow: bool,
    /// The next wait for a change fails.
    is_watch_lost: bool,
    sets: HashMap<Hash, String>,
    revision: i64,
    fetched: u32,
    /// By the sets from and to which they lead.
    deltas: HashMap<(Hash, Hash), Delta>,
    derived: u32,
    reports: Vec<Report>,
}

#[derive(Clone, Debug, Default)]
struct Etcd(Arc<(Mutex<World>, Notify)>);

impl Etcd {
    fn world(&self) -> MutexGuard<'_, World> {
        self.0.0.lock().unwrap()
    }

    fn change<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        let mut world = self.world();
        world.revision += 1;
        let done = change(&mut world);
        self.0.1.notify_waiters();
        done
    }

    fn publish(&self, sequence: u64, text: &str) -> Pointer {
        self.change(|world| {
            let set = Hash::of(text);
            let from = world.pointer.as_ref().map(|it| it.set);
            world.sets.insert(set, text.to_owned());
            let ring = "main".parse().unwrap();
            let pointer = Pointer {
                ring,
                sequence,
                set,
                published: Time::now(),
                by: "a@b".into(),
                note: None,
                from,
                signature: None,
            };
            world.pointer = Some(pointer.clone());
            pointer
        })
    }
}

#[derive(Debug)]
struct Following {
    etcd: Etcd,
    told: i64,
}

impl Following {
    fn look(&mut self) -> Result<Option<Seen<Pointer>>, Error> {
        let world = self.etcd.world();
        if world.is_away {
            return Err(Error::Away(anyhow!("nobody is there")));
        }
        self.told = world.revision;
        match world.nonsense {
            Some(why) => Err(Error::Nonsense(anyhow!(why))),
            None => Ok(world.pointer.clone().map(|value| Seen { value, revision: world.revision })),
        }
    }
}

impl Source for Following {
    async fn pointer(&mut self) -> Result<Option<Seen<Pointer>>, Error> {
        self.look()
    }

    async fn changed(&mut self) -> Result<Option<Seen<Pointer>>, Error> {
        loop {
            let is_changed = {
                let mut world = self.etcd.world();
                if mem::take(&mut world.is_watch_lost) {
                    return Err(Error::Away(anyhow!("the watch was lost")));
                }
                world.is_away || world.revision != self.told
            };
            if is_changed {
                return self.look();
            }
            let etcd = self.etcd.clone();
            tokio::select! {
                () = etcd.0.1.notified() => {}
                () = sleep(Duration::from_millis(100)) => {}
            }
        }
    }

    async fn set(&mut self, hash: &Hash) -> Result<String, Error> {
        let (is_slow, is_away) = {
            let mut world = self.etcd.world();
            world.fetched += 1;
            (world.is_slow, world.is_away)
        };
        if is_slow {
            pending::<()>().await;
        }
        if is_away {
            return Err(Error::Away(anyhow!("nobody is there")));
        }
        let found = self.etcd.world().sets.get(hash).cloned();
        found.ok_or_else(|| Error::Nonsense(anyhow!("there is no set {hash}")))
    }

    async fn delta(&mut self, from: &Hash, to: &Hash) -> Result<Option<Delta>, Error> {
        let mut world = self.etcd.world();
        world.derived += 1;
        if world.is_away {
            return Err(Error::Away(anyhow!("nobody is there")));
        }
        Ok(world.deltas.get(&(*from, *to)).cloned())
    }

    fn report(&mut self, report: &Report) {
        self.etcd.world().reports.push(report.clone());
    }
}

/// A daemon that takes every set but those that start with the word `bad`, and fails at `later`.
#[derive(Debug, Default)]
struct Host {
    /// What was tried and what is active.
    tried: Vec<String>,
    text: Option<String>,
    /// The edits that came with the last one.
    edits: Option<LineEdits>,
    /// On its disk.
    state: FleetState,
    basis: u64,
    is_broken: bool,
    /// Whether the active rules are not those that were taken.
    is_spoilt: bool,
}

#[derive(Clone, Debug, Default)]
struct Daemon(Arc<Mutex<Host>>);

impl Daemon {
    fn host(&self) -> MutexGuard<'_, Host> {
        self.0.lock().unwrap()
    }
}

impl Target for Daemon {
    async fn take(&mut self, text: Arc<str>, edits: Option<LineEdits>, state: &FleetState) -> Result<(), Problem> {
        let mut host = self.host();
        host.edits = edits;
        host.tried.push(text.to_string());
        match text.split(' ').next() {
            Some("bad") => {
                return Err(Problem::new(ProblemKind::Conflict, "it contradicts a rule that was added by hand"));
            }
            Some("later") if host.is_broken => return Err(Problem::new(ProblemKind::Failed, "the disk is full")),
            _ => {}
        }
        (host.text, host.state) = (Some(text.to_string()), state.clone());
        Ok(())
    }

    async fn note(&mut self, state: &FleetState) -> anyhow::Result<()> {
        self.host().state = state.clone();
        Ok(())
    }

    async fn compare(&mut self, set: &Hash) -> Result<(), String> {
        let mut host = self.host();
        set.expect(host.text.as_deref().unwrap()).unwrap();
        if mem::take(&mut host.is_spoilt) { Err("1 rules are missing".into()) } else { Ok(()) }
    }

    async fn condition(&mut self) -> Condition {
        let basis = self.host().basis;
        Condition { back_end: BackEnd::Tc, generation: 7, degraded: Vec::new(), basis }
    }
}

/// A node, on a disk that outlives its agent.
struct Scene {
    etcd: Etcd,
    daemon: Daemon,
    board: Arc<FleetBoard>,
    keys: Option<PublicKeys>,
    agent: Option<JoinHandle<()>>,
}

impl Scene {
    fn new() -> Self {
        let board = Arc::new(FleetBoard::new(FleetView::default(), &FleetState::default()));
        Self { etcd: Etcd::default(), daemon: Daemon::default(), board, keys: None, agent: None }
    }

    /// Starts the agent, or another one after it.
    async fn start(&mut self) {
        self.stop();
        let state = self.daemon.host().state.clone();
        let view = FleetView { ring: "main".into(), ..FleetView::default() };
        self.board = Arc::new(FleetBoard::new(view, &state));
        let key = state.key.as_deref().and_then(NodeKey::kept).unwrap_or_else(|| NodeKey::random().unwrap());
        let key = Arc::new(key);
        let identity =
            Identity { ring: "main".parse().unwrap(), node: "n".parse().unwrap(), keys: self.keys.clone(), key };
        let source = Following { etcd: self.etcd.clone(), told: -1 };
        let agent = Agent::new(identity, source, self.daemon.clone(), Arc::clone(&self.board), state);
        self.agent = Some(tokio::spawn(async move { match agent.run().await {} }));
        self.soon().await;
    }

    fn stop(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.abort();
        }
    }

    async fn soon(&self) {
        sleep(Duration::from_secs(4)).await;
    }

    /// How many sets and deltas were asked for.
    fn fetches(&self) -> (u32, u32) {
        let world = self.etcd.world();
        (world.fetched, world.derived)
    }

    fn text(&self) -> Option<String> {
        self.daemon.host().text.clone()
    }

    fn tried(&self) -> usize {
        self.daemon.host().tried.len()
    }

    /// Why the pointer is not followed.
    fn refused(&self) -> Option<String> {
        self.board.view().refused.map(|it| it.error)
    }

    fn expect_refused(&self, why: &str, in_force: &str) {
        let refused = self.refused();
        assert!(refused.as_ref().is_some_and(|it| it.contains(why)), "{why}: {refused:?}");
        assert_eq!(self.text().as_deref(), Some(in_force));
        let degraded = self.board.degraded();
        assert!(degraded.iter().any(|it| it.contains(why)), "{degraded:?}");
    }

    fn report(&self) -> Report {
        self.etcd.world().reports.last().cloned().unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_published_is_in_force_and_reported() {
    let mut scene = Scene::new();
    scene.start().await;
    assert_eq!((scene.text(), scene.report().sequence), (None, 0));
    assert_eq!(scene.board.degraded(), [""; 0], "nothing was published yet");
    for sequence in 1..=3 {
        let pointer = scene.etcd.publish(sequence, &format!("set {sequence}"));
        scene.soon().await;
        assert_eq!(scene.text().unwrap(), format!("set {sequence}"));
        let report = scene.report();
        assert_eq!((report.sequence, report.set, report.generation), (sequence, Some(pointer.set), 7));
        assert_eq!((report.health, report.refused), (Health::Good, None));
        assert!(report.revision > 0);
        let view = scene.board.view();
        assert_eq!((view.sequence, view.set, view.connected), (sequence, Some(pointer.set.to_string()), true));
    }
    // Nothing is said twice.
    let reports = scene.etcd.world().reports.len();
    sleep(Duration::from_mins(20)).await;
    assert_eq!((scene.etcd.world().reports.len(), scene.tried()), (reports, 3));
}

#[tokio::test(start_paused = true)]
async fn a_set_is_made_out_of_the_one_before_where_that_is_possible() {
    let mut scene = Scene::new();
    let sets = ["a\nb\nc\n", "a\nx\nc\n", "a\nx\nc\nd\n", "z\n", "y\n"];
    let store = |from: &str, to: &str, delta| {
        scene.etcd.change(|world| world.deltas.insert((Hash::of(from), Hash::of(to)), delta));
    };
    store(sets[0], sets[1], Delta::between(sets[0], sets[1]));
    // It leads elsewhere; and one that makes no sense.
    store(sets[1], sets[2], Delta::between(sets[1], "a\n"));
    store(sets[2], sets[3], Delta::between("1\n2\n3\n4\n5\n6\n7\n", "7\n"));
    scene.start().await;
    let mut seen = Vec::new();
    for (sequence, set) in (1..).zip(sets) {
        scene.etcd.publish(sequence, set);
        scene.soon().await;
        assert_eq!(scene.text().as_deref(), Some(set));
        seen.push((scene.fetches(), scene.daemon.host().edits.take()));
    }
    let edits = LineEdits { removed: "b\n".into(), added: "x\n".into() };
    assert_eq!(seen, [((1, 0), None), ((1, 1), Some(edits)), ((2, 2), None), ((3, 3), None), ((4, 4), None)]);
    // Another agent does not know the text any more.
    scene.start().await;
    store_next(&scene, 6, sets[4], "w\n");
    scene.soon().await;
    assert_eq!(scene.text().as_deref(), Some("w\n"));
    assert_eq!(scene.fetches(), (5, 4));
    // What was refused is not what the next one is made out of.
    store_next(&scene, 7, "w\n", "bad \n");
    scene.soon().await;
    store_next(&scene, 8, "bad \n", "v\n");
    scene.soon().await;
    assert_eq!(scene.text().as_deref(), Some("v\n"));
    assert_eq!(scene.fetches(), (6, 5));
}

/// Publishes a set with what makes it out of another one.
fn store_next(scene: &Scene, sequence: u64, from: &str, to: &str) {
    let delta = Delta::between(from, to);
    scene.etcd.change(|world| world.deltas.insert((Hash::of(from), Hash::of(to)), delta));
    scene.etcd.publish(sequence, to);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_was_off_for_a_thousand_changes_takes_the_last_one() {
    let mut scene = Scene::new();
    scene.etcd.publish(1, "set 1");
    scene.start().await;
    scene.stop();
    for sequence in 2..=1001 {
        scene.etcd.publish(sequence, &format!("set {sequence}"));
    }
    scene.start().await;
    assert_eq!(scene.daemon.host().tried, ["set 1", "set 1001"]);
}

/// The set of before stays, at the next start too; and nothing is tried again before something has changed.
#[tokio::test(start_paused = true)]
async fn what_is_refused_stays_refused() {
    let mut scene = Scene::new();
    scene.etcd.publish(1, "good");
    scene.start().await;
    let bad = scene.etcd.publish(2, "bad set");
    scene.soon().await;
    scene.expect_refused("contradicts", "good");
    let report = scene.report();
    assert_eq!((report.sequence, report.health, report.seen()), (1, Health::Degraded, 2));
    assert_eq!(report.refused.unwrap().set, bad.set);
    sleep(Duration::from_mins(30)).await;
    assert_eq!(scene.tried(), 2);
    scene.daemon.host().basis += 1;
    scene.soon().await;
    assert_eq!((scene.tried(), scene.etcd.world().fetched), (3, 2), "the node has changed; the set is known");
    scene.expect_refused("contradicts", "good");
    scene.start().await;
    assert_eq!(scene.tried(), 4);
    scene.expect_refused("contradicts", "good");
    // A rollback to what is active.
    scene.etcd.publish(3, "good");
    scene.soon().await;
    assert_eq!((scene.refused(), scene.report().sequence, scene.report().health), (None, 3, Health::Good));
    assert_eq!(scene.board.degraded(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn what_may_pass_is_tried_again() {
    let mut scene = Scene::new();
    scene.daemon.host().is_broken = true;
    scene.etcd.publish(1, "good");
    scene.start().await;
    scene.etcd.publish(2, "later");
    sleep(Duration::from_hours(1)).await;
    scene.expect_refused("disk is full", "good");
    let tried = scene.tried();
    assert!((13..40).contains(&tried), "{tried} attempts within an hour");
    assert_eq!(scene.etcd.world().fetched, 2);
    scene.daemon.host().is_broken = false;
    sleep(Duration::from_mins(6)).await;
    assert_eq!((scene.text().as_deref(), scene.refused()), (Some("later"), None));
}

/// An older backup, or a writer who makes a mistake.
#[tokio::test(start_paused = true)]
async fn a_sequence_that_goes_backwards_is_refused() {
    let mut scene = Scene::new();
    scene.etcd.publish(5, "five");
    scene.start().await;
    scene.etcd.publish(3, "three");
    scene.soon().await;
    scene.expect_refused("behind 5", "five");
    scene.start().await;
    scene.expect_refused("behind 5", "five");
    scene.etcd.publish(5, "another five");
    scene.soon().await;
    scene.expect_refused("led to another set", "five");
    // Of a refused one it is known too that it was there.
    scene.etcd.publish(9, "bad nine");
    scene.soon().await;
    scene.expect_refused("contradicts", "five");
    scene.start().await;
    scene.etcd.publish(8, "eight");
    scene.soon().await;
    scene.expect_refused("behind 9", "five");
    assert_eq!(scene.report().seen(), 9, "by which publish finds the next one");
    scene.etcd.publish(10, "ten");
    scene.soon().await;
    assert_eq!((scene.text().as_deref(), scene.refused()), (Some("ten"), None));
}

/// Neither a step that no command makes nor a pointer to nothing has a say in which sequences come next.
#[tokio::test(start_paused = true)]
async fn a_ring_does_not_come_to_the_end_of_its_sequences() {
    let mut scene = Scene::new();
    scene.etcd.publish(5, "five");
    scene.start().await;
    for far in [6 + STEP, u64::MAX] {
        scene.etcd.publish(far, "far");
        scene.soon().await;
        scene.expect_refused("no command makes such steps", "five");
    }
    let lost = scene.etcd.publish(6, "lost");
    scene.etcd.change(|world| world.sets.remove(&lost.set));
    scene.soon().await;
    scene.expect_refused("there is no set", "five");
    assert_eq!((scene.board.view().seen, scene.daemon.host().state.seen), (5, 5));
    scene.etcd.publish(6, "six");
    scene.soon().await;
    assert_eq!((scene.text().as_deref(), scene.refused()), (Some("six"), None));
    scene.etcd.publish(6 + STEP, "the farthest");
    scene.soon().await;
    assert_eq!((scene.text().as_deref(), scene.refused()), (Some("the farthest"), None));
}

#[tokio::test(start_paused = true)]
async fn what_is_in_force_is_compared_and_made_right() {
    let mut scene = Scene::new();
    scene.etcd.publish(1, "one");
    scene.start().await;
    let key = scene.daemon.host().state.key.clone();
    sleep(Duration::from_hours(2)).await;
    assert_eq!(scene.tried(), 1);
    scene.daemon.host().is_spoilt = true;
    sleep(Duration::from_hours(1)).await;
    assert_eq!((scene.tried(), scene.daemon.host().is_spoilt, scene.refused()), (2, false, None));
    scene.start().await;
    assert!(key.is_some() && scene.daemon.host().state.key == key, "its reports are signed by one key");
}

#[tokio::test(start_paused = true)]
async fn a_wiped_etcd_changes_nothing() {
    let mut scene = Scene::new();
    let pointer = scene.etcd.publish(4, "four");
    scene.start().await;
    scene.etcd.change(|world| (world.pointer, world.sets) = (None, HashMap::new()));
    scene.soon().await;
    let expect_kept = |scene: &Scene| {
        assert_eq!((scene.text().as_deref(), scene.report().sequence), (Some("four"), 4));
        let degraded = scene.board.degraded();
        assert!(scene.board.view().missing && degraded[0].contains("no pointer"), "{degraded:?}");
    };
    expect_kept(&scene);
    scene.start().await;
    expect_kept(&scene);
    scene.etcd.publish(1, "begun anew");
    scene.soon().await;
    scene.expect_refused("behind 4", "four");
    scene.etcd.change(|world| world.pointer = Some(pointer));
    scene.soon().await;
    assert_eq!((scene.board.degraded(), scene.tried()), (Vec::new(), 1), "restored, and in force all the time");
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_an_etcd_that_is_away() {
    let mut scene = Scene::new();
    scene.etcd.publish(1, "one");
    scene.start().await;
    scene.etcd.change(|world| world.is_away = true);
    scene.soon().await;
    assert!(!scene.board.view().connected && scene.board.view().error.unwrap().contains("nobody is there"));
    // Restarted meanwhile.
    scene.start().await;
    assert_eq!(scene.board.view().sequence, 1);
    scene.etcd.publish(2, "two");
    sleep(Duration::from_mins(10)).await;
    assert_eq!(scene.text().as_deref(), Some("one"));
    scene.etcd.change(|world| world.is_away = false);
    sleep(Duration::from_secs(16)).await;
    assert_eq!((scene.text().as_deref(), scene.board.view().connected), (Some("two"), true));
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_set_that_never_comes() {
    let mut scene = Scene::new();
    scene.etcd.publish(1, "one");
    scene.start().await;
    scene.etcd.world().is_slow = true;
    scene.etcd.publish(2, "two");
    sleep(Duration::from_mins(7)).await;
    assert_eq!(scene.text().as_deref(), Some("one"));
    assert!(scene.board.view().connected, "the pointer was read anew");
    assert!(scene.etcd.world().fetched > 2);
    scene.etcd.world().is_slow = false;
    sleep(Duration::from_mins(6)).await;
    assert_eq!(scene.text().as_deref(), Some("two"));
}

/// Compaction, or a member that has gone.
#[tokio::test(start_paused = true)]
async fn a_lost_watch_misses_nothing() {
    let mut scene = Scene::new();
    scene.start().await;
    for sequence in 1..=5 {
        scene.etcd.world().is_watch_lost = true;
        scene.etcd.publish(sequence, &format!("set {sequence}"));
        scene.soon().await;
        assert_eq!(scene.text().unwrap(), format!("set {sequence}"));
    }
}

#[tokio::test(start_paused = true)]
async fn nonsense_changes_nothing() {
    let mut scene = Scene::new();
    scene.etcd.publish(1, "one");
    scene.start().await;
    scene.etcd.change(|world| world.nonsense = Some("it is no JSON"));
    scene.soon().await;
    scene.expect_refused("it is no JSON", "one");
    assert_eq!((scene.board.view().refused.unwrap().sequence, scene.report().health), (None, Health::Degraded));
    assert!(scene.report().degraded[0].contains("it is no JSON"));
    scene.etcd.change(|world| world.nonsense = None);
    sleep(Duration::from_secs(14)).await;
    assert_eq!((scene.refused(), scene.report().health), (None, Health::Good));
    // A set that is another one than the pointer says, and one that is not there.
    let spoilt = scene.etcd.publish(2, "two");
    scene.etcd.change(|world| world.sets.insert(spoilt.set, "other".into()));
    scene.soon().await;
    scene.expect_refused("is another one", "one");
    scene.etcd.change(|world| world.sets.remove(&spoilt.set));
    sleep(Duration::from_mins(1)).await;
    scene.expect_refused("there is no set", "one");
    scene.etcd.world().sets.insert(spoilt.set, "two".into());
    sleep(Duration::from_mins(6)).await;
    assert_eq!((scene.text().as_deref(), scene.refused()), (Some("two"), None), "published once more");
}

#[tokio::test(start_paused = true)]
async fn only_what_is_signed_is_followed_where_a_key_is_configured() {
    const PRIVATE: &[u8] = b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIGXwCDFJ7GWDWegzPm3ZnVF7aWyREplJA5wiRASP673p\n-----END PRIVATE KEY-----\n";
    const PUBLIC: &[u8] = b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAl92CCUZLyOPqSDCRrwl6OcRyfCPtW0s0Rfuaa3g6zGw=\n-----END PUBLIC KEY-----\n";
    let mut scene = Scene::new();
    scene.keys = Some(PublicKeys::from_pem(PUBLIC).unwrap());
    let key = SigningKey::from_pem(PRIVATE).unwrap();
    let sign = |pointer: &Pointer| Pointer {
        signature: Some(key.sign(&pointer.ring, pointer.sequence, &pointer.set)),
        ..pointer.clone()
    };
    let one = sign(&scene.etcd.publish(1, "one"));
    scene.etcd.change(|world| world.pointer = Some(one.clone()));
    scene.start().await;
    assert_eq!(scene.text().as_deref(), Some("one"));
    // What is not trusted has no say in which sequence comes next.
    scene.etcd.publish(u64::MAX, "forged");
    scene.soon().await;
    scene.expect_refused("has no signature", "one");
    let foreign = Pointer { ring: "canary".parse().unwrap(), sequence: 2, ..one.clone() };
    scene.etcd.change(|world| world.pointer = Some(sign(&foreign)));
    scene.soon().await;
    scene.expect_refused("the ring canary", "one");
    let two = scene.etcd.publish(2, "two");
    scene.etcd.change(|world| world.pointer = Some(Pointer { signature: one.signature, ..two.clone() }));
    scene.soon().await;
    scene.expect_refused("not by a key", "one");
    scene.etcd.change(|world| world.pointer = Some(sign(&two)));
    scene.soon().await;
    assert_eq!((scene.text().as_deref(), scene.refused()), (Some("two"), None));
}
