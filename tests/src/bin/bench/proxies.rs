//! The proxies that are compared, each with one thread, all on one host before one upstream.

use std::{
    fmt, fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use anyport_tests::{
    daemon::{Daemon, Setup},
    dial,
    holdings::Holdings,
    host::wait_for,
    prerequisites,
    topology::{HOST, SERVER, Topology},
};
use tempfile::TempDir;

use super::traffic::{
    Running,
    load::Load,
    on_first_cpu, separate, start_upstream,
    upstream::{ECHO, SOURCE, WITH_HEADER},
};

/// What anyport answers for: an address for each of [`upstream_ports`].
const DIALLED: [&str; 4] = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4"];
/// The first port of HAProxy, and that of nginx.
const FIRST_PORTS: [u16; 2] = [8_000, 8_100];

/// Who is between client and upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nobody.
    Direct,
    /// HAProxy in TCP mode, with `option splice-auto`.
    HaProxy,
    /// nginx with its stream module.
    Nginx,
    /// anyport's handler `forward`.
    Anyport,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Direct, Self::HaProxy, Self::Nginx, Self::Anyport];
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Direct => "no proxy",
            Self::HaProxy => "HAProxy",
            Self::Nginx => "nginx stream",
            Self::Anyport => "anyport",
        })
    }
}

/// All of them at work.
pub(crate) struct Lab {
    pub(crate) topology: Topology,
    haproxy: Running,
    nginx: Running,
    daemon: Daemon,
    _upstream: Running,
    _directory: TempDir,
}

impl fmt::Debug for Lab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lab").finish_non_exhaustive()
    }
}

/// The ports of the upstream, each with and without a PROXY header.
fn upstream_ports() -> [(u16, bool); 4] {
    [(ECHO, false), (ECHO, true), (SOURCE, false), (SOURCE, true)]
}

impl Lab {
    /// Starts all of it. The proxies run on the first CPU; the caller should be on another one.
    pub(crate) fn start() -> Result<Self> {
        let topology = Topology::new();
        separate(&topology);
        let directory = prerequisites::scratch();
        let upstream = start_upstream(&topology)?;
        let haproxy = write(&directory, "haproxy.cfg", &haproxy())?;
        let haproxy = Running::start(&topology.host, on_first_cpu("haproxy").arg("-f").arg(haproxy));
        let nginx = write(&directory, "nginx.conf", &nginx(&directory))?;
        let nginx = Running::start(&topology.host, on_first_cpu("nginx").arg("-c").arg(nginx));
        let daemon = Setup::new(&topology.host, "sk-lookup").through(["taskset", "--cpu-list", "0"]);
        let daemon = daemon.args(["--workers", "1"]).start();
        for (address, (port, has_header)) in DIALLED.iter().zip(upstream_ports()) {
            let header = if has_header { "--proxy-protocol v2" } else { "" };
            let port = if has_header { port + WITH_HEADER } else { port };
            let name = format!("to-{port}");
            daemon.ok(&format!("add-service {name} --handler forward --upstream {}:{port} {header}", SERVER[0]));
            daemon.ok(&format!("add-prefix {address}/32 --service {name}"));
        }
        let lab = Self { topology, haproxy, nginx, daemon, _upstream: upstream, _directory: directory };
        for kind in Kind::ALL {
            for load in [Load::Requests, Load::Bulk] {
                for has_header in [false, true] {
                    let target = target(kind, load, has_header);
                    wait_for("connection", Duration::from_secs(20), || {
                        let dial = || dial::tcp(target).map_err(|error| format!("{kind} at {target}: {error}"));
                        lab.topology.client.enter(dial)
                    });
                }
            }
        }
        Ok(lab)
    }

    /// The process of a proxy.
    pub(crate) fn process(&self, kind: Kind) -> Option<u32> {
        match kind {
            Kind::Direct => None,
            Kind::HaProxy => Some(self.haproxy.id()),
            Kind::Nginx => Some(self.nginx.id()),
            Kind::Anyport => Some(self.daemon.pid().as_raw().unsigned_abs()),
        }
    }

    /// Bytes of memory that a proxy has to itself.
    pub(crate) fn memory(&self, kind: Kind) -> Result<u64> {
        let pid = self.process(kind).context("a proxy")?;
        Ok(Holdings::of(pid)?.memory << 10)
    }
}

/// Where a client finds what it wants, by way of a proxy.
pub(crate) fn target(kind: Kind, load: Load, has_header: bool) -> SocketAddr {
    let wanted = if load == Load::Bulk { SOURCE } else { ECHO };
    let way = upstream_ports().iter().position(|it| *it == (wanted, has_header)).unwrap_or_default();
    let port = |first: u16| first + u16::try_from(way).unwrap_or_default();
    let (address, port) = match kind {
        // Nobody writes a header there.
        Kind::Direct => (SERVER[0], wanted),
        Kind::HaProxy => (HOST[0], port(FIRST_PORTS[0])),
        Kind::Nginx => (HOST[0], port(FIRST_PORTS[1])),
        Kind::Anyport => (DIALLED[way], 7),
    };
    let address: IpAddr = address.parse().expect("an address");
    SocketAddr::new(address, port)
}

pub(crate) fn write(directory: &TempDir, name: &str, text: &str) -> Result<PathBuf> {
    let path = directory.path().join(name);
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

fn haproxy() -> String {
    let servers = upstream_ports().into_iter().zip(FIRST_PORTS[0]..).map(|((port, has_header), own)| {
        let (port, header) = if has_header { (port + WITH_HEADER, "send-proxy-v2") } else { (port, "") };
        format!("listen l{own}\n bind {}:{own} backlog 4096\n server up {}:{port} {header}\n", HOST[0], SERVER[0])
    });
    format!(
        "global\n nbthread 1\n maxconn 7000\ndefaults\n mode tcp\n option splice-auto\n timeout connect 5s\n \
         timeout client 5m\n timeout server 5m\n{}",
        servers.collect::<String>()
    )
}

fn nginx(directory: &TempDir) -> String {
    let servers = upstream_ports().into_iter().zip(FIRST_PORTS[1]..).map(|((port, has_header), own)| {
        let (port, header) = if has_header { (port + WITH_HEADER, "proxy_protocol on;") } else { (port, "") };
        let listen = format!("listen {}:{own} backlog=4096;", HOST[0]);
        format!(" server {{ {listen} proxy_pass {}:{port}; proxy_timeout 5m; {header} }}\n", SERVER[0])
    });
    nginx_config(directory, &servers.collect::<String>())
}

/// nginx with one thread, for streams.
pub(crate) fn nginx_config(directory: &TempDir, servers: &str) -> String {
    /// Where Debian keeps it; elsewhere it is built in.
    const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
    let directory = directory.path().display();
    let module = if Path::new(MODULE).exists() { format!("load_module {MODULE};\n") } else { String::new() };
    format!(
        "{module}daemon off;\nmaster_process off;\nuser root;\npid {directory}/nginx.pid;\n\
         error_log /dev/null;\nevents {{ worker_connections 19000; }}\nstream {{\n{servers}}}\n"
    )
}
