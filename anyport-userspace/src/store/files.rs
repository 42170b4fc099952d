//! The few things that are done with files.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

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
            fs::create_dir_all(path)?;
            path.ancestors().skip(1).take(1).try_for_each(|parent| File::open(parent)?.sync_all())?;
        }
        Ok(Self::at(path))
    }
}

impl Files for Directory {
    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path(name))
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut file = File::create(self.path(name))?;
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
