//! Rollouts over nodes that follow their ring as real ones do, and take or refuse what comes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyport::{
    api::FleetView,
    fleet::{
        FleetBoard,
        etcd::Etcd as Client,
        layout::{Name, Time},
        report::{Health, Refused, Report},
        settings::ConnectionSettings,
        signing::NodeKey,
        watch::EtcdSource,
    },
    store::FleetState,
};
use anyport_tests::{driver::Driver, etcd::Etcd, host::wait_for, netns::Netns};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::{cases::trial, control::contains};

pub(super) fn trials() -> Vec<Trial> {
    vec![
        trial("fleet::a rollout goes from ring to ring", rollout),
        trial("fleet::a bad set stops at the canary ring", bad_set),
        trial("fleet::a rollout stops when nodes get unwell, go, or are too slow", unwell),
        trial("fleet::a rollout that is overtaken touches nothing more", overtaken),
    ]
}

/// Nodes refuse a set with this in it, and are degraded with that.
const BAD: &str = "203.0.113.66";
const HEAVY: &str = "203.0.113.77";
/// They never get done with this.
const SLOW: &str = "203.0.113.88";

/// A node that follows its ring, and has no rules. Gone when dropped.
pub(super) struct Node {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Node {
    pub(super) fn start(namespace: &Netns, etcd: &Etcd, ring: &str, node: &str) -> Self {
        let settings = ConnectionSettings { etcd: vec![etcd.urls()], ..ConnectionSettings::default() };
        Self::start_as(namespace, ring, node, settings)
    }

    pub(super) fn start_as(namespace: &Netns, ring: &str, node: &str, settings: ConnectionSettings) -> Self {
        let (ring, node): (Name, Name) = (ring.parse().expect("a name"), node.parse().expect("a name"));
        let ended = Arc::new(AtomicBool::new(false));
        let (namespace, until) = (namespace.clone(), Arc::clone(&ended));
        let thread = thread::spawn(move || {
            namespace.enter(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(follow(&settings, ring, node, &until));
            });
        });
        Self { ended, thread: Some(thread) }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.ended.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// What a ring's node has of etcd, with a key of its own.
pub(super) fn source(client: Client, ring: &Name) -> EtcdSource {
    let board = Arc::new(FleetBoard::new(FleetView::default(), &FleetState::default()));
    EtcdSource::new(client, ring.clone(), Arc::new(NodeKey::random().expect("a key")), board)
}

async fn follow(settings: &ConnectionSettings, ring: Name, node: Name, ended: &AtomicBool) {
    let client = Client::connect(&settings.read().expect("settings"), Duration::from_secs(5)).await.expect("etcd");
    let mut source = source(client, &ring);
    let mut report = Report {
        node,
        ring,
        sequence: 0,
        seen: 0,
        set: None,
        revision: 0,
        generation: 1,
        backend: "sk-lookup".into(),
        health: Health::Good,
        degraded: Vec::new(),
        version: "0.1.0".into(),
        refused: None,
        since: Time::now(),
        reported: Time::now(),
    };
    source.report(report.clone());
    while !ended.load(Relaxed) {
        let changed = tokio::time::timeout(Duration::from_millis(100), source.changed()).await;
        let Ok(Ok(Some(seen))) = changed else { continue };
        let (sequence, set) = (seen.value.sequence, seen.value.set);
        let text = source.set(&set).await.expect("a set");
        if text.contains(SLOW) {
            continue;
        }
        let is_bad = text.contains(BAD);
        let refused = Refused { sequence, set, error: "the host would be cut off".into() };
        report.refused = is_bad.then_some(refused);
        report.health = if text.contains(HEAVY) { Health::Degraded } else { Health::Good };
        report.degraded = if text.contains(HEAVY) { vec!["no room".into()] } else { Vec::new() };
        if !is_bad {
            (report.sequence, report.set, report.since) = (sequence, Some(set), Time::now());
        }
        (report.revision, report.seen) = (seen.revision, sequence);
        source.report(report.clone());
    }
}

struct Fleet {
    etcd: Etcd,
    driver: Driver,
    nodes: Vec<Node>,
    namespace: Netns,
}

/// Two nodes of canary and three of main, which have a first set.
fn fleet() -> Fleet {
    let namespace = Netns::new();
    let etcd = Etcd::alone(&namespace);
    let driver = Driver::of(&namespace, &etcd);
    let nodes = [("canary", "c1"), ("canary", "c2"), ("main", "m1"), ("main", "m2"), ("main", "m3")];
    let nodes = nodes.map(|(ring, node)| Node::start(&namespace, &etcd, ring, node)).into();
    let fleet = Fleet { etcd, driver, nodes, namespace };
    for ring in ["canary", "main"] {
        fleet.driver.ok(&format!("publish {} --ring {ring}", fleet.set("192.0.2.0/24")));
        fleet.wait_for(ring, "current", if ring == "main" { 3 } else { 2 });
    }
    fleet
}

impl Fleet {
    fn set(&self, prefix: &str) -> String {
        self.driver.file(prefix.split('/').next().unwrap_or_default(), &format!("{prefix}\n"))
    }

    /// Waits until so many nodes of a ring are in a state.
    fn wait_for(&self, ring: &str, state: &str, count: u64) -> Value {
        wait_for("nodes in that state", Duration::from_secs(10), || {
            let view = self.driver.ring(ring);
            if view["summary"][state] == count { Ok(view) } else { Err(format!("{count} {state}: {view}")) }
        })
    }

    /// Rolls a set out, which must stop; the complaint and the steps.
    fn stopped(&self, prefix: &str, options: &str) -> (String, Vec<Value>) {
        let set = self.set(prefix);
        let outcome = self.driver.run(&format!("rollout {set} --rings canary,main --json {options}"));
        assert_eq!(outcome.status, 1, "{outcome}");
        (outcome.stderr, outcome.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect())
    }

    /// The canary ring has its previous set again, and main was not touched.
    fn expect_as_before(&self, sequence: u64) {
        let back = self.wait_for("canary", "current", 2);
        assert_eq!(back["pointer"]["sequence"], sequence, "{back}");
        let main = self.driver.ring("main");
        assert_eq!(main["pointer"]["sequence"], 1, "{main}");
        assert_eq!(back["pointer"]["set"], main["pointer"]["set"]);
    }
}

fn rollout() {
    let fleet = fleet();
    let set = fleet.set("198.51.100.0/24");
    let text = fleet.driver.ok(&format!("rollout {set} --rings canary,main --gate 1s"));
    contains(
        &text,
        &["ring canary: all of 2 nodes", "ring canary: passed the gate", "ring main: all of 3", "ring main: passed"],
    );
    let view = fleet.wait_for("main", "current", 3);
    assert_eq!(view["nodes"][0]["report"]["set"], view["pointer"]["set"]);
    contains(&fleet.driver.ok("status"), &["ring main: sequence 2", "3 nodes: 3 current", "m1    current         2"]);
    // Without a file, the rings behind get what the first one has.
    fleet.driver.ok(&format!("publish {} --ring canary", fleet.set("192.0.2.0/24")));
    fleet.driver.ok("rollout --rings canary,main --gate 0s");
    assert_eq!(fleet.driver.sequence("main"), 3);
    contains(&fleet.driver.refused("rollout --rings canary,main,canary", 2), &["twice"]);
}

fn bad_set() {
    let mut fleet = fleet();
    let (complaint, steps) = fleet.stopped(BAD, "--gate 5s");
    contains(&complaint, &["stopped at the ring canary", "refuses it: the host would be cut off", "not touched: main"]);
    let step: Vec<&Value> = steps.iter().map(|it| &it["step"]).collect();
    assert_eq!(step, [&Value::Null, &Value::from("rolled-back")], "{steps:?}");
    fleet.expect_as_before(3);
    contains(
        &fleet.driver.ok("history --ring canary"),
        &["rolled back to 1, since the rollout has stopped: the node c"],
    );
    // Published without care, it is shown who refuses.
    fleet.driver.ok(&format!("publish {} --ring canary", fleet.set(BAD)));
    fleet.wait_for("canary", "refused", 2);
    contains(
        &fleet.driver.ok("status --ring canary"),
        &["2 refused", "c1 refuses sequence 4: the host would be cut off"],
    );
    contains(&fleet.driver.refused("promote --from canary --to main", 5), &["c1 refuses", "--force"]);
    // A node that ends is missed until it is forgotten.
    drop(fleet.nodes.remove(0));
    fleet.etcd.ctl("del /anyport/nodes/canary/c1");
    fleet.wait_for("canary", "missing", 1);
    contains(&fleet.driver.ok("status"), &["1 missing", "c1 does not report", "fleet forget c1"]);
    contains(&fleet.driver.refused("forget c2 --ring canary", 1), &["c2", "reports"]);
    fleet.driver.ok("forget c1 --ring canary");
    assert_eq!(fleet.driver.ring("canary")["summary"]["nodes"], 1);
}

fn unwell() {
    let mut fleet = fleet();
    let (complaint, _) = fleet.stopped(HEAVY, "--gate 5s");
    contains(&complaint, &["is degraded: no room", "rolled back"]);
    fleet.expect_as_before(3);
    let (complaint, _) = fleet.stopped(SLOW, "--within 1s");
    contains(&complaint, &["2 of 2 nodes do not have it within 1s: c1, c2"]);
    fleet.expect_as_before(5);
    let set = fleet.set("198.51.100.0/24");
    let driver = Driver::of(&fleet.namespace, &fleet.etcd);
    let running = thread::spawn(move || driver.run(&format!("rollout {set} --rings canary,main --gate 30s")));
    fleet.wait_for("canary", "current", 2);
    wait_for("sequence of the rollout", Duration::from_secs(10), || match fleet.driver.sequence("canary") {
        6 => Ok(()),
        other => Err(other.to_string()),
    });
    fleet.wait_for("canary", "current", 2);
    drop(fleet.nodes.remove(0));
    fleet.etcd.ctl("del /anyport/nodes/canary/c1");
    let outcome = running.join().expect("an outcome");
    assert_eq!(outcome.status, 1, "{outcome}");
    contains(&outcome.stderr, &["the node c1 does not report any more"]);
    assert_eq!(fleet.driver.sequence("canary"), 7);
}

fn overtaken() {
    let fleet = fleet();
    let set = fleet.set("198.51.100.0/24");
    let driver = Driver::of(&fleet.namespace, &fleet.etcd);
    let running = thread::spawn(move || driver.run(&format!("rollout {set} --rings canary,main --gate 30s")));
    wait_for("sequence of the rollout", Duration::from_secs(10), || match fleet.driver.sequence("canary") {
        2 => Ok(()),
        other => Err(other.to_string()),
    });
    fleet.driver.ok(&format!("publish {} --ring canary", fleet.set("203.0.113.0/24")));
    let outcome = running.join().expect("an outcome");
    assert_eq!(outcome.status, 1, "{outcome}");
    contains(&outcome.stderr, &["another client has changed the ring canary", "not touched: main"]);
    assert_eq!((fleet.driver.sequence("canary"), fleet.driver.sequence("main")), (3, 1));
}
