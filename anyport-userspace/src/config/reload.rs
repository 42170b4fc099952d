//! What of a configuration that was read again differs, and what a daemon that runs takes from it.

use super::{ChangesBy, Config, ConfigTable};

/// Settings that differ, as messages show them.
#[derive(Debug, Default)]
struct Differences {
    by_reload: Vec<String>,
    by_restart: Vec<String>,
}

impl Differences {
    /// Adds those of a table, in the order in which they are declared.
    fn add<T: ConfigTable>(&mut self, now: Option<&T>, before: Option<&T>) {
        for setting in T::SETTINGS {
            let [now, before] = [now, before].map(|it| it.map_or_else(|| T::ABSENT.to_owned(), setting.show));
            let differences = match setting.changes_by {
                ChangesBy::Reload => &mut self.by_reload,
                ChangesBy::Restart => &mut self.by_restart,
            };
            if now != before {
                differences.push(format!("{}{}: {before} -> {now}", T::PREFIX, setting.name));
            }
        }
    }
}

/// Takes over what reload changes.
fn take<T: ConfigTable>(table: &mut T, other: &T) {
    for setting in T::SETTINGS.iter().filter(|it| it.changes_by == ChangesBy::Reload) {
        (setting.take)(table, other);
    }
}

impl Config {
    /// What differs from the previous settings, as text: what can change while the daemon runs, and what takes a restart.
    pub fn differences(&self, previous: &Self) -> (Vec<String>, Vec<String>) {
        let mut differences = Differences::default();
        differences.add(Some(&self.daemon), Some(&previous.daemon));
        differences.add(self.announce.as_ref(), previous.announce.as_ref());
        #[cfg(feature = "fleet")]
        differences.add(self.fleet_settings(), previous.fleet_settings());
        (differences.by_reload, differences.by_restart)
    }

    /// Takes over what can change while the daemon runs, see [`Self::differences`].
    pub fn take_live(&mut self, other: &Self) {
        take(&mut self.daemon, &other.daemon);
        // Whether there is such a table at all takes a restart.
        #[cfg(feature = "fleet")]
        if let (Some(fleet), Some(other)) = (&mut self.fleet, &other.fleet) {
            take(&mut fleet.settings, &other.settings);
        }
        if let (Some(announce), Some(other)) = (&mut self.announce, &other.announce) {
            take(announce, other);
        }
    }

    #[cfg(feature = "fleet")]
    fn fleet_settings(&self) -> Option<&super::FleetSettings> {
        self.fleet.as_ref().map(|fleet| &fleet.settings)
    }
}
