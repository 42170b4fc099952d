//! A server, as its keeper sees it.

use std::{
    ffi::OsString,
    fs, io, mem,
    ops::Range,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    process::ExitStatus,
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::{
        signal::{Signal, kill},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
    unistd::Pid,
};
use rustix::{
    io::Errno,
    net::sockopt::{Timeout, set_socket_timeout},
};
use tokio::{process::Command, sync::mpsc::Sender, task::spawn_blocking, time::Instant};

use super::{AT_STDIN, CONTROL_THREADS, Order, Report, VARIABLE};
use crate::{
    closing::{Message, PassedFd, receive},
    scm_rights::{MAX_DESCRIPTORS, put},
};

/// How long a server may take nothing that it is told.
const PATIENCE: Duration = Duration::from_secs(5);
/// Seconds without a sign of life after which a server that gives them is killed, if its control does not work meanwhile.
const SILENCE: u32 = 15;
/// And if it does: no step of a command takes so long, however slow the machine.
const LONGEST_WORK: u32 = 600;
/// And one that gives none, after it was told to end.
const LONGEST_STOP: u32 = 60;

/// What servers pass waits for nothing but what they have passed before.
pub(super) const OF_SERVERS: u32 = u32::MAX - 1;

/// What has become of a server, or what it said.
#[derive(Debug)]
pub(super) enum News {
    /// It said this, and sent this beside it.
    Said(Report, Option<PassedFd>),
    /// It ended. Whatever it said came before.
    Ended(ExitStatus),
}

/// How far a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Starting,
    /// It was told to begin.
    Begun,
    /// Its steering is active.
    Ready,
}

/// A process that serves, or is about to.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) pid: Pid,
    pub(super) started: Instant,
    pub(super) stage: Stage,
    /// Whether it says every second that it goes on.
    pub(super) reports_alive: bool,
    /// Whether it was told to end.
    is_stopping: bool,
    /// For how many seconds of the keeper's it has not said that it goes on, since it does or was told to end.
    silent: u32,
    /// For how many of them its control has not worked either, and what that had taken of the CPUs before.
    idle: u32,
    worked: u64,
    /// For how many it has not ended though it was killed.
    killed: u32,
    /// Why it ends, by its own words.
    pub(super) failure: Option<String>,
    socket: Arc<OwnedFd>,
}

impl Server {
    /// Starts `executable`, which tells its news with its pid.
    pub(super) fn start(executable: &Path, arguments: &[OsString], news: Sender<(Pid, News)>) -> io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        set_socket_timeout(&ours, Timeout::Send, Some(PATIENCE))?;
        let mut process =
            Command::new(executable).arg0("anyportd").args(arguments).env(VARIABLE, AT_STDIN).stdin(theirs).spawn()?;
        let pid =
            process.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
        let socket = Arc::new(ours);
        let (listening, said) = (Arc::clone(&socket), news.clone());
        tokio::spawn(async move {
            let listened = spawn_blocking(move || listen(&listening, pid, &said)).await;
            debug_assert!(listened.is_ok(), "listening does not panic");
            if let Ok(status) = process.wait().await {
                // Nobody is left to hear it only when the keeper itself ends.
                news.send((pid, News::Ended(status))).await.ok();
            }
        });
        Ok(Self {
            pid,
            started: Instant::now(),
            stage: Stage::Starting,
            reports_alive: false,
            is_stopping: false,
            silent: 0,
            idle: 0,
            worked: 0,
            killed: 0,
            failure: None,
            socket,
        })
    }

    /// Tells it something. One that does not listen any more will soon be known to have ended.
    pub(super) fn tell(&self, order: &Order, sockets: &[BorrowedFd<'_>]) {
        let text = serde_json::to_vec(order).unwrap_or_default();
        if put(&self.socket, &text, sockets) == Err(Errno::AGAIN) {
            // It takes nothing, and the keeper waits for nobody.
            self.signal(Signal::SIGKILL);
        }
    }

    /// Gives it what is kept.
    pub(super) fn give<'a>(&self, kept: impl Iterator<Item = (&'a String, &'a PassedFd)>) {
        /// Names have 100 bytes at most, so that these fit into a message.
        const AT_ONCE: usize = 100;
        const { assert!(AT_ONCE <= MAX_DESCRIPTORS) };
        let kept: Vec<_> = kept.collect();
        for some in kept.chunks(AT_ONCE) {
            let names = some.iter().map(|(name, _)| (*name).clone()).collect();
            let sockets: Vec<_> = some.iter().map(|(_, socket)| socket.as_fd()).collect();
            self.tell(&Order::Kept(names), &sockets);
        }
    }

    /// Has it end. One that does not is killed after a while.
    pub(super) fn stop(&mut self) {
        (self.is_stopping, self.silent, self.idle) = (true, 0, 0);
        self.signal(Signal::SIGTERM);
    }

    /// It goes on.
    pub(super) fn note_alive(&mut self) {
        (self.reports_alive, self.silent, self.idle) = (true, 0, 0);
    }

    /// It serves the connections that it has, and says nothing any more.
    pub(super) fn note_left(&mut self) {
        (self.reports_alive, self.silent, self.idle) = (false, 0, 0);
    }

    /// A second is over. A server that is stopped or stuck is killed: another one goes on with what it had. Seconds in which the keeper did
    /// not run either, such as those of a host that sleeps, do not count.
    pub(super) fn tick(&mut self) {
        if !self.reports_alive && !self.is_stopping {
            return;
        }
        self.silent = self.silent.saturating_add(1);
        self.idle = if self.has_worked() { 0 } else { self.idle.saturating_add(1) };
        let is_over = if self.reports_alive {
            self.idle >= SILENCE || self.silent >= LONGEST_WORK
        } else {
            self.silent >= LONGEST_STOP
        };
        if self.killed > 0 {
            self.killed = self.killed.saturating_add(1);
        } else if is_over {
            self.killed = 1;
            let why = format!("it did not answer for {} s and was killed", self.silent);
            self.failure.get_or_insert(why);
            self.signal(Signal::SIGKILL);
        }
    }

    /// Whether its control has worked since the last second. Nothing is read of a server that answers, and what it did while it
    /// answered does not count.
    fn has_worked(&mut self) -> bool {
        if self.silent < 2 {
            return false;
        }
        let before = mem::replace(&mut self.worked, work_of_control(self.pid));
        self.silent > 2 && self.worked != before
    }

    /// Whether it does not answer, and does not end either.
    pub(super) fn is_stuck(&self) -> bool {
        self.killed > 1
    }

    pub(super) fn signal(&self, signal: Signal) {
        // It may have ended already.
        kill(self.pid, signal).ok();
    }
}

/// What the threads of a server's control and the tools that they have started have taken of the CPUs, in clock ticks. While rules are
/// compiled or iptables works on a slow machine, control does not answer, and a deadlock takes nothing.
fn work_of_control(server: Pid) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{server}/task")).into_iter().flatten().flatten().map(|task| task.path());
    let control =
        tasks.filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == CONTROL_THREADS));
    let with_tools = control.map(|task| {
        let tools = fs::read_to_string(task.join("children")).unwrap_or_default();
        let of_tools = tools.split_whitespace().map(|pid| time_of(Path::new(&format!("/proc/{pid}"))));
        time_of(&task) + of_tools.sum::<u64>()
    });
    with_tools.sum()
}

/// What a process or a thread has taken of the CPUs, by `proc_pid_stat(5)`; nothing if it has ended.
fn time_of(directory: &Path) -> u64 {
    /// Behind the name, which may have blanks and parentheses.
    const USER_AND_SYSTEM: Range<usize> = 11..13;
    let stat = fs::read_to_string(directory.join("stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let times = fields.get(USER_AND_SYSTEM).unwrap_or_default();
    times.iter().filter_map(|it| it.parse::<u64>().ok()).sum()
}

/// Passes on what a server says until it closes its end.
fn listen(socket: &OwnedFd, pid: Pid, news: &Sender<(Pid, News)>) {
    while let Ok(Message { text, mut descriptors, .. }) = receive(socket, OF_SERVERS) {
        if text.is_empty() {
            return;
        }
        // A later version may say what is unknown here.
        let Ok(report) = serde_json::from_slice(&text) else { continue };
        // One that says more than the keeper can hear waits for it.
        if news.blocking_send((pid, News::Said(report, descriptors.pop()))).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, sync::mpsc, thread, time::Instant};

    use nix::unistd::Pid;

    use super::{CONTROL_THREADS, work_of_control};

    #[test]
    fn control_works_or_has_its_tools_work() {
        let (go, told) = mpsc::channel::<bool>();
        let (done, is_done) = mpsc::channel();
        let control = move || {
            for by_tool in told {
                if by_tool {
                    let mut tool = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
                    thread::sleep(std::time::Duration::from_millis(300));
                    done.send(()).unwrap();
                    thread::sleep(std::time::Duration::from_millis(300));
                    tool.kill().unwrap();
                    tool.wait().unwrap();
                } else {
                    let begun = Instant::now();
                    while begun.elapsed().as_millis() < 300 {}
                }
                done.send(()).unwrap();
            }
        };
        let control = thread::Builder::new().name(CONTROL_THREADS.into()).spawn(control).unwrap();
        let worked = || work_of_control(Pid::this());
        let before = worked();
        let begun = Instant::now();
        while begun.elapsed().as_millis() < 300 {}
        assert_eq!(worked(), before, "another thread worked");
        go.send(false).unwrap();
        is_done.recv().unwrap();
        let by_itself = worked();
        assert!(by_itself > before);
        go.send(true).unwrap();
        is_done.recv().unwrap();
        assert!(worked() > by_itself, "a tool works");
        is_done.recv().unwrap();
        drop(go);
        control.join().unwrap();
    }
}
