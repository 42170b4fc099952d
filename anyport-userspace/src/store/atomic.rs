//! Replaces a file in one step: it is written aside, takes its name, and is put on the disk. Checksums show files that were spoilt.

use std::{io, mem};

use anyhow::{Context as _, bail};
use serde::Serialize;
use tracing::warn;

use super::{Kind, Named, Series, Store};

/// The checksum of a file, until it is known.
pub(super) const NO_CHECKSUM: &str = "00000000";
/// A state file whose content is on the disk, under a name that nothing reads yet. What can fail for want of space is done.
#[derive(Debug)]
#[must_use = "it is to be activated or discarded"]
pub struct Written {
    kind: Kind,
    /// The large file that belongs to it.
    named: Option<Named>,
}

/// What stands before it. No text within the file can have unescaped quotes.
const CHECKSUM: &str = "\"checksum\": \"";

impl Store {
    pub(super) fn write_next(&self, series: Series, before: Option<&Named>, text: &str) -> anyhow::Result<Named> {
        let name = series.after(before);
        self.replace(&name, text.as_bytes())?;
        Ok(Named { name, checksum: Some(crc32fast::hash(text.as_bytes())) })
    }

    /// Writes a state file aside, which has [`NO_CHECKSUM`] yet. On a failure nothing is left of it, nor of the large file
    /// that it names.
    pub(super) fn write_aside(
        &self,
        kind: Kind,
        named: Option<Named>,
        file: &impl Serialize,
    ) -> anyhow::Result<Written> {
        let written = Written { kind, named };
        let mut text = serde_json::to_vec_pretty(file).context("write the state")?;
        text.push(b'\n');
        let checksum = checksum_of_state(&text);
        if let Some(at) = place_of_checksum(&text) {
            text[at..at + checksum.len()].copy_from_slice(checksum.as_bytes());
        }
        let name = kind.file();
        if let Err(error) = self.files.write(&aside(name), &text) {
            self.discard(written);
            return Err(error).with_context(|| self.attempt(name));
        }
        Ok(written)
    }

    /// Has what was written aside take the place of what is kept, in one step: after a crash or a loss of power the old state is
    /// there or the new one.
    ///
    /// # Errors
    /// It could not be; the old state is still there, and nothing is left of the new one.
    pub fn activate(&mut self, written: Written) -> anyhow::Result<()> {
        let Written { kind, named } = written;
        let (name, previous) = (kind.file(), kind.previous());
        self.keep_previous(name, previous);
        if let Err(error) = self.files.rename(&aside(name), name) {
            self.discard(Written { kind, named });
            return Err(error).with_context(|| self.attempt(name));
        }
        self.sync(name);
        let beside = self.beside(kind);
        beside.previous = mem::replace(&mut beside.now, named).map(|it| it.name);
        self.remove_unused();
        Ok(())
    }

    /// Removes what was written aside: what there is of it takes space on a disk that may be full.
    pub fn discard(&self, Written { kind, .. }: Written) {
        self.files.remove(&aside(kind.file())).ok();
        self.remove_unused();
    }

    /// Writes a little and removes it, to see whether that goes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn try_out(&self) -> anyhow::Result<()> {
        const NAME: &str = "trial";
        let written = self.files.write(&aside(NAME), b"the state directory can be written\n");
        self.files.remove(&aside(NAME)).ok();
        written.with_context(|| self.attempt(NAME))
    }

    /// Gives the state that is about to be replaced a second name. Not to be able to is no reason to change nothing.
    fn keep_previous(&self, name: &str, previous: &str) {
        let kept = match self.files.remove(previous) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.files.link(name, previous),
        };
        match kept {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!("keep the state before as {}: {error}", self.files.path(previous).display());
            }
            _ => {}
        }
    }

    pub(super) fn replace(&self, name: &str, text: &[u8]) -> anyhow::Result<()> {
        let aside = aside(name);
        let written = self.files.write(&aside, text).and_then(|()| self.files.rename(&aside, name));
        if written.is_err() {
            self.files.remove(&aside).ok();
        }
        written.with_context(|| self.attempt(name))?;
        self.sync(name);
        Ok(())
    }

    /// Puts the names on the disk. The new state is in place; a loss of power could only bring the old one back.
    fn sync(&self, name: &str) {
        if let Err(error) = self.files.sync() {
            warn!("make sure that {} outlives a loss of power: {error}", self.files.path(name).display());
        }
    }

    fn attempt(&self, name: &str) -> String {
        format!("write the state file {}", self.files.path(name).display())
    }
}

/// The name of a file until it is whole.
fn aside(name: &str) -> String {
    format!("{name}.new")
}

pub(super) fn expect_checksum(checksum: Option<&str>, text: &[u8]) -> anyhow::Result<()> {
    match checksum {
        Some(checksum) if *checksum != checksum_of_state(text) => {
            bail!("it is not what was written, by its checksum {checksum}")
        }
        _ => Ok(()),
    }
}

/// Where the checksum stands in a state file that has one.
fn place_of_checksum(text: &[u8]) -> Option<usize> {
    let at = text.windows(CHECKSUM.len()).rposition(|window| window == CHECKSUM.as_bytes())? + CHECKSUM.len();
    (at + NO_CHECKSUM.len() <= text.len()).then_some(at)
}

fn checksum_of_state(text: &[u8]) -> String {
    let mut text = text.to_vec();
    if let Some(at) = place_of_checksum(&text) {
        text[at..at + NO_CHECKSUM.len()].copy_from_slice(NO_CHECKSUM.as_bytes());
    }
    format!("{:08x}", crc32fast::hash(&text))
}
