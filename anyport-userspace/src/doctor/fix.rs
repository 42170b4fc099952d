//! What `--fix` changes, and how it is put back.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nix::{
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
    unistd::geteuid,
};
use serde::{Deserialize, Serialize};

use super::Sysctl;
use crate::{
    routes::{ROUTE_PROTOCOL, Routes},
    rules::Prefix,
    sys::netns_cookie,
};

/// A change that helps, does no harm, and can be undone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Sets a kernel parameter.
    Sysctl {
        /// Which one.
        name: Sysctl,
        /// Its new value.
        value: String,
    },
    /// Makes a prefix local, as the daemon does.
    Route(Prefix),
}

/// As one would type it.
impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl { name, value } => write!(f, "sysctl -w {name}={value}"),
            Self::Route(prefix) => {
                let (ip, source) = if prefix.is_ipv4() { ("ip", "127.0.0.1") } else { ("ip -6", "::1") };
                write!(f, "{ip} route add local {prefix} dev lo proto {ROUTE_PROTOCOL} src {source}")
            }
        }
    }
}

/// A change that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
enum Made {
    /// A kernel parameter, its value before and the one that it was given.
    Sysctl { name: Sysctl, before: String, after: String },
    /// A route that was missing.
    Route(Prefix),
}

/// The changes that were made to a network namespace since the host was booted, kept in a file from the moment before each
/// is made.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    content: Content,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    /// The namespace, by the cookie that no other one gets before the next boot; /run is empty after that.
    namespace: u64,
    made: Vec<Made>,
}

impl Journal {
    /// The journal in this file; an empty one if there is none.
    ///
    /// # Errors
    /// The file is about another network namespace, or can't be read.
    pub fn open(path: PathBuf) -> anyhow::Result<Self> {
        let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .context("opening a socket to tell network namespaces apart")?;
        let namespace = match netns_cookie(&any) {
            // Before Linux 5.14. Another namespace may get the inode when this one is gone; cookies are far smaller numbers.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                fs::metadata("/proc/thread-self/ns/net").map(|it| it.ino())
            }
            cookie => cookie,
        };
        let namespace = namespace.context("telling network namespaces apart")?;
        let content = read(&path)
            .with_context(|| format!("read {}, which says what --fix has changed", path.display()))?
            .unwrap_or(Content { namespace, made: Vec::new() });
        if content.namespace != namespace {
            bail!("{} is about another network namespace; run this there, or remove the file", path.display());
        }
        Ok(Self { path, content })
    }

    /// Makes a change.
    ///
    /// # Errors
    /// What was attempted and what the kernel said.
    pub async fn make(&mut self, change: &Change) -> anyhow::Result<()> {
        match change {
            Change::Sysctl { name, value } => {
                let before = name.read(Path::new("/proc")).with_context(|| format!("reading {name}"))?;
                let before = before.with_context(|| format!("this kernel has no {name}"))?;
                self.note(Made::Sysctl { name: name.clone(), before, after: value.clone() })?;
                name.write(value).with_context(|| format!("setting {name} to {value}"))
            }
            Change::Route(prefix) => {
                self.note(Made::Route(*prefix))?;
                Routes::open()?.add(&[*prefix]).await.map(drop)
            }
        }
    }

    /// Puts back what was changed, the last change first, and forgets it. Returns a line for each: what was done, or why it was
    /// left.
    ///
    /// # Errors
    /// What was attempted and what the kernel said; what is still to be put back is kept.
    pub async fn undo(&mut self) -> anyhow::Result<Vec<String>> {
        let mut lines = Vec::new();
        while let Some(made) = self.content.made.last() {
            lines.push(put_back(made).await?);
            self.content.made.pop();
            self.write()?;
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", self.path.display()))
            }
            _ => Ok(lines),
        }
    }

    fn note(&mut self, made: Made) -> anyhow::Result<()> {
        self.content.made.push(made);
        self.write()
    }

    fn write(&self) -> anyhow::Result<()> {
        let write = || {
            if let Some(directory) = self.path.parent() {
                fs::create_dir_all(directory)?;
            }
            let new = self.path.with_extension("new");
            match fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            // The daemon's user may have put a link there, which is not followed.
            File::create_new(&new)?.write_all(&serde_json::to_vec_pretty(&self.content)?)?;
            fs::rename(&new, &self.path)
        };
        write().with_context(|| format!("write {}, which says what --fix changes", self.path.display()))
    }
}

/// What is in a journal, if it is there.
fn read(path: &Path) -> anyhow::Result<Option<Content>> {
    let mut file = match File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    // The directory may be the daemon's, and what stands here is done with all privileges of the caller.
    let owner = file.metadata()?.uid();
    if owner != geteuid().as_raw() {
        bail!("it belongs to the user {owner}, and not to the one who is to undo it");
    }
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    Ok(Some(serde_json::from_slice(&text)?))
}

async fn put_back(made: &Made) -> anyhow::Result<String> {
    match made {
        Made::Sysctl { name, before, after } => {
            let now = name.read(Path::new("/proc")).with_context(|| format!("reading {name}"))?;
            match now {
                Some(now) if now == *after => {
                    name.write(before).with_context(|| format!("setting {name} back to {before}"))?;
                    Ok(format!("sysctl -w {name}={before}"))
                }
                Some(now) if now == *before => Ok(format!("{name} is {before} again already")),
                Some(now) => Ok(format!("{name} is left as it is, {now}: another program has set it since")),
                None => Ok(format!("{name} is gone")),
            }
        }
        Made::Route(prefix) => {
            Routes::open()?.remove(&[*prefix]).await?;
            Ok(format!("ip route del local {prefix} dev lo proto {ROUTE_PROTOCOL}"))
        }
    }
}
