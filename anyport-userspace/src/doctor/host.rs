//! Everything that the checks look at, as it is in this network namespace.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, anyhow};
use aya::{
    programs::{ProgramType, SchedClassifier, loaded_programs, tc::TcAttachType},
    sys::is_program_supported,
};
use futures_util::TryStreamExt as _;
use netlink_packet_route::{
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::IpVersion;
use serde_json::value::RawValue;

use super::{firewall, sysctl::Sysctl};
use crate::{
    api::{Client, PrefixView, Problem, StatusView},
    routes::{LocalTable, Route, Routes},
    rules::{PortSet, Prefix, Protocol},
    steering::BackEnd,
    sys,
};

/// Prefixes of which the kernel is asked where their packets go. A fault of policy routing concerns more than one.
const LOOKED_UP: usize = 64;

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
    /// Whether the kernel has `sk_lookup` programs, and classifiers of tc.
    pub(super) programs: Fact<[bool; 2]>,
    pub(super) firewall: Fact<firewall::Ruleset>,
    path: Vec<PathBuf>,
}

impl Host {
    /// Looks at everything.
    pub async fn look(client: &Client) -> Self {
        let daemon = Daemon::ask(client).await.map_err(|problem| problem.error);
        let links = fact(links().await);
        let names: Vec<String> = links.iter().flatten().map(|link| link.name.clone()).collect();
        Self {
            policy: fact(policy().await),
            local: fact(async { Routes::open()?.local_table().await }.await),
            routes: fact(routes(daemon.as_ref().map_or(&[][..], |daemon| &daemon.steered)).await),
            sk_lookup: fact(sk_lookup()),
            tcx: fact(tcx(&names)),
            programs: fact(programs()),
            firewall: fact(firewall::Ruleset::read()),
            path: env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect(),
            proc: "/proc".into(),
            links,
            daemon,
        }
    }

    /// The back end in use, if a daemon answers.
    pub(super) fn back_end(&self) -> Option<BackEnd> {
        self.daemon.as_ref().ok().map(|daemon| daemon.status.backend)
    }

    /// Whether this back end is in use, or may come to be.
    pub(super) fn may_use(&self, back_end: BackEnd) -> bool {
        self.back_end().is_none_or(|it| it == back_end)
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

    /// What is in force at an interface by the rule max(`all`, interface), `Documentation/networking/ip-sysctl.rst`.
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
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(':'));
        let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        let place = names.split_ascii_whitespace().position(|it| it == name);
        let value = place.and_then(|place| values.split_ascii_whitespace().nth(place));
        Ok(value.and_then(|it| it.parse().ok()).unwrap_or_default())
    }

    /// Major and minor version of the kernel.
    pub(super) fn release(&self) -> anyhow::Result<(u32, u32)> {
        let text = self.read("sys/kernel/osrelease")?;
        let mut numbers = text.split(|it: char| !it.is_ascii_digit()).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
            _ => Err(anyhow!("{text:?} is no version of Linux")),
        }
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
            programs: Err(unknown()),
            firewall: Err(unknown()),
            path: Vec::new(),
        }
    }
}

impl Daemon {
    async fn ask(client: &Client) -> Result<Self, Problem> {
        let status: StatusView = client.get("/v1/status").await?;
        let body: Box<RawValue> = client.get("/v1/prefixes").await?;
        let unreadable = |error: &dyn std::fmt::Display| Problem::from(anyhow!("read the rules: {error}"));
        let views: Vec<PrefixView<'_>> = serde_json::from_str(body.get()).map_err(|error| unreadable(&error))?;
        let steered = views.iter().filter(|view| !view.ports.is_empty()).map(|view| {
            let prefix = view.prefix.parse().map_err(|error| unreadable(&error))?;
            let ports = view.ports.parse().map_err(|error| unreadable(&error))?;
            Ok(Steered { prefix, protocol: view.protocol, ports, route: view.route })
        });
        Ok(Self { status, steered: steered.collect::<Result<_, Problem>>()? })
    }
}

/// Uses a fact, or says why there is none.
pub(super) fn known<T>(fact: &Fact<T>) -> anyhow::Result<&T> {
    fact.as_ref().map_err(|error| anyhow!("{error}"))
}

fn fact<T>(looked: anyhow::Result<T>) -> Fact<T> {
    looked.map_err(|error| format!("{error:#}"))
}

async fn links() -> anyhow::Result<Vec<Link>> {
    let (connection, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
    tokio::spawn(connection);
    let messages: Vec<_> = handle.link().get().execute().try_collect().await.context("listing the interfaces")?;
    let up = messages.into_iter().filter(|message| message.header.flags.contains(LinkFlags::Up));
    Ok(up
        .map(|message| {
            let mut link = Link { index: message.header.index, ..Link::default() };
            for attribute in message.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => link.name = name,
                    LinkAttribute::Controller(index) => link.controller = Some(index),
                    LinkAttribute::LinkInfo(info) => link.kind = kind(&info).unwrap_or_default(),
                    _ => {}
                }
            }
            link
        })
        .collect())
}

fn kind(info: &[LinkInfo]) -> Option<String> {
    info.iter().find_map(|it| match it {
        LinkInfo::Kind(InfoKind::Other(kind)) => Some(kind.clone()),
        LinkInfo::Kind(kind) => Some(format!("{kind:?}").to_lowercase()),
        _ => None,
    })
}

async fn policy() -> anyhow::Result<Vec<PolicyRule>> {
    let (connection, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
    tokio::spawn(connection);
    let mut rules = Vec::new();
    for (version, is_ipv4) in [(IpVersion::V4, true), (IpVersion::V6, false)] {
        let messages: Vec<_> = handle.rule().get(version).execute().try_collect().await.unwrap_or_default();
        rules.extend(messages.iter().map(|message| policy_rule(message, is_ipv4)));
    }
    rules.sort_by_key(|rule| (!rule.is_ipv4, rule.priority));
    Ok(rules)
}

fn policy_rule(message: &RuleMessage, is_ipv4: bool) -> PolicyRule {
    let RuleMessage { header, attributes, .. } = message;
    let leads_to_table = header.action == RuleAction::ToTable;
    let mut rule = PolicyRule {
        is_ipv4,
        priority: 0,
        table: if leads_to_table { header.table.into() } else { 0 },
        is_for_all: header.dst_len == 0 && header.src_len == 0 && header.tos == 0,
        has_mark: false,
    };
    for attribute in attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) if leads_to_table => rule.table = *table,
            RuleAttribute::FwMark(_) => (rule.has_mark, rule.is_for_all) = (true, false),
            RuleAttribute::Iifname(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::L3MDev(_)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_) => rule.is_for_all = false,
            _ => {}
        }
    }
    rule
}

async fn routes(steered: &[Steered]) -> anyhow::Result<Vec<(Prefix, Option<Route>)>> {
    let routes = Routes::open()?;
    let mut found = Vec::new();
    for Steered { prefix, .. } in steered.iter().take(LOOKED_UP) {
        found.push((*prefix, routes.to(prefix.address()).await?));
    }
    Ok(found)
}

fn sk_lookup() -> anyhow::Result<Vec<String>> {
    let namespace = File::open("/proc/thread-self/ns/net").context("opening the network namespace")?;
    let ids = sys::bpf::sk_lookup_programs(namespace)
        .context("listing the sk_lookup programs (needs root, and Linux 5.9)")?;
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let loaded = loaded_programs().filter_map(Result::ok);
    let names: HashMap<u32, String> =
        loaded.map(|program| (program.id(), program.name_as_str().unwrap_or_default().to_owned())).collect();
    Ok(ids.iter().map(|id| names.get(id).cloned().unwrap_or_else(|| format!("program {id}"))).collect())
}

fn tcx(interfaces: &[String]) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let programs_of = |interface: &String| {
        let (_, programs) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress)
            .with_context(|| format!("listing the tcx programs of {interface} (needs root, and Linux 6.6)"))?;
        let names = programs.iter().map(|program| program.name_as_str().unwrap_or_default().to_owned());
        Ok((interface.clone(), names.collect()))
    };
    interfaces.iter().map(programs_of).collect()
}

fn programs() -> anyhow::Result<[bool; 2]> {
    let is_supported = |program| is_program_supported(program).context("asking the kernel for BPF (needs root)");
    Ok([is_supported(ProgramType::SkLookup)?, is_supported(ProgramType::SchedClassifier)?])
}

/// What a program prints; nothing if it is not there.
pub(super) fn output(program: &str, arguments: &[&str]) -> anyhow::Result<Option<String>> {
    let output = match Command::new(program).args(arguments).output() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        output => output.with_context(|| format!("running {program}"))?,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let line = [&[program], arguments].concat().join(" ");
        return Err(anyhow!("`{line}`: {}", said.trim_end()));
    }
    Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
}
