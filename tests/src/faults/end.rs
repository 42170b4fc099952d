//! What nodes have and say when the trouble is over.

use std::{
    sync::Mutex,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    ledger::Ledger,
    nodes::Node,
    publishing::{Published, Publisher},
};
use crate::{driver::Driver, etcd::Etcd};

/// Within which nodes have to stand where they should when all is well again: a lost connection is noticed within 20 seconds, and
/// connected again within 15. Four times as long as on a machine that does nothing else.
const LIMIT: Duration = Duration::from_mins(2);

/// Where a node stands.
#[derive(Clone, Debug)]
pub(super) enum Standing {
    /// The pointer's set is active.
    Holds,
    /// It does not take it, for this reason.
    Refuses(String),
    /// Neither: what it says, and what its report says.
    Elsewhere(String),
}

/// Where all nodes stand after the trouble, and how long that has taken.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) sequence: u64,
    pub(super) standings: Vec<Standing>,
    pub(super) time: Duration,
}

/// Waits until all nodes have what was published first.
pub(super) fn all_hold(driver: &Driver, nodes: &[Node], published: &Published) {
    let Settled { standings, .. } = wait_until_settled(driver, nodes, published);
    let hold = standings.iter().all(|it| matches!(it, Standing::Holds));
    assert!(hold, "not all nodes take the first set: {standings:?}");
}

/// Waits until all nodes have settled with the pointer as the trouble has left it, then with a set that one of them must not
/// take, and then with one that all can.
pub(super) fn settle(
    etcd: &Mutex<Etcd>,
    driver: &Driver,
    nodes: &[Node],
    publisher: &mut Publisher<'_>,
    ledger: &Ledger,
) -> [Settled; 3] {
    etcd.lock().expect("a cluster").wait_until_well();
    // A change that was given up may have arrived late.
    if pointer(driver).is_none() {
        publisher.mend(ledger);
    }
    let left = wait_until_settled(driver, nodes, &publisher.published);
    let bad_for = publisher.publish_bad(ledger);
    let bad = wait_until_settled(driver, nodes, &publisher.published);
    let is_good = publisher.publish_good(ledger);
    let good = wait_until_settled(driver, nodes, &publisher.published);
    if bad_for.is_none() || !is_good {
        ledger.wrong("nothing can be published after the trouble");
    }
    for settled in [&left, &bad, &good] {
        for (node, standing) in nodes.iter().zip(&settled.standings) {
            if let Standing::Elsewhere(what) = standing {
                let (Settled { sequence, time, .. }, number) = (settled, node.number);
                ledger
                    .wrong(format_args!("n{number} has not settled with the sequence {sequence} in {time:?}: {what}"));
            }
        }
    }
    for (settled, refusing) in [(&bad, bad_for), (&good, None)] {
        for (number, standing) in settled.standings.iter().enumerate() {
            let is_refused = matches!(standing, Standing::Refuses(why) if why.contains("refused for safety"));
            if is_refused != (refusing == Some(number)) {
                let sequence = settled.sequence;
                ledger.wrong(format_args!(
                    "sequence {sequence} is for {refusing:?} to refuse, but n{number}: {standing:?}"
                ));
            }
        }
    }
    publisher.check_history(ledger);
    [left, bad, good]
}

fn pointer(driver: &Driver) -> Option<Value> {
    let outcome = driver.run("status --ring main --json");
    let ring = serde_json::from_str::<Value>(&outcome.stdout).ok()?;
    ring[0]["pointer"]["sequence"].is_u64().then(|| ring[0].clone())
}

fn wait_until_settled(driver: &Driver, nodes: &[Node], published: &Published) -> Settled {
    const PAUSE: Duration = Duration::from_millis(100);
    let start = Instant::now();
    loop {
        // As an administrator sees it.
        let ring = pointer(driver).unwrap_or_default();
        let standings: Vec<Standing> = nodes.iter().map(|node| standing(node, &ring, published)).collect();
        let time = start.elapsed();
        if time > LIMIT || !standings.iter().any(|it| matches!(it, Standing::Elsewhere(_))) {
            return Settled { sequence: ring["pointer"]["sequence"].as_u64().unwrap_or_default(), standings, time };
        }
        sleep(PAUSE);
    }
}

/// Where a node stands by its own word, by its report and by its rules.
fn standing(node: &Node, ring: &Value, published: &Published) -> Standing {
    let pointer = &ring["pointer"];
    let name = format!("n{}", node.number);
    let report = ring["nodes"].as_array().and_then(|all| all.iter().find(|it| it["node"] == *name));
    let report = report.map_or(Value::Null, |it| it["report"].clone());
    let view = node.view();
    let has =
        |it: &Value| it["refused"].is_null() && it["sequence"] == pointer["sequence"] && it["set"] == pointer["set"];
    let refuses = |it: &Value| {
        let refused = &it["refused"];
        refused["sequence"] == pointer["sequence"] && refused["set"] == pointer["set"] && refused["error"] != ""
    };
    let elsewhere = || Standing::Elsewhere(format!("pointer {pointer}; status {view}; report {report}"));
    if pointer.is_null() || view["connected"] != true {
        return elsewhere();
    }
    if has(&view) && has(&report) {
        let set = pointer["set"].as_str().unwrap_or_default();
        let rules = node.fleet_prefixes();
        return match published.prefixes.get(set) {
            Some(prefixes) if *prefixes == rules => Standing::Holds,
            other => {
                Standing::Elsewhere(format!("it says that it has {set}, which is {other:?}, and steers {rules:?}"))
            }
        };
    }
    if refuses(&view) && refuses(&report) {
        return Standing::Refuses(view["refused"]["error"].as_str().unwrap_or_default().to_owned());
    }
    elsewhere()
}
