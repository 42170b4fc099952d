//! The configuration is read again, with the same care with which a file is applied.

use std::time::SystemTime;

use tracing::{error, warn};

use super::{
    Engine,
    difference::{difference, expect_unused},
    kept::Keep,
    services::expect_fallbacks,
};
use crate::{
    api::{Applied, Problem, ProblemKind, Reload, Reloaded},
    config::{Config, LogLevel},
    events::Author,
    logging,
    rules::{Origin, RuleSpec, ServiceName, lines::LineRule},
    service::ServiceConfig,
};

/// The settings of the configuration.
#[derive(Debug)]
pub(super) struct Settings {
    /// Without services and rules.
    config: Config,
    /// Why the configuration was not taken when it was read again last.
    not_reloaded: Option<String>,
}

impl Settings {
    /// Those of this configuration.
    pub(super) fn new(config: &Config) -> Self {
        Self { config: config.without_tables(), not_reloaded: None }
    }

    /// The settings that are active.
    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    /// Why the configuration was not taken when it was read again last.
    pub(super) fn not_reloaded(&self) -> Option<&String> {
        self.not_reloaded.as_ref()
    }
}

impl Engine {
    /// Makes services, rules and what else can change while the daemon runs equal to the configuration file as it is now.
    ///
    /// # Errors
    /// See [`ProblemKind`]. Nothing has changed.
    pub async fn reload(&mut self, options: &Reload) -> Result<Reloaded, Problem> {
        if !options.dry_run {
            self.expect_confirmed()?;
        }
        let config =
            self.config().read_again().map_err(|error| Problem::new(ProblemKind::Invalid, format!("{error:#}")))?;
        let reloaded = self.reload_from(&config, options).await?;
        if !options.dry_run {
            self.settings.not_reloaded = None;
            logging::set_level(config.log_level);
            self.settings.config.take_live(&config);
            self.served.forget_needs();
        }
        Ok(reloaded)
    }

    /// As [`Self::reload`], for a user who sees only the log and the status.
    pub async fn reload_on_signal(&mut self) {
        match self.reload(&Reload::default()).await {
            Ok(Reloaded { added, removed, services, settings, takes_restart, .. }) => {
                let what = format!(
                    "the configuration was read again: {added} rules added, {removed} removed, services: [{}], settings: [{}]",
                    services.join(", "),
                    settings.join(", ")
                );
                self.record(Author::other("SIGHUP"), "reload", what);
                for setting in takes_restart {
                    warn!("takes a restart: {setting}");
                }
            }
            Err(Problem { error, .. }) => {
                error!("the configuration was not taken, and nothing has changed: {error}");
                let at = humantime::format_rfc3339_seconds(SystemTime::now());
                self.settings.not_reloaded =
                    Some(format!("the configuration was read again at {at} and not taken: {error}"));
            }
        }
    }

    /// The settings that are active.
    pub fn config(&self) -> &Config {
        self.settings.config()
    }

    async fn reload_from(&mut self, config: &Config, options: &Reload) -> Result<Reloaded, Problem> {
        let mut answer = Applied { dry_run: options.dry_run, ..Applied::default() };
        let (opened, closed) = self.services.steps(self.configured(config), Origin::Config, &mut answer)?;
        let rules: Vec<(LineRule, u32)> = config
            .rules
            .iter()
            .map(|rule| ((rule.prefix, self.desired.shared(RuleSpec::clone(rule.terms))), 0))
            .collect();
        self.services.expect_for(&rules, &opened, &closed)?;
        let goes = |name: &ServiceName| closed.contains(name) || opened.iter().any(|it| it.name == *name);
        expect_fallbacks(&self.services.configs().filter(|it| !goes(&it.name)).chain(&opened).collect::<Vec<_>>())?;
        let change = difference(self.desired.rules(), &rules, Origin::Config, false, &mut answer)?;
        expect_unused(self.desired.rules(), &closed, &change)?;
        self.expect_room_for(&change, config.max_rules)?;
        if !options.force {
            self.expect_safe(&change).await?;
            self.expect_most_stay(&change, &[Origin::Config], &mut answer)?;
        }
        let (settings, takes_restart) = config.differences(self.config());
        if crosses_debug(config.log_level, self.config().log_level) {
            answer.notes.push("from the next start on the BPF programs log as much".into());
        }
        let is_same = change.is_empty() && opened.is_empty() && closed.is_empty();
        if !(options.dry_run || is_same) {
            let replaced = self.replace_services(opened, &closed, Origin::Config).await?;
            let adopted = self.adopt(config);
            if let Err(problem) = self.change(change, Keep::OnDisk).await {
                self.give_back(adopted);
                self.put_back(replaced).await;
                self.repair().await;
                return Err(problem);
            }
            self.close_replaced(replaced).await;
            answer.notes.extend(self.kernel.notes_on_routes());
        }
        let Applied { dry_run, added, removed, unchanged, services, difference, notes, .. } = answer;
        let generation = self.kernel.generation();
        Ok(Reloaded {
            dry_run,
            generation,
            added,
            removed,
            unchanged,
            services,
            settings,
            takes_restart,
            difference,
            notes,
        })
    }

    /// The services of the configuration, with the one that is there when nobody has made one of its name.
    fn configured(&self, config: &Config) -> Vec<ServiceConfig> {
        let mut services = config.services.clone();
        let default = ServiceConfig::default_service();
        let is_others = |name| self.services.get(name).is_some_and(|running| running.origin() != Origin::Config);
        if !services.iter().any(|it| it.name == default.name) && !is_others(&default.name) {
            services.push(default);
        }
        services
    }

    /// Services that are in the configuration by now come from there. Returns where they came from before.
    fn adopt(&mut self, config: &Config) -> Vec<(ServiceName, Origin)> {
        let mut adopted = Vec::new();
        for ServiceConfig { name, .. } in &config.services {
            let before = self.services.change_origin(name, Origin::Config);
            adopted.extend(before.map(|origin| (name.clone(), origin)));
        }
        adopted
    }

    fn give_back(&mut self, adopted: Vec<(ServiceName, Origin)>) {
        for (name, origin) in adopted {
            self.services.change_origin(&name, origin);
        }
    }
}

/// Whether the BPF programs log with one level, and not with the other.
fn crosses_debug(one: LogLevel, other: LogLevel) -> bool {
    (one >= LogLevel::Debug) != (other >= LogLevel::Debug)
}
