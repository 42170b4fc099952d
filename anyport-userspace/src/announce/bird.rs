//! The control socket of BIRD 2, as `birdc` speaks it.
//!
//! Each command is answered by lines, of which the last begins with a number of four digits and a blank, others with such a number and
//! `-`, or with a blank. Numbers from 8000 on are errors (`doc/reply_codes` in BIRD's source, looked at in 2.0.12).

use std::{io::ErrorKind, path::Path, time::Duration};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Take},
    net::UnixStream,
    time::timeout,
};

/// How long BIRD may take to read its configuration.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of an answer that are read.
const LONGEST: u64 = 64 << 10;
const ERRORS: u16 = 8000;

/// Has BIRD read its configuration again, of which `file` is to be a part.
///
/// # Errors
/// It does not answer, does not take its configuration, or does not read the file.
pub(super) async fn configure(socket: &Path, file: &Path) -> anyhow::Result<()> {
    let attempt = || format!("have BIRD at {} read its configuration", socket.display());
    match timeout(PATIENCE, converse(socket, file)).await {
        Ok(done) => done.with_context(attempt),
        Err(_) => bail!("{}: no answer for {} s", attempt(), PATIENCE.as_secs()),
    }
}

async fn converse(socket: &Path, file: &Path) -> anyhow::Result<()> {
    let connected = UnixStream::connect(socket).await;
    if connected.as_ref().is_err_and(|error| error.kind() == ErrorKind::PermissionDenied) {
        return connected.map(drop).context("anyportd's user has to be a member of the socket's group, mostly bird");
    }
    let mut bird = Conversation(BufReader::new(connected?.take(0)));
    bird.answer().await?;
    bird.ask("configure").await?;
    if let Err(error) = bird.ask("show protocols anyport4").await {
        return Err(error).with_context(|| format!("its configuration has to include {}", file.display()));
    }
    Ok(())
}

struct Conversation(BufReader<Take<UnixStream>>);

impl Conversation {
    async fn ask(&mut self, command: &str) -> anyhow::Result<()> {
        self.0.get_mut().get_mut().write_all(format!("{command}\n").as_bytes()).await?;
        self.answer().await
    }

    /// Waits for an answer that is no error.
    async fn answer(&mut self) -> anyhow::Result<()> {
        self.0.get_mut().set_limit(LONGEST);
        let mut line = String::new();
        loop {
            line.clear();
            if self.0.read_line(&mut line).await? == 0 {
                bail!("it has closed the connection");
            }
            let Some((code, text)) = last_of(&line) else { continue };
            if code >= ERRORS {
                bail!("it says: {text}");
            }
            return Ok(());
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

    use super::{configure, last_of};

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
        let ask = || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(configure(&socket, &file)).map_err(|error| format!("{error:#}"))
        };
        assert!(ask().unwrap_err().contains("No such file"));
        let listener = UnixListener::bind(&socket).unwrap();
        let long = vec![b'x'; 100_000];
        for (answers, expected) in [
            (&b"0001 BIRD ready.\n0002-Reading\n0003 Reconfigured\n2002-Name\n anyport4\n0000 \n"[..], None),
            (b"0001 BIRD ready.\n0002-Reading\n8002 a:1:2 syntax error\n", Some("it says: a:1:2 syntax error")),
            (b"0001 BIRD ready.\n0003 Reconfigured\n8003 No protocols match\n", Some("has to include")),
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
