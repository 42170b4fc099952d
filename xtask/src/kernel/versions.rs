//! Which kernels there are, by name, and which packages have them.

use std::path::Path;

use anyhow::{Result, bail};

use super::apt::Suite;

/// What `all` stands for.
pub(crate) const ALL: [&str; 4] = ["5.10", "6.1", "6.12", NEWEST];
/// The newest kernel of Debian's unstable suite.
const NEWEST: &str = "newest";
/// The packages of kernels for virtual machines: small, and with all drivers that QEMU's machine needs.
const FLAVOUR: &str = "-cloud-amd64";

/// A kernel that a suite has.
pub(crate) struct Package {
    /// Where it is from.
    pub(crate) suite: Suite,
    /// The kernel's release, as `uname -r` says it.
    pub(crate) release: String,
    /// The packages to unpack.
    pub(crate) packages: Vec<String>,
}

/// What `--kernel` named, each once.
pub(crate) fn named(names: &[String]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for name in names {
        let meant = if name == "all" { ALL.map(str::to_owned).to_vec() } else { vec![name.clone()] };
        all.extend(meant.into_iter().filter(|name| !all.contains(name)).collect::<Vec<_>>());
    }
    all
}

/// Finds the newest package of a series, `6.1`, or of a release, `6.1.0-50`.
pub(crate) fn find(apt: &Path, name: &str) -> Result<Package> {
    for suite in suites(name) {
        let suite = Suite::open(apt, suite)?;
        let images = suite.names("linux-image-")?;
        let mut versions: Vec<&str> = images
            .iter()
            .filter_map(|image| image.strip_prefix("linux-image-")?.strip_suffix(FLAVOUR))
            .filter(|version| version.starts_with(|first: char| first.is_ascii_digit()) && is_of(version, name))
            .collect();
        versions.sort_by_key(|version| numbers(version));
        for version in versions.into_iter().rev() {
            if let Some(packages) = parts(&suite, version)? {
                return Ok(Package { release: format!("{version}{FLAVOUR}"), packages, suite });
            }
        }
    }
    bail!("no kernel {name} with {FLAVOUR} in its name is in any of Debian's suites {}", suites(name).join(", "))
}

/// The suites to look into, the likeliest first.
fn suites(name: &str) -> &'static [&'static str] {
    match name {
        NEWEST => &["sid"],
        "5.10" => &["bullseye"],
        "6.1" => &["bookworm"],
        "6.12" => &["trixie", "bookworm-backports"],
        _ => &["sid", "trixie-backports", "trixie", "bookworm-backports", "bookworm", "bullseye"],
    }
}

/// Whether a version is of the series of that name, or the version itself.
fn is_of(version: &str, name: &str) -> bool {
    name == NEWEST
        || version.strip_prefix(name).is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit()))
}

/// The numbers of a version, by which versions are compared.
pub(crate) fn numbers(version: &str) -> Vec<u64> {
    version.split(|it: char| !it.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// The packages of a version: later than 6.18 the image only depends on those that have files. Nothing if the suite
/// lacks one, as it does for a version that it is about to drop.
fn parts(suite: &Suite, version: &str) -> Result<Option<Vec<String>>> {
    let image = format!("linux-image-{version}{FLAVOUR}");
    let mut packages = vec![image.clone()];
    for dependency in suite.depends(&image)? {
        let name = dependency.trim_matches(['<', '>']);
        if !name.starts_with("linux-") || !name.ends_with(FLAVOUR) {
            continue;
        }
        if name != dependency {
            return Ok(None);
        }
        packages.push(dependency);
    }
    Ok(Some(packages))
}

#[cfg(test)]
mod tests {
    use super::{is_of, named, numbers};

    #[test]
    fn names_a_series_or_a_version() {
        assert!(is_of("6.1.0-50", "6.1") && is_of("6.1.0-50", "6.1.0-50") && is_of("7.2.13+deb14", "newest"));
        assert!(!is_of("6.12.95+deb12", "6.1") && !is_of("6.1.0-50", "6.1.0-5"));
    }

    #[test]
    fn orders_versions_by_their_numbers() {
        let mut versions = ["6.12.90+deb12.1", "6.12.107+deb13", "6.12.90+deb12", "6.12.9+deb13"];
        versions.sort_by_key(|version| numbers(version));
        assert_eq!(versions, ["6.12.9+deb13", "6.12.90+deb12", "6.12.90+deb12.1", "6.12.107+deb13"]);
    }

    #[test]
    fn takes_each_once() {
        let names = ["6.1", "all", "6.17"].map(str::to_owned);
        assert_eq!(named(&names), ["6.1", "5.10", "6.12", "newest", "6.17"]);
    }
}
