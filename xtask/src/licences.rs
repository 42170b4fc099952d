//! Crates of others: the notices that packages carry, and what `deny.toml` allows where `cargo deny` is not installed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::process;

/// The file of notices in the packages.
pub(crate) const NOTICES: &str = "THIRD-PARTY.txt";
/// What is linked into the programs: the daemon and the client, and the BPF object that the daemon embeds.
const LINKED: [&str; 2] = ["anyport-userspace", "anyport-ebpf"];
const POLICY: &str = "deny.toml";

/// What `cargo metadata` prints.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Clone, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    repository: Option<String>,
    /// Nothing for the crates of this workspace.
    source: Option<String>,
    manifest_path: PathBuf,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Deserialize)]
struct DependencyKind {
    /// `dev` or `build`; nothing for what is linked.
    kind: Option<String>,
}

/// The part of `deny.toml` that is checked here.
#[derive(Deserialize)]
struct Policy {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Bans {
    #[serde(default)]
    skip: Vec<Named>,
    #[serde(default)]
    deny: Vec<Named>,
}

/// A crate, as `name` or `name@version`.
#[derive(Deserialize)]
struct Named {
    #[serde(rename = "crate")]
    name: String,
}

impl Metadata {
    /// Of this target alone, or of all that the lock file has.
    fn read(root: &Path, target: Option<&str>) -> Result<Self> {
        let mut metadata = process::cargo(root, "metadata");
        metadata.args(["--format-version", "1", "--all-features"]);
        if let Some(target) = target {
            metadata.args(["--filter-platform", target]);
        }
        serde_json::from_str(&process::stdout(&mut metadata)?).context("read what cargo metadata prints")
    }

    /// The crates of others that are linked into these crates of the workspace, in order of name.
    fn linked_into(&self, names: &[&str]) -> Vec<&Package> {
        let mut pending: Vec<&str> = Vec::new();
        let ours = |it: &&Package| it.source.is_none() && names.contains(&it.name.as_str());
        pending.extend(self.packages.iter().filter(ours).map(|it| it.id.as_str()));
        let mut found = BTreeSet::new();
        while let Some(id) = pending.pop() {
            if !found.insert(id) {
                continue;
            }
            let node = self.resolve.nodes.iter().filter(|it| it.id == id);
            let linked = node.flat_map(|it| &it.deps).filter(|it| it.dep_kinds.iter().any(|it| it.kind.is_none()));
            pending.extend(linked.map(|it| it.pkg.as_str()));
        }
        let mut packages: Vec<&Package> = self.packages.iter().filter(|it| found.contains(it.id.as_str())).collect();
        packages.retain(|it| it.source.is_some());
        packages.sort_by_key(|it| (&it.name, &it.version));
        packages
    }
}

impl Package {
    /// The texts of its licences, by the names of their files.
    fn licences(&self) -> Result<Vec<String>> {
        let directory = self.manifest_path.parent().context("a manifest is in no directory")?;
        let mut files = Vec::new();
        for entry in fs::read_dir(directory).with_context(|| format!("list the files of {}", self.name))? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().to_uppercase();
            let is_licence = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"]
                .iter()
                .any(|begin| name.starts_with(begin));
            if is_licence && entry.file_type()?.is_file() {
                files.push(entry.path());
            }
        }
        files.sort();
        let texts = files.iter().map(|path| {
            let bytes = fs::read(path).with_context(|| format!("read a licence of {}", self.name))?;
            let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
            Ok(text.trim_matches('\n').to_owned())
        });
        texts.collect()
    }
}

/// The notices for the crates that are linked into the programs: names, versions and licences, and then each text of
/// a licence once, with the crates that it came with.
pub(crate) fn notices(root: &Path) -> Result<String> {
    let metadata = Metadata::read(root, Some(&process::host_target()?))?;
    let mut listed = Vec::new();
    for package in metadata.linked_into(&LINKED) {
        listed.push((package.clone(), package.licences()?));
    }
    ensure!(!listed.is_empty(), "cargo metadata names no crate that is linked into the programs");
    Ok(text_of(&listed))
}

fn text_of(listed: &[(Package, Vec<String>)]) -> String {
    let mut text = String::from(
        "anyportd and anyportctl contain code of the crates below. Each is listed with its version, its licence and\n\
         where it comes from. The texts that came with the crates follow. The standard library of Rust is linked in too:\n\
         MIT OR Apache-2.0, https://github.com/rust-lang/rust.\n\n",
    );
    let mut by_text: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (package, licences) in listed {
        let Package { name, version, license, repository, .. } = package;
        let license = license.as_deref().unwrap_or("see its text");
        let place = repository.as_ref().map_or_else(String::new, |it| format!(", {it}"));
        let note = if licences.is_empty() { "; its text is there, the crate has no file of it" } else { "" };
        let _ = writeln!(text, "{name} {version}: {license}{place}{note}");
        for licence in licences {
            by_text.entry(licence).or_default().push(format!("{name} {version}"));
        }
    }
    for (licence, crates) in by_text {
        let _ = write!(text, "\n{}\nWith {}:\n\n{licence}\n", "-".repeat(100), crates.join(", "));
    }
    text
}

/// Checks the lock file against `deny.toml`: licences, sources, duplicate versions and banned crates.
pub(crate) fn check(root: &Path) -> Result<()> {
    if Command::new("cargo-deny").arg("--version").output().is_ok_and(|output| output.status.success()) {
        let mut deny = Command::new("cargo");
        return process::exec(deny.current_dir(root).args(["deny", "check", "bans", "licenses", "sources"]));
    }
    let text = fs::read_to_string(root.join(POLICY)).with_context(|| format!("read {POLICY}"))?;
    let policy = toml::from_str(&text).with_context(|| format!("read {POLICY}"))?;
    let complaints = complaints(&Metadata::read(root, None)?.packages, &policy);
    ensure!(complaints.is_empty(), "{POLICY} does not allow this:\n  {}", complaints.join("\n  "));
    Ok(())
}

fn complaints(packages: &[Package], policy: &Policy) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let is_named = |list: &[Named], package: &Package| {
        let full = format!("{}@{}", package.name, package.version);
        list.iter().any(|it| it.name == package.name || it.name == full)
    };
    // One registry has all of them: that of the first one.
    let registry = packages.iter().find_map(|it| it.source.as_ref());
    for package in packages {
        let Package { name, version, .. } = package;
        let Some(source) = &package.source else { continue };
        if !source.starts_with("registry+") || Some(source) != registry {
            complaints.push(format!("{name} {version} comes from {source}"));
        }
        let license = package.license.as_deref().unwrap_or_default();
        if !is_allowed(license, &policy.licenses.allow) {
            complaints.push(format!("{name} {version} has the licence `{license}`"));
        }
        if is_named(&policy.bans.deny, package) {
            complaints.push(format!("{name} {version} is banned"));
        }
        if !is_named(&policy.bans.skip, package) {
            versions.entry(name).or_default().push(version);
        }
    }
    let several = versions.into_iter().filter(|(_, versions)| versions.len() > 1);
    complaints.extend(several.map(|(name, versions)| format!("{name} is there as {}", versions.join(" and "))));
    complaints
}

/// Whether an SPDX expression can be met by licences of a list. The older `/` between licences means `OR`.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let result = alternatives(&mut words, allowed);
    result && words.next().is_none()
}

type Tokens<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn alternatives(words: &mut Tokens<'_>, allowed: &[String]) -> bool {
    let mut result = together(words, allowed);
    while words.next_if_eq(&"OR").is_some() {
        result |= together(words, allowed);
    }
    result
}

fn together(words: &mut Tokens<'_>, allowed: &[String]) -> bool {
    let mut result = one(words, allowed);
    while words.next_if_eq(&"AND").is_some() {
        result &= one(words, allowed);
    }
    result
}

fn one(words: &mut Tokens<'_>, allowed: &[String]) -> bool {
    if words.next_if_eq(&"(").is_some() {
        let result = alternatives(words, allowed);
        return words.next() == Some(")") && result;
    }
    let mut name = words.next().unwrap_or_default().to_owned();
    if words.next_if_eq(&"WITH").is_some() {
        let _ = write!(name, " WITH {}", words.next().unwrap_or_default());
    }
    allowed.contains(&name)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::{Metadata, Package, Policy, complaints, is_allowed, text_of};

    fn package(name: &str, version: &str, license: &str) -> Package {
        Package {
            id: format!("{name} {version}"),
            name: name.to_owned(),
            version: version.to_owned(),
            license: Some(license.to_owned()),
            repository: None,
            source: Some("registry+https://registry.example/index".to_owned()),
            manifest_path: PathBuf::from("Cargo.toml"),
        }
    }

    fn policy() -> Policy {
        let text = "[licenses]\nallow = [\"MIT\", \"ISC\"]\n[bans]\nskip = [{ crate = \"old@1.0.0\", reason = \"x\" }]\ndeny = [{ crate = \"bad\" }]\n";
        toml::from_str(text).unwrap()
    }

    #[test]
    fn licences_are_met_as_their_expressions_say() {
        let allowed = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
        for expression in
            ["MIT", "MIT/Apache-2.0", "GPL-2.0 OR MIT", "(GPL-2.0 OR MIT) AND ISC", "Apache-2.0 WITH LLVM-exception"]
        {
            assert!(is_allowed(expression, &allowed), "{expression}");
        }
        for expression in
            ["", "GPL-2.0", "MIT AND GPL-2.0", "(GPL-2.0 OR MIT) AND BSD-3-Clause", "Apache-2.0", "MIT MIT"]
        {
            assert!(!is_allowed(expression, &allowed), "{expression}");
        }
    }

    #[test]
    fn what_the_policy_does_not_allow_is_named() {
        let mut elsewhere = package("elsewhere", "1.0.0", "MIT");
        elsewhere.source = Some("git+https://example.org/".to_owned());
        let packages = [
            package("old", "1.0.0", "MIT"),
            package("old", "2.0.0", "MIT"),
            package("twice", "1.0.0", "MIT"),
            package("twice", "2.0.0", "ISC"),
            package("bad", "1.0.0", "MIT"),
            package("closed", "1.0.0", "GPL-3.0"),
            elsewhere,
        ];
        let expected = [
            "bad 1.0.0 is banned",
            "closed 1.0.0 has the licence `GPL-3.0`",
            "elsewhere 1.0.0 comes from git+https://example.org/",
            "twice is there as 1.0.0 and 2.0.0",
        ];
        assert_eq!(complaints(&packages, &policy()), expected);
        assert!(complaints(&packages[..3], &policy()).is_empty());
    }

    #[test]
    fn notices_have_each_text_once() {
        let listed = [
            (package("a", "1.0.0", "MIT"), vec!["the text".to_owned()]),
            (package("b", "2.0.0", "MIT"), vec!["the text".to_owned()]),
            (package("c", "3.0.0", "ISC"), Vec::new()),
        ];
        let text = text_of(&listed);
        assert_eq!(text.matches("the text").count(), 1, "{text}");
        assert!(text.contains("With a 1.0.0, b 2.0.0:"), "{text}");
        assert!(text.contains("c 3.0.0: ISC; its text is there"), "{text}");
    }

    #[test]
    fn linked_crates_are_those_of_the_programs_alone() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let metadata = Metadata::read(root, Some("x86_64-unknown-linux-gnu")).unwrap();
        let names: Vec<&str> = metadata.linked_into(&super::LINKED).iter().map(|it| it.name.as_str()).collect();
        assert!(["aya", "aya-ebpf", "tokio"].iter().all(|name| names.contains(name)), "{names:?}");
        assert!(!["proptest", "anyport-common", "windows-sys"].iter().any(|name| names.contains(name)), "{names:?}");
    }
}
