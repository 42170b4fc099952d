//! Which programs a keeper starts: its own, and those that nobody could have put there without root's privileges. A server asks for them, and may
//! not be itself any more.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use nix::unistd::Uid;
use rustix::fs::{Mode, OFlags, Stat, fstat, open, openat};

/// What a program's name begins with. Others of root's do other things with these privileges.
const NAME: &[u8] = b"anyportd";
/// Permission to write, of the group and of others.
const WRITABLE: u32 = 0o022;
/// In such a directory only owners rename and remove what is theirs.
const STICKY: u32 = 0o1000;
const EXECUTABLE: u32 = 0o111;

/// Whose files are executed.
#[derive(Debug)]
pub(super) struct Trust(Vec<u32>);

/// A program that was found fit, by a descriptor: what has its name later does not matter.
#[derive(Clone, Debug)]
pub(super) struct Executable {
    /// None for the program of this process.
    file: Option<Arc<OwnedFd>>,
    name: PathBuf,
}

impl Trust {
    /// Root's files, and those of the owner of this very program: that user could change it anyway. But none of the user that servers
    /// run as, unless that is root.
    pub(super) fn of_process() -> io::Result<Self> {
        let owner = fs::metadata("/proc/self/exe")?.uid();
        let own = Uid::effective().as_raw();
        Ok(Self([0, owner].into_iter().filter(|uid| *uid == 0 || *uid != own).collect()))
    }

    /// Looks at a program, by its path from the root on without following any link. Nothing but the path is opened: neither a pipe
    /// nor a device is touched.
    pub(super) fn open(&self, path: &Path) -> Result<Executable, String> {
        let mut parts = path.components();
        if parts.next() != Some(Component::RootDir) {
            return Err(format!("{} is no path from the root on", path.display()));
        }
        if !path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(NAME)) {
            return Err(format!("the name of {} does not begin with anyportd", path.display()));
        }
        let mut at = PathBuf::from("/");
        // Servers inherit what is found: where it is a script, its interpreter reads it by the descriptor.
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let mut file = open("/", flags, Mode::empty()).map_err(|error| format!("open /: {error}"))?;
        for part in parts {
            let Component::Normal(name) = part else { return Err(format!("{} goes back on its way", path.display())) };
            self.expect_directory(&file, &at)?;
            at.push(name);
            file =
                openat(&file, name, flags, Mode::empty()).map_err(|error| format!("open {}: {error}", at.display()))?;
        }
        let found = look(&file, &at)?;
        if !is_kind(&found, libc::S_IFREG) {
            return Err(format!("{} is no regular file", at.display()));
        }
        if found.st_mode & EXECUTABLE == 0 {
            return Err(format!("{} is not executable", at.display()));
        }
        self.expect_owner(&found, &at, WRITABLE)?;
        Ok(Executable { file: Some(Arc::new(file)), name: path.to_owned() })
    }

    fn expect_directory(&self, directory: &OwnedFd, at: &Path) -> Result<(), String> {
        let found = look(directory, at)?;
        if !is_kind(&found, libc::S_IFDIR) {
            return Err(format!("{} is no directory; name the program by a path without links", at.display()));
        }
        let forbidden = if found.st_mode & STICKY == 0 { WRITABLE } else { 0 };
        self.expect_owner(&found, at, forbidden)
    }

    fn expect_owner(&self, found: &Stat, at: &Path, forbidden: u32) -> Result<(), String> {
        let uid = found.st_uid;
        if !self.0.contains(&uid) {
            return Err(format!(
                "{} belongs to user {uid}, whose programs are not started with these privileges",
                at.display()
            ));
        }
        if found.st_mode & forbidden != 0 {
            return Err(format!("{} can be written by others than its owner", at.display()));
        }
        Ok(())
    }
}

fn look(file: &OwnedFd, at: &Path) -> Result<Stat, String> {
    fstat(file).map_err(|error| format!("look at {}: {error}", at.display()))
}

fn is_kind(found: &Stat, kind: u32) -> bool {
    found.st_mode & libc::S_IFMT == kind
}

impl Executable {
    /// The program of this process, even when it has been replaced.
    pub(super) fn own() -> Self {
        Self { file: None, name: "/proc/self/exe".into() }
    }

    /// By which path a child executes it.
    pub(super) fn path(&self) -> PathBuf {
        match &self.file {
            None => self.name.clone(),
            Some(file) => format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()).into(),
        }
    }

    /// What people call it.
    pub(super) fn name(&self) -> &Path {
        &self.name
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, chown, symlink},
        path::Path,
        process::Command,
    };

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::Trust;

    const NOBODY: u32 = 65_534;

    #[test]
    fn only_what_root_alone_can_write_is_started() {
        let trust = Trust(vec![0]);
        let directory = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(directory.path()).unwrap();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
        let path = |name: &str| root.join(name);
        let copy = |name: &str, mode: u32| {
            let path = path(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::copy(fs::canonicalize("/bin/true").unwrap(), &path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let good = trust.open(&copy("anyportd-good", 0o755)).unwrap();
        // Whatever has the name by now.
        fs::remove_file(path("anyportd-good")).unwrap();
        assert!(Command::new(good.path()).status().unwrap().success());

        let refused = |path: &Path, why: &str| {
            let error = trust.open(path).unwrap_err();
            assert!(error.contains(why), "{}: {error}", path.display());
        };
        refused(&path("anyportd-good"), "No such file");
        refused(Path::new("bin/anyportd"), "no path from the root");
        refused(&root.join("../anyportd"), "goes back");
        refused(&copy("anyportd-group", 0o775), "can be written by others");
        refused(&copy("anyportd-plain", 0o644), "not executable");
        fs::create_dir(path("anyportd-directory")).unwrap();
        refused(&path("anyportd-directory"), "no regular file");
        refused(Path::new("/bin/sh"), "does not begin with anyportd");
        mkfifo(&path("anyportd-pipe"), Mode::from_bits_truncate(0o755)).unwrap();
        refused(&path("anyportd-pipe"), "no regular file");
        let own = copy("anyportd-own", 0o755);
        symlink(&own, path("anyportd-link")).unwrap();
        refused(&path("anyportd-link"), "no regular file");
        chown(&own, Some(NOBODY), None).unwrap();
        refused(&own, "belongs to user 65534");
        let inside = copy("theirs/anyportd", 0o755);
        trust.open(&inside).unwrap();
        symlink(path("theirs"), path("way")).unwrap();
        refused(&path("way/anyportd"), "without links");
        fs::set_permissions(path("theirs"), fs::Permissions::from_mode(0o777)).unwrap();
        refused(&inside, "can be written by others");
        fs::set_permissions(path("theirs"), fs::Permissions::from_mode(0o1777)).unwrap();
        trust.open(&inside).unwrap();
        chown(path("theirs"), Some(NOBODY), None).unwrap();
        refused(&inside, "belongs to user 65534");
    }
}
