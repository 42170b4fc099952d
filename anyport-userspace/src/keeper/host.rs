//! The keeper's side.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    env,
    ffi::OsString,
    io,
    os::{fd::AsFd as _, unix::process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{ExitCode, ExitStatus},
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
    },
    unistd::Pid,
};
use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
    sync::mpsc::{Receiver, Sender, channel},
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use super::{
    Begin, CONTROL, Order, Report,
    executable::{Executable, Trust},
    server::{News, Server, Stage},
    systemd,
};
use crate::{closing::PassedFd, steering::choose::Remembered};

/// Between the starts of servers that crash.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// Before another try where one could not even start. It is doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often it is looked whether servers go on.
const TICK: Duration = Duration::from_secs(1);
/// What servers have said and the keeper has not heard yet.
const MAX_NEWS: usize = 64;
/// Sockets that are kept at most, which is what the unit has systemd keep.
const MAX_KEPT: usize = 16_384;
/// Bytes of the longest name of one.
const LONGEST_NAME: usize = 100;
/// For how long no server may serve until new connections had better go to another node.
const LASTING: Duration = Duration::from_secs(10);

/// Keeps the sockets of the servers that it starts, which are of this executable and have the same arguments, until one of them
/// ends for good: the exit code is that one's.
///
/// `fetched` are sockets of others, with their names, which the first server asks for.
///
/// Where nobody has served for 10 s (`LASTING`) after a crash, `given_up` is called, once for each time.
///
/// SIGTERM and SIGINT stop it; SIGUSR2 has the executable take over that is now where this one was; SIGHUP is passed on, to
/// have the configuration read again.
///
/// # Errors
/// The kernel refuses the first process.
pub fn keep(fetched: Vec<(String, PassedFd)>, given_up: impl Fn() + Send + Sync + 'static) -> io::Result<ExitCode> {
    // Each socket of a service is a descriptor here too.
    getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard)).ok();
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (news, heard) = channel(MAX_NEWS);
    let code = runtime.block_on(async { Keeper::new(news, fetched, Arc::new(given_up))?.run(heard).await });
    // Threads that still listen to servers end with the process.
    runtime.shutdown_background();
    code.map(ExitCode::from)
}

struct Keeper {
    sockets: BTreeMap<String, PassedFd>,
    arguments: Vec<OsString>,
    /// Where the executable was at the start: another version may be there by now.
    place: PathBuf,
    /// What servers are started from: this very executable, even when it has been replaced, or the one that took over.
    executable: Executable,
    trust: Trust,
    /// The one that serves or is about to.
    serving: Option<Server>,
    /// One that is to take over, with its executable.
    next: Option<(Server, Executable)>,
    /// What the server was started from whose place the one that serves has taken, until that one is ready.
    previous: Option<Executable>,
    /// Those that accept nothing any more, and serve the connections that they have.
    leaving: Vec<Server>,
    /// Servers that have begun.
    started: u64,
    /// Servers that failed after they had begun.
    crashed: u64,
    /// How the last server ended, if it crashed, until another one begins.
    crash: Option<String>,
    /// When that is to be started.
    restart_at: Option<Instant>,
    /// Before the next restart after a server that could not start.
    pause: Duration,
    /// Who may have put steering into the kernel.
    served: ServedBy,
    /// What servers of the executable found out about the back ends.
    remembered: Option<Remembered>,
    /// Whether the configuration is to be read again by the one that is about to serve, who may have read it already.
    is_to_reload: bool,
    /// Whether those that leave are nobody's business any more.
    is_restarting: bool,
    /// Once it is to stop, or nobody serves any more.
    code: Option<u8>,
    /// By then a server has to serve again, after a crash.
    give_up_at: Option<Instant>,
    given_up: Arc<dyn Fn() + Send + Sync>,
    news: Sender<(Pid, News)>,
}

/// Which servers have served clients so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ServedBy {
    Nobody,
    /// By servers of a process that kept the sockets before this one.
    Others,
    /// By servers of this process.
    Ours,
}

impl Keeper {
    fn new(
        news: Sender<(Pid, News)>,
        fetched: Vec<(String, PassedFd)>,
        given_up: Arc<dyn Fn() + Send + Sync>,
    ) -> io::Result<Self> {
        let mut sockets = systemd::kept();
        // A socket unit's socket is older than the first server.
        let served = if sockets.keys().any(|name| name != CONTROL) { ServedBy::Others } else { ServedBy::Nobody };
        sockets.extend(fetched);
        Ok(Self {
            sockets,
            arguments: env::args_os().skip(1).collect(),
            place: env::current_exe()?,
            executable: Executable::own(),
            trust: Trust::of_process()?,
            serving: None,
            next: None,
            previous: None,
            leaving: Vec::new(),
            started: 0,
            crashed: 0,
            crash: None,
            restart_at: None,
            pause: FIRST_PAUSE,
            served,
            remembered: None,
            is_to_reload: false,
            is_restarting: false,
            code: None,
            give_up_at: None,
            given_up,
            news,
        })
    }

    /// Until nobody serves any more.
    async fn run(mut self, mut heard: Receiver<(Pid, News)>) -> io::Result<u8> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut replace = signal(SignalKind::user_defined2())?;
        let mut reload = signal(SignalKind::hangup())?;
        self.serving = Some(self.start(&self.executable)?);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => self.tick(),
                Some((pid, news)) = heard.recv() => self.hear(pid, news),
                _ = terminate.recv() => self.stop(),
                _ = interrupt.recv() => self.stop(),
                _ = replace.recv() => self.replace(&self.place.clone()),
                _ = reload.recv() => self.reload(),
                () = sleep_until(self.restart_at.unwrap_or_else(Instant::now)), if self.restart_at.is_some() => {
                    self.start_again();
                }
                () = sleep_until(self.give_up_at.unwrap_or_else(Instant::now)), if self.give_up_at.is_some() => {
                    self.give_up_at = None;
                    let given_up = Arc::clone(&self.given_up);
                    spawn_blocking(move || given_up());
                }
            }
            if let Some(code) = self.code
                && self.serving.is_none()
                && self.leaving.is_empty()
            {
                return Ok(code);
            }
        }
    }

    fn start(&self, executable: &Executable) -> io::Result<Server> {
        Server::start(&executable.path(), &self.arguments, self.news.clone())
    }

    fn tick(&mut self) {
        let next = self.next.iter_mut().map(|(next, _)| next);
        self.serving.iter_mut().chain(next).chain(&mut self.leaving).for_each(Server::tick);
        if systemd::is_there() && !self.serving.as_ref().is_some_and(Server::is_stuck) {
            systemd::alive();
        }
    }

    fn hear(&mut self, pid: Pid, news: News) {
        let is = |server: &Server| server.pid == pid;
        match news {
            News::Said(report, socket) if self.serving.as_ref().is_some_and(is) => self.hear_serving(report, socket),
            News::Said(report, _) if self.next.as_ref().is_some_and(|(server, _)| is(server)) => {
                self.hear_next(report);
            }
            // What one that is leaving says concerns nobody any more.
            News::Said(..) => {}
            News::Ended(status) if self.serving.as_ref().is_some_and(is) => self.serving_ended(status),
            News::Ended(status) if self.next.as_ref().is_some_and(|(server, _)| is(server)) => self.next_ended(status),
            News::Ended(_) => self.leaving.retain(|server| !is(server)),
        }
    }

    fn hear_serving(&mut self, report: Report, socket: Option<PassedFd>) {
        let Some(server) = &mut self.serving else { return };
        match report {
            Report::Prepared => self.begin(),
            Report::Keep(name) => {
                let is_possible = self.sockets.len() < MAX_KEPT && is_name(&name);
                // A server that goes on with kept sockets has them kept once more.
                if let (Some(socket), true, Entry::Vacant(place)) = (socket, is_possible, self.sockets.entry(name)) {
                    if systemd::is_there() {
                        systemd::keep(place.key(), socket.as_fd());
                    }
                    place.insert(socket);
                }
            }
            Report::Forget(name) => {
                if self.sockets.remove(&name).is_some() && systemd::is_there() {
                    systemd::forget(&name);
                }
            }
            Report::Ready => {
                server.stage = Stage::Ready;
                self.give_up_at = None;
                if systemd::is_there() {
                    systemd::ready();
                }
                self.served = ServedBy::Ours;
                self.previous = None;
                if std::mem::take(&mut self.is_to_reload) {
                    server.signal(Signal::SIGHUP);
                }
            }
            Report::Alive => server.note_alive(),
            Report::Failed(why) => server.failure = Some(why),
            Report::Replace(executable) => self.replace(&executable),
            Report::Remember(remembered) => self.remembered = Some(remembered),
            Report::Left => self.hand_over(),
        }
    }

    fn hear_next(&mut self, report: Report) {
        let Some((next, _)) = &mut self.next else { return };
        match report {
            // It could start, so the other one may end.
            Report::Prepared => match &self.serving {
                Some(serving) => serving.tell(&Order::Leave, &[]),
                None => self.hand_over(),
            },
            Report::Failed(why) => next.failure = Some(why),
            // The rest is said by servers that have begun.
            _ => {}
        }
    }

    /// Has the server begin that is ready to, once.
    fn begin(&mut self) {
        let Some(server) = self.serving.as_mut().filter(|server| server.stage == Stage::Starting) else { return };
        server.stage = Stage::Begun;
        self.started += 1;
        let begin = Begin {
            is_successor: self.served != ServedBy::Nobody,
            is_restarted: systemd::is_there(),
            crash: self.crash.take(),
            started: self.started,
            crashed: self.crashed,
            remembered: self.remembered.clone(),
        };
        server.give(self.sockets.iter());
        server.tell(&Order::Begin(begin), &[]);
    }

    /// One that is about to serve could not bear the signal yet.
    fn reload(&mut self) {
        match self.serving.as_ref().filter(|serving| serving.stage == Stage::Ready) {
            Some(serving) => serving.signal(Signal::SIGHUP),
            None => self.is_to_reload = true,
        }
    }

    /// Has another executable take over, as soon as it has shown that it could.
    fn replace(&mut self, path: &Path) {
        let start = |executable: Executable| match self.start(&executable) {
            Ok(next) => Ok((next, executable)),
            Err(error) => Err(error.to_string()),
        };
        let why = match &self.serving {
            Some(serving) if serving.stage == Stage::Ready && self.next.is_none() => {
                match self.trust.open(path).and_then(start) {
                    Ok(next) => return self.next = Some(next),
                    Err(error) => format!("start {}: {error}", path.display()),
                }
            }
            _ => "another server is about to start already".to_owned(),
        };
        self.say_not_replaced(why);
    }

    fn say_not_replaced(&self, why: String) {
        if let Some(serving) = &self.serving {
            serving.tell(&Order::NotReplaced(why), &[]);
        }
    }

    /// The one that serves has left, so the next one begins.
    fn hand_over(&mut self) {
        let mut left = self.serving.take();
        left.iter_mut().for_each(Server::note_left);
        if self.is_restarting {
            return;
        }
        self.leaving.extend(left);
        if let Some((next, executable)) = self.next.take() {
            self.previous = Some(std::mem::replace(&mut self.executable, executable));
            self.remembered = None;
            self.serving = Some(next);
            self.restart_at = None;
            self.begin();
        } else if self.code.is_none() {
            // What was to take over has ended meanwhile.
            self.give_up_at.get_or_insert(Instant::now() + LASTING);
            self.restart_at = Some(Instant::now());
        }
    }

    fn next_ended(&mut self, status: ExitStatus) {
        if let Some((next, executable)) = self.next.take() {
            let why = next.failure.unwrap_or_else(|| end_in_words(status));
            self.say_not_replaced(format!("{}: {why}", executable.name().display()));
        }
    }

    fn serving_ended(&mut self, status: ExitStatus) {
        let Some(server) = self.serving.take() else { return };
        if self.code.is_some() || status.success() || !(self.served == ServedBy::Ours || self.previous.is_some()) {
            // The keeper or another process told it to stop, or it can't start at all.
            self.code = Some(code_of(status));
            return self.end_others();
        }
        self.crashed += 1;
        self.give_up_at.get_or_insert(Instant::now() + LASTING);
        self.crash = Some(format!("pid {}: {}", server.pid, server.failure.unwrap_or_else(|| end_in_words(status))));
        let pause = if let Some(previous) = self.previous.take() {
            self.executable = previous;
            self.remembered = None;
            Duration::ZERO
        } else if server.stage == Stage::Ready {
            self.pause = FIRST_PAUSE;
            SHORTEST_PAUSE.saturating_sub(server.started.elapsed())
        } else {
            let pause = self.pause;
            self.pause = (pause * 2).min(LONGEST_PAUSE);
            pause
        };
        self.restart_at = Some(Instant::now() + pause);
    }

    fn start_again(&mut self) {
        match self.start(&self.executable) {
            Ok(server) => {
                self.serving = Some(server);
                self.restart_at = None;
            }
            // New connections wait meanwhile.
            Err(error) => {
                self.crash = Some(format!("start {}: {error}", self.executable.name().display()));
                self.restart_at = Some(Instant::now() + LONGEST_PAUSE);
            }
        }
    }

    /// For good; or, where the service manager restarts the unit and keeps the sockets meanwhile, so that those who serve go on until
    /// their last connection has ended.
    fn stop(&mut self) {
        self.code.get_or_insert(0);
        self.restart_at = None;
        if systemd::is_there() && systemd::is_restarting() {
            self.is_restarting = true;
            self.leaving.clear();
            return match &self.serving {
                Some(serving) if serving.stage == Stage::Ready => serving.tell(&Order::Leave, &[]),
                _ => self.serving = None,
            };
        }
        if let Some(serving) = &mut self.serving {
            serving.stop();
        }
        self.end_others();
    }

    fn end_others(&mut self) {
        // What was about to take over has nothing to lose.
        if let Some((next, _)) = self.next.take() {
            next.signal(Signal::SIGKILL);
        }
        self.leaving.iter_mut().for_each(Server::stop);
    }
}

/// Whether a service manager can give it back.
fn is_name(name: &str) -> bool {
    (1..=LONGEST_NAME).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// As shells have it.
fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    u8::try_from(code).unwrap_or(1)
}

fn end_in_words(status: ExitStatus) -> String {
    match status.signal() {
        Some(number) => match Signal::try_from(number) {
            Ok(signal) => format!("was killed by {signal}"),
            Err(_) => format!("was killed by signal {number}"),
        },
        None => format!("ended with status {}", status.code().unwrap_or_default()),
    }
}
