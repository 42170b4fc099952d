//! Everything that the checks look at, as it is in this network namespace.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};

use super::{firewall, modules::Modules, sysctl::Sysctl};
use crate::{
    api::StatusView,
    back_end::BackEnd,
    host::{InterfaceAddress, of_table},
    routes::{LocalTable, Route},
    rules::{PortSet, Prefix, Protocol},
};

/// Something that could be looked at, or why not.
pub(super) type Fact<T> = Result<T, String>;

/// The daemon and what it steers.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// What it says of itself.
    pub status: StatusView,
    /// Its rules.
    pub steered: Vec<Steered>,
}

/// What a rule steers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steered {
    /// The prefix.
    pub prefix: Prefix,
    /// The transports.
    pub protocol: Protocol,
    /// The ports.
    pub ports: PortSet,
    /// Whether anyport makes the prefix local.
    pub route: bool,
}

/// A network interface that is up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
    /// Its kind, such as `veth`, if it has one.
    pub kind: String,
    /// The number of the bridge or bond that it is a port of.
    pub controller: Option<u32>,
}

/// A rule of policy routing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRule {
    /// Whether it is about IPv4.
    pub is_ipv4: bool,
    /// Its place: small numbers first.
    pub priority: u32,
    /// The table that it leads to; 0 for rules that lead to none.
    pub table: u32,
    /// Whether it is about all packets.
    pub is_for_all: bool,
    /// Whether it is about packets with a certain mark.
    pub has_mark: bool,
}

/// A back end that was tried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tried {
    /// Which one.
    pub(super) back_end: BackEnd,
    /// Why it does not work here, if it does not.
    pub(super) failure: Option<String>,
}

/// What is in the way of a server of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeldPort {
    /// The port.
    pub(super) port: u16,
    /// What there is, in words.
    pub(super) text: String,
    /// The processes that hold it.
    pub(super) owners: BTreeSet<String>,
}

/// What the checks look at.
#[derive(Debug)]
pub struct Host {
    /// The daemon, or why what it knows is not known.
    pub daemon: Result<Daemon, String>,
    pub(super) proc: PathBuf,
    pub(super) links: Fact<Vec<Link>>,
    pub(super) policy: Fact<Vec<PolicyRule>>,
    pub(super) local: Fact<LocalTable>,
    /// Steered prefixes, each with the route that a packet to its first address takes.
    pub(super) routes: Fact<Vec<(Prefix, Option<Route>)>>,
    /// The names of the `sk_lookup` programs, in the order in which they run.
    pub(super) sk_lookup: Fact<Vec<String>>,
    /// The same for the tcx programs at the ingress of each interface that is up.
    pub(super) tcx: Fact<BTreeMap<String, Vec<String>>>,
    /// What came of trying the back ends, up to the first that works, where no daemon tells.
    pub(super) back_ends: Fact<Vec<Tried>>,
    /// The prefixes that routes of anyport make local though no daemon answers.
    pub(super) leftovers: Fact<Vec<Prefix>>,
    /// The addresses of interfaces.
    pub(super) addresses: Fact<Vec<InterfaceAddress>>,
    /// What holds the port of a server that can't start, if it was asked for.
    pub(super) held: Fact<Vec<HeldPort>>,
    /// Where releases of the kernel have their modules.
    pub(super) modules: PathBuf,
    pub(super) firewall: Fact<firewall::Ruleset>,
    /// The directories of `PATH`.
    pub(super) path: Vec<PathBuf>,
}

impl Host {
    /// The back end in use, if a daemon answers.
    pub(super) fn back_end(&self) -> Option<BackEnd> {
        self.daemon.as_ref().ok().map(|daemon| daemon.status.backend)
    }

    /// Whether this back end is in use, or may come to be.
    pub(super) fn may_use(&self, back_end: BackEnd) -> bool {
        self.back_end().is_none_or(|it| it == back_end)
    }

    /// Whether this one is in use, or would be, since none before it works.
    pub(super) fn depends_on(&self, back_end: BackEnd) -> bool {
        match (&self.daemon, &self.back_ends) {
            (Ok(daemon), _) => daemon.status.backend == back_end,
            (Err(_), Ok(tried)) => tried.iter().any(|it| it.back_end == back_end),
            (Err(_), Err(_)) => false,
        }
    }

    /// What the daemon steers.
    pub(super) fn steered(&self) -> &[Steered] {
        self.daemon.as_ref().map_or(&[], |daemon| &daemon.steered)
    }

    /// The interfaces that are up.
    pub(super) fn links(&self) -> anyhow::Result<&[Link]> {
        known(&self.links).map(Vec::as_slice)
    }

    /// The interfaces by which strangers come.
    pub(super) fn outer_links(&self) -> anyhow::Result<impl Iterator<Item = &Link>> {
        Ok(self.links()?.iter().filter(|link| link.name != "lo"))
    }

    /// The value of a kernel parameter; nothing if the kernel does not have it.
    pub(super) fn sysctl(&self, sysctl: &Sysctl) -> anyhow::Result<Option<String>> {
        sysctl.read(&self.proc).with_context(|| format!("reading {sysctl}"))
    }

    /// The same as a number.
    pub(super) fn number(&self, path: &str) -> anyhow::Result<Option<u64>> {
        let sysctl = Sysctl::new(path);
        let value = self.sysctl(&sysctl)?;
        value.map(|it| it.parse().with_context(|| format!("{sysctl} = {it}"))).transpose()
    }

    /// The effective value at an interface by the rule max(`all`, interface), `Documentation/networking/ip-sysctl.rst`.
    pub(super) fn effective(&self, link: &Link, name: &str) -> anyhow::Result<u64> {
        let values = ["all", &link.name].map(|it| self.number(&format!("net/ipv4/conf/{it}/{name}")));
        values.into_iter().try_fold(0, |most, value| Ok(most.max(value?.unwrap_or_default())))
    }

    /// A file of `/proc`.
    pub(super) fn read(&self, file: impl AsRef<Path>) -> anyhow::Result<String> {
        let path = self.proc.join(file);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// One of the counters of `/proc/net/netstat`, such as `TcpExt` `ListenOverflows`; 0 where the kernel has none.
    pub(super) fn counter(&self, group: &str, name: &str) -> anyhow::Result<u64> {
        let text = self.read("thread-self/net/netstat")?;
        Ok(of_table(&text, group, name))
    }

    /// The release of the kernel, as `uname -r` has it.
    pub(super) fn release(&self) -> anyhow::Result<String> {
        Ok(self.read("sys/kernel/osrelease")?.trim_end().to_owned())
    }

    /// The kernel's modules, if that is known.
    pub(super) fn modules(&self) -> anyhow::Result<Option<Modules>> {
        Ok(Modules::read(&self.proc, &self.modules, &self.release()?))
    }

    /// Those of the programs that are not in `PATH`.
    pub(super) fn missing<'a>(&self, programs: &[&'a str]) -> Vec<&'a str> {
        let is_there = |program: &&str| self.path.iter().any(|directory| directory.join(program).is_file());
        programs.iter().copied().filter(|it| !is_there(it)).collect()
    }
}

#[cfg(test)]
impl Host {
    /// A host of which nothing is known but what a test adds, with `proc` in the place of `/proc`.
    pub(super) fn unknown(proc: &Path) -> Self {
        let unknown = || "nobody has looked".to_owned();
        Self {
            daemon: Err(unknown()),
            proc: proc.to_owned(),
            links: Err(unknown()),
            policy: Err(unknown()),
            local: Err(unknown()),
            routes: Err(unknown()),
            sk_lookup: Err(unknown()),
            tcx: Err(unknown()),
            back_ends: Err(unknown()),
            leftovers: Err(unknown()),
            addresses: Err(unknown()),
            held: Err(unknown()),
            modules: proc.join("lib/modules"),
            firewall: Err(unknown()),
            path: Vec::new(),
        }
    }
}

/// Uses a fact, or says why there is none.
pub(super) fn known<T>(fact: &Fact<T>) -> anyhow::Result<&T> {
    fact.as_ref().map_err(|error| anyhow!("{error}"))
}
