//! Three hosts on two CPUs, with a program under load in the middle.

pub(crate) mod load;
pub(crate) mod upstream;

use std::{
    ffi::OsStr,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use anyport_tests::{
    holdings::cpu_time,
    host::Running,
    netns::Netns,
    topology::{SERVER, Topology},
};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

use crate::micros;

/// Masks of CPUs, for receive packet steering: that of the program in the middle and that of everybody else.
const FIRST_CPU: u32 = 1;
const OTHER_CPU: u32 = 2;

/// Clients and upstream have the CPUs that the program in the middle has not.
pub(crate) fn leave_first_cpu() -> Result<()> {
    let mut cpus = CpuSet::new();
    for cpu in 1..crate::cpus()?.max(2) {
        cpus.set(cpu)?;
    }
    sched_setaffinity(Pid::from_raw(0), &cpus)
        .context("leave the first CPU to the program in the middle; there must be a second one")
}

/// Has the hosts work as if they were machines of their own: what arrives is work for the CPU of the process that receives it.
pub(crate) fn separate(topology: &Topology) {
    let Topology { client, host, server } = topology;
    for namespace in [client, host] {
        // Thousands of connections a second leave more behind than there are ports.
        namespace.sysctl("net.ipv4.tcp_tw_reuse", "1");
        namespace.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
    }
    let interfaces = [(client, "eth0", OTHER_CPU), (host, "client", FIRST_CPU), (host, "server", FIRST_CPU)];
    for (namespace, interface, cpu) in interfaces.into_iter().chain([(server, "eth0", OTHER_CPU)]) {
        namespace.sysctl("net.core.somaxconn", "4096");
        let file = format!("/sys/class/net/{interface}/queues/rx-0/rps_cpus");
        let line = format!("mount -t sysfs none /sys && echo {cpu} > {file}");
        namespace.run("unshare", ["--mount", "sh", "-c", &line]);
    }
}

/// Starts the server behind the proxies.
pub(crate) fn start_upstream(topology: &Topology) -> Result<Running> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(std::env::current_exe()?);
    Ok(start(&topology.server, command.args(["upstream", "--address", SERVER[0]])))
}

/// Processor time that is used from now on.
#[derive(Debug)]
pub(crate) struct CpuTime {
    process: Option<Pid>,
    before: Duration,
}

impl CpuTime {
    /// Of a process, if there is one.
    pub(crate) fn of(process: impl Into<Option<u32>>) -> Result<Self> {
        let process = process.into().map(|id| Pid::from_raw(id.cast_signed()));
        Ok(Self { process, before: process.map_or(Ok(Duration::ZERO), cpu_time)? })
    }

    /// In microseconds.
    pub(crate) fn used(&self) -> Result<f64> {
        let now = self.process.map_or(Ok(Duration::ZERO), cpu_time)?;
        Ok(micros(now.saturating_sub(self.before)))
    }
}

/// A program with the first CPU, which ends with this process.
pub(crate) fn on_first_cpu(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "taskset", "--cpu-list", "0"]).arg(program);
    command
}

/// Starts a program, of which nobody wants to know what it says.
pub(crate) fn start(namespace: &Netns, command: &Command) -> Running {
    let arguments: Vec<_> = command.get_args().collect();
    let mut quiet = Command::new(command.get_program());
    quiet.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Running(namespace.spawn(quiet))
}
