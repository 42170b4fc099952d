//! The table `[announce]` of the configuration: which prefixes are announced, where the file is and how it is written.

use std::{fmt, path::PathBuf, time::Duration};

use serde::Deserialize;

use crate::{human_duration::HumanDuration, rules::Prefix};

const DEFAULT_FILE: &str = "/run/anyport/announced.conf";
/// As long as a router takes to tell others twice over, and a process to start.
const DEFAULT_HOLD_DOWN: Duration = Duration::from_secs(10);

/// `[announce]` of the configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Announce {
    /// The file that the router reads.
    #[serde(default = "default_file")]
    pub file: PathBuf,
    /// How it is written.
    #[serde(default)]
    pub format: Format,
    /// The control socket of the router that is to read it again after a change.
    #[serde(default)]
    pub reload: Option<PathBuf>,
    /// Announced as they stand here, whatever rules they are divided into.
    #[serde(default)]
    pub prefixes: Vec<Prefix>,
    /// The prefixes of rules inside of these are announced themselves.
    #[serde(default)]
    pub rules_within: Vec<Prefix>,
    /// How many of the rules of one of `prefixes` have to be served.
    #[serde(default)]
    pub needs: Needs,
    /// How long a prefix has to be served without a break before it is announced.
    #[serde(default = "default_hold_down")]
    pub hold_down: HumanDuration,
}

/// How the file is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Static protocols of BIRD 2.
    #[default]
    Bird,
    /// A prefix a line.
    List,
}

/// How many rules have to be served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Needs {
    /// Every one.
    #[default]
    All,
    /// One at least.
    Any,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

fn default_file() -> PathBuf {
    DEFAULT_FILE.into()
}

fn default_hold_down() -> HumanDuration {
    HumanDuration(DEFAULT_HOLD_DOWN)
}

impl Announce {
    /// What is wrong with it, if something is.
    ///
    /// # Errors
    /// Says what.
    pub fn validate(&self) -> Result<(), String> {
        let Self { file, format, reload, prefixes, rules_within, .. } = self;
        for (name, path) in [("file", Some(file)), ("reload", reload.as_ref())] {
            if let Some(path) = path.filter(|path| !path.is_absolute() || path.file_name().is_none()) {
                return Err(format!("announce.{name} = {:?}: it has to be a whole path", path.display().to_string()));
            }
        }
        if prefixes.is_empty() && rules_within.is_empty() {
            return Err("[announce] names nothing to announce: give it prefixes or rules-within".to_owned());
        }
        if *format != Format::Bird && reload.is_some() {
            return Err("announce.reload is the control socket of BIRD: it goes with format = \"bird\"".to_owned());
        }
        Ok(())
    }
}
