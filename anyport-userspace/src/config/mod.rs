//! The configuration of the daemon, from the command line, the environment and the configuration file.
//!
//! Each setting is declared in one place: those of `[daemon]` in `settings.rs`, of `[announce]` in `announce.rs`, of `[fleet]` in
//! `fleet.rs`, and those of them by which etcd is reached, which are options of `anyportctl fleet`, too, in `fleet/settings.rs`. To add
//! one, declare it there and use it. The rest is made of the declaration (`declare.rs` says how): option, environment variable, key
//! of the file, merging, the check, what reload changes and shows, and, by a test, `docs/anyport.toml` and the tables of the
//! documents: `ANYPORT_WRITE_DOCS=1 cargo test -p anyport-userspace --lib config::documents` writes them.

mod absent;
mod announce;
mod declare;
#[cfg(test)]
mod documents;
#[cfg(feature = "fleet")]
mod fleet;
mod options;
mod reload;
mod settings;
mod tables;
#[cfg(test)]
mod tests;
mod values;

use std::{
    fs, io,
    num::NonZeroU8,
    ops::Deref,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nix::unistd::Uid;
use serde::Deserialize;
use toml::Spanned;

#[cfg(feature = "fleet")]
pub use self::fleet::{Fleet, FleetSettings};
pub use self::{
    announce::Announce,
    declare::{ChangesBy, ConfigTable, Setting},
    options::Options,
    settings::{DaemonConfig, Settings},
    values::{Format, LogFormat, LogLevel, Needs, Winner},
};
pub use crate::back_end::Choice;
use crate::{
    api::FleetView,
    paths::Paths,
    rules::{RuleSet, RuleText},
    service::ServiceConfig,
    text::{Positions, from_toml},
};

/// The configuration file, unless told otherwise.
pub const DEFAULT_FILE: &str = "/etc/anyport/anyport.toml";

/// Where the configuration is read from.
#[derive(Clone, Debug, Default)]
pub struct Source {
    options: Settings,
    file: Option<PathBuf>,
}

/// Everything that the daemon is told at its start. The settings of `[daemon]` are fields of it, too.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// The settings of `[daemon]`.
    pub daemon: DaemonConfig,
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

impl Deref for Config {
    type Target = DaemonConfig;

    fn deref(&self) -> &DaemonConfig {
        &self.daemon
    }
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
        let config = Self::read(file, |text| Self::parse(&options, text))?;
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
        let config = Self::read(file, |text| {
            let DaemonTable { daemon, announce } = from_toml(text).map_err(anyhow::Error::msg)?;
            Ok(Self { daemon: settled(&options, daemon, text)?, announce, ..Self::default() })
        })?;
        Ok(Self { source: Source { options, file: file.map(Path::to_owned) }, ..config })
    }

    /// Reads the same file again, with the same options.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn read_again(&self) -> anyhow::Result<Self> {
        let Source { options, file } = &self.source;
        Self::new(options.clone(), file.as_deref())
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
        return self.fleet.as_ref()?.settings.max_removal;
        #[cfg(not(feature = "fleet"))]
        None
    }

    /// The settings alone.
    #[must_use]
    pub fn without_tables(&self) -> Self {
        Self {
            daemon: self.daemon.clone(),
            #[cfg(feature = "fleet")]
            fleet: self.fleet.clone(),
            announce: self.announce.clone(),
            services: Vec::new(),
            rules: RuleSet::default(),
            source: self.source.clone(),
        }
    }

    fn parse(options: &Settings, text: &str) -> anyhow::Result<Self> {
        let file: ConfigFile = from_toml(text).map_err(anyhow::Error::msg)?;
        let mut problems = Vec::new();
        let services = tables::services(file.service, text, &mut problems);
        let rules = tables::rules(file.rule, &services, text, &mut problems);
        #[cfg(feature = "fleet")]
        let fleet = file.fleet.and_then(|table| Fleet::settle(table, text, &mut problems)).map(Box::new);
        let announce = file.announce.map(|table| {
            let at = Positions::of(text).at(table.span().start);
            let announce = table.into_inner();
            problems.extend(announce.validate().err().map(|error| format!("{at}: {error}")));
            announce
        });
        if !problems.is_empty() {
            bail!("{}", problems.join("\n"));
        }
        let max_rules_at = place_unless_option(options, text, "max-rules");
        let daemon = settled(options, file.daemon, text)?;
        let (count, limit) = (rules.len(), daemon.max_rules);
        if count > limit {
            bail!("{max_rules_at}there are {count} rules; the limit is {limit}, see max-rules");
        }
        Ok(Self {
            daemon,
            #[cfg(feature = "fleet")]
            fleet,
            announce,
            services,
            rules,
            source: Source::default(),
        })
    }
}

/// Options come before the settings of a file, which is there as text, too, and those before the defaults.
fn settled(options: &Settings, file: Settings, text: &str) -> anyhow::Result<DaemonConfig> {
    let mut daemon = DaemonConfig::default();
    file.put_into(&mut daemon);
    options.clone().put_into(&mut daemon);
    for setting in DaemonConfig::SETTINGS {
        if let Some(problem) = setting.problem(&daemon) {
            bail!("{}{problem}", place_unless_option(options, text, setting.name));
        }
    }
    Ok(daemon)
}

/// Where a setting of `[daemon]` stands in the file, for the beginning of a message, unless an option has its place.
fn place_unless_option(options: &Settings, text: &str, name: &str) -> String {
    let found = if options.gives(name) { None } else { place_of_setting(text, "daemon", name) };
    found.map(|place| format!("{place}: ")).unwrap_or_default()
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConfigFile {
    daemon: Settings,
    #[cfg(feature = "fleet")]
    fleet: Option<Spanned<FleetSettings>>,
    announce: Option<Spanned<Announce>>,
    service: Vec<Spanned<ServiceConfig>>,
    rule: Vec<Spanned<RuleText>>,
}

/// Line and column of the value of a setting in a table.
fn place_of_setting(text: &str, table: &str, name: &str) -> Option<String> {
    let file = toml::de::DeTable::parse(text).ok()?;
    let value = file.get_ref().get(table)?.get_ref().as_table()?.get(name)?;
    Some(Positions::of(text).at(value.span().start).to_string())
}
