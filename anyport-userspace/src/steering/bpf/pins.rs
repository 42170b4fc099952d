//! The directory of a BPF file system under which maps and links stay visible, also without the daemon.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount, umount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

/// Where distributions mount the BPF file system.
const USUAL_MOUNT_POINT: &str = "/sys/fs/bpf";
/// Beginning of the names of pinned links.
const LINK: &str = "link-";
const NEW: &str = ".new";

/// Names of the pinned maps.
pub(super) const MAPS: [&str; 5] = ["control", "table", "rules", "counts", "sockets"];

/// The directory, locked against other daemons for as long as this lives.
#[derive(Debug)]
pub(super) struct PinDirectory {
    path: PathBuf,
    lock: Flock<File>,
    /// Whether the file system is there only for us.
    is_mount_ours: bool,
}

impl PinDirectory {
    /// Creates the directory, and mounts a BPF file system where there is none.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        if path.starts_with(USUAL_MOUNT_POINT) && !is_bpffs(Path::new(USUAL_MOUNT_POINT)) {
            mount_bpffs(Path::new(USUAL_MOUNT_POINT))?;
        }
        fs::create_dir_all(path)
            .with_context(|| format!("create the directory {} for pinned maps and links", path.display()))?;
        let is_mount_ours = !is_bpffs(path);
        if is_mount_ours {
            mount_bpffs(path)?;
        }
        Self::lock(path, is_mount_ours)
    }

    fn lock(path: &Path, is_mount_ours: bool) -> anyhow::Result<Self> {
        let directory = File::open(path).with_context(|| format!("open {}", path.display()))?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { path: path.to_owned(), lock, is_mount_ours }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                bail!("{} is in use by another anyportd; give each its own directory with --bpffs", path.display())
            }
            Err((_, errno)) => Err(io::Error::from(errno)).with_context(|| format!("lock {}", path.display())),
        }
    }

    /// Where a map of [`MAPS`] is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Where a link is pinned.
    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.path.join(format!("{LINK}{name}"))
    }

    /// Removes every pin of ours. A link that nobody else holds is detached by that.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        let entries = fs::read_dir(&self.path).with_context(|| format!("list the pins in {}", self.path.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("list the pins in {}", self.path.display()))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(LINK) || MAPS.contains(&name.trim_end_matches(NEW)) {
                remove_pin(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes the pins, and the directory where nothing else is in it.
    pub(super) fn remove(self) -> anyhow::Result<()> {
        self.clear()?;
        let Self { path, lock, is_mount_ours } = self;
        drop(lock);
        if is_mount_ours {
            umount(&path)
                .map_err(io::Error::from)
                .with_context(|| format!("unmount the BPF file system from {}", path.display()))?;
        }
        // Somebody else's pins, or the root of a mounted file system: it may stay.
        fs::remove_dir(&path).ok();
        Ok(())
    }
}

/// Removes the pins that a daemon left which had no chance to do so.
///
/// # Errors
/// A daemon is at work there, or the kernel would not remove a pin.
pub(super) fn remove_leftovers(path: &Path) -> anyhow::Result<()> {
    if is_bpffs(path) {
        PinDirectory::lock(path, false)?.remove()?;
    }
    Ok(())
}

pub(super) fn remove_pin(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove the pin {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|it| it.filesystem_type() == BPF_FS_MAGIC)
}

fn mount_bpffs(at: &Path) -> anyhow::Result<()> {
    mount(Some("bpf"), at, Some("bpf"), MsFlags::empty(), None::<&str>).map_err(io::Error::from).with_context(|| {
        format!(
            "mount a BPF file system on {0}, where there is none (needs CAP_SYS_ADMIN; or mount one \
                 beforehand: mount -t bpf bpf {0})",
            at.display()
        )
    })
}
