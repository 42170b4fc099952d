//! Programs that a host may lack, and the packages that have them.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::process;

/// A program, and the packages that install it.
#[derive(Clone, Copy)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    debian: &'static str,
    fedora: &'static str,
    purpose: &'static str,
}

/// For the C that is part of the programs, when they are checked for 64-bit ARM.
pub(crate) const AARCH64_GCC: Tool = Tool {
    program: "aarch64-linux-gnu-gcc",
    debian: "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    fedora: "gcc-aarch64-linux-gnu",
    purpose: "checking the programs for 64-bit ARM",
};
/// For the `tproxy` back end.
pub(crate) const IPTABLES: Tool =
    Tool { program: "iptables-restore", debian: "iptables", fedora: "iptables-nft", purpose: "the tproxy back end" };
/// For the `tproxy` back end with many prefixes.
pub(crate) const IPSET: Tool =
    Tool { program: "ipset", debian: "ipset", fedora: "ipset", purpose: "many prefixes in the tproxy back end" };
/// To look at the maps.
pub(crate) const BPFTOOL: Tool =
    Tool { program: "bpftool", debian: "bpftool", fedora: "bpftool", purpose: "looking at what the kernel holds" };
/// To look at the routes, and to build the networks of the tests.
pub(crate) const IP: Tool = Tool {
    program: "ip",
    debian: "iproute2",
    fedora: "iproute",
    purpose: "looking at routes, and the networks of tests and demo",
};
/// For Debian packages.
pub(crate) const DPKG_DEB: Tool =
    Tool { program: "dpkg-deb", debian: "dpkg", fedora: "dpkg", purpose: "Debian packages" };
/// For RPM packages.
pub(crate) const RPMBUILD: Tool =
    Tool { program: "rpmbuild", debian: "rpm", fedora: "rpm-build", purpose: "RPM packages" };
/// For the alerts.
pub(crate) const PROMTOOL: Tool = Tool {
    program: "promtool",
    debian: "prometheus",
    fedora: "golang-github-prometheus",
    purpose: "tests of the alerts",
};
/// To judge packages, where they are.
pub(crate) const LINTIAN: Tool =
    Tool { program: "lintian", debian: "lintian", fedora: "lintian", purpose: "judging Debian packages" };
/// The same.
pub(crate) const RPMLINT: Tool =
    Tool { program: "rpmlint", debian: "rpmlint", fedora: "rpmlint", purpose: "judging RPM packages" };
/// The rest of what the tests use.
pub(crate) const FOR_TESTS: [Tool; 16] = [
    tests("bird", "bird2", "bird"),
    tests("ss", "iproute2", "iproute"),
    IPSET,
    tests("curl", "curl", "curl"),
    tests("dig", "bind9-dnsutils", "bind-utils"),
    tests("dnsmasq", "dnsmasq-base", "dnsmasq"),
    tests("etcd", "etcd-server", "etcd"),
    tests("etcdctl", "etcd-client", "etcd"),
    tests("nft", "nftables", "nftables"),
    tests("python3", "python3", "python3"),
    tests("haproxy", "haproxy", "haproxy"),
    tests("nginx", "nginx-core libnginx-mod-stream", "nginx-core nginx-mod-stream"),
    tests("dbus-daemon", "dbus", "dbus-daemon"),
    tests("systemctl", "systemd", "systemd"),
    tests("sysctl", "procps", "procps-ng"),
    tests("nsenter", "util-linux", "util-linux"),
];
/// What those tests use that do not run on other kernels.
pub(crate) const FOR_TESTS_HERE: [Tool; 4] = [
    tests("chromium", "chromium", "chromium-headless"),
    tests("crun", "crun", "crun"),
    tests("zsh", "zsh", "zsh"),
    tests("fish", "fish", "fish"),
];
/// Programs whose Debian packages start a service, of which the tests have no use: its name.
const SERVICES: [(&str, &str); 5] =
    [("bird", "bird"), ("etcd", "etcd"), ("haproxy", "haproxy"), ("nginx", "nginx"), ("promtool", "prometheus")];

const fn tests(program: &'static str, debian: &'static str, fedora: &'static str) -> Tool {
    Tool { program, debian, fedora, purpose: "tests" }
}

/// What it takes to boot other kernels.
pub(crate) const FOR_KERNELS: [Tool; 11] = [
    kernels("qemu-system-x86_64", "qemu-system-x86", "qemu-system-x86-core"),
    kernels("debootstrap", "debootstrap", "debootstrap"),
    kernels("mke2fs", "e2fsprogs", "e2fsprogs"),
    kernels("busybox", "busybox-static", "busybox"),
    kernels("cpio", "cpio", "cpio"),
    kernels("depmod", "kmod", "kmod"),
    kernels("xz", "xz-utils", "xz"),
    kernels("zstd", "zstd", "zstd"),
    kernels("strip", "binutils", "binutils"),
    kernels("apt-get", "apt", "apt"),
    DPKG_DEB,
];

const fn kernels(program: &'static str, debian: &'static str, fedora: &'static str) -> Tool {
    Tool { program, debian, fedora, purpose: "booting other kernels" }
}

/// The Debian packages of all that the tests use.
pub(crate) fn packages_for_tests() -> Vec<&'static str> {
    let tools = [IP, IPTABLES, BPFTOOL].into_iter().chain(FOR_TESTS);
    tools.flat_map(|tool| tool.debian.split(' ')).collect()
}

/// Those that are not there.
pub(crate) fn missing(tools: &[Tool]) -> Vec<Tool> {
    tools.iter().filter(|tool| find(tool.program).is_none()).copied().collect()
}

/// The same, but prints what to type and goes on.
pub(crate) fn recommend(tools: &[Tool]) {
    if let Err(error) = require(tools) {
        println!("{error:#}");
    }
}

/// Installs what is missing, as root or through sudo, which may ask for a password; where neither is possible or there is no
/// apt-get, fails with what to type.
pub(crate) fn require(tools: &[Tool]) -> Result<()> {
    let missing = missing(tools);
    if missing.is_empty() {
        return Ok(());
    }
    let programs = by_purpose(&missing);
    let debian = join(&missing, |tool| tool.debian);
    let by_hand = || {
        format!(
            "This host lacks {programs}.\n  Debian: apt-get install {debian}\n  Fedora: dnf install {}",
            join(&missing, |tool| tool.fedora)
        )
    };
    if find("apt-get").is_none() || !process::is_root() && find("sudo").is_none() {
        bail!(by_hand());
    }
    println!("This host lacks {programs}. Installing {debian}.");
    let install = || {
        process::exec(apt_get().arg("update"))?;
        process::exec(apt_get().args(["install", "--yes", "--no-install-recommends"]).args(debian.split(' ')))
    };
    without_services(&missing, install).with_context(by_hand)
}

/// Installs programs without their services: these are masked meanwhile, and not started by the next boot, either.
fn without_services(programs: &[Tool], install: impl FnOnce() -> Result<()>) -> Result<()> {
    let is_meant = |(program, _): &&(&str, &str)| programs.iter().any(|it| it.program == *program);
    let services: Vec<&str> = SERVICES.iter().filter(is_meant).map(|(_, service)| *service).collect();
    if services.is_empty() || !Path::new("/run/systemd/system").exists() {
        return install();
    }
    let systemctl = |what: &[&str]| process::exec(as_root("systemctl").arg("--quiet").args(what).args(&services));
    systemctl(&["mask", "--runtime"])?;
    let installed = install();
    systemctl(&["unmask", "--runtime"])?;
    installed?;
    println!("Their services are installed and disabled: {}.", services.join(", "));
    systemctl(&["disable"])
}

/// `apt-get` that asks nothing, as root.
fn apt_get() -> Command {
    let mut command = as_root("env");
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet=2"]);
    command
}

fn as_root(program: &str) -> Command {
    if process::is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// `bpftool (looking at what the kernel holds), bird, ss (tests)`
fn by_purpose(tools: &[Tool]) -> String {
    let purposes = tools.chunk_by(|one, next| one.purpose == next.purpose);
    let parts = purposes.map(|tools| {
        let names: Vec<&str> = tools.iter().map(|tool| tool.program).collect();
        format!("{} ({})", names.join(", "), tools.first().map_or("", |tool| tool.purpose))
    });
    parts.collect::<Vec<_>>().join(", ")
}

fn join(tools: &[Tool], name: impl Fn(&Tool) -> &'static str) -> String {
    let mut names: Vec<&str> = tools.iter().map(name).collect();
    names.dedup();
    names.join(" ")
}

/// Looks where root would, too: an ordinary user's PATH often lacks the `sbin` directories.
fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| Path::is_file(candidate))
}
