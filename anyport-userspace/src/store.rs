//! What `anyportctl` added and applied, kept in the state directory.

use std::{
    collections::HashMap,
    fmt::Write as _,
    fs::{self, File},
    io::{self, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail};
use anyport_common::maps::Counters;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    rules::{
        Origin, Prefix, Rule, RuleText, ServiceName, Terms,
        lines::{self, Line},
    },
    service::ServiceConfig,
};

const FILE: &str = "state.json";
const VERSION: u32 = 1;
/// Beginning and end of the name of the file with the rules that were applied. The state file names it, so that both
/// change at once.
const APPLIED: &str = "applied-";
const LINES: &str = ".rules";
const COUNTERS: &str = "counters";
const REGISTERED: &str = "registered.json";

/// The state directory of a daemon.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    /// The file with the rules that were applied, if there are any.
    applied: Option<String>,
}

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Services that were added by hand.
    pub services: Vec<ServiceConfig>,
    /// Rules that were added by hand.
    pub rules: Vec<Rule>,
    /// Services that were applied from a file.
    pub applied_services: Vec<ServiceConfig>,
    /// Rules that were applied from a file.
    pub applied_rules: Vec<Rule>,
}

/// A socket that was registered, as it is found again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSocket {
    /// Who receives.
    pub service: ServiceName,
    /// Its places among the service's sockets.
    pub places: Vec<usize>,
    /// The kernel's name for it, which no other socket of the same boot has.
    pub cookie: u64,
    /// Its inode.
    pub inode: u64,
    /// Where it is bound.
    pub local: SocketAddr,
}

/// The file with the sockets that were registered.
#[derive(Serialize, Deserialize)]
struct RegisteredFile {
    boot: String,
    sockets: Vec<KeptSocket>,
}

/// The state file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile {
    version: u32,
    services: Vec<ServiceConfig>,
    rules: Vec<RuleText>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    applied_services: Vec<ServiceConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    applied: Option<String>,
}

impl Store {
    /// Creates the directory where it is missing, and reads what is there.
    ///
    /// # Errors
    /// The directory can't be made, or a file is not one of ours. It is left as it is.
    pub fn open(directory: &Path) -> anyhow::Result<(Self, State)> {
        fs::create_dir_all(directory).with_context(|| format!("create the state directory {}", directory.display()))?;
        let mut store = Self { directory: directory.to_owned(), applied: None };
        let state = store.read()?;
        store.remove_unused();
        Ok((store, state))
    }

    /// Reads what is there, and changes nothing.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn look(directory: &Path) -> anyhow::Result<State> {
        Self { directory: directory.to_owned(), applied: None }.read()
    }

    fn read(&mut self) -> anyhow::Result<State> {
        let path = self.directory.join(FILE);
        let text = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::default()),
            text => text.with_context(|| format!("read the state file {}", path.display()))?,
        };
        let advice = || {
            format!(
                "read the state file {0}, which holds what anyportctl added and applied; repair it, or go on without \
                 those rules: mv {0} {0}.broken",
                path.display()
            )
        };
        let file: StateFile = serde_json::from_slice(&text).with_context(advice)?;
        if file.version != VERSION {
            bail!("{}: its version is {}, and this anyportd knows {VERSION}", advice(), file.version);
        }
        let mut state = State {
            services: file.services,
            rules: file.rules.into_iter().map(|rule| rule.into_rule(Origin::Added)).collect(),
            applied_services: file.applied_services,
            applied_rules: Vec::new(),
        };
        if let Some(applied) = file.applied {
            state.applied_rules = self.read_applied(&applied).with_context(advice)?;
            self.applied = Some(applied);
        }
        Ok(state)
    }

    fn read_applied(&self, name: &str) -> anyhow::Result<Vec<Rule>> {
        let path = self.directory.join(name);
        let attempt = || format!("read the rules that were applied, {}", path.display());
        let text = fs::read_to_string(&path).with_context(attempt)?;
        let rules = lines::parse(&text, Arc::new).with_context(attempt)?;
        let origins = Origin::Applied.into();
        Ok(rules.into_iter().map(|((prefix, terms), _)| Rule { prefix, terms, origins }).collect())
    }

    /// Replaces what is kept of the services and of the rules that were added by hand: after a crash or a loss of power
    /// the old state is there or the new one. The rules that were applied stay as they are kept, unless new lines of
    /// them are given.
    ///
    /// # Errors
    /// What could not be written; the old state is still there.
    pub fn save(&mut self, state: &State, applied: Option<&str>) -> anyhow::Result<()> {
        let before = self.applied.clone();
        let now = match applied {
            None => before.clone(),
            Some("") => None,
            Some(lines) => {
                let number = before.as_ref().and_then(|name| number_of(name)).unwrap_or_default();
                let name = format!("{APPLIED}{}{LINES}", number.wrapping_add(1));
                self.replace(&name, lines.as_bytes())?;
                Some(name)
            }
        };
        let file = StateFile {
            version: VERSION,
            services: state.services.clone(),
            rules: state.rules.iter().map(RuleText::from).collect(),
            applied_services: state.applied_services.clone(),
            applied: now.clone(),
        };
        let mut text = serde_json::to_vec_pretty(&file).context("write the state")?;
        text.push(b'\n');
        self.replace(FILE, &text)?;
        self.applied = now;
        if self.applied != before {
            self.remove_unused();
        }
        Ok(())
    }

    /// Keeps what was counted for rules, for a daemon that comes later.
    ///
    /// # Errors
    /// What could not be written.
    pub fn save_counters(&self, counted: impl Iterator<Item = (Prefix, Arc<Terms>, Counters)>) -> anyhow::Result<()> {
        let mut text = String::new();
        for (prefix, terms, Counters { steered, no_socket, assign_error, denied }) in counted {
            let _ = writeln!(text, "{steered} {no_socket} {assign_error} {denied} {}", Line(&prefix, &terms));
        }
        self.replace(COUNTERS, text.as_bytes())
    }

    /// What was counted when that was kept last, by prefix. Counters are no reason not to start, so what can't be read is
    /// passed over.
    pub fn counters(&self) -> HashMap<Prefix, Vec<(Arc<Terms>, Counters)>> {
        let text = fs::read_to_string(self.directory.join(COUNTERS)).unwrap_or_default();
        let mut counted: HashMap<Prefix, Vec<_>> = HashMap::new();
        for line in text.lines() {
            let Some((counters, rule)) = read_counters(line) else { continue };
            let Ok(rules) = lines::parse(rule, Arc::new) else { continue };
            for ((prefix, terms), _) in rules {
                counted.entry(prefix).or_default().push((terms, counters));
            }
        }
        counted
    }

    /// Keeps which sockets were registered, for a daemon that comes later in the same boot.
    ///
    /// # Errors
    /// What could not be written.
    pub fn save_registered(&self, boot: &str, sockets: Vec<KeptSocket>) -> anyhow::Result<()> {
        let file = RegisteredFile { boot: boot.to_owned(), sockets };
        self.replace(REGISTERED, &serde_json::to_vec(&file).context("write the sockets that were registered")?)
    }

    /// The sockets that were registered earlier in this boot. Their owners can register again, so what can't be read is
    /// passed over.
    pub fn registered(&self, boot: &str) -> Vec<KeptSocket> {
        let text = fs::read(self.directory.join(REGISTERED)).unwrap_or_default();
        let file = serde_json::from_slice::<RegisteredFile>(&text).ok().filter(|file| file.boot == boot);
        file.map(|file| file.sockets).unwrap_or_default()
    }

    fn replace(&self, name: &str, text: &[u8]) -> anyhow::Result<()> {
        let path = self.directory.join(name);
        let aside = self.directory.join(format!("{name}.new"));
        let write = || {
            let mut file = File::create(&aside)?;
            file.write_all(text)?;
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

    /// Removes files of rules that no state file names any more.
    fn remove_unused(&self) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let is_old =
                name.to_str().is_some_and(|name| number_of(name).is_some() && self.applied.as_deref() != Some(name));
            if is_old && let Err(error) = fs::remove_file(entry.path()) {
                warn!("remove the file {}, which is not needed any more: {error}", entry.path().display());
            }
        }
    }
}

/// The number in the name of a file with rules that were applied.
fn number_of(name: &str) -> Option<u64> {
    name.strip_prefix(APPLIED)?.strip_suffix(LINES)?.parse().ok()
}

/// Reads what was counted for a rule, and leaves the rule.
fn read_counters(line: &str) -> Option<(Counters, &str)> {
    let mut words = line.splitn(5, ' ');
    let mut number = || words.next()?.parse().ok();
    let counters = Counters { steered: number()?, no_socket: number()?, assign_error: number()?, denied: number()? };
    Some((counters, words.next()?))
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::Arc};

    use anyport_common::maps::Counters;

    use super::{KeptSocket, Line, State, Store};
    use crate::rules::{Origin, RuleText, Terms};

    #[test]
    fn keeps_what_was_saved() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let (mut store, state) = Store::open(&path).unwrap();
        assert_eq!(state, State::default());
        let rule = r#"{"prefix": "192.0.2.0/24", "except": "22", "route": false}"#;
        let rule = |origin| serde_json::from_str::<RuleText>(rule).unwrap().into_rule(origin);
        let mut state = State { rules: vec![rule(Origin::Added)], ..State::default() };
        store.save(&state, None).unwrap();
        assert_eq!(Store::open(&path).unwrap().1, state);
        let applied = rule(Origin::Applied);
        for _ in 0..2 {
            store.save(&state, Some(&Line(&applied.prefix, &applied.terms).to_string())).unwrap();
            state.applied_rules = vec![applied.clone()];
            assert_eq!(Store::open(&path).unwrap().1, state);
            assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
            store.save(&state, None).unwrap();
            assert_eq!(Store::open(&path).unwrap().1, state);
        }
        store.save(&state, Some("")).unwrap();
        state.applied_rules.clear();
        assert_eq!(Store::open(&path).unwrap().1, state);
        assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
    }

    #[test]
    fn counters_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(directory.path()).unwrap();
        let prefix = "192.0.2.0/24".parse().unwrap();
        let counters = Counters { steered: 7, no_socket: 8, assign_error: 9, denied: 10 };
        let terms = Terms { except: "22".parse().unwrap(), ..Terms::default() };
        store.save_counters([(prefix, Arc::new(terms.clone()), counters)].into_iter()).unwrap();
        assert_eq!(store.counters()[&prefix], [(Arc::new(terms), counters)]);
        store.save_counters(std::iter::empty()).unwrap();
        assert!(store.counters().is_empty());
    }

    #[test]
    fn registered_sockets_are_those_of_this_boot() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(directory.path()).unwrap();
        assert!(store.registered("a").is_empty());
        let (service, local) = ("web".parse().unwrap(), "127.0.0.1:80".parse().unwrap());
        let socket = KeptSocket { service, places: vec![0, 2], cookie: 7, inode: 8, local };
        store.save_registered("a", vec![socket.clone()]).unwrap();
        assert_eq!(store.registered("a"), [socket]);
        assert!(store.registered("b").is_empty());
        fs::write(directory.path().join(super::REGISTERED), "{").unwrap();
        assert!(store.registered("a").is_empty());
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
