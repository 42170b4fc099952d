//! The section `[fleet]`: whom this node asks for rules, and what it takes from there.

use std::{
    fs,
    num::NonZeroU8,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use nix::unistd::gethostname;
use serde::Deserialize;
use toml::Spanned;

use super::place;
use crate::fleet::{
    layout::{DEFAULT_PREFIX, Name},
    signing::PublicKeys,
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
    /// The members of etcd, as URLs.
    pub etcd: Vec<String>,
    /// The ring whose pointer is followed.
    pub ring: Name,
    /// What this node is called there.
    pub node: Name,
    /// Under which all keys are.
    pub prefix: String,
    /// Certificates of those who may vouch for etcd; those that the system trusts if there is none.
    pub ca: Option<PathBuf>,
    /// This node's certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// User of etcd, and the file with its password.
    pub user: Option<(String, PathBuf)>,
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
    etcd: Spanned<Vec<Spanned<String>>>,
    ring: Name,
    node: Option<Name>,
    prefix: Option<Spanned<String>>,
    ca: Option<Spanned<PathBuf>>,
    certificate: Option<Spanned<PathBuf>>,
    key: Option<Spanned<PathBuf>>,
    user: Option<Spanned<String>>,
    password_file: Option<Spanned<PathBuf>>,
    public_key: Option<Spanned<PathBuf>>,
    max_removal: Option<Spanned<NonZeroU8>>,
}

impl Table {
    /// What is right; what is wrong is added to the problems. Files are looked at, since a node that can't read them at its start
    /// would only say so when somebody asks.
    pub(super) fn settle(table: Spanned<Self>, text: &str, problems: &mut Vec<String>) -> Option<Fleet> {
        let before = problems.len();
        let at = table.span().start;
        let table = table.into_inner();
        let mut wrong = |at: usize, what: String| problems.push(format!("{}: {what}", place(text, at)));
        if table.etcd.get_ref().is_empty() {
            wrong(
                table.etcd.span().start,
                "etcd names no member; a URL for each, such as \"https://192.0.2.1:2379\"".into(),
            );
        }
        for url in table.etcd.get_ref() {
            if let Err(why) = expect_url(url.get_ref()) {
                wrong(url.span().start, format!("etcd = {:?}: {why}", url.get_ref()));
            }
        }
        let is_encrypted = table.etcd.get_ref().iter().any(|url| url.get_ref().starts_with("https://"));
        for (file, name) in [(&table.ca, "ca"), (&table.certificate, "certificate"), (&table.key, "key")] {
            if let Some(file) = file.as_ref().filter(|_| !is_encrypted) {
                wrong(file.span().start, format!("{name} is for https://, and no member of etcd is asked by that"));
            }
        }
        let both = |one: &Option<Spanned<_>>, other: &Option<Spanned<PathBuf>>| one.is_some() == other.is_some();
        if !both(&table.certificate, &table.key) {
            wrong(at, "certificate and key belong together".into());
        }
        if table.user.is_some() != table.password_file.is_some() {
            wrong(at, "user and password-file belong together".into());
        }
        let files = [&table.ca, &table.certificate, &table.key, &table.password_file];
        for file in files.into_iter().flatten() {
            if let Err(error) = fs::File::open(file.get_ref()) {
                wrong(file.span().start, format!("read {}: {error}", file.get_ref().display()));
            }
        }
        let public_keys = table.public_key.as_ref().and_then(|file| {
            read_keys(file.get_ref()).map_err(|error| wrong(file.span().start, format!("{error:#}"))).ok()
        });
        if let Some(prefix) = table.prefix.as_ref().filter(|it| !it.get_ref().starts_with('/')) {
            wrong(prefix.span().start, format!("prefix = {:?}: it begins with a slash", prefix.get_ref()));
        }
        if let Some(percent) = table.max_removal.as_ref().filter(|it| it.get_ref().get() > 100) {
            wrong(percent.span().start, format!("max-removal = {}: it is a percentage", percent.get_ref()));
        }
        let node = table.node.map_or_else(host_name, Ok).map_err(|error| wrong(at, format!("{error:#}"))).ok()?;
        let path = |file: Option<Spanned<PathBuf>>| file.map(Spanned::into_inner);
        (problems.len() == before).then(|| Fleet {
            etcd: table.etcd.into_inner().into_iter().map(Spanned::into_inner).collect(),
            ring: table.ring,
            node,
            prefix: table.prefix.map_or_else(|| DEFAULT_PREFIX.to_owned(), Spanned::into_inner),
            ca: path(table.ca),
            identity: path(table.certificate).zip(path(table.key)),
            user: table.user.map(Spanned::into_inner).zip(path(table.password_file)),
            public_key: path(table.public_key),
            public_keys,
            max_removal: table.max_removal.map(Spanned::into_inner),
        })
    }
}

fn expect_url(url: &str) -> Result<(), &'static str> {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    let rest = rest.ok_or("it begins with https:// or http://")?;
    let (host, port) =
        rest.trim_end_matches('/').rsplit_once(':').ok_or("it ends with a port, which is 2379 usually")?;
    if host.is_empty() || host.contains(['/', '@', '?', '#', ' ']) {
        return Err("between // and the port there is a name or an address, IPv6 in brackets");
    }
    port.parse::<u16>().map(drop).map_err(|_| "it ends with a port, which is 2379 usually")
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
    let path = |path: Option<&PathBuf>| path.map_or_else(|| "none".to_owned(), |it| it.display().to_string());
    let of = |text: fn(&Fleet) -> String| fleet.map_or_else(|| "none".to_owned(), text);
    let identity = fleet.and_then(|it| it.identity.as_ref());
    let user = fleet.and_then(|it| it.user.as_ref());
    vec![
        of(|it| it.etcd.join(", ")),
        of(|it| it.ring.to_string()),
        of(|it| it.node.to_string()),
        of(|it| it.prefix.clone()),
        path(fleet.and_then(|it| it.ca.as_ref())),
        path(identity.map(|(certificate, _)| certificate)),
        path(identity.map(|(_, key)| key)),
        user.map_or_else(|| "none".to_owned(), |(user, _)| user.clone()),
        path(user.map(|(_, file)| file)),
        path(fleet.and_then(|it| it.public_key.as_ref())),
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
        assert_eq!((fleet.ring.as_str(), fleet.prefix.as_str(), fleet.etcd.len()), ("main", "/anyport/", 2));
        assert_eq!(fleet.node.as_str(), nix::unistd::gethostname().unwrap().to_str().unwrap());
        assert!(parse("").unwrap().fleet.is_none());
    }

    #[test]
    fn says_where_and_what() {
        let plain = "[fleet]\nring = \"main\"\netcd = [\"http://192.0.2.1:2379\"]\n";
        for (text, wanted) in [
            ("[fleet]\nring = \"main\"".to_owned(), ["line 1", "etcd"]),
            ("[fleet]\netcd = []\nring = \"main\"".to_owned(), ["line 2, column 8", "no member"]),
            ("[fleet]\nring = \"a b\"".to_owned(), ["line 2", "name \"a b\""]),
            ("[fleet]\nring = \"main\"\netcd = [\"192.0.2.1:2379\"]".to_owned(), ["line 3, column 9", "https://"]),
            ("[fleet]\nring = \"main\"\netcd = [\"http://etcd\"]".to_owned(), ["line 3, column 9", "2379"]),
            ("[fleet]\nring = \"main\"\netcd = [\"http://a/b:1\"]".to_owned(), ["line 3, column 9", "brackets"]),
            (format!("{plain}colour = 1"), ["line 4, column 1", "colour"]),
            (format!("{plain}node = \"\""), ["line 4", "name"]),
            (format!("{plain}prefix = \"x\""), ["line 4, column 10", "slash"]),
            (format!("{plain}ca = \"/dev/null\""), ["line 4, column 6", "https://"]),
            (format!("{plain}max-removal = 101"), ["line 4, column 15", "percentage"]),
            (format!("{plain}max-removal = 0"), ["line 4", "nonzero"]),
            (format!("{plain}user = \"u\""), ["line 1, column 1", "password-file"]),
            (format!("{plain}user = \"u\"\npassword-file = \"/none\""), ["line 5, column 17", "read /none"]),
            (format!("{plain}public-key = \"/none\""), ["line 4, column 14", "read /none"]),
            (format!("{plain}public-key = \"/dev/null\""), ["line 4, column 14", "openssl pkey -pubout"]),
            (
                "[fleet]\nring = \"main\"\netcd = [\"https://a:1\"]\nkey = \"/dev/null\"".to_owned(),
                ["line 1, column 1", "certificate and key"],
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
