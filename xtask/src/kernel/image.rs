//! Disks of the machine: Debian with what the tests use, and the programs under test.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::apt;
use crate::{
    host,
    process::{exec, stdout},
};

/// What a guest takes beyond what the tests use on a host.
const BASE: &str = "kmod nftables python3 bsdutils";

/// A disk with the files of a directory. `ext2` is what every kernel's `ext4` driver mounts, whatever features the
/// machine's `mke2fs` has learnt since.
pub(crate) fn from_directory(directory: &Path, image: &Path, size: &str) -> Result<()> {
    drop(fs::remove_file(image));
    // mke2fs is quiet about a file that is there.
    fs::File::create(image).with_context(|| format!("create {}", image.display()))?;
    exec(Command::new("mke2fs").args(["-q", "-F", "-t", "ext2", "-m", "0", "-d"]).args([directory, image]).arg(size))
        .with_context(|| format!("make {} out of {}", image.display(), directory.display()))
}

/// The root file system: of this machine's own suite, so that its C library fits what is built here. Kept until the
/// suite or the packages change.
pub(crate) fn root(store: &Path) -> Result<PathBuf> {
    let suite = apt::own_suite()?;
    let mut packages: Vec<&str> = host::packages_for_tests();
    packages.extend(BASE.split(' '));
    packages.sort_unstable();
    packages.dedup();
    let (directory, image, made_of) = (store.join("root"), store.join("root.img"), store.join("root.packages"));
    let wanted = format!("{suite} {}", packages.join(","));
    if image.is_file() && fs::read_to_string(&made_of).is_ok_and(|packages| packages == wanted) {
        return Ok(image);
    }
    println!("Making a root file system of Debian's suite {suite}.");
    drop(fs::remove_file(&made_of));
    let mirrors = apt::mirrors(&suite)?;
    let mirror = mirrors.first().context("no mirror")?;
    drop(fs::remove_dir_all(&directory));
    let log = store.join("debootstrap.log");
    let mut debootstrap = Command::new("debootstrap");
    debootstrap.args(["--variant=minbase", &format!("--include={}", packages.join(",")), &suite]);
    debootstrap.arg(&directory).arg(mirror).env("DEBIAN_FRONTEND", "noninteractive");
    debootstrap.stdout(fs::File::create(&log).context("create a log of debootstrap")?);
    exec(&mut debootstrap).with_context(|| format!("see {} and {}/debootstrap", log.display(), directory.display()))?;
    for unneeded in
        ["var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"]
    {
        drop(fs::remove_dir_all(directory.join(unneeded)));
    }
    for mount_point in ["under-test", "lib/modules"] {
        fs::create_dir_all(directory.join(mount_point))?;
    }
    from_directory(&directory, &image, "3G")?;
    fs::remove_dir_all(&directory).context("remove what is in the image now")?;
    fs::write(&made_of, wanted)?;
    Ok(image)
}

/// The programs, as `target/debug` has them, and how to run them.
pub(crate) fn programs(store: &Path, built: &Path, tests: &Path) -> Result<PathBuf> {
    let (directory, image) = (store.join("under-test"), store.join("under-test.img"));
    drop(fs::remove_dir_all(&directory));
    let files = [
        (built.join("anyportd"), "debug/anyportd"),
        (built.join("anyportctl"), "debug/anyportctl"),
        (built.join("examples/service"), "debug/examples/service"),
        (tests.to_owned(), "debug/deps/e2e"),
    ];
    for (from, name) in files {
        let to = directory.join(name);
        fs::create_dir_all(to.parent().context("a directory")?)?;
        exec(Command::new("strip").arg("--strip-debug").arg("-o").args([&to, &from]))?;
    }
    fs::write(directory.join("init"), include_str!("guest.sh"))?;
    from_directory(&directory, &image, "1G")?;
    fs::remove_dir_all(&directory)?;
    Ok(image)
}

/// The test program, as `cargo`, a `cargo test` on the crates that are built anyway, builds it.
pub(crate) fn test_program(cargo: &mut Command) -> Result<PathBuf> {
    let messages = stdout(cargo.args(["--test", "e2e", "--no-run", "--message-format", "json", "--quiet"]))?;
    // Programs that the tests use are named, too, in any order.
    let tests = messages.lines().filter(|line| line.contains("\"kind\":[\"test\"]"));
    let executables = tests.filter_map(|line| line.split_once("\"executable\":\""));
    let path = executables.filter_map(|(_, rest)| rest.split('"').next()).next_back();
    path.map(PathBuf::from).context("cargo names no test program `e2e`")
}
