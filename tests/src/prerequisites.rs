//! The prerequisites of the test harness: what the machine must offer, and the process's own mounts.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, exit},
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{
        prctl::set_pdeathsig,
        resource::{Resource, getrlimit, setrlimit},
        signal::{Signal, kill},
    },
    unistd::{Pid, geteuid, getppid},
};

use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
};

use crate::{host::Outcome, netns::Netns};

/// Where the bpffs of the process is mounted after [`isolate`].
pub const BPFFS: &str = "/sys/fs/bpf";

/// The number of the group `anyport` after [`isolate`]. Its only members are the users `daemon` and `anyport`.
pub const GROUP: u32 = 64_999;
/// The number of the user `anyport` after [`isolate`]. Daemons run as this user unless a test wants something else.
pub const USER: u32 = 64_998;

/// Programs that tests start.
const TOOLS: [&str; 27] = [
    "ip",
    "ss",
    "tc",
    "haproxy",
    "dig",
    "dnsmasq",
    "etcd",
    "etcdctl",
    "nginx",
    "setpriv",
    "sh",
    "sysctl",
    "prlimit",
    "script",
    "python3",
    "bpftool",
    "nft",
    "ipset",
    "iptables-save",
    "iptables-restore",
    "ip6tables-restore",
    "bird",
    "birdc",
    "xtables-nft-multi",
    "xtables-legacy-multi",
    "systemctl",
    "dbus-daemon",
];

fn programs_missing(tools: &[&str]) -> Vec<String> {
    let search: Vec<PathBuf> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    let lacks = |tool: &&&str| !search.iter().any(|directory| directory.join(tool).is_file());
    tools.iter().filter(lacks).map(|tool| format!("the program `{tool}`")).collect()
}

/// What the tests need and this machine lacks, a line each.
pub fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    for name in ["anyportd", "anyportctl"] {
        missing.extend(program(name).err());
    }
    missing.extend(programs_missing(&TOOLS));
    // On other kernels there are no tests with them.
    if env::var_os("ANYPORT_TEST_KERNEL").is_none() {
        missing.extend(programs_missing(&["bash", "zsh", "fish", "chromium", "crun"]));
    }
    if !geteuid().is_root() {
        missing.push("root: namespaces, mounts and BPF programs are made".to_owned());
    } else if missing.is_empty() {
        missing.extend(lacking_features());
    }
    missing
}

/// Makes sure that this machine can run one of the test harness's programs without being touched by it. To be called before there is a
/// second thread.
///
/// # Errors
/// Says what is missing.
pub fn prepare() -> anyhow::Result<()> {
    let missing = missing();
    anyhow::ensure!(missing.is_empty(), "this machine lacks:\n  {}", missing.join("\n  "));
    isolate();
    Ok(())
}

/// Ends this process, and all that it has started, when `parent` ends or on SIGTERM: a run that is killed leaves neither tests nor
/// daemons. Daemons that change their user lose the signal of `setpriv --pdeathsig`. To be called after [`isolate`], and before
/// there is a second thread.
pub fn end_with(parent: Pid) {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    // Caught rather than blocked: what is started would inherit a blocked signal.
    let mut terminate = runtime.block_on(async { signal(SignalKind::terminate()) }).expect("to catch a signal");
    thread::spawn(move || {
        runtime.block_on(terminate.recv());
        // Other threads may start more meanwhile.
        for _ in 0..10 {
            for pid in descendants(Pid::this()) {
                // It may have ended.
                kill(pid, Signal::SIGKILL).ok();
            }
        }
        exit(1);
    });
    set_pdeathsig(Signal::SIGTERM).expect("a signal at the parent's end");
    assert_eq!(getppid(), parent, "the process that started the tests has ended");
}

/// The processes that this one has started, and those that they have started.
fn descendants(ancestor: Pid) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    // pid (comm) state ppid …, see proc_pid_stat(5).
    let parent = |text: String| text.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok().map(Pid::from_raw);
    let processes: Vec<(Pid, Pid)> = entries
        .filter_map(|it| {
            let pid = it.file_name().to_str()?.parse().ok().map(Pid::from_raw)?;
            Some((pid, parent(fs::read_to_string(it.path().join("stat")).ok()?)?))
        })
        .collect();
    let mut found = vec![ancestor];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(processes.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found.split_off(1)
}

/// What the kernel lacks, tried out in a namespace.
fn lacking_features() -> Vec<String> {
    let trials = [
        ("veth interfaces", "ip link add one type veth peer name two"),
        ("xt_TPROXY for IPv4", "iptables -t mangle -A PREROUTING -p tcp -j TPROXY --on-port 1"),
        ("xt_TPROXY for IPv6", "ip6tables -t mangle -A PREROUTING -p tcp -j TPROXY --on-port 1"),
        ("REJECT for IPv4", "iptables -A INPUT -m mark --mark 1/1 -p tcp -j REJECT --reject-with tcp-reset"),
        ("REJECT for IPv6", "ip6tables -A INPUT -m mark --mark 1/1 -p tcp -j REJECT --reject-with tcp-reset"),
        ("sk_lookup programs", "bpftool feature probe kernel | grep -q 'sk_lookup is available'"),
        ("BPF type information (/sys/kernel/btf/vmlinux)", "test -r /sys/kernel/btf/vmlinux"),
    ];
    let namespace = Netns::new();
    let failed = trials.into_iter().filter_map(|(what, line)| {
        let outcome = namespace.output(Command::new("sh").args(["-c", line]));
        (outcome.status != 0).then(|| format!("{what}: `{line}` ended with {outcome}"))
    });
    failed.collect()
}

/// The program under test: `ANYPORTD` or `ANYPORTCTL` of the environment, else what stands beside this executable.
pub fn program(name: &str) -> Result<PathBuf, String> {
    let variable = name.to_uppercase();
    let candidates = match env::var_os(&variable) {
        Some(path) => vec![PathBuf::from(path)],
        None => env::current_exe()
            .map_err(|error| error.to_string())?
            .ancestors()
            .skip(1)
            .take(2)
            .map(|directory| directory.join(name))
            .collect(),
    };
    candidates.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        format!("{name}, looked for at {candidates:?}: run `cargo xtask test`, which builds it, or set {variable}")
    })
}

/// The example of the crate `anyport` that stands beside the tests.
pub fn example(name: &str) -> Result<PathBuf, String> {
    let executable = env::current_exe().map_err(|error| error.to_string())?;
    let path = executable.ancestors().nth(2).unwrap_or(&executable).join("examples").join(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("the example {name}, looked for at {}: run `cargo xtask test`, which builds it", path.display()))
    }
}

/// Gives the process mounts of its own: an empty `/run` (no lock file of iptables is shared with the host) and a
/// bpffs at [`BPFFS`]. They end with the process. To be called before there is a second thread. Also raises the limit of
/// open files, since some tests hold thousands of connections.
pub fn isolate() {
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace of its own");
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("an own /run");
    // The machine may have no user `anyport`, which is the daemon's user, and no group whose members may use the control socket.
    for (file, line) in [
        ("group", format!("anyport:x:{GROUP}:daemon")),
        ("passwd", format!("anyport:x:{USER}:{GROUP}::/nonexistent:/usr/sbin/nologin")),
    ] {
        let (own, usual) = (format!("/run/{file}"), format!("/etc/{file}"));
        let all = fs::read_to_string(&usual).expect("users and groups of this machine");
        // A router's control socket is for its group.
        let with_member = |line: &str| match line.strip_prefix("bird:x:").filter(|rest| rest.ends_with(':')) {
            Some(_) => format!("{line}anyport"),
            None => line.to_owned(),
        };
        let others: Vec<_> = all.lines().filter(|line| !line.starts_with("anyport:")).map(with_member).collect();
        fs::write(&own, format!("{}\n{line}\n", others.join("\n"))).expect("a file of users or groups");
        mount(Some(&*own), &*usual, none, MsFlags::MS_BIND, none).expect("own users and groups");
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), none).expect("a bpffs");
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of open files");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("a higher limit of open files");
}

/// Copies a program to where everyone can run it. By a process of its own: a descriptor that is open for writing in this one
/// could be inherited by what other threads start, and the program would be busy.
pub fn public_copy(program: &Path, to: &Path) {
    let status = Command::new("install").args(["-m", "755"]).args([program, to]).status().expect("install(1)");
    assert!(status.success(), "copying {} to {}: {status}", program.display(), to.display());
}

/// A directory that everybody may look into and that goes with its handle, on the process's own `/run`.
pub fn scratch() -> tempfile::TempDir {
    let mut directory = tempfile::Builder::new();
    directory.prefix("anyport-").permissions(fs::Permissions::from_mode(0o755));
    directory.tempdir_in("/run").expect("a directory in /run")
}

/// A directory of links that makes `iptables` and its relatives those of `flavour`: `nft` or `legacy`.
pub fn xtables(flavour: &str) -> tempfile::TempDir {
    let directory = scratch();
    let target = Outcome::of(Command::new("sh").args(["-c", &format!("command -v xtables-{flavour}-multi")])).stdout;
    for family in ["iptables", "ip6tables"] {
        for suffix in ["", "-save", "-restore"] {
            let link = directory.path().join(format!("{family}{suffix}"));
            std::os::unix::fs::symlink(target.trim(), link).expect("a link to xtables-multi");
        }
    }
    directory
}

/// `PATH` with `directory` in front.
pub fn path_with(directory: &Path) -> OsString {
    let rest = env::var_os("PATH").unwrap_or_default();
    let all = std::iter::once(directory.to_owned()).chain(env::split_paths(&rest));
    env::join_paths(all).expect("a search path")
}
