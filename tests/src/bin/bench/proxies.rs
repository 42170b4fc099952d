//! The proxies that are compared: each with one thread, on a host of its own before an upstream of its own.

use std::{
    fmt, fs, iter,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use anyport_tests::{
    daemon::{Daemon, Setup},
    dial,
    holdings::Holdings,
    host::{Running, wait_for},
    prerequisites,
    topology::{HOST, SERVER, Topology},
};
use tempfile::TempDir;

use super::traffic::{
    on_first_cpu, separate, start, start_upstream,
    upstream::{ECHO, SOURCE, WITH_HEADER},
};

/// Where HAProxy and nginx wait for the first of [`WAYS`]; each has a port of its own.
const FIRST_PORT: u16 = 8_000;
/// Where Debian keeps nginx's module for streams; elsewhere it is built in.
const STREAM_MODULE: &str = "usr/lib/nginx/modules/ngx_stream_module.so";

/// Which proxies are measured beside those of this machine.
#[derive(Debug, clap::Args)]
pub(crate) struct Others {
    /// The root file system of a newer Debian, whose HAProxy and nginx are measured, too.
    #[arg(long, value_name = "DIRECTORY")]
    newer: Option<PathBuf>,
    /// The anyportd of an earlier version, which is measured, too.
    #[arg(long, value_name = "FILE")]
    before: Option<PathBuf>,
}

impl Others {
    /// All that are measured, with the bare connection first and anyport last.
    pub(crate) fn proxies(&self, rivals: &[Kind]) -> Result<Vec<Proxy>> {
        let mut proxies = vec![Proxy::new(Kind::Direct, None)?];
        for root in iter::once(None).chain(self.newer.clone().map(Some)) {
            for kind in rivals {
                proxies.push(Proxy::new(*kind, root.clone())?);
            }
        }
        if let Some(executable) = &self.before {
            proxies.push(Proxy::new(Kind::Anyport, Some(executable.clone()))?);
        }
        proxies.push(Proxy::new(Kind::Anyport, None)?);
        Ok(proxies)
    }
}

/// Who is between client and upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nobody.
    Direct,
    /// HAProxy in TCP mode.
    HaProxy,
    /// nginx with its stream module.
    Nginx,
    /// anyport's handler `forward`.
    Anyport,
}

/// One of those that are compared.
#[derive(Clone, Debug)]
pub(crate) struct Proxy {
    pub(crate) kind: Kind,
    /// Its program and version.
    name: String,
    /// Where it is from, if not this machine: a root file system, or anyport's executable.
    origin: Option<PathBuf>,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name)
    }
}

impl Proxy {
    pub(crate) fn new(kind: Kind, origin: Option<PathBuf>) -> Result<Self> {
        let name = match kind {
            Kind::Direct => "no proxy".to_owned(),
            Kind::HaProxy => format!("HAProxy {}", version("haproxy", origin.as_deref())?),
            Kind::Nginx => format!("nginx {}", version("nginx", origin.as_deref())?),
            Kind::Anyport => if origin.is_some() { "anyport before" } else { "anyport" }.to_owned(),
        };
        Ok(Self { kind, name, origin })
    }

    /// Whether anyport is compared with it.
    pub(crate) fn is_rival(&self) -> bool {
        self.kind != Kind::Direct && (self.kind != Kind::Anyport || self.origin.is_some())
    }
}

/// A program and its first arguments: by the dynamic linker and with the libraries of its own root file system.
fn program(name: &str, root: Option<&Path>) -> Vec<PathBuf> {
    let Some(root) = root else { return vec![name.into()] };
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    vec![libraries.join("ld-linux-x86-64.so.2"), "--library-path".into(), libraries, root.join("usr/sbin").join(name)]
}

/// Says `2.6.12` of `HAProxy version 2.6.12-1+deb12u2 2024/…` and `1.22.1` of `nginx version: nginx/1.22.1`.
fn version(name: &str, root: Option<&Path>) -> Result<String> {
    let program = program(name, root);
    let mut command = Command::new(&program[0]);
    let output = command.args(&program[1..]).arg("-v").output().with_context(|| format!("start {name}"))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let is_number = |word: &&str| word.starts_with(|it: char| it.is_ascii_digit()) && word.contains('.');
    let number = said.split([' ', '/', '-', '\n']).find(is_number);
    Ok(number.with_context(|| format!("{name} does not tell its version: {said}"))?.to_owned())
}

/// A way from a client to what the upstream serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// A connection to a port of the upstream, to which the proxy may write a PROXY header.
    Tcp {
        /// [`ECHO`] or [`SOURCE`].
        port: u16,
        has_header: bool,
    },
    /// Datagrams to the echo. The flow may be over with the first answer.
    Udp { has_one_answer: bool },
}

const WAYS: [Way; 6] = [
    Way::Tcp { port: ECHO, has_header: false },
    Way::Tcp { port: ECHO, has_header: true },
    Way::Tcp { port: SOURCE, has_header: false },
    Way::Tcp { port: SOURCE, has_header: true },
    Way::Udp { has_one_answer: false },
    Way::Udp { has_one_answer: true },
];

impl Way {
    /// Each way has a port and an address of its own.
    fn number(self) -> u16 {
        (0..).zip(WAYS).find(|(_, way)| *way == self).map_or(0, |(number, _)| number)
    }

    /// Where the upstream waits for the proxy.
    fn upstream(self) -> SocketAddr {
        let port = match self {
            Self::Tcp { port, has_header: true } => port + WITH_HEADER,
            Self::Tcp { port, has_header: false } => port,
            Self::Udp { .. } => ECHO,
        };
        at(SERVER[0], port)
    }

    /// Where the rivals wait for clients.
    fn listener(self) -> SocketAddr {
        at(HOST[0], FIRST_PORT + self.number())
    }

    /// What anyport answers for.
    fn steered(self) -> String {
        format!("192.0.2.{}", self.number() + 1)
    }
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("an address"), port)
}

/// What runs between client and upstream.
enum Between {
    Nobody,
    Rival(Running),
    Anyport(Box<Daemon>),
}

/// A proxy at work.
pub(crate) struct Lab {
    pub(crate) topology: Topology,
    between: Between,
    _upstream: Running,
    _directory: TempDir,
}

impl fmt::Debug for Lab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lab").finish_non_exhaustive()
    }
}

impl Lab {
    /// Starts all of it. The proxy runs on the first CPU; the caller should be on another one.
    pub(crate) fn start(proxy: &Proxy) -> Result<Self> {
        let topology = Topology::new();
        separate(&topology);
        let directory = prerequisites::scratch();
        let upstream = start_upstream(&topology)?;
        let between = match proxy.kind {
            Kind::Direct => Between::Nobody,
            Kind::HaProxy => {
                let config = write(&directory, "haproxy.cfg", &haproxy())?;
                Between::Rival(rival("haproxy", proxy, "-f", &config, &topology))
            }
            Kind::Nginx => {
                let config = write(&directory, "nginx.conf", &nginx(&directory, proxy.origin.as_deref()))?;
                Between::Rival(rival("nginx", proxy, "-c", &config, &topology))
            }
            Kind::Anyport => Between::Anyport(Box::new(anyport(&topology, proxy.origin.as_deref(), &directory)?)),
        };
        let lab = Self { topology, between, _upstream: upstream, _directory: directory };
        for way in WAYS.into_iter().filter(|way| matches!(way, Way::Tcp { .. })) {
            let target = lab.target(way);
            wait_for("connection", Duration::from_secs(20), || {
                let dial = || dial::tcp(target).map_err(|error| format!("{proxy} at {target}: {error}"));
                lab.topology.client.enter(dial)
            });
        }
        Ok(lab)
    }

    /// Where a client finds what it wants.
    pub(crate) fn target(&self, way: Way) -> SocketAddr {
        match (&self.between, way) {
            // Nobody writes a header there.
            (Between::Nobody, Way::Tcp { port, .. }) => at(SERVER[0], port),
            (Between::Nobody, Way::Udp { .. }) => way.upstream(),
            (Between::Rival(_), _) => way.listener(),
            (Between::Anyport(_), _) => at(&way.steered(), 7),
        }
    }

    /// The process of the proxy.
    pub(crate) fn process(&self) -> Option<u32> {
        match &self.between {
            Between::Nobody => None,
            Between::Rival(process) => Some(process.id()),
            Between::Anyport(daemon) => Some(daemon.pid().as_raw().unsigned_abs()),
        }
    }

    /// Bytes of memory that the proxy has to itself.
    pub(crate) fn memory(&self) -> Result<u64> {
        Ok(Holdings::of(self.process().context("a proxy")?)?.memory << 10)
    }
}

fn rival(name: &str, proxy: &Proxy, option: &str, config: &Path, topology: &Topology) -> Running {
    let program = program(name, proxy.origin.as_deref());
    start(&topology.host, on_first_cpu(&program[0]).args(&program[1..]).arg(option).arg(config))
}

fn anyport(topology: &Topology, executable: Option<&Path>, directory: &TempDir) -> Result<Daemon> {
    let setup =
        Setup::new(&topology.host, "sk-lookup").through(["taskset", "--cpu-list", "0"]).args(["--workers", "1"]);
    let setup = match executable {
        Some(executable) => setup.executable(executable),
        None => setup,
    };
    // In a file, which earlier versions read, too.
    Ok(setup.config(write(directory, "ways.toml", &steered_ways())?).start())
}

fn steered_ways() -> String {
    let way = |way: Way| {
        let (protocol, more) = match way {
            Way::Tcp { has_header: true, .. } => ("tcp", "proxy-protocol = \"v2\""),
            Way::Tcp { has_header: false, .. } => ("tcp", ""),
            Way::Udp { has_one_answer: true } => ("udp", "udp = { responses = 1 }"),
            Way::Udp { has_one_answer: false } => ("udp", ""),
        };
        let (name, upstream) = (format!("way-{}", way.number()), way.upstream());
        format!(
            "[[service]]\nname = \"{name}\"\nhandler = \"forward\"\nupstreams = [\"{upstream}\"]\n{more}\n\
             [[rule]]\nprefix = \"{}/32\"\nprotocol = \"{protocol}\"\nservice = \"{name}\"\n",
            way.steered()
        )
    };
    WAYS.into_iter().map(way).collect()
}

fn write(directory: &TempDir, name: &str, text: &str) -> Result<PathBuf> {
    let path = directory.path().join(name);
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// HAProxy moves downloads by pipes if it is told to; `splice-auto` does not (2.6: no call of `splice` in a download).
fn haproxy() -> String {
    let listener = |way: Way| {
        let Way::Tcp { port, has_header } = way else { return String::new() };
        let header = if has_header { "send-proxy-v2" } else { "" };
        let splice = if port == SOURCE { " option splice-request\n option splice-response\n" } else { "" };
        let (own, upstream) = (way.listener(), way.upstream());
        format!("listen l{}\n bind {own} backlog 4096\n{splice} server up {upstream} {header}\n", own.port())
    };
    let listeners: String = WAYS.into_iter().map(listener).collect();
    format!(
        "global\n nbthread 1\n maxconn 7000\ndefaults\n mode tcp\n timeout connect 5s\n timeout client 5m\n \
         timeout server 5m\n{listeners}"
    )
}

/// nginx with one thread, for streams. Downloads have a larger buffer than the 16 KiB that it has by default.
fn nginx(directory: &TempDir, root: Option<&Path>) -> String {
    let server = |way: Way| {
        let (listen, more) = match way {
            Way::Tcp { port, has_header } => {
                let header = if has_header { "proxy_protocol on;" } else { "" };
                let buffer = if port == SOURCE { "proxy_buffer_size 256k;" } else { "" };
                ("backlog=4096", format!("proxy_timeout 5m; {header} {buffer}"))
            }
            Way::Udp { has_one_answer: true } => ("udp", "proxy_requests 1; proxy_responses 1;".to_owned()),
            Way::Udp { has_one_answer: false } => ("udp", String::new()),
        };
        let (own, upstream) = (way.listener(), way.upstream());
        format!(" server {{ listen {own} {listen}; proxy_pass {upstream}; {more} }}\n")
    };
    let servers: String = WAYS.into_iter().map(server).collect();
    let directory = directory.path().display();
    let module = root.unwrap_or(Path::new("/")).join(STREAM_MODULE);
    let module = if module.exists() { format!("load_module {};\n", module.display()) } else { String::new() };
    format!(
        "{module}daemon off;\nmaster_process off;\nuser root;\npid {directory}/nginx.pid;\n\
         error_log /dev/null;\nevents {{ worker_connections 19000; }}\nstream {{\n{servers}}}\n"
    )
}
