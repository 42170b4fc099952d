//! Anonymous network namespaces: they live as long as a handle, a socket or a process in them.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd as _, OwnedFd},
    panic::resume_unwind,
    process::{Child, Command},
    sync::{
        Arc, Mutex, OnceLock,
        mpsc::{Sender, channel},
    },
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::host::{Outcome, patience, wait_for};

/// A network namespace, kept by its descriptor.
#[derive(Clone, Debug)]
pub struct Netns(Arc<OwnedFd>);

impl Default for Netns {
    fn default() -> Self {
        Self::new()
    }
}

impl Netns {
    /// A new namespace with `lo` up and without duplicate address detection, so that addresses are usable at once.
    pub fn new() -> Self {
        let fd = join(thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a new network namespace (needs root)");
            File::open("/proc/thread-self/ns/net").expect("the new namespace's file")
        }));
        let namespace = Self(Arc::new(fd.into()));
        for scope in ["all", "default", "lo"] {
            namespace.sysctl(&format!("net.ipv6.conf.{scope}.accept_dad"), "0");
        }
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs `f` on a thread inside the namespace. What it opens stays in the namespace, wherever it is used later.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                self.settle();
                f()
            });
            inside.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Runs `ip` with `arguments` (split at blanks), which must succeed.
    pub fn ip(&self, arguments: &str) -> String {
        self.run("ip", arguments.split_whitespace())
    }

    /// Runs a program, which must succeed, and returns its standard output.
    pub fn run(&self, program: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
        let mut command = Command::new(program);
        command.args(arguments);
        let outcome = self.output(&mut command);
        assert!(outcome.status == 0, "{command:?} failed: {outcome}");
        outcome.stdout
    }

    /// Runs a program to its end.
    pub fn output(&self, command: &mut Command) -> Outcome {
        self.enter(|| Outcome::of(command))
    }

    /// Starts a program from a thread that lives as long as this process: `setpriv --pdeathsig` means that thread.
    pub fn spawn(&self, command: Command) -> Child {
        type Request = (Netns, Command, Sender<io::Result<Child>>);
        static STARTER: OnceLock<Mutex<Sender<Request>>> = OnceLock::new();
        let starter = STARTER.get_or_init(|| {
            let (requests, inbox) = channel::<Request>();
            thread::spawn(move || {
                for (namespace, mut command, answer) in inbox {
                    namespace.settle();
                    answer.send(command.spawn()).expect("someone waits for the program");
                }
            });
            Mutex::new(requests)
        });
        let (answer, started) = channel();
        let what = format!("{command:?}");
        let requests = starter.lock().expect("no thread panicked while it sent").clone();
        requests.send((self.clone(), command, answer)).expect("the starter thread lives");
        started.recv().expect("an answer").unwrap_or_else(|error| panic!("can't start {what}: {error}"))
    }

    /// Where other processes find the namespace, for example `nsenter --net=…` while a test hangs.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// The inode by which the kernel names the namespace, for example in `bpftool link`.
    pub fn inode(&self) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(self.path()).expect("the namespace's file").ino()
    }

    /// Sets a `net.…` parameter of the namespace.
    pub fn sysctl(&self, name: &str, value: &str) {
        let file = format!("/proc/sys/{}", name.replace('.', "/"));
        self.enter(|| fs::write(&file, value)).unwrap_or_else(|error| panic!("{file} = {value}: {error}"));
    }

    /// Joins this namespace with `other` by a pair of interfaces, both up, with these addresses (`ADDR/LEN`).
    pub fn join(&self, other: &Self, here: (&str, &[&str]), there: (&str, &[&str])) {
        self.ip(&format!("link add {} type veth peer name {} netns {}", here.0, there.0, other.path()));
        for (namespace, (interface, addresses)) in [(self, here), (other, there)] {
            for address in addresses {
                let nodad = if address.contains(':') { "nodad" } else { "" };
                namespace.ip(&format!("address add {address} dev {interface} {nodad}"));
            }
            namespace.sysctl(&format!("net.ipv6.conf.{interface}.accept_dad"), "0");
            namespace.sysctl(&format!("net.ipv6.neigh.{interface}.retrans_time_ms"), "20");
            namespace.ip(&format!("link set {interface} up"));
        }
        // A fresh cable loses packets until both ends have noticed it, those of IPv6 above all.
        for address in there.1 {
            let (address, _) = address.split_once('/').expect("ADDR/LEN");
            let closed = SocketAddr::new(address.parse().expect("an address"), 9);
            wait_for("way over the new cable", Duration::from_secs(10), || {
                let answer = self.enter(|| TcpStream::connect_timeout(&closed, patience(Duration::from_millis(100))));
                match answer.map_err(|error| (error.kind(), error)) {
                    Err((io::ErrorKind::ConnectionRefused, _)) => Ok(()),
                    other => Err(format!("{closed}: {other:?}")),
                }
            });
        }
    }

    /// Makes the calling thread a member of the namespace, for good.
    fn settle(&self) {
        setns(&*self.0, CloneFlags::CLONE_NEWNET).expect("entering a network namespace");
    }
}

fn join<T>(handle: thread::JoinHandle<T>) -> T {
    handle.join().unwrap_or_else(|panic| resume_unwind(panic))
}
