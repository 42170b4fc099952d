//! Programs of the host, run to their end, and waiting for what they show.

use std::{
    env, fmt,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Output, Stdio},
    sync::LazyLock,
    thread::sleep,
    time::{Duration, Instant},
};

/// What a program left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The exit status; 128 and the signal's number for one that was killed.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Runs `command` to its end in the calling thread's namespaces.
    pub fn of(command: &mut Command) -> Self {
        let output = command.stdin(Stdio::null()).output();
        output.unwrap_or_else(|error| panic!("can't run {command:?}: {error}")).into()
    }
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt as _;
        Self {
            status: output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0)),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { status, stdout, stderr } = self;
        write!(f, "exit status {status}")?;
        for (name, text) in [("stdout", stdout), ("stderr", stderr)] {
            if !text.is_empty() {
                write!(f, "\n{name}: {}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub struct Running(pub Child);

impl Running {
    /// Its number.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Waits for the first line that it prints, and listens to no other.
    pub fn first_line(&mut self) -> String {
        let mut line = String::new();
        let output = self.0.stdout.take().expect("its standard output is a pipe that nobody has read yet");
        BufReader::new(output).read_line(&mut line).expect("a first line");
        line
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended already is as good.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// How many times longer anything may take on a machine that is busy with something else, too.
const BUSY: u32 = 4;

/// How long to wait on this machine for what takes up to `limit` on a usual one: `ANYPORT_TEST_PATIENCE` times as long.
pub fn patience(limit: Duration) -> Duration {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| match env::var("ANYPORT_TEST_PATIENCE") {
        Ok(factor) => factor.parse().expect("a whole number in ANYPORT_TEST_PATIENCE"),
        Err(_) => 1,
    });
    *FACTOR * limit
}

/// Asks `probe` until it answers, and panics with `what` and its last complaint when `limit` is over, which is one for a
/// machine that does nothing else.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<T, String>) -> T {
    let limit = patience(BUSY * limit);
    let end = Instant::now() + limit;
    loop {
        match probe() {
            Ok(value) => return value,
            Err(last) => assert!(Instant::now() < end, "no {what} within {limit:?}; last: {last}"),
        }
        sleep(Duration::from_millis(10));
    }
}
