//! With which privileges the daemon runs: as which user, with which capabilities, when, and what it says without one of them.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::Path,
    process::Command,
    time::Duration,
};

use anyport_tests::{
    daemon::{Daemon, Setup},
    dial::{PATIENCE, expect_tcp_hello, expect_udp_hello, tcp_text, tcp_within, udp},
    host::{Outcome, wait_for},
    netns::Netns,
    owners::Owner,
    prerequisites::{GROUP, USER, program, public_copy, scratch},
    topology::{CLIENT, Topology},
};
use libtest_mimic::Trial;
use nix::unistd::Pid;

use crate::cases::{Lab, at, on_each_back_end, trial};

/// By their numbers in include/uapi/linux/capability.h.
const CAPABILITIES: [(&str, u64); 5] =
    [("net_bind_service", 10), ("net_admin", 12), ("net_raw", 13), ("perfmon", 38), ("bpf", 39)];
/// The effective capabilities of threads that serve connections.
const DATA: u64 = 1 << 10 | 1 << 13;
/// Threads that need none: they listen to the keeper, answer HTTP, write the log, close what others passed, and talk to etcd.
const WITHOUT_ANY: [&str; 5] = ["anyport-keeper", "anyport-metrics", "anyport-log", "anyport-close", "anyport-fleet"];
const ADDRESSES: [&str; 2] = ["192.0.2.3", "2001:db8:0:a::3"];
const PREFIXES: &str = "192.0.2.0/24 2001:db8:0:a::/64";

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("rights::whose they are and which", held));
    trials.extend(on_each_back_end("rights::each capability taken away", taken_away));
    trials.extend(on_each_back_end("rights::an ordinary user with ambient capabilities", ordinary_user));
    trials.push(trial("rights::pins behind a directory that is closed to the user", closed_way));
    trials.push(trial("rights::another user, or root", other_users));
    trials.push(trial("rights::memory for BPF maps", memory));
    trials
}

/// The fields of a thread's state.
fn state(directory: &Path) -> BTreeMap<String, String> {
    let text =
        fs::read_to_string(directory.join("status")).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

fn set(state: &BTreeMap<String, String>, name: &str) -> u64 {
    u64::from_str_radix(&state[name], 16).expect("a set of capabilities")
}

fn threads(pid: Pid) -> Vec<BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("threads");
    tasks.flatten().map(|task| state(&task.path())).collect()
}

fn numbers(names: &[&str]) -> u64 {
    CAPABILITIES.iter().filter(|(name, _)| names.contains(name)).map(|(_, number)| 1 << number).sum()
}

fn held(backend: &'static str) {
    // With all that has a thread of its own; etcd is not there, and asked for nevertheless.
    let directory = scratch();
    let config = directory.path().join("anyport.toml");
    let fleet = "[fleet]\netcd = [\"http://127.0.0.1:2\"]\nring = \"main\"\nnode = \"n1\"\n";
    fs::write(&config, fleet).expect("a configuration");
    let options = ["--metrics", "127.0.0.1:9464", "--readers", "all"];
    let lab = Lab::with(backend, |setup| setup.config(&config).args(options));
    lab.daemon.ok(&format!("add-prefix {PREFIXES} --protocol both"));
    serve(&lab.topology);
    let all = numbers(&["net_bind_service", "net_admin", "net_raw", "perfmon", "bpf"]);
    let for_control = match backend {
        "tproxy" => numbers(&["net_bind_service", "net_admin", "net_raw"]),
        _ => numbers(&["net_bind_service", "net_admin", "net_raw", "bpf"]),
    };
    let names: Vec<_> = threads(lab.daemon.pid()).iter().map(|it| it["Name"].clone()).collect();
    for name in ["anyport-keeper", "anyport-metrics", "anyport-log", "anyport-fleet"] {
        assert!(names.iter().any(|it| it == name), "no {name} among {names:?}");
    }
    for (pid, is_server) in [(lab.daemon.keeper(), false), (lab.daemon.pid(), true)] {
        for thread in threads(pid) {
            let name = &thread["Name"];
            let is_data = name.starts_with("anyport-data");
            let (permitted, effective) = match (is_server, is_data) {
                _ if WITHOUT_ANY.contains(&name.as_str()) => (0, 0),
                (false, _) => (all, 0),
                (true, false) => (for_control, 0),
                (true, true) => (DATA, DATA),
            };
            let ids: Vec<&str> = thread["Uid"].split_whitespace().chain(thread["Gid"].split_whitespace()).collect();
            let (user, group) = (USER.to_string(), GROUP.to_string());
            assert_eq!(ids, [[user.as_str(); 4], [group.as_str(); 4]].concat(), "{name}");
            assert_eq!(set(&thread, "CapPrm"), permitted, "permitted to {name} of {backend}");
            // The control thread has them while it works, and its programs with it, as when it reads counters now and then.
            let ambient = if is_server || permitted == 0 { 0 } else { all };
            wait_for("rest of a thread", Duration::from_secs(5), || {
                let now = threads(pid).into_iter().find(|it| it["Pid"] == thread["Pid"]);
                let now = now.ok_or_else(|| format!("{name} has ended"))?;
                let now = ["CapEff", "CapAmb"].map(|name| set(&now, name));
                if now == [effective, ambient] {
                    Ok(())
                } else {
                    Err(format!("{now:?} in effect and ambient for {name}"))
                }
            });
            assert_eq!(set(&thread, "CapBnd") & !all, 0, "within reach of {name}");
            assert_eq!(thread["NoNewPrivs"], "1", "{name}");
            assert_eq!(thread["Seccomp"], if is_server { "2" } else { "0" }, "{name}");
        }
    }
}

/// TCP and UDP, over both families.
fn serve(topology: &Topology) {
    for address in ADDRESSES {
        topology.client.enter(|| expect_tcp_hello(at(address, 3_333)));
        topology.client.enter(|| expect_udp_hello(at(address, 3_333)));
    }
}

/// Each is not missed, or is named at the start, or when it is missed.
fn taken_away(backend: &'static str) {
    for (capability, _) in CAPABILITIES {
        let topology = Topology::new();
        let lists = [format!("--bounding-set=-{capability}"), format!("--inh-caps=-{capability}")];
        let wrapper = ["setpriv", &lists[0], &lists[1], "--"].map(ToOwned::to_owned);
        let setup = || Setup::new(&topology.host, backend).through(wrapper.clone());
        let named = format!("CAP_{}", capability.to_uppercase());
        let is_needed_to_start = match capability {
            "net_admin" => true,
            "bpf" | "perfmon" => backend != "tproxy",
            _ => false,
        };
        if is_needed_to_start {
            let outcome = setup().run_to_end();
            assert!(outcome.status == 1 && outcome.stderr.contains(&named), "{backend} without {named}: {outcome}");
            let routes = topology.host.ip("route show table local proto 165");
            assert!(routes.is_empty(), "routes after a start without {named}: {routes}");
            continue;
        }
        let daemon = setup().start();
        daemon.ok(&format!("add-prefix {PREFIXES} --protocol both"));
        for address in ADDRESSES {
            topology.client.enter(|| expect_tcp_hello(at(address, 80)));
        }
        let to = match capability {
            "net_raw" => at(ADDRESSES[0], 3_333),
            "net_bind_service" => at(ADDRESSES[0], 53),
            _ => {
                serve(&topology);
                continue;
            }
        };
        topology.client.enter(|| assert!(udp(to, b"question").is_err(), "an answer without {named}"));
        wait_for("complaint", PATIENCE, || {
            let log = daemon.log();
            if log.contains(&named) { Ok(()) } else { Err(log) }
        });
    }
}

/// As systemd starts it, by `User=` and `AmbientCapabilities=`.
fn ordinary_user(backend: &'static str) {
    let topology = Topology::new();
    let directory = scratch();
    let daemon = directory.path().join("anyportd");
    public_copy(&program("anyportd").expect("the program under test"), &daemon);
    let pins = Path::new("/sys/fs/bpf").join(directory.path().file_name().expect("a name")).join("pins");
    fs::create_dir_all(&pins).expect("a directory of pins");
    let state = directory.path().join("state");
    fs::create_dir(&state).expect("a state directory");
    for path in [&pins, &state] {
        chown(path, Some(USER), Some(GROUP)).expect("the user's own");
    }
    let lock = Path::new("/run/xtables.lock");
    fs::OpenOptions::new().create(true).append(true).open(lock).expect("the lock of iptables");
    chown(lock, None, Some(GROUP)).expect("the group's");
    fs::set_permissions(lock, fs::Permissions::from_mode(0o640)).expect("a mode");
    let capabilities = CAPABILITIES.map(|(name, _)| format!("+{name}")).join(",");
    let ids = [format!("--reuid={USER}"), format!("--regid={GROUP}"), "--clear-groups".to_owned()];
    let lists = [format!("--inh-caps=-all,{capabilities}"), format!("--ambient-caps=-all,{capabilities}")];
    let wrapper = [&["setpriv".to_owned()], &ids[..], &lists, &["--".to_owned()]].concat();
    let setup = Setup::new(&topology.host, backend).executable(daemon).bpffs(&pins).through(wrapper);
    let mut daemon = setup.args([Path::new("--state-dir"), &state]).start();
    daemon.ok(&format!("add-prefix {PREFIXES} --protocol both"));
    serve(&topology);
    let server = daemon.pid();
    nix::sys::signal::kill(server, nix::sys::signal::Signal::SIGKILL).expect("SIGKILL to the process that serves");
    daemon.wait_for_successor(server);
    serve(&topology);
    marked(&topology, &daemon);
    registered_anew(&topology, &mut daemon, backend);
    daemon.stop();
    let routes = topology.host.ip("route show table local proto 165");
    assert!(routes.is_empty(), "routes after the end: {routes}");
}

/// Answers have the mark of their service over TCP and UDP, without which they would not leave.
fn marked(topology: &Topology, daemon: &Daemon) {
    for (ip, client) in ["ip", "ip -6"].into_iter().zip(CLIENT) {
        let prohibit = format!("{ip} rule add pref 100 to {client} fwmark 0/0x10 prohibit");
        topology.host.run("sh", ["-ec", &prohibit]);
    }
    let unanswered = topology.client.enter(|| tcp_within(at(ADDRESSES[0], 80), Duration::from_millis(300)));
    assert!(unanswered.is_err(), "an answer without a mark");
    daemon.ok("add-service marked --handler hello --mark 0x10");
    daemon.ok(&format!("add-prefix {} --protocol both --service marked", ADDRESSES.join(" ")));
    serve(topology);
    for ip in ["ip", "ip -6"] {
        topology.host.run("sh", ["-ec", &format!("{ip} rule del pref 100")]);
    }
    daemon.ok(&format!("remove-prefix {}", ADDRESSES.join(" ")));
    daemon.ok("remove-service marked");
}

/// Such a user may not fetch sockets of others by himself after a stop. He says so, and takes them when they are registered again. TPROXY finds
/// them without him.
fn registered_anew(topology: &Topology, daemon: &mut Daemon, backend: &str) {
    let owner = Owner::greeter(&topology.host, "steady", "::", 0);
    daemon.ok("add-service web --handler registered");
    daemon.ok("add-prefix 192.0.2.77 --service web");
    let register = format!("register web --pid {} --fd {}", owner.pid(), owner.descriptor());
    let client = &topology.client;
    let greeting = || client.enter(|| tcp_text(at("192.0.2.77", 80))).expect("a greeting");
    daemon.ok(&register);
    assert!(greeting().starts_with("steady"));
    daemon.stop();
    daemon.restart();
    if backend == "tproxy" {
        assert!(greeting().starts_with("steady"));
        return;
    }
    let status = daemon.json("status");
    assert!(status["degraded"].to_string().contains("register it again"), "{status}");
    let served = client.enter(|| tcp_within(at("192.0.2.77", 80), Duration::from_millis(300)));
    assert!(served.is_err(), "nobody answers for it");
    daemon.ok(&register);
    assert!(greeting().starts_with("steady"));
    assert_eq!(daemon.json("status")["degraded"], serde_json::json!([]));
}

/// As systemd mounts it.
fn closed_way() {
    const CLOSED: &str = "mount --make-rprivate / && mount -t bpf -o mode=0700 bpf /sys/fs/bpf && exec \"$@\"";
    let lab = Lab::with("sk-lookup", |setup| {
        setup.bpffs("/sys/fs/bpf/anyport").through(["unshare", "--mount", "sh", "-c", CLOSED, "sh"])
    });
    lab.daemon.ok(&format!("add-prefix {PREFIXES} --protocol both"));
    serve(&lab.topology);
    let names = |path: &str| {
        let target = lab.daemon.pid().to_string();
        let outcome = Outcome::of(Command::new("nsenter").args(["--target", &target, "--mount", "ls", "-A", path]));
        assert!(outcome.status == 0, "{path}: {outcome}");
        outcome.stdout.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(names("/sys/fs/bpf"), ["anyport"], "all that it sees of what is pinned");
    assert!(names("/sys/fs/bpf/anyport").contains(&"rules".to_owned()));
}

/// Before Linux 5.11 maps count against the limit of locked memory, which is raised before the daemon becomes its user.
fn memory() {
    let wrapper = ["prlimit", "--memlock=65536:", "--"];
    let daemon = Setup::new(&Netns::new(), "sk-lookup").through(wrapper).start();
    for pid in [daemon.keeper(), daemon.pid()] {
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
        let of_memory = limits.lines().find(|line| line.starts_with("Max locked memory")).expect("that of memory");
        // Where tests run without CAP_SYS_RESOURCE, as far as is allowed.
        let limits: Vec<&str> = of_memory.split_whitespace().skip(3).take(2).collect();
        assert!(limits[0] == limits[1] && limits[0] != "65536", "{of_memory}");
    }
}

fn other_users() {
    let namespace = Netns::new();
    let uid = |daemon: &Daemon| threads(daemon.pid())[0]["Uid"].split_whitespace().next().map(ToOwned::to_owned);
    let outcome = Setup::new(&namespace, "sk-lookup").args(["--user", "no-such-user"]).run_to_end();
    assert!(outcome.status == 1 && outcome.stderr.contains("no user no-such-user"), "{outcome}");
    let outcome = Setup::new(&namespace, "sk-lookup").args(["--user", "12"]).run_to_end();
    assert!(outcome.status == 2 && outcome.stderr.contains("UID:GID"), "{outcome}");
    let daemon = Setup::new(&namespace, "sk-lookup").args(["--user", "root"]).start();
    assert!(daemon.log().contains("running as root with all of its rights"), "{}", daemon.log());
    assert_eq!(uid(&daemon).as_deref(), Some("0"));
    drop(daemon);
    let daemon = Setup::new(&namespace, "sk-lookup").args(["--user", &format!("{USER}:{GROUP}")]).start();
    assert_eq!(uid(&daemon), Some(USER.to_string()));
    drop(daemon);
    // The socket is the group's, whichever user the daemon is.
    let directory = scratch();
    chown(directory.path(), Some(65_531), Some(65_531)).expect("a directory of the user's own");
    let socket = directory.path().join("own.sock");
    let setup = Setup::new(&namespace, "sk-lookup").args(["--user", "65531:65531", "--socket"]).args([&socket]);
    let daemon = setup.launch();
    wait_for("control socket of another user", PATIENCE, || {
        let owners = fs::metadata(&socket).map(|it| (it.uid(), it.gid()));
        if matches!(owners, Ok((65_531, GROUP))) { Ok(()) } else { Err(format!("{owners:?} {}", daemon.log())) }
    });
    drop(daemon);
    // Directories of another user stay that user's.
    let outcome = Setup::new(&namespace, "sk-lookup").args(["--user", "65531:65531"]).run_to_end();
    assert!(outcome.status == 1 && outcome.stderr.contains("open the control socket"), "{outcome}");
}
