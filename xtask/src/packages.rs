//! Debian and RPM packages, out of one tree of files.

use std::{
    env::consts::ARCH,
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

const VERSION: &str = env!("CARGO_PKG_VERSION");
const SUMMARY: &str = "one Linux socket that answers for every address and port of whole prefixes";
/// Programs link the C library, whose version they need that was there when they were built.
const DEBIAN_DEPENDS: &str = "libc6, libgcc-s1, systemd, iproute2";
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// Where a file of `dist` or of the workspace goes.
const FILES: [(&str, &str); 5] = [
    ("xtask/packaging/anyport.service", "usr/lib/systemd/system/anyport.service"),
    ("xtask/packaging/anyport.socket", "usr/lib/systemd/system/anyport.socket"),
    ("xtask/packaging/anyport.sysusers", "usr/lib/sysusers.d/anyport.conf"),
    ("xtask/packaging/anyport.tmpfiles", "usr/lib/tmpfiles.d/anyport.conf"),
    ("LICENSE", "usr/share/doc/anyport/copyright"),
];
/// Where documents go, laid out as in the repository, so that links between them lead to the same places.
const DOCUMENTS: &str = "usr/share/doc/anyport";
const COMPLETIONS: [(&str, &str, &str); 3] = [
    ("", ".bash", "usr/share/bash-completion/completions"),
    ("_", "", "usr/share/zsh/vendor-completions"),
    ("", ".fish", "usr/share/fish/vendor_completions.d"),
];
const PROGRAMS: [&str; 2] = ["anyportd", "anyportctl"];

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
        println!("{}", rpm(dist, &tree, effort)?.display());
    }
    host::recommend(&[DPKG_DEB, RPMBUILD]);
    fs::remove_dir_all(&tree).context("remove the tree of files")
}

/// Has `dpkg-deb` and `rpm` say what is in the packages of `dist`.
pub(crate) fn check(root: &Path, dist: &Path) -> Result<()> {
    let mut expected: Vec<String> = FILES.map(|(_, to)| to.to_owned()).to_vec();
    expected.extend(documents(root)?.into_iter().map(|(_, to)| format!("{DOCUMENTS}/{to}")));
    expected.push(format!("{DOCUMENTS}/{}", licences::NOTICES));
    expected.extend(PROGRAMS.map(|program| format!("usr/bin/{program}")));
    expected.extend(["usr/share/man/man8/anyportctl-add-prefix.8.gz", "etc/anyport"].map(ToOwned::to_owned));
    for (extension, list) in [("deb", ["dpkg-deb", "--contents"]), ("rpm", ["rpm", "-qlp"])] {
        let packages = fs::read_dir(dist)?.flatten().map(|entry| entry.path());
        let package = packages.into_iter().find(|path| path.extension() == Some(OsStr::new(extension)));
        let package = package.with_context(|| format!("find the package of the kind {extension}"))?;
        let listed = stdout(Command::new(list[0]).arg(list[1]).arg(&package))?;
        for file in &expected {
            ensure!(listed.contains(&format!("/{file}")), "{} lacks {file}:\n{listed}", package.display());
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

fn lay_out(root: &Path, dist: &Path, programs: &Programs, tree: &Path) -> Result<()> {
    let put = |from: &Path, to: &str, mode: u32| {
        let attempt = || format!("put {} at {to}", from.display());
        let to = tree.join(to);
        fs::create_dir_all(to.parent().unwrap_or(tree)).with_context(attempt)?;
        fs::copy(from, &to).with_context(attempt)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(mode)).with_context(attempt)
    };
    for program in PROGRAMS {
        put(&programs.directory.join(program), &format!("usr/bin/{program}"), 0o755)?;
        for (prefix, suffix, directory) in COMPLETIONS {
            let file = format!("{prefix}{program}{suffix}");
            // bash finds them by the name of the command alone.
            let name = file.strip_suffix(".bash").unwrap_or(&file);
            put(&dist.join("completions").join(&file), &format!("{directory}/{name}"), 0o644)?;
        }
    }
    for (from, to) in FILES {
        put(&root.join(from), to, 0o644)?;
    }
    for (from, to) in documents(root)? {
        put(&root.join(from), &format!("{DOCUMENTS}/{to}"), 0o644)?;
    }
    put(&dist.join(licences::NOTICES), &format!("{DOCUMENTS}/{}", licences::NOTICES), 0o644)?;
    let pages = dist.join("man8");
    for entry in fs::read_dir(&pages).with_context(|| format!("list {}", pages.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.extension().is_some_and(|it| it == "8") {
            put(&path, &format!("usr/share/man/man8/{name}"), 0o644)?;
        }
    }
    fs::create_dir_all(tree.join("etc/anyport")).context("make etc/anyport")?;
    let pages = fs::read_dir(tree.join("usr/share/man/man8"))?.flatten().map(|entry| entry.path());
    exec(Command::new("gzip").args(["-9", "--no-name"]).args(pages))
}

fn debian(root: &Path, dist: &Path, tree: &Path, effort: Effort) -> Result<PathBuf> {
    let architecture = match ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let control = tree.join("DEBIAN");
    fs::create_dir_all(&control)?;
    let fields = format!(
        "Package: anyport\nVersion: {VERSION}\nArchitecture: {architecture}\nMaintainer: anyport\nSection: net\n\
         Priority: optional\nDepends: {DEBIAN_DEPENDS}\nSuggests: iptables, ipset, bpftool\nDescription: {SUMMARY}\n \
         anyportd lets one transparent socket accept for each address and each port of whole prefixes, by eBPF or TPROXY.\n"
    );
    fs::write(control.join("control"), fields)?;
    for script in SCRIPTS {
        let to = control.join(script);
        fs::copy(root.join("xtask/packaging/debian").join(script), &to)?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
    }
    let package = dist.join(format!("anyport_{VERSION}_{architecture}.deb"));
    let mut build = Command::new("dpkg-deb");
    if effort == Effort::Least {
        build.args(["-Zgzip", "-z1"]);
    }
    exec(build.args(["--root-owner-group", "--build"]).args([tree, &package]))?;
    fs::remove_dir_all(control)?;
    Ok(package)
}

fn rpm(dist: &Path, tree: &Path, effort: Effort) -> Result<PathBuf> {
    let spec = dist.join("anyport.spec");
    let text = format!(
        "Name: anyport\nVersion: {VERSION}\nRelease: 1\nSummary: {SUMMARY}\nLicense: MIT\nRequires: systemd, iproute\n\
         %global debug_package %{{nil}}\n%global __os_install_post %{{nil}}\n%global _build_id_links none\n\
         %description\nanyportd lets one transparent socket accept for each address and each port of whole prefixes, by eBPF or TPROXY.\n\
         %install\ncp -a {}/. %{{buildroot}}\n\
         %post\nsystemd-sysusers anyport.conf || :\n\
         [ -d /run/systemd/system ] && {{ systemd-tmpfiles --create anyport.conf; systemctl daemon-reload; }} || :\n\
         %preun\n[ $1 = 0 ] && systemctl disable --now anyport.service || :\n\
         %postun\n[ $1 = 0 ] || systemctl try-restart anyport.service || :\n\
         %files\n/usr/bin/*\n/usr/lib/systemd/system/*\n/usr/lib/sysusers.d/*\n/usr/lib/tmpfiles.d/*\n/usr/share/man/man8/*\n\
         /usr/share/bash-completion/completions/*\n/usr/share/zsh/vendor-completions/*\n/usr/share/fish/vendor_completions.d/*\n\
         %doc /usr/share/doc/anyport\n%dir /etc/anyport\n",
        tree.display()
    );
    fs::write(&spec, text)?;
    let place = |name: &str, value: &Path| format!("{name} {}", value.display());
    let mut build = Command::new("rpmbuild");
    build.args(["-bb", "--quiet", "--define", &place("_topdir", &dist.join("rpmbuild"))]);
    build.args(["--define", &place("_rpmdir", dist), "--define", "_rpmfilename anyport-%{VERSION}.%{ARCH}.rpm"]);
    if effort == Effort::Least {
        build.args(["--define", "_binary_payload w1.gzdio"]);
    }
    exec(build.arg(&spec))?;
    fs::remove_file(&spec)?;
    fs::remove_dir_all(dist.join("rpmbuild")).ok();
    Ok(dist.join(format!("anyport-{VERSION}.{ARCH}.rpm")))
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
