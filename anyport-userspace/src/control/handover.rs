//! One version takes over from another: both ends of the request.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{
    runtime::Builder,
    sync::broadcast::{Sender, channel},
    time::{Instant, sleep},
};

use crate::{
    api::{Client, Peer, Problem, ProblemKind, StatusView, TakeOver, Taken},
    keeper::Link,
};

/// How long a server may take to read its configuration, and the next one to serve.
const PATIENCE: Duration = Duration::from_secs(25);
const INTERVAL: Duration = Duration::from_millis(50);

/// The server's end.
#[derive(Clone, Debug)]
pub struct Handover {
    keeper: Link,
    outcomes: Sender<Result<(), String>>,
}

impl Handover {
    /// By this keeper.
    pub fn new(keeper: Link) -> Self {
        Self { keeper, outcomes: channel(1).0 }
    }

    /// Tells those who asked that this process leaves.
    pub(crate) fn leaving(&self) {
        // Nobody may have asked: it can be the keeper's own doing.
        self.outcomes.send(Ok(())).ok();
    }

    /// Tells them that it goes on.
    pub(crate) fn not_replaced(&self, why: String) {
        self.outcomes.send(Err(why)).ok();
    }

    /// Has another executable take over, which root alone may ask for: it gets the capabilities of this one. Returns when it is about to serve.
    pub(crate) async fn request(&self, peer: &Peer, executable: &Path) -> Result<Taken, Problem> {
        if !peer.uid.is_root() {
            return Err(Problem::new(ProblemKind::NotPermitted, "only root may have another program serve"));
        }
        let mut outcomes = self.outcomes.subscribe();
        self.keeper.replace(executable);
        let hint = "the one that serves goes on; anyportd's log says more";
        match tokio::time::timeout(PATIENCE, outcomes.recv()).await {
            Ok(Ok(Ok(()))) => Ok(Taken { pid: std::process::id() }),
            Ok(Ok(Err(why))) => Err(Problem::new(ProblemKind::Failed, why).hint(hint)),
            Ok(Err(_)) | Err(_) => Err(Problem::new(
                ProblemKind::Failed,
                format!("{} has not said for {} s that it could serve", executable.display(), PATIENCE.as_secs()),
            )
            .hint(hint)),
        }
    }
}

fn executable_of(pid: u32) -> anyhow::Result<PathBuf> {
    let link = format!("/proc/{pid}/exe");
    fs::read_link(&link).with_context(|| format!("read {link}"))
}

/// `anyportd --takeover`: has this very program serve in the place of the one that answers at the control socket.
///
/// # Errors
/// It does not; the one that served before goes on, or serves again.
pub fn take_over(socket: &Path) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let own = env::current_exe().context("find this executable")?;
    let client = Client::new(socket.to_owned());
    runtime.block_on(async {
        let asked = client.post("/v1/takeover", &TakeOver { executable: own.clone() }).await;
        let Taken { pid: before } = asked.map_err(in_words).context("take over")?;
        let status = wait_for_another(&client, before).await?;
        let serving = executable_of(status.pid).context("find the executable that serves")?;
        if serving != own {
            bail!(
                "take over: {} could not serve, and its log says why; {} serves again, with pid {}",
                own.display(),
                serving.display(),
                status.pid
            );
        }
        Ok(())
    })
}

/// The state of a server that is not `before`.
async fn wait_for_another(client: &Client, before: u32) -> anyhow::Result<StatusView> {
    let end = Instant::now() + PATIENCE;
    loop {
        match client.get::<StatusView>("/v1/status").await {
            Ok(status) if status.pid != before => return Ok(status),
            Err(problem) if Instant::now() > end => {
                return Err(in_words(problem)).context("take over: nobody serves yet; anyportd's log says why");
            }
            Ok(_) if Instant::now() > end => bail!("take over: pid {before} still serves"),
            _ => sleep(INTERVAL).await,
        }
    }
}

fn in_words(problem: Problem) -> anyhow::Error {
    let Problem { error, hint, .. } = problem;
    if hint.is_empty() { anyhow::anyhow!("{error}") } else { anyhow::anyhow!("{error}; {hint}") }
}
