//! Looking at everything that the checks are about, once.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    fs::{self, File},
    num::NonZeroU16,
    process::Command,
};

use anyhow::{Context as _, anyhow};
use anyport_common::flow::Transport;
use aya::programs::{SchedClassifier, loaded_programs, tc::TcAttachType};
use futures_util::TryStreamExt as _;
use netlink_packet_route::{
    link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::IpVersion;
use serde_json::value::RawValue;

use super::{
    firewall,
    host::{Daemon, Fact, HeldPort, Host, Link, PolicyRule, Steered, Tried},
};
use crate::{
    api::{Client, PrefixView, Problem, ProblemKind, StatusView},
    host::{self, Owner, interface_addresses},
    privileges,
    routes::{Coverage, Route, Routes},
    rules::Prefix,
    steering::{BackEnd, bpf, tproxy},
    sys,
};

/// Prefixes of which the kernel is asked where their packets go. A fault of policy routing concerns more than one.
const LOOKED_UP: usize = 64;

impl Host {
    /// Looks at everything, and at what keeps a server of the host from a port if that is given.
    ///
    /// # Errors
    /// The daemon is in another network namespace, so that this is about another host.
    pub async fn look(client: &Client, port: Option<NonZeroU16>) -> Result<Self, Problem> {
        let daemon = match Daemon::ask(client).await {
            Ok(daemon) => {
                same_namespace(daemon.status.pid)?;
                Ok(daemon)
            }
            Err(problem) => Err(problem.error),
        };
        let links = fact(links().await);
        let names: Vec<String> = links.iter().flatten().map(|link| link.name.clone()).collect();
        Ok(Self {
            policy: fact(policy().await),
            local: fact(async { Routes::open()?.local_table().await }.await),
            routes: fact(routes(daemon.as_ref().map_or(&[][..], |daemon| &daemon.steered)).await),
            sk_lookup: fact(sk_lookup()),
            tcx: fact(tcx(&names)),
            back_ends: fact(if daemon.is_ok() { Err(anyhow!("the daemon tells")) } else { back_ends() }),
            leftovers: fact(leftovers(daemon.is_ok()).await),
            addresses: fact(interface_addresses()),
            held: fact(held(daemon.as_ref().map_or(&[][..], |daemon| &daemon.steered), port)),
            modules: "/lib/modules".into(),
            firewall: fact(firewall::Ruleset::read()),
            path: env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect(),
            proc: "/proc".into(),
            links,
            daemon,
        })
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

/// Whether the daemon is where we are, as far as that can be seen: in a container of its own its number means nothing here.
fn same_namespace(pid: u32) -> Result<(), Problem> {
    let is_daemon = fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "anyportd");
    let there = fs::read_link(format!("/proc/{pid}/ns/net"));
    let here = fs::read_link("/proc/thread-self/ns/net");
    match (there, here) {
        (Ok(there), Ok(here)) if is_daemon && there != here => {
            let what = format!("anyportd (pid {pid}) runs in another network namespace than this");
            Err(Problem::new(ProblemKind::Failed, what)
                .hint(format!("nsenter --net=/proc/{pid}/ns/net anyportctl doctor")))
        }
        _ => Ok(()),
    }
}

fn fact<T>(looked: anyhow::Result<T>) -> Fact<T> {
    looked.map_err(|error| format!("{error:#}"))
}

/// What is at steered addresses and this port, by transport.
fn held(steered: &[Steered], port: Option<NonZeroU16>) -> anyhow::Result<Vec<HeldPort>> {
    let Some(port) = port.map(NonZeroU16::get) else { return Ok(Vec::new()) };
    let covered: Coverage = steered.iter().map(|it| it.prefix).collect();
    let held = |transport| {
        let held = host::held(transport, port, |address| covered.covers(&Prefix::host(address)))?;
        let owners = host::owners(&held.inodes);
        let owners = owners.values().map(|Owner { pid, name }| format!("{name} (pid {pid})")).collect();
        Ok(held.in_the_way(transport, port).map(|text| HeldPort { port, text, owners }))
    };
    [Transport::Tcp, Transport::Udp].into_iter().filter_map(|transport| held(transport).transpose()).collect()
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
        let messages: Vec<_> = match handle.rule().get(version).execute().try_collect().await {
            // A kernel without IPv6.
            Err(_) if !is_ipv4 => Vec::new(),
            messages => messages.context("listing the rules of policy routing")?,
        };
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
    let ids = sys::bpf::sk_lookup_programs(namespace).context("listing the sk_lookup programs (needs root)")?;
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

async fn leftovers(has_daemon: bool) -> anyhow::Result<Vec<Prefix>> {
    if has_daemon { Ok(Vec::new()) } else { Routes::open()?.ours().await }
}

/// Tries the back ends as a daemon does at its start, up to the first that works. Nothing stays behind.
fn back_ends() -> anyhow::Result<Vec<Tried>> {
    privileges::raise_memory_limit();
    let mut tried = Vec::new();
    for back_end in BackEnd::ALL {
        privileges::expect_for(back_end).map_err(|_| anyhow!("trying {back_end} (needs root)"))?;
        let tried_out = match back_end {
            BackEnd::SkLookup | BackEnd::Tc => bpf::try_out(back_end),
            BackEnd::Tproxy => tproxy::try_out(),
        };
        let failure = tried_out.err().map(|error| format!("{error:#}"));
        let works = failure.is_none();
        tried.push(Tried { back_end, failure });
        if works {
            break;
        }
    }
    Ok(tried)
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
