//! Options of the daemon, from the command line, the environment and the configuration file.

#[cfg(feature = "fleet")]
mod fleet;

use std::{
    fmt, fs, io,
    net::SocketAddr,
    num::{NonZeroU8, NonZeroU32, NonZeroUsize},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};
use anyport_common::maps::MAX_RULES;
use clap::Parser;
use nix::unistd::Uid;
use serde::Deserialize;
use toml::Spanned;

#[cfg(feature = "fleet")]
pub use self::fleet::Fleet;
pub use crate::back_end::Choice;
use crate::{
    announce::Announce,
    api::{FleetView, Readers},
    human_duration::HumanDuration,
    paths::{DEFAULT_SOCKET, DEFAULT_STATE_DIR, Paths},
    rights::User,
    rule_file,
    rules::{Origin, Prefix, RuleSet, RuleText, ServiceName},
    service::{HandlerKind, Limits, ServiceConfig},
    text::Positions,
};

/// The configuration file, unless told otherwise.
pub const DEFAULT_FILE: &str = "/etc/anyport/anyport.toml";
/// Far more than any machine has use for, and far less than makes the kernel's groups slow.
const MAX_WORKERS: usize = 1024;
/// Long enough for most that a person waits for; who keeps connections for days has to say so.
const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_mins(10);
/// Half of what the kernel's maps can number: while rules are replaced, both sets are numbered.
const DEFAULT_MAX_RULES: usize = MAX_RULES as usize / 2;

/// How much the daemon logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the names say it all")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", format!("{self:?}").to_lowercase())
    }
}

/// How the daemon logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// A line for a human.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

/// Lets one socket answer for every address and every port of whole prefixes.
///
/// Without any configuration it starts, steers nothing, and says what to type next. Each option may also stand
/// under [daemon] in the configuration file, by its long name.
#[expect(rustdoc::broken_intra_doc_links, reason = "it is the text of --help, in which brackets are no links")]
#[derive(Debug, Parser)]
#[command(
    name = "anyportd",
    version,
    after_help = "Exit status: 0 ended by SIGTERM or SIGINT; 1 failed; 2 wrong usage or configuration."
)]
pub struct Options {
    /// Configuration file [default: /etc/anyport/anyport.toml, which may be absent]
    #[arg(long, env = "ANYPORT_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Only say whether options and configuration are right; needs no rights, and touches nothing
    #[arg(long)]
    pub check: bool,
    /// Take over from the anyportd that runs, without losing a connection: what serves from then on is this program, with the options of
    /// that one
    #[arg(long, conflicts_with = "check")]
    pub takeover: bool,
    /// Withdraw everything that is announced, where no anyportd is there to do it. The unit runs this after a stop; it does nothing where
    /// systemd says that the service ended well
    #[arg(long, conflicts_with_all = ["check", "takeover"])]
    pub withdraw: bool,
    /// What may stand in the file, too.
    #[command(flatten)]
    pub settings: Settings,
}

/// The options, as the command line, the environment and `[daemon]` in the file give them.
#[derive(Clone, Debug, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// Unix socket for anyportctl [default: /run/anyport/anyportd.sock]
    #[arg(long, env = "ANYPORT_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Where rules and services that were added by hand are kept [default: /var/lib/anyport]
    #[arg(long, env = "ANYPORT_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Whom to become when started by root: a user, or UID:GID [default: anyport if there is such a user, else root]
    #[arg(long, env = "ANYPORT_USER", value_name = "USER")]
    pub user: Option<User>,
    /// Who may look, beside those who may change: a group, or all [default: nobody]
    #[arg(long, env = "ANYPORT_READERS", value_name = "GROUP")]
    pub readers: Option<Readers>,
    /// Where BPF maps and links are pinned; a BPF file system is mounted where there is none
    /// [default: /sys/fs/bpf/anyport]
    #[arg(long, env = "ANYPORT_BPFFS", value_name = "DIR")]
    pub bpffs: Option<PathBuf>,
    /// How packets reach the sockets [default: auto]
    #[arg(long, env = "ANYPORT_STEERING", value_name = "BACK-END")]
    pub steering: Option<Choice>,
    /// Interface that tc watches; may be repeated [default: every interface that is up, also later]
    #[arg(long, env = "ANYPORT_INTERFACE", value_name = "NAME", value_delimiter = ',')]
    pub interface: Vec<String>,
    /// Listening sockets for each service, transport and family [default: number of CPUs]
    #[arg(long, env = "ANYPORT_WORKERS", value_name = "N")]
    pub workers: Option<NonZeroUsize>,
    /// Most connections and flows of datagrams at a time [default: what the limit of open files allows]
    #[arg(long, env = "ANYPORT_MAX_CONNECTIONS", value_name = "N")]
    pub max_connections: Option<NonZeroU32>,
    /// Most of them for one source, an IPv4 address or a /64 of IPv6 [default: four for each that is free]
    #[arg(long, env = "ANYPORT_MAX_CONNECTIONS_PER_SOURCE", value_name = "N")]
    pub max_connections_per_source: Option<NonZeroU32>,
    /// Most rules at a time; the programs can't number more [default: 1048576]
    #[arg(long, env = "ANYPORT_MAX_RULES", value_name = "N")]
    pub max_rules: Option<usize>,
    /// How long connections may go on after a restart or an upgrade has replaced the process that serves them [default: 10m]
    #[arg(long, env = "ANYPORT_DRAIN_TIMEOUT", value_name = "TIME")]
    pub drain_timeout: Option<HumanDuration>,
    /// Leaves steering in the kernel at the end, where the next start takes it over: packets are refused meanwhile, rather than
    /// left to the host
    #[arg(long, env = "ANYPORT_KEEP", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub keep: Option<bool>,
    /// Where metrics, health and a page about all of it are served over HTTP, to everybody who can connect [default: nowhere]
    #[arg(long, env = "ANYPORT_METRICS", value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
    /// Whether to put back what others remove from the kernel, and not only to say so [default: true]
    #[arg(long, env = "ANYPORT_MEND", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub mend: Option<bool>,
    /// How much to log; from debug on, the BPF programs log too [default: info]
    #[arg(long, env = "ANYPORT_LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// How to log [default: text]
    #[arg(long, env = "ANYPORT_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

impl Settings {
    /// What is given here, and else what is given there.
    fn or(self, other: Self) -> Self {
        Self {
            socket: self.socket.or(other.socket),
            state_dir: self.state_dir.or(other.state_dir),
            user: self.user.or(other.user),
            readers: self.readers.or(other.readers),
            bpffs: self.bpffs.or(other.bpffs),
            steering: self.steering.or(other.steering),
            interface: if self.interface.is_empty() { other.interface } else { self.interface },
            workers: self.workers.or(other.workers),
            max_connections: self.max_connections.or(other.max_connections),
            max_connections_per_source: self.max_connections_per_source.or(other.max_connections_per_source),
            max_rules: self.max_rules.or(other.max_rules),
            drain_timeout: self.drain_timeout.or(other.drain_timeout),
            keep: self.keep.or(other.keep),
            metrics: self.metrics.or(other.metrics),
            mend: self.mend.or(other.mend),
            log_level: self.log_level.or(other.log_level),
            log_format: self.log_format.or(other.log_format),
        }
    }
}

/// The settings that can change while the daemon runs.
const LIVE: [&str; 9] = [
    "max-rules",
    "drain-timeout",
    "keep",
    "mend",
    "log-level",
    "announce.prefixes",
    "announce.rules-within",
    "announce.needs",
    "announce.hold-down",
];
/// Those that take a restart.
const FIXED: [&str; 15] = [
    "socket",
    "state-dir",
    "user",
    "readers",
    "bpffs",
    "steering",
    "interface",
    "workers",
    "max-connections",
    "max-connections-per-source",
    "metrics",
    "log-format",
    "announce.file",
    "announce.format",
    "announce.reload",
];

/// Where the configuration is read from.
#[derive(Clone, Debug, Default)]
pub struct Source {
    options: Settings,
    file: Option<PathBuf>,
}

/// Everything that the daemon is told at its start.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the fields are those of Settings, with the defaults filled in")]
pub struct Config {
    pub socket: PathBuf,
    pub state_dir: PathBuf,
    pub user: Option<User>,
    pub readers: Option<Readers>,
    pub bpffs: PathBuf,
    pub steering: Choice,
    pub interfaces: Vec<String>,
    pub workers: NonZeroUsize,
    pub max_rules: usize,
    pub drain_timeout: Duration,
    pub keep: bool,
    pub metrics: Option<SocketAddr>,
    pub mend: bool,
    pub limits: Limits,
    pub log_level: LogLevel,
    pub log_format: LogFormat,
    /// To which fleet this node belongs, if to any.
    #[cfg(feature = "fleet")]
    pub fleet: Option<Box<Fleet>>,
    /// What is announced, if something is to be.
    pub announce: Option<Announce>,
    /// The services of the file.
    pub services: Vec<ServiceConfig>,
    /// The rules of the file.
    pub rules: RuleSet,
    /// By which all this can be read again.
    pub source: Source,
}

impl Config {
    /// Its files and directories.
    pub fn paths(&self) -> Paths<'_> {
        Paths {
            socket: &self.socket,
            state_dir: &self.state_dir,
            bpffs: &self.bpffs,
            announced: self.announce.as_ref().map(|announce| &*announce.file),
        }
    }

    /// Puts options and file together. Without `file`, the usual one is read if it is there.
    ///
    /// # Errors
    /// The file can't be read or something in it is wrong: says where and what.
    pub fn new(options: Settings, file: Option<&Path>) -> anyhow::Result<Self> {
        let config = Self::read(file, |text| Self::parse(options.clone(), text))?;
        Ok(Self { source: Source { options, file: file.map(Path::to_owned) }, ..config })
    }

    fn read(file: Option<&Path>, parse: impl FnOnce(&str) -> anyhow::Result<Self>) -> anyhow::Result<Self> {
        let path = file.unwrap_or(Path::new(DEFAULT_FILE));
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && file.is_none() => String::new(),
            text => text.with_context(|| {
                format!("read the configuration {} as the user {}", path.display(), Uid::effective())
            })?,
        };
        parse(&text).with_context(|| format!("in the configuration {}", path.display()))
    }

    /// What the keeper needs to know: everything but services and rules, which servers read.
    ///
    /// # Errors
    /// As [`Self::new`], as far as it looks.
    pub fn without_rules(options: Settings, file: Option<&Path>) -> anyhow::Result<Self> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct DaemonTable {
            daemon: Settings,
            announce: Option<Announce>,
        }
        Self::read(file, |text| {
            let DaemonTable { daemon, announce } = toml::from_str(text)?;
            let source = Source { options: options.clone(), file: file.map(Path::to_owned) };
            let config = Self::settle(options, daemon, text, Vec::new(), RuleSet::default())?;
            Ok(Self { announce, source, ..config })
        })
    }

    /// Reads the same file again, with the same options.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn read_again(&self) -> anyhow::Result<Self> {
        let Source { options, file } = &self.source;
        Self::new(options.clone(), file.as_deref())
    }

    /// What differs from the settings of `former`, as text: what can change while the daemon runs, and what takes a restart.
    pub fn differences(&self, former: &Self) -> (Vec<String>, Vec<String>) {
        let differences = |names: &[&str], now: Vec<String>, before: Vec<String>| -> Vec<String> {
            let both = now.into_iter().zip(before).zip(names);
            both.filter(|((now, before), _)| now != before)
                .map(|((now, before), name)| format!("{name}: {before} -> {now}"))
                .collect()
        };
        #[cfg_attr(not(feature = "fleet"), expect(unused_mut, reason = "only a fleet adds to them"))]
        let (mut live, mut fixed) = (
            differences(&LIVE, self.live_texts(), former.live_texts()),
            differences(&FIXED, self.fixed_texts(), former.fixed_texts()),
        );
        #[cfg(feature = "fleet")]
        {
            let (now, before) = (self.fleet.as_deref(), former.fleet.as_deref());
            live.extend(differences(&fleet::LIVE, fleet::live_texts(now), fleet::live_texts(before)));
            fixed.extend(differences(&fleet::FIXED, fleet::fixed_texts(now), fleet::fixed_texts(before)));
        }
        (live, fixed)
    }

    /// Where this node stands in its fleet before anything is known of that; nothing if it belongs to none.
    pub fn fleet_view(&self) -> Option<FleetView> {
        #[cfg(feature = "fleet")]
        if let Some(fleet) = &self.fleet {
            let (ring, node) = (fleet.ring.to_string(), fleet.node.to_string());
            return Some(FleetView { ring, node, etcd: fleet.connection.etcd.clone(), ..FleetView::default() });
        }
        None
    }

    /// Most rules of the fleet that one set may take away, in percent, if that is limited.
    pub fn max_removal(&self) -> Option<NonZeroU8> {
        #[cfg(feature = "fleet")]
        return self.fleet.as_ref()?.max_removal;
        #[cfg(not(feature = "fleet"))]
        None
    }

    /// In the order of [`LIVE`].
    fn live_texts(&self) -> Vec<String> {
        let Self { max_rules, drain_timeout, keep, mend, log_level, .. } = self;
        let list = |prefixes: &[Prefix]| prefixes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        vec![
            max_rules.to_string(),
            humantime::format_duration(*drain_timeout).to_string(),
            keep.to_string(),
            mend.to_string(),
            log_level.to_string(),
            self.of_announce(|it| list(&it.prefixes)),
            self.of_announce(|it| list(&it.rules_within)),
            self.of_announce(|it| it.needs.to_string()),
            self.of_announce(|it| it.hold_down.to_string()),
        ]
    }

    fn of_announce(&self, setting: impl FnOnce(&Announce) -> String) -> String {
        let text = self.announce.as_ref().map(setting).unwrap_or_default();
        if text.is_empty() { "nothing".to_owned() } else { text }
    }

    /// In the order of [`FIXED`].
    fn fixed_texts(&self) -> Vec<String> {
        let Self { socket, state_dir, bpffs, steering, interfaces, workers, limits, metrics, log_format, .. } = self;
        let Self { user, readers, .. } = self;
        let number = |limit: Option<NonZeroU32>| limit.map_or_else(|| "none".to_owned(), |limit| limit.to_string());
        let steering = steering.back_end().map_or_else(|| "auto".to_owned(), |it| it.to_string());
        vec![
            socket.display().to_string(),
            state_dir.display().to_string(),
            user.as_ref().map_or_else(|| "by default".to_owned(), ToString::to_string),
            readers.as_ref().map_or_else(|| "nobody".to_owned(), ToString::to_string),
            bpffs.display().to_string(),
            steering,
            if interfaces.is_empty() { "all".to_owned() } else { interfaces.join(", ") },
            workers.to_string(),
            number(limits.max_connections),
            number(limits.max_connections_per_source),
            metrics.map_or_else(|| "nowhere".to_owned(), |it| it.to_string()),
            format!("{log_format:?}").to_lowercase(),
            self.of_announce(|it| it.file.display().to_string()),
            self.of_announce(|it| it.format.to_string()),
            self.of_announce(|it| it.reload.as_ref().map(|it| it.display().to_string()).unwrap_or_default()),
        ]
    }

    /// Takes over what can change while the daemon runs, see [`Self::differences`].
    pub fn take_live(&mut self, other: &Self) {
        self.max_rules = other.max_rules;
        self.drain_timeout = other.drain_timeout;
        self.keep = other.keep;
        self.mend = other.mend;
        self.log_level = other.log_level;
        #[cfg(feature = "fleet")]
        if let (Some(fleet), Some(other)) = (&mut self.fleet, &other.fleet) {
            fleet.max_removal = other.max_removal;
        }
        // What is announced at all, and where, takes a restart.
        if let (Some(announce), Some(other)) = (&mut self.announce, &other.announce) {
            let Announce { file, reload, .. } = announce.clone();
            *announce = Announce { file, format: announce.format, reload, ..other.clone() };
        }
    }

    /// The settings alone.
    #[must_use]
    pub fn without_tables(&self) -> Self {
        let (services, rules) = (Vec::new(), RuleSet::default());
        let Self { socket, state_dir, user, readers, bpffs, interfaces, source, .. } = self;
        let (socket, state_dir, bpffs) = (socket.clone(), state_dir.clone(), bpffs.clone());
        let (user, readers) = (user.clone(), readers.clone());
        let (interfaces, source, announce) = (interfaces.clone(), source.clone(), self.announce.clone());
        Self {
            socket,
            state_dir,
            user,
            readers,
            bpffs,
            interfaces,
            announce,
            services,
            rules,
            source,
            #[cfg(feature = "fleet")]
            fleet: self.fleet.clone(),
            ..*self
        }
    }

    fn parse(options: Settings, text: &str) -> anyhow::Result<Self> {
        let file: ConfigFile = toml::from_str(text)?;
        let mut problems = Vec::new();
        let services = services(file.service, text, &mut problems);
        let rules = rules(file.rule, &services, text, &mut problems);
        #[cfg(feature = "fleet")]
        let fleet = file.fleet.and_then(|table| fleet::Table::settle(table, text, &mut problems)).map(Box::new);
        let announce = file.announce.map(|table| {
            let at = Positions::of(text).at(table.span().start);
            let announce = table.into_inner();
            problems.extend(announce.validate().err().map(|error| format!("{at}: {error}")));
            announce
        });
        if !problems.is_empty() {
            bail!("{}", problems.join("\n"));
        }
        let config = Self { announce, ..Self::settle(options, file.daemon, text, services, rules)? };
        #[cfg(feature = "fleet")]
        let config = Self { fleet, ..config };
        Ok(config)
    }

    /// Options come before the settings of a file, which is there as text, too.
    fn settle(
        options: Settings,
        file: Settings,
        text: &str,
        services: Vec<ServiceConfig>,
        rules: RuleSet,
    ) -> anyhow::Result<Self> {
        // Where a setting of the file stands, unless an option has its place.
        let at = |name: &str, is_option: bool| {
            let found = if is_option { None } else { place_of_setting(text, name) };
            found.map(|place| format!("{place}: ")).unwrap_or_default()
        };
        let (workers_at, max_rules_at) =
            (at("workers", options.workers.is_some()), at("max-rules", options.max_rules.is_some()));
        let settings = options.or(file);
        let workers = settings.workers.unwrap_or_else(|| thread::available_parallelism().unwrap_or(NonZeroUsize::MIN));
        if workers.get() > MAX_WORKERS {
            bail!("{workers_at}workers = {workers}: the limit is {MAX_WORKERS}");
        }
        let max_rules = settings.max_rules.unwrap_or(DEFAULT_MAX_RULES);
        if max_rules > DEFAULT_MAX_RULES {
            bail!("{max_rules_at}max-rules = {max_rules}: the limit is {DEFAULT_MAX_RULES}");
        }
        if rules.len() > max_rules {
            bail!("{max_rules_at}there are {} rules; the limit is {max_rules}, see max-rules", rules.len());
        }
        Ok(Self {
            socket: settings.socket.unwrap_or_else(|| DEFAULT_SOCKET.into()),
            state_dir: settings.state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            user: settings.user,
            readers: settings.readers,
            bpffs: settings.bpffs.unwrap_or_else(|| "/sys/fs/bpf/anyport".into()),
            steering: settings.steering.unwrap_or_default(),
            interfaces: settings.interface,
            workers,
            max_rules,
            drain_timeout: settings.drain_timeout.map_or(DEFAULT_DRAIN_TIMEOUT, |time| time.0),
            keep: settings.keep.unwrap_or_default(),
            metrics: settings.metrics,
            mend: settings.mend.unwrap_or(true),
            limits: Limits {
                max_connections: settings.max_connections,
                max_connections_per_source: settings.max_connections_per_source,
                accept_rate_per_source: None,
            },
            log_level: settings.log_level.unwrap_or_default(),
            log_format: settings.log_format.unwrap_or_default(),
            #[cfg(feature = "fleet")]
            fleet: None,
            announce: None,
            services,
            rules,
            source: Source::default(),
        })
    }
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConfigFile {
    daemon: Settings,
    #[cfg(feature = "fleet")]
    fleet: Option<Spanned<fleet::Table>>,
    announce: Option<Spanned<Announce>>,
    service: Vec<Spanned<ServiceConfig>>,
    rule: Vec<Spanned<RuleText>>,
}

/// The services, and what is wrong with them and their fallbacks.
fn services(tables: Vec<Spanned<ServiceConfig>>, text: &str, problems: &mut Vec<String>) -> Vec<ServiceConfig> {
    let placed = rule_file::services(tables, text, problems);
    for (at, service) in &placed {
        let Some(fallback) = &service.fallback else { continue };
        match placed.iter().find(|(_, other)| other.name == *fallback) {
            Some((_, other)) if other.handler == HandlerKind::Registered => {
                problems.push(format!("{at}: the fallback {fallback} has the handler registered itself"));
            }
            None if *fallback != ServiceName::default_service() => {
                problems.push(format!("{at}: there is no [[service]] with the name {fallback} for a fallback"));
            }
            _ => {}
        }
    }
    placed.into_iter().map(|(_, service)| service).collect()
}

/// Those that are right; what is wrong with the others is added to the problems.
fn rules(
    tables: Vec<Spanned<RuleText>>,
    services: &[ServiceConfig],
    text: &str,
    problems: &mut Vec<String>,
) -> RuleSet {
    let mut rules = RuleSet::default();
    let mut places = Positions::of(text);
    for table in tables {
        let at = places.at(table.span().start);
        let rule = table.into_inner().into_rule(Origin::Config);
        let service = &rule.terms.service;
        if let Err(error) = rule.terms.validate(&rule.prefix) {
            problems.push(format!("{at}: {error}"));
        } else if *service != ServiceName::default_service() && services.iter().all(|it| it.name != *service) {
            problems.push(format!("{at}: there is no [[service]] with the name {service}"));
        } else if let Err(conflict) = rules.insert(&rule) {
            problems.push(format!("{at}: {conflict}"));
        }
    }
    rules
}

/// Line and column of the value of a setting of `[daemon]`.
fn place_of_setting(text: &str, name: &str) -> Option<String> {
    let file = toml::de::DeTable::parse(text).ok()?;
    let value = file.get_ref().get("daemon")?.get_ref().as_table()?.get(name)?;
    Some(Positions::of(text).at(value.span().start).to_string())
}

#[cfg(test)]
mod tests;
