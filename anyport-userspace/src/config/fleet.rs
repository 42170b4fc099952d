//! The section `[fleet]`: whom this node asks for rules, and what it takes from there.

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

use crate::{
    fleet::{
        layout::{DEFAULT_PREFIX, Name},
        settings::ConnectionSettings,
        signing::PublicKeys,
    },
    text::Positions,
};

/// The settings that can change while the daemon runs.
pub(super) const LIVE: [&str; 1] = ["fleet.max-removal"];
/// Those that take a restart.
pub(super) const FIXED: [&str; 10] = [
    "fleet.etcd",
    "fleet.ring",
    "fleet.node",
    "fleet.prefix",
    "fleet.ca",
    "fleet.certificate",
    "fleet.key",
    "fleet.user",
    "fleet.password-file",
    "fleet.public-key",
];

/// To which fleet this node belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fleet {
    /// How etcd is reached.
    pub connection: ConnectionSettings,
    /// The ring whose pointer is followed.
    pub ring: Name,
    /// What this node is called there.
    pub node: Name,
    /// The file with the keys of which one has to have signed a pointer.
    pub public_key: Option<PathBuf>,
    /// What these were at the start.
    pub public_keys: Option<PublicKeys>,
    /// Most rules of the fleet that one set may take away, in percent.
    pub max_removal: Option<NonZeroU8>,
}

/// `[fleet]` as it stands in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Table {
    etcd: Vec<String>,
    ring: Name,
    node: Option<Name>,
    prefix: Option<String>,
    ca: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    user: Option<String>,
    password_file: Option<PathBuf>,
    public_key: Option<Spanned<PathBuf>>,
    max_removal: Option<Spanned<NonZeroU8>>,
}

impl Table {
    /// What is right; what is wrong is added to the problems. Files are read, since a node that can't do so at its start would only
    /// say so when somebody asks.
    pub(super) fn settle(table: Spanned<Self>, text: &str, problems: &mut Vec<String>) -> Option<Fleet> {
        let before = problems.len();
        let at = table.span().start;
        let mut wrong =
            |at: usize, what: &dyn Display| problems.push(format!("{}: {what}", Positions::of(text).at(at)));
        let Self { etcd, ring, node, prefix, ca, certificate, key, user, password_file, public_key, max_removal } =
            table.into_inner();
        let connection = ConnectionSettings { etcd, prefix, ca, certificate, key, user, password_file };
        if let Err(problem) = connection.read() {
            wrong(at, &problem.error);
        }
        let public_keys = public_key.as_ref().and_then(|file| {
            read_keys(file.get_ref()).map_err(|error| wrong(file.span().start, &format!("{error:#}"))).ok()
        });
        if let Some(percent) = max_removal.as_ref().filter(|it| it.get_ref().get() > 100) {
            wrong(percent.span().start, &format!("max-removal = {}: it is a percentage", percent.get_ref()));
        }
        let node = node.map_or_else(host_name, Ok).map_err(|error| wrong(at, &format!("{error:#}"))).ok()?;
        (problems.len() == before).then(|| Fleet {
            connection,
            ring,
            node,
            public_key: public_key.map(Spanned::into_inner),
            public_keys,
            max_removal: max_removal.map(Spanned::into_inner),
        })
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

/// In the order of [`LIVE`].
pub(super) fn live_texts(fleet: Option<&Fleet>) -> Vec<String> {
    vec![fleet.and_then(|it| it.max_removal).map_or_else(|| "none".to_owned(), |it| it.to_string())]
}

/// In the order of [`FIXED`].
pub(super) fn fixed_texts(fleet: Option<&Fleet>) -> Vec<String> {
    let none = || "none".to_owned();
    let Some(Fleet { connection, ring, node, public_key, .. }) = fleet else { return vec![none(); FIXED.len()] };
    let ConnectionSettings { etcd, prefix, ca, certificate, key, user, password_file } = connection;
    let path = |path: &Option<PathBuf>| path.as_ref().map_or_else(none, |it| it.display().to_string());
    vec![
        etcd.join(", "),
        ring.to_string(),
        node.to_string(),
        prefix.clone().unwrap_or_else(|| DEFAULT_PREFIX.to_owned()),
        path(ca),
        path(certificate),
        path(key),
        user.clone().unwrap_or_else(none),
        path(password_file),
        path(public_key),
    ]
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Settings};

    fn parse(text: &str) -> anyhow::Result<Config> {
        Config::parse(Settings::default(), text)
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
            (format!("{plain}max-removal = 0"), ["line 4", "nonzero"]),
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
        let former = parse(&text("main", "")).unwrap();
        let mut now = parse(&text("canary", "max-removal = 20")).unwrap();
        let (live, fixed) = now.differences(&former);
        assert_eq!(
            (live, fixed),
            (vec!["fleet.max-removal: none -> 20".to_owned()], vec!["fleet.ring: main -> canary".to_owned()])
        );
        now.take_live(&former);
        assert_eq!(now.max_removal(), None);
        assert_eq!(parse("").unwrap().differences(&former).1.len(), 4);
    }
}
