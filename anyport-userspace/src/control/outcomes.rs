//! What became of commands, by the ids that their clients gave them: a client that has lost an answer asks again with the same id, and gets
//! the answer instead of having it done twice.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::{
    body::Bytes,
    extract::{ConnectInfo, FromRequestParts},
    http::{HeaderMap, header::CONTENT_TYPE, request::Parts},
    response::{IntoResponse as _, Response},
};
use nix::unistd::Uid;
use serde::Serialize;
use tokio::sync::watch;

use crate::{
    api::{FIRST_HEADER, ID_HEADER, Peer, Problem, ProblemKind, since_boot},
    events::Author,
};

/// Commands of a user that are remembered.
const REMEMBERED: usize = 256;
/// Bytes of the answers to them.
const BYTES: usize = 4 << 20;
/// Bytes of an id at most.
pub(super) const LONGEST_ID: usize = 64;

/// How a command ended: its answer as JSON, or why it was not carried out.
type Outcome = Result<Bytes, Problem>;

/// What became of the last commands of each user. Commands that are under way are remembered, too.
#[derive(Clone, Debug)]
pub(super) struct Outcomes {
    users: Arc<Mutex<HashMap<Uid, Remembered>>>,
    /// In milliseconds since the host was started, as all times here.
    begun: u64,
}

#[derive(Debug, Default)]
struct Remembered {
    /// The oldest first.
    commands: VecDeque<Command>,
    bytes: usize,
    /// When the last one came of those that were forgotten.
    forgotten: Option<u64>,
}

#[derive(Debug)]
struct Command {
    id: String,
    /// What was asked for: method and path.
    what: String,
    came: u64,
    outcome: watch::Receiver<Option<Outcome>>,
}

/// A command as it was asked for: which one it is, if it has an id.
#[derive(Debug)]
pub(super) struct Asked {
    outcomes: Outcomes,
    uid: Uid,
    author: Author,
    what: String,
    id: Option<String>,
    /// When it was asked for first, if it is asked for again.
    first: Option<u64>,
}

impl Outcomes {
    pub(super) fn new() -> Self {
        Self { users: Arc::default(), begun: since_boot() }
    }

    fn users(&self) -> MutexGuard<'_, HashMap<Uid, Remembered>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Asked {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let outcomes = parts.extensions.get::<Outcomes>().cloned().unwrap_or_else(Outcomes::new);
        let peer = parts.extensions.get::<ConnectInfo<Peer>>();
        let first = header(&parts.headers, FIRST_HEADER)?.map(|first| first.parse());
        let unreadable = |error| Problem::new(ProblemKind::Invalid, format!("read {FIRST_HEADER}: {error}"));
        let id = header(&parts.headers, ID_HEADER)?;
        if id.as_ref().is_some_and(|id| !(1..=LONGEST_ID).contains(&id.len())) {
            let error = format!("the id of a request ({ID_HEADER}) has from 1 to {LONGEST_ID} characters");
            return Err(Problem::new(ProblemKind::Invalid, error));
        }
        Ok(Self {
            outcomes,
            uid: peer.map_or(Uid::from_raw(u32::MAX), |it| it.0.uid),
            author: peer.map_or_else(|| Author::other("an unknown process"), |it| it.0.author()),
            what: format!("{} {}", parts.method, parts.uri),
            id,
            first: first.transpose().map_err(unreadable)?,
        })
    }
}

fn header(headers: &HeaderMap, name: &str) -> Result<Option<String>, Problem> {
    let text = headers.get(name).map(|value| value.to_str().map(ToOwned::to_owned)).transpose();
    text.map_err(|error| Problem::new(ProblemKind::Invalid, format!("read {name}: {error}")))
}

impl Asked {
    /// Who has asked.
    pub(super) fn author(&self) -> Author {
        self.author.clone()
    }

    /// The same, not to be remembered.
    pub(super) fn without_id(self) -> Self {
        Self { id: None, ..self }
    }

    /// Has the command carried out, to its end even if the client goes away, unless it was before: then the answer is that from then.
    pub(super) async fn once<T, F>(self, command: F) -> Result<Response, Problem>
    where
        T: Serialize,
        F: Future<Output = Result<T, Problem>> + Send + 'static,
    {
        let (tell, mut outcome) = watch::channel(None);
        let command = async move {
            let outcome = command.await.and_then(|answer| to_json(&answer));
            tell.send_replace(Some(outcome));
        };
        match self.known(&outcome)? {
            Some(known) => outcome = known,
            None => drop(tokio::spawn(command)),
        }
        let ended = outcome.wait_for(Option::is_some).await.map(|it| it.clone());
        // The command panicked.
        let failed = || Problem::new(ProblemKind::Failed, "carry the command out: it failed in the middle");
        let json = ended.ok().flatten().ok_or_else(failed)??;
        Ok(([(CONTENT_TYPE, "application/json")], json).into_response())
    }

    /// The outcome of the command of that id; one that is not known is remembered from now on.
    fn known(
        &self,
        outcome: &watch::Receiver<Option<Outcome>>,
    ) -> Result<Option<watch::Receiver<Option<Outcome>>>, Problem> {
        let Some(id) = &self.id else { return Ok(None) };
        let mut users = self.outcomes.users();
        let user = users.entry(self.uid).or_default();
        if let Some(known) = user.commands.iter().find(|it| it.id == *id) {
            if known.what != self.what {
                let error = format!("the id {id} is that of another request: {}", known.what);
                return Err(Problem::new(ProblemKind::Invalid, error).hint("give each request an id of its own"));
            }
            return Ok(Some(known.outcome.clone()));
        }
        // Asked for first before anything that is remembered here.
        if self.first.is_some_and(|first| Some(first) <= user.forgotten.max(Some(self.outcomes.begun))) {
            return Err(Problem::new(
                ProblemKind::Failed,
                "it is not known whether this was done: anyportd was started since it was asked for first, or has forgotten it",
            )
            .hint("anyportctl status, prefixes and services show what is there"));
        }
        user.remember(Command {
            id: id.clone(),
            what: self.what.clone(),
            came: since_boot(),
            outcome: outcome.clone(),
        });
        Ok(None)
    }
}

impl Remembered {
    /// Remembers a command, and forgets the oldest that have ended where that is too much.
    fn remember(&mut self, command: Command) {
        self.commands.push_back(command);
        self.bytes = self.commands.iter().map(Command::bytes).sum();
        while self.commands.len() > REMEMBERED || self.bytes > BYTES {
            let Some(at) = self.commands.iter().position(Command::has_ended) else { return };
            let Some(gone) = self.commands.remove(at) else { return };
            self.bytes -= gone.bytes();
            self.forgotten = self.forgotten.max(Some(gone.came));
        }
    }
}

impl Command {
    /// One that panicked has no outcome, and tells none any more.
    fn has_ended(&self) -> bool {
        self.outcome.borrow().is_some() || self.outcome.has_changed().is_err()
    }

    fn bytes(&self) -> usize {
        self.outcome.borrow().as_ref().map_or(0, |it| it.as_ref().map_or(0, Bytes::len))
    }
}

fn to_json(answer: &impl Serialize) -> Outcome {
    let json = serde_json::to_vec(answer);
    json.map(Bytes::from).map_err(|error| Problem::new(ProblemKind::Failed, format!("write the answer: {error}")))
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering::Relaxed},
        },
        time::Duration,
    };

    use nix::unistd::Uid;
    use tokio::time::{sleep, timeout};

    use super::{Asked, Outcomes, REMEMBERED, since_boot};

    fn asked(outcomes: &Outcomes, id: &str, age: Option<u64>) -> Asked {
        let (id, first) = (Some(id.to_owned()), age.map(|age| since_boot().saturating_sub(age)));
        let (uid, author, what) = (Uid::from_raw(7), super::Author::other("a test"), "POST /".to_owned());
        Asked { outcomes: outcomes.clone(), uid, author, what, id, first }
    }

    #[tokio::test]
    async fn a_command_is_done_once_however_often_it_is_asked_for() {
        let (outcomes, done) = (Outcomes::new(), Arc::new(AtomicUsize::new(0)));
        sleep(Duration::from_millis(5)).await;
        let ask = |id: &str, age| {
            let done = Arc::clone(&done);
            asked(&outcomes, id, age).once(async move {
                sleep(Duration::from_millis(50)).await;
                Ok(done.fetch_add(1, Relaxed))
            })
        };
        // The client goes away in the middle of it, and asks again.
        timeout(Duration::from_millis(10), ask("a", None)).await.unwrap_err();
        ask("a", Some(10)).await.unwrap();
        assert_eq!(done.load(Relaxed), 1);
        // It never came here, and this process was there all the time.
        ask("b", Some(1)).await.unwrap();
        // This process did not see it come.
        let problem = ask("c", Some(60_000)).await.unwrap_err();
        assert!(problem.error.contains("not known"), "{problem}");
        assert_eq!(done.load(Relaxed), 2);
        let mut other = asked(&outcomes, "a", None);
        other.what = "DELETE /".to_owned();
        assert!(other.once(async { Ok(()) }).await.unwrap_err().error.contains("another request"));
    }

    #[tokio::test]
    async fn what_was_forgotten_is_not_done_again() {
        let outcomes = Outcomes::new();
        for number in 0..=REMEMBERED {
            asked(&outcomes, &number.to_string(), None).once(async { Ok(()) }).await.unwrap();
        }
        let problem = asked(&outcomes, "0", Some(1_000)).once(async { Ok(()) }).await.unwrap_err();
        assert!(problem.error.contains("not known"), "{problem}");
        assert_eq!(outcomes.users()[&Uid::from_raw(7)].commands.len(), REMEMBERED);
    }
}
