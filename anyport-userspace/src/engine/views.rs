//! What the engine tells of itself.

use anyport_common::maps::Counters;

use super::Engine;
use crate::{
    api::{BackEndView, PrefixView, Problem, ServiceView, StatusView, Totals},
    rules::Rule,
};

impl Engine {
    /// The rules in order of precedence, with what became of their packets.
    ///
    /// # Errors
    /// The counters can't be read.
    pub fn prefixes(&mut self) -> Result<Vec<PrefixView>, Problem> {
        let counters = self.counters_by_rule()?;
        let views = self.rules.iter().zip(counters).map(|(rule, counters)| {
            let Rule { prefix, protocol, ports, except, service, route, origin } = rule.clone();
            let dropped = counters.no_socket + counters.assign_error;
            let steered = counters.steered;
            PrefixView { prefix, protocol, ports, except, service, route, origin, steered, dropped }
        });
        Ok(views.collect())
    }

    /// The services by name.
    pub fn services(&self) -> Vec<ServiceView> {
        let views = self.services.values().map(|running| {
            let config = running.service.config().clone();
            ServiceView {
                rules: self.rules.iter().filter(|rule| rule.service == config.name).count(),
                name: config.name,
                handler: config.handler,
                banner: config.banner,
                origin: running.origin,
                sockets: running.service.sockets().to_vec(),
                stats: running.service.stats(),
            }
        });
        views.collect()
    }

    /// The state of the whole.
    ///
    /// # Errors
    /// The counters can't be read.
    pub fn status(&mut self) -> Result<StatusView, Problem> {
        let counters = self.counters_by_rule()?;
        let mut draining: Vec<_> = self.draining.iter().copied().collect();
        draining.sort_by_key(|prefix| (!prefix.is_ipv4(), prefix.bounds()));
        Ok(StatusView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            backend: self.steering.back_end(),
            backends: self
                .outcomes
                .iter()
                .map(|it| BackEndView { name: it.back_end, usable: it.usable, reason: it.reason.clone() })
                .collect(),
            generation: self.generation,
            workers: self.commons.workers.get(),
            rules: self.rules.len(),
            services: self.services.len(),
            interfaces: self.steering.interfaces(),
            draining,
            totals: Totals {
                steered: counters.iter().map(|it| it.steered).sum(),
                dropped: counters.iter().map(|it| it.no_socket + it.assign_error).sum(),
                active: self.services.values().map(|it| it.service.stats().active).sum(),
            },
            degraded: self.broken.iter().cloned().chain(self.steering.degraded()).collect(),
        })
    }

    /// In the order of the rules.
    fn counters_by_rule(&mut self) -> Result<Vec<Counters>, Problem> {
        let counters = self.steering.counters()?;
        let numbers = self.rules.iter().map(|rule| self.rule_numbers.get(rule));
        Ok(numbers.map(|number| number.and_then(|it| counters.get(&it)).copied().unwrap_or_default()).collect())
    }
}
