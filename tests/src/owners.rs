//! Processes whose sockets are registered.

use std::{
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyport::register::{Process, socket_beside};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    daemon::Daemon,
    host::{Running, wait_for},
    netns::Netns,
};

/// A process with a socket, killed when dropped.
#[derive(Debug)]
pub struct Owner {
    process: Running,
    /// What it printed first.
    pub line: String,
}

impl Owner {
    /// Starts a program, and waits for its first line.
    pub fn start(namespace: &Netns, program: &[&str]) -> Self {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).args(program).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = Running(namespace.spawn(command));
        let line = process.first_line();
        assert!(!line.is_empty(), "{program:?} ended at once");
        Self { process, line }
    }

    /// A process that prints nothing.
    pub fn of(process: Child) -> Self {
        Self { process: Running(process), line: String::new() }
    }

    /// The server that says `name`.
    pub fn greeter(namespace: &Netns, name: &str, address: &str, port: u16) -> Self {
        let port = port.to_string();
        Self::start(namespace, &["python3", "-c", script("greeter.py"), name, address, &port])
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    fn number(&self, place: usize) -> u16 {
        self.line.split_whitespace().nth(place).expect("a number").parse().expect("a number")
    }

    /// The port that it listens on, which it has printed first.
    pub fn port(&self) -> u16 {
        self.number(0)
    }

    /// The descriptor of its socket, which it has printed next.
    pub fn descriptor(&self) -> i32 {
        self.number(1).into()
    }

    /// A second descriptor of its socket.
    pub fn socket(&self, namespace: &Netns) -> OwnedFd {
        let fetch = || Process::open(self.pid()).and_then(|process| process.candidate(self.descriptor()));
        namespace.enter(fetch).expect("its socket").descriptor.into_own()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().try_into().expect("a pid")), signal).expect("a signal to the owner");
    }

    /// Waits until it has ended by itself.
    pub fn wait_for_end(mut self) {
        wait_for("end of a drained owner", Duration::from_secs(20), || {
            self.process.0.try_wait().expect("its state").ok_or_else(|| "it runs".into())
        });
    }
}

/// One of the programs in `e2e/owners/`, as an argument of `python3 -c`: the test program is all that a guest has.
pub fn script(name: &str) -> &'static str {
    match name {
        "greeter.py" => include_str!("../e2e/owners/greeter.py"),
        "passer.py" => include_str!("../e2e/owners/passer.py"),
        "supervisor.py" => include_str!("../e2e/owners/supervisor.py"),
        _ => panic!("there is no program {name}"),
    }
}

/// Where sockets are registered with a daemon.
pub fn register_socket(daemon: &Daemon) -> PathBuf {
    socket_beside(&daemon.socket())
}
