//! Clients with a node's rights in etcd, or that make trouble there, harm no other node; and a node that can't report says so.

use std::{
    fs,
    os::unix::fs::chown,
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use anyport::fleet::{
    etcd::Swapped,
    layout::{Name, Pointer, Time},
    pack::Packed,
};
use anyport_tests::{
    backbone::Backbone,
    daemon::{Daemon, Setup},
    driver::{Driver, put_report, report, text},
    etcd::Etcd,
    exposition::Scrape,
    host::{Outcome, wait_for},
    netns::Netns,
    prerequisites::{GROUP, USER, scratch},
};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rcgen::{KeyPair, PKCS_ED25519};
use serde_json::{Value, json};

use super::{
    clusters::with_client,
    nodes::{Node, source},
};
use crate::{
    cases::trial,
    control::contains,
    nodes::{does_not_steer, steers},
};

const LIMIT: Duration = Duration::from_secs(20);

pub(super) fn trials() -> Vec<Trial> {
    vec![
        trial("fleet::reports are by their nodes", forged),
        trial("fleet::large and many records hide nothing", bounded),
        trial("fleet::what etcd names is not signed unseen", laundered),
        trial("fleet::what others have written is no obstacle", obstacles),
        trial("fleet::of a storm of pointers the last one counts", storm),
        trial("fleet::a node that can't report says so", mute),
        trial("fleet::two nodes of one name are told", twins),
        trial("fleet::the way back from a sequence that is too high", way_back),
        trial("fleet::rings are shown, watched, measured and removed", rings),
        trial("fleet::a rollout that is interrupted says what is where", interrupted),
    ]
}

fn alone() -> (Netns, Etcd, Driver) {
    let namespace = Netns::new();
    let etcd = Etcd::alone(&namespace);
    let driver = Driver::of(&namespace, &etcd);
    (namespace, etcd, driver)
}

fn wait_for_ring(driver: &Driver, ring: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    wait_for(what, LIMIT, || {
        let view = driver.ring(ring);
        if is_so(&view) { Ok(view) } else { Err(view.to_string()) }
    })
}

fn forged() {
    let (namespace, etcd, driver) = alone();
    let _nodes = ["n1", "n2"].map(|node| Node::start(&namespace, &etcd, "main", node));
    let set = driver.file("set", "192.0.2.0/24\n");
    driver.ok(&format!("publish {set} --ring main"));
    wait_for_ring(&driver, "main", "current nodes", |it| it["summary"]["current"] == 2);
    let members: Vec<Value> = ["n1", "n2"].map(|node| etcd.record(&format!("/anyport/members/main/{node}"))).into();
    assert!(members.iter().all(|it| it["key"].as_str().is_some_and(|key| key.len() == 64)), "{members:?}");
    // What another one writes in its place, with a terminal's orders in it, is not taken for its word.
    let mut forged = etcd.record("/anyport/nodes/main/n1");
    (forged["seen"], forged["backend"]) = ((u64::MAX - 1).into(), json!("\u{1b}[2Jowned\nn3 current"));
    for record in [forged.to_string(), etcd.record("/anyport/nodes/main/n2").to_string(), "nonsense".into()] {
        etcd.put("/anyport/nodes/main/n1", &record);
        let view = driver.ring("main");
        assert_eq!((&view["summary"]["current"], &view["summary"]["missing"]), (&json!(1), &json!(1)), "{view}");
        assert_eq!(view["skipped"][0]["key"], "/anyport/nodes/main/n1", "{view}");
        let shown = driver.ok("status");
        contains(&shown, &["n1 does not report", "left out: /anyport/nodes/main/n1: "]);
        assert!(!shown.contains('\u{1b}') && !shown.contains("owned"), "{shown}");
        contains(&driver.refused("promote --from main --to other", 5), &["/anyport/nodes/main/n1"]);
        // The node writes it again, though nothing has changed.
        wait_for_ring(&driver, "main", "reports of both", |it| it["summary"]["current"] == 2);
    }
    etcd.ctl("del /anyport/nodes/main/n2");
    wait_for_ring(&driver, "main", "report that was removed", |it| it["summary"]["current"] == 2);
    // Words of a node stay on their line.
    let pointer = etcd.record("/anyport/rings/main");
    let mut word = report("n9", &pointer);
    (word["backend"], word["health"], word["degraded"]) =
        (json!("\u{1b}[31mred\nn8"), json!("degraded"), json!([format!("a\nb{}", "x".repeat(5_000))]));
    put_report(&etcd, &word);
    let shown = driver.ok("status");
    contains(&shown, &["\\u001b[31mred\\nn8", "n9 degraded: a\\nbxxx", "more bytes"]);
    assert!(!shown.contains('\u{1b}') && shown.lines().all(|line| line.len() < 1_500), "{shown}");
    // A place that another client has taken for good.
    driver.refused("forget n9 --ring main", 1);
    driver.ok("forget n9 --ring main --force");
    assert!(etcd.keys("/anyport").iter().all(|key| !key.ends_with("/n9")));
}

fn bounded() {
    let (namespace, etcd, driver) = alone();
    let _node = Node::start(&namespace, &etcd, "main", "n1");
    let set = driver.file("set", "192.0.2.0/24\n");
    driver.ok(&format!("publish {set} --ring main"));
    wait_for_ring(&driver, "main", "current node", |it| it["summary"]["current"] == 1);
    // 84 MB in all: more than one answer may have.
    let script = "head -c 1400000 /dev/zero | tr '\\0' x >large; for i in $(seq 60); do \
                  etcdctl --endpoints=$0 put /anyport/nodes/main/large$i <large >/dev/null || exit 1; done";
    let work = scratch();
    let script = format!("cd {} && export ETCDCTL_API=3 && {script}", work.path().display());
    namespace.run("sh", ["-c", &script, &etcd.urls()]);
    let view = driver.ring("main");
    let skipped = view["skipped"].as_array().expect("records");
    assert_eq!((&view["summary"]["current"], skipped.len() >= 40), (&json!(1), true), "{view}");
    assert!(view.to_string().len() < 40_000, "{} bytes", view.to_string().len());
    contains(&view["skipped"].to_string(), &["large1", "bytes"]);
    contains(&driver.ok("status"), &["n1 ", "left out: ", " more"]);
    let other = driver.file("other", "198.51.100.0/24\n");
    driver.ok(&format!("publish {other} --ring main"));
    wait_for_ring(&driver, "main", "node that is current again", |it| it["summary"]["current"] == 1);
    // A pointer of more than a megabyte fills neither a terminal nor a log.
    let script = format!("etcdctl --endpoints=$0 put /anyport/rings/main <{}/large >/dev/null", work.path().display());
    namespace.run("sh", ["-c", &format!("export ETCDCTL_API=3; {script}"), &etcd.urls()]);
    let complaint = driver.refused(&format!("publish {set} --ring main"), 1);
    assert!(complaint.contains("can't be read") && complaint.len() < 3_000, "{} bytes", complaint.len());
}

fn three_sets(driver: &Driver) -> [String; 3] {
    let sets = [("a", "192.0.2.0/24\n"), ("b", "192.0.2.0/25\n"), ("c", "192.0.2.128/25\n")];
    sets.map(|(name, text)| driver.file(name, text))
}

/// A client that may write to etcd, and has no key, can't have an operator sign what it has put there.
fn laundered() {
    let (_namespace, etcd, driver) = alone();
    let new_key = || KeyPair::generate_for(&PKCS_ED25519).expect("a key");
    let (pair, former) = (new_key(), new_key());
    let key = driver.file("key", &pair.serialize_pem());
    let former_key = driver.file("former", &former.serialize_pem());
    let former_public = driver.file("former.pub", &former.public_key_pem());
    let sets = three_sets(&driver);
    driver.ok(&format!("publish {} --ring main --signing-key {key}", sets[0]));
    driver.ok(&format!("publish {} --ring main --signing-key {key}", sets[1]));
    // A set of the attacker, under a name that it has in the history and in the pointer.
    let evil = driver.file("evil", "203.0.113.0/24\n");
    let evil = text(&driver.json(&format!("publish {evil} --ring evil"))["set"]).to_owned();
    for key in ["rings/main", "history/main/00000000000000000001"] {
        let mut record = etcd.record(&format!("/anyport/{key}"));
        record["set"] = evil.clone().into();
        etcd.put(&format!("/anyport/{key}"), &record.to_string());
    }
    for verb in
        ["rollback --ring main --to 1", "promote --from main --to other", "rollout --rings main,other --gate 0s"]
    {
        let outcome = driver.run(&format!("{verb} --signing-key {key}"));
        assert_eq!(outcome.status, 5, "{verb}: {outcome}");
    }
    contains(
        &driver.refused(&format!("rollback --ring main --to 1 --signing-key {key}"), 5),
        &["would be signed because etcd names it", "not by a key", "--former-keys"],
    );
    // What an operator gives is signed, whatever stands there.
    driver.ok(&format!("publish {} --ring main --signing-key {key} --force", sets[2]));
    assert_eq!(driver.sequence("main"), 3);
    // Keys are replaced.
    driver.ok(&format!("publish {} --ring keys --signing-key {former_key}", sets[0]));
    driver.ok(&format!("publish {} --ring keys --signing-key {key}", sets[1]));
    driver.refused(&format!("rollback --ring keys --signing-key {key}"), 5);
    driver.ok(&format!("rollback --ring keys --signing-key {key} --former-keys {former_public}"));
}

/// Records that a client of etcd has put where the commands look.
fn obstacles() {
    let (namespace, etcd, driver) = alone();
    let _node = daemon(&namespace, &etcd, &driver, "n1", "").start();
    let sets = three_sets(&driver);
    let hash = text(&driver.json(&format!("publish {} --ring main", sets[0]))["set"]).to_owned();
    // A key below the set that is no chunk of it.
    for junk in ["/0", "/0000x", "/junk", "/zzzz"] {
        etcd.put(&format!("/anyport/sets/{hash}{junk}"), "junk");
    }
    assert_eq!(driver.json(&format!("publish {} --ring main", sets[0]))["stored_again"], false);
    // A history that others have filled, with sequences that were never there.
    let pointer = etcd.record("/anyport/rings/main");
    for sequence in 900_000_000..900_000_120_u64 {
        let mut record = pointer.clone();
        record["sequence"] = sequence.into();
        etcd.put(&format!("/anyport/history/main/{sequence:020}"), &record.to_string());
    }
    driver.ok(&format!("publish {} --ring main --sequence 2 --force", sets[1]));
    wait_for_ring(&driver, "main", "node that follows", |it| it["nodes"][0]["report"]["sequence"] == 2);
    etcd.ctl("del --prefix /anyport/history/main/000000000009");
    // A pointer that all nodes refuse says nothing of what they have seen.
    let mut forged = etcd.record("/anyport/rings/main");
    (forged["sequence"], forged["set"]) = (u64::MAX.into(), "ab".repeat(32).into());
    etcd.put("/anyport/rings/main", &forged.to_string());
    sleep(Duration::from_secs(1));
    assert_eq!(driver.json(&format!("publish {} --ring main --force", sets[2]))["sequence"], 3);
    wait_for_ring(&driver, "main", "node that is current", |it| it["summary"]["current"] == 1);
    // What is left of a ring can be removed.
    etcd.put("/anyport/nodes/ghost/x", "nonsense");
    contains(&driver.ok("status --ring ghost"), &["left out: /anyport/nodes/ghost/x"]);
    driver.ok("remove ghost");
    etcd.put("/anyport/rings/broken", "nonsense");
    driver.refused("remove broken", 1);
    driver.ok("remove broken --force");
    assert!(etcd.keys("/anyport/rings/").iter().all(|key| key.ends_with("/main")));
}

fn storm() {
    const CHANGES: u64 = 300;
    let (namespace, etcd, _) = alone();
    let ring: Name = "canary".parse().expect("a name");
    with_client(&namespace, &etcd, LIMIT, async |client| {
        let mut source = source(client.clone(), &ring);
        assert!(source.pointer().await.expect("an answer").is_none());
        // The watch begins.
        tokio::time::timeout(Duration::from_millis(500), source.changed()).await.expect_err("nothing yet");
        let packed = Packed::new("192.0.2.1\n").expect("a set");
        let manifest = client.store(&packed, &mut |_, _| ()).await.expect("a set in etcd");
        for sequence in 1..=CHANGES {
            let before = client.ring(&ring).await.expect("the ring");
            let pointer = Pointer {
                ring: ring.clone(),
                sequence,
                set: packed.hash,
                published: Time::now(),
                by: "t@t".into(),
                note: None,
                from: None,
                signature: None,
            };
            let swapped = client.swap(&before, &pointer, manifest).await.expect("an answer");
            assert!(matches!(swapped, Swapped::Done(_)), "{swapped:?}");
        }
        sleep(Duration::from_millis(200));
        let mut told = Vec::new();
        while told.last() != Some(&CHANGES) {
            let next = tokio::time::timeout(LIMIT, source.changed()).await.expect("a change within 20 s");
            told.extend(next.expect("a pointer").map(|it| it.value.sequence));
        }
        assert!(told.len() <= 2, "{told:?}");
        let more = tokio::time::timeout(Duration::from_millis(700), source.changed()).await;
        assert!(more.is_err(), "what is over is told: {more:?}");
    });
}

fn daemon(host: &Netns, etcd: &Etcd, files: &Driver, node: &str, more: &str) -> Setup {
    let text = format!("[fleet]\netcd = [\"{}\"]\nring = \"main\"\nnode = \"{node}\"\n{more}", etcd.urls());
    Setup::new(host, "sk-lookup").config(files.file(&format!("{node}-{}.toml", host.inode()), &text))
}

fn wait_for_degraded(daemon: &Daemon, words: &[&str]) {
    wait_for("word of what is degraded", Duration::from_mins(1), || {
        let degraded = daemon.json("status")["degraded"].to_string();
        if words.iter().all(|word| degraded.contains(word)) { Ok(()) } else { Err(degraded) }
    });
}

fn wait_until_well(daemon: &Daemon) {
    wait_for("that all is well", Duration::from_mins(1), || {
        let degraded = daemon.json("status")["degraded"].to_string();
        if degraded == "[]" { Ok(()) } else { Err(degraded) }
    });
}

fn mute() {
    // No rights.
    let namespace = Netns::new();
    let etcd = Etcd::alone(&namespace);
    let files = Driver { namespace: namespace.clone(), options: Vec::new(), files: scratch() };
    etcd.ctl("user add root:secret");
    etcd.ctl("user grant-role root root");
    etcd.ctl("user add n1:own");
    etcd.ctl("role add reader");
    etcd.ctl("role grant-permission --prefix=true reader read /anyport/");
    etcd.ctl("user grant-role n1 reader");
    etcd.ctl("auth enable");
    let password = files.file("password", "own\n");
    let node =
        daemon(&namespace, &etcd, &files, "n1", &format!("user = \"n1\"\npassword-file = \"{password}\"\n")).start();
    wait_for_degraded(&node, &["can't report to the fleet", "permission denied"]);
    sleep(Duration::from_secs(5));
    let said = node.log().matches("can't report to its fleet").count();
    assert_eq!(said, 1, "{}", node.log());
    drop(node);
    // No room.
    let namespace = Netns::new();
    let mut etcd = Etcd::with_options(&namespace, &["--quota-backend-bytes", "2097152"]);
    let driver = Driver::of(&namespace, &etcd);
    let set = driver.file("set", "192.0.2.0/25\n");
    driver.ok(&format!("publish {set} --ring main"));
    let node = daemon(&namespace, &etcd, &driver, "n1", "").start();
    wait_for_ring(&driver, "main", "current node", |it| it["summary"]["current"] == 1);
    let filler = "x".repeat(100_000);
    for number in 0..40 {
        if etcd.client().run(["put", "--", "/filler", &format!("{number}{filler}")]).status != 0 {
            break;
        }
    }
    let other = driver.file("other", "192.0.2.128/25\n");
    let complaint = driver.refused(&format!("publish {other} --ring main"), 1);
    contains(&complaint, &["space exceeded", "etcdctl compact", "etcdctl defrag", "etcdctl alarm disarm"]);
    node.ok("add-prefix 198.51.100.0/24 --service default");
    wait_for_degraded(&node, &["can't report to the fleet", "space exceeded"]);
    steers(&namespace, "192.0.2.3");
    etcd.compact();
    etcd.ctl("defrag");
    etcd.ctl("alarm disarm");
    node.ok("remove-prefix 198.51.100.0/24");
    wait_until_well(&node);
    driver.ok(&format!("publish {other} --ring main"));
    wait_for_ring(&driver, "main", "node that is current again", |it| it["summary"]["current"] == 1);
    does_not_steer(&namespace, "192.0.2.3");
    etcd.kill_all();
}

fn twins() {
    let backbone = Backbone::new(3);
    let etcd = Etcd::start(&[backbone.center()]);
    let driver = Driver::of(&backbone.router, &etcd);
    let set = driver.file("set", "192.0.2.0/25\n");
    driver.ok(&format!("publish {set} --ring main"));
    let start = |host: usize| daemon(&backbone.hosts[host], &etcd, &driver, "twin", "").start();
    let mut first = start(0);
    wait_for_ring(&driver, "main", "current node", |it| it["summary"]["current"] == 1);
    // Another machine of that name, with a key of its own, and another one that was copied from the first.
    let second = start(1);
    wait_for_degraded(&second, &["another machine reports as the node twin of the ring main", "node = "]);
    assert_eq!(first.json("status")["degraded"].to_string(), "[]");
    steers(&backbone.hosts[1], "192.0.2.3");
    drop(second);
    let mut copy = start(2);
    copy.stop();
    for entry in fs::read_dir(first.state()).expect("files").flatten() {
        if entry.file_name().to_string_lossy().starts_with("fleet") {
            let there = copy.state().join(entry.file_name());
            fs::copy(entry.path(), &there).expect("a copy");
            chown(&there, Some(USER), Some(GROUP)).expect("a file of the daemon's user");
        }
    }
    copy.restart();
    wait_for_degraded(&first, &["another process writes this node's report"]);
    // The operator sees it, whichever of them has written last.
    let told = |view: &Value| view["nodes"][0]["report"]["degraded"].to_string().contains("another process writes");
    wait_for_ring(&driver, "main", "word of the twin", told);
    // A machine that takes the place of one that is gone has its name once that one is missing.
    drop(copy);
    first.stop();
    etcd.ctl("del /anyport/nodes/main/twin");
    let heir = start(1);
    wait_for_ring(&driver, "main", "heir of the name", |it| it["summary"]["current"] == 1);
    wait_until_well(&heir);
}

/// A node has taken a sequence that leaves no other: the ring gets another name.
fn way_back() {
    let (namespace, etcd, driver) = alone();
    let set = driver.file("set", "192.0.2.0/25\n");
    driver.ok(&format!("publish {set} --ring main"));
    let mut last = etcd.record("/anyport/rings/main");
    last["sequence"] = u64::MAX.into();
    etcd.put("/anyport/rings/main", &last.to_string());
    let mut node = daemon(&namespace, &etcd, &driver, "n1", "").start();
    wait_for_ring(&driver, "main", "node that has taken it", |it| it["nodes"][0]["report"]["sequence"] == u64::MAX);
    let other = driver.file("other", "192.0.2.128/25\n");
    // The history knows better, but this node has seen it.
    contains(&driver.refused(&format!("publish {other} --ring main"), 5), &["n1 (18446744073709551615)", "--force"]);
    driver.ok(&format!("publish {other} --ring main --force"));
    wait_for_ring(&driver, "main", "refusal", |it| it["summary"]["refused"] == 1);
    steers(&namespace, "192.0.2.3");
    driver.ok(&format!("publish {other} --ring main-2"));
    node.stop();
    let config = driver.files.path().join(format!("n1-{}.toml", namespace.inode()));
    let text = fs::read_to_string(&config).expect("the configuration");
    fs::write(&config, text.replace("ring = \"main\"", "ring = \"main-2\"")).expect("a configuration");
    node.restart();
    wait_for_ring(&driver, "main-2", "node of the new ring", |it| it["summary"]["current"] == 1);
    steers(&namespace, "192.0.2.129");
    does_not_steer(&namespace, "192.0.2.3");
    wait_until_well(&node);
    etcd.ctl("del --prefix /anyport/nodes/main/");
    driver.ok("remove main");
}

fn rings() {
    let (namespace, etcd, driver) = alone();
    let set = driver.file("set", "192.0.2.0/24\n");
    let published = driver.ok(&format!("publish {set} --ring mian"));
    contains(&published, &["the ring mian is new", "no node of it has reported", "no rings yet"]);
    contains(&driver.refused("status --ring main", 1), &["no ring main", "there are mian"]);
    contains(&driver.ok("status"), &["no node has reported"]);
    let node = Node::start(&namespace, &etcd, "main", "n1");
    driver.ok(&format!("publish {set} --ring main"));
    wait_for_ring(&driver, "main", "current node", |it| it["summary"]["current"] == 1);
    // A broken ring hides no other.
    etcd.put("/anyport/rings/mian", "nonsense");
    let outcome = driver.run("status");
    assert_eq!(outcome.status, 1, "{outcome}");
    contains(&outcome.stdout, &["ring main: sequence 1", "n1 ", "ring mian: what etcd has under /anyport/rings/mian"]);
    let outcome = driver.run("status --metrics");
    let metrics = Scrape::parse(&outcome.stdout);
    for (series, value) in [
        ("anyport_fleet_ring_sequence{ring=\"main\"}", 1.0),
        ("anyport_fleet_ring_readable{ring=\"mian\"}", 0.0),
        ("anyport_fleet_ring_nodes{ring=\"main\",state=\"current\"}", 1.0),
        ("anyport_fleet_ring_nodes{ring=\"main\",state=\"missing\"}", 0.0),
        ("anyport_fleet_ring_degraded_nodes{ring=\"main\"}", 0.0),
        ("anyport_fleet_ring_skipped_records{ring=\"main\"}", 0.0),
    ] {
        assert_eq!(metrics.get(series), Some(value), "{series}: {}", outcome.stdout);
    }
    etcd.ctl("del /anyport/rings/mian");
    driver.ok("remove mian");
    driver.refused("remove mian", 1);
    let mut watching = driver.command("status --watch 200ms --json");
    watching.stdout(Stdio::piped());
    let watching = namespace.spawn(watching);
    sleep(Duration::from_secs(2));
    kill(Pid::from_raw(watching.id().try_into().expect("a process id")), Signal::SIGTERM).expect("an end");
    let shown = watching.wait_with_output().expect("its output").stdout;
    assert!(String::from_utf8_lossy(&shown).lines().count() >= 3, "{}", String::from_utf8_lossy(&shown));
    contains(&driver.refused("remove main", 5), &["n1", "--force"]);
    drop(node);
    etcd.ctl("del /anyport/nodes/main/n1");
    contains(&driver.ok("remove main"), &["removed the ring main"]);
    contains(&driver.ok("status"), &["there is no ring"]);
    assert!(etcd.keys("/anyport/members").is_empty() && etcd.keys("/anyport/history").is_empty());
}

fn interrupted() {
    let (namespace, etcd, driver) = alone();
    let _nodes = [("canary", "c1"), ("main", "m1"), ("last", "l1")]
        .map(|(ring, node)| Node::start(&namespace, &etcd, ring, node));
    let set = driver.file("set", "192.0.2.0/24\n");
    for ring in ["canary", "main", "last"] {
        driver.ok(&format!("publish {set} --ring {ring}"));
        wait_for_ring(&driver, ring, "current node", |it| it["summary"]["current"] == 1);
    }
    let other = driver.file("other", "198.51.100.0/24\n");
    let mut command = driver.command(&format!("rollout {other} --rings canary,main,last --gate 2s"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let rollout = namespace.spawn(command);
    wait_for_ring(&driver, "main", "second ring", |it| it["pointer"]["sequence"] == 2);
    let begun = Instant::now();
    kill(Pid::from_raw(rollout.id().try_into().expect("a process id")), Signal::SIGINT).expect("an interrupt");
    let output = rollout.wait_with_output().expect("an end");
    assert!(begun.elapsed() < Duration::from_secs(2), "it waits for the gate");
    let outcome = Outcome::from(output);
    assert_eq!(outcome.status, 1, "{outcome}");
    let view = driver.ring("main");
    contains(
        &outcome.stderr,
        &[
            "interrupted; passed, with the set",
            ": canary; the ring main has the set",
            "as sequence 2 and keeps it",
            "not touched: last",
            "fleet rollback --ring main",
        ],
    );
    assert!(outcome.stderr.contains(&text(&view["pointer"]["set"])[..12]), "{outcome}");
    assert_eq!((driver.sequence("canary"), driver.sequence("main"), driver.sequence("last")), (2, 2, 1));
}
