//! What the engine shows of itself.

use std::collections::HashMap;

use anyport_common::{flow::Transport, maps::Counters};

use super::{Engine, past::add};
use crate::{
    api::{BackEndView, ServiceView, StatusView, Totals},
    complaint::Complaint,
    rules::{Decision, RuleRef, RuleSet, ServiceName, decide},
};

impl Engine {
    /// The services by name, without what their rules counted: see [`Sums::add_to_services`].
    pub(super) fn services_themselves(&self) -> Vec<ServiceView> {
        let views = self.services.iter().map(|(_, it)| it).map(|running| {
            let config = running.config().clone();
            let mut stats = running.service().stats();
            stats += self.services.past().of(&config.name).stats;
            ServiceView {
                rules: 0,
                steered: 0,
                no_socket: 0,
                assign_error: 0,
                name: config.name,
                handler: config.handler,
                banner: config.banner,
                owners: config.owners,
                fallback: config.fallback,
                limits: config.limits,
                mark: config.mark,
                source_allow: config.sources.allow().to_vec(),
                source_deny: config.sources.deny().to_vec(),
                origin: running.origin(),
                sockets: self.services.sockets_of(running),
                upstreams: running.service().upstreams(),
                stats,
            }
        });
        views.collect()
    }

    /// The state of the whole, without what rules counted: see [`Sums::add_to_status`].
    pub(super) fn status_itself(&self, unmatched: u64, services: &[ServiceView]) -> StatusView {
        let mut stats = self.services.past().stats_without(|name| self.services.get(name).is_some());
        for service in services {
            stats += service.stats;
        }
        let descriptors = &self.services.context().descriptors;
        let unanswered = self.answers.unanswered();
        StatusView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            backend: self.kernel.back_end(),
            backends: self
                .kernel
                .outcomes()
                .iter()
                .map(|it| BackEndView { name: it.back_end, usable: it.usable, reason: it.reason.clone() })
                .collect(),
            generation: self.kernel.generation(),
            workers: self.services.context().workers.count().get(),
            rules: self.desired.rules().len(),
            max_rules: self.config().max_rules,
            bytes: self.kernel.bytes(),
            services: self.services.iter().len(),
            client_descriptors: descriptors.size(),
            client_descriptors_in_use: descriptors.size() - descriptors.free(),
            interfaces: self.kernel.interfaces(),
            draining: self.kernel.draining(),
            totals: Totals {
                steered: 0,
                dropped: 0,
                denied: stats.denied,
                unmatched,
                active: stats.active,
                refused: stats.refused(),
                listen_drops: stats.listen_drops,
                receive_drops: stats.receive_drops,
                queue_full: unanswered.queue_full,
                no_route: unanswered.no_route,
            },
            unconfirmed: self.unconfirmed_for(),
            mended: self.kernel.repairs(),
            fleet: self.fleet.as_ref().map(|board| board.view()),
            announce: self.config().announce.as_ref().and_then(|config| self.served.view(config)),
            drained: self.drain_views(),
            degraded: self.degraded(),
        }
    }

    pub(super) fn degraded(&self) -> Vec<String> {
        let fleet = self.fleet.iter().flat_map(|board| board.degraded());
        self.degraded_itself().into_iter().chain(fleet).collect()
    }

    /// Without what is wrong with the fleet.
    pub(super) fn degraded_itself(&self) -> Vec<String> {
        let services = self.services.iter().map(|(_, it)| it).flat_map(|running| running.service().degraded());
        let drift = self.kernel.drift(self.config().mend);
        let own = self.kernel.uncertain().chain(self.settings.not_reloaded()).cloned().chain(drift);
        let dropping = self.dropping.faults(self.kernel.back_end());
        let all = own
            .chain(self.kernel.degraded_steering())
            .chain(services)
            .chain(self.services.lost_sockets(self.desired.rules()))
            .chain(dropping);
        let others = self.complaints.iter().filter_map(Complaint::get).chain(self.shadowed_metrics());
        all.chain(self.kept.complaint())
            .chain(others)
            .chain(self.shadow.found().map(str::to_owned))
            .chain(self.answers.fault())
            .chain(self.served.degraded())
            .collect()
    }

    /// Whether a rule takes what is meant for the address of the metrics.
    fn shadowed_metrics(&self) -> Option<String> {
        let metrics = self.config().metrics?;
        let (address, port) = (metrics.ip(), metrics.port());
        match decide(self.desired.rules(), address, Transport::Tcp, port, address) {
            Decision::Steer(rule) => Some(format!(
                "the metrics at {metrics} are out of reach: the rule {} takes what is meant for them; keep the port \
                 with --except {port}",
                rule.to_rule()
            )),
            Decision::Host(_) | Decision::Unmatched => None,
        }
    }
}

/// A rule and what was counted for it.
#[derive(Clone, Copy, Debug)]
pub struct Counted<'a> {
    /// The rule.
    pub rule: RuleRef<'a>,
    /// What became of its packets.
    pub counters: Counters,
    /// What became of those of rules that are gone, of the same prefix, protocol and service.
    pub past: Counters,
}

/// For each service that rules steer to, how many do and what they and those before them counted.
#[derive(Clone, Debug, Default)]
pub(super) struct Sums(HashMap<ServiceName, (usize, Counters)>);

impl Sums {
    /// Reads the counters of all rules, and shows them to `see` in order of precedence.
    pub(super) fn read<'a>(
        rules: &'a RuleSet,
        counters: impl Fn(&RuleRef<'_>) -> Counters,
        mut see: impl FnMut(Counted<'a>),
    ) -> Self {
        let mut sums: HashMap<&ServiceName, (usize, Counters)> = HashMap::new();
        for (prefix, rules) in rules.prefixes() {
            for rule in rules.numbered(*prefix) {
                let (rules, sum) = sums.entry(&rule.terms.service).or_default();
                let counted = Counted { rule, counters: counters(&rule), past: Counters::default() };
                *rules += 1;
                add(sum, &counted.counters);
                see(counted);
            }
        }
        Self(sums.into_iter().map(|(name, sum)| (name.clone(), sum)).collect())
    }

    /// With what was left by rules that are gone.
    pub(super) fn with<'a>(mut self, past: impl IntoIterator<Item = (&'a ServiceName, &'a Counters)>) -> Self {
        for (name, counters) in past {
            add(&mut self.0.entry(name.clone()).or_default().1, counters);
        }
        self
    }

    /// How many rules steer to a service, and what they counted.
    pub(super) fn of(&self, service: &ServiceName) -> (usize, Counters) {
        self.0.get(service).copied().unwrap_or_default()
    }

    /// Adds what rules counted.
    pub(super) fn add_to_status(&self, totals: &mut Totals) {
        for (_, Counters { steered, no_socket, assign_error, denied }) in self.0.values() {
            totals.steered += steered;
            totals.dropped += no_socket + assign_error + denied;
            totals.denied += denied;
        }
    }

    /// Adds what rules counted, and how many they are.
    pub(super) fn add_to_services(&self, services: &mut [ServiceView]) {
        for view in services {
            let (rules, Counters { steered, no_socket, assign_error, denied }) = self.of(&view.name);
            view.rules = rules;
            view.steered += steered;
            view.no_socket += no_socket;
            view.assign_error += assign_error;
            view.stats.denied += denied;
        }
    }
}
