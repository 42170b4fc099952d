//! Five daemons, each on a host of its own, in two rings.

use std::{fs, time::Duration};

use anyport_tests::{
    backbone::Backbone,
    daemon::{Daemon, Setup},
    etcd::Etcd,
    ground::scratch,
    host::wait_for,
    operator::Operator,
};
use libtest_mimic::Trial;

use crate::{
    cases::trial,
    control::contains,
    nodes::{does_not_steer, steers},
};

const RINGS: [&str; 5] = ["canary", "canary", "main", "main", "main"];

pub(super) fn trials() -> Vec<Trial> {
    vec![trial("fleet::five daemons in two rings", five)]
}

fn five() {
    let backbone = Backbone::new(RINGS.len());
    let hosts = &backbone.hosts;
    let etcd = Etcd::start(&[backbone.center()]);
    let operator = Operator::of(&backbone.router, &etcd);
    let files = scratch();
    let start = |(number, host)| {
        let config = files.path().join(format!("n{number}.toml"));
        let urls = etcd.urls();
        let text = format!("[fleet]\netcd = [\"{urls}\"]\nring = \"{}\"\nnode = \"n{number}\"\n", RINGS[number]);
        fs::write(&config, text).expect("a configuration");
        Setup::new(host, "sk-lookup").config(config).launch()
    };
    let daemons: Vec<Daemon> = hosts.iter().enumerate().map(start).collect();
    for (ring, nodes) in [("canary", 2), ("main", 3)] {
        wait_for("nodes that report", Duration::from_secs(30), || match operator.ring(ring)["summary"]["nodes"] {
            ref seen if *seen == nodes => Ok(()),
            ref seen => Err(format!("{ring}: {seen}")),
        });
    }
    let good = operator.file("good", "192.0.2.0/25\n");
    let out = operator.ok(&format!("rollout {good} --rings canary,main --gate 500ms --within 20s"));
    contains(&out, &["ring canary: all of 2 nodes", "ring main: all of 3 nodes have it in force", "ring main: passed"]);
    for host in hosts {
        steers(host, "192.0.2.3");
    }
    contains(&operator.ok("status"), &["2 nodes: 2 current", "3 nodes: 3 current", "sk-lookup"]);
    // It holds an address of the second host, which is not taken from it.
    let bad = operator.file("bad", "192.0.2.0/25\n192.0.2.128/25\n203.0.113.4/30\n");
    let complaint = operator.refused(&format!("rollout {bad} --rings canary,main --gate 20s --within 20s"), 1);
    contains(&complaint, &["the node n1 refuses it: ", "rolled back", "not touched: main"]);
    wait_for("rolled back nodes", Duration::from_secs(20), || match operator.ring("canary")["summary"]["current"] {
        ref current if *current == 2 => Ok(()),
        ref current => Err(current.to_string()),
    });
    assert_eq!((operator.sequence("canary"), operator.sequence("main")), (3, 1));
    for host in hosts {
        steers(host, "192.0.2.3");
        does_not_steer(host, "192.0.2.129");
    }
    drop(daemons);
}
