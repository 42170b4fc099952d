//! What `anyportctl` added, kept in the state directory.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{rules::Rule, service::ServiceConfig};

const FILE: &str = "state.json";
const VERSION: u32 = 1;

/// The state file of a daemon.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
}

/// What is in it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    version: u32,
    /// Services that were added by hand.
    pub services: Vec<ServiceConfig>,
    /// Rules that were added by hand.
    pub rules: Vec<Rule>,
}

impl State {
    /// What there is to keep.
    pub fn new(services: Vec<ServiceConfig>, rules: Vec<Rule>) -> Self {
        Self { version: VERSION, services, rules }
    }
}

impl Store {
    /// Creates the directory where it is missing, and reads what is there.
    ///
    /// # Errors
    /// The directory can't be made, or the file is not one of ours. It is left as it is.
    pub fn open(directory: &Path) -> anyhow::Result<(Self, State)> {
        fs::create_dir_all(directory).with_context(|| format!("create the state directory {}", directory.display()))?;
        let store = Self { directory: directory.to_owned() };
        let state = store.read()?;
        Ok((store, state))
    }

    fn read(&self) -> anyhow::Result<State> {
        let path = self.directory.join(FILE);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::new(Vec::new(), Vec::new())),
            text => text.with_context(|| format!("read the state file {}", path.display()))?,
        };
        let advice = || {
            format!(
                "read the state file {0}, which holds what anyportctl added; repair it, or go on without those \
                 rules: mv {0} {0}.broken",
                path.display()
            )
        };
        let state: State = serde_json::from_slice(&text).with_context(advice)?;
        if state.version != VERSION {
            bail!("{}: its version is {}, and this anyportd knows {VERSION}", advice(), state.version);
        }
        Ok(state)
    }

    /// Replaces the state file: after a crash or a loss of power it holds the old state or the new one.
    ///
    /// # Errors
    /// What could not be written; the old file is still there.
    pub fn save(&self, state: &State) -> anyhow::Result<()> {
        let path = self.directory.join(FILE);
        let aside = self.directory.join(format!("{FILE}.new"));
        let write = || {
            let mut text = serde_json::to_vec_pretty(state)?;
            text.push(b'\n');
            let mut file = File::create(&aside)?;
            file.write_all(&text)?;
            file.sync_all()?;
            anyhow::Ok(fs::rename(&aside, &path)?)
        };
        write().with_context(|| format!("write the state file {}", path.display()))?;
        // The new state is in place; a loss of power could only bring the old one back.
        if let Err(error) = File::open(&self.directory).and_then(|directory| directory.sync_all()) {
            warn!("make sure that the state file in {} outlives a loss of power: {error}", self.directory.display());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{State, Store};

    #[test]
    fn keeps_what_was_saved() {
        let directory = tempfile::tempdir().unwrap();
        let (store, state) = Store::open(&directory.path().join("a/b")).unwrap();
        assert!(state.rules.is_empty());
        let rule = r#"{"prefix": "192.0.2.0/24", "except": "22", "route": false}"#;
        let state = State::new(Vec::new(), vec![serde_json::from_str(rule).unwrap()]);
        store.save(&state).unwrap();
        assert_eq!(Store::open(&directory.path().join("a/b")).unwrap().1, state);
    }

    #[test]
    fn never_drops_what_it_can_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(super::FILE);
        for (text, why) in [
            ("", "EOF"),
            ("{\"version\": 1, \"services\": [], \"rul", "EOF"),
            ("{\"version\": 2, \"services\": [], \"rules\": []}", "its version is 2"),
            ("{\"version\": 1, \"services\": [], \"rules\": [], \"x\": 1}", "unknown field"),
        ] {
            fs::write(&file, text).unwrap();
            let error = format!("{:#}", Store::open(directory.path()).unwrap_err());
            assert!(error.contains(why) && error.contains("mv "), "{error}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
    }
}
