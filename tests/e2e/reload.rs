//! The configuration is read again while the daemon runs: all of it or nothing, and no connection ends.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyport_tests::{
    dial::{expect_tcp_echo, expect_tcp_hello, expect_tcp_line, expect_tcp_refused, tcp},
    host::wait_for,
    prerequisites::scratch,
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};

use crate::cases::{Lab, at, on_each_back_end, trial};

const LIMIT: Duration = Duration::from_secs(20);

const FIRST: &str = r#"
[daemon]
workers = 2
[[service]]
name = "echo"
handler = "echo"
[[rule]]
prefix = "192.0.2.0/25"
service = "echo"
[[rule]]
prefix = "2001:db8:0:a::/64"
"#;

const SECOND: &str = r#"
[daemon]
workers = 3
log-level = "debug"
max-rules = 1000
[[service]]
name = "trap"
handler = "discard"
banner = "ready\n"
[[rule]]
prefix = "192.0.2.0/25"
service = "trap"
[[rule]]
prefix = "192.0.2.128/25"
"#;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("reload::from one configuration to another", reload));
    trials.push(trial("reload::what is wrong changes nothing", mistakes));
    trials.push(trial("reload::by SIGHUP", hangup));
    trials
}

struct Files {
    #[expect(dead_code, reason = "keeps the directory")]
    directory: tempfile::TempDir,
    config: PathBuf,
}

fn start(backend: &str) -> (Lab, Files) {
    let directory = scratch();
    let config = directory.path().join("anyport.toml");
    fs::write(&config, FIRST).expect("writing the configuration");
    let lab = Lab::with(backend, |setup| setup.config(&config));
    (lab, Files { directory, config })
}

fn write(file: &Path, text: &str) {
    fs::write(file, text).expect("writing the configuration");
}

fn reload(backend: &'static str) {
    let (lab, files) = start(backend);
    let client = &lab.topology.client;
    lab.daemon.ok("add-prefix 192.0.2.200/32 --ports 7 --service echo");
    let mut stream = client.enter(|| tcp(at("192.0.2.3", 3))).expect("a connection");
    expect_tcp_line(&mut stream, "before\n");
    write(&files.config, SECOND);
    let (rules, generation) = (lab.daemon.rules(), lab.daemon.json("status")["generation"].clone());
    // A rule that was added by hand still needs the service.
    let refused = lab.daemon.refused("reload", 1);
    assert!(refused.contains("no service echo") && refused.contains("192.0.2.200"), "{refused}");
    lab.daemon.ok("remove-prefix 192.0.2.200/32");
    let plan = lab.daemon.ok("reload --dry-run");
    for line in [
        "service + trap",
        "service - echo",
        "- 192.0.2.0/25 tcp 1-65535 service=echo",
        "+ 192.0.2.0/25 tcp 1-65535 service=trap",
        "+ 192.0.2.128/25",
        "- 2001:db8:0:a::/64",
        "setting log-level: info -> debug",
        "setting max-rules: 1048576 -> 1000",
        "takes a restart: workers: 2 -> 3",
        "nothing was changed",
    ] {
        assert!(plan.contains(line), "{line:?} is missing:\n{plan}");
    }
    assert_eq!(lab.daemon.rules().len(), rules.len() - 1);
    let answer = lab.daemon.ok("reload");
    assert!(answer.contains("2 added, 2 removed") && answer.contains("takes a restart: workers"), "{answer}");
    let status = lab.daemon.json("status");
    assert!(status["max_rules"] == 1000 && status["workers"] == 2, "{status}");
    assert!(status["generation"].as_u64() > generation.as_u64(), "{status}");
    expect_tcp_line(&mut stream, "after\n");
    client.enter(|| {
        let mut banner = tcp(at("192.0.2.3", 3)).expect("a connection");
        let mut text = [0; 6];
        std::io::Read::read_exact(&mut banner, &mut text).expect("the banner");
        assert_eq!(&text, b"ready\n");
        expect_tcp_hello(at("192.0.2.133", 5));
    });
    assert!(lab.daemon.ok("reload").contains("nothing to do"));
    let names: Vec<_> =
        lab.daemon.json("services").as_array().into_iter().flatten().map(|it| it["name"].clone()).collect();
    assert_eq!(names, ["default", "trap"]);
}

/// One mistake each; all that is said names the place, and the rules stay.
fn mistakes() {
    let (lab, files) = start("sk-lookup");
    lab.daemon.ok("add-service hand --handler discard");
    let before = (lab.daemon.rules(), lab.daemon.json("status")["generation"].clone());
    for (text, status, parts) in [
        ("[daemon]\nworker = 1\n", 2, ["line 2, column 1", "worker"]),
        ("[[rule]]\nprefix = \"192.0.2.1/24\"\n", 2, ["line 2, column 10", "192.0.2.0/24"]),
        ("[[rule]]\nprefix = \"192.0.2.0/24\"\nservice = \"nobody\"\n", 2, ["line 1, column 1", "nobody"]),
        ("[[service]]\nname = \"hand\"\nhandler = \"echo\"\n", 1, ["hand", "added by hand"]),
        ("[[rule]]\nprefix = \"198.51.100.2/32\"\n", 5, ["198.51.100.2", "--force"]),
        ("[daemon]\nmax-rules = 0\n[[rule]]\nprefix = \"192.0.2.0/24\"\n", 2, ["max-rules", "1 rules"]),
    ] {
        write(&files.config, text);
        let said = lab.daemon.refused("reload", status);
        assert!(parts.iter().all(|part| said.contains(part)), "{parts:?}: {said}");
    }
    fs::remove_file(&files.config).expect("removing the configuration");
    let said = lab.daemon.refused("reload", 2);
    assert!(said.contains("read the configuration") && said.contains("No such file"), "{said}");
    assert_eq!((lab.daemon.rules(), lab.daemon.json("status")["generation"].clone()), before);
    lab.topology.client.enter(|| expect_tcp_hello(at("2001:db8:0:a::3", 1)));
}

/// To the keeper, as init systems do it: what is wrong is said by `status`.
fn hangup() {
    let (lab, files) = start("sk-lookup");
    let hangup = || kill(lab.daemon.keeper(), Signal::SIGHUP).expect("SIGHUP to the keeper");
    let pid = lab.daemon.pid();
    write(&files.config, "[[rule]]\nprefix = \"192.0.2.0/33\"\n");
    hangup();
    wait_for("word of the mistake", LIMIT, || {
        let degraded = lab.daemon.json("status")["degraded"].to_string();
        if degraded.contains("not taken") && degraded.contains("line 2, column 10") { Ok(()) } else { Err(degraded) }
    });
    let echo = lab.topology.client.enter(|| tcp(at("192.0.2.3", 3))).expect("a connection");
    expect_tcp_echo(echo, b"as before");
    write(&files.config, SECOND);
    hangup();
    wait_for("the other configuration", LIMIT, || {
        let status = lab.daemon.json("status");
        if status["degraded"].as_array().is_some_and(Vec::is_empty) { Ok(()) } else { Err(status.to_string()) }
    });
    lab.topology.client.enter(|| {
        expect_tcp_hello(at("192.0.2.133", 5));
        expect_tcp_refused(at("2001:db8:0:a::3", 1));
    });
    assert_eq!(lab.daemon.pid(), pid, "the process that serves");
    let log = lab.daemon.log();
    assert!(log.contains("takes a restart: workers: 2 -> 3"), "{log}");
}
