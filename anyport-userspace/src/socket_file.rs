//! The file of a listening socket: clients find the socket by it, and others may remove it.

use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::sleep;
use tracing::warn;

use crate::complaint::Complaint;

/// How often it is looked at.
const INTERVAL: Duration = Duration::from_secs(1);

/// The file of a socket of this process.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    file: Mutex<Option<(u64, u64)>>,
    complaint: Complaint,
}

/// What stands at the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// The socket's own file.
    Own,
    /// Another one.
    Other,
    Nothing,
}

impl SocketFile {
    /// The file of a socket that was just bound.
    pub fn of(path: &Path) -> Self {
        Self { path: path.to_owned(), file: Mutex::new(file_at(path)), complaint: Complaint::default() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the file back whenever it is gone, by `bind`, which makes another socket there; returns that socket.
    pub async fn put_back<T>(&self, bind: impl Fn(&Path) -> anyhow::Result<T>) -> T {
        loop {
            sleep(INTERVAL).await;
            let why = match self.found() {
                Found::Own => {
                    self.complaint.clear();
                    continue;
                }
                Found::Other => "another file has its name; remove that, and it comes back".to_owned(),
                Found::Nothing => match bind(&self.path) {
                    Ok(socket) => {
                        *self.file() = file_at(&self.path);
                        self.complaint.clear();
                        warn!("the socket {} was removed by others and is put back", self.path.display());
                        return socket;
                    }
                    Err(error) => format!("{error:#}; a restart of anyportd puts it back and loses no connection"),
                },
            };
            let what =
                format!("no client reaches the socket {}, which others have removed: {why}", self.path.display());
            if self.complaint.raise(what.clone()) {
                warn!("{what}");
            }
        }
    }

    /// What keeps clients from finding it.
    pub fn complaint(&self) -> Complaint {
        self.complaint.clone()
    }

    /// Removes the file, if it is still the socket's own.
    pub fn remove(&self) {
        if self.found() == Found::Own
            && let Err(error) = fs::remove_file(&self.path)
        {
            warn!("remove the socket {}: {error}", self.path.display());
        }
    }

    fn found(&self) -> Found {
        match fs::symlink_metadata(&self.path) {
            Ok(it) if Some((it.dev(), it.ino())) == *self.file() => Found::Own,
            Err(error) if error.kind() == ErrorKind::NotFound => Found::Nothing,
            _ => Found::Other,
        }
    }

    fn file(&self) -> MutexGuard<'_, Option<(u64, u64)>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn file_at(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|it| (it.dev(), it.ino()))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixListener, sync::Arc};

    use anyhow::Context as _;
    use tokio::time::{pause, sleep};

    use super::{INTERVAL, SocketFile};

    #[tokio::test]
    async fn a_file_that_others_remove_is_put_back() {
        pause();
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("run");
        let path = below.join("socket");
        let bind = |path: &std::path::Path| UnixListener::bind(path).context("bind");
        fs::create_dir(&below).unwrap();
        let first = bind(&path).unwrap();
        let file = Arc::new(SocketFile::of(&path));
        let looking = Arc::clone(&file);
        let put_back = tokio::spawn(async move { looking.put_back(bind).await });
        sleep(3 * INTERVAL).await;
        assert!(!put_back.is_finished() && file.complaint().get().is_none());
        // With its directory, which this `bind` does not make.
        fs::remove_dir_all(&below).unwrap();
        sleep(3 * INTERVAL).await;
        assert!(
            file.complaint().get().unwrap().contains("others have removed: bind: No such file"),
            "{:?}",
            file.complaint()
        );
        fs::create_dir(&below).unwrap();
        fs::write(&path, "").unwrap();
        sleep(3 * INTERVAL).await;
        assert!(file.complaint().get().unwrap().contains("another file has its name"), "{:?}", file.complaint());
        file.remove();
        assert!(path.exists(), "another's file is left alone");
        fs::remove_file(&path).unwrap();
        let second = put_back.await.unwrap();
        assert!(file.complaint().get().is_none() && std::os::unix::net::UnixStream::connect(&path).is_ok());
        file.remove();
        assert!(!path.exists());
        drop((first, second));
    }
}
