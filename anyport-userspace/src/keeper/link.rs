//! The server's side.

use std::{
    collections::BTreeMap,
    env,
    future::pending,
    io::{self, stdin},
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tracing::{debug, warn};

use super::{AT_STDIN, Order, Report, VARIABLE};
use crate::{
    closing::{Message, PassedFd, receive},
    privileges,
    scm_rights::put,
    steering::choose::Remembered,
};

/// What the keeper passes may be sockets of others that were registered.
const OF_KEEPER: u32 = u32::MAX - 1;

/// How a server begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// Whether there was a server before, whose steering is still in the kernel.
    pub is_successor: bool,
    /// Whether a service manager starts the keeper again when it has ended.
    pub is_restarted: bool,
    /// How that one ended, if it did not leave by itself.
    pub crash: Option<String>,
    /// How many servers have begun since the keeper was started, this one included.
    #[serde(default)]
    pub started: u64,
    /// How many of them ended by a failure.
    #[serde(default)]
    pub crashed: u64,
    /// What one of the same executable found out about the back ends.
    #[serde(default)]
    pub remembered: Option<Remembered>,
}

/// What the keeper wants of a server that has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Leave the rest to another server.
    Leave,
    /// No other server could take over: why.
    NotReplaced(String),
    /// The keeper has ended, and nothing else would stop this process: it is to stop by itself.
    Gone,
}

/// What the keeper says to a server that has begun.
#[derive(Debug)]
pub struct Commands(Option<UnboundedReceiver<Command>>);

impl Commands {
    /// The next one. There is none without a keeper.
    pub async fn next(&mut self) -> Command {
        match &mut self.0 {
            Some(commands) => commands.recv().await.unwrap_or(Command::Gone),
            None => pending().await,
        }
    }
}

/// To the keeper of this process, if it has one. Without keeper nothing is kept.
#[derive(Clone, Debug, Default)]
pub struct Link(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    /// What was kept and nobody has asked for yet.
    kept: Mutex<BTreeMap<String, PassedFd>>,
}

impl Link {
    /// To the keeper that started this process. None if nobody did.
    ///
    /// Must be called before there is another thread, and once.
    ///
    /// # Errors
    /// What was said to be the keeper's socket can't be used.
    pub fn of_process() -> anyhow::Result<Option<Self>> {
        if env::var(VARIABLE).as_deref() != Ok(AT_STDIN) {
            return Ok(None);
        }
        let take = || -> io::Result<OwnedFd> {
            let socket = stdin().as_fd().try_clone_to_owned()?;
            // Tools that are started inherit the standard input.
            let null = std::fs::File::open("/dev/null")?;
            rustix::stdio::dup2_stdin(&null)?;
            Ok(socket)
        };
        let socket = take().with_context(|| format!("take the keeper's socket, by {VARIABLE}={AT_STDIN}"))?;
        Ok(Some(Self(Some(Arc::new(Shared { socket, kept: Mutex::default() })))))
    }

    /// Tells that this process could start, and waits until it is to.
    ///
    /// # Errors
    /// The keeper does not want it to.
    pub fn wait_for_begin(&self) -> anyhow::Result<Begin> {
        let Some(shared) = &self.0 else { return Ok(Begin::default()) };
        self.report(&Report::Prepared, None);
        loop {
            match shared.next().context("wait for the keeper")? {
                (Order::Kept(names), descriptors) => shared.kept().extend(names.into_iter().zip(descriptors)),
                (Order::Begin(begin), _) => return Ok(begin),
                (order, _) => debug!("the keeper says {order:?} before the beginning"),
            }
        }
    }

    /// What the keeper wants from now on.
    ///
    /// # Errors
    /// The kernel refuses a thread.
    pub fn commands(&self) -> anyhow::Result<Commands> {
        let Some(shared) = self.0.clone() else { return Ok(Commands(None)) };
        let (sender, receiver) = unbounded_channel();
        privileges::start_thread("anyport-keeper", privileges::for_others, move || shared.listen(&sender))
            .context("listen to the keeper")?;
        Ok(Commands(Some(receiver)))
    }

    /// Our own sockets whose names begin like this, which were kept for a server before. The rest of the names is in the order of the names.
    pub fn take(&self, prefix: &str) -> Vec<OwnedFd> {
        let Some(shared) = &self.0 else { return Vec::new() };
        shared
            .kept()
            .extract_if(prefix.to_owned().., |name, _| name.starts_with(prefix))
            .map(|(_, fd)| fd.into_own())
            .collect()
    }

    /// The socket of exactly this name, if one was kept for a server before.
    pub fn take_one(&self, name: &str) -> Option<PassedFd> {
        self.0.as_ref()?.kept().remove(name)
    }

    /// Lets go of what was kept and nobody has taken.
    pub fn forget_rest(&self) {
        let Some(shared) = &self.0 else { return };
        let rest = std::mem::take(&mut *shared.kept());
        for name in rest.into_keys() {
            self.forget(name);
        }
    }

    /// Has a socket kept under a name.
    pub fn keep(&self, name: String, socket: BorrowedFd<'_>) {
        self.report(&Report::Keep(name), Some(socket));
    }

    /// Has it kept no more.
    pub fn forget(&self, name: String) {
        self.report(&Report::Forget(name), None);
    }

    /// Tells the keeper that steering is active.
    pub fn ready(&self) {
        self.report(&Report::Ready, None);
    }

    /// Tells the keeper that this process goes on. One that has begun to say so and does not any more is killed.
    pub fn alive(&self) {
        self.report(&Report::Alive, None);
    }

    /// Tells that another server may begin.
    pub fn left(&self) {
        self.report(&Report::Left, None);
    }

    /// Tells why this process ends.
    pub fn failed(&self, error: &anyhow::Error) {
        self.report(&Report::Failed(format!("{error:#}")), None);
    }

    /// Asks for a server of this executable.
    pub fn replace(&self, executable: &Path) {
        self.report(&Report::Replace(executable.to_owned()), None);
    }

    /// Has the next server told what was found out about the back ends.
    pub fn remember(&self, remembered: Remembered) {
        self.report(&Report::Remember(remembered), None);
    }

    /// Whether there is a keeper.
    pub fn exists(&self) -> bool {
        self.0.is_some()
    }

    fn report(&self, report: &Report, socket: Option<BorrowedFd<'_>>) {
        let Some(shared) = &self.0 else { return };
        let text = serde_json::to_vec(report).unwrap_or_default();
        if let Err(error) = put(&shared.socket, &text, socket.as_slice()) {
            warn!("tell the keeper: {error}");
        }
    }
}

impl Shared {
    fn kept(&self) -> MutexGuard<'_, BTreeMap<String, PassedFd>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next order that this version understands, with the descriptors beside it.
    fn next(&self) -> io::Result<(Order, Vec<PassedFd>)> {
        loop {
            let Message { text, descriptors, is_cut_off } = receive(&self.socket, OF_KEEPER)?;
            if is_cut_off {
                return Err(io::Error::other("its sockets are more than the limit of open files allows (ulimit -n)"));
            }
            if text.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            match serde_json::from_slice(&text) {
                Ok(order) => return Ok((order, descriptors)),
                Err(error) => debug!("the keeper says what is unknown here: {error}"),
            }
        }
    }

    fn listen(&self, commands: &UnboundedSender<Command>) {
        loop {
            let command = match self.next() {
                Ok((Order::Leave, _)) => Command::Leave,
                Ok((Order::NotReplaced(why), _)) => Command::NotReplaced(why),
                Ok(_) => continue,
                Err(_) => Command::Gone,
            };
            let is_last = command == Command::Gone;
            if commands.send(command).is_err() || is_last {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        fs::File,
        sync::{Arc, Mutex},
    };

    use super::{Link, Shared};
    use crate::closing::PassedFd;

    /// Cookies of sockets stand at the end of names.
    #[test]
    fn take_one_compares_the_whole_name() {
        let null = || File::open("/dev/null").unwrap();
        let kept = BTreeMap::from(["web 12", "web 120"].map(|name| (name.to_owned(), PassedFd::new(null(), 0))));
        let link = Link(Some(Arc::new(Shared { socket: null().into(), kept: Mutex::new(kept) })));
        assert!(link.take_one("web 1").is_none());
        assert!(link.take_one("web 12").is_some() && link.take_one("web 12").is_none());
        assert_eq!(link.take("web ").len(), 1, "120 is still there");
    }
}
