//! The control socket of BIRD 2, as `birdc` speaks it.
//!
//! Each command is answered by lines, of which the last begins with a number of four digits and a blank, others with such a number and
//! `-`, or with a blank. Numbers from 8000 on are errors (`doc/reply_codes` in BIRD's source, looked at in 2.0.12).

use std::{io::ErrorKind, path::Path, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Take},
    net::UnixStream,
    time::{Instant, sleep, timeout},
};

use super::Announce;
use crate::text::{list_of, remark};

/// How long BIRD may take to read its configuration.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of an answer that are read.
const LONGEST: u64 = 64 << 10;
const ERRORS: u16 = 8000;

/// How long the routes may take that it has read.
const SETTLING: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);
/// Sessions that are asked what they export.
const MOST_SESSIONS: usize = 64;

/// A BIRD, and what it is to have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Router<'a> {
    socket: &'a Path,
    /// The file that is to be a part of its configuration.
    file: &'a Path,
    /// What its protocols begin with.
    name: &'a str,
    /// Prefixes of IPv4 and of IPv6.
    wanted: [u64; 2],
}

/// Why what was told does not have its effect.
#[derive(Debug)]
pub(super) enum Doubt {
    /// The router does not have it.
    Missing(anyhow::Error),
    /// It has it, and tells no other router.
    NotPassedOn(String),
}

impl<'a> Router<'a> {
    /// The one that is to be told, if one is.
    pub(super) fn of(announce: &'a Announce, wanted: [u64; 2]) -> Option<Self> {
        let Announce { file, reload, protocol, .. } = announce;
        reload.as_ref().map(|socket| Self { socket, file, name: protocol, wanted })
    }

    /// Has BIRD read its configuration again, and waits until it has the prefixes of the file and no others.
    ///
    /// # Errors
    /// It does not answer, does not take its configuration, or does not read the file.
    pub(super) async fn configure(&self) -> anyhow::Result<()> {
        let attempt = || format!("have BIRD at {} read its configuration", self.socket.display());
        let done = async {
            let mut bird = self.connect().await?;
            if let Err(error) = bird.ask("configure").await {
                let is_twice = error.to_string().contains("already defined");
                return Err(if is_twice { error.context(self.twice()) } else { error });
            }
            let end = Instant::now() + SETTLING;
            loop {
                match self.expect_routes(&mut bird).await {
                    Err(_) if Instant::now() < end => sleep(PAUSE).await,
                    done => return done,
                }
            }
        };
        within(done).await.with_context(attempt)
    }

    fn twice(&self) -> String {
        format!(
            "{}4 or {}6 is there twice: does another anyportd write them, or is the file included twice? announce.protocol gives \
             this one's another name",
            self.name, self.name
        )
    }

    /// Asks whether it has the prefixes, and whether it exports them if that is to be asked, too.
    ///
    /// # Errors
    /// What is not so.
    pub(super) async fn look(&self, with_exports: bool) -> Result<(), Doubt> {
        let attempt = || format!("ask BIRD at {} for what it was told", self.socket.display());
        let done = async {
            let mut bird = self.connect().await?;
            self.expect_routes(&mut bird).await?;
            Ok(bird)
        };
        let mut bird = within(done).await.with_context(attempt).map_err(Doubt::Missing)?;
        if !with_exports {
            return Ok(());
        }
        // A BIRD with many routes takes long for this: then it is not known.
        match within(self.exports(&mut bird)).await {
            Ok(Some(why)) => Err(Doubt::NotPassedOn(why)),
            Ok(None) | Err(_) => Ok(()),
        }
    }

    async fn connect(&self) -> anyhow::Result<Conversation> {
        let stream = match UnixStream::connect(self.socket).await {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                return Err(error).context("anyportd's user has to be a member of the socket's group, mostly bird");
            }
            connected => connected?,
        };
        let mut bird = Conversation(BufReader::new(stream.take(0)));
        bird.answer().await?;
        Ok(bird)
    }

    async fn expect_routes(&self, bird: &mut Conversation) -> anyhow::Result<()> {
        for (family, wanted) in [4, 6].into_iter().zip(self.wanted) {
            let name = format!("{}{family}", self.name);
            let answer = bird.ask(&format!("show route protocol '{name}' count")).await;
            let answer = answer.with_context(|| format!("its configuration has to include {}", self.file.display()))?;
            let found = counted(&answer);
            if found != wanted {
                bail!(
                    "{name} has {found} routes, and {} has {wanted} of them: does it include that file?",
                    self.file.display()
                );
            }
        }
        Ok(())
    }

    /// Why others do not learn of the prefixes, if so.
    async fn exports(&self, bird: &mut Conversation) -> anyhow::Result<Option<String>> {
        if self.wanted == [0; 2] {
            return Ok(None);
        }
        let protocols = bird.ask("show protocols").await?;
        let sessions: Vec<(&str, bool)> = protocols.iter().filter_map(|line| session(line)).collect();
        let up: Vec<&str> = sessions.iter().filter(|it| it.1).map(|it| it.0).take(MOST_SESSIONS).collect();
        if up.is_empty() {
            let names: Vec<&str> = sessions.iter().map(|it| it.0).collect();
            let what = if names.is_empty() { "it has none".to_owned() } else { list_of(&names) };
            return Ok(Some(format!("BIRD has the prefixes, and no session with another router that is up: {what}")));
        }
        for (family, wanted) in [4, 6].into_iter().zip(self.wanted) {
            let (mut most, mut is_known) = (0, true);
            for name in &up {
                let question = format!("show route export '{name}' protocol '{}{family}' count", self.name);
                match bird.ask(&question).await {
                    Ok(answer) => most = most.max(counted(&answer)),
                    // A session without a table of the family exports nothing of it.
                    Err(error) if error.to_string().contains("No valid tables") => {}
                    Err(_) => is_known = false,
                }
                if most >= wanted {
                    break;
                }
            }
            if is_known && most < wanted {
                return Ok(Some(format!(
                    "BIRD exports {most} of {wanted} prefixes of IPv{family} to each of its sessions at most ({}): their export \
                     filters have to accept {}{family}",
                    list_of(&up),
                    self.name
                )));
            }
        }
        Ok(None)
    }
}

async fn within<T>(done: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    timeout(PATIENCE, done).await.unwrap_or_else(|_| bail!("no answer for {} s", PATIENCE.as_secs()))
}

/// How many routes an answer of `show route … count` counts, in all tables: `1007-2 of 3 routes for 2 networks in table master4`, and
/// further lines with a blank in the place of the number.
fn counted(answer: &[String]) -> u64 {
    let count =
        |line: &String| line.strip_prefix("1007-").unwrap_or(line).trim().split_once(" of ")?.0.parse::<u64>().ok();
    answer.iter().filter_map(count).sum()
}

/// The name of a protocol that speaks with other routers, and whether it does at the moment, from a line of `show protocols`.
fn session(line: &str) -> Option<(&str, bool)> {
    let line = line.strip_prefix("1002-").unwrap_or(line);
    let mut words = line.split_whitespace();
    let (name, kind, _, state) = (words.next()?, words.next()?, words.next()?, words.next()?);
    ["BGP", "OSPF", "RIP", "Babel"].contains(&kind).then_some((name, state == "up"))
}

struct Conversation(BufReader<Take<UnixStream>>);

impl Conversation {
    async fn ask(&mut self, command: &str) -> anyhow::Result<Vec<String>> {
        self.0.get_mut().get_mut().write_all(format!("{command}\n").as_bytes()).await?;
        self.answer().await
    }

    /// Waits for an answer that is no error, and returns its lines but for the last.
    async fn answer(&mut self) -> anyhow::Result<Vec<String>> {
        self.0.get_mut().set_limit(LONGEST);
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line).await? == 0 {
                bail!("it has closed the connection");
            }
            match last_of(&line) {
                Some((code, text)) if code >= ERRORS => bail!("it says: {}", remark(text)),
                Some(_) => return Ok(lines),
                None => lines.push(line),
            }
        }
    }
}

/// The number and the text of an answer's last line.
fn last_of(line: &str) -> Option<(u16, &str)> {
    let (code, text) = (line.get(..4)?, line.get(4..)?);
    Some((code.parse().ok()?, text.strip_prefix(' ')?.trim_end()))
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::net::UnixListener, thread};

    use tokio::runtime::Builder;

    use super::{Announce, Router, counted, last_of, session};

    #[test]
    fn answers_are_read() {
        let lines = [
            "1007-2 of 3 routes for 2 networks in table master4\n",
            " 500000 of 500001 routes for 5 networks in table t\n",
            "x\n",
        ];
        assert_eq!(counted(&lines.map(str::to_owned)), 500_002);
        assert_eq!(
            session(" upstream4  BGP        ---        start  21:20:27.670  Idle  \n"),
            Some(("upstream4", false))
        );
        assert_eq!(session("1002-o1   OSPF  master4    up     21:20:27.670  Alone\n"), Some(("o1", true)));
        for line in [
            "2002-Name       Proto      Table      State  Since         Info\n",
            " anyport4   Static     master4    up\n",
            "",
        ] {
            assert_eq!(session(line), None, "{line:?}");
        }
    }

    #[test]
    fn the_last_line_of_an_answer_is_known() {
        assert_eq!(last_of("0003 Reconfigured\n"), Some((3, "Reconfigured")));
        assert_eq!(last_of("8002 bird.conf:1:10 syntax error\n"), Some((8002, "bird.conf:1:10 syntax error")));
        assert_eq!(last_of("0000 \n"), Some((0, "")));
        for line in ["0002-Reading configuration from bird.conf\n", " anyport4   Static\n", "\n", "000é x\n"] {
            assert_eq!(last_of(line), None, "{line:?}");
        }
    }

    #[test]
    fn whatever_is_answered_there_is_an_end() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("bird.ctl");
        let file = directory.path().join("announced.conf");
        let announce = Announce { file, reload: Some(socket.clone()), ..Announce::default() };
        let ask = || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            let router = Router::of(&announce, [2, 0]).unwrap();
            runtime.block_on(router.configure()).map_err(|error| format!("{error:#}"))
        };
        assert!(ask().unwrap_err().contains("No such file"));
        let listener = UnixListener::bind(&socket).unwrap();
        let long = vec![b'x'; 100_000];
        for (answers, expected) in [
            (
                &b"0001 BIRD ready.\n0002-Reading\n0003 Reconfigured\n1007-2 of 2 routes\n0000 \n1007-0 of 0 routes\n0000 \n"[..],
                None,
            ),
            (b"0001 BIRD ready.\n0002-Reading\n8002 a:1:2 syntax error\n", Some("it says: a:1:2 syntax error")),
            (b"0001 BIRD ready.\n0003 Reconfigured\n9001 syntax error\n", Some("closed the connection")),
            (b"0001 BIRD ready.\n0002-Reading\n8002 a:1:2 Symbol 'anyport4' already defined\n", Some("announce.protocol")),
            (b"0001 BIRD ready.\n", Some("closed the connection")),
            (&long, Some("closed the connection")),
            (b"\xff\xff\n", Some("utf-8")),
        ] {
            thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut stream, _) = listener.accept().unwrap();
                    // Who has heard enough does not listen to the end.
                    stream.write_all(answers).ok();
                    stream.shutdown(std::net::Shutdown::Write).ok();
                    std::io::copy(&mut stream, &mut std::io::sink()).ok();
                });
                match (ask(), expected) {
                    (Ok(()), None) => {}
                    (Err(error), Some(expected)) => assert!(error.contains(expected), "{error}"),
                    (answered, expected) => panic!("{answered:?}, {expected:?}"),
                }
            });
        }
    }
}
