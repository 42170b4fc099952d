//! Replaces a file in one step: it is written aside, takes its name, and is put on the disk. Checksums show files that were spoilt.

use std::io;

use anyhow::{Context as _, bail};
use serde::Serialize;
use tracing::warn;

use super::{Named, Series, Store};

/// The checksum of a file, until it is known.
pub(super) const NO_CHECKSUM: &str = "00000000";
/// What stands before it. No text within the file can have unescaped quotes.
const CHECKSUM: &str = "\"checksum\": \"";

impl Store {
    pub(super) fn write_next(&self, series: Series, before: Option<&Named>, text: &str) -> anyhow::Result<Named> {
        let name = series.after(before);
        self.replace(&name, text.as_bytes())?;
        Ok(Named { name, checksum: Some(crc32fast::hash(text.as_bytes())) })
    }

    /// Replaces a state file by one that has [`NO_CHECKSUM`] yet, and keeps the previous one under another name. Not to be
    /// able to keep it is no reason to change nothing.
    pub(super) fn replace_keeping(&self, name: &str, previous: &str, file: &impl Serialize) -> anyhow::Result<()> {
        let mut text = serde_json::to_vec_pretty(file).context("write the state")?;
        text.push(b'\n');
        let checksum = checksum_of_state(&text);
        if let Some(at) = place_of_checksum(&text) {
            text[at..at + checksum.len()].copy_from_slice(checksum.as_bytes());
        }
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
        self.replace(name, &text)
    }

    pub(super) fn replace(&self, name: &str, text: &[u8]) -> anyhow::Result<()> {
        let aside = format!("{name}.new");
        let written = self.files.write(&aside, text).and_then(|()| self.files.rename(&aside, name));
        if written.is_err() {
            // What there is of it takes space on a disk that may be full.
            self.files.remove(&aside).ok();
        }
        written.with_context(|| format!("write the state file {}", self.files.path(name).display()))?;
        // The new state is in place; a loss of power could only bring the old one back.
        if let Err(error) = self.files.sync() {
            warn!("make sure that {} outlives a loss of power: {error}", self.files.path(name).display());
        }
        Ok(())
    }
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
