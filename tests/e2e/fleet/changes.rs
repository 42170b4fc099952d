//! What the verbs write and refuse.

use std::fmt::Write as _;

use anyport_tests::{
    driver::{Driver, put_report, report, text},
    etcd::Etcd,
    netns::Netns,
};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{cases::trial, control::contains};

pub(super) fn trials() -> Vec<Trial> {
    vec![
        trial("fleet::publish, promote, roll back, and the history of it", verbs),
        trial("fleet::what is wrong is refused and changes nothing", refused),
        trial("fleet::a sequence never comes again", sequences),
        trial("fleet::publishing what is there mends what etcd has lost", mended),
        trial("fleet::200,000 rules come in chunks", chunked),
        trial("fleet::sets go when nothing speaks of them", unused),
        trial("fleet::no etcd", no_etcd),
    ]
}

const ONE: &str = "192.0.2.0/24 tcp 80 service=edge\n";
const TWO: &str = "192.0.2.0/24 tcp 80 service=edge\n198.51.100.0/24\n";

fn alone() -> (Etcd, Driver) {
    let namespace = Netns::new();
    let etcd = Etcd::alone(&namespace);
    let driver = Driver::of(&namespace, &etcd);
    (etcd, driver)
}

fn verbs() {
    let (etcd, driver) = alone();
    contains(&driver.ok("status"), &["there is no ring"]);
    let (one, two) = (driver.file("one", ONE), driver.file("two", TWO));
    let plan = driver.json(&format!("publish {one} --ring canary --dry-run"));
    assert_eq!(plan["difference"], json!(["+ 192.0.2.0/24 tcp 80 service=edge"]));
    assert!(etcd.keys("/anyport").is_empty(), "a dry run writes nothing");
    let published = driver.json(&format!("publish {one} --ring canary"));
    assert_eq!((&published["sequence"], &published["changed"]), (&json!(1), &json!(true)), "{published}");
    let pointer = etcd.record("/anyport/rings/canary");
    assert_eq!(pointer["set"], published["set"]);
    assert_eq!(etcd.record("/anyport/history/canary/00000000000000000001"), pointer);
    assert_eq!(driver.json(&format!("publish {one} --ring canary"))["changed"], false);
    let changed = driver.ok(&format!("publish {two} --ring canary --note second"));
    contains(
        &changed,
        &["+ 198.51.100.0/24 tcp 1-65535 service=default", "1 added, 0 removed, 1 unchanged", "sequence 2"],
    );
    // A set that nobody has tried goes no further by itself.
    contains(&driver.refused("promote --from canary --to main", 5), &["--force"]);
    put_report(&etcd, &report("n1", &etcd.record("/anyport/rings/canary")));
    let promoted = driver.json("promote --from canary --to main");
    assert_eq!((&promoted["sequence"], &promoted["added"]), (&json!(1), &json!(2)), "{promoted}");
    let back = driver.json("rollback --ring canary");
    assert_eq!((&back["sequence"], &back["set"]), (&json!(3), &published["set"]), "{back}");
    contains(&driver.refused("promote --from canary --to main", 5), &["n1 is behind"]);
    assert_eq!(driver.json("rollback --ring canary --to 2")["set"], promoted["set"]);
    contains(&driver.refused("rollback --ring canary --to 9", 1), &["no sequence 9", "history --ring canary"]);
    let history = driver.json("history --ring canary");
    let notes: Vec<&Value> = history.as_array().expect("records").iter().map(|it| &it["note"]).collect();
    assert_eq!(notes, [&json!("rolled back to 2"), &json!("rolled back to 1"), &json!("second"), &Value::Null]);
    assert_eq!(history[0]["present"], true);
    contains(&driver.ok("history --ring main"), &["promoted from canary 2"]);
}

fn refused() {
    let (etcd, driver) = alone();
    let conflict = driver.file("conflict", "192.0.2.0/24 service=a\n192.0.2.0/24 service=b\n");
    contains(&driver.refused(&format!("publish {conflict} --ring canary"), 2), &["line 2", "contradicts"]);
    let nonsense = driver.file("nonsense", "[[rule]]\nprefix = \"192.0.2.1/24\"\n");
    contains(&driver.refused(&format!("publish {nonsense} --ring canary"), 2), &[&nonsense, "has bits set"]);
    contains(&driver.refused("publish /nonexistent --ring canary", 2), &["/nonexistent"]);
    contains(&driver.refused("publish /dev/null --ring a/b", 2), &["a/b"]);
    contains(&driver.refused("rollback --ring canary", 1), &["has no set"]);
    assert!(etcd.keys("/anyport").is_empty());
    let many = driver.file("many", "192.0.2.0/24\n198.51.100.0/24\n203.0.113.0/24\n");
    driver.ok(&format!("publish {many} --ring canary"));
    let few = driver.file("few", ONE);
    let before = etcd.record("/anyport/rings/canary");
    contains(&driver.refused(&format!("publish {few} --ring canary"), 5), &["of the 3 rules", "only 1", "--force"]);
    contains(&driver.ok(&format!("publish {few} --ring canary --dry-run")), &["without --force it would be refused"]);
    assert_eq!(etcd.record("/anyport/rings/canary"), before);
    driver.ok(&format!("publish {few} --ring canary --force"));
    // What other programs have written there is reported, and not overwritten unseen.
    etcd.put("/anyport/rings/canary", "nonsense");
    contains(&driver.refused(&format!("publish {many} --ring canary"), 1), &["/anyport/rings/canary", "etcdctl del"]);
}

fn sequences() {
    let (etcd, driver) = alone();
    let (one, two) = (driver.file("one", ONE), driver.file("two", TWO));
    driver.ok(&format!("publish {one} --ring canary"));
    let first = etcd.record("/anyport/rings/canary");
    for node in ["n1", "n2", "n3"] {
        put_report(&etcd, &report(node, &first));
    }
    // One node that says it has seen more is named, and has no say in what comes next.
    let claim = |node: &str, seen: u64| {
        let mut claim = report(node, &first);
        claim["seen"] = seen.into();
        put_report(&etcd, &claim);
    };
    claim("n1", u64::MAX - 1);
    let published = driver.json(&format!("publish {two} --ring canary"));
    assert_eq!(published["sequence"], 2, "{published}");
    contains(&published["notes"].to_string(), &["n1 (18446744073709551614)", "of which etcd does not know"]);
    // Where most of them say so, etcd was restored from a backup or they lie: the operator decides.
    for node in ["n2", "n3"] {
        claim(node, 40);
    }
    contains(
        &driver.refused(&format!("publish {one} --ring canary"), 5),
        &["n2 (40)", "n3 (40)", "--sequence", "--force"],
    );
    contains(&driver.refused(&format!("publish {two} --ring canary"), 5), &["n2 (40)"]);
    for sequence in ["2", "1000003", "18446744073709551615"] {
        let complaint = driver.refused(&format!("publish {one} --ring canary --sequence {sequence}"), 2);
        contains(&complaint, &["has had 2", "the next one is 3 to 1000002"]);
    }
    assert_eq!(driver.json(&format!("publish {two} --ring canary --sequence 41"))["sequence"], 41, "the same set");
    // A pointer that is gone, and one that no command has made.
    etcd.ctl("del /anyport/rings/canary");
    assert_eq!(driver.json(&format!("publish {one} --ring canary"))["sequence"], 42);
    let mut forged = etcd.record("/anyport/rings/canary");
    forged["sequence"] = u64::MAX.into();
    etcd.put("/anyport/rings/canary", &forged.to_string());
    assert_eq!(driver.json(&format!("publish {two} --ring canary --force"))["sequence"], 43);
    // Where nothing else is known of a ring, there is no way on, but to another ring.
    etcd.put("/anyport/rings/main", &forged.to_string().replace("canary", "main"));
    let complaint = driver.refused(&format!("publish {two} --ring main --force"), 1);
    contains(&complaint, &["no sequence left after 18446744073709551615", "another ring"]);
    assert_eq!(driver.json(&format!("publish {two} --ring main --sequence 7 --force"))["sequence"], 7);
}

/// What is there is looked at, also where there seems to be nothing to do; and what can't be read is taken for the worst.
fn mended() {
    let (etcd, driver) = alone();
    let (one, few) = (driver.file("one", TWO), driver.file("few", ONE));
    let published = driver.json(&format!("publish {one} --ring canary"));
    let set = format!("/anyport/sets/{}", text(&published["set"]));
    for spoil in ["del --prefix", "put"] {
        match spoil {
            "put" => etcd.put(&format!("{set}/0000"), "nonsense"),
            _ => drop(etcd.ctl(&format!("{spoil} {set}"))),
        }
        contains(&driver.refused(&format!("publish {few} --ring canary"), 5), &["can't be read", "--force"]);
        let plan = driver.json(&format!("publish {one} --ring canary --dry-run"));
        assert_eq!((&plan["changed"], &plan["stored_again"]), (&json!(false), &json!(true)), "{plan}");
        contains(&driver.ok(&format!("publish {one} --ring canary")), &["stored again", "its pointer stays"]);
        let again = driver.json(&format!("publish {one} --ring canary"));
        assert_eq!((&again["sequence"], &again["stored_again"]), (&json!(1), &json!(false)), "{again}");
    }
    // A file of which nobody knows whether it takes everything away.
    driver.ok(&format!("publish {few} --ring canary"));
}

fn chunked() {
    let (etcd, driver) = alone();
    // Numbers at random, which can't be made much smaller.
    let mut state = 7_u32;
    let mut rules = String::new();
    for number in 0..200_000_u32 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (a, b, c) = (number >> 16, number >> 8 & 255, number & 255);
        writeln!(rules, "10.{a}.{b}.{c} tcp {} service=s{}", (state >> 16) | 1, state >> 5 & 63).expect("a line");
    }
    let file = driver.file("many", &rules);
    let published = driver.json(&format!("publish {file} --ring main"));
    assert_eq!(published["added"], 200_000);
    let set = text(&published["set"]);
    let manifest = etcd.record(&format!("/anyport/sets/{set}"));
    assert!(manifest["chunks"].as_u64() > Some(1), "{manifest}");
    assert_eq!(etcd.keys(&format!("/anyport/sets/{set}/")).len() as u64, manifest["chunks"].as_u64().expect("chunks"));
    // It is read again, chunk by chunk, to be compared with.
    let more = driver.file("more", &format!("{rules}192.0.2.0/24\n"));
    let published = driver.json(&format!("publish {more} --ring main"));
    let counts = ["added", "removed", "unchanged"].map(|it| published[it].as_u64());
    assert_eq!(counts, [Some(1), Some(0), Some(200_000)]);
    // A chunk is lost: that is reported, and publishing the file again repairs it.
    etcd.ctl(&format!("del /anyport/sets/{set}/0001"));
    contains(&driver.refused("rollback --ring main", 1), &["spoilt", "publishing the same file again"]);
    assert_eq!(driver.json(&format!("publish {file} --ring main"))["sequence"], 3);
}

fn unused() {
    let (etcd, driver) = alone();
    etcd.put(&format!("/anyport/sets/{}/0000", "ab".repeat(32)), "left over by somebody who was interrupted");
    let file = |number: u32| driver.file("set", &format!("192.0.2.{}/32 tcp {}\n", number % 256, number + 1));
    driver.ok(&format!("publish {} --ring canary", file(0)));
    assert_eq!(etcd.keys("/anyport/sets").len(), 2, "{:?}", etcd.keys("/anyport/sets"));
    let kept = driver.json("promote --from canary --to main --force");
    let set = text(&kept["set"]).to_owned();
    // As if there had been very many changes: the history is full.
    let pointer = etcd.record("/anyport/rings/canary");
    for sequence in 2..=100_u32 {
        let mut record = pointer.clone();
        record["sequence"] = sequence.into();
        etcd.put(&format!("/anyport/history/canary/{sequence:020}"), &record.to_string());
    }
    for number in 1..=2 {
        driver.ok(&format!("publish {} --ring canary", file(number)));
    }
    let history = etcd.keys("/anyport/history/canary/");
    assert_eq!((history.len(), driver.sequence("canary")), (100, 102), "{history:?}");
    assert!(history[0].ends_with("003"), "{history:?}");
    let sets = etcd.keys("/anyport/sets");
    assert_eq!(sets.len(), 6, "{sets:?}");
    assert!(sets.iter().any(|key| key.contains(&set)), "{sets:?}");
}

fn no_etcd() {
    let (mut etcd, driver) = alone();
    let one = driver.file("one", ONE);
    etcd.kill(0);
    for verb in [format!("publish {one} --ring canary"), "status".into()] {
        let complaint = driver.refused(&format!("{verb} --timeout 1s"), 3);
        contains(&complaint, &["etcd at http://127.0.0.1:2379 does not answer", "nodes go on with what they have"]);
    }
    let unnamed = Driver { options: Vec::new(), ..driver };
    contains(&unnamed.refused("status", 2), &["no etcd is named", "--etcd"]);
    let config = unnamed.file("anyport.toml", "[fleet]\netcd = [\"http://127.0.0.1:2379\"]\nring = \"canary\"\n");
    etcd.restart(0);
    contains(&unnamed.ok(&format!("status --config {config}")), &["there is no ring"]);
}
