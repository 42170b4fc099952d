//! What all subjects share: how a case becomes a trial, and hosts with a daemon.

use std::{
    env, fmt, fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, LazyLock, PoisonError, RwLock},
    time::Duration,
};

use anyport_tests::{
    daemon::{Daemon, Setup},
    host::wait_for,
    netns::Netns,
    topology::Topology,
};
use libtest_mimic::Trial;
use serde_json::Value;

/// The back ends, each of which meets the same contract.
pub(crate) const BACKENDS: [&str; 3] = ["sk-lookup", "tc", "tproxy"];

/// Held by each trial while it runs.
static RUNNING: RwLock<()> = RwLock::new(());

/// A trial that fails when `case` panics.
pub(crate) fn trial(name: impl Into<String>, case: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let _others = RUNNING.read().unwrap_or_else(PoisonError::into_inner);
        case();
        Ok(())
    })
}

/// A trial beside which no other one runs, since it tells how long something takes.
pub(crate) fn alone(name: impl Into<String>, case: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let _nobody = RUNNING.write().unwrap_or_else(PoisonError::into_inner);
        case();
        Ok(())
    })
}

/// A trial of `case` for each back end.
pub(crate) fn on_each_back_end(name: &str, case: fn(&'static str)) -> impl Iterator<Item = Trial> {
    BACKENDS.into_iter().map(move |backend| trial(format!("{backend}::{name}"), move || case(backend)))
}

/// Of `trials`, those that the file named by `ANYPORT_TEST_CASES` has lines of: names, or beginnings of names with `*` behind.
/// All where there is no such file. A line that names no trial is an error.
pub(crate) fn chosen(trials: Vec<Trial>) -> Result<Vec<Trial>, String> {
    let Some(path) = env::var_os("ANYPORT_TEST_CASES") else { return Ok(trials) };
    let path = Path::new(&path);
    let lines = fs::read_to_string(path).map_err(|error| format!("read the cases in {}: {error}", path.display()))?;
    let is_of = |name: &str, line: &str| match line.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == line,
    };
    let lines: Vec<&str> = lines.lines().filter(|line| !line.is_empty()).collect();
    let unknown: Vec<_> =
        lines.iter().filter(|line| !trials.iter().any(|trial| is_of(trial.name(), line))).copied().collect();
    if unknown.is_empty() {
        Ok(trials.into_iter().filter(|trial| lines.iter().any(|line| is_of(trial.name(), line))).collect())
    } else {
        Err(format!("{} names cases that are not there:\n  {}", path.display(), unknown.join("\n  ")))
    }
}

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    /// Both.
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Of a pair, the one for this version.
    pub(crate) fn of<T>(self, [v4, v6]: [T; 2]) -> T {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.of(["4", "6"]))
    }
}

/// A host with a daemon, a client and a server.
pub(crate) struct Lab {
    pub(crate) topology: Topology,
    pub(crate) daemon: Daemon,
}

impl Lab {
    /// New hosts, and a daemon with default options.
    pub(crate) fn new(backend: &str) -> Self {
        Self::with(backend, |setup| setup)
    }

    /// New hosts, and a daemon with options by `adapt`.
    pub(crate) fn with(backend: &str, adapt: impl FnOnce(Setup) -> Setup) -> Self {
        let topology = Topology::new();
        let daemon = adapt(Setup::new(&topology.host, backend)).start();
        Self { topology, daemon }
    }

    /// What `services` says of one, once so many datagrams have been answered: an answer is counted when it has been sent, and
    /// may have arrived by then.
    pub(crate) fn service_after(&self, name: &str, answers: u64) -> Value {
        wait_for("count of answers", Duration::from_secs(5), || {
            let services = self.daemon.json("services");
            let mut all = services.as_array().expect("services").iter();
            let service = all.find(|it| it["name"] == name).expect("the service");
            if service["answered"] == answers { Ok(service.clone()) } else { Err(service.to_string()) }
        })
    }

    /// The namespace of the `remote` or the `local` client.
    pub(crate) fn at(&self, client: &str) -> &Netns {
        match client {
            "remote" => &self.topology.client,
            "local" => &self.topology.host,
            other => panic!("no client is called {other}"),
        }
    }
}

/// A [`Lab`] that several trials use at the same time; the first one starts it, the last one ends it.
pub(crate) type Shared = Arc<LazyLock<Lab, Box<dyn FnOnce() -> Lab + Send>>>;

/// A [`Lab`] to be shared, made by `start` when it is first needed.
pub(crate) fn shared(start: impl FnOnce() -> Lab + Send + 'static) -> Shared {
    Arc::new(LazyLock::new(Box::new(start)))
}

/// The socket address of texts and ports that the tests are written with.
pub(crate) fn at(address: &str, port: u16) -> SocketAddr {
    let address: IpAddr = address.parse().expect("an address");
    (address, port).into()
}
