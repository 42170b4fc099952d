//! What `anyportctl` asks for.

use super::{Engine, difference::conflict_problem, kept::Keep, services::expect_fallbacks};
use crate::{
    api::{AddPrefixes, Changed, Problem, ProblemKind, RemovePrefixes},
    rules::{Change, Draft, Origin, Prefix, Rule, RuleSpec, ServiceName},
    service::ServiceConfig,
};

impl Engine {
    /// Adds a rule for each prefix, or none.
    ///
    /// # Errors
    /// See [`ProblemKind`]. Nothing has changed.
    pub async fn add_prefixes(&mut self, request: AddPrefixes) -> Result<Changed, Problem> {
        let AddPrefixes { prefixes, protocol, ports, except, source, service, route, force } = request;
        if prefixes.is_empty() {
            return Err(Problem::new(ProblemKind::Invalid, "add prefixes: there are none in the request"));
        }
        self.expect_confirmed()?;
        self.services.expect(&service)?;
        let terms = self.desired.shared(RuleSpec { protocol, ports, except, source, service, route });
        let mut draft = Draft::of(self.desired.rules());
        let mut added = 0;
        for prefix in prefixes {
            terms.validate(&prefix).map_err(|error| Problem::new(ProblemKind::Invalid, error.to_string()))?;
            let rule = Rule { prefix, terms: terms.clone(), origins: Origin::Added.into() };
            if draft.prefix(prefix).insert(&rule).map_err(|conflict| conflict_problem(&conflict))? {
                added += 1;
            }
        }
        let change = draft.finish();
        self.expect_room_for(&change, self.config().max_rules)?;
        if !force {
            self.expect_safe(&change).await?;
        }
        if !change.is_empty() {
            self.change(change, Keep::OnDisk).await?;
        }
        Ok(self.changed(added, self.kernel.notes_on_routes()))
    }

    /// Removes the rules that the request selects.
    ///
    /// # Errors
    /// See [`ProblemKind`]; a prefix without such a rule is one. Nothing has changed.
    pub async fn remove_prefixes(&mut self, request: RemovePrefixes) -> Result<Changed, Problem> {
        if request.prefixes.is_empty() {
            return Err(Problem::new(ProblemKind::Invalid, "remove prefixes: there are none in the request"));
        }
        self.expect_confirmed()?;
        let mut draft = Draft::of(self.desired.rules());
        let mut removed: Vec<Rule> = Vec::new();
        for prefix in &request.prefixes {
            let gone = draft.prefix(*prefix).remove(|held| request.selects(&held.terms));
            if gone.is_empty() && !removed.iter().any(|rule| rule.prefix == *prefix) {
                let of_prefix = self.desired.rules().of_prefix(prefix);
                let rules: Vec<String> =
                    of_prefix.iter().flat_map(|it| it.iter()).map(|it| it.terms.to_string()).collect();
                let hint = if rules.is_empty() {
                    "anyportctl prefixes lists the rules".to_owned()
                } else {
                    format!("its rules are: {}", rules.join("; "))
                };
                return Err(Problem::new(ProblemKind::NotFound, format!("{prefix} has no such rule")).hint(hint));
            }
            let gone = gone.into_iter().map(|it| Rule { prefix: *prefix, terms: it.terms, origins: it.origins });
            removed.extend(gone);
        }
        expect_not_of_fleet(&removed)?;
        let change = draft.finish();
        self.change(change, Keep::OnDisk).await?;
        let of = |origin| removed.iter().find(move |rule| rule.origins.contains(origin));
        let config =
            of(Origin::Config).map(|rule| format!("{rule} is in the configuration and comes back with the next start"));
        let applied = of(Origin::Applied)
            .map(|rule| format!("{rule} was applied from a file and comes back when that is applied again"));
        Ok(self.changed(removed.len(), config.into_iter().chain(applied).collect()))
    }

    /// Opens a new service's sockets.
    ///
    /// # Errors
    /// See [`ProblemKind`]; another service of that name is one.
    pub async fn add_service(&mut self, config: ServiceConfig) -> Result<Changed, Problem> {
        config
            .validate()
            .and_then(|()| config.expect_owners())
            .map_err(|error| Problem::new(ProblemKind::Invalid, error.to_string()))?;
        if let Some(running) = self.services.get(&config.name) {
            return if *running.config() == config {
                Ok(self.changed(0, Vec::new()))
            } else {
                Err(Problem::new(
                    ProblemKind::Conflict,
                    format!("there is a service {} with other settings", config.name),
                )
                .hint("anyportctl services lists the services; remove it first, or use another name"))
            };
        }
        self.expect_confirmed()?;
        self.services.expect_enforceable(&config)?;
        expect_fallbacks(&self.services.configs().chain([&config]).collect::<Vec<_>>())?;
        let name = config.name.clone();
        self.open_service(config, Origin::Added)?;
        if let Err(problem) = self.change(Change::default(), Keep::OnDisk).await {
            if let Some(running) = self.services.take(&name) {
                self.close_service(running).await;
            }
            self.repair().await;
            return Err(problem);
        }
        Ok(self.changed(1, Vec::new()))
    }

    /// Closes a service that no rule steers to. Its connections go on until they end.
    ///
    /// # Errors
    /// See [`ProblemKind`]; that a rule steers to it is one.
    pub async fn remove_service(&mut self, name: ServiceName) -> Result<Changed, Problem> {
        self.services.expect(&name)?;
        self.expect_confirmed()?;
        let users = || self.desired.rules().iter().filter(|rule| rule.terms.service == name);
        if let Some(first) = users().next() {
            let (first, count) = (first.to_rule(), users().count());
            return Err(Problem::new(
                ProblemKind::Conflict,
                format!("{count} rules steer to the service {name}, the first is: {first}"),
            )
            .hint("remove those prefixes first, or steer them to another service"));
        }
        expect_fallbacks(&self.services.configs().filter(|it| it.name != name).collect::<Vec<_>>())?;
        if self.services.get(&name).is_some_and(|running| running.origin() == Origin::Fleet) {
            return Err(of_fleet(&format!("the service {name}")));
        }
        let Some(removed) = self.services.take(&name) else {
            return Err(Problem::new(ProblemKind::Failed, format!("the service {name} went away")));
        };
        let notes = match removed.origin() {
            Origin::Config => vec![format!("{name} comes back with the next start, as configured")],
            Origin::Applied => {
                vec![format!("{name} was applied from a file and comes back when that is applied again")]
            }
            Origin::Fleet | Origin::Added | Origin::Host => Vec::new(),
        };
        if let Err(problem) = self.change(Change::default(), Keep::OnDisk).await {
            self.services.put_back([(name, removed)]);
            self.repair().await;
            return Err(problem);
        }
        self.close_service(removed).await;
        Ok(self.changed(1, notes))
    }

    pub(super) fn changed(&self, changed: usize, notes: Vec<String>) -> Changed {
        Changed { generation: self.kernel.generation(), changed, notes }
    }

    pub(super) fn expect_room_for(&self, change: &Change, limit: usize) -> Result<(), Problem> {
        let count = |rules: &[(Prefix, _)]| {
            rules.iter().map(|(_, it): &(_, crate::rules::PrefixRules)| it.len()).sum::<usize>()
        };
        let rules = self.desired.rules().len() + count(&change.added) - count(&change.removed);
        if rules <= limit || rules <= self.desired.rules().len() {
            return Ok(());
        }
        Err(Problem::new(ProblemKind::Failed, format!("there would be {rules} rules; the limit is {limit}"))
            .hint("use shorter prefixes or fewer, or raise max-rules in the section [daemon] of the configuration"))
    }
}

/// What the fleet holds goes with the fleet alone: a node that says that it has a set has all of it.
fn expect_not_of_fleet(removed: &[Rule]) -> Result<(), Problem> {
    match removed.iter().find(|rule| rule.origins.contains(Origin::Fleet)) {
        Some(rule) => Err(of_fleet(&format!("the rule {rule}"))),
        None => Ok(()),
    }
}

fn of_fleet(what: &str) -> Problem {
    Problem::new(
        ProblemKind::Conflict,
        format!("{what} is in the fleet's set, which this node has whole or not at all"),
    )
    .hint("publish a set without it; for this node alone, add a rule for a longer prefix or fewer ports")
}
