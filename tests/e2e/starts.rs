//! What a start refuses, and what it doesn't mind.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{self, Write as _},
    net::Shutdown,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::PermissionsExt as _,
            net::{SocketAddr, UnixListener},
            process::CommandExt as _,
        },
    },
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyport_tests::{
    daemon::{Daemon, Setup},
    dial::{expect_tcp_hello, expect_tcp_refused, read_text, tcp, tcp_server, tcp_text},
    host::{Running, wait_for},
    netns::Netns,
    prerequisites::{program, public_copy, scratch},
    topology::Topology,
};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};

use crate::{
    cases::{at, on_each_back_end, trial},
    control::contains,
};

/// Has this program hold an abstract Unix socket of that name instead of running tests.
const HOLD: &str = "ANYPORT_E2E_HOLD";

/// The configuration that comes with packages.
const SAMPLE: &str = include_str!("../../docs/anyport.toml");

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("starts::a file in the place of the control socket stays", file_as_socket),
        trial("starts::a service of the configuration that is there with other settings", service_twice),
        trial("starts::a service that added rules miss", service_gone),
        trial("starts::--check without rights", check),
        trial("starts::the sample configuration", sample),
        trial("starts::the journal gets priorities", journal),
    ];
    trials.extend(on_each_back_end("starts::other users can't keep the daemon from starting", name_taken));
    trials
}

/// Standard error is what a service manager names, and then it is another file.
fn journal() {
    const OWN: &str = "export JOURNAL_STREAM=$(stat --dereference --format=%d:%i /dev/stderr); exec \"$0\" \"$@\"";
    const OTHER: &str = "export JOURNAL_STREAM=$(stat --dereference --format=%d:%i /dev/null); exec \"$0\" \"$@\"";
    let directory = scratch();
    let file = directory.path().join("anyport.toml");
    for (variable, is_journal) in [(OWN, true), (OTHER, false)] {
        let topology = Topology::new();
        let setup = || Setup::new(&topology.host, "sk-lookup").config(&file).through(["sh", "-c", variable]);
        fs::write(&file, "[daemon]\nlog-level = \"debug\"\n").expect("a configuration");
        let daemon = setup().start();
        daemon.ok("add-prefix 192.0.2.0/24");
        // Of some lines, as it is.
        fs::write(&file, "[daemon]\nkeep = nothing\n").expect("a configuration");
        kill(daemon.keeper(), Signal::SIGHUP).expect("SIGHUP to the keeper");
        wait_for("complaint", Duration::from_secs(10), || {
            if daemon.log().contains("keep = nothing") { Ok(()) } else { Err(daemon.log()) }
        });
        let log = daemon.log();
        let starts_with = |line: &str, marks: &[&str]| marks.iter().any(|mark| line.starts_with(mark));
        let marked = log.lines().filter(|line| starts_with(line, &["<3>", "<4>", "<6>", "<7>"])).count();
        let year_or_level = |line: &&str| starts_with(&line[3..], &["20", "  INFO", " INFO", "INFO", "ERROR"]);
        let is_of_error = |line: &str| line.contains("keep = nothing") && starts_with(line, &["<3>", "<4>"]);
        if is_journal {
            assert_eq!(marked, log.lines().count(), "{log}");
            assert_eq!(log.lines().find(year_or_level), None, "{log}");
            assert!(log.lines().any(is_of_error), "{log}");
            assert!(log.lines().any(|line| line.starts_with("<6>ready at ")), "{log}");
        } else {
            assert_eq!(marked, 0, "{log}");
            assert!(log.contains(" INFO ready at "), "{log}");
        }
        drop(daemon);
        // Processes that have no log say it, too.
        let outcome = setup().run_to_end();
        let expected = if is_journal { "<3>" } else { "anyportd: " };
        assert!(
            outcome.status == 2 && outcome.stderr.lines().next().is_some_and(|it| it.starts_with(expected)),
            "{outcome}"
        );
    }
}

/// Right or wrong, nothing is touched, and no privileges are needed.
fn check() {
    let directory = scratch();
    public_copy(&program("anyportd").unwrap_or_else(|missing| panic!("{missing}")), &directory.path().join("anyportd"));
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("a directory for all");
    let file = directory.path().join("anyport.toml");
    let run = |text: &str| {
        fs::write(&file, text).expect("a configuration");
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "--bounding-set=-all",
            "--inh-caps=-all",
        ]);
        command.arg("--").arg(directory.path().join("anyportd")).arg("--check").arg("--config").arg(&file);
        Netns::new().output(command.args(["--socket", "/proc/nowhere/sock", "--state-dir", "/proc/nowhere"]))
    };
    let right = run(SAMPLE);
    assert!(right.status == 0 && right.stdout.contains("2 services, 2 rules"), "{right}");
    for (text, part) in [
        ("[[rule]]\nprefix = \"192.0.2.1/24\"\n", "line 2"),
        ("[[rule]]\nprefix = \"192.0.2.0/24\"\nservice = \"nobody\"\n", "nobody"),
        ("[daemons]\n", "daemons"),
    ] {
        let wrong = run(text);
        assert!(wrong.status == 2 && wrong.stderr.contains(part) && wrong.stdout.is_empty(), "{text}: {wrong}");
    }
    let absent = Setup::new(&Netns::new(), "auto").config("/proc/nowhere").args(["--check"]).run_to_end();
    assert!(absent.status == 2 && absent.stderr.contains("/proc/nowhere"), "{absent}");
}

/// What comes with a package steers as it stands.
fn sample() {
    let topology = Topology::new();
    let directory = scratch();
    let file = directory.path().join("anyport.toml");
    fs::write(&file, SAMPLE).expect("a configuration");
    let daemon = Setup::new(&topology.host, "auto").config(&file).start();
    let server = topology.host.enter(|| tcp_server(at("127.0.0.1", 8080), "upstream"));
    let trapped = topology.client.enter(|| {
        let mut stream = tcp(at("192.0.2.3", 80)).expect("a connection to the trap");
        stream.shutdown(Shutdown::Write).expect("half-close");
        read_text(&mut stream).expect("a banner")
    });
    assert_eq!(trapped, "220 ready\r\n");
    topology.client.enter(|| expect_tcp_refused(at("192.0.2.3", 22)));
    let carried = topology.client.enter(|| tcp_text(at("2001:db8:0:a::3", server.port()))).expect("an answer");
    assert_eq!(carried, "upstream");
    drop(daemon);
}

/// Whatever `--socket` names by mistake is neither removed nor changed.
fn file_as_socket() {
    let directory = scratch();
    let file = directory.path().join("precious.txt");
    fs::write(&file, "precious\n").expect("a file");
    let named = directory.path().join("directory");
    fs::create_dir(&named).expect("a directory");
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&file, &link).expect("a link");
    for path in [&file, &link, &named] {
        let setup = Setup::new(&Netns::new(), "sk-lookup").args([OsStr::new("--socket"), path.as_os_str()]);
        let outcome = setup.run_to_end();
        assert!(outcome.status == 1, "a start with --socket {}: {outcome}", path.display());
        contains(&outcome.stderr, &[&path.display().to_string()]);
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert_eq!(text, "precious\n", "{} after --socket {}", file.display(), path.display());
    }
    assert!(link.is_symlink() && named.is_dir(), "what --socket named is gone");
}

/// A daemon that has been stopped, and the configuration that it is started with next.
struct Next {
    daemon: Daemon,
    directory: tempfile::TempDir,
}

impl Next {
    /// The service `mail-trap` and a rule of it, added by hand.
    fn after_adding() -> Self {
        let mut daemon = Daemon::start(&Netns::new(), "sk-lookup");
        daemon.ok("add-service mail-trap --handler echo");
        daemon.ok("add-prefix 192.0.2.0/24 --service mail-trap");
        daemon.stop();
        Self { daemon, directory: scratch() }
    }

    fn setup(&self, configuration: &str) -> Setup {
        let file = self.directory.path().join("anyport.toml");
        fs::write(&file, configuration).expect("a configuration");
        let state = self.daemon.state();
        Setup::new(self.daemon.namespace(), "sk-lookup")
            .config(file)
            .args([OsStr::new("--state-dir"), state.as_os_str()])
    }

    fn kept(&self) -> String {
        fs::read_to_string(self.daemon.state().join("state.json")).expect("the state file")
    }

    /// The start fails with a message that has all of `parts`, and takes nothing away.
    fn refused(&self, configuration: &str, parts: &[&str]) {
        let before = self.kept();
        let outcome = self.setup(configuration).run_to_end();
        assert!(outcome.status == 1, "a start with {configuration:?} and {before}: {outcome}");
        contains(&outcome.stderr, parts);
        assert_eq!(self.kept(), before, "the state file after a start that was refused");
        let routes = self.daemon.namespace().ip("route show table local proto 165");
        assert!(routes.is_empty(), "routes after a start that was refused: {routes}");
    }
}

/// Neither of the two may win in silence. If they are the same, there is nothing to decide.
fn service_twice() {
    let next = Next::after_adding();
    for handler in ["handler = \"hello\"", "handler = \"discard\"\nbanner = \"220 ready\""] {
        next.refused(&format!("[[service]]\nname = \"mail-trap\"\n{handler}\n"), &["mail-trap", "state.json"]);
    }
    let daemon = next.setup("[[service]]\nname = \"mail-trap\"\nhandler = \"echo\"\n").start();
    let services = daemon.json("services");
    let names: Vec<_> = services.as_array().expect("an array").iter().map(|service| &service["name"]).collect();
    assert_eq!(names, ["default", "mail-trap"], "services");
    assert!(daemon.rules().len() == 1, "rules: {:?}", daemon.rules());
}

/// Rules that were added by hand are not dropped in silence when the file loses the service they steer to.
fn service_gone() {
    let edge = "[[service]]\nname = \"edge\"\nhandler = \"hello\"\n";
    let next = Next::after_adding();
    let mut daemon = next.setup(edge).start();
    daemon.ok("add-prefix 203.0.113.0/24 --service edge");
    daemon.stop();
    next.refused("", &["edge", "203.0.113.0/24", "state.json"]);
    let daemon = next.setup(edge).start();
    assert!(daemon.rules().len() == 2, "rules with the service back in the file: {:?}", daemon.rules());
    daemon.namespace().enter(|| expect_tcp_hello(at("203.0.113.3", 3)));
}

/// Names of abstract sockets belong to the process that is first. So none of them may decide whether the daemon starts.
fn name_taken(backend: &'static str) {
    let namespace = Netns::new();
    // Wherever the tests were built, this copy can be run by everyone.
    let public = scratch();
    let holder = public.path().join("holder");
    public_copy(&std::env::current_exe().expect("this program"), &holder);
    fs::set_permissions(public.path(), fs::Permissions::from_mode(0o755)).expect("changing a mode");
    let _holding = holding(&namespace, &holder, "anyportd");
    let mut daemon = Daemon::start(&namespace, backend);
    daemon.ok("add-prefix 192.0.2.0/24");
    namespace.enter(|| expect_tcp_hello(at("192.0.2.3", 3)));
    // What the name was once for still holds.
    let second = Setup::new(&namespace, backend).run_to_end();
    let named = second.stderr.contains(&daemon.pid().to_string());
    assert!(second.status == 1 && named, "a second daemon: {second}");
    daemon.stop();
}

/// A process of nobody's that has the name for as long as the value lives.
fn holding(namespace: &Netns, program: &Path, name: &str) -> Running {
    let mut command = Command::new(program);
    command.env(HOLD, name).uid(65_534).gid(65_534).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut process = Running(namespace.spawn(command));
    assert_eq!(process.first_line(), "held\n", "the process that takes the name @{name}");
    process
}

/// The name that this process is to hold, if it is not to run tests.
pub(crate) fn name_to_hold() -> Option<OsString> {
    std::env::var_os(HOLD)
}

/// Holds the abstract Unix socket `name` until standard input ends, as it does with the tests.
pub(crate) fn hold(name: &OsStr) {
    let address = SocketAddr::from_abstract_name(name.as_encoded_bytes()).expect("a name");
    let listener = UnixListener::bind_addr(&address).expect("a name that is free");
    io::stdout().write_all(b"held\n").and_then(|()| io::stdout().flush()).expect("somebody who reads");
    thread::spawn(move || listener.incoming().for_each(drop));
    io::copy(&mut io::stdin(), &mut io::sink()).expect("an input that ends");
}
