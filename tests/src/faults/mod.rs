//! Faults at random in a fleet: in etcd's members, in nodes and their cables, in the sockets that others have registered there, and
//! in what administrators publish. Clients dial on every node all the while.

mod end;
mod hostile;
mod ledger;
mod members;
mod nodes;
mod publishing;
mod report;

use std::{
    panic::resume_unwind,
    path::PathBuf,
    sync::{Mutex, atomic::AtomicBool},
    thread::scope,
    time::Duration,
};

pub use self::{ledger::Fault, report::Report};
use self::{ledger::Ledger, nodes::Node, publishing::Publisher};
use crate::{
    backbone::Backbone,
    driver::Driver,
    etcd::Etcd,
    prerequisites::{program, public_copy, scratch},
    steady::{EndOfWork, Tally},
};

/// What every set has, so that every node steers it all the time.
const CORE: [&str; 2] = ["192.0.2.0/25", "2001:db8:0:a::/64"];
/// Out of which sets have more.
const EXTRA: [&str; 3] = ["192.0.2.128/26", "198.51.100.128/25", "203.0.113.128/25"];
/// What nodes steer to a registered socket of their own.
const OWNED: &str = "192.0.2.192/27";
/// What is steered by hand now and then.
const HAND: &str = "192.0.2.224/28";
/// Where etcd has the pointer.
const POINTER: &str = "/anyport/rings/main";
/// Of nodes, over and over.
const BACK_ENDS: [&str; 5] = ["sk-lookup", "tc", "tproxy", "sk-lookup", "sk-lookup"];
const MEMBERS: u8 = 3;

/// How much trouble there is to be.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// For how long faults go on.
    pub time: Duration,
    /// How many nodes.
    pub nodes: usize,
}

/// Makes trouble, ends it, and tells what has become of everything.
pub fn run(plan: &Plan) -> Report {
    let backbone = Backbone::new(plan.nodes);
    let etcd = Etcd::start(&backbone.members(MEMBERS));
    let (urls, client, files) = (etcd.urls(), etcd.client(), scratch());
    let driver = Driver::of(&backbone.router, &etcd);
    let start = |(number, host)| Node::start(host, number, BACK_ENDS[number % BACK_ENDS.len()], &urls, files.path());
    let nodes: Vec<Node> = backbone.hosts.iter().enumerate().map(start).collect();
    let versions: Vec<PathBuf> = ["anyportd-one", "anyportd-two"].iter().map(|name| files.path().join(name)).collect();
    for version in &versions {
        public_copy(&program("anyportd").unwrap_or_else(|missing| panic!("{missing}")), version);
    }

    let etcd = Mutex::new(etcd);
    let mut publisher = Publisher::new(&driver, client, plan.nodes);
    let before = Ledger::new(Duration::ZERO);
    assert!(publisher.publish_good(&before), "nothing can be published: {:?}", before.close());
    end::all_hold(&driver, &nodes, &publisher.published);

    let (ledger, is_over) = (Ledger::new(plan.time), AtomicBool::new(false));
    let (tallies, ends) = scope(|scope| {
        let dialling: Vec<_> = nodes.iter().map(|node| scope.spawn(|| node.dial_until(&is_over))).collect();
        let end_of_work = EndOfWork(&is_over);
        trouble(&backbone, &etcd, &nodes, &versions, &mut publisher, &ledger);
        let ends = end::settle(&etcd, &driver, &nodes, &mut publisher, &ledger);
        drop(end_of_work);
        let tallies = dialling.into_iter().map(|it| it.join().unwrap_or_else(|panic| resume_unwind(panic)));
        (tallies.collect::<Vec<Tally>>(), ends)
    });
    Report::new(ledger, &nodes, &tallies, &publisher.published, ends)
}

/// Makes trouble everywhere at once for as long as that is to last.
fn trouble(
    backbone: &Backbone,
    etcd: &Mutex<Etcd>,
    nodes: &[Node],
    versions: &[PathBuf],
    publisher: &mut Publisher<'_>,
    ledger: &Ledger,
) {
    let client = etcd.lock().expect("a cluster").client();
    scope(|scope| {
        for member in 0..MEMBERS.into() {
            scope.spawn(move || members::trouble(etcd, member, ledger));
        }
        for node in nodes {
            scope.spawn(|| node.trouble(versions, ledger));
            scope.spawn(|| nodes::trouble_cable(backbone, node.number, ledger));
        }
        scope.spawn(|| hostile::trouble(&client, nodes.len(), ledger));
        publisher.trouble(ledger);
    });
}
