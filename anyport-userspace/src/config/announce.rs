//! `[announce]` of the configuration file.

use std::{path::PathBuf, time::Duration};

use serde::Deserialize;

use super::{
    declare::{defaults, table},
    values::{Format, Needs},
};
use crate::{human_duration::HumanDuration, rules::Prefix};

/// As long as a router takes to tell others twice over, and a process to start.
const DEFAULT_HOLD_DOWN: Duration = Duration::from_secs(10);

/// What is made of the declaration below.
macro_rules! announce {
    ($settings:tt) => {
        table! {
            /// `[announce]` of the configuration file.
            #[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
            #[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
            pub struct Announce ("announce.", "nothing") $settings
        }
        defaults! { Announce $settings }
    };
}

announce! {{
    /// The file that the router reads, replaced in one step. In another directory, which has to be the user anyport's, the unit needs
    /// `ReadWritePaths=`
    file: PathBuf {
        default: "/run/anyport/announced.conf".into(),
        changes_by: Restart,
        sample: r#""/run/anyport/announced.conf""#,
    }

    /// How it is written: `bird`, two static protocols with the name that `protocol` gives and 4 or 6 behind it, or `list`, a prefix
    /// a line
    format: Format {
        default: Format::Bird,
        changes_by: Restart,
        sample: r#""bird""#,
    }

    /// The control socket of BIRD, by which it is told to read its configuration
    reload: Option<PathBuf> {
        default: None,
        in_words: "no router is told",
        empty: "nothing",
        changes_by: Restart,
        sample: r#""/run/bird/bird.ctl""#,
    }

    /// What the protocols are called in BIRD: `anyport4` and `anyport6` unless given. Two daemons beside one BIRD need two names
    protocol: String {
        default: "anyport".to_owned(),
        changes_by: Restart,
        check: |name| expect_symbol(name),
        sample: r#""anyport""#,
    }

    /// Announced as they stand here, whatever rules they are divided into
    prefixes: Vec<Prefix> {
        default: Vec::new(),
        in_words: "none",
        empty: "nothing",
        changes_by: Reload,
        sample: r#"["192.0.2.0/24", "2001:db8:0:a::/64"]"#,
    }

    /// The prefix of each rule inside of these is announced itself, 65,536 at most
    rules_within: Vec<Prefix> {
        default: Vec::new(),
        in_words: "none",
        empty: "nothing",
        changes_by: Reload,
        sample: r#"["198.51.100.0/24"]"#,
    }

    /// How many of the rules that concern one of `prefixes` have to be served: `all` or `any`
    needs: Needs {
        default: Needs::All,
        changes_by: Reload,
        sample: r#""all""#,
    }

    /// How long a prefix has to be served without a break before it is announced
    hold_down: HumanDuration {
        default: HumanDuration(DEFAULT_HOLD_DOWN),
        changes_by: Reload,
        sample: r#""10s""#,
    }
}}

/// A name that BIRD's configuration takes as it is, with a digit behind it.
fn expect_symbol(name: &str) -> Result<(), String> {
    const LONGEST: usize = 60;
    let is_symbol = name.len() <= LONGEST
        && name.starts_with(|it: char| it.is_ascii_alphabetic() || it == '_')
        && name.chars().all(|it| it.is_ascii_alphanumeric() || it == '_');
    if is_symbol { Ok(()) } else { Err(format!("use a letter, then up to {LONGEST} letters, digits and _")) }
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
