//! A kernel that boots: its image, a disk with its modules, and an initramfs that finds the root file system.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::{image, versions::Package};
use crate::process::{exec, stdout};

/// What the initramfs needs to mount the root file system.
const DRIVERS: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];
/// Where busybox is after its package is installed.
const BUSYBOX: [&str; 2] = ["/usr/bin/busybox", "/bin/busybox"];

/// Files of a kernel, ready for [`super::machine::boot`].
pub(crate) struct Linux {
    directory: PathBuf,
}

impl Linux {
    /// Downloads the packages, or takes what an earlier run has made of them.
    pub(crate) fn of(store: &Path, package: &Package) -> Result<Self> {
        let linux = Self { directory: store.join("linux").join(&package.release) };
        if linux.initramfs().is_file() {
            return Ok(linux);
        }
        println!("Downloading {} of {}.", package.packages.join(" "), package.suite.name);
        let unpacked = linux.directory.join("unpacked");
        drop(fs::remove_dir_all(&linux.directory));
        fs::create_dir_all(&unpacked)?;
        package.suite.unpack(&package.packages, &unpacked)?;
        linux.prepare(&unpacked, &package.release).with_context(|| format!("prepare Linux {}", package.release))?;
        fs::remove_dir_all(&unpacked)?;
        Ok(linux)
    }

    /// The image to boot.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// The disk of `/lib/modules`.
    pub(crate) fn modules(&self) -> PathBuf {
        self.directory.join("modules.img")
    }

    /// What the kernel runs first.
    pub(crate) fn initramfs(&self) -> PathBuf {
        self.directory.join("initramfs")
    }

    fn prepare(&self, unpacked: &Path, release: &str) -> Result<()> {
        let files = files_below(unpacked)?;
        let kernel = files.iter().find(|path| name(path).starts_with("vmlinuz")).context("no vmlinuz")?;
        fs::copy(kernel, self.kernel())?;
        // The packages have modules and the lists of what is built in below one of two directories, or both.
        let staged = unpacked.join("staged");
        let modules = staged.join("lib/modules").join(release);
        for path in &files {
            let mut parts = path.strip_prefix(unpacked)?.iter().skip_while(|part| *part != release);
            if parts.next().is_none() || !fs::symlink_metadata(path)?.is_file() || name(path).starts_with("vmlinuz") {
                continue;
            }
            let to = modules.join(parts.collect::<PathBuf>());
            fs::create_dir_all(to.parent().context("a directory")?)?;
            fs::rename(path, to)?;
        }
        ensure!(modules.join("kernel").is_dir(), "the packages have no modules of {release}");
        exec(Command::new("depmod").arg("--basedir").arg(&staged).arg(release))?;
        image::from_directory(&staged.join("lib/modules"), &self.modules(), "400M")?;
        let initramfs = unpacked.join("initramfs");
        fill_initramfs(&initramfs, &staged, release)?;
        // Under another name until it is whole: its presence says that all is there.
        let unfinished = self.directory.join("initramfs.part");
        pack(&initramfs, &unfinished)?;
        fs::rename(unfinished, self.initramfs())?;
        Ok(())
    }
}

fn name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

/// All files below a directory, symbolic links among them.
fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("look into {}", directory.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() { directories.push(entry.path()) } else { files.push(entry.path()) }
        }
    }
    Ok(files)
}

/// busybox, the drivers in the order in which they are loaded, and a script that hands over to the root file system.
fn fill_initramfs(directory: &Path, staged: &Path, release: &str) -> Result<()> {
    for empty in ["bin", "modules", "dev", "proc", "sys", "new"] {
        fs::create_dir_all(directory.join(empty))?;
    }
    let busybox = BUSYBOX.into_iter().find(|path| Path::new(path).is_file()).context("no busybox")?;
    fs::copy(busybox, directory.join("bin/busybox"))?;
    let mut loaded = Vec::new();
    for driver in DRIVERS {
        let mut modprobe = Command::new("modprobe");
        modprobe.arg("--dirname").arg(staged).args(["--set-version", release, "--show-depends", driver]);
        for line in stdout(&mut modprobe)?.lines() {
            let Some(module) = line.strip_prefix("insmod ").and_then(|rest| rest.split(' ').next()) else { continue };
            let module = Path::new(module);
            let plain = name(module).trim_end_matches(".xz").trim_end_matches(".zst").to_owned();
            if !loaded.contains(&plain) {
                decompress(module, &directory.join("modules").join(&plain))?;
                loaded.push(plain);
            }
        }
    }
    fs::write(directory.join("modules/list"), loaded.join("\n") + "\n")?;
    let init = directory.join("init");
    fs::write(&init, include_str!("initramfs.sh"))?;
    exec(Command::new("chmod").arg("755").args([&init, &directory.join("bin/busybox")]))
}

fn decompress(from: &Path, to: &Path) -> Result<()> {
    let program = match from.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::copy(from, to).map(drop).with_context(|| format!("copy {}", from.display())),
    };
    exec(Command::new(program).arg("-dcq").arg(from).stdout(fs::File::create(to)?))
}

/// Packs a directory as the kernel reads it.
fn pack(directory: &Path, to: &Path) -> Result<()> {
    let names = stdout(Command::new("find").arg(".").current_dir(directory))?;
    let mut cpio = Command::new("cpio")
        .args(["--create", "--format=newc", "--quiet"])
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(fs::File::create(to)?)
        .spawn()
        .context("start cpio")?;
    cpio.stdin.take().context("no pipe to cpio")?.write_all(names.as_bytes())?;
    let status = cpio.wait()?;
    ensure!(status.success(), "cpio failed: {status}");
    Ok(())
}
