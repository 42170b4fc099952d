//! What is announced, by real BIRDs: the host's own and that of the router next to it.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::{
        fs::{PermissionsExt as _, chown},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use anyport_tests::{
    daemon::{Daemon, LogOnPanic, Setup},
    dial::{
        expect_tcp_echo, expect_tcp_hello, expect_tcp_refused, expect_udp_hello, expect_udp_unanswered, read_text, tcp,
    },
    host::{Outcome, Running, wait_for},
    netns::Netns,
    owners::Owner,
    prerequisites::{GROUP, USER, program, scratch},
    topology::{SERVER, Topology},
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};

use crate::cases::{Lab, at, on_each_back_end, trial};

/// Where metrics are served in these tests.
const METRICS: &str = "127.0.0.1:9464";
/// How long anything may take that takes no time of its own.
const LIMIT: Duration = Duration::from_secs(15);
/// What has to happen within a second; the rest is for a machine that has much else to do.
const SOON: Duration = Duration::from_secs(4);
const HOLD_DOWN: Duration = Duration::from_secs(1);

/// The other end of the sessions in the documentation.
const UPSTREAM: &str = "router id 198.51.100.1;\n\
    protocol device { }\n\
    protocol bgp node4 { local 198.51.100.1 as 64511; neighbor 198.51.100.2 as 64512; connect delay time 1; \
    connect retry time 1; error wait time 1, 1; ipv4 { import all; export none; }; }\n\
    protocol bgp node6 { local 2001:db8:c::1 as 64511; neighbor 2001:db8:c::2 as 64512; connect delay time 1; \
    connect retry time 1; error wait time 1, 1; ipv6 { import all; export none; }; }\n";

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("announce::for as long as it is served", lifetime),
        trial("announce::what follows does not withdraw", successors),
        trial("announce::a drain loses no connection", drain),
        trial("announce::a router that can't be told harms nothing", deaf),
        trial("announce::a router that has forgotten, or passes nothing on, is told of", forgetful),
        trial("announce::two daemons beside one router", shared),
        trial("announce::a start waits for the server of a killed keeper", ending),
        trial("announce::a crash that lasts withdraws", crash),
        trial("announce::a queue that does not move", queue),
    ];
    trials.extend(on_each_back_end("announce::what is drained is refused", refused));
    trials
}

/// A BIRD. Killed when dropped.
struct Bird {
    _process: Running,
    directory: PathBuf,
}

impl Bird {
    fn start(namespace: &Netns, directory: &Path, config: &str) -> Self {
        fs::create_dir_all(directory).expect("a directory");
        chown(directory, user_of_bird(), None).expect("a directory of BIRD's own");
        fs::write(directory.join("bird.conf"), config).expect("a configuration of BIRD");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "bird", "-f", "-u", "bird", "-g", "bird", "-c", "bird.conf"]);
        command.args(["-s", "bird.ctl", "-P", "pid"]).current_dir(directory);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let log = fs::File::options().create(true).append(true).open(directory.join("log")).expect("a log");
        command.stderr(log);
        let bird = Self { _process: Running(namespace.spawn(command)), directory: directory.to_owned() };
        wait_for("BIRD that answers", LIMIT, || match bird.ask("show status") {
            outcome if outcome.status == 0 => Ok(()),
            outcome => Err(outcome.to_string()),
        });
        bird
    }

    fn ask(&self, what: &str) -> Outcome {
        let mut command = Command::new("birdc");
        command.arg("-s").arg(self.directory.join("bird.ctl")).args(what.split(' '));
        Outcome::of(&mut command)
    }

    /// The routes that it has of the others, each as a line with the time since when.
    fn routes(&self) -> Vec<String> {
        let shown = self.ask("show route");
        shown.stdout.lines().filter(|line| line.contains('/')).map(|line| line.trim().to_owned()).collect()
    }

    fn knows(&self, prefix: &str) -> bool {
        self.routes().iter().any(|line| line.starts_with(&format!("{prefix} ")))
    }

    /// Waits until it has exactly these, and says how long that took.
    fn wait_for(&self, prefixes: &[&str]) -> Duration {
        let begin = Instant::now();
        wait_for(&format!("routes to {prefixes:?}"), LIMIT, || {
            let routes = self.routes();
            let is_so = routes.len() == prefixes.len() && prefixes.iter().all(|prefix| self.knows(prefix));
            if is_so { Ok(()) } else { Err(routes.join("\n")) }
        });
        begin.elapsed()
    }
}

fn user_of_bird() -> Option<u32> {
    let user = nix::unistd::User::from_name("bird").expect("the users of this machine");
    user.map(|user| user.uid.as_raw())
}

/// The configuration of BIRD that the documentation shows, with its file elsewhere.
fn documented(directory: &Path) -> String {
    let text = include_str!("../../docs/announce.md");
    let (_, rest) = text.split_once("```text\n").expect("a configuration of BIRD");
    let (config, _) = rest.split_once("```").expect("its end");
    config.replace("/run/anyport", directory.to_str().expect("a path"))
}

/// A node with its router, and the router next to it.
struct Site {
    topology: Topology,
    daemon: Daemon,
    node: Option<Bird>,
    upstream: Bird,
    directory: tempfile::TempDir,
}

impl Site {
    fn new(announce: &str) -> Self {
        let topology = Topology::new();
        let directory = scratch();
        let path = directory.path();
        chown(path, Some(USER), Some(GROUP)).expect("a directory of the daemon's own");
        let upstream = Bird::start(&topology.client, &path.join("upstream"), UPSTREAM);
        let node = Bird::start(&topology.host, &path.join("node"), &documented(path));
        let config = format!(
            "[announce]\nfile = \"{0}/announced.conf\"\nreload = \"{0}/node/bird.ctl\"\nhold-down = \"1s\"\n{announce}\n",
            path.display()
        );
        fs::write(path.join("anyport.toml"), config).expect("a configuration");
        let setup = Setup::new(&topology.host, "sk-lookup").config(path.join("anyport.toml"));
        let setup = setup.args(["--metrics", METRICS]);
        let daemon = setup.start();
        Self { topology, daemon, node: Some(node), upstream, directory }
    }

    fn start_bird(&mut self) {
        let path = self.directory.path();
        self.node = Some(Bird::start(&self.topology.host, &path.join("node"), &documented(path)));
    }

    /// Waits until the metrics say whether the router has been told.
    fn wait_for_told(&self, is_told: bool) {
        let expected = format!("\nanyport_announce_told {}\n", u8::from(is_told));
        wait_for("metric", LIMIT, || {
            let text = self.topology.host.enter(|| {
                let mut stream = tcp(METRICS.parse().expect("an address")).expect("a connection");
                stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("a request");
                read_text(&mut stream).expect("an answer")
            });
            if text.contains(&expected) { Ok(()) } else { Err(text) }
        });
    }

    /// A process that serves `web`.
    fn owner(&self) -> Owner {
        let owner = Owner::greeter(&self.topology.host, "web", "127.0.0.1", 0);
        self.daemon.ok(&format!("register web --pid {} --listen tcp:127.0.0.1:{}", owner.pid(), owner.port()));
        owner
    }
}

fn degraded(daemon: &Daemon) -> String {
    daemon.json("status")["degraded"].to_string()
}

fn wait_for_degraded(daemon: &Daemon, text: &str) {
    wait_for("complaint of status", LIMIT, || {
        let degraded = degraded(daemon);
        if degraded.contains(text) { Ok(()) } else { Err(degraded) }
    });
}

/// What `status` says of a prefix.
fn state(daemon: &Daemon, prefix: &str) -> String {
    let status = daemon.json("status");
    let prefixes = status["announce"]["prefixes"].as_array().expect("prefixes");
    let prefix = prefixes.iter().find(|it| it["prefix"] == prefix).expect("the prefix");
    format!("{}: {}", prefix["state"].as_str().expect("a state"), prefix["why"].as_str().unwrap_or_default())
}

/// Announced when served, withdrawn when its service loses its last socket or upstream, held down when it comes back.
fn lifetime() {
    let site = Site::new(
        "prefixes = [\"192.0.2.0/25\", \"2001:db8:a::/48\", \"203.0.113.128/25\"]\nrules-within = [\"192.0.2.128/25\"]",
    );
    let Site { daemon, upstream, topology, .. } = &site;
    let _log = LogOnPanic(daemon);
    assert_eq!(state(daemon, "192.0.2.0/25"), "unserved: no rule steers any of it");
    let begin = Instant::now();
    daemon.ok("add-prefix 192.0.2.7/32 192.0.2.16/28 2001:db8:a::/48");
    upstream.wait_for(&["192.0.2.0/25", "2001:db8:a::/48"]);
    assert!(begin.elapsed() >= HOLD_DOWN, "{:?} after it was served", begin.elapsed());

    daemon.ok("add-service web --handler registered");
    daemon.ok("add-prefix 203.0.113.128/25 --service web");
    let no_socket = "unserved: service web has no live socket for tcp over IPv4";
    wait_for("verdict", LIMIT, || match state(daemon, "203.0.113.128/25") {
        state if state == no_socket => Ok(()),
        state => Err(state),
    });
    // Each time that it was withdrawn takes longer.
    for hold_down in [HOLD_DOWN, HOLD_DOWN, HOLD_DOWN * 2] {
        let owner = site.owner();
        let registered = Instant::now();
        upstream.wait_for(&["192.0.2.0/25", "2001:db8:a::/48", "203.0.113.128/25"]);
        assert!(registered.elapsed() >= hold_down, "{:?} rather than {hold_down:?}", registered.elapsed());
        drop(owner);
        let took = upstream.wait_for(&["192.0.2.0/25", "2001:db8:a::/48"]);
        eprintln!("withdrawn {took:?} after the last socket was closed");
        assert!(took < SOON, "withdrawn {took:?} after the last socket was closed");
    }
    assert_eq!(state(daemon, "203.0.113.128/25"), no_socket);

    let server = topology.server.enter(|| TcpListener::bind(at(SERVER[0], 8080)).expect("a server"));
    let check = "--health-check=interval=100ms,timeout=100ms,rise=1,fall=2";
    daemon.ok(&format!("add-service edge --handler forward --upstream {}:8080 {check}", SERVER[0]));
    daemon.ok("add-prefix 192.0.2.130/32 --service edge");
    upstream.wait_for(&["192.0.2.0/25", "2001:db8:a::/48", "192.0.2.130/32"]);
    drop(server);
    let took = upstream.wait_for(&["192.0.2.0/25", "2001:db8:a::/48"]);
    eprintln!("withdrawn {took:?} after the last upstream was gone");
    assert!(took < SOON, "withdrawn {took:?} after the last upstream was gone");
    assert_eq!(state(daemon, "192.0.2.130/32"), "unserved: service edge has no upstream that is up");

    daemon.ok("remove-prefix 2001:db8:a::/48");
    upstream.wait_for(&["192.0.2.0/25"]);
    // One rule of the prefix is not served.
    daemon.ok("add-prefix 192.0.2.64/28 --service web");
    upstream.wait_for(&[]);
    let config = fs::read_to_string(site.directory.path().join("anyport.toml")).expect("the configuration");
    fs::write(site.directory.path().join("anyport.toml"), format!("{config}needs = \"any\"\n")).expect("another one");
    assert!(daemon.ok("reload").contains("announce.needs: all -> any"));
    upstream.wait_for(&["192.0.2.0/25"]);
}

/// Restarts, upgrades and crashes of the daemon, and of BIRD; and what a stop does.
fn successors() {
    let mut site = Site::new("prefixes = [\"192.0.2.0/24\"]");
    site.daemon.ok("add-prefix 192.0.2.0/24");
    site.upstream.wait_for(&["192.0.2.0/24"]);
    // With the time at which it came.
    let before = site.upstream.routes();
    for way in ["upgrade", "crash"] {
        let pid = site.daemon.pid();
        if way == "crash" {
            kill(pid, Signal::SIGKILL).expect("SIGKILL to the process that serves");
        } else {
            let outcome = site.daemon.take_over(&program("anyportd").expect("the program"));
            assert!(outcome.status == 0, "{outcome}");
        }
        site.daemon.wait_for_successor(pid);
        sleep(HOLD_DOWN);
        assert_eq!(site.upstream.routes(), before, "after the {way}");
        assert_eq!(state(&site.daemon, "192.0.2.0/24"), "announced: ");
    }
    site.node = None;
    site.upstream.wait_for(&[]);
    site.daemon.ok("add-prefix 203.0.113.128/25");
    site.start_bird();
    site.upstream.wait_for(&["192.0.2.0/24"]);
    wait_for("end of complaints", LIMIT, || match degraded(&site.daemon) {
        none if none == "[]" => Ok(()),
        degraded => Err(degraded),
    });
    site.daemon.stop();
    site.upstream.wait_for(&[]);
    site.daemon.restart();
    site.upstream.wait_for(&["192.0.2.0/24"]);
}

fn drain() {
    let mut site = Site::new("prefixes = [\"192.0.2.0/24\"]");
    site.daemon.ok("add-service echo --handler echo");
    site.daemon.ok("add-prefix 192.0.2.0/24 --service echo");
    site.upstream.wait_for(&["192.0.2.0/24"]);
    let client = site.topology.client.clone();
    let to = at("192.0.2.7", 80);
    let mut open = client.enter(|| tcp(to).expect("a connection"));
    let mut talk = move || {
        open.write_all(b"still there?").expect("a way");
        let mut answer = [0; 12];
        open.read_exact(&mut answer).expect("an answer");
    };
    talk();
    scope(|scope| {
        let drained = scope.spawn(|| site.daemon.ok("drain --wait 2s"));
        site.upstream.wait_for(&[]);
        assert!(!drained.is_finished(), "others have their time");
        client.enter(|| expect_tcp_echo(tcp(to).expect("newcomers are served meanwhile"), b"in time"));
        talk();
        let told = drained.join().expect("the end of the drain");
        assert!(told.contains("drained the node: 1 connections are left"), "{told}");
    });
    client.enter(|| expect_tcp_refused(to));
    talk();
    assert_eq!(state(&site.daemon, "192.0.2.0/24"), "drained: ");
    assert!(site.daemon.ok("status").contains("drained     the node: new connections are refused"));
    let outcome = site.daemon.take_over(&program("anyportd").expect("the program"));
    assert!(outcome.status == 0, "{outcome}");
    client.enter(|| expect_tcp_refused(to));
    talk();
    site.daemon.stop();
    site.daemon.restart();
    client.enter(|| expect_tcp_refused(to));
    assert!(!site.upstream.knows("192.0.2.0/24"));
    site.daemon.ok("undrain");
    client.enter(|| expect_tcp_echo(tcp(to).expect("it is served again"), b"again"));
    site.upstream.wait_for(&["192.0.2.0/24"]);
    site.daemon.refused("undrain", 0);
    site.daemon.refused("undrain --service echo", 1);

    // A router that can't be told is waited for.
    site.node = None;
    let complaint = site.daemon.refused("drain 192.0.2.0/24 --wait 1s", 1);
    assert!(complaint.contains("the router has not withdrawn it yet") && complaint.contains("bird.ctl"), "{complaint}");
    client.enter(|| expect_tcp_echo(tcp(to).expect("it is served meanwhile"), b"meanwhile"));
    site.start_bird();
    wait_for("refusals", LIMIT, || match client.enter(|| tcp(to)) {
        Err(_) => Ok(()),
        Ok(_) => Err("it is served".to_owned()),
    });
    assert!(!site.upstream.knows("192.0.2.0/24"));
}

/// Neither file nor router can be had; then the router does not read the file.
fn deaf() {
    let site = Site::new("prefixes = [\"192.0.2.0/24\"]");
    let directory = site.directory.path();
    chown(directory, Some(0), Some(0)).expect("a directory of root's");
    site.daemon.ok("add-prefix 192.0.2.0/24");
    wait_for_degraded(&site.daemon, "announcing: write");
    assert!(degraded(&site.daemon).contains("Permission denied"), "{}", degraded(&site.daemon));
    site.topology.client.enter(|| expect_tcp_hello(at("192.0.2.7", 80)));
    chown(directory, Some(USER), Some(GROUP)).expect("a directory of the daemon's own");
    site.upstream.wait_for(&["192.0.2.0/24"]);

    let config = directory.join("node/bird.conf");
    fs::write(&config, documented(directory).replace("protocol device", "protocol devise")).expect("a mistake");
    site.daemon.ok("remove-prefix 192.0.2.0/24");
    wait_for_degraded(&site.daemon, "it says: bird.conf:3:");
    let told = site.daemon.json("status")["announce"]["told"].clone();
    assert_eq!(told, false, "the router announces what is not served");
    fs::write(&config, documented(directory).replace("include", "# include")).expect("another mistake");
    wait_for_degraded(&site.daemon, "its configuration has to include");
    fs::write(&config, documented(directory)).expect("the configuration");
    site.upstream.wait_for(&[]);
    wait_until_well(&site.daemon);
    let socket = directory.join("node/bird.ctl");
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o600)).expect("a socket for BIRD alone");
    site.daemon.ok("add-prefix 192.0.2.0/24");
    wait_for_degraded(&site.daemon, "anyportd's user has to be a member of the socket's group");
}

fn wait_until_well(daemon: &Daemon) {
    wait_for("end of complaints", LIMIT, || match degraded(daemon) {
        none if none == "[]" => Ok(()),
        degraded => Err(degraded),
    });
}

/// Though nothing changes on this side, the router is asked whether it has what it was told.
fn forgetful() {
    let mut site = Site::new("prefixes = [\"192.0.2.0/24\"]");
    site.daemon.ok("add-prefix 192.0.2.0/24");
    site.upstream.wait_for(&["192.0.2.0/24"]);
    // It dies, and comes back with a configuration that some other program has made.
    site.node = None;
    wait_for_degraded(&site.daemon, "BIRD at ");
    site.wait_for_told(false);
    let shown = site.daemon.ok("status");
    assert!(shown.contains("announced   unknown, 1 of 1 prefixes are to be"), "{shown}");
    let directory = site.directory.path().join("node");
    let without = documented(site.directory.path()).replace("include", "# include").replace("if proto", "# if proto");
    site.node = Some(Bird::start(&site.topology.host, &directory, &without));
    wait_for_degraded(&site.daemon, "its configuration has to include");
    drop(site.node.take());
    site.start_bird();
    site.upstream.wait_for(&["192.0.2.0/24"]);
    wait_until_well(&site.daemon);
    site.wait_for_told(true);
    let shown = site.daemon.ok("status");
    assert!(shown.contains("announced   1 of 1 prefixes"), "{shown}");
    // It has the prefix, and an export filter keeps it.
    let filtered = documented(site.directory.path()).replace("then accept", "then reject");
    fs::write(directory.join("bird.conf"), &filtered).expect("another filter");
    let node = site.node.as_ref().expect("the router");
    assert!(node.ask("configure").stdout.contains("Reconfigured"));
    site.upstream.wait_for(&[]);
    wait_for_degraded(&site.daemon, "BIRD exports 0 of 1 prefixes of IPv4 to each of its sessions at most (upstream4");
    fs::write(directory.join("bird.conf"), documented(site.directory.path())).expect("the configuration");
    node.ask("configure");
    site.upstream.wait_for(&["192.0.2.0/24"]);
    wait_until_well(&site.daemon);
    // Nobody is there to tell.
    node.ask("disable upstream4");
    node.ask("disable upstream6");
    wait_for_degraded(&site.daemon, "no session with another router that is up: upstream4, upstream6");
    // Who can't withdraw says so before he goes.
    site.node = None;
    site.daemon.stop();
    let log = site.daemon.log();
    assert!(log.contains("stopping although the router may announce what is not served any more"), "{log}");
}

fn shared() {
    let site = Site::new("prefixes = [\"192.0.2.0/25\"]");
    site.daemon.ok("add-prefix 192.0.2.0/25");
    site.upstream.wait_for(&["192.0.2.0/25"]);
    let path = site.directory.path();
    let second = |name: &str, protocol: &str| {
        let config = format!(
            "[announce]\nfile = \"{0}/announced-{name}.conf\"\nreload = \"{0}/node/bird.ctl\"\nhold-down = \"1s\"\n\
             prefixes = [\"192.0.2.128/25\"]\n{protocol}",
            path.display()
        );
        let file = path.join(format!("{name}.toml"));
        fs::write(&file, config).expect("a configuration");
        let neighbour = Netns::new();
        let daemon = Setup::new(&neighbour, "sk-lookup").config(file).start();
        daemon.ok("add-prefix 192.0.2.128/25");
        (neighbour, daemon)
    };
    let (_namespace, same_name) = second("same", "");
    wait_for_degraded(&same_name, "already defined");
    wait_for_degraded(&same_name, "announce.protocol");
    drop(same_name);
    fs::remove_file(path.join("announced-same.conf")).expect("the file that is one too many");
    let (_namespace, other_name) = second("other", "protocol = \"edge_\"\n");
    // The filter of the documentation names the first one's alone.
    wait_for_degraded(&other_name, "export filters have to accept edge_4");
    let config = documented(path).replace("proto = \"anyport4\"", "proto = \"anyport4\" || proto = \"edge_4\"");
    fs::write(path.join("node/bird.conf"), config).expect("a filter for both");
    site.node.as_ref().expect("the router").ask("configure");
    site.upstream.wait_for(&["192.0.2.0/25", "192.0.2.128/25"]);
    wait_until_well(&other_name);
    wait_until_well(&site.daemon);
    drop(other_name);
    site.daemon.ok("remove-prefix 192.0.2.0/25");
    wait_for("withdrawal", LIMIT, || {
        let routes = site.upstream.routes();
        if site.upstream.knows("192.0.2.0/25") { Err(routes.join("\n")) } else { Ok(()) }
    });
}

/// Its server ends by itself, and takes its time: the router does not answer.
fn ending() {
    let (namespace, directory) = (Netns::new(), scratch());
    let path = directory.path();
    chown(path, Some(USER), Some(GROUP)).expect("a directory of the daemon's own");
    let _mute = UnixListener::bind(path.join("bird.ctl")).expect("a socket");
    fs::set_permissions(path.join("bird.ctl"), fs::Permissions::from_mode(0o666)).expect("a socket for all");
    let config = format!(
        "[announce]\nfile = \"{0}/announced.conf\"\nreload = \"{0}/bird.ctl\"\nprefixes = [\"192.0.2.0/24\"]\n",
        path.display()
    );
    fs::write(path.join("anyport.toml"), config).expect("a configuration");
    let first = Setup::new(&namespace, "sk-lookup").config(path.join("anyport.toml")).start();
    let begin = Instant::now();
    kill(first.keeper(), Signal::SIGKILL).expect("SIGKILL to the keeper");
    let second = Daemon::start(&namespace, "sk-lookup");
    assert!(begin.elapsed() > Duration::from_secs(2), "the server had ended before the start");
    second.ok("add-prefix 192.0.2.0/24");
    assert!(second.log().contains("which was killed, to end"), "{}", second.log());
}

fn crash() {
    let mut site = Site::new("prefixes = [\"192.0.2.0/24\"]");
    site.daemon.ok("add-prefix 192.0.2.0/24");
    site.upstream.wait_for(&["192.0.2.0/24"]);
    let state = site.daemon.state().join("state.json");
    let good = fs::read(&state).expect("the state");
    fs::write(&state, "spoilt").expect("a state that can't be read");
    let begin = Instant::now();
    kill(site.daemon.pid(), Signal::SIGKILL).expect("SIGKILL to the process that serves");
    sleep(Duration::from_secs(5));
    assert!(site.upstream.knows("192.0.2.0/24"), "withdrawn {:?} after the crash", begin.elapsed());
    site.upstream.wait_for(&[]);
    fs::write(&state, good).expect("a good state");
    wait_for("announcement", Duration::from_secs(40), || {
        if site.upstream.knows("192.0.2.0/24") { Ok(()) } else { Err(site.daemon.log()) }
    });
    // Both processes at once: nobody of ours is left to do it.
    site.daemon.kill();
    let mut command = Command::new(program("anyportd").expect("the program"));
    command.arg("--config").arg(site.directory.path().join("anyport.toml")).arg("--withdraw");
    let run = |command: &mut Command| {
        let outcome = site.topology.host.output(command);
        assert!(outcome.status == 0, "{outcome}");
    };
    run(command.env("SERVICE_RESULT", "success"));
    assert!(site.upstream.knows("192.0.2.0/24"));
    run(command.env("SERVICE_RESULT", "exit-code"));
    site.upstream.wait_for(&[]);
}

/// An owner that accepts nobody.
fn queue() {
    let directory = scratch();
    chown(directory.path(), Some(USER), Some(GROUP)).expect("a directory of the daemon's own");
    let path = directory.path().display();
    let config = format!(
        "[announce]\nprefixes = [\"192.0.2.0/24\"]\nfile = \"{path}/list\"\nformat = \"list\"\nhold-down = \"100ms\"\n"
    );
    fs::write(directory.path().join("anyport.toml"), config).expect("a configuration");
    let lab = Lab::with("sk-lookup", |setup| setup.config(directory.path().join("anyport.toml")));
    lab.daemon.ok("add-service web --handler registered");
    lab.daemon.ok("add-prefix 192.0.2.0/24 --service web");
    let owner = Owner::greeter(&lab.topology.host, "web", "127.0.0.1", 0);
    lab.daemon.ok(&format!("register web --pid {} --listen tcp:127.0.0.1:{}", owner.pid(), owner.port()));
    let wait_for_state = |expected: &str| {
        wait_for("state", LIMIT, || match state(&lab.daemon, "192.0.2.0/24") {
            state if state.starts_with(expected) => Ok(()),
            state => Err(state),
        });
    };
    wait_for_state("announced");
    let list = || fs::read_to_string(directory.path().join("list")).expect("the list");
    assert!(list().ends_with("\n192.0.2.0/24\n"), "{}", list());
    owner.signal(Signal::SIGSTOP);
    let waiting: Vec<TcpStream> =
        lab.topology.client.enter(|| (1..4).map(|port| tcp(at("192.0.2.7", port)).expect("a place")).collect());
    wait_for_state("unserved: service web: connections wait at its socket");
    assert!(!list().contains("192.0.2"), "{}", list());
    owner.signal(Signal::SIGCONT);
    wait_for_state("announced");
    drop(waiting);
}

/// By service, by prefix and all, with sockets of its own and registered ones, over a restart.
fn refused(backend: &'static str) {
    let mut lab = Lab::new(backend);
    let client = lab.topology.client.clone();
    let refused = |to: SocketAddr| client.enter(|| expect_tcp_refused(to));
    let served = |to: SocketAddr| client.enter(|| drop(tcp(to).unwrap_or_else(|error| panic!("{to}: {error}"))));
    let owner = Owner::greeter(&lab.topology.host, "web", "127.0.0.1", 0);
    lab.daemon.ok("add-service web --handler registered");
    lab.daemon.ok("add-prefix 192.0.2.0/25 --service web");
    lab.daemon.ok("add-prefix 192.0.2.128/25 2001:db8:a::/48 --protocol both");
    lab.daemon.ok(&format!("register web --pid {} --listen tcp:127.0.0.1:{}", owner.pid(), owner.port()));
    let [web, hello, v6] = [at("192.0.2.7", 80), at("192.0.2.200", 80), at("2001:db8:a::7", 80)];
    [web, hello, v6].into_iter().for_each(served);

    lab.daemon.ok("drain --service web --wait 0s");
    refused(web);
    [hello, v6].into_iter().for_each(served);
    let explained = lab.daemon.json("explain 192.0.2.7:80");
    assert_eq!((&explained["verdict"], &explained["reason"]), (&"drop".into(), &"no-socket".into()), "{explained}");
    assert!(explained["notes"].to_string().contains("is drained") && explained["service"] == "web", "{explained}");
    lab.daemon.ok("drain 192.0.2.128/25 --wait 0s");
    [web, hello].into_iter().for_each(refused);
    client.enter(|| assert!(expect_udp_unanswered(at("192.0.2.200", 53))));
    served(v6);
    assert!(lab.daemon.refused("drain 192.0.2.7 --wait 0s", 1).contains("no rule is about 192.0.2.7/32"));
    let listed = lab.daemon.ok("prefixes");
    assert!(listed.lines().any(|line| line.split_whitespace().skip(5).take(2).eq(["web", "drained"])), "{listed}");
    // Changes go on meanwhile, and what is new there is drained too.
    lab.daemon.ok("add-prefix 192.0.2.240/28");
    lab.daemon.ok("add-prefix 203.0.113.128/25");
    refused(at("192.0.2.241", 80));
    served(at("203.0.113.129", 80));
    lab.daemon.ok("undrain --service web");
    served(web);
    refused(hello);
    let pid = lab.daemon.pid();
    kill(pid, Signal::SIGKILL).expect("SIGKILL to the process that serves");
    lab.daemon.wait_for_successor(pid);
    refused(hello);
    served(v6);
    lab.daemon.ok("undrain 192.0.2.128/25");
    served(hello);
    served(web);
    lab.daemon.ok("drain --wait 0s");
    [web, hello, v6].into_iter().for_each(refused);
    lab.daemon.ok("undrain");
    [web, hello, v6].into_iter().for_each(served);
    client.enter(|| expect_udp_hello(at("192.0.2.200", 53)));
    assert_eq!(degraded(&lab.daemon), "[]");
    lab.daemon.stop();
}
