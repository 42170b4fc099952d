//! `[fleet]`: where the daemon looks for rules, and what it takes from there.

use std::{
    fmt::Display,
    fs,
    num::NonZeroU8,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use nix::unistd::gethostname;
use serde::Deserialize;
use toml::Spanned;

use super::{
    declare::{ConfigTable as _, shown_as_text, table},
    place_of_setting,
};
use crate::{
    fleet::{
        layout::Name,
        settings::{ConnectionSettings, connection_settings},
        signing::PublicKeys,
    },
    text::Positions,
};

shown_as_text!(Name);

connection_settings!(
    table,
    [
        /// `[fleet]` as it stands in the file. What may be left out is none.
        #[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case")]
        pub struct FleetSettings ("fleet.", "none")
    ],
    [
        /// The ring whose pointer is followed
        ring: Name {
            in_words: "none; needed",
            changes_by: Restart,
            sample: r#""main""#,
        }

        /// What this node is called there
        node: Option<Name> {
            in_words: "the host's name",
            empty: "none",
            changes_by: Restart,
            sample: r#""edge-1""#,
        }

        /// Follow only what one of the keys in this file, in PEM, has signed
        public_key: Option<PathBuf> {
            in_words: "none: what is there is followed, signed or not",
            empty: "none",
            changes_by: Restart,
            sample: r#""/etc/anyport/fleet.pem""#,
        }

        /// Refuse a set that takes more percent of the fleet's rules away
        max_removal: Option<NonZeroU8> {
            in_words: "none",
            empty: "none",
            changes_by: Reload,
            check: |it| match it {
                Some(percent) if percent.get() > 100 => Err("it is a percentage".to_owned()),
                _ => Ok(()),
            },
            sample: "50",
        }
    ]
);

macro_rules! connection_of_table {
    ({ $($(#[doc = $help:literal])+ $name:ident: $type:ty { $($more:tt)* })+ }) => {
        impl FleetSettings {
            fn connection(&self) -> ConnectionSettings {
                ConnectionSettings { $($name: self.$name.clone(),)+ }
            }
        }
    };
}
connection_settings!(connection_of_table, [], []);

/// To which fleet this node belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fleet {
    /// The settings, with the name of this node.
    pub settings: FleetSettings,
    /// How etcd is reached.
    pub connection: ConnectionSettings,
    /// The ring whose pointer is followed.
    pub ring: Name,
    /// What this node is called there.
    pub node: Name,
    /// The keys of which one has to have signed a pointer, as they were at the start.
    pub public_keys: Option<PublicKeys>,
}

impl Fleet {
    /// What is right; what is wrong is added to the problems. Files are read, since a node that can't do so at its start would only
    /// say so later.
    pub(super) fn settle(table: Spanned<FleetSettings>, text: &str, problems: &mut Vec<String>) -> Option<Self> {
        let before = problems.len();
        let at = Positions::of(text).at(table.span().start).to_string();
        let mut settings = table.into_inner();
        let mut wrong = |setting: Option<&str>, what: &dyn Display| {
            let place = setting.and_then(|name| place_of_setting(text, "fleet", name));
            problems.push(format!("{}: {what}", place.as_ref().unwrap_or(&at)));
        };
        let connection = settings.connection();
        if let Err(problem) = connection.read() {
            wrong(None, &problem.error);
        }
        let public_keys = settings
            .public_key
            .as_ref()
            .and_then(|file| read_keys(file).map_err(|error| wrong(Some("public-key"), &format!("{error:#}"))).ok());
        for setting in FleetSettings::SETTINGS {
            if let Some(problem) = setting.problem(&settings) {
                wrong(Some(setting.name), &problem);
            }
        }
        let node = settings.node.take().map_or_else(host_name, Ok);
        let node = node.map_err(|error| wrong(None, &format!("{error:#}"))).ok()?;
        settings.node = Some(node.clone());
        let ring = settings.ring.clone();
        (problems.len() == before).then_some(Self { settings, connection, ring, node, public_keys })
    }
}

fn read_keys(file: &Path) -> anyhow::Result<PublicKeys> {
    let pem = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    PublicKeys::from_pem(&pem).with_context(|| format!("read {}", file.display()))
}

fn host_name() -> anyhow::Result<Name> {
    let name = gethostname().context("ask for the name of this host")?;
    name.to_string_lossy().parse().context("the name of this host is none for a node; give it one: node = \"NAME\"")
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Settings};

    fn parse(text: &str) -> anyhow::Result<Config> {
        Config::parse(&Settings::default(), text)
    }

    #[test]
    fn a_fleet_needs_no_more_than_etcd_and_a_ring() {
        let fleet =
            parse("[fleet]\netcd = [\"http://192.0.2.1:2379\", \"http://[2001:db8::1]:2379\"]\nring = \"main\"");
        let fleet = fleet.unwrap().fleet.unwrap();
        assert_eq!((fleet.ring.as_str(), fleet.connection.etcd.len()), ("main", 2));
        assert_eq!(fleet.node.as_str(), nix::unistd::gethostname().unwrap().to_str().unwrap());
        assert!(parse("").unwrap().fleet.is_none());
    }

    #[test]
    fn says_where_and_what() {
        let plain = "[fleet]\nring = \"main\"\netcd = [\"http://192.0.2.1:2379\"]\n";
        for (text, wanted) in [
            ("[fleet]\nring = \"main\"".to_owned(), ["line 1", "etcd"]),
            ("[fleet]\netcd = []\nring = \"main\"".to_owned(), ["line 1, column 1", "no etcd"]),
            ("[fleet]\nring = \"a b\"".to_owned(), ["line 2, column 8", "name \"a b\""]),
            ("[fleet]\nring = \"main\"\netcd = [\"192.0.2.1:2379\"]".to_owned(), ["line 1, column 1", "https://"]),
            (format!("{plain}colour = 1"), ["line 4, column 1", "colour"]),
            (format!("{plain}node = \"\""), ["line 4", "name"]),
            (format!("{plain}max-removal = 101"), ["line 4, column 15", "percentage"]),
            (format!("{plain}max-removal = 0"), ["line 4", "from 1 to 255"]),
            (format!("{plain}user = \"u\""), ["line 1, column 1", "password"]),
            (format!("{plain}user = \"u\"\npassword-file = \"/none\""), ["line 1, column 1", "read /none"]),
            (format!("{plain}public-key = \"/none\""), ["line 4, column 14", "read /none"]),
            (format!("{plain}public-key = \"/dev/null\""), ["line 4, column 14", "openssl pkey -pubout"]),
            (
                "[fleet]\nring = \"main\"\netcd = [\"https://a:1\"]\nkey = \"/dev/null\"".to_owned(),
                ["line 1, column 1", "certificate"],
            ),
        ] {
            let error = format!("{:#}", parse(&text).unwrap_err());
            for word in wanted {
                assert!(error.contains(word), "{text:?} lacks {word:?}: {error}");
            }
        }
    }

    #[test]
    fn tells_what_can_change_from_what_takes_a_restart() {
        let text = |ring: &str, more: &str| {
            format!("[fleet]\netcd = [\"http://192.0.2.1:1\"]\nring = \"{ring}\"\nnode = \"n\"\n{more}")
        };
        let previous = parse(&text("main", "")).unwrap();
        let mut now = parse(&text("canary", "max-removal = 20")).unwrap();
        let (live, fixed) = now.differences(&previous);
        assert_eq!(
            (live, fixed),
            (vec!["fleet.max-removal: none -> 20".to_owned()], vec!["fleet.ring: main -> canary".to_owned()])
        );
        now.take_live(&previous);
        assert_eq!(now.max_removal(), None);
        assert_eq!(parse("").unwrap().differences(&previous).1.len(), 4);
    }
}
