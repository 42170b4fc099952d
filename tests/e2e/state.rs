//! What the daemon keeps: rules and services over restarts, configuration, routes; many clients at once.

use std::{ffi::OsStr, fs, os::unix::fs::MetadataExt as _, thread, time::Duration};

use anyport_tests::{
    daemon::{Daemon, Setup},
    dial::expect_tcp_hello,
    host::wait_for,
    netns::Netns,
    prerequisites::scratch,
};
use libtest_mimic::Trial;

use crate::{
    cases::{at, on_each_back_end, trial},
    control::{contains, start},
};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("state::many clients at once", concurrent),
        trial("state::rules survive a restart", restart),
        trial("state::an unreadable file stops the start", unreadable_state),
        trial("state::rules and services of the configuration", configuration),
    ];
    trials.extend(on_each_back_end("state::routes come and go with the rules", routes));
    trials.extend(on_each_back_end("state::what can't be kept is not done", unwritable_state));
    trials.push(trial("state::a full disk", || {
        no_room("mount -t tmpfs -o size=64k none", "dd if=/dev/zero of", "No space left");
    }));
    trials.push(trial("state::a read-only file system", || {
        no_room("mount --bind", "mount -o remount,bind,ro", "Read-only");
    }));
    trials.push(trial("state::spoilt files", spoilt_state));
    trials.push(trial("state::rules that contradict the configuration are taken out", contradicted));
    trials
}

fn concurrent() {
    let daemon = start();
    thread::scope(|scope| {
        for client in 0..8 {
            let daemon = &daemon;
            scope.spawn(move || {
                for number in 0..8 {
                    daemon.ok(&format!("add-prefix 192.0.2.{} 2001:db8:0:a::{client}:{number}", client * 8 + number));
                }
            });
        }
    });
    assert!(daemon.rules().len() == 128, "{} rules instead of 128", daemon.rules().len());
    for host in [0, 21, 63] {
        daemon.namespace().enter(|| expect_tcp_hello(at(&format!("192.0.2.{host}"), 5)));
    }
}

fn restart() {
    let mut daemon = start();
    daemon.ok("add-service one --handler discard --banner welcome");
    daemon.ok("add-prefix 192.0.2.0/24 --ports 80,443 --protocol both --service one");
    daemon.ok("add-prefix 2001:db8:0:a::/64 --except 22 --no-route");
    let before = (daemon.rules(), daemon.namespace().ip("route show table local proto 165"));
    daemon.stop();
    daemon.restart();
    let after = (daemon.rules(), daemon.namespace().ip("route show table local proto 165"));
    assert_eq!(after, before, "rules and routes after a restart");
}

fn unreadable_state() {
    let mut daemon = start();
    daemon.ok("add-prefix 192.0.2.0/24");
    daemon.stop();
    let files: Vec<_> =
        fs::read_dir(daemon.state()).expect("the state").map(|file| file.expect("a file").path()).collect();
    assert!(!files.is_empty(), "the state directory is empty after add-prefix");
    for file in files.iter().filter(|path| path.is_file()) {
        fs::write(file, "no state at all {").expect("spoiling the state");
    }
    let setup =
        Setup::new(daemon.namespace(), "sk-lookup").args([OsStr::new("--state-dir"), daemon.state().as_os_str()]);
    let outcome = setup.run_to_end();
    assert!(outcome.status == 1, "a start with an unreadable state: {outcome}");
    contains(&outcome.stderr, &[&daemon.state().display().to_string()]);
    for file in files.iter().filter(|path| path.is_file()) {
        assert_eq!(fs::read_to_string(file).expect("the state"), "no state at all {", "{} was changed", file.display());
    }
}

/// Each verb fails as a whole, and what was there is still served.
fn unwritable_state(backend: &'static str) {
    let daemon = Daemon::start(&Netns::new(), backend);
    daemon.ok("add-service one --handler echo");
    daemon.ok("add-prefix 192.0.2.0/24");
    let sockets = || {
        let services = daemon.json("services");
        let all = services.as_array().expect("an array").iter();
        all.map(|service| format!("{} {}", service["name"], service["sockets"])).collect::<Vec<_>>()
    };
    let held = || (daemon.rules(), sockets(), daemon.namespace().ip("route show table local proto 165"));
    let known = held();
    // A directory in the place of the file that is written first.
    let obstacle = daemon.state().join("state.json.new");
    fs::create_dir(&obstacle).expect("an obstacle");
    for words in [
        "add-prefix 203.0.113.0/24",
        "remove-prefix 192.0.2.0/24",
        "add-service two --handler echo",
        "remove-service one",
    ] {
        let said = daemon.refused(words, 1);
        contains(&said, &["state.json"]);
        assert_eq!(held(), known, "after {words}");
        daemon.namespace().enter(|| expect_tcp_hello(at("192.0.2.1", 1)));
    }
    fs::remove_dir(&obstacle).expect("no obstacle any more");
    daemon.ok("add-prefix 203.0.113.0/24 --service one");
    daemon.ok("remove-prefix 203.0.113.0/24");
    daemon.ok("remove-service one");
}

/// The state directory is mounted over, and then can't be written to: that is said, and what was there is still served.
fn no_room(mounting: &str, spoiling: &str, reason: &str) {
    let mut daemon = start();
    let directory = daemon.state().display().to_string();
    let shell = |line: &str| daemon.namespace().output(std::process::Command::new("sh").args(["-c", line]));
    let expect = |line: &str| {
        let outcome = shell(line);
        assert!(outcome.status == 0, "{line}: {outcome}");
    };
    let bound = if mounting.contains("bind") { directory.as_str() } else { "" };
    expect(&format!("{mounting} {bound} {directory}"));
    daemon.ok("add-prefix 192.0.2.0/24");
    let before = daemon.rules();
    match spoiling {
        "dd if=/dev/zero of" => drop(shell(&format!("dd if=/dev/zero of={directory}/filler bs=1k"))),
        remount => expect(&format!("{remount} {directory}")),
    }
    for words in ["add-prefix 203.0.113.0/24", "remove-prefix 192.0.2.0/24", "add-service one --handler echo"] {
        contains(&daemon.refused(words, 1), &["write the state file", &directory, reason]);
        assert_eq!(daemon.rules(), before, "rules after {words}");
        daemon.namespace().enter(|| expect_tcp_hello(at("192.0.2.1", 1)));
    }
    let left = shell(&format!("ls {directory}")).stdout;
    assert!(!left.contains(".new"), "files that are left: {left}");
    expect(&format!("umount {directory}"));
    daemon.ok("add-prefix 203.0.113.0/24");
    daemon.stop();
    daemon.restart();
    assert_eq!(daemon.rules().len(), 2);
}

/// A file that was cut, changed or written by another program stops the start; the message says how to go on, and that works.
fn spoilt_state() {
    let mut daemon = start();
    daemon.ok("add-prefix 192.0.2.0/24");
    daemon.ok("add-prefix 203.0.113.0/24");
    daemon.stop();
    let file = daemon.state().join("state.json");
    let whole = fs::read_to_string(&file).expect("the state");
    let texts = [
        whole[..whole.len() / 2].to_owned(),
        whole.replace("203.0.113.0/24", "203.0.113.0/25"),
        "{\"version\": 7}".to_owned(),
        String::new(),
    ];
    for text in texts {
        fs::write(&file, &text).expect("spoiling the state");
        let setup =
            Setup::new(daemon.namespace(), "sk-lookup").args([OsStr::new("--state-dir"), daemon.state().as_os_str()]);
        let outcome = setup.run_to_end();
        let way_out = format!("mv {0}.former {0}", file.display());
        assert!(outcome.status == 1, "a start with {text:?}: {outcome}");
        contains(&outcome.stderr, &[&way_out, "mv ", ".broken"]);
        assert_eq!(fs::read_to_string(&file).expect("the state"), text, "the file has changed");
    }
    fs::rename(daemon.state().join("state.json.former"), &file).expect("the state before");
    daemon.restart();
    let rules = daemon.rules();
    assert!(rules.len() == 1 && rules[0].contains("192.0.2.0/24"), "the rules of the state before: {rules:?}");
}

/// Rules that were added or applied, and that keep the daemon from starting, go by what the message says, typed as it stands.
fn contradicted() {
    let mut daemon = start();
    let directory = scratch();
    let rules = directory.path().join("rules");
    fs::write(&rules, "203.0.113.0/24 tcp 22\n203.0.113.0/24 tcp 80\n").expect("a file of rules");
    daemon.ok("add-service trap --handler echo");
    daemon.ok("add-prefix 192.0.2.0/24 --ports 80,443 --except 443 --source 198.51.100.0/24 --service trap");
    daemon.ok("add-prefix 192.0.2.0/24 --ports 25 --service trap");
    daemon.ok(&format!("apply {}", rules.display()));
    let (file, state) = (daemon.state().join("state.json"), daemon.state().display().to_string());
    let kept = || (fs::read(&file).expect("the state"), fs::metadata(&file).expect("its owner").uid());
    let offline = |words: &str, status| daemon.refused(&format!("--offline --state-dir {state} {words}"), status);
    contains(&offline("remove-prefix 192.0.2.0/24", 1), &["an anyportd is at work", "leave --offline out"]);
    daemon.stop();
    let before = kept();
    let offline = |words: &str, status| daemon.refused(&format!("--offline --state-dir {state} {words}"), status);
    contains(&offline("remove-prefix 192.0.2.0/24 198.51.100.0/24", 1), &["198.51.100.0/24 has no such rule"]);
    contains(&offline("remove-prefix 192.0.2.0/24 --ports 26", 1), &["192.0.2.0/24 has no such rule", "ports 25"]);
    contains(&offline("remove-prefix 192.0.2.0/33", 2), &["192.0.2.0/33"]);
    contains(&offline("prefixes", 2), &["remove-prefix alone"]);
    contains(&daemon.refused("--offline --state-dir /none remove-prefix 192.0.2.0/24", 1), &["/none"]);
    assert_eq!(kept(), before, "the state after what was refused");

    let config = directory.path().join("anyport.toml");
    let text = "[[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"80,443\"\nexcept = \"443\"\nsource = \"198.51.100.0/24\"\n\
        [[rule]]\nprefix = \"203.0.113.0/24\"\nports = \"80\"\nroute = false\n";
    fs::write(&config, text).expect("a configuration");
    let setup = || Setup::new(daemon.namespace(), "sk-lookup").config(&config).args(["--state-dir", &state]);
    for (rule, note) in [("192.0.2.0/24 tcp ports 80,443", "\n"), ("203.0.113.0/24 tcp ports 80 ", "comes back")] {
        let outcome = setup().run_to_end();
        assert!(outcome.status == 1 && outcome.stderr.contains(rule), "a start that can't be: {outcome}");
        let (_, command) = outcome.stderr.split_once("anyportctl --offline").expect("a way out");
        let (command, _) = command.split_once(" (without").expect("its end");
        let said = daemon.ok(&format!("--offline{command}"));
        contains(&said, &["removed 1 rule from", rule, note]);
    }
    assert_eq!(kept().1, before.1, "the owner of the state");
    let next = setup().start();
    let rules = next.rules();
    let from = |origin: &str| rules.iter().filter(|rule| rule.contains(&format!("\"origin\":\"{origin}\""))).count();
    assert_eq!(["config", "added", "applied"].map(from), [2, 1, 1], "{rules:?}");
}

fn configuration() {
    let directory = scratch();
    let file = directory.path().join("anyport.toml");
    let text = "[daemon]\nworkers = 3\n\n[[service]]\nname = \"one\"\nhandler = \"echo\"\n\n\
        [[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"80,443\"\nexcept = \"443\"\nprotocol = \"both\"\nservice = \"one\"\n\n\
        [[rule]]\nprefix = \"2001:db8:0:a::/64\"\n";
    fs::write(&file, text).expect("a configuration");
    let daemon = Setup::new(&Netns::new(), "sk-lookup").config(file).start();
    daemon.ok("add-prefix 203.0.113.0/24");
    let rules = daemon.json("prefixes");
    let origin = |prefix: &str| {
        let all = rules.as_array().expect("an array");
        all.iter().find(|rule| rule["prefix"] == prefix).unwrap_or_else(|| panic!("{prefix} in {rules}"))["origin"]
            .clone()
    };
    assert_eq!(
        [origin("192.0.2.0/24"), origin("2001:db8:0:a::/64"), origin("203.0.113.0/24")],
        ["config", "config", "added"]
    );
    daemon.namespace().enter(|| expect_tcp_hello(at("2001:db8:0:a::1", 1)));
}

fn routes(backend: &'static str) {
    let daemon = Daemon::start(&Netns::new(), backend);
    let ours =
        || ["-4", "-6"].map(|family| daemon.namespace().ip(&format!("{family} route show table local proto 165")));
    daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --ports 80");
    daemon.ok("add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --ports 443");
    daemon.ok("add-prefix 203.0.113.0/24 2001:db8:0:b::/64 --no-route");
    for step in ["with two rules", "with one rule left"] {
        let [v4, v6] = ours();
        assert!(v4.contains("192.0.2.0/24") && v6.contains("2001:db8:0:a::/64"), "routes {step}: {v4}{v6}");
        assert!(!v4.contains("203.0.113") && !v6.contains("2001:db8:0:b"), "routes in spite of --no-route: {v4}{v6}");
        if step == "with two rules" {
            daemon.ok("remove-prefix 192.0.2.0/24 2001:db8:0:a::/64 --ports 80");
        }
    }
    daemon.ok("remove-prefix 192.0.2.0/24 2001:db8:0:a::/64");
    wait_for("end of the routes", Duration::from_secs(5), || {
        let left = ours().concat();
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
}
