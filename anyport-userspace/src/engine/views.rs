//! What the engine shows of itself.

use std::{collections::HashMap, sync::Arc};

use anyhow::Context as _;
use anyport_common::{flow::Transport, maps::Counters};

use super::{Engine, desired::Desired, kernel::Kernel};
use crate::{
    api::{BackEndView, ListPrefixes, PrefixView, Problem, ServiceView, StatusView, Totals},
    rules::{Decision, Prefix, PrefixRules, RuleRef, RuleSpec, ServiceName, decide},
    service::ServiceStats,
};

impl Engine {
    /// The rules in order of precedence, with what became of their packets: an array of [`PrefixView`].
    ///
    /// # Errors
    /// The counters can't be read.
    pub fn prefixes(&self, query: &ListPrefixes) -> Result<String, Problem> {
        let counters = self.kernel.counters()?;
        let ListPrefixes { within, service, port, after, limit } = query;
        let is_listed = |rule: &RuleRef<'_>| {
            service.as_ref().is_none_or(|it| rule.terms.service == *it)
                && port.is_none_or(|it| rule.terms.ports.contains(it.get()) || rule.terms.except.contains(it.get()))
        };
        let prefixes: Box<dyn Iterator<Item = (Prefix, &PrefixRules)>> = match within {
            Some(within) => Box::new(self.desired.rules().within(*within)),
            None => Box::new(self.desired.rules().prefixes().map(|(prefix, rules)| (*prefix, rules))),
        };
        let rules = prefixes
            .filter(|(prefix, _)| after.is_none_or(|after| *prefix > after))
            .flat_map(|(prefix, rules)| rules.numbered(prefix));
        // Many rules say the same, which becomes text once.
        let mut texts: HashMap<*const RuleSpec, [String; 2]> = HashMap::new();
        let mut json = Vec::from(b"[");
        for rule in rules.filter(is_listed).take(limit.unwrap_or(usize::MAX)) {
            let RuleSpec { protocol, ports, except, source, service, route } = &**rule.terms;
            let [ports, except] =
                texts.entry(Arc::as_ptr(rule.terms)).or_insert_with(|| [ports.to_string(), except.to_string()]);
            let Counters { steered, no_socket, assign_error, denied } = counters(rule.number);
            let (prefix, source) = (rule.prefix.to_string(), source.map(|it| it.to_string()));
            let view = PrefixView {
                prefix: &prefix,
                protocol: *protocol,
                ports,
                except,
                source: source.as_deref(),
                service: service.as_str(),
                route: *route,
                origin: rule.origins.first(),
                steered,
                dropped: no_socket + assign_error + denied,
                no_socket,
                denied,
                drained: self.desired.drains().include(&rule.prefix, rule.terms),
            };
            if json.len() > 1 {
                json.push(b',');
            }
            serde_json::to_writer(&mut json, &view).context("write the rules as JSON")?;
        }
        json.push(b']');
        Ok(String::from_utf8(json).context("write the rules as JSON")?)
    }

    /// The services by name.
    ///
    /// # Errors
    /// The counters can't be read.
    pub fn services(&self) -> Result<Vec<ServiceView>, Problem> {
        Ok(self.services_with(&self.sums(|_| ())?))
    }

    pub(super) fn services_with(&self, sums: &Sums<'_>) -> Vec<ServiceView> {
        let views = self.services.iter().map(|(_, it)| it).map(|running| {
            let (config, stats) = (running.config().clone(), running.service().stats());
            let (rules, counters) = sums.of(&config.name);
            ServiceView {
                rules,
                steered: counters.steered,
                no_socket: counters.no_socket,
                assign_error: counters.assign_error,
                name: config.name,
                handler: config.handler,
                banner: config.banner,
                owners: config.owners,
                fallback: config.fallback,
                limits: config.limits,
                source_allow: config.sources.allow().to_vec(),
                source_deny: config.sources.deny().to_vec(),
                origin: running.origin(),
                sockets: self.services.sockets_of(running),
                upstreams: running.service().upstreams(),
                stats: ServiceStats { denied: stats.denied + counters.denied, ..stats },
            }
        });
        views.collect()
    }

    /// The state of the whole.
    ///
    /// # Errors
    /// The counters can't be read.
    pub fn status(&self) -> Result<StatusView, Problem> {
        self.status_with(&self.sums(|_| ())?)
    }

    pub(super) fn status_with(&self, Sums(sums): &Sums<'_>) -> Result<StatusView, Problem> {
        let stats: Vec<_> = self.services.iter().map(|(_, it)| it).map(|running| running.service().stats()).collect();
        let descriptors = &self.services.context().descriptors;
        Ok(StatusView {
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
                steered: sums.values().map(|(_, it)| it.steered).sum(),
                dropped: sums.values().map(|(_, it)| it.no_socket + it.assign_error + it.denied).sum(),
                denied: stats.iter().map(|it| it.denied).chain(sums.values().map(|(_, it)| it.denied)).sum(),
                unmatched: self.kernel.unmatched()?,
                active: stats.iter().map(|it| it.active).sum(),
                refused: stats.iter().map(ServiceStats::refused).sum(),
                listen_drops: stats.iter().map(|it| it.listen_drops).sum(),
                receive_drops: stats.iter().map(|it| it.receive_drops).sum(),
            },
            unconfirmed: self.unconfirmed_for(),
            mended: self.kernel.repairs(),
            fleet: self.fleet.as_ref().map(|board| board.view()),
            announce: self.config().announce.as_ref().and_then(|config| self.served.view(config)),
            drained: self.drain_views(),
            degraded: self.degraded(),
        })
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
        all.chain(self.shadowed_metrics()).chain(self.served.degraded()).collect()
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

    /// What the rules have counted, see [`Sums::read`].
    pub(super) fn sums<'a>(&'a self, see: impl FnMut(Counted<'a>)) -> Result<Sums<'a>, Problem> {
        Ok(Sums::read(&self.desired, &self.kernel, see)?)
    }
}

/// A rule and what was counted for it.
#[derive(Clone, Copy, Debug)]
pub struct Counted<'a> {
    /// The rule.
    pub rule: RuleRef<'a>,
    /// What became of its packets.
    pub counters: Counters,
}

/// For each service that rules steer to, how many do and what they counted.
pub(super) struct Sums<'a>(HashMap<&'a ServiceName, (usize, Counters)>);

impl<'a> Sums<'a> {
    /// Reads the counters of all rules, and shows them to `see` in order of precedence.
    pub(super) fn read(
        desired: &'a Desired,
        kernel: &'a Kernel,
        mut see: impl FnMut(Counted<'a>),
    ) -> anyhow::Result<Self> {
        let counters = kernel.counters()?;
        let mut sums: HashMap<&ServiceName, (usize, Counters)> = HashMap::new();
        for (prefix, rules) in desired.rules().prefixes() {
            for rule in rules.numbered(*prefix) {
                let (rules, sum) = sums.entry(&rule.terms.service).or_default();
                let counted = Counted { rule, counters: counters(rule.number) };
                *rules += 1;
                add(sum, &counted.counters);
                see(counted);
            }
        }
        Ok(Self(sums))
    }

    /// How many rules steer to a service, and what they counted.
    pub(super) fn of(&self, service: &ServiceName) -> (usize, Counters) {
        self.0.get(service).copied().unwrap_or_default()
    }
}

fn add(sum: &mut Counters, Counters { steered, no_socket, assign_error, denied }: &Counters) {
    sum.steered += steered;
    sum.no_socket += no_socket;
    sum.assign_error += assign_error;
    sum.denied += denied;
}
