//! The daemon under test and its client.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    fs::{self, File},
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    host::{Outcome, wait_for},
    netns::Netns,
    prerequisites::{BPFFS, GROUP, USER, program, scratch},
};

/// How a daemon is to be started.
#[derive(Clone, Debug)]
pub struct Setup {
    namespace: Netns,
    /// Programs that lead up to the daemon, such as `setpriv --bounding-set …`.
    wrapper: Vec<OsString>,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    bpffs: Option<PathBuf>,
    config: Option<PathBuf>,
    executable: Option<PathBuf>,
}

impl Setup {
    /// A daemon in `namespace` with this `--steering`.
    pub fn new(namespace: &Netns, steering: &str) -> Self {
        let setup = Self {
            namespace: namespace.clone(),
            wrapper: Vec::new(),
            arguments: Vec::new(),
            environment: Vec::new(),
            bpffs: None,
            config: None,
            executable: None,
        };
        setup.args(["--steering", steering])
    }

    /// Where it will run.
    pub fn namespace(&self) -> &Netns {
        &self.namespace
    }

    /// Adds options of the daemon.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Starts the daemon through another program.
    #[must_use]
    pub fn through<S: AsRef<OsStr>>(mut self, wrapper: impl IntoIterator<Item = S>) -> Self {
        self.wrapper.extend(wrapper.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Sets a variable of the daemon's environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Uses this directory for pins, rather than one of its own below [`BPFFS`].
    #[must_use]
    pub fn bpffs(mut self, directory: impl Into<PathBuf>) -> Self {
        self.bpffs = Some(directory.into());
        self
    }

    /// Uses this configuration file, rather than an empty one.
    #[must_use]
    pub fn config(mut self, file: impl Into<PathBuf>) -> Self {
        self.config = Some(file.into());
        self
    }

    /// Starts this executable, rather than the program under test from where it was built.
    #[must_use]
    pub fn executable(mut self, file: impl Into<PathBuf>) -> Self {
        self.executable = Some(file.into());
        self
    }

    /// Starts the daemon and waits until it answers.
    pub fn start(self) -> Daemon {
        let mut daemon = self.launch();
        daemon.wait_until_ready();
        daemon
    }

    /// Starts the daemon and waits until it has ended by itself.
    pub fn run_to_end(self) -> Outcome {
        let mut daemon = self.launch();
        let status = daemon.wait_for_end(Duration::from_secs(20));
        Outcome { status, stdout: String::new(), stderr: daemon.log() }
    }

    /// Starts the daemon and waits for nothing.
    pub fn launch(self) -> Daemon {
        let directory = scratch();
        // Where it makes its sockets.
        chown(directory.path(), Some(USER), Some(GROUP)).expect("a directory of the daemon's own");
        let name = directory.path().file_name().expect("a name");
        let bpffs = self.bpffs.clone().unwrap_or_else(|| Path::new(BPFFS).join(name));
        let mut daemon = Daemon { setup: self, bpffs, directory, process: None };
        daemon.launch();
        daemon
    }
}

/// A running daemon with its socket, state and log in a directory of its own. Killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    setup: Setup,
    bpffs: PathBuf,
    directory: tempfile::TempDir,
    process: Option<Child>,
}

impl Daemon {
    /// Starts a daemon with default options in `namespace`.
    pub fn start(namespace: &Netns, steering: &str) -> Self {
        Setup::new(namespace, steering).start()
    }

    /// Starts the program again with the same options; it must have ended.
    pub fn restart(&mut self) {
        self.launch();
        self.wait_until_ready();
    }

    /// Has the next start use this back end.
    pub fn set_steering(&mut self, steering: &str) {
        self.setup.arguments[1] = steering.into();
    }

    fn launch(&mut self) {
        assert!(self.process.is_none(), "the daemon runs already");
        let Setup { namespace, wrapper, arguments, environment, .. } = &self.setup;
        let log = File::options().create(true).append(true).open(self.directory.path().join("log"));
        let log = log.expect("a log file");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).args(wrapper);
        let built = || program("anyportd").unwrap_or_else(|missing| panic!("{missing}"));
        command.arg(self.setup.executable.clone().unwrap_or_else(built));
        command.arg("--bpffs").arg(&self.bpffs);
        let config = self.setup.config.clone().unwrap_or_else(|| {
            let empty = self.directory.path().join("anyport.toml");
            fs::write(&empty, "").expect("an empty configuration");
            empty
        });
        command.arg("--config").arg(config);
        for (option, path) in [("--socket", self.socket()), ("--state-dir", self.state())] {
            if !arguments.iter().any(|argument| argument == option) {
                command.arg(option).arg(path);
            }
        }
        command.args(arguments);
        command.envs(environment.iter().map(|(name, value)| (name, value))).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a second descriptor of the log")).stderr(log);
        self.process = Some(namespace.spawn(command));
    }

    fn wait_until_ready(&mut self) {
        wait_for("daemon that answers", Duration::from_secs(30), || {
            if let Some(status) = self.process.as_mut().expect("a process").try_wait().expect("its state") {
                panic!("the daemon ended at start with {status}:\n{}", self.log());
            }
            let answer = self.ctl(&["status"]);
            if answer.status == 0 { Ok(()) } else { Err(answer.to_string()) }
        });
    }

    /// The process that keeps the sockets: the one that was started.
    pub fn keeper(&self) -> Pid {
        let id = self.process.as_ref().expect("a running daemon").id();
        Pid::from_raw(id.try_into().expect("a process id"))
    }

    /// The process that serves: the youngest that the keeper has started.
    pub fn pid(&self) -> Pid {
        *self.servers().last().expect("a process that serves")
    }

    /// The process that serves, and those that were replaced and have connections still.
    pub fn servers(&self) -> Vec<Pid> {
        children(self.keeper())
    }

    /// Has another executable of the daemon take over.
    pub fn take_over(&self, executable: &Path) -> Outcome {
        let mut command = Command::new(executable);
        command.arg("--takeover").arg("--socket").arg(self.socket()).env("ANYPORT_CONFIG", "/dev/null");
        self.namespace().output(&mut command)
    }

    /// Waits until another process than `before` serves.
    pub fn wait_for_successor(&self, before: Pid) {
        wait_for("another process that serves", Duration::from_secs(30), || {
            let outcome = self.ctl(&["status", "--json"]);
            let status: Option<Value> = serde_json::from_str(&outcome.stdout).ok();
            let pid = status.and_then(|status| status["pid"].as_i64());
            if pid.is_some_and(|pid| pid != i64::from(before.as_raw())) { Ok(()) } else { Err(outcome.to_string()) }
        });
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("anyportd.sock")
    }

    /// The directory of pins.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// The state directory.
    pub fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// The namespace that it runs in.
    pub fn namespace(&self) -> &Netns {
        &self.setup.namespace
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        let log = fs::read(self.directory.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Runs `anyportctl` with these arguments.
    pub fn ctl(&self, arguments: &[&str]) -> Outcome {
        self.namespace().output(&mut self.ctl_command(&[], arguments))
    }

    /// `anyportctl` with these arguments, started through `wrapper`.
    pub fn ctl_command(&self, wrapper: &[&str], arguments: &[&str]) -> Command {
        let client = program("anyportctl").unwrap_or_else(|missing| panic!("{missing}"));
        let mut command = match wrapper {
            [] => Command::new(client),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(client);
                command
            }
        };
        command.args(arguments).arg("--socket").arg(self.socket());
        command
    }

    /// Runs `anyportctl`, which must succeed, with arguments split at blanks.
    pub fn ok(&self, arguments: &str) -> String {
        let arguments: Vec<&str> = arguments.split_whitespace().collect();
        let outcome = self.ctl(&arguments);
        assert!(outcome.status == 0, "anyportctl {} failed: {outcome}", arguments.join(" "));
        outcome.stdout
    }

    /// Runs `anyportctl`, which must end with `status`, with arguments split at blanks; returns what it complained.
    pub fn refused(&self, arguments: &str, status: i32) -> String {
        let arguments: Vec<&str> = arguments.split_whitespace().collect();
        let outcome = self.ctl(&arguments);
        assert!(
            outcome.status == status,
            "anyportctl {} was expected to end with status {status}, but: {outcome}",
            arguments.join(" "),
        );
        outcome.stderr
    }

    /// Runs `anyportctl … --json`, which must succeed, and returns what it printed.
    pub fn json(&self, arguments: &str) -> Value {
        let text = self.ok(&format!("{arguments} --json"));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("`{arguments} --json` printed {text:?}: {error}"))
    }

    /// The rules as `prefixes --json` tells them, without their counters.
    pub fn rules(&self) -> Vec<String> {
        let all = self.json("prefixes");
        let mut rules = all.as_array().expect("an array of rules").clone();
        for rule in &mut rules {
            let rule = rule.as_object_mut().expect("an object for each rule");
            rule.retain(|key, _| !["steered", "dropped", "no_socket", "denied"].contains(&key.as_str()));
        }
        rules.iter().map(Value::to_string).collect()
    }

    /// The entries of one of the maps for readers (`rules`, `ports`), as `bpftool` shows them; those that are not in use
    /// are left out.
    pub fn map(&self, name: &str) -> Vec<Value> {
        let pin = self.bpffs().join(name).display().to_string();
        let dump = self.namespace().run("bpftool", ["-j", "map", "dump", "pinned", &pin]);
        let entries: Vec<Value> = serde_json::from_str(&dump).expect("JSON of bpftool");
        let values = entries.into_iter().map(|entry| entry["formatted"]["value"].clone());
        values.filter(|entry| entry["ip_version"] != 0).collect()
    }

    /// The sum of a counter (`steered`, `dropped`) over the rules of `prefix`.
    pub fn count(&self, prefix: &str, counter: &str) -> u64 {
        let all = self.json("prefixes");
        let rules = all.as_array().expect("an array of rules").iter().filter(|rule| rule["prefix"] == prefix);
        let counts: Vec<u64> = rules.map(|rule| rule[counter].as_u64().expect("a count")).collect();
        assert!(!counts.is_empty(), "no rule of {prefix} in {all}");
        counts.iter().sum()
    }

    /// Ends the daemon as systemd would, and asserts that it ends by itself and well.
    pub fn stop(&mut self) {
        let status = self.terminate(Duration::from_secs(20));
        assert!(status == 0, "the daemon ended with status {status} on SIGTERM:\n{}", self.log());
    }

    /// Asks the daemon to end, which it must do within `limit`, and returns its exit status.
    pub fn terminate(&mut self, limit: Duration) -> i32 {
        kill(self.keeper(), Signal::SIGTERM).expect("SIGTERM to the daemon");
        self.wait_for_end(limit)
    }

    /// Kills the daemon, all of its processes, without a chance to clean up.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            kill_all(Pid::from_raw(process.id().try_into().expect("a process id")));
            process.wait().expect("the end of a killed daemon");
        }
    }

    /// Stops all threads of the process that serves, until [`Self::resume`].
    pub fn pause(&self) {
        stop_threads(self.pid());
    }

    /// Lets a paused daemon go on.
    pub fn resume(&self) {
        kill(self.pid(), Signal::SIGCONT).expect("SIGCONT to the daemon");
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        let state = self.process.as_mut().map(|process| process.try_wait().expect("the daemon's state"));
        state.is_none_or(|state| state.is_some())
    }

    fn wait_for_end(&mut self, limit: Duration) -> i32 {
        let mut process = self.process.take().expect("a running daemon");
        let status = wait_for("end of the daemon", limit, || {
            process.try_wait().expect("the daemon's state").ok_or_else(|| format!("it runs:\n{}", self.log()))
        });
        status.code().unwrap_or(-1)
    }
}

/// Kills a daemon by the process that keeps its sockets. That one is stopped first, so that it starts no other.
pub fn kill_all(keeper: Pid) {
    stop_threads(keeper);
    let servers = children(keeper);
    for pid in servers.iter().chain([&keeper]) {
        // One that has ended by itself is no failure.
        kill(*pid, Signal::SIGKILL).ok();
    }
    for pid in servers {
        wait_for("end of a killed server", Duration::from_secs(10), || {
            match fs::read_to_string(format!("/proc/{pid}/stat")) {
                Ok(stat) if !stat.contains(") Z ") => Err(stat),
                // The first thread has ended; the others hold everything until they have.
                Ok(stat) if fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|tasks| tasks.count() > 1) => Err(stat),
                _ => Ok(()),
            }
        });
    }
}

pub(crate) fn children(parent: Pid) -> Vec<Pid> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    children.split_whitespace().map(|pid| Pid::from_raw(pid.parse().expect("a process id"))).collect()
}

/// Stops all threads of a process, if it is still there.
pub(crate) fn stop_threads(pid: Pid) {
    kill(pid, Signal::SIGSTOP).ok();
    wait_for("standstill of a process", Duration::from_secs(5), || {
        for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            // Threads may end meanwhile.
            let Ok(stat) = fs::read_to_string(thread.path().join("stat")) else { continue };
            let (_, state) = stat.rsplit_once(") ").expect("a state behind the name");
            if !state.starts_with(['T', 'Z', 'X']) {
                return Err(stat);
            }
        }
        Ok(())
    });
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            complain(&format_args!("log of the daemon in {}:\n{}", self.setup.namespace.path(), self.log()));
        }
        self.kill();
        // Pins would keep maps and programs for as long as this process's bpffs is there.
        drop(fs::remove_dir_all(&self.bpffs));
    }
}

/// Shows the log of a daemon that other tests go on using, should this one panic while the value lives.
#[derive(Debug)]
pub struct LogOnPanic<'a>(pub &'a Daemon);

impl Drop for LogOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.0.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            complain(&format_args!("end of the shared daemon's log:\n{}", tail.join("\n")));
        }
    }
}

#[expect(clippy::print_stderr, reason = "the log explains the panic that is under way")]
fn complain(text: &fmt::Arguments<'_>) {
    eprintln!("{text}");
}
