//! The task that has the router announce what is served.

use std::{
    collections::HashSet,
    env, fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use tokio::{
    runtime::{Builder, Handle},
    sync::{Notify, watch},
    task::JoinHandle,
    time::{sleep_until, timeout},
};
use tracing::{info, warn};

use super::{
    Announce, Judgement,
    bird::{Doubt, Router},
    file,
    holds::{Hold, Holds},
};
use crate::{
    api::{AnnounceView, AnnouncedPrefix},
    rules::Prefix,
    text::list_of,
};

/// Before another try where the file could not be written or the router not told. It is doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How often file and router are looked at where nothing happens.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long the end of the daemon waits for the withdrawal.
const PATIENCE: Duration = Duration::from_secs(8);

/// The engine's hold on the task.
#[derive(Debug)]
pub struct Announcer {
    judgement: watch::Sender<Judgement>,
    progress: Arc<Mutex<Progress>>,
    task: JoinHandle<()>,
}

/// What the task has done.
#[derive(Debug, Default)]
struct Progress {
    /// The number of the judgement by which the router announces.
    done: u64,
    /// That of the last one by which it was to.
    tried: u64,
    /// Why it is not that of the last one.
    complaint: Option<String>,
    /// Why other routers do not learn of what the router has.
    not_passed_on: Option<String>,
    prefixes: Vec<AnnouncedPrefix>,
    announcements: u64,
    withdrawals: u64,
}

impl Announcer {
    /// Goes on with what the file announces. `progressed` is notified when the router has been told.
    pub fn start(config: &Announce, control: &Handle, progressed: Arc<Notify>) -> Self {
        // Number 0 is no judgement.
        let (judgement, judgements) = watch::channel(Judgement::default());
        let progress: Arc<Mutex<Progress>> = Arc::default();
        let written = fs::read_to_string(&config.file).unwrap_or_default();
        let task = Task {
            config: config.clone(),
            holds: Holds::of(file::announced(&written), Instant::now()),
            written,
            wanted: String::new(),
            // The previous process may have been killed before it could tell the router.
            is_told: false,
            retry: None,
            pause: FIRST_PAUSE,
            next_look: Instant::now() + INTERVAL,
            next_exports: Instant::now() + INTERVAL,
            is_doubted: false,
            progress: Arc::clone(&progress),
            progressed,
        };
        Self { judgement, progress, task: control.spawn(task.run(judgements)) }
    }

    /// Has it announce by this from now on, if it differs from what was judged before. Returns the number of the judgement.
    pub fn judge(&self, judgement: Judgement) -> u64 {
        self.judgement.send_if_modified(|last| {
            let is_same = last.number > 0 && Judgement { number: last.number, ..judgement.clone() } == *last;
            if !is_same {
                *last = Judgement { number: last.number + 1, ..judgement };
            }
            !is_same
        });
        self.judgement.borrow().number
    }

    /// Whether the router announces by this judgement or a later one.
    pub fn has_done(&self, number: u64) -> bool {
        lock(&self.progress).done >= number
    }

    /// Why the router is not told what it should be, or does not pass it on.
    pub fn complaint(&self) -> Option<String> {
        let progress = lock(&self.progress);
        progress.complaint.clone().or_else(|| progress.not_passed_on.clone())
    }

    /// All of it.
    pub fn view(&self, config: &Announce) -> AnnounceView {
        let Progress { complaint, prefixes, announcements, withdrawals, .. } = &*lock(&self.progress);
        AnnounceView {
            file: config.file.clone(),
            reload: config.reload.clone(),
            told: complaint.is_none(),
            announcements: *announcements,
            withdrawals: *withdrawals,
            prefixes: prefixes.clone(),
        }
    }

    /// Withdraws everything, and waits until the router knows; but not where it can't be told, since it may be gone itself.
    pub async fn withdraw(&self) {
        let number = self.judge(Judgement::default());
        let tried = async {
            while lock(&self.progress).tried < number {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if timeout(PATIENCE, tried).await.is_err() || !self.has_done(number) {
            let why = self.complaint().unwrap_or_default();
            warn!("stopping although the router may announce what is not served any more: {why}");
        }
    }

    /// Leaves all as it is announced.
    pub async fn leave(self) {
        let Self { judgement, task, .. } = self;
        drop(judgement);
        let abort = task.abort_handle();
        if timeout(PATIENCE, task).await.is_err() {
            abort.abort();
        }
    }
}

/// Withdraws everything, where no server does.
///
/// # Errors
/// The file can't be written, or the router not be told.
pub fn withdraw_all(announce: &Announce) -> anyhow::Result<()> {
    write(announce, &file::text(announce, &[]))?;
    let Some(router) = Router::of(announce, [0; 2]) else { return Ok(()) };
    let runtime = Builder::new_current_thread().enable_all().build().context("start a runtime")?;
    runtime.block_on(router.configure())
}

/// Whether a service manager says that the service has ended well: then it has withdrawn everything itself, or is restarted.
pub fn has_ended_well() -> bool {
    // Set for ExecStopPost= (systemd.exec(5)).
    env::var_os("SERVICE_RESULT").is_some_and(|result| result == "success")
}

fn write(config: &Announce, text: &str) -> anyhow::Result<()> {
    file::replace(&config.file, text).with_context(|| format!("write {}", config.file.display()))
}

fn lock(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Task {
    config: Announce,
    holds: Holds,
    /// What the file had when it was looked at last, and what it is to have.
    written: String,
    wanted: String,
    /// Whether the router has read that.
    is_told: bool,
    /// When to try again.
    retry: Option<Instant>,
    pause: Duration,
    /// When the router is asked again whether it has what it was told.
    next_look: Instant,
    /// When it is asked what it exports, for which it goes through whole tables.
    next_exports: Instant,
    /// Whether it passed nothing on when it was asked last. Sessions take a while to begin.
    is_doubted: bool,
    progress: Arc<Mutex<Progress>>,
    progressed: Arc<Notify>,
}

impl Task {
    /// Until the engine lets go of it.
    async fn run(mut self, mut judgements: watch::Receiver<Judgement>) {
        if judgements.changed().await.is_ok() {
            loop {
                let judgement = judgements.borrow_and_update().clone();
                let due = self.holds.judge(&judgement, Instant::now());
                // What was judged meanwhile does not wait for the router's answer.
                let is_new = tokio::select! {
                    () = self.look() => false,
                    changed = judgements.changed() => match changed {
                        Ok(()) => true,
                        Err(_) => return,
                    },
                };
                if is_new {
                    judgements.mark_changed();
                }
                self.announce().await;
                self.note(&judgement);
                let at = [due, self.retry].into_iter().flatten().fold(Instant::now() + INTERVAL, Instant::min);
                tokio::select! {
                    () = sleep_until(at.into()) => {}
                    changed = judgements.changed() => if changed.is_err() { return },
                }
            }
        }
    }

    /// Asks the router whether it has what it was told, and passes it on: it may have been restarted with another configuration.
    async fn look(&mut self) {
        if !self.is_told || self.next_look > Instant::now() {
            return;
        }
        self.next_look = Instant::now() + INTERVAL;
        let Some(router) = self.router(&self.written) else { return };
        let begun = Instant::now();
        let with_exports = self.next_exports <= begun;
        let seen = router.look(with_exports).await;
        if !with_exports && seen.is_ok() {
            return;
        }
        // At most a twentieth of its time is spent on that.
        self.next_exports = Instant::now() + (begun.elapsed() * 20).max(INTERVAL);
        let was_doubted = std::mem::take(&mut self.is_doubted);
        let not_passed_on = match seen {
            Ok(()) => None,
            Err(Doubt::Missing(error)) => {
                warn!("the router does not have what it was told, and is told again: {error:#}");
                self.is_told = false;
                // To tell it may take long, and until then nobody knows what it announces.
                lock(&self.progress).complaint = Some(format!("{error:#}"));
                return;
            }
            Err(Doubt::NotPassedOn(why)) => {
                self.is_doubted = true;
                Some(why).filter(|_| was_doubted)
            }
        };
        let mut progress = lock(&self.progress);
        if let Some(why) = not_passed_on.as_ref().filter(|it| progress.not_passed_on.as_ref() != Some(it)) {
            warn!("announcing: {why}");
        }
        progress.not_passed_on = not_passed_on;
    }

    /// The router that is told of a file with this text.
    fn router(&self, text: &str) -> Option<Router<'_>> {
        let mut wanted = [0; 2];
        for prefix in file::announced(text) {
            wanted[usize::from(!prefix.is_ipv4())] += 1;
        }
        Router::of(&self.config, wanted)
    }

    /// Makes file and router equal to what is to be announced, unless that has just failed.
    async fn announce(&mut self) {
        // Meanwhile the keeper may have withdrawn everything, or another program may have edited the file.
        self.written = fs::read_to_string(&self.config.file).unwrap_or_default();
        let text = file::text(&self.config, &self.holds.announced().collect::<Vec<_>>());
        if text != self.wanted {
            // What is new is tried at once.
            self.retry = None;
            self.wanted.clone_from(&text);
        }
        self.is_told &= text == self.written;
        if self.is_told || self.retry.is_some_and(|at| at > Instant::now()) {
            return;
        }
        match self.tell(&text).await {
            Ok(()) => {
                if let Some(complaint) = lock(&self.progress).complaint.take() {
                    info!("the router announces what is served again, after: {complaint}");
                }
                (self.is_told, self.retry, self.pause) = (true, None, FIRST_PAUSE);
            }
            Err(error) => {
                let complaint = format!("{error:#}");
                let before = lock(&self.progress).complaint.replace(complaint.clone());
                if before.as_ref() != Some(&complaint) {
                    warn!("announcing: {complaint}; trying again");
                }
                self.retry = Some(Instant::now() + self.pause);
                self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            }
        }
    }

    async fn tell(&mut self, text: &str) -> anyhow::Result<()> {
        if text != self.written {
            write(&self.config, text)?;
            self.log_changes(text);
            text.clone_into(&mut self.written);
        }
        match self.router(text) {
            Some(router) => router.configure().await,
            None => Ok(()),
        }
    }

    fn log_changes(&self, text: &str) {
        let [before, after] = [&self.written, text].map(|text| file::announced(text).collect::<Vec<Prefix>>());
        let without = |some: &[Prefix], others: &[Prefix]| -> Vec<Prefix> {
            let others: HashSet<_> = others.iter().collect();
            some.iter().filter(|prefix| !others.contains(prefix)).copied().collect()
        };
        for (what, prefixes) in [("announced", without(&after, &before)), ("withdrawn", without(&before, &after))] {
            if !prefixes.is_empty() {
                info!("{what}: {}", list_of(&prefixes));
            }
        }
    }

    /// Tells the engine how far it is.
    fn note(&self, judgement: &Judgement) {
        let now = Instant::now();
        let at = |since| humantime::format_rfc3339_seconds(SystemTime::now() - now.duration_since(since)).to_string();
        let view = |(prefix, Hold { state, since, why, .. }): (&Prefix, &Hold)| AnnouncedPrefix {
            prefix: *prefix,
            state: *state,
            since: at(*since),
            why: why.clone(),
        };
        let mut progress = lock(&self.progress);
        progress.prefixes = self.holds.iter().map(view).collect();
        (progress.announcements, progress.withdrawals) = (self.holds.announcements, self.holds.withdrawals);
        progress.tried = judgement.number;
        if self.is_told && progress.done < judgement.number {
            progress.done = judgement.number;
            self.progressed.notify_one();
        }
    }
}
