//! What is refused since it can't be meant, and what scripts are told of a daemon that is not well.

use std::{fs, path::Path};

use anyport_tests::{daemon::Setup, netns::Netns, prerequisites::scratch};
use libtest_mimic::Trial;

use crate::cases::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("guards::most of many rules stay", most_stay),
        trial("guards::a rule steers something", something),
        trial("guards::names are somebody's", names),
        trial("guards::the exit status of status", exit_status),
    ]
}

fn setup() -> Setup {
    Setup::new(&Netns::new(), "sk-lookup")
}

fn write(file: &Path, text: &str) {
    fs::write(file, text).expect("writing a file");
}

/// Rules for so many addresses, a line each.
fn lines(count: usize) -> String {
    (1..=count).map(|number| format!("192.0.2.{number} tcp 80\n")).collect::<Vec<_>>().concat()
}

fn tables(count: usize) -> String {
    (1..=count)
        .map(|number| format!("[[rule]]\nprefix = \"198.51.100.{number}\"\nports = \"80\"\n"))
        .collect::<Vec<_>>()
        .concat()
}

/// An empty file, or one that is cut off, does not take the rules away by itself: neither applied nor configured.
fn most_stay() {
    let directory = scratch();
    let (config, file) = (directory.path().join("anyport.toml"), directory.path().join("rules"));
    write(&config, &tables(12));
    let daemon = setup().config(&config).start();
    let rules = |origin: &str| daemon.rules().iter().filter(|it| it.contains(&format!("\"{origin}\""))).count();
    let apply = format!("apply {}", file.display());
    write(&file, &lines(20));
    daemon.ok(&apply);
    for left in [9, 0] {
        write(&file, &lines(left));
        let complaint = daemon.refused(&apply, 5);
        assert!(complaint.contains(&format!("of 20 rules only {left} would be left")), "{complaint}");
        assert!(complaint.contains("--force"), "{complaint}");
        let plan = daemon.ok(&format!("{apply} --dry-run"));
        assert!(plan.contains("without --force this is refused for safety"), "{plan}");
        assert_eq!(rules("applied"), 20);
    }
    // Half of them stay, then few are there of which all may go.
    write(&file, &lines(10));
    daemon.ok(&apply);
    write(&file, "");
    daemon.ok(&apply);
    assert_eq!(rules("applied"), 0);
    write(&file, &lines(20));
    daemon.ok(&apply);
    write(&file, "");
    daemon.ok(&format!("{apply} --force"));
    assert_eq!(rules("applied"), 0);
    // Other ports for all of them take nothing away.
    write(&file, &lines(20));
    daemon.ok(&apply);
    write(&file, &lines(20).replace("80", "443"));
    daemon.ok(&apply);
    // Rules that were added by hand count where they would go, too.
    daemon.ok("add-prefix 203.0.113.1 203.0.113.2 203.0.113.3");
    write(&file, &lines(11));
    daemon.refused(&format!("{apply} --prune"), 5);
    daemon.ok(&apply);
    write(&config, &tables(5));
    let complaint = daemon.refused("reload", 5);
    assert!(complaint.contains("of 12 rules only 5 would be left"), "{complaint}");
    daemon.ok("reload --force");
    assert_eq!(rules("config"), 5);
}

/// A rule whose exceptions have all of its ports is refused, wherever it comes from.
fn something() {
    let directory = scratch();
    let file = directory.path().join("rules");
    let daemon = setup().start();
    for (ports, except) in [("80", "80"), ("80,443", "1-1000"), ("1-65535", "1-65535")] {
        let complaint = daemon.refused(&format!("add-prefix 192.0.2.0/24 --ports {ports} --except {except}"), 2);
        assert!(complaint.contains("nothing would be steered"), "{complaint}");
        write(&file, &format!("192.0.2.0/24 tcp {ports} except={except}\n"));
        assert!(daemon.refused(&format!("apply {}", file.display()), 2).contains("nothing would be steered"));
        let table = format!("[[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"{ports}\"\nexcept = \"{except}\"\n");
        write(&file, &table);
        assert!(daemon.refused(&format!("apply {}", file.display()), 2).contains("nothing would be steered"));
        let checked = setup().config(&file).args(["--check"]).run_to_end();
        assert!(checked.status == 2 && checked.stderr.contains("nothing would be steered"), "{checked}");
    }
    daemon.ok("add-prefix 192.0.2.0/24 --ports 80-81 --except 80");
}

/// Groups, owners and addresses that nobody has are mistakes.
fn names() {
    let directory = scratch();
    let file = directory.path().join("anyport.toml");
    write(&file, "");
    for (options, what) in [
        (["--readers", "no-such-group"], "readers = no-such-group"),
        (["--metrics", "192.0.2.77:9464"], "metrics = 192.0.2.77:9464"),
    ] {
        for check in [&["--check"][..], &[]] {
            let outcome = setup().config(&file).args(options).args(check).run_to_end();
            assert!(outcome.status == 2 && outcome.stderr.contains(what), "{options:?}: {outcome}");
        }
    }
    let service = "[[service]]\nname = \"app\"\nhandler = \"registered\"\nowners = [\"user:nobdy\"]\n";
    write(&file, service);
    let checked = setup().config(&file).args(["--check"]).run_to_end();
    assert!(checked.status == 2 && checked.stderr.contains("there is no user:nobdy"), "{checked}");
    // A daemon that has served does not fail for a user that is gone.
    let daemon = setup().config(&file).start();
    assert!(daemon.log().contains("there is no user:nobdy"), "{}", daemon.log());
    daemon.refused("add-service other --handler registered --owner group:nobdy", 2);
    write(&file, &service.replace("app", "other"));
    daemon.refused("reload", 2);
    daemon.refused(&format!("apply {}", file.display()), 2);
    daemon.ok("add-service other --handler registered --owner user:nobody --owner group:4711");
}

fn exit_status() {
    let daemon = setup().start();
    daemon.ok("status --exit-code");
    daemon.ok("add-service app --handler registered");
    daemon.ok("add-prefix 192.0.2.0/24 --service app");
    let complaint = daemon.refused("status --exit-code", 6);
    assert!(complaint.contains("degraded"), "{complaint}");
    daemon.ok("status");
}
