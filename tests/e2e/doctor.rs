//! `anyportctl doctor` on hosts that have the faults: nothing is found before, the fault is found and does harm where it says
//! so, and after what it says has been typed (or done by `--fix`) all is well again.

mod faults;
mod firewalls;
mod limits;
mod programs;

use std::process::Command;

use anyport_tests::{
    daemon::Daemon,
    dial::{self, expect_tcp_hello, expect_udp_hello},
    host::Outcome,
    netns::Netns,
    prerequisites::{program, scratch},
};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::cases::{Lab, at, on_each_back_end, trial};

/// What is steered in these tests, and an address of each.
const PREFIXES: &str = "192.0.2.0/24 2001:db8:0:a::/64";
const ADDRESSES: [&str; 2] = ["192.0.2.3", "2001:db8:0:a::3"];
/// That of IPv4.
const V4: &[&str] = ADDRESSES.split_at(1).0;
/// That of IPv6.
const V6: &[&str] = ADDRESSES.split_at(1).1;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = on_each_back_end("doctor::a healthy host", healthy).collect();
    trials.push(trial("doctor::without a daemon", without_daemon));
    trials.extend(faults::trials());
    trials.extend(firewalls::trials());
    trials.extend(programs::trials());
    trials.extend(limits::trials());
    trials
}

/// What `doctor --json` reports.
struct Report(Value);

impl Report {
    fn of(daemon: &Daemon) -> Self {
        Self::with(daemon, &[])
    }

    fn with(daemon: &Daemon, arguments: &[&str]) -> Self {
        Self::read(&daemon.ctl(&[&["doctor", "--json"], arguments].concat()))
    }

    /// The exit status says whether something is broken.
    fn read(outcome: &Outcome) -> Self {
        let report: Value = serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome}"));
        let report = Self(report);
        let is_broken = report.findings().iter().any(|it| it["severity"] == "broken");
        assert_eq!(outcome.status, i32::from(is_broken), "{outcome}");
        report
    }

    fn findings(&self) -> &[Value] {
        self.0["findings"].as_array().expect("findings")
    }

    /// The only finding of a check, which must be of this severity and say this.
    fn expect(&self, check: &str, severity: &str, part: &str) -> &Value {
        let found: Vec<&Value> = self.findings().iter().filter(|it| it["check"] == check).collect();
        let [finding] = found[..] else { panic!("{} findings of {check}: {:#}", found.len(), self.0) };
        let text = finding["finding"].as_str().expect("a text");
        assert!(finding["severity"] == severity && text.contains(part), "{severity}, {part:?}: {finding:#}");
        assert!(finding["why"].as_str().is_some_and(|why| !why.is_empty()), "{finding:#}");
        finding
    }

    /// Asserts that a check was made and found nothing.
    fn expect_fine(&self, check: &str) {
        let ok = self.0["ok"].as_array().expect("checks");
        assert!(ok.iter().any(|it| it == check), "{check} found something or was not made: {:#}", self.0);
    }
}

/// Types what a finding says, in the namespace.
fn type_fixes(namespace: &Netns, finding: &Value) {
    for command in finding["fix"].as_array().expect("commands") {
        let outcome = namespace.output(Command::new("sh").args(["-ec", command.as_str().expect("a command")]));
        assert!(outcome.status == 0, "{command}: {outcome}");
    }
}

/// A test harness in which [`PREFIXES`] are steered.
fn steering(backend: &str) -> Lab {
    let lab = Lab::new(backend);
    lab.daemon.ok(&format!("add-prefix {PREFIXES} --protocol both"));
    lab
}

/// As [`steering`], where nobody but the doctor puts back what is removed.
fn unmended(backend: &str) -> Lab {
    let lab = Lab::with(backend, |setup| setup.args(["--mend", "false"]));
    lab.daemon.ok(&format!("add-prefix {PREFIXES} --protocol both"));
    lab
}

/// Asserts that remote clients are steered at each of the addresses.
fn expect_steered(lab: &Lab, addresses: &[&str]) {
    for address in addresses {
        lab.topology.client.enter(|| {
            expect_tcp_hello(at(address, 80));
            expect_udp_hello(at(address, 80));
        });
    }
}

/// Asserts that no remote client is.
fn expect_not_steered(lab: &Lab, addresses: &[&str]) {
    for address in addresses {
        let answer = lab.topology.client.enter(|| {
            let socket = dial::tcp_within(at(address, 80), dial::SILENCE);
            socket.and_then(|mut stream| dial::read_text(&mut stream))
        });
        assert!(answer.is_err(), "{address} answers {answer:?}");
    }
}

fn healthy(backend: &'static str) {
    let lab = steering(backend);
    let report = Report::of(&lab.daemon);
    assert_eq!(report.findings(), &[] as &[Value]);
    assert_eq!(report.0["skipped"], json!([]));
    assert_eq!(report.0["daemon"]["backend"], backend);
    // Traffic changes nothing of that.
    expect_steered(&lab, &ADDRESSES);
    assert_eq!(Report::of(&lab.daemon).findings(), &[] as &[Value]);
    let text = lab.daemon.ok("doctor --verbose");
    assert!(text.contains(&format!("steers by {backend}")) && text.contains("local-routes"), "{text}");
}

fn without_daemon() {
    let namespace = Netns::new();
    let directory = scratch();
    let client = program("anyportctl").unwrap_or_else(|missing| panic!("{missing}"));
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&client);
        command.arg("doctor").args(arguments).arg("--socket").arg(directory.path().join("sock"));
        namespace.output(&mut command)
    };
    let report = Report::read(&run(&["--json"]));
    assert_eq!(report.findings(), &[] as &[Value]);
    assert!(report.0["daemon"].is_null() && report.0["no_daemon"].as_str().is_some_and(|why| why.contains("sock")));
    let human = run(&[]);
    assert!(human.status == 0 && human.stdout.contains("any back end would need"), "{human}");
    // What it would need holds here too.
    namespace.ip("link set lo down");
    Report::read(&run(&["--json"])).expect("loopback", "broken", "lo is down");
    let human = run(&[]);
    assert!(human.status == 1 && human.stdout.contains("ip link set lo up"), "{human}");
    type_fixes(&namespace, Report::read(&run(&["--json"])).expect("loopback", "broken", ""));
    Report::read(&run(&["--json"])).expect_fine("loopback");
}
