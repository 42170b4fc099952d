//! Five daemons, each on a host of its own, in two rings.

use std::{fs, time::Duration};

use anyport_tests::{
    backbone::Backbone,
    daemon::{Daemon, Setup},
    driver::Driver,
    etcd::Etcd,
    host::wait_for,
    prerequisites::scratch,
};
use libtest_mimic::Trial;

use crate::{
    cases::trial,
    control::contains,
    nodes::{does_not_steer, steers},
};

const RINGS: [&str; 5] = ["canary", "canary", "main", "main", "main"];

pub(super) fn trials() -> Vec<Trial> {
    vec![
        trial("fleet::five daemons in two rings", five),
        trial("fleet::daemons follow the majority, whichever member is parted from it", majority),
    ]
}

fn five() {
    let backbone = Backbone::new(RINGS.len());
    let hosts = &backbone.hosts;
    let etcd = Etcd::start(&[backbone.center()]);
    let driver = Driver::of(&backbone.router, &etcd);
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
        wait_for("nodes that report", Duration::from_secs(30), || match driver.ring(ring)["summary"]["nodes"] {
            ref seen if *seen == nodes => Ok(()),
            ref seen => Err(format!("{ring}: {seen}")),
        });
    }
    let good = driver.file("good", "192.0.2.0/25\n");
    let out = driver.ok(&format!("rollout {good} --rings canary,main --gate 500ms --within 20s"));
    contains(&out, &["ring canary: all of 2 nodes", "ring main: all of 3 nodes have it active", "ring main: passed"]);
    for host in hosts {
        steers(host, "192.0.2.3");
    }
    contains(&driver.ok("status"), &["2 nodes: 2 current", "3 nodes: 3 current", "sk-lookup"]);
    // It holds an address of the second host, which is not taken from it.
    let bad = driver.file("bad", "192.0.2.0/25\n192.0.2.128/25\n203.0.113.4/30\n");
    let complaint = driver.refused(&format!("rollout {bad} --rings canary,main --gate 20s --within 20s"), 1);
    contains(&complaint, &["the node n1 refuses it: ", "rolled back", "not touched: main"]);
    wait_for("rolled back nodes", Duration::from_secs(20), || match driver.ring("canary")["summary"]["current"] {
        ref current if *current == 2 => Ok(()),
        ref current => Err(current.to_string()),
    });
    assert_eq!((driver.sequence("canary"), driver.sequence("main")), (3, 1));
    for host in hosts {
        steers(host, "192.0.2.3");
        does_not_steer(host, "192.0.2.129");
    }
    drop(daemons);
}

/// Nodes may have their watch and their lease at the member that hears nothing any more, and still answers.
fn majority() {
    const NODES: usize = 3;
    let backbone = Backbone::new(NODES);
    let etcd = Etcd::start(&backbone.members(3));
    let driver = Driver::of(&backbone.router, &etcd);
    let urls: Vec<String> = (0..3).map(|member| etcd.url(member)).collect();
    let files = scratch();
    let start = |(number, host)| {
        let config = files.path().join(format!("n{number}.toml"));
        let text = format!("[fleet]\netcd = {urls:?}\nring = \"main\"\nnode = \"n{number}\"\n");
        fs::write(&config, text).expect("a configuration");
        Setup::new(host, "sk-lookup").config(config).start()
    };
    let _daemons: Vec<Daemon> = backbone.hosts.iter().enumerate().map(start).collect();
    let publish = |prefix: &str| {
        let set = driver.file("set", &format!("{prefix}\n"));
        driver.ok(&format!("publish {set} --ring main --timeout 30s"));
        wait_for("nodes that are current", Duration::from_secs(20), || {
            let ring = driver.ring("main");
            if ring["summary"]["current"] == NODES { Ok(()) } else { Err(ring.to_string()) }
        });
    };
    publish("192.0.2.0/26");
    let leader = etcd.leader();
    for (parted, last) in [(leader, 64), ((leader + 1) % 3, 128)] {
        etcd.part(parted);
        publish(&format!("192.0.2.{last}/26"));
        for host in &backbone.hosts {
            steers(host, &format!("192.0.2.{}", last + 3));
        }
        etcd.rejoin(parted);
        etcd.wait_until_well();
    }
}
