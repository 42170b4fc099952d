//! A snapshot of what the engine knows, for metrics and the page of `observe`.

use anyport_common::maps::Counters;

use super::{Counted, Engine, views::Sums};
use crate::{
    api::{Problem, ServiceView, StatusView},
    service::{ConnectionTimes, HandlerKind, UpstreamState},
};

/// What the engine knows at a moment, for monitoring.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The state of the whole.
    pub status: StatusView,
    /// The services by name.
    pub services: Vec<ObservedService>,
    /// Descriptors for what clients bring about.
    pub descriptors: usize,
    /// How many of them are free.
    pub free_descriptors: usize,
    /// Why clients had better go elsewhere.
    pub unready: Option<String>,
}

/// A service as it was at a moment.
#[derive(Clone, Debug)]
pub struct ObservedService {
    /// What `services` shows of it.
    pub view: ServiceView,
    /// What became of the packets of its rules.
    pub counters: Counters,
    /// How many connections and datagrams the service itself refused to sources that its ACL does not allow.
    pub denied: u64,
    /// How long its connections waited and lasted.
    pub times: ConnectionTimes,
}

impl ObservedService {
    /// Why it serves no client, if it does not.
    fn useless(&self) -> Option<String> {
        let ServiceView { name, handler, fallback, sockets, upstreams, .. } = &self.view;
        if sockets.is_empty() && fallback.is_none() {
            return Some(format!("service {name} has no live socket"));
        }
        let is_lost = *handler == HandlerKind::Forward
            && upstreams.iter().all(|it| matches!(it.state, UpstreamState::Down | UpstreamState::Gone));
        is_lost.then(|| format!("service {name} has no upstream that is up"))
    }
}

impl Engine {
    /// All that there is to be seen; the rules with their counters are shown to `see` in order of precedence. Takes about 0.4
    /// microseconds for each rule.
    ///
    /// # Errors
    /// The counters can't be read.
    pub fn observe<'a>(&'a self, mut see: impl FnMut(Counted<'a>)) -> Result<Observed, Problem> {
        let (counters, past) = (self.kernel.counters()?, self.services.past());
        let see = |it: Counted<'a>| see(Counted { past: past.of_row(&it.rule), ..it });
        let sums = Sums::read(self.desired.rules(), |rule| counters(rule.number), see).with(past.counters());
        let mut views = self.services_themselves();
        let mut status = self.status_itself(self.kernel.unmatched()?, &views);
        sums.add_to_status(&mut status.totals);
        sums.add_to_services(&mut views);
        let services = views.into_iter().zip(self.services.iter().map(|(_, it)| it)).map(|(view, running)| {
            let (_, counters) = sums.of(&view.name);
            let denied = view.stats.denied.saturating_sub(counters.denied);
            let mut times = running.service().times();
            times += &past.of(&view.name).times;
            ObservedService { view, counters, denied, times }
        });
        let services: Vec<_> = services.collect();
        let descriptors = &self.services.context().descriptors;
        Ok(Observed {
            status,
            descriptors: descriptors.size(),
            free_descriptors: descriptors.free(),
            unready: self.unready(&services),
            services,
        })
    }

    /// Steering is not as it should be, or no client is served of all that are steered.
    fn unready(&self, services: &[ObservedService]) -> Option<String> {
        if let Some(why) = self.kernel.broken() {
            return Some(why.clone());
        }
        if self.desired.drains().include_all() {
            return Some("this node is drained".to_owned());
        }
        if let Some(what) = self.kernel.lost_steering() {
            return Some(format!("{what} is gone"));
        }
        let back_end = self.kernel.back_end();
        let why = |it: &ObservedService| it.useless().or_else(|| self.dropping.fault_of(&it.view.name, back_end));
        let useless: Option<Vec<String>> = services.iter().filter(|it| it.view.rules > 0).map(why).collect();
        useless.filter(|it| !it.is_empty()).map(|it| it.join("; "))
    }
}
