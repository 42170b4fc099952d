//! What `anyportctl` added and applied and what the fleet gave, kept in the state directory.
//!
//! A file is written aside, put on the disk, and then takes its name; so after a loss of power there is the previous state or the
//! new one. Checksums reveal files that a person or a disk has spoilt. The state before the last one is kept beside it.

mod atomic;
mod files;
mod fleet;

use std::{
    fmt::{self, Write as _},
    io,
    path::Path,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use anyport_common::maps::Counters;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    register::KeptSocket,
    rules::{
        Origin, Prefix, Rule, RuleSpec, RuleText, ServiceName,
        lines::{self, RuleLine},
    },
    service::ServiceConfig,
};

pub(crate) use self::files::{Files, create_new};
pub use self::{
    atomic::Written,
    fleet::{FleetState, KeptFleet},
};
use self::{
    atomic::{NO_CHECKSUM, expect_checksum},
    files::Directory,
};

const FILE: &str = "state.json";
/// The state before.
const PREVIOUS: &str = "state.json.former";
const VERSION: u32 = 1;
/// The rules that were applied.
const APPLIED: Series = Series { beginning: "applied-", end: ".rules" };
/// The set of the fleet.
const SET: Series = Series { beginning: "fleet-", end: ".set" };
const COUNTERS: &str = "counters";
/// Stands before the name of a service for which something was counted.
const OF_SERVICE: &str = "service ";
const REGISTERED: &str = "registered.json";
const DRAINS: &str = "drains.json";

/// The state directory of a daemon.
#[derive(Debug)]
pub struct Store {
    files: Box<dyn Files>,
    /// The file with the rules that were applied, if there are any.
    applied: Beside,
    /// The file with the set of the fleet.
    set: Beside,
}

/// Large files that follow each other, each with a number in its name. A state file names the one that belongs to it, so that
/// both change at once.
#[derive(Clone, Copy, Debug)]
struct Series {
    beginning: &'static str,
    end: &'static str,
}

impl Series {
    fn number_of(self, name: &str) -> Option<u64> {
        name.strip_prefix(self.beginning)?.strip_suffix(self.end)?.parse().ok()
    }

    /// The name of the one after this one.
    fn after(self, named: Option<&Named>) -> String {
        let number = named.and_then(|it| self.number_of(&it.name)).unwrap_or_default();
        format!("{}{}{}", self.beginning, number.wrapping_add(1), self.end)
    }
}

/// The two state files.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Of what this node was told.
    Node,
    /// Of what the fleet gave.
    Fleet,
}

impl Kind {
    fn file(self) -> &'static str {
        match self {
            Self::Node => FILE,
            Self::Fleet => fleet::FILE,
        }
    }

    /// The name of the state before.
    fn previous(self) -> &'static str {
        match self {
            Self::Node => PREVIOUS,
            Self::Fleet => fleet::PREVIOUS,
        }
    }
}

/// Which file of a series belongs to a state file.
#[derive(Debug, Default)]
struct Beside {
    now: Option<Named>,
    /// That of the state before.
    previous: Option<String>,
}

/// A file that a state file names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    name: String,
    /// What it has to have, unless it was written by a version without.
    checksum: Option<u32>,
}

impl Named {
    fn checksum_as_text(&self) -> Option<String> {
        self.checksum.map(|it| format!("{it:08x}"))
    }
}

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Services that were added by hand.
    pub services: Vec<ServiceConfig>,
    /// Rules that were added by hand.
    pub rules: Vec<Rule>,
    /// Services that were applied from a file.
    pub applied_services: Vec<ServiceConfig>,
    /// Rules that were applied from a file.
    pub applied_rules: Vec<Rule>,
    /// What the fleet gave. It is saved apart from the rest, by [`Store::save_fleet`].
    pub fleet: Option<KeptFleet>,
}

/// Something that was drained: what steers to a service, what is steered inside of a prefix or, without both, the whole node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptDrain {
    /// To which service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// Inside of which prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<Prefix>,
    /// Seconds from the withdrawal to the first new connection that is refused.
    pub wait: u64,
    /// Whether new connections are refused by now.
    pub is_refusing: bool,
}

/// What an earlier daemon counted.
#[derive(Debug, Default)]
pub struct KeptCounters {
    /// For rules.
    pub rules: Vec<(Prefix, Arc<RuleSpec>, Counters)>,
    /// For services, by rules that were gone.
    pub services: Vec<(ServiceName, Counters)>,
}

/// The file with the sockets that were registered.
#[derive(Serialize, Deserialize)]
struct RegisteredFile {
    boot: String,
    sockets: Vec<KeptSocket>,
}

/// The state file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile {
    version: u32,
    services: Vec<ServiceConfig>,
    rules: Vec<RuleText>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    applied_services: Vec<ServiceConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    applied: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    applied_checksum: Option<String>,
    /// Of the whole file with zeros in this place. There is none in files of versions without, and where a person who has
    /// repaired the file took it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checksum: Option<String>,
}

impl Store {
    /// Creates the directory where it is missing, and reads what is there.
    ///
    /// # Errors
    /// The directory can't be made, or a file is not one of ours or spoilt. It is left as it is.
    pub fn open(directory: &Path) -> anyhow::Result<(Self, State)> {
        let files = Directory::create(directory)
            .with_context(|| format!("create the state directory {}", directory.display()))?;
        Self::of(Box::new(files))
    }

    /// Reads what is there, and changes nothing.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn look(directory: &Path) -> anyhow::Result<State> {
        Self::at(directory).read()
    }

    /// The sockets that were registered earlier in this boot, see [`Self::registered`]. Changes nothing.
    pub fn look_for_registered(directory: &Path, boot: &str) -> Vec<KeptSocket> {
        Self::at(directory).registered(boot)
    }

    fn at(directory: &Path) -> Self {
        Self { files: Box::new(Directory::at(directory)), applied: Beside::default(), set: Beside::default() }
    }

    /// As [`Self::open`], wherever the files are.
    pub(crate) fn of(files: Box<dyn Files>) -> anyhow::Result<(Self, State)> {
        let mut store = Self { files, applied: Beside::default(), set: Beside::default() };
        let state = store.read()?;
        let previous = store.files.read(PREVIOUS).ok().and_then(|text| serde_json::from_slice::<StateFile>(&text).ok());
        store.applied.previous = previous.and_then(|file| file.applied);
        store.set.previous = store.former_set();
        store.remove_unused();
        Ok((store, state))
    }

    fn read(&mut self) -> anyhow::Result<State> {
        let state = self.read_state()?;
        Ok(State { fleet: self.read_fleet()?, ..state })
    }

    fn read_state(&mut self) -> anyhow::Result<State> {
        let path = self.files.path(FILE);
        let text = match self.files.read(FILE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::default()),
            text => text.with_context(|| format!("read the state file {}", path.display()))?,
        };
        let advice = || self.advice(FILE, PREVIOUS, "what anyportctl added and applied");
        let file: StateFile = serde_json::from_slice(&text).with_context(advice)?;
        if file.version != VERSION {
            bail!("{}: its version is {}, and this anyportd knows {VERSION}", advice(), file.version);
        }
        expect_checksum(file.checksum.as_deref(), &text).with_context(advice)?;
        let mut state = State {
            services: file.services,
            rules: file.rules.into_iter().map(|rule| rule.into_rule(Origin::Added)).collect(),
            applied_services: file.applied_services,
            ..State::default()
        };
        if let Some(name) = file.applied {
            let applied = named(name, file.applied_checksum).with_context(advice)?;
            let text = self.read_named(APPLIED, &applied).with_context(advice)?;
            let rules = lines::parse(&text, Arc::new).with_context(advice)?;
            let origins = Origin::Applied.into();
            state.applied_rules =
                rules.into_iter().map(|((prefix, terms), _)| Rule { prefix, terms, origins }).collect();
            self.applied.now = Some(applied);
        }
        Ok(state)
    }

    /// What to do about a state file that can't be read.
    fn advice(&self, file: &str, previous: &str, what: &str) -> String {
        let path = self.files.path(file);
        let path = path.display();
        let previous = match self.files.read(previous) {
            Ok(_) => format!(" go on with the state before the last change: mv {path}.former {path}; or"),
            Err(_) => String::new(),
        };
        format!(
            "read the state file {path}, which holds {what}; repair it, and take the line with the checksum out;{previous} go on \
             without those rules: mv {path} {path}.broken"
        )
    }

    /// The text of a file that a state file names.
    fn read_named(&self, series: Series, Named { name, checksum }: &Named) -> anyhow::Result<String> {
        let attempt = || format!("read the file that it names, {}", self.files.path(name).display());
        if series.number_of(name).is_none() {
            bail!("{}: that is no name of such a file", attempt());
        }
        let text = self.files.read(name).with_context(attempt)?;
        if checksum.is_some_and(|checksum| checksum != crc32fast::hash(&text)) {
            bail!("{}: it is not what was written, by its checksum", attempt());
        }
        String::from_utf8(text).with_context(attempt)
    }

    /// Writes aside what is to be kept of the services and of the rules that were added by hand. The rules that were applied stay
    /// as they are kept, unless new lines of them are given.
    ///
    /// # Errors
    /// What could not be written; nothing is left of it.
    pub fn write(&self, state: &State, applied: Option<&str>) -> anyhow::Result<Written> {
        let now = match applied {
            None => self.applied.now.clone(),
            Some("") => None,
            Some(lines) => Some(self.write_next(APPLIED, self.applied.now.as_ref(), lines)?),
        };
        let file = StateFile {
            version: VERSION,
            services: state.services.clone(),
            rules: state.rules.iter().map(RuleText::from).collect(),
            applied_services: state.applied_services.clone(),
            applied: now.as_ref().map(|it| it.name.clone()),
            applied_checksum: now.as_ref().and_then(Named::checksum_as_text),
            checksum: Some(NO_CHECKSUM.to_owned()),
        };
        self.write_aside(Kind::Node, now, &file)
    }

    /// [`Self::write`] and [`Self::activate`] in one.
    ///
    /// # Errors
    /// What could not be written; the old state is still there.
    pub fn save(&mut self, state: &State, applied: Option<&str>) -> anyhow::Result<()> {
        let written = self.write(state, applied)?;
        self.activate(written)
    }

    /// Keeps what was counted for rules, and for services by rules that are gone, for a daemon that comes later.
    ///
    /// # Errors
    /// What could not be written.
    pub fn save_counters<'a>(
        &self,
        counted: impl Iterator<Item = (Prefix, Arc<RuleSpec>, Counters)>,
        left: impl Iterator<Item = (&'a ServiceName, &'a Counters)>,
    ) -> anyhow::Result<()> {
        let mut text = String::new();
        let mut write = |Counters { steered, no_socket, assign_error, denied }, of: &dyn fmt::Display| {
            let _ = writeln!(text, "{steered} {no_socket} {assign_error} {denied} {of}");
        };
        for (prefix, terms, counters) in counted {
            write(counters, &RuleLine(&prefix, &terms));
        }
        left.for_each(|(name, counters)| write(*counters, &format_args!("{OF_SERVICE}{name}")));
        self.replace(COUNTERS, text.as_bytes())
    }

    /// What was counted when that was kept last. Counters are no reason not to start, so what can't be read is passed over.
    pub fn counters(&self) -> KeptCounters {
        let text = self.files.read(COUNTERS).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let mut kept = KeptCounters::default();
        for (counters, of) in text.lines().filter_map(read_counters) {
            if let Some(name) = of.strip_prefix(OF_SERVICE) {
                kept.services.extend(name.parse().map(|name| (name, counters)));
            } else if let Ok(rules) = lines::parse(of, Arc::new) {
                kept.rules.extend(rules.into_iter().map(|((prefix, terms), _)| (prefix, terms, counters)));
            }
        }
        kept
    }

    /// Keeps which sockets were registered, for a daemon that comes later in the same boot.
    ///
    /// # Errors
    /// What could not be written.
    pub fn save_registered(&self, boot: &str, sockets: Vec<KeptSocket>) -> anyhow::Result<()> {
        let file = RegisteredFile { boot: boot.to_owned(), sockets };
        self.replace(REGISTERED, &serde_json::to_vec(&file).context("write the sockets that were registered")?)
    }

    /// The sockets that were registered earlier in this boot. Their owners can register again, so what can't be read is
    /// passed over.
    pub fn registered(&self, boot: &str) -> Vec<KeptSocket> {
        let text = self.files.read(REGISTERED).unwrap_or_default();
        let file = serde_json::from_slice::<RegisteredFile>(&text).ok().filter(|file| file.boot == boot);
        file.map(|file| file.sockets).unwrap_or_default()
    }

    /// Keeps what is drained.
    ///
    /// # Errors
    /// What could not be written; what was kept before still is.
    pub fn save_drains(&self, drains: &[KeptDrain]) -> anyhow::Result<()> {
        self.replace(DRAINS, &serde_json::to_vec_pretty(drains).context("write what is drained")?)
    }

    /// What is drained.
    ///
    /// # Errors
    /// That can't be read: new connections would be served that are to be refused.
    pub fn drains(&self) -> anyhow::Result<Vec<KeptDrain>> {
        let path = self.files.path(DRAINS);
        let text = match self.files.read(DRAINS) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            text => text.with_context(|| format!("read {}", path.display()))?,
        };
        let path = path.display();
        serde_json::from_slice(&text).with_context(|| {
            format!("read {path}, which says what is drained; repair it, or serve everything: rm {path}")
        })
    }

    fn beside(&mut self, kind: Kind) -> &mut Beside {
        match kind {
            Kind::Node => &mut self.applied,
            Kind::Fleet => &mut self.set,
        }
    }

    /// Removes files of the two series that neither the state nor the previous one names.
    fn remove_unused(&self) {
        let is_unused = |name: &String| {
            [(APPLIED, &self.applied), (SET, &self.set)].iter().any(|(series, Beside { now, previous })| {
                let names = [now.as_ref().map(|it| &it.name), previous.as_ref()];
                series.number_of(name).is_some() && !names.contains(&Some(name))
            })
        };
        for name in self.files.names().unwrap_or_default().iter().filter(|name| is_unused(name)) {
            if let Err(error) = self.files.remove(name) {
                warn!("remove the file {}, which is not needed any more: {error}", self.files.path(name).display());
            }
        }
    }
}

/// A file by what the state file says of it.
fn named(name: String, checksum: Option<String>) -> anyhow::Result<Named> {
    let checksum = checksum.map(|it| u32::from_str_radix(&it, 16)).transpose().context("read a checksum")?;
    Ok(Named { name, checksum })
}

/// Reads what was counted for a rule, and leaves the rule.
fn read_counters(line: &str) -> Option<(Counters, &str)> {
    let mut words = line.splitn(5, ' ');
    let mut number = || words.next()?.parse().ok();
    let counters = Counters { steered: number()?, no_socket: number()?, assign_error: number()?, denied: number()? };
    Some((counters, words.next()?))
}

#[cfg(test)]
pub(crate) mod tests;
