//! What the fleet gave: the active set, and how far the ring's pointer has been seen to go.

use std::io;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::{
    Kind, Named, SET, Store, VERSION,
    atomic::{NO_CHECKSUM, Written, expect_checksum},
    named,
};
use crate::{
    rule_file::RuleFile,
    rules::{Origin, Rule},
    service::ServiceConfig,
};

pub(super) const FILE: &str = "fleet.json";
/// The previous file.
pub(super) const PREVIOUS: &str = "fleet.json.former";

/// Where a node stands in its fleet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FleetState {
    /// The ring whose pointer was followed.
    pub ring: String,
    /// The sequence of the active pointer; 0 before the first.
    pub sequence: u64,
    /// The active set, by its hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// Since when it is, by RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// The highest sequence that was seen, also where it was refused.
    pub seen: u64,
    /// The set that this one pointed to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_set: Option<String>,
    /// The seed of the key that signs this node's reports, in hexadecimal digits. Others must not read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

/// What is kept of a fleet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KeptFleet {
    /// Where this node stands.
    pub state: FleetState,
    /// The services of the active set.
    pub services: Vec<ServiceConfig>,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// The file of it.
#[derive(Debug, Serialize, Deserialize)]
struct FleetFile {
    version: u32,
    #[serde(flatten)]
    state: FleetState,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text_checksum: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checksum: Option<String>,
}

impl Store {
    /// Writes aside what is to be kept of the fleet, as [`Self::write`] does with the rest: the state, and the text of the set
    /// unless that stays as it is.
    ///
    /// # Errors
    /// What could not be written; nothing is left of it.
    pub fn write_fleet(&self, state: &FleetState, text: Option<&str>) -> anyhow::Result<Written> {
        let now = match text {
            None => self.set.now.clone(),
            Some(text) => Some(self.write_next(SET, self.set.now.as_ref(), text)?),
        };
        let file = FleetFile {
            version: VERSION,
            state: state.clone(),
            text: now.as_ref().map(|it| it.name.clone()),
            text_checksum: now.as_ref().and_then(Named::checksum_as_text),
            checksum: Some(NO_CHECKSUM.to_owned()),
        };
        self.write_aside(Kind::Fleet, now, &file)
    }

    /// [`Self::write_fleet`] and [`Self::activate`] in one.
    ///
    /// # Errors
    /// What could not be written; the old state is still there.
    pub fn save_fleet(&mut self, state: &FleetState, text: Option<&str>) -> anyhow::Result<()> {
        let written = self.write_fleet(state, text)?;
        self.activate(written)
    }

    /// The text of the set that is kept, as it was written; nothing if there is none.
    ///
    /// # Errors
    /// It can't be read, or is spoilt.
    pub fn fleet_set(&self) -> anyhow::Result<Option<String>> {
        self.set.now.as_ref().map(|set| self.read_named(SET, set)).transpose()
    }

    /// As `read`, of this file and the one that it names.
    pub(super) fn read_fleet(&mut self) -> anyhow::Result<Option<KeptFleet>> {
        let advice = || self.advice(FILE, PREVIOUS, "what the fleet gave");
        let text = match self.files.read(FILE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.with_context(advice)?,
        };
        let FleetFile { version, state, text: name, text_checksum, checksum } =
            serde_json::from_slice(&text).with_context(advice)?;
        if version != VERSION {
            bail!("{}: its version is {version}, and this anyportd knows {VERSION}", advice());
        }
        expect_checksum(checksum.as_deref(), &text).with_context(advice)?;
        let mut kept = KeptFleet { state, ..KeptFleet::default() };
        if let Some(name) = name {
            let set = named(name, text_checksum).with_context(advice)?;
            let text = self.read_named(SET, &set).with_context(advice)?;
            let RuleFile { services, rules } = RuleFile::parse(&text, std::sync::Arc::new).with_context(advice)?;
            let origins = Origin::Fleet.into();
            kept.services = services.unwrap_or_default();
            kept.rules = rules.into_iter().map(|((prefix, terms), _)| Rule { prefix, terms, origins }).collect();
            self.set.now = Some(set);
        }
        Ok(Some(kept))
    }

    /// The file with the set before, if there is one.
    pub(super) fn former_set(&self) -> Option<String> {
        let text = self.files.read(PREVIOUS).ok()?;
        serde_json::from_slice::<FleetFile>(&text).ok()?.text
    }
}
