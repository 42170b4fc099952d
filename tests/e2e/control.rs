//! The client's verbs: exit statuses, JSON shapes, what is refused and who may ask.

use std::{fs, net::TcpListener, os::unix::fs::PermissionsExt as _, process::Command, time::Duration};

use anyport_tests::{
    daemon::Daemon,
    dial::{expect_tcp_hello, tcp, tcp_server},
    host::{Outcome, wait_for},
    netns::Netns,
    prerequisites::{GROUP, program, public_copy, scratch},
    topology::{SECOND, SERVER, Topology},
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{at, trial};

/// Every verb with arguments that are fine.
const VERBS: [&str; 10] = [
    "add-prefix 192.0.2.0/24",
    "remove-prefix 192.0.2.0/24",
    "prefixes",
    "explain 192.0.2.7:80",
    "add-service extra --handler echo",
    "remove-service extra",
    "services",
    "unregister web --protocol tcp",
    "unregister web",
    "status",
];

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("control::help of each verb", help),
        trial("control::exit 3 without a daemon", nobody_there),
        trial("control::exit 4 for other users", not_permitted),
        trial("control::JSON shapes", shapes),
        trial("control::errors as JSON", json_errors),
        trial("control::adding again changes nothing", idempotent),
        trial("control::all prefixes or none", all_or_none),
        trial("control::a conflict names both rules", conflict),
        trial("control::selectors of remove-prefix", narrowing),
        trial("control::services in use stay", services),
        trial("control::refused for safety", safety),
        trial("control::peers of the host are not cut off", peers),
        trial("control::sockets that others remove come back", removed_sockets),
        trial("control::wrong values in plain words", plain_words),
    ]
}

pub(crate) fn start() -> Daemon {
    Daemon::start(&Netns::new(), "sk-lookup")
}

/// Asserts that `text` has all of `parts`.
pub(crate) fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing from: {text}");
    }
}

fn client(arguments: &[&str]) -> Outcome {
    Outcome::of(Command::new(program("anyportctl").expect("the client")).args(arguments))
}

fn help() {
    let overview = client(&["--help"]);
    assert!(overview.status == 0, "--help: {overview}");
    assert_eq!(overview.stdout, client(&["--help"]).stdout, "--help once more");
    for words in VERBS {
        let verb = words.split(' ').next().expect("a verb");
        contains(&overview.stdout, &[verb]);
        let own = client(&[verb, "--help"]);
        assert!(own.status == 0 && own.stdout.contains("--json"), "help of {verb}: {own}");
    }
    let own = client(&["add-prefix", "--help"]).stdout;
    contains(&own, &["--protocol", "--ports", "--except", "--service", "--no-route", "--force"]);
    let nothing = client(&[]);
    assert!(nothing.status == 2 && nothing.stderr.contains("add-prefix"), "no verb: {nothing}");
}

fn nobody_there() {
    for words in VERBS {
        let arguments: Vec<&str> = words.split(' ').chain(["--socket", "/run/nobody.sock"]).collect();
        let outcome = client(&arguments);
        assert!(outcome.status == 3 && outcome.stderr.contains("/run/nobody."), "{words}: {outcome}");
    }
}

/// Neither the way to the socket nor its mode decide, but who asks.
fn not_permitted() {
    let daemon = start();
    // Wherever the programs were built, this copy can be run by everyone.
    let public = scratch();
    let ctl = public.path().join("anyportctl");
    public_copy(&program("anyportctl").expect("the client"), &ctl);
    let open_to_all = |path: &std::path::Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changing a mode");
    };
    open_to_all(public.path(), 0o755);
    let ask = |who: &[&str], words: &str| {
        let mut command = Command::new("setpriv");
        command.args(who).arg(&ctl).args(words.split(' '));
        Outcome::of(command.arg("--socket").arg(daemon.socket()))
    };
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let before = daemon.rules();
    for step in ["as it is", "open to all by its mode"] {
        for words in VERBS {
            let outcome = ask(&nobody, words);
            assert!(outcome.status == 4, "{words} by nobody, socket {step}: {outcome}");
        }
        open_to_all(daemon.socket().parent().expect("a directory"), 0o755);
        open_to_all(&daemon.socket(), 0o666);
    }
    assert_eq!(daemon.rules(), before, "rules after attempts by nobody");
    open_to_all(&daemon.socket(), 0o660);
    let (primary, supplementary) = (format!("--regid={GROUP}"), format!("--groups={GROUP}"));
    for member in [
        &["--reuid=daemon", "--regid=daemon", "--init-groups"],
        &["--reuid=65534", &primary, "--clear-groups"],
        &["--reuid=65534", "--regid=65534", &supplementary],
    ] {
        let outcome = ask(member, "add-prefix 192.0.2.0/24");
        assert!(outcome.status == 0, "add-prefix by a member of the group anyport, {member:?}: {outcome}");
    }
}

fn shapes() {
    let daemon = start();
    let status = daemon.json("status");
    assert!(status["version"].is_string() && status["backend"] == "sk-lookup", "status: {status}");
    assert_eq!(status["pid"], daemon.pid().as_raw(), "status: {status}");
    assert_eq!((&status["rules"], &status["degraded"]), (&Value::from(0), &Value::Array(vec![])), "status: {status}");
    let generation = status["generation"].as_u64().expect("a generation");
    let tried = status["backends"].as_array().expect("the back ends that were tried");
    for backend in tried {
        let complete = backend["name"].is_string()
            && (backend["usable"].is_boolean() || backend["usable"].is_null())
            && backend["reason"].is_string();
        assert!(complete, "a back end of status: {backend}");
    }
    assert_eq!(daemon.json("prefixes"), Value::Array(vec![]), "prefixes without any");

    daemon.ok("add-service echo --handler echo");
    daemon.ok("add-prefix 2001:db8:0:a::/64 --protocol both --ports 8000-8999,80,443 --except 8080 --service echo");
    daemon.ok("add-prefix 192.0.2.0/24");
    daemon.namespace().enter(|| expect_tcp_hello(at("192.0.2.7", 7)));
    let rules = daemon.json("prefixes");
    let [first, second] = &rules.as_array().expect("an array")[..] else { panic!("two rules, but {rules}") };
    let keys: Vec<&String> = first.as_object().expect("an object").keys().collect();
    for key in ["prefix", "protocol", "ports", "except", "service", "origin", "steered", "dropped"] {
        assert!(keys.iter().any(|name| *name == key), "no {key} in {first}");
    }
    let of = |prefix: &str| if first["prefix"] == prefix { first } else { second };
    let wide = of("192.0.2.0/24");
    for (key, value) in
        [("protocol", "tcp"), ("ports", "1-65535"), ("except", ""), ("service", "default"), ("origin", "added")]
    {
        assert_eq!(wide[key], value, "{key} of {wide}");
    }
    assert_eq!((&wide["steered"], &wide["dropped"]), (&Value::from(1), &Value::from(0)), "counters of {wide}");
    let narrow = of("2001:db8:0:a::/64");
    for (key, value) in [("protocol", "both"), ("ports", "80,443,8000-8999"), ("except", "8080"), ("service", "echo")] {
        assert_eq!(narrow[key], value, "{key} of {narrow}");
    }

    let services = daemon.json("services");
    let names: Vec<&Value> = services.as_array().expect("an array").iter().map(|service| &service["name"]).collect();
    assert_eq!(names, ["default", "echo"], "services");
    for service in services.as_array().expect("an array") {
        assert!(
            service["handler"].is_string() && service["active"].is_u64() && service["accepted"].is_u64(),
            "{service}"
        );
        for socket in service["sockets"].as_array().expect("sockets") {
            let texts = ["family", "protocol", "local"].iter().all(|key| !socket[*key].is_null());
            assert!(texts && socket["cookie"].is_u64() && socket["pid"] == daemon.pid().as_raw(), "{socket}");
        }
    }
    let later = daemon.json("status");
    assert!(later["generation"].as_u64() > Some(generation) && later["rules"] == 2, "status after changes: {later}");
    for words in ["prefixes", "services", "status"] {
        assert!(!daemon.ok(words).starts_with(['{', '[']), "`{words}` for people is not JSON");
    }
}

fn json_errors() {
    let daemon = start();
    for (words, status) in [("add-prefix 192.0.2.1/24 --json", 2), ("remove-prefix 192.0.2.0/24 --json", 1)] {
        let text = daemon.refused(words, status);
        let error: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{words}: {text:?}: {error}"));
        assert!(error["error"].is_string() && error["hint"] != "", "{words}: {error}");
    }
}

fn idempotent() {
    let daemon = start();
    let words = "add-prefix 192.0.2.0/24 2001:db8:0:a::/64 --protocol both --ports 80,443 --except 443";
    daemon.ok(words);
    let (rules, status) = (daemon.rules(), daemon.json("status"));
    assert!(!rules.is_empty(), "rules after {words}");
    for same in
        [words, "add-prefix 2001:db8::a:0:0:0:0/64 192.0.2.0/24 --protocol both --ports 443,80-80 --except 443-443"]
    {
        daemon.ok(same);
        assert_eq!(daemon.rules(), rules, "rules after {same}");
        assert_eq!(daemon.json("status")["generation"], status["generation"], "generation after {same}");
    }
}

fn all_or_none() {
    let topology = Topology::new();
    let daemon = Daemon::start(&topology.client, "sk-lookup");
    daemon.ok("add-service one --handler echo");
    daemon.ok("add-prefix 192.0.2.0/24 --ports 1-100 --service one");
    let before = daemon.rules();
    for (words, status) in [
        ("add-prefix 203.0.113.0/24 192.0.2.1/24", 2),
        ("add-prefix 203.0.113.0/24 192.0.2.0/24 --ports 50-149", 1),
        ("add-prefix 203.0.113.0/24 198.51.100.0/30", 5),
        ("add-prefix 203.0.113.0/24 --service nobody", 1),
        ("remove-prefix 192.0.2.0/24 203.0.113.0/24", 1),
    ] {
        daemon.refused(words, status);
        assert_eq!(daemon.rules(), before, "rules after {words}");
        let routes = daemon.namespace().ip("route show table local proto 165");
        assert!(!routes.contains("203.0.113"), "routes after {words}: {routes}");
    }
}

fn conflict() {
    let daemon = start();
    daemon.ok("add-service one --handler echo");
    daemon.ok("add-prefix 192.0.2.0/24 --ports 1-100 --service one");
    let before = daemon.rules();
    let complaint = daemon.refused("add-prefix 192.0.2.0/24 --ports 50-149", 1);
    contains(&complaint, &["192.0.2.0/24", "1-100", "50-149", "one", "default"]);
    assert_eq!(daemon.rules(), before, "rules after a conflict");
    // Not the same number of ports, not the same protocol, not overlapping, or the same target: no conflict.
    daemon.ok("add-prefix 192.0.2.0/24 --ports 50-140");
    daemon.ok("add-prefix 192.0.2.0/24 --ports 50-149 --protocol udp");
    daemon.ok("add-prefix 192.0.2.0/24 --ports 1001-1100");
    daemon.ok("add-prefix 192.0.2.0/24 --ports 60-159 --service one");
}

fn narrowing() {
    let daemon = start();
    daemon.ok("add-service one --handler echo");
    for words in ["--ports 80", "--ports 443 --service one", "--ports 53 --protocol udp", "--except 22"] {
        daemon.ok(&format!("add-prefix 192.0.2.0/24 {words}"));
    }
    daemon.ok("add-prefix 192.0.2.0/25");
    let mut left = 5;
    for words in ["--ports 80", "--service one", "--protocol udp"] {
        daemon.ok(&format!("remove-prefix 192.0.2.0/24 {words}"));
        left -= 1;
        assert!(daemon.rules().len() == left, "rules after removing {words}: {:#?}", daemon.rules());
        contains(&daemon.refused(&format!("remove-prefix 192.0.2.0/24 {words}"), 1), &["192.0.2.0/24"]);
    }
    daemon.ok("remove-prefix 192.0.2.0/24");
    let rules = daemon.rules();
    assert!(rules.len() == 1 && rules[0].contains("192.0.2.0/25"), "rules at the end: {rules:#?}");
}

fn services() {
    let daemon = start();
    daemon.ok("add-service one --handler discard --banner welcome");
    daemon.ok("add-prefix 192.0.2.0/24 --service one");
    contains(&daemon.refused("remove-service one", 1), &["one", "192.0.2.0/24"]);
    contains(&daemon.refused("add-service one --handler echo", 1), &["one"]);
    daemon.ok("remove-prefix 192.0.2.0/24");
    daemon.ok("remove-service one");
    contains(&daemon.refused("remove-service one", 1), &["one"]);
    contains(&daemon.refused("add-prefix 192.0.2.0/24 --service one", 1), &["one"]);
}

/// The client's host of the topology has an address, a listener and a gateway to lose.
fn safety() {
    let topology = Topology::new();
    topology.client.enter(|| tcp_server(at("198.51.100.1", 2222), "the way in\n"));
    let daemon = Daemon::start(&topology.client, "sk-lookup");
    for prefix in ["198.51.100.1/32", "198.51.100.0/24", "2001:db8:c::/64", "127.0.0.0/8", "::1"] {
        contains(
            &daemon.refused(&format!("add-prefix {prefix}"), 5),
            &["--force", prefix.split('/').next().expect("")],
        );
    }
    contains(&daemon.refused("add-prefix 198.51.100.0/24", 5), &["2222"]);
    for prefix in ["198.51.100.2", "2001:db8:c::2", "0.0.0.0/0", "::/0"] {
        contains(&daemon.refused(&format!("add-prefix {prefix}"), 5), &["--force"]);
    }
    assert!(daemon.rules().is_empty(), "rules after refusals: {:?}", daemon.rules());
    daemon.ok("add-prefix 198.51.100.1 --ports 80 --force");
    topology.host.enter(|| expect_tcp_hello(at("198.51.100.1", 80)));
    let text = topology.host.enter(|| anyport_tests::dial::tcp_text(at("198.51.100.1", 2222)));
    assert_eq!(text.expect("the host's listener beside the rule"), "the way in\n");
}

/// A server that the host talks to, and an upstream that it is to talk to.
fn peers() {
    let topology = Topology::new();
    let daemon = Daemon::start(&topology.host, "sk-lookup");
    for (server, upstream) in SERVER.into_iter().zip(SECOND) {
        let address = at(server, 2222);
        let listener = topology.server.enter(|| TcpListener::bind(address).expect("a server"));
        let held = topology.host.enter(|| tcp(address).expect("a connection of the host"));
        let connection = format!("the other end of the connection tcp {address}");
        contains(&daemon.refused(&format!("add-prefix {server}"), 5), &[server, &connection, "--force"]);
        contains(&daemon.refused(&format!("add-prefix {server}"), 5), &[&format!("the neighbour {server} on ")]);
        drop((held, listener));
        let service = if server.contains(':') { "six" } else { "four" };
        let to = at(upstream, 80);
        daemon.ok(&format!("add-service {service} --handler forward --upstream {to}"));
        let named = format!("the upstream of the service {service} {upstream}");
        contains(&daemon.refused(&format!("add-prefix {upstream}"), 5), &[&named]);
        // Without a route the host still reaches all of them.
        daemon.ok(&format!("add-prefix {server} {upstream} --no-route"));
        daemon.ok(&format!("remove-prefix {server} {upstream}"));
        daemon.ok(&format!("add-prefix {server} --force"));
    }
}

/// One file, and the directory with all of them, which the test's own daemon may make again.
fn removed_sockets() {
    let mut daemon = start();
    let (socket, registering) = (daemon.socket(), daemon.socket().with_extension("register.sock"));
    assert!(registering.exists(), "the socket for registering is not at {}", registering.display());
    for path in [&socket, &registering] {
        fs::remove_file(path).expect("a socket to remove");
    }
    let back =
        || (daemon.ctl(&["status"]).status == 0 && registering.exists()).then_some(()).ok_or_else(|| daemon.log());
    wait_for("sockets that are put back", Duration::from_secs(10), back);
    contains(&daemon.log(), &["was removed by others and is put back"]);
    contains(&daemon.ok("status"), &["all is well"]);
    // What others put there is left alone, and said to clients that come in another way.
    fs::remove_file(&registering).expect("a socket to remove");
    fs::write(&registering, "mine").expect("a file of another's");
    wait_for("a complaint", Duration::from_secs(10), || {
        let status = daemon.ok("status");
        if status.contains("another file has its name") { Ok(()) } else { Err(status) }
    });
    daemon.stop();
    assert_eq!(fs::read_to_string(&registering).expect("another's file"), "mine");
}

/// No names of types of the programming language, and where a wrong value comes from.
fn plain_words() {
    let daemon = || Command::new(program("anyportd").expect("the daemon"));
    let directory = scratch();
    let file = directory.path().join("anyport.toml");
    let of_file = |text: &str| {
        fs::write(&file, text).expect("a configuration");
        Outcome::of(daemon().args(["--check", "--config"]).arg(&file))
    };
    let wrong = [
        (Outcome::of(daemon().args(["--workers", "0"])), "'--workers <N>': it must be a whole number from 1 on"),
        (Outcome::of(daemon().args(["--metrics", "foo"])), "an address and a port, such as 127.0.0.1:9100"),
        (
            Outcome::of(daemon().env("ANYPORT_WORKERS", "abc")),
            "of the environment variable 'ANYPORT_WORKERS': it must be",
        ),
        (Outcome::of(daemon().env("ANYPORT_WORKERS", "abc").arg("--workers=0")), "for '--workers <N>'"),
        (client(&["events", "--port", "0"]), "it must be a whole number from 1 on"),
        (client(&["prefixes", "--limit", "abc"]), "it must be a whole number"),
        (of_file("[daemon]\nworkers = 0\n"), "the number `0`, expected a whole number from 1 on"),
        (of_file("[daemon]\nkeep = \"true\"\n"), "expected true or false, without quotes"),
        (of_file("[daemon]\nkeep = yes\n"), "true, false and numbers stand without"),
        (of_file("[daemon]\nmax-connections = -1\n"), "a whole number from 1 to 4294967295"),
    ];
    for (outcome, said) in wrong {
        assert!(outcome.status == 2 && outcome.stderr.contains(said), "{said:?} is missing from: {outcome}");
        for foreign in ["nonzero", "zero for", "digit", "target type", "usize", "u32", "boolean"] {
            assert!(!outcome.stderr.contains(foreign), "{foreign:?} is in: {outcome}");
        }
    }
}
