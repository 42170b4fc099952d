//! Daemons that take their rules from etcd, and go on with what they have whenever that is gone, slow, wiped, older or wrong.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyport::fleet::{
    etcd::Etcd as Client,
    layout::{Hash, Pointer, Time},
    pack::Packed,
    settings::ConnectionSettings,
};
use anyport_tests::{
    backbone::Backbone,
    daemon::{Daemon, Setup},
    dial::{expect_tcp_hello, expect_tcp_refused, tcp},
    etcd::Etcd,
    host::wait_for,
    netns::Netns,
    prerequisites::{program, scratch},
};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::cases::{at, on_each_back_end, trial};

const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("nodes::what is published is steered", follow));
    trials.push(trial("nodes::what one node refuses, the others take", refuse));
    trials.push(trial("nodes::without etcd nothing changes, at a start neither", without));
    trials.push(trial("nodes::an etcd that is frozen, cut off or compacted", apart));
    trials.push(trial("nodes::off for a thousand changes", off));
    trials.push(trial("nodes::a set is made out of the one before", derived));
    trials.push(trial("nodes::an etcd that is wiped or older", backwards));
    trials.push(trial("nodes::by TLS and signatures", trusted));
    trials
}

/// etcd, and hosts that reach it.
struct Fleet {
    etcd: Etcd,
    backbone: Backbone,
    files: tempfile::TempDir,
}

impl Fleet {
    fn new(hosts: usize) -> Self {
        let backbone = Backbone::new(hosts);
        let etcd = Etcd::start(&[backbone.center()]);
        Self { etcd, backbone, files: scratch() }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let file = self.files.path().join(name);
        fs::write(&file, text).expect("a file");
        file
    }

    /// How a daemon on a host is started, as the node `nN` of the ring `main`.
    fn setup(&self, host: usize, back_end: &str, more: &str) -> Setup {
        let etcd = self.etcd.urls();
        let text = format!("[fleet]\netcd = [\"{etcd}\"]\nring = \"main\"\nnode = \"n{host}\"\n{more}");
        Setup::new(&self.backbone.hosts[host], back_end).config(self.file(&format!("n{host}.toml"), &text))
    }

    fn node(&self, host: usize) -> Daemon {
        self.setup(host, "sk-lookup", "").start()
    }

    fn publish(&self, text: &str) {
        self.publish_as(text, &[]);
    }

    fn publish_as(&self, text: &str, options: &[&str]) {
        let set = self.file("set", text);
        let mut command = Command::new(program("anyportctl").expect("anyportctl"));
        command.env("ANYPORT_CONFIG", "/dev/null").args(["fleet", "publish"]).arg(set).args(["--ring", "main"]);
        command.args(["--force", "--etcd", &self.etcd.urls()]).args(options);
        let outcome = self.backbone.router.output(&mut command);
        assert!(outcome.status == 0, "publish: {outcome}");
    }

    /// Stores a set to which no pointer leads yet or any more.
    fn store(&self, text: &str) {
        let settings = ConnectionSettings { etcd: vec![self.etcd.urls()], ..ConnectionSettings::default() };
        let packed = Packed::new(text).expect("a set");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        self.backbone.router.enter(|| {
            runtime.block_on(async {
                let client = Client::connect(&settings.read().expect("settings"), LIMIT).await.expect("etcd");
                client.store(&packed, &mut |_, _| ()).await.expect("a set in etcd");
            });
        });
    }

    fn pointer(&self) -> Value {
        self.etcd.record("/anyport/rings/main")
    }

    fn report(&self, node: usize) -> Value {
        self.etcd.record(&format!("/anyport/nodes/main/n{node}"))
    }

    /// Waits until the pointer is active at a node and the node reports that.
    fn wait_until_current(&self, node: usize, daemon: &Daemon) {
        let pointer = self.pointer();
        wait_for("current node", LIMIT, || {
            let (fleet, report) = (fleet(daemon), self.report(node));
            let has = |it: &Value| it["sequence"] == pointer["sequence"] && it["set"] == pointer["set"];
            let is_current = has(&fleet) && has(&report) && fleet["refused"].is_null() && fleet["connected"] == true;
            if is_current { Ok(()) } else { Err(format!("{pointer}: {fleet} {report}")) }
        });
    }
}

/// `status --json` about the fleet.
fn fleet(daemon: &Daemon) -> Value {
    daemon.json("status")["fleet"].clone()
}

fn wait_for_fleet(daemon: &Daemon, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    wait_for(what, LIMIT, || {
        let fleet = fleet(daemon);
        if is_so(&fleet) { Ok(fleet) } else { Err(fleet.to_string()) }
    })
}

/// Waits until the pointer is refused for this reason, which is degraded and says so.
fn wait_until_refused(daemon: &Daemon, why: &str) {
    let refused = |fleet: &Value| fleet["refused"]["error"].as_str().is_some_and(|error| error.contains(why));
    wait_for_fleet(daemon, &format!("refusal for {why:?}"), refused);
    let degraded = daemon.json("status")["degraded"].to_string();
    assert!(degraded.contains(why), "{degraded}");
}

pub(crate) fn steers(host: &Netns, address: &str) {
    host.enter(|| expect_tcp_hello(at(address, 4_321)));
}

/// A connection that was there goes on.
fn exchange(stream: &mut TcpStream) {
    let mut answer = [0; 4];
    stream.write_all(b"ping").and_then(|()| stream.read_exact(&mut answer)).expect("an echo");
    assert_eq!(&answer, b"ping");
}

pub(crate) fn does_not_steer(host: &Netns, address: &str) {
    host.enter(|| expect_tcp_refused(at(address, 4_321)));
}

fn follow(back_end: &'static str) {
    let fleet = Fleet::new(1);
    let host = &fleet.backbone.hosts[0];
    let mut daemon = fleet.setup(0, back_end, "").start();
    assert_eq!(daemon.json("status")["degraded"].to_string(), "[]", "nothing was published yet");
    let set = "[[service]]\nname = \"back\"\nhandler = \"echo\"\n[[rule]]\nprefix = \"192.0.2.0/25\"\n\
               [[rule]]\nprefix = \"2001:db8:0:a::/64\"\nservice = \"back\"\n";
    fleet.publish(set);
    fleet.wait_until_current(0, &daemon);
    steers(host, "192.0.2.3");
    let mut stream = host.enter(|| tcp(at("2001:db8:0:a::3", 9))).expect("a connection");
    exchange(&mut stream);
    let report = fleet.report(0);
    assert_eq!((report["backend"].as_str(), report["health"].as_str()), (Some(back_end), Some("good")));
    assert_eq!(report["generation"], daemon.json("status")["generation"]);
    assert!(daemon.rules().iter().all(|rule| rule.contains("\"origin\":\"fleet\"")), "{:?}", daemon.rules());

    // What is this node's own stays apart, and what is the fleet's is not taken from a node by hand.
    daemon.ok("add-prefix 192.0.2.200/32 --service back");
    let complaint = daemon.refused("remove-prefix 192.0.2.0/25", 1);
    assert!(complaint.contains("in the fleet's set"), "{complaint}");
    assert!(daemon.refused("remove-service back", 1).contains("back"));
    fleet.publish(&set.replace("192.0.2.0/25", "192.0.2.128/26"));
    fleet.wait_until_current(0, &daemon);
    does_not_steer(host, "192.0.2.3");
    steers(host, "192.0.2.129");
    exchange(&mut stream);
    let origins: Vec<_> =
        daemon.json("prefixes").as_array().expect("rules").iter().map(|it| it["origin"].clone()).collect();
    assert_eq!(origins, ["added", "fleet", "fleet"]);

    // A service that rules of this node need does not go.
    fleet.publish("192.0.2.128/26\n");
    wait_until_refused(&daemon, "no service back");
    steers(host, "192.0.2.129");
    daemon.ok("remove-prefix 192.0.2.200/32");
    fleet.wait_until_current(0, &daemon);
    assert_eq!(daemon.json("status")["degraded"].to_string(), "[]");

    // The thread that communicates with etcd may do nothing else; another process goes on where this one was.
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("threads").flatten();
    let states: Vec<String> = tasks.filter_map(|it| fs::read_to_string(it.path().join("status")).ok()).collect();
    let agent = states.iter().find(|it| it.contains("Name:\tanyport-fleet")).expect("a thread");
    assert!(agent.contains("CapPrm:\t0000000000000000") && agent.contains("CapEff:\t0000000000000000"), "{agent}");
    let before = daemon.pid();
    let outcome = daemon.take_over(&program("anyportd").expect("anyportd"));
    assert!(outcome.status == 0, "{outcome}");
    daemon.wait_for_successor(before);
    steers(host, "192.0.2.129");
    fleet.publish("192.0.2.0/26\n");
    fleet.wait_until_current(0, &daemon);
    steers(host, "192.0.2.3");
    kill(daemon.pid(), Signal::SIGKILL).expect("a server to kill");
    daemon.wait_for_successor(Pid::from_raw(-1));
    fleet.wait_until_current(0, &daemon);
    steers(host, "192.0.2.3");
    daemon.stop();
}

fn refuse() {
    let fleet = Fleet::new(2);
    let limited = fleet
        .setup(0, "sk-lookup", "max-removal = 50\n[daemon]\nmax-rules = 4\nmetrics = \"127.0.0.1:9464\"\n")
        .start();
    let other = fleet.node(1);
    fleet.publish("192.0.2.0/26\n192.0.2.64/26\n192.0.2.128/26\n");
    let both = [(0, &limited), (1, &other)];
    for (node, daemon) in both {
        fleet.wait_until_current(node, daemon);
    }
    let published = |text: &str, why: &str| {
        fleet.publish(text);
        fleet.wait_until_current(1, &other);
        wait_until_refused(&limited, why);
        let report = fleet.report(0);
        assert!(report["refused"]["error"].as_str().is_some_and(|it| it.contains(why)), "{report}");
        assert_eq!(
            (report["health"].as_str(), report["seen"].as_u64()),
            (Some("degraded"), fleet.pointer()["sequence"].as_u64())
        );
        steers(&fleet.backbone.hosts[0], "192.0.2.3");
    };
    published("192.0.2.0/26\n", "max-removal allows 50 %");
    let expected = [
        "anyport_fleet_sequence 1",
        "anyport_fleet_seen_sequence 2",
        "anyport_fleet_refused 1",
        "anyport_fleet_connected 1",
    ];
    wait_for("metrics of it", LIMIT, || {
        let metrics = fleet.backbone.hosts[0].run("curl", ["--silent", "http://127.0.0.1:9464/metrics"]);
        let has_all = expected.iter().all(|it| metrics.lines().any(|line| line == *it));
        if has_all && metrics.contains("anyport_fleet_info{ring=\"main\",node=\"n0\"") { Ok(()) } else { Err(metrics) }
    });
    published("192.0.2.0/27\n192.0.2.64/26\n192.0.2.128/26\n192.0.2.32/27\n198.51.100.64/26\n", "the limit is 4");
    limited.ok("add-prefix 192.0.2.0/26 --ports 80 --service default");
    published(
        "[[service]]\nname = \"x\"\nhandler = \"discard\"\n[[rule]]\nprefix = \"192.0.2.0/26\"\nports = \"80\"\nservice = \"x\"\n\
               [[rule]]\nprefix = \"192.0.2.64/26\"\n[[rule]]\nprefix = \"192.0.2.128/26\"\n",
        "contradicts",
    );
    // It is safe for the other node, which has no such address.
    published("203.0.113.0/30\n192.0.2.0/26\n192.0.2.64/26\n", "refused for safety");
    let not_tried_again = fleet_generation(&limited);
    let text = fs::read_to_string(fleet.files.path().join("n0.toml")).expect("the configuration");
    fleet.file("n0.toml", &text.replace("max-removal = 50\n", ""));
    limited.ok("reload");
    fleet.publish("192.0.2.0/26\n");
    fleet.wait_until_current(0, &limited);
    does_not_steer(&fleet.backbone.hosts[0], "192.0.2.65");
    assert!(fleet_generation(&limited) <= not_tried_again + 2, "one change");
}

fn fleet_generation(daemon: &Daemon) -> u64 {
    daemon.json("status")["generation"].as_u64().expect("a generation")
}

fn without() {
    let mut fleet = Fleet::new(1);
    let host = fleet.backbone.hosts[0].clone();
    let mut daemon = fleet.node(0);
    fleet.publish("192.0.2.0/25\n");
    fleet.wait_until_current(0, &daemon);
    fleet.etcd.kill(0);
    wait_for_fleet(&daemon, "silence", |it| it["connected"] == false && it["error"].is_string());
    steers(&host, "192.0.2.3");
    daemon.ok("add-prefix 192.0.2.200/32");
    daemon.stop();
    does_not_steer(&host, "192.0.2.3");
    daemon.restart();
    // Before etcd was asked, and with all that was there.
    steers(&host, "192.0.2.3");
    let view = self::fleet(&daemon);
    assert_eq!((view["sequence"].as_u64(), view["connected"].as_bool()), (Some(1), Some(false)), "{view}");
    assert_eq!(daemon.rules().len(), 2);
    wait_for("word about it", LIMIT, || {
        let degraded = daemon.json("status")["degraded"].to_string();
        if degraded.contains("etcd has not answered since") { Ok(()) } else { Err(degraded) }
    });
    fleet.etcd.restart(0);
    fleet.publish("192.0.2.128/26\n");
    fleet.wait_until_current(0, &daemon);
    steers(&host, "192.0.2.129");
    does_not_steer(&host, "192.0.2.3");
    assert_eq!(daemon.json("status")["degraded"].to_string(), "[]");
    // Who leaves the fleet has nothing of it any more, and its own rules.
    daemon.stop();
    fleet.file("n0.toml", "");
    daemon.restart();
    does_not_steer(&host, "192.0.2.129");
    steers(&host, "192.0.2.200");
}

fn apart() {
    let fleet = Fleet::new(1);
    let host = &fleet.backbone.hosts[0];
    let daemon = fleet.node(0);
    fleet.publish("192.0.2.0/26\n");
    fleet.wait_until_current(0, &daemon);
    // Nobody waits for an etcd that does not answer.
    fleet.etcd.freeze(0);
    daemon.ok("add-prefix 192.0.2.200/32");
    steers(host, "192.0.2.3");
    fleet.etcd.thaw(0);
    fleet.backbone.cut(0);
    for sequence in 0..3 {
        fleet.publish(&format!("192.0.2.{}/26\n", 64 * (sequence % 2)));
    }
    fleet.etcd.compact();
    fleet.publish("192.0.2.128/26\n");
    fleet.etcd.compact();
    steers(host, "192.0.2.3");
    fleet.backbone.mend(0);
    fleet.wait_until_current(0, &daemon);
    steers(host, "192.0.2.129");
    // Nonsense at the pointer's place, and then none.
    let pointer = fleet.pointer();
    fleet.etcd.put("/anyport/rings/main", "no pointer");
    wait_until_refused(&daemon, "can't be read");
    steers(host, "192.0.2.129");
    fleet.etcd.put("/anyport/rings/main", &pointer.to_string());
    wait_for_fleet(&daemon, "pardon", |it| it["refused"].is_null());
}

fn off() {
    const CHANGES: u64 = 1_000;
    let fleet = Fleet::new(1);
    let mut daemon = fleet.node(0);
    fleet.publish("192.0.2.0/26\n");
    fleet.wait_until_current(0, &daemon);
    daemon.stop();
    let last = format!("192.0.2.128/26\n# {CHANGES}\n");
    fleet.backbone.router.enter(|| change_often(&fleet.etcd.urls(), CHANGES, &last));
    fleet.etcd.compact();
    daemon.restart();
    fleet.wait_until_current(0, &daemon);
    assert_eq!(self::fleet(&daemon)["sequence"], 1 + CHANGES);
    steers(&fleet.backbone.hosts[0], "192.0.2.129");
    does_not_steer(&fleet.backbone.hosts[0], "192.0.2.3");
}

/// A set that differs little comes as what it differs by, and whole where that is spoilt.
fn derived() {
    let fleet = Fleet::new(1);
    let daemon = fleet.node(0);
    let host = &fleet.backbone.hosts[0];
    let many: Vec<_> = (0..500).map(|it| format!("2001:db8:{:x}::/48 both route=no\n", it * 131)).collect();
    let set = |first: &str| format!("{first}\n{}", many.concat());
    fleet.publish(&set("192.0.2.0/26"));
    fleet.wait_until_current(0, &daemon);
    for (first, is_spoilt, steered, not) in [
        ("192.0.2.64/26", false, "192.0.2.65", "192.0.2.3"),
        ("192.0.2.128/26", true, "192.0.2.129", "192.0.2.65"),
        ("192.0.2.192/26", false, "192.0.2.193", "192.0.2.129"),
    ] {
        let before = fleet.pointer();
        daemon.pause();
        fleet.publish(&set(first));
        let pointer = fleet.pointer();
        assert_eq!(pointer["from"], before["set"], "{pointer}");
        let [from, to] = ["from", "set"].map(|name| pointer[name].as_str().expect("a hash").to_owned());
        if is_spoilt {
            fleet.etcd.put(&format!("/anyport/deltas/{to}/{from}"), "nonsense");
        } else {
            fleet.etcd.ctl(&format!("del --prefix /anyport/sets/{to}"));
        }
        daemon.resume();
        fleet.wait_until_current(0, &daemon);
        steers(host, steered);
        does_not_steer(host, not);
        // The next one is made out of this one.
        let again = fleet.etcd.keys(&format!("/anyport/sets/{to}"));
        assert_eq!(again.is_empty(), !is_spoilt, "{again:?}");
        if !is_spoilt {
            fleet.store(&set(first));
        }
    }
}

/// Changes the ring so often, each time to another set, as a program of an administrator does.
fn change_often(url: &str, changes: u64, last: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let settings = ConnectionSettings { etcd: vec![url.to_owned()], ..ConnectionSettings::default() };
        let client = Client::connect(&settings.read().expect("settings"), LIMIT).await.expect("etcd");
        let name = "main".parse().expect("a name");
        let stored = [format!("{last}# before\n"), last.to_owned()];
        let mut manifests = Vec::new();
        for text in &stored {
            let packed = Packed::new(text).expect("a set");
            manifests.push((Hash::of(text), client.store(&packed, &mut |_, _| ()).await.expect("a set in etcd")));
        }
        let mut ring = client.ring(&name).await.expect("the ring");
        for change in 0..changes {
            let (set, manifest) = manifests[usize::from((changes - change) % 2 == 1)];
            let sequence = ring.highest() + 1;
            let ring_name = name.clone();
            let pointer = Pointer {
                ring: ring_name,
                sequence,
                set,
                published: Time::now(),
                by: "t@t".into(),
                note: None,
                from: None,
                signature: None,
            };
            let swapped = client.swap(&ring, &pointer, manifest).await.expect("an answer");
            assert!(matches!(swapped, anyport::fleet::etcd::Swapped::Done(_)), "{swapped:?}");
            ring = client.ring(&name).await.expect("the ring");
        }
    });
}

fn backwards() {
    let mut fleet = Fleet::new(1);
    let host = fleet.backbone.hosts[0].clone();
    let daemon = fleet.node(0);
    fleet.publish("192.0.2.0/26\n");
    fleet.wait_until_current(0, &daemon);
    let backup = fleet.etcd.backup("one");
    fleet.publish("192.0.2.64/26\n");
    fleet.publish("192.0.2.128/26\n");
    fleet.wait_until_current(0, &daemon);
    fleet.etcd.restore(&backup);
    wait_until_refused(&daemon, "older backup");
    steers(&host, "192.0.2.129");
    wait_for("report of the refusal", LIMIT, || {
        let report = fleet.report(0);
        if report["seen"] == 3 && report["refused"]["sequence"] == 1 { Ok(()) } else { Err(report.to_string()) }
    });
    fleet.publish_as("192.0.2.192/26\n", &["--sequence", "4"]);
    assert_eq!(fleet.pointer()["sequence"], 4, "behind what nodes have seen");
    fleet.wait_until_current(0, &daemon);
    steers(&host, "192.0.2.193");
    fleet.etcd.wipe();
    wait_for_fleet(&daemon, "word about the wiped etcd", |it| it["missing"] == true);
    assert!(daemon.json("status")["degraded"].to_string().contains("no pointer"));
    steers(&host, "192.0.2.193");
    wait_for("report", LIMIT, || if fleet.report(0)["seen"] == 4 { Ok(()) } else { Err(fleet.report(0).to_string()) });
    fleet.publish_as("192.0.2.0/26\n", &["--sequence", "5"]);
    assert_eq!(fleet.pointer()["sequence"], 5);
    fleet.wait_until_current(0, &daemon);
    steers(&host, "192.0.2.3");
}

/// Made by `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout`; of use for nothing but this.
const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIGXwCDFJ7GWDWegzPm3ZnVF7aWyREplJA5wiRASP673p\n-----END PRIVATE KEY-----\n";
const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAl92CCUZLyOPqSDCRrwl6OcRyfCPtW0s0Rfuaa3g6zGw=\n-----END PUBLIC KEY-----\n";

/// etcd asks for certificates, and the node for signatures.
fn trusted() {
    let (host, files) = (Netns::new(), scratch());
    let path = |name: &str| files.path().join(name).display().to_string();
    let write = |name: &str, text: &str| {
        fs::write(path(name), text).expect("a file");
        path(name)
    };
    write_certificates(&write);
    let [ca, certificate, key] = ["ca.pem", "node.pem", "node.key"].map(path);
    let server = [("--cert-file", "etcd.pem"), ("--key-file", "etcd.key"), ("--trusted-ca-file", "ca.pem")];
    let server: Vec<String> = server.iter().map(|(option, name)| format!("{option}={}", path(name))).collect();
    let options: Vec<&str> = server.iter().map(String::as_str).chain(["--client-cert-auth"]).collect();
    let shown = [format!("--cacert={ca}"), format!("--cert={certificate}"), format!("--key={key}")];
    let etcd = Etcd::secured(&host, &options, &shown.each_ref().map(String::as_str));
    let public_key = write("public.pem", PUBLIC);
    let config = write(
        "anyport.toml",
        &format!(
            "[fleet]\netcd = [\"{}\"]\nring = \"main\"\nnode = \"n0\"\nca = \"{ca}\"\ncertificate = \"{certificate}\"\n\
             key = \"{key}\"\npublic-key = \"{public_key}\"\n",
            etcd.urls()
        ),
    );
    let setup = || Setup::new(&host, "sk-lookup").config(&config);
    // Who can't read the key says so at once, and not when nobody looks.
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("a mode");
    let outcome = setup().run_to_end();
    assert!(outcome.status != 0 && outcome.stderr.contains("node.key"), "{outcome}");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("a mode");

    let daemon = setup().start();
    let publish = |text: &str, more: &[&str]| {
        let mut command = Command::new(program("anyportctl").expect("anyportctl"));
        command.env("ANYPORT_CONFIG", "/dev/null").args([
            "fleet",
            "publish",
            &write("set", text),
            "--ring",
            "main",
            "--force",
        ]);
        command.args(["--etcd", &etcd.urls(), "--ca", &ca, "--certificate", &certificate, "--key", &key]).args(more);
        let outcome = host.output(&mut command);
        assert!(outcome.status == 0, "publish: {outcome}");
    };
    let signing_key = write("private.pem", PRIVATE);
    publish("192.0.2.0/26\n", &["--signing-key", &signing_key]);
    wait_for_fleet(&daemon, "signed set", |it| it["sequence"] == 1);
    steers(&host, "192.0.2.3");
    publish("192.0.2.64/26\n", &[]);
    wait_until_refused(&daemon, "has no signature");
    steers(&host, "192.0.2.3");
    // A pointer of another ring is none of this one's, though it is signed.
    let signed = etcd.record("/anyport/history/main/00000000000000000001").to_string();
    etcd.put("/anyport/rings/main", &signed.replace("\"main\"", "\"canary\""));
    wait_until_refused(&daemon, "the ring canary");
    publish("192.0.2.128/26\n", &["--signing-key", &signing_key]);
    wait_for_fleet(&daemon, "signed set", |it| it["sequence"] == 3 && it["refused"].is_null());
    steers(&host, "192.0.2.129");
}

/// A certificate authority, and what it says of etcd and of a node.
fn write_certificates(write: &dyn Fn(&str, &str) -> String) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let authority_key = KeyPair::generate().expect("a key");
    let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    write("ca.pem", &authority.self_signed(&authority_key).expect("a certificate").pem());
    let issuer = Issuer::new(authority, authority_key);
    for (name, address) in [("etcd", "127.0.0.1"), ("node", "node.example")] {
        let key = KeyPair::generate().expect("a key");
        let certificate = CertificateParams::new(vec![address.to_owned()]).expect("parameters");
        write(&format!("{name}.pem"), &certificate.signed_by(&key, &issuer).expect("a certificate").pem());
        write(&format!("{name}.key"), &key.serialize_pem());
    }
}
