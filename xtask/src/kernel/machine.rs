//! A virtual machine: QEMU with a kernel, disks and a serial console that is shown as it speaks.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::linux::Linux;

/// What the kernel is told. Nothing but a panic ends a machine that has failed: `-no-reboot` makes an end of it. The
/// watchdogs would take a slow host for a hanging kernel.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 oops=panic nowatchdog mitigations=off";

/// How long a kernel may take to find that it has no root file system, by KVM.
const PROBE: Duration = Duration::from_secs(20);

/// How often a machine boots at most.
const BOOTS: u32 = 3;

/// Disks beside those of the kernel.
pub(crate) struct Disks<'a> {
    /// The root file system.
    pub(crate) root: &'a Path,
    /// The programs under test.
    pub(crate) programs: &'a Path,
    /// Where the cases go in and the results come out.
    pub(crate) exchange: &'a Path,
}

/// How a machine ended.
pub(crate) struct Run {
    /// What it said.
    pub(crate) console: Vec<String>,
    /// Whether it had to be ended, as its time was over.
    pub(crate) hung: bool,
    /// How long it ran.
    pub(crate) time: Duration,
}

impl Run {
    /// Whether the guest's script had begun (`guest.sh` says so), and with it all that is of anyport.
    fn has_begun(&self) -> bool {
        self.console.iter().any(|line| line.starts_with("anyport: "))
    }
}

/// Boots again where a kernel dies before anything of anyport has run, as Linux 7.2 once did in emulation, two seconds after its
/// start ("Oops: int3").
pub(crate) fn until_begun(name: &str, mut boot: impl FnMut() -> Result<Run>) -> Result<Run> {
    let mut boots_left = BOOTS;
    loop {
        boots_left -= 1;
        let run = boot()?;
        println!("{name}: the machine ran for {} s.", run.time.as_secs());
        if run.has_begun() || run.hung || boots_left == 0 {
            return Ok(run);
        }
        println!("{name}: the kernel died before a test began; the machine boots again.");
    }
}

/// Boots and waits for the end, which the guest makes. What it says is shown behind its name.
pub(crate) fn boot(
    name: &str,
    linux: &Linux,
    disks: &Disks<'_>,
    accelerator: Accelerator,
    limit: Duration,
) -> Result<Run> {
    let begin = Instant::now();
    let mut machine = with_disks(linux, disks, accelerator).spawn().context("start qemu-system-x86_64")?;
    let result = listen(name, &mut machine, begin + limit);
    // Also where it can't be listened to: no machine stays behind.
    drop(machine.kill());
    let status = machine.wait().context("wait for QEMU's end")?;
    let (mut console, hung) = result?;
    if !hung && !status.success() {
        console.push(format!("QEMU ended with {status}"));
    }
    Ok(Run { console, hung, time: begin.elapsed() })
}

/// How a processor is had.
#[derive(Clone, Copy)]
pub(crate) enum Accelerator {
    /// The host's own.
    Kvm,
    /// In software, which works everywhere.
    Tcg,
}

impl Accelerator {
    /// KVM where it works. That there is a `/dev/kvm` says little: some hosts that are virtual machines themselves run a few
    /// instructions of a guest and then fail. So a kernel boots, finds no root file system and panics, which ends the machine.
    pub(crate) fn usable(linux: &Linux) -> Self {
        let mut qemu = qemu(linux, Self::Kvm);
        qemu.args(["-append", "panic=-1", "-serial", "null"]).stderr(Stdio::null());
        let Ok(mut machine) = qemu.spawn() else { return Self::Tcg };
        let end = Instant::now() + PROBE;
        let works = loop {
            match machine.try_wait() {
                Ok(Some(status)) => break status.success(),
                Ok(None) if Instant::now() < end => thread::sleep(Duration::from_millis(50)),
                _ => break false,
            }
        };
        drop(machine.kill());
        drop(machine.wait());
        if works { Self::Kvm } else { Self::Tcg }
    }
}

fn qemu(linux: &Linux, accelerator: Accelerator) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    match accelerator {
        Accelerator::Kvm => qemu.args(["-accel", "kvm", "-cpu", "host"]),
        // Emulation of these costs much or has errors, and nothing here needs them.
        Accelerator::Tcg => qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,la57=off,cx16=off"]),
    };
    qemu.args([
        "-machine",
        "pc",
        "-smp",
        "2",
        "-m",
        "3G",
        "-nodefaults",
        "-no-reboot",
        "-display",
        "none",
        "-nic",
        "none",
    ]);
    qemu.arg("-kernel").arg(linux.kernel()).stdin(Stdio::null());
    qemu
}

fn with_disks(linux: &Linux, disks: &Disks<'_>, accelerator: Accelerator) -> Command {
    let mut qemu = qemu(linux, accelerator);
    qemu.args(["-serial", "stdio", "-append", COMMAND_LINE]).arg("-initrd").arg(linux.initramfs());
    let modules = linux.modules();
    for (path, keeps) in [(disks.root, false), (&*modules, false), (disks.programs, false), (disks.exchange, true)] {
        let snapshot = if keeps { "off" } else { "on" };
        qemu.arg("-drive").arg(format!("file={},format=raw,if=virtio,snapshot={snapshot}", path.display()));
    }
    qemu.stdout(Stdio::piped());
    qemu
}

/// Shows what the machine says until it ends; true if it has not by then.
fn listen(name: &str, machine: &mut Child, end: Instant) -> Result<(Vec<String>, bool)> {
    let console = machine.stdout.take().context("no console")?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let mut lines = Vec::new();
    loop {
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                println!("{name} | {line}");
                lines.push(line);
            }
            Err(RecvTimeoutError::Timeout) => return Ok((lines, true)),
            Err(RecvTimeoutError::Disconnected) => {
                machine.wait().context("wait for QEMU's end")?;
                return Ok((lines, false));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{BOOTS, Run, until_begun};

    const DIED: &str = "[    2.365268] Oops: int3: 0000 [#1] SMP NOPTI";
    const BEGUN: &str = "anyport: 7.2.13 #1, up after 3.1 s";

    /// How many boots it takes where each attempt says one of these, and whether the last one had begun.
    fn boots(attempts: &[(&str, bool)]) -> (usize, bool) {
        let mut boots = 0;
        let run = until_begun("test", || {
            let (said, hung) = attempts[boots];
            boots += 1;
            Ok(Run { console: vec![said.to_owned()], hung, time: Duration::ZERO })
        });
        (boots, run.expect("no attempt is an error").has_begun())
    }

    #[test]
    fn a_kernel_that_dies_while_it_starts_boots_again() {
        assert_eq!(boots(&[(BEGUN, false)]), (1, true));
        assert_eq!(boots(&[(DIED, false), (BEGUN, false)]), (2, true));
        assert_eq!(boots(&[(DIED, false); BOOTS as usize]), (BOOTS as usize, false));
        assert_eq!(boots(&[(DIED, true)]), (1, false), "what hangs takes too long to be tried again");
    }
}
