//! The fingerprint of what the BPF object in the repository was built from.
//!
//! `cargo xtask build-ebpf` records it and the daemon's build script compares it; this file is a module of both.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

/// The object that the daemon embeds.
pub(crate) const OBJECT: &str = "anyport-ebpf/prebuilt/anyport.o";
/// The fingerprint of the sources that [`OBJECT`] was built from.
pub(crate) const RECORD: &str = "anyport-ebpf/prebuilt/sources.sha256";
/// Files and directories that determine the object.
pub(crate) const SOURCES: [&str; 4] =
    ["anyport-common/Cargo.toml", "anyport-common/src", "anyport-ebpf/Cargo.toml", "anyport-ebpf/src"];
/// Of this, only what the object is linked from counts.
pub(crate) const LOCK: &str = "Cargo.lock";

const CRATES: [&str; 2] = ["anyport-common", "anyport-ebpf"];

/// The fingerprint of the sources as they are now.
pub(crate) fn of(root: &Path) -> Result<String, String> {
    let mut hash = Sha256::new();
    let mut files = BTreeSet::new();
    for source in SOURCES {
        collect(root, Path::new(source), &mut files)?;
    }
    for file in files {
        let content = read(&root.join(&file))?;
        hash.update(format!("{} {}\n", file.display(), content.len()));
        hash.update(content);
    }
    let mut manifests = Vec::new();
    for name in CRATES {
        manifests.push((name, text(&root.join(name).join("Cargo.toml"))?));
    }
    for package in locked_dependencies(&manifests, &text(&root.join(LOCK))?)? {
        hash.update(format!("{package}\n"));
    }
    Ok(format!("{:x}", hash.finalize()))
}

fn collect(root: &Path, path: &Path, files: &mut BTreeSet<PathBuf>) -> Result<(), String> {
    let absolute = root.join(path);
    if absolute.is_dir() {
        let entries = fs::read_dir(&absolute).map_err(|error| at(&absolute, &error))?;
        for entry in entries {
            let entry = entry.map_err(|error| at(&absolute, &error))?;
            collect(root, &path.join(entry.file_name()), files)?;
        }
    } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "toml") {
        files.insert(path.to_owned());
    }
    Ok(())
}

/// Name, version and checksum of every registry package below the crates' `[dependencies]`, which are read from
/// the manifests since the lock file does not tell them from the `[dev-dependencies]`.
fn locked_dependencies(manifests: &[(&str, String)], lock: &str) -> Result<BTreeSet<String>, String> {
    let packages: Vec<&str> = lock.split("[[package]]").skip(1).collect();
    let find = |reference: &str| {
        let mut words = reference.split(' ');
        let (name, version) = (words.next(), words.next());
        packages
            .iter()
            .find(|package| {
                field(package, "name") == name && (version.is_none() || field(package, "version") == version)
            })
            .ok_or_else(|| format!("{LOCK} has no package `{reference}`"))
    };

    let mut found = BTreeSet::new();
    let mut pending = Vec::new();
    for (name, manifest) in manifests {
        let direct: Vec<&str> = section_keys(manifest, "[dependencies]").collect();
        let dependencies = dependencies_of(find(name)?);
        pending.extend(
            dependencies.filter(|reference| reference.split(' ').next().is_some_and(|name| direct.contains(&name))),
        );
    }
    while let Some(reference) = pending.pop() {
        let package = find(reference)?;
        // Without a checksum it is a crate of this workspace, whose sources are hashed themselves.
        if let Some(checksum) = field(package, "checksum") {
            let name = field(package, "name").unwrap_or_default();
            let version = field(package, "version").unwrap_or_default();
            if found.insert(format!("{name} {version} {checksum}")) {
                pending.extend(dependencies_of(package));
            }
        }
    }
    Ok(found)
}

/// The value of `key = "value"` in a package of the lock file.
fn field<'lock>(package: &'lock str, key: &str) -> Option<&'lock str> {
    package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"'))
}

fn dependencies_of(package: &str) -> impl Iterator<Item = &str> {
    package
        .lines()
        .skip_while(|line| *line != "dependencies = [")
        .skip(1)
        .take_while(|line| *line != "]")
        .map(|line| line.trim_matches([' ', '"', ',']))
}

fn section_keys<'toml>(manifest: &'toml str, section: &str) -> impl Iterator<Item = &'toml str> {
    manifest
        .lines()
        .skip_while(move |line| *line != section)
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split(['.', ' ', '=']).next())
        .filter(|key| !key.is_empty())
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| at(path, &error))
}

fn text(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| at(path, &error))
}

fn at(path: &Path, error: &std::io::Error) -> String {
    format!("cannot read {}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::locked_dependencies;

    const LOCK: &str = r#"
[[package]]
name = "ours"
version = "0.1.0"
dependencies = [
 "only-for-tests",
 "wanted 2.0.0",
]

[[package]]
name = "only-for-tests"
version = "1.0.0"
checksum = "aa"

[[package]]
name = "wanted"
version = "1.0.0"
checksum = "bb"

[[package]]
name = "wanted"
version = "2.0.0"
checksum = "cc"
dependencies = [
 "deeper",
]

[[package]]
name = "deeper"
version = "3.0.0"
checksum = "dd"
"#;

    #[test]
    fn follows_ordinary_dependencies_in_their_locked_versions() {
        let manifest = "[dependencies]\nwanted.workspace = true\n\n[dev-dependencies]\nonly-for-tests = \"1\"\n";
        let found = locked_dependencies(&[("ours", manifest.to_owned())], LOCK).expect("a lock file");
        assert_eq!(Vec::from_iter(found), ["deeper 3.0.0 dd", "wanted 2.0.0 cc"]);
    }

    #[test]
    fn a_package_that_is_not_locked_is_named() {
        let error = locked_dependencies(&[("theirs", String::new())], LOCK).expect_err("not locked");
        assert_eq!(error, "Cargo.lock has no package `theirs`");
    }
}
