//! Packages of other Debian suites, by an apt directory of its own: the machine's sources and state stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{exec, stdout};

/// The keys of all suites, where Debian's package of keys puts them.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One suite of Debian, with fresh lists.
pub(crate) struct Suite {
    /// `bookworm`, `sid`.
    pub(crate) name: String,
    directory: PathBuf,
}

impl Suite {
    /// Fetches the lists of a suite, from the first of the machine's mirrors that has it.
    pub(crate) fn open(apt: &Path, name: &str) -> Result<Self> {
        let suite = Self { name: name.to_owned(), directory: apt.join(name) };
        for directory in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(suite.directory.join(directory))?;
        }
        let mut failures = Vec::new();
        for mirror in mirrors(name)? {
            fs::write(suite.sources(), format!("deb [signed-by={KEYS}] {mirror} {name} main\n"))?;
            match exec(suite.apt("apt-get").args(["--quiet=2", "--error-on=any", "update"])) {
                Ok(()) => return Ok(suite),
                Err(error) => failures.push(format!("{mirror}: {error:#}")),
            }
        }
        bail!(
            "no mirror of this machine has Debian's suite {name}; add one that has it to apt's sources\n  {}",
            failures.join("\n  ")
        )
    }

    /// The names of the packages that begin so.
    pub(crate) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = stdout(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// What a package depends on. Alternatives are separate entries; what the suite lacks is in angle brackets.
    pub(crate) fn depends(&self, package: &str) -> Result<Vec<String>> {
        let shown = stdout(self.apt("apt-cache").args(["depends", "--important", package]))?;
        Ok(shown.lines().filter_map(|line| line.split_once("Depends: ")).map(|(_, name)| name.to_owned()).collect())
    }

    /// Downloads packages and unpacks them into a directory.
    pub(crate) fn unpack(&self, packages: &[String], directory: &Path) -> Result<()> {
        let archives = self.directory.join("archives");
        drop(fs::remove_dir_all(&archives));
        fs::create_dir_all(&archives)?;
        exec(self.apt("apt-get").current_dir(&archives).args(["--quiet=2", "download"]).args(packages))
            .with_context(|| format!("download {} of {}", packages.join(" "), self.name))?;
        for archive in fs::read_dir(&archives)? {
            exec(Command::new("dpkg-deb").arg("--extract").arg(archive?.path()).arg(directory))?;
        }
        fs::remove_dir_all(&archives).context("remove what was downloaded")
    }

    fn sources(&self) -> PathBuf {
        self.directory.join("sources.list")
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (name, value) in [
            ("Dir::Etc::SourceList", self.sources()),
            ("Dir::Etc::SourceParts", "/dev/null".into()),
            ("Dir::State::Lists", self.directory.join("lists")),
            ("Dir::State::Status", "/dev/null".into()),
            ("Dir::Cache", self.directory.join("cache")),
            ("APT::Architecture", "amd64".into()),
            ("APT::Sandbox::User", "root".into()),
            // The lists of a suite that gets no more updates do not expire.
            ("Acquire::Check-Valid-Until", "false".into()),
        ] {
            command.arg("--option").arg(format!("{name}={}", value.display()));
        }
        command
    }
}

/// The suite of this machine, as `/etc/os-release` names it.
pub(crate) fn own_suite() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.map(|value| value.trim_matches('"').to_owned())
    };
    ensure!(
        value("ID").as_deref() == Some("debian"),
        "kernels are tested with Debian's packages and images: run this on Debian, or in a root file system of it"
    );
    value("VERSION_CODENAME").context("/etc/os-release has no VERSION_CODENAME: is this Debian's sid? Use a release")
}

/// Where packages of a suite may be: at a source of it, else where this machine's own suite is from.
pub(crate) fn mirrors(suite: &str) -> Result<Vec<String>> {
    let targets = stdout(Command::new("apt-get").args([
        "indextargets",
        // As configured, whether or not the lists are there.
        "--no-release-info",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
    ]))?;
    let mirrors = mirrors_among(&targets, suite, &own_suite()?);
    ensure!(!mirrors.is_empty(), "apt has no source of this machine's own suite: {targets:?}");
    Ok(mirrors)
}

fn mirrors_among(targets: &str, suite: &str, own: &str) -> Vec<String> {
    let of = |wanted: &str| {
        let all = targets.lines().filter_map(|line| line.split_once(' '));
        all.filter(|(_, release)| *release == wanted).map(|(uri, _)| uri.to_owned()).collect::<Vec<_>>()
    };
    let mut mirrors = [of(suite), of(own)].concat();
    // Mirrors keep suites that have ended beside the others.
    let archives = mirrors.iter().filter_map(|uri| uri.trim_end_matches('/').strip_suffix("/debian"));
    let archives: Vec<String> = archives.map(|base| format!("{base}/debian-archive/debian/")).collect();
    mirrors.extend(archives);
    let mut seen = std::collections::HashSet::new();
    mirrors.retain(|uri| seen.insert(uri.clone()));
    mirrors
}

#[cfg(test)]
mod tests {
    use super::mirrors_among;

    #[test]
    fn prefers_a_source_of_the_suite_and_takes_that_of_the_machines_own_else() {
        let targets = "http://a.example/debian/ bookworm\nhttp://a.example/security/ bookworm-security\n\
                       http://b.example/old/ bullseye\nhttp://a.example/debian/ bookworm\n";
        let found = |suite| mirrors_among(targets, suite, "bookworm");
        assert_eq!(
            found("bullseye"),
            ["http://b.example/old/", "http://a.example/debian/", "http://a.example/debian-archive/debian/"]
        );
        assert_eq!(found("sid"), ["http://a.example/debian/", "http://a.example/debian-archive/debian/"]);
    }
}
