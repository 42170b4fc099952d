//! Stands in for the process that serves, and says everything to the keeper that such a process can say, and more. Writes down what came of it
//! as `impostor.json` in the state directory, and stops.
#![expect(clippy::print_stderr, reason = "its log is the daemon's")]

use std::{
    env, fs,
    io::{IoSlice, stdin},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::{PermissionsExt as _, symlink},
    },
    path::{Path, PathBuf},
    thread::{sleep, spawn},
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, raise},
        socket::{ControlMessage, MsgFlags, recv, sendmsg, setsockopt, sockopt},
        stat::Mode,
    },
    unistd::mkfifo,
};
use serde_json::{Value, json};

/// Messages of a flood.
const FLOOD: usize = 20_000;
/// Sockets that are to be kept, more than the keeper takes.
const KEPT: usize = 20_000;

/// The keeper, and how many messages it was sent.
struct Keeper {
    socket: OwnedFd,
    sent: usize,
}

impl Keeper {
    fn say(&mut self, text: &[u8], passed: &[i32]) -> Result<()> {
        let rights = [ControlMessage::ScmRights(passed)];
        let rights = if passed.is_empty() { &[][..] } else { &rights };
        loop {
            let message = [IoSlice::new(text)];
            match sendmsg::<()>(self.socket.as_raw_fd(), &message, rights, MsgFlags::empty(), None) {
                Ok(_) => break,
                // What is in flight counts against a limit of the user.
                Err(Errno::EINTR | Errno::ETOOMANYREFS) => sleep(Duration::from_millis(1)),
                Err(Errno::EMSGSIZE) => return Ok(()),
                Err(error) => return Err(error).context("say something to the keeper"),
            }
        }
        self.sent += 1;
        Ok(())
    }

    fn report(&mut self, report: &Value) -> Result<()> {
        self.say(report.to_string().as_bytes(), &[])
    }
}

fn main() -> Result<()> {
    anyhow::ensure!(env::var("ANYPORT_KEEPER").is_ok(), "this is started by a keeper");
    let arguments: Vec<String> = env::args().collect();
    let at = arguments.iter().position(|it| it == "--state-dir").context("--state-dir is among the arguments")?;
    let directory = PathBuf::from(arguments.get(at + 1).context("the state directory")?);
    let mut keeper = Keeper { socket: stdin().as_fd().try_clone_to_owned()?, sent: 0 };
    keeper.report(&json!("prepared"))?;
    let mut order = vec![0; 16 << 10];
    while !order.starts_with(br#"{"begin""#) {
        order.fill(0);
        anyhow::ensure!(recv(keeper.socket.as_raw_fd(), &mut order, MsgFlags::empty())? > 0, "the keeper has ended");
    }
    keeper.report(&json!("ready"))?;
    // One that takes no orders is killed.
    let orders = keeper.socket.try_clone()?;
    spawn(
        move || while recv(orders.as_raw_fd(), &mut [0; 16 << 10], MsgFlags::empty()).is_ok_and(|length| length > 0) {},
    );
    let marks = directory.join("marks");
    fs::create_dir_all(&marks)?;
    ask_for_programs(&mut keeper, &directory, &marks)?;
    say_nonsense(&mut keeper)?;
    have_sockets_kept(&mut keeper)?;
    // What was started has had its time.
    sleep(Duration::from_secs(1));
    let started: Vec<String> =
        fs::read_dir(&marks)?.flatten().map(|mark| mark.file_name().to_string_lossy().into_owned()).collect();
    let report = json!({ "started": started, "sent": keeper.sent });
    fs::write(directory.join("impostor.new"), report.to_string())?;
    fs::rename(directory.join("impostor.new"), directory.join("impostor.json"))?;
    raise(Signal::SIGSTOP)?;
    eprintln!("the impostor goes on, and ends");
    Ok(())
}

/// Programs that it could write, and what is none.
fn ask_for_programs(keeper: &mut Keeper, directory: &Path, marks: &Path) -> Result<()> {
    let program = directory.join("anyportd-own");
    let text = format!("#!/bin/sh\nid > {}/own\ngrep Cap /proc/self/status >> {0}/own\n", marks.display());
    fs::write(&program, text)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let [link, pipe] = ["anyportd-link", "anyportd-pipe"].map(|name| directory.join(name));
    symlink(&program, &link)?;
    mkfifo(&pipe, Mode::from_bits_truncate(0o755))?;
    let copy = directory.join("anyportd-shell");
    fs::copy("/bin/sh", &copy)?;
    let long = "/a".repeat(7_000);
    let paths = [
        program.to_string_lossy().into_owned(),
        link.to_string_lossy().into_owned(),
        pipe.to_string_lossy().into_owned(),
        copy.to_string_lossy().into_owned(),
        format!("{}/../{}", directory.display(), "anyportd-own"),
        "/dev/zero".into(),
        "/bin/sh".into(),
        "/usr/bin/env".into(),
        "/proc/self/exe".into(),
        format!("/proc/{}/root{}", std::process::id(), program.display()),
        "anyportd-own".into(),
        String::new(),
        "/".into(),
        long,
    ];
    for path in paths {
        keeper.report(&json!({ "replace": path }))?;
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn say_nonsense(keeper: &mut Keeper) -> Result<()> {
    let null = fs::File::open("/dev/null")?;
    for text in ["", "x", "{}", "[]", "null", r#"{"keep":7}"#, r#"{"remember":{}}"#, r#"{"replace":[]}"#, "\u{0}\u{0}"]
    {
        if !text.is_empty() {
            keeper.say(text.as_bytes(), &[null.as_raw_fd(); 253])?;
        }
    }
    keeper.say(&vec![b'['; 16 << 10], &[])?;
    let failed = json!({ "failed": "x".repeat(4 << 10) });
    for number in 0..FLOOD {
        match number % 4 {
            0 => keeper.report(&json!({ "forget": "none" }))?,
            1 => keeper.report(&json!("prepared"))?,
            2 => keeper.report(&json!("alive"))?,
            _ => keeper.report(&failed)?,
        }
    }
    Ok(())
}

fn have_sockets_kept(keeper: &mut Keeper) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let slow = TcpStream::connect(listener.local_addr()?)?;
    let (_peer, _) = listener.accept()?;
    setsockopt(&slow, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 60 })?;
    slow.set_nonblocking(true)?;
    while std::io::Write::write(&mut &slow, &[0; 4096]).is_ok() {}
    keeper.say(br#"{"keep":"slow"}"#, &[slow.as_raw_fd()])?;
    drop(slow);
    keeper.report(&json!({ "forget": "slow" }))?;
    for name in ["a:b", "a\nb", &"n".repeat(1000), "\u{202e}", "@control"] {
        keeper.say(json!({ "keep": name }).to_string().as_bytes(), &[listener.as_raw_fd()])?;
    }
    for number in 0..KEPT {
        keeper.say(format!(r#"{{"keep":"many{number}"}}"#).as_bytes(), &[listener.as_raw_fd()])?;
    }
    for number in 0..KEPT {
        keeper.report(&json!({ "forget": format!("many{number}") }))?;
    }
    keeper.report(&json!({ "forget": "@control" }))
}
