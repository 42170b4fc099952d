//! Values of settings that are one of a few words.

use std::fmt;

use serde::Deserialize;

use super::declare::shown_as_text;
use crate::back_end::Choice;

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

/// How the file with the announced prefixes is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Static protocols of BIRD 2.
    #[default]
    Bird,
    /// A prefix a line.
    List,
}

/// How many of the rules of a prefix have to be served for it to be announced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Needs {
    /// Every one.
    #[default]
    All,
    /// One at least.
    Any,
}

/// Who gets packets to an address of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Winner {
    /// The service of the rule.
    #[default]
    Rule,
    /// The host's own servers, unless a rule is about this very address.
    Host,
}

/// Displays as its variants are called, in lower case.
macro_rules! displays_in_lower_case {
    ($($type:ty),+) => { $(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&format!("{self:?}").to_lowercase())
            }
        }
    )+ };
}

displays_in_lower_case!(Format, LogFormat, LogLevel, Needs, Winner);
shown_as_text!(Choice, Format, LogFormat, LogLevel, Needs, Winner);
