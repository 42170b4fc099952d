//! A service manager of its own: the installed systemd as the first process of a PID namespace. It starts nothing by itself.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use nix::unistd::Pid;

use crate::{
    daemon::children,
    host::{Outcome, Running, wait_for},
    netns::Netns,
    prerequisites::public_copy,
};

/// What the manager finds: its own /run, /var, /etc and control groups, and units in /run/systemd/system.
const SCRIPT: &str = r"
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
cp -a /etc /run/etc
mount --bind /run/etc /etc
mount -t tmpfs tmpfs /var
mkdir -p /run/lock /run/systemd/system
printf '[Unit]\nDefaultDependencies=no\n' > /run/systemd/system/quiet.target
for unit in socket service; do
    mkdir /run/systemd/system/dbus.$unit.d
    printf '[Unit]\nDefaultDependencies=no\n' > /run/systemd/system/dbus.$unit.d/quiet.conf
done
exec env container=other SYSTEMD_LOG_TARGET=console /lib/systemd/systemd --system --unit=quiet.target
";

/// A manager in a namespace. All that it has started ends when this is dropped.
#[derive(Debug)]
pub struct Systemd {
    namespace: Netns,
    _process: Running,
    manager: Pid,
}

impl Systemd {
    /// Starts it.
    pub fn start(namespace: &Netns) -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "unshare", "--pid", "--fork", "--kill-child", "--mount", "--ipc"]);
        command.args(["--uts", "--cgroup", "bash", "-c", SCRIPT]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = Running(namespace.spawn(command));
        let parent = Pid::from_raw(process.id().try_into().expect("a pid"));
        let manager = wait_for("manager", Duration::from_secs(10), || {
            children(parent).first().copied().ok_or_else(|| "no process".to_owned())
        });
        let this = Self { namespace: namespace.clone(), _process: process, manager };
        wait_for("manager that answers", Duration::from_secs(20), || {
            let outcome = this.run(&["systemctl", "is-active", "quiet.target"]);
            if outcome.status == 0 { Ok(()) } else { Err(outcome.to_string()) }
        });
        // By which others than root ask it something.
        this.ok(&["systemctl", "start", "dbus.socket", "dbus.service"]);
        this
    }

    /// Runs a command as the manager's services see the host.
    pub fn run(&self, command: &[&str]) -> Outcome {
        let mut inside = Command::new("nsenter");
        inside.args(["--pid", "--mount", "--ipc", "--uts", "--cgroup", "--target", &self.manager.to_string(), "--"]);
        self.namespace.output(inside.args(command))
    }

    /// Runs a command, which must succeed.
    pub fn ok(&self, command: &[&str]) -> String {
        let outcome = self.run(command);
        assert!(outcome.status == 0, "{command:?}: {outcome}");
        outcome.stdout
    }

    /// Writes a file where the manager sees it.
    pub fn write(&self, path: &str, text: &str) {
        let seen = self.seen(path);
        fs::write(&seen, text).unwrap_or_else(|error| panic!("{}: {error}", seen.display()));
    }

    /// Copies a program there, for everyone.
    pub fn install(&self, program: &Path, path: &str) {
        public_copy(program, &self.seen(path));
    }

    /// What the manager sees as `path`, in a directory that is made.
    fn seen(&self, path: &str) -> PathBuf {
        let seen = Path::new("/proc").join(self.manager.to_string()).join("root").join(path.trim_start_matches('/'));
        fs::create_dir_all(seen.parent().expect("a directory")).expect("directories");
        seen
    }
}
