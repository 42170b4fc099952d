//! The directory of a BPF file system under which maps and links stay visible, also without the daemon.

use std::{
    fs::{self, File},
    io, mem,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount, umount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::paths::make_private;

/// Where distributions mount the BPF file system.
const USUAL_MOUNT_POINT: &str = "/sys/fs/bpf";
/// Beginning of the names of pinned links.
const LINK: &str = "link-";
/// End of the names of pins that are about to replace others. The file system takes no dots in names.
pub(super) const NEW: &str = "-new";
/// What the kernel itself puts into the root of a BPF file system.
const KERNELS: [&str; 2] = ["maps.debug", "progs.debug"];
/// Options of a file system that is there only for us, by which a later daemon knows it again. Kernels before 5.17 forget the source of
/// such a mount (commit 1e9d74660d4d); its mode they keep.
const OUR_OPTIONS: &str = "mode=2755";
const OUR_MODE: u32 = 0o2755;
/// The source of a mount by anyport with ABI 6 or less, which the next version meets when it takes over.
const FORMER_SOURCE: &str = "anyport";
/// The bits of a mode that the kernel does not set by itself in such a file system.
const MODE_BITS: u32 = 0o6777;

/// How often, and after which pauses, it is tried to unmount a file system that is busy.
const UNMOUNT_ATTEMPTS: usize = 20;
const UNMOUNT_PAUSE: Duration = Duration::from_millis(10);

/// Names of the maps that are pinned once, and of those that are replaced.
pub(super) const PINNED_AT_ONCE: [&str; 7] = ["control", "table", "counts", "journals", "drops", "totals", "sockets"];
pub(super) const PINNED_AGAIN: [&str; 2] = ["rules", "ports"];

/// The directory, locked against other daemons for as long as this lives. If nothing is pinned in it by then, it goes.
#[derive(Debug)]
pub(super) struct PinDirectory {
    path: PathBuf,
    /// Given back before the file system goes, which it keeps busy.
    lock: Option<Flock<File>>,
    /// Whether the file system is there only for us.
    is_mount_ours: bool,
}

impl PinDirectory {
    /// Makes the directory where there is none.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        make_pin_directory(path)?;
        Self::lock(path)
    }

    /// Locks a directory that is on a BPF file system.
    fn lock(path: &Path) -> anyhow::Result<Self> {
        let is_mount_ours = match mount_at(path)? {
            Some(mount) if mount.is_root && (mount.source == FORMER_SOURCE || has_our_mode(path)?) => true,
            Some(mount) if mount.is_root => bail!(
                "{0} is the root of a BPF file system, where others may have pins; use a directory below, such as \
                 --bpffs {0}/anyport",
                path.display()
            ),
            _ => false,
        };
        let directory = File::open(path).with_context(|| format!("open {}", path.display()))?;
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { path: path.to_owned(), lock: Some(lock), is_mount_ours }),
            Err((_, Errno::EWOULDBLOCK)) => {
                bail!("{} is in use by another anyportd; give each its own directory with --bpffs", path.display())
            }
            Err((_, errno)) => Err(io::Error::from(errno)).with_context(|| format!("lock {}", path.display())),
        }
    }

    /// Whether the directory is still the one that was opened, on a BPF file system.
    pub(super) fn is_in_place(&self) -> bool {
        let opened = self.lock.as_ref().and_then(|lock| lock.metadata().ok());
        let there = fs::metadata(&self.path).ok();
        opened.zip(there).is_some_and(|(a, b)| (a.dev(), a.ino()) == (b.dev(), b.ino()))
    }

    /// Makes the directory again where another program has removed or replaced it.
    pub(super) fn put_back(&mut self) -> anyhow::Result<()> {
        if !self.is_in_place() {
            let again =
                Self::open(&self.path).context("a restart of the daemon makes the directory of the pins again")?;
            // What is dropped is not the directory that is there now.
            mem::replace(self, again).lock = None;
        }
        Ok(())
    }

    /// Where a map is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Where a link is pinned.
    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.path.join(format!("{LINK}{name}"))
    }

    /// Removes every pin of ours. A link that no other process holds is detached by that.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
        self.remove_if(|name| {
            let map = name.trim_end_matches(NEW);
            name.starts_with(LINK) || PINNED_AT_ONCE.contains(&map) || PINNED_AGAIN.contains(&map)
        })
    }

    /// Removes the pins of links whose names begin with `prefix` and for which `is_in_use` does not hold.
    pub(super) fn remove_stale_links(&self, prefix: &str, is_in_use: impl Fn(&str) -> bool) -> anyhow::Result<()> {
        self.remove_if(|pin| pin.strip_prefix(LINK).is_some_and(|name| name.starts_with(prefix) && !is_in_use(name)))
    }

    fn remove_if(&self, is_unwanted: impl Fn(&str) -> bool) -> anyhow::Result<()> {
        let list = || format!("list the pins in {}", self.path.display());
        for entry in fs::read_dir(&self.path).with_context(list)? {
            let entry = entry.with_context(list)?;
            if is_unwanted(&entry.file_name().to_string_lossy()) {
                remove_pin(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes the pins, and the directory where nothing else is in it.
    pub(super) fn remove(mut self) -> anyhow::Result<()> {
        if !self.is_in_place() {
            // Others have removed it, and may have put something in its place.
            self.lock = None;
            return Ok(());
        }
        self.clear()?;
        self.close().with_context(|| format!("unmount the BPF file system from {}", self.path.display()))
    }

    /// Gives back what [`Self::open`] took, unless another program has pins there.
    fn close(&mut self) -> io::Result<()> {
        let is_empty = fs::read_dir(&self.path)?.flatten().all(|it| KERNELS.iter().any(|own| it.file_name() == *own));
        self.lock = None;
        if is_empty && self.is_mount_ours {
            self.is_mount_ours = false;
            match unmount(&self.path) {
                // It was mounted before the process became an ordinary user, and is there for the next one.
                Err(Errno::EPERM) => return Ok(()),
                unmounted => unmounted?,
            }
        }
        if is_empty {
            // It may be in use as something else, such as a mount point of another program.
            fs::remove_dir(&self.path).ok();
        }
        Ok(())
    }
}

impl Drop for PinDirectory {
    /// A start that fails leaves no directory; what a daemon has pinned outlives it.
    fn drop(&mut self) {
        if self.lock.is_some() {
            self.close().ok();
        }
    }
}

/// Unmounts what nobody uses. A child that another thread has just forked has our descriptors until it executes its program.
fn unmount(path: &Path) -> nix::Result<()> {
    for _ in 0..UNMOUNT_ATTEMPTS {
        match umount(path) {
            Err(Errno::EBUSY) => thread::sleep(UNMOUNT_PAUSE),
            unmounted => return unmounted,
        }
    }
    umount(path)
}

/// Creates a directory for pins, and mounts a BPF file system where there is none.
///
/// # Errors
/// What the kernel refused.
pub fn make_pin_directory(path: &Path) -> anyhow::Result<()> {
    // It may be all that is seen of its file system.
    if is_bpffs(path) {
        return Ok(());
    }
    if path.starts_with(USUAL_MOUNT_POINT) && !is_bpffs(Path::new(USUAL_MOUNT_POINT)) {
        mount_bpffs(Path::new(USUAL_MOUNT_POINT), None)?;
    }
    // A local user who can open it could lock it, and keep a daemon from starting.
    make_private(path).with_context(|| format!("create the directory {} for pinned maps and links", path.display()))?;
    if !is_bpffs(path)
        && let Err(error) = mount_bpffs(path, Some(OUR_OPTIONS))
    {
        fs::remove_dir(path).ok();
        return Err(error);
    }
    Ok(())
}

/// Removes the pins that a daemon left which had no chance to do so.
///
/// # Errors
/// A daemon is at work there, or the kernel would not remove a pin.
pub(super) fn remove_leftovers(path: &Path) -> anyhow::Result<()> {
    if is_bpffs(path) {
        PinDirectory::lock(path)?.remove()?;
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

/// Whether the root of a file system has the mode that ours have.
fn has_our_mode(path: &Path) -> anyhow::Result<bool> {
    let root = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    Ok(root.mode() & MODE_BITS == OUR_MODE)
}

/// What is mounted exactly at a path.
struct Mount {
    /// Whether it shows the file system from its root on, and not a directory of it.
    is_root: bool,
    source: String,
}

/// The uppermost mount at a path, by `proc_pid_mountinfo(5)`.
fn mount_at(path: &Path) -> anyhow::Result<Option<Mount>> {
    let path = path.canonicalize().with_context(|| format!("look up {}", path.display()))?;
    // The list has blanks and the like as octal numbers.
    let escaped: String = path
        .to_string_lossy()
        .chars()
        .map(|it| if " \t\n\\".contains(it) { format!("\\{:03o}", u32::from(it)) } else { it.into() })
        .collect();
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").context("list the mounts")?;
    Ok(mounts.lines().rev().find_map(|line| {
        let (of_mount, of_file_system) = line.split_once(" - ")?;
        let mut fields = of_mount.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        let source = of_file_system.split(' ').nth(1)?;
        (at == escaped).then(|| Mount { is_root: root == "/", source: source.to_owned() })
    }))
}

fn mount_bpffs(at: &Path, options: Option<&str>) -> anyhow::Result<()> {
    mount(Some("bpf"), at, Some("bpf"), MsFlags::empty(), options).map_err(io::Error::from).with_context(|| {
        let with = options.map(|it| format!("-o {it} ")).unwrap_or_default();
        format!(
            "mount a BPF file system on {0}, where there is none (needs CAP_SYS_ADMIN; or mount one \
             beforehand: mount -t bpf {with}bpf {0})",
            at.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use nix::mount::{MntFlags, MsFlags, mount, umount2};

    use super::{FORMER_SOURCE, OUR_OPTIONS, PinDirectory, is_bpffs, mount_at, mount_bpffs, remove_leftovers};
    use crate::steering::bpf::tests::{in_new_namespace, with_pins};

    #[test]
    fn a_mount_goes_as_it_came() {
        in_new_namespace(|| {
            let parent = tempfile::tempdir().unwrap();
            let path = parent.path().join("with blank");
            drop(PinDirectory::open(&path).unwrap());
            assert!(!path.exists(), "nothing was pinned");
            PinDirectory::open(&path).unwrap().remove().unwrap();
            assert!(!path.exists());
        });
    }

    /// After a crash, too, however the next daemon ends.
    #[test]
    fn a_mount_is_known_again() {
        in_new_namespace(|| {
            let parent = tempfile::tempdir().unwrap();
            let path = parent.path().join("with blank");
            for remove in [|path: &Path| PinDirectory::open(path)?.remove(), remove_leftovers] {
                fs::create_dir(&path).unwrap();
                mount_bpffs(&path, Some(OUR_OPTIONS)).unwrap();
                remove(&path).unwrap();
                assert!(!path.exists());
            }
        });
    }

    #[test]
    fn a_mount_of_a_former_version_is_known() {
        in_new_namespace(|| {
            let parent = tempfile::tempdir().unwrap();
            let path = parent.path().join("former");
            fs::create_dir(&path).unwrap();
            mount(Some(FORMER_SOURCE), &path, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
            PinDirectory::open(&path).unwrap().remove().unwrap();
            assert!(!path.exists());
        });
    }

    #[test]
    fn the_root_of_somebody_elses_file_system_is_refused() {
        in_new_namespace(|| {
            let root = tempfile::tempdir().unwrap();
            mount_bpffs(root.path(), None).unwrap();
            for result in [PinDirectory::open(root.path()).map(drop), remove_leftovers(root.path())] {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("directory below"), "{error}");
            }
            let below = root.path().join("anyport");
            PinDirectory::open(&below).unwrap().remove().unwrap();
            assert!(!below.exists());
            assert!(is_bpffs(root.path()) && mount_at(root.path()).unwrap().unwrap().is_root);
            umount2(root.path(), MntFlags::MNT_DETACH).unwrap();
        });
    }

    #[test]
    fn what_others_have_there_stays() {
        with_pins(|pins, path| {
            fs::create_dir(path.join("foreign")).unwrap();
            pins.remove().unwrap();
            assert!(path.join("foreign").exists());
            umount2(path, MntFlags::MNT_DETACH).unwrap();
        });
    }
}
