//! The few things that are done with files.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use nix::fcntl::OFlag;

use crate::paths::make_private;

/// Bytes of the largest file that is read: many times what a million rules take.
const LARGEST: u64 = 1 << 30;

/// A directory with files by name: on a file system, or what stands in for it in tests.
pub(crate) trait Files: Send + Sync + fmt::Debug {
    /// All of a file.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Makes a file consist of this. Its content is on the disk when this returns, its name may not be.
    fn write(&self, name: &str, content: &[u8]) -> io::Result<()>;
    /// Gives a file another name, in place of the file that had it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Gives a file a second name, which none has yet.
    fn link(&self, name: &str, second: &str) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    fn names(&self) -> io::Result<Vec<String>>;
    /// Puts the names on the disk.
    fn sync(&self) -> io::Result<()>;
    /// Where people find a file.
    fn path(&self, name: &str) -> PathBuf;
}

/// All of a regular file. The directory is a user's, and who reads may have more rights: no link is followed, no pipe is waited for, no device
/// is touched, and there is an end to what is read.
fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags.bits()).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if found.len() > LARGEST {
        return Err(io::Error::other(format!("it has {} bytes, more than the {LARGEST} that are read", found.len())));
    }
    let mut content = Vec::new();
    file.take(LARGEST).read_to_end(&mut content)?;
    Ok(content)
}

/// A file that was not there before, whatever had its name.
pub(crate) fn create_new(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Rules, and the key of a node's reports, are for the daemon's user alone.
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// A directory of a file system.
#[derive(Debug)]
pub(super) struct Directory(PathBuf);

impl Directory {
    /// One that may not be there.
    pub(super) fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Makes the directory where it is missing, and sees to it that it is on the disk.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        if !path.exists() {
            make_private(path)?;
            path.ancestors().skip(1).take(1).try_for_each(|parent| File::open(parent)?.sync_all())?;
        }
        Ok(Self::at(path))
    }
}

impl Files for Directory {
    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        read_regular(&self.path(name))
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut file = create_new(&self.path(name))?;
        file.write_all(content)?;
        file.sync_all()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn link(&self, name: &str, second: &str) -> io::Result<()> {
        fs::hard_link(self.path(name), self.path(second))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path(name))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(&self.0)?.collect::<io::Result<Vec<_>>>()?;
        Ok(entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write as _, os::unix::fs::symlink};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::{create_new, read_regular};

    #[test]
    fn only_regular_files_are_read_and_none_is_written_through_a_link() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("file"), "content").unwrap();
        assert_eq!(read_regular(&path("file")).unwrap(), b"content");
        symlink(path("file"), path("link")).unwrap();
        mkfifo(&path("pipe"), Mode::from_bits_truncate(0o600)).unwrap();
        symlink("/dev/zero", path("device")).unwrap();
        for name in ["link", "pipe", "device", "none", "."] {
            read_regular(&path(name)).unwrap_err();
        }
        fs::File::create(path("huge")).unwrap().set_len(super::LARGEST + 1).unwrap();
        assert!(read_regular(&path("huge")).unwrap_err().to_string().contains("more than"));
        create_new(&path("link")).unwrap().write_all(b"other").unwrap();
        create_new(&path("pipe")).unwrap().write_all(b"other").unwrap();
        assert_eq!(fs::read(path("file")).unwrap(), b"content");
        assert_eq!(fs::read(path("link")).unwrap(), b"other");
    }
}
