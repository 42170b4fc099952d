//! Debian and RPM packages, out of one tree of files.

use std::{
    env::{self, consts::ARCH},
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    documents,
    host::{self, DPKG_DEB, RPMBUILD},
    licences,
    process::{exec, stdout},
    programs::Programs,
};

pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
pub(crate) const SUMMARY: &str = "One Linux socket that answers for every address and port of whole prefixes";
/// Programs link the C library, whose version they need that was there when they were built.
const DEBIAN_DEPENDS: &str = "libc6, libgcc-s1, systemd, iproute2";
const DEBIAN: &str = "xtask/packaging/debian";
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// Where a file of `dist` or of the workspace goes.
const FILES: [(&str, &str); 5] = [
    ("xtask/packaging/anyport.service", "usr/lib/systemd/system/anyport.service"),
    ("xtask/packaging/anyport.socket", "usr/lib/systemd/system/anyport.socket"),
    ("xtask/packaging/anyport.sysusers", "usr/lib/sysusers.d/anyport.conf"),
    ("xtask/packaging/anyport.tmpfiles", "usr/lib/tmpfiles.d/anyport.conf"),
    ("LICENSE", COPYRIGHT),
];
const COPYRIGHT: &str = "usr/share/doc/anyport/copyright";
/// Where documents go, laid out as in the repository, so that links between them lead to the same places.
const DOCUMENTS: &str = "usr/share/doc/anyport";
const COMPLETIONS: [(&str, &str, &str); 3] = [
    ("", ".bash", "usr/share/bash-completion/completions"),
    ("_", "", "usr/share/zsh/vendor-completions"),
    ("", ".fish", "usr/share/fish/vendor_completions.d"),
];
/// Sections of the manual, as directories.
const SECTIONS: [&str; 2] = ["man5", "man8"];
pub(crate) const PROGRAMS: [&str; 2] = ["anyportd", "anyportctl"];

/// How much time is spent on making packages small.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// As much as it takes.
    Full,
    /// Next to none: they are only looked at.
    Least,
}

/// Makes the packages whose tools this host has in `dist`, which has the manual pages and completions already.
pub(crate) fn build(root: &Path, dist: &Path, programs: &Programs, effort: Effort) -> Result<()> {
    let tree = dist.join("tree");
    lay_out(root, dist, programs, &tree)?;
    if host::missing(&[DPKG_DEB]).is_empty() {
        println!("{}", debian(root, dist, &tree, effort)?.display());
    }
    if host::missing(&[RPMBUILD]).is_empty() {
        println!("{}", rpm(root, dist, &tree, effort)?.display());
    }
    host::recommend(&[DPKG_DEB, RPMBUILD]);
    fs::remove_dir_all(&tree).context("remove the tree of files")
}

/// Has `dpkg-deb` and `rpm` say what is in the packages of `dist`, and `lintian` and `rpmlint` what is wrong with them,
/// where these are.
pub(crate) fn check(root: &Path, dist: &Path) -> Result<()> {
    let mut expected: Vec<String> = FILES.map(|(_, to)| to.to_owned()).to_vec();
    expected.extend(documents(root)?.into_iter().map(|(_, to)| format!("{DOCUMENTS}/{to}")));
    expected.push(format!("{DOCUMENTS}/{}", licences::NOTICES));
    expected.extend(PROGRAMS.map(|program| format!("usr/bin/{program}")));
    let pages = ["man5/anyport.toml.5.gz", "man5/anyport-rules.5.gz", "man8/anyportctl-add-prefix.8.gz"];
    expected.extend(pages.map(|page| format!("usr/share/man/{page}")));
    expected.push("etc/anyport".to_owned());
    for (extension, list) in [("deb", ["dpkg-deb", "--contents"]), ("rpm", ["rpm", "-qlp"])] {
        let packages = fs::read_dir(dist)?.flatten().map(|entry| entry.path());
        let package = packages.into_iter().find(|path| path.extension() == Some(OsStr::new(extension)));
        let package = package.with_context(|| format!("find the package of the kind {extension}"))?;
        let listed = stdout(Command::new(list[0]).arg(list[1]).arg(&package))?;
        for file in &expected {
            ensure!(listed.contains(&format!("/{file}")), "{} lacks {file}:\n{listed}", package.display());
        }
        let (tool, options) = match extension {
            "deb" => (host::LINTIAN, ["--no-cfg", "--fail-on=error,warning"]),
            _ => (host::RPMLINT, ["--config", "xtask/packaging/rpmlint.toml"]),
        };
        if host::missing(&[tool]).is_empty() {
            exec(Command::new(tool.program).current_dir(root).args(options).arg(&package))?;
        }
    }
    Ok(())
}

/// Each document of the packages: its path in the repository and its path below [`DOCUMENTS`].
pub(crate) fn documents(root: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    documents::collect(root, Path::new("docs"), &mut files)?;
    files.extend(documents::TOP.map(PathBuf::from));
    Ok(files.into_iter().map(|path| (path.clone(), path.display().to_string())).collect())
}

/// Copies a file, into a directory that is made if need be.
pub(crate) fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let attempt = || format!("copy {} to {}", from.display(), to.display());
    fs::create_dir_all(to.parent().unwrap_or(to)).with_context(attempt)?;
    fs::copy(from, to).with_context(attempt)?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).with_context(attempt)
}

/// Copies a program, without what debuggers alone need.
pub(crate) fn put_program(from: &Path, to: &Path) -> Result<()> {
    put(from, to, 0o755)?;
    exec(Command::new("strip").arg("--strip-unneeded").arg(to))
}

fn lay_out(root: &Path, dist: &Path, programs: &Programs, tree: &Path) -> Result<()> {
    let put = |from: &Path, to: &str| put(from, &tree.join(to), 0o644);
    for program in PROGRAMS {
        put_program(&programs.directory.join(program), &tree.join("usr/bin").join(program))?;
        for (prefix, suffix, directory) in COMPLETIONS {
            let file = format!("{prefix}{program}{suffix}");
            // bash finds them by the name of the command alone.
            let name = file.strip_suffix(".bash").unwrap_or(&file);
            put(&dist.join("completions").join(&file), &format!("{directory}/{name}"))?;
        }
    }
    for (from, to) in FILES {
        put(&root.join(from), to)?;
    }
    for (from, to) in documents(root)? {
        put(&root.join(from), &format!("{DOCUMENTS}/{to}"))?;
    }
    put(&dist.join(licences::NOTICES), &format!("{DOCUMENTS}/{}", licences::NOTICES))?;
    let mut gzip = Command::new("gzip");
    gzip.args(["-9", "--no-name"]);
    for section in SECTIONS {
        let pages = dist.join(section);
        for entry in fs::read_dir(&pages).with_context(|| format!("list {}", pages.display()))? {
            let path = entry?.path();
            let to = format!("usr/share/man/{section}/{}", path.file_name().unwrap_or_default().to_string_lossy());
            put(&path, &to)?;
            gzip.arg(tree.join(to));
        }
    }
    fs::create_dir_all(tree.join("etc/anyport")).context("make etc/anyport")?;
    exec(&mut gzip)
}

/// Who answers for the packages: those who have made the programs, unless who builds them for others says who he is, as he does
/// to Debian's own tools (debchange(1)).
fn maintainer() -> String {
    match (env::var("DEBFULLNAME"), env::var("DEBEMAIL")) {
        (Ok(name), Ok(address)) => format!("{name} <{address}>"),
        _ => env!("CARGO_PKG_AUTHORS").to_owned(),
    }
}

/// What Debian and container images call the architecture of this host.
pub(crate) fn architecture() -> &'static str {
    match ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn debian(root: &Path, dist: &Path, tree: &Path, effort: Effort) -> Result<PathBuf> {
    let architecture = architecture();
    let own = add_debian_files(root, tree)?;
    let size = stdout(Command::new("du").args(["--summarize", "--apparent-size", "--block-size=1K"]).arg(tree))?;
    let size = size.split_whitespace().next().unwrap_or_default();
    let control = tree.join("DEBIAN");
    fs::create_dir_all(&control)?;
    let maintainer = maintainer();
    let fields = format!(
        "Package: anyport\nVersion: {VERSION}\nArchitecture: {architecture}\nMaintainer: {maintainer}\nSection: net\n\
         Priority: optional\nInstalled-Size: {size}\nDepends: {DEBIAN_DEPENDS}\nSuggests: iptables, ipset, bpftool\n\
         Description: {SUMMARY}\n \
         anyportd lets one transparent socket accept for each address and each port of\n whole prefixes, by eBPF or TPROXY.\n"
    );
    fs::write(control.join("control"), fields)?;
    for script in SCRIPTS {
        let to = control.join(script);
        fs::copy(root.join(DEBIAN).join(script), &to)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
    }
    let package = dist.join(format!("anyport_{VERSION}_{architecture}.deb"));
    let mut build = Command::new("dpkg-deb");
    if effort == Effort::Least {
        build.args(["-Zgzip", "-z1"]);
    }
    exec(build.args(["--root-owner-group", "--build"]).args([tree, &package]))?;
    fs::remove_dir_all(control)?;
    for file in own {
        fs::remove_file(file)?;
    }
    fs::copy(root.join("LICENSE"), tree.join(COPYRIGHT))?;
    Ok(package)
}

/// What Debian's packages alone have in their tree, for as long as they are built. Debian's policy has licences refer to
/// the texts that each Debian has.
fn add_debian_files(root: &Path, tree: &Path) -> Result<[PathBuf; 2]> {
    let changelog = tree.join(DOCUMENTS).join("changelog");
    let date = date_of_last_change(root, "--rfc-email")?;
    let by = maintainer();
    let text = format!("anyport ({VERSION}) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- {by}  {date}\n");
    fs::write(&changelog, text).context("write the changelog")?;
    exec(Command::new("gzip").args(["-9", "--no-name"]).arg(&changelog))?;
    let licence = fs::read_to_string(root.join("LICENSE")).context("read LICENSE")?;
    let text =
        format!("{licence}\nThe GNU General Public License, version 2, is in /usr/share/common-licenses/GPL-2.\n");
    fs::write(tree.join(COPYRIGHT), text).context("write the licence")?;
    let overrides = tree.join("usr/share/lintian/overrides/anyport");
    fs::create_dir_all(overrides.parent().unwrap_or(tree))?;
    fs::copy(root.join(DEBIAN).join("lintian-overrides"), &overrides).context("copy the overrides")?;
    Ok([changelog.with_extension("gz"), overrides])
}

/// The latest date in CHANGELOG.md, as `date` writes it by this option: the same sources make the same package.
pub(crate) fn date_of_last_change(root: &Path, format: &str) -> Result<String> {
    let text = fs::read_to_string(root.join("CHANGELOG.md")).context("read CHANGELOG.md")?;
    let is_date = |word: &&str| word.len() == "2026-11-30".len() && word.matches('-').count() == 2;
    let dates = text.split(|it: char| !it.is_ascii_digit() && it != '-').filter(is_date);
    let last = dates.max().context("find a date in CHANGELOG.md")?;
    let written = stdout(Command::new("date").env("LC_ALL", "C").args(["--utc", format, "--date", last]))?;
    Ok(written.trim().to_owned())
}

fn rpm(root: &Path, dist: &Path, tree: &Path, effort: Effort) -> Result<PathBuf> {
    let mut text = fs::read_to_string(root.join("xtask/packaging/anyport.spec")).context("read the spec file")?;
    let date = date_of_last_change(root, "+%a %b %d %Y")?;
    let tree = tree.display().to_string();
    for (name, value) in [
        ("@VERSION@", VERSION),
        ("@MAINTAINER@", &maintainer()),
        ("@SUMMARY@", SUMMARY),
        ("@DATE@", &date),
        ("@TREE@", &tree),
    ] {
        text = text.replace(name, value);
    }
    let spec = dist.join("anyport.spec");
    fs::write(&spec, text)?;
    let place = |name: &str, value: &Path| format!("{name} {}", value.display());
    let mut build = Command::new("rpmbuild");
    build.args(["-bb", "--quiet", "--define", &place("_topdir", &dist.join("rpmbuild"))]);
    build.args(["--define", &place("_rpmdir", dist)]);
    build.args(["--define", "_rpmfilename %{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm"]);
    if effort == Effort::Least {
        build.args(["--define", "_binary_payload w1.gzdio"]);
    }
    exec(build.arg(&spec))?;
    fs::remove_file(&spec)?;
    fs::remove_dir_all(dist.join("rpmbuild")).ok();
    Ok(dist.join(format!("anyport-{VERSION}-1.{ARCH}.rpm")))
}

/// The most that `systemd-analyze security` may find exposed, in tenths.
const EXPOSURE: &str = "--threshold=20";

/// Has systemd judge the unit as it is shipped, with the daemon from where it was built.
pub(crate) fn check_unit(root: &Path, programs: &Programs, scratch: &Path) -> Result<()> {
    let shipped = root.join("xtask/packaging/anyport.service");
    exec(Command::new("systemd-analyze").args(["security", "--no-pager", "--offline=true", EXPOSURE]).arg(&shipped))?;
    let text = fs::read_to_string(&shipped).context("read the unit")?;
    let unit = scratch.join("anyport.service");
    let text = text.replace("=/usr/bin/anyportd", &format!("={}", programs.daemon().display()));
    let text = text.replace("=/usr/bin/anyportctl", &format!("={}", programs.client().display()));
    fs::create_dir_all(scratch)?;
    fs::write(&unit, text)?;
    let socket = scratch.join("anyport.socket");
    fs::copy(root.join("xtask/packaging/anyport.socket"), &socket).context("copy the socket unit")?;
    exec(Command::new("systemd-analyze").args(["verify", "--man=no"]).args([unit, socket]))
}
