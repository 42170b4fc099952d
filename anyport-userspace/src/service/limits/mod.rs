//! Limits on connections and flows: in total, for each service and for each source.
//!
//! What comes in has to pass a [`Gate`]: the limit scopes of its service, then the [`Capacity`] that all services share. In a limit
//! scope no source may hold more than [`SHARE`] times as many connections as are free, so that a source that holds none is let in
//! however greedy others are: a single one ends up with four fifths of all, and `n` of them leave one of `4n + 1` parts.

mod config;
mod sources;

use std::{
    net::IpAddr,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

pub use self::config::{Limits, Rate};
use self::sources::{Source, Sources};
use super::{
    counts::Count,
    descriptors::{DescriptorPool, Descriptors},
};
use crate::rules::{Prefix, SourceLists};

/// How many connections a source may hold for each that is free, unless a limit for sources is set.
const SHARE: usize = 4;

/// Why a client is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    /// The daemon has as many connections and flows as it may have, by its setting or by its limit of open files.
    #[error("the daemon has as many connections and flows as it may have")]
    Total,
    /// The service has as many as it may have.
    #[error("the service has as many connections and flows as it may have")]
    Service,
    /// The source has as many as it may have.
    #[error("the source has as many connections and flows as it may have")]
    Source,
    /// The source has its share, where it has no limit of its own.
    #[error("the source has its share of connections and flows")]
    Share,
    /// The service does not take the source.
    #[error("the service does not take the source")]
    Denied,
    /// The source comes faster than it may.
    #[error("the source comes faster than it may")]
    Rate,
}

/// Whether two addresses are taken for one source.
pub(super) fn is_same_source(one: IpAddr, other: IpAddr) -> bool {
    Source::of(one.to_canonical()) == Source::of(other.to_canonical())
}

/// Counts of those that were not let in.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    pub(super) total: Count,
    pub(super) service: Count,
    pub(super) source: Count,
    pub(super) rate: Count,
    pub(super) denied: Count,
}

impl Refusals {
    pub(super) fn raise(&self, why: Refused) {
        let count = match why {
            Refused::Total => &self.total,
            Refused::Service => &self.service,
            Refused::Source | Refused::Share => &self.source,
            Refused::Rate => &self.rate,
            Refused::Denied => &self.denied,
        };
        count.raise();
    }
}

/// Connections and flows that are counted together. No lock is shared by sources, but for those that a hash throws together.
#[derive(Debug)]
pub(super) struct LimitScope {
    /// How many may still come, if that is limited.
    free: Option<AtomicUsize>,
    per_source: Option<NonZeroU32>,
    /// Whether that is a share rather than a limit that was configured.
    is_share: bool,
    sources: Sources,
    when_full: Refused,
}

impl LimitScope {
    fn new(limits: Limits, when_full: Refused) -> Self {
        Self {
            free: limits.max_connections.map(|most| AtomicUsize::new(most.get() as usize)),
            per_source: limits.max_connections_per_source,
            is_share: limits.max_connections_per_source.is_none(),
            sources: Sources::new(limits.accept_rate_per_source),
            when_full,
        }
    }

    /// The limit scope of a service, if it has limits of its own.
    pub(super) fn of_service(limits: Limits) -> Option<Arc<Self>> {
        (limits != Limits::default()).then(|| Arc::new(Self::new(limits, Refused::Service)))
    }

    /// A limit scope for flows: when there are `most`, the least recently used ones are closed. Those of one source may not
    /// drive out all others.
    pub(super) fn of_flows(most: NonZeroU32, limits: Limits) -> Arc<Self> {
        let most = most.get() as usize;
        let share = u32::try_from(most * SHARE / (SHARE + 1)).ok().and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MIN);
        let max_connections_per_source = limits.max_connections_per_source.or(Some(share));
        let scope = Self::new(Limits { max_connections_per_source, ..Limits::default() }, Refused::Service);
        Arc::new(Self { is_share: limits.max_connections_per_source.is_none(), ..scope })
    }

    /// Lets one in, with what `take` finds for it; `spare` is for how many that is there. Without a source it is counted in
    /// total only.
    fn enter<T>(&self, source: Option<Source>, spare: usize, take: impl FnOnce() -> Option<T>) -> Result<T, Refused> {
        let enter = |held| {
            let free = self.free.as_ref().map_or(usize::MAX, |free| free.load(Relaxed)).min(spare);
            if source.is_some() {
                self.is_within_share(held, free)?;
            }
            self.take_place()?;
            take().ok_or_else(|| {
                self.give_place_back();
                self.when_full
            })
        };
        match source {
            Some(source) => self.sources.enter(source, enter),
            None => enter(0),
        }
    }

    fn is_within_share(&self, held: usize, free: usize) -> Result<(), Refused> {
        if free == 0 {
            return Err(self.when_full);
        }
        // The last place is for who has none.
        let most = self.per_source.map_or((free - 1).saturating_mul(SHARE).max(1), |most| most.get() as usize);
        match (held < most, self.is_share) {
            (true, _) => Ok(()),
            (false, true) => Err(Refused::Share),
            (false, false) => Err(Refused::Source),
        }
    }

    fn take_place(&self) -> Result<(), Refused> {
        let Some(free) = &self.free else { return Ok(()) };
        let taken = free.fetch_update(Relaxed, Relaxed, |free| free.checked_sub(1));
        taken.map(drop).map_err(|_| self.when_full)
    }

    fn give_place_back(&self) {
        if let Some(free) = &self.free {
            free.fetch_add(1, Relaxed);
        }
    }

    fn leave(&self, source: Option<Source>) {
        self.give_place_back();
        if let Some(source) = source {
            self.sources.leave(source);
        }
    }
}

/// What all services share: how many connections and flows the daemon may have, and the descriptors for them.
#[derive(Clone, Debug)]
pub struct Capacity(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    scope: LimitScope,
    descriptors: DescriptorPool,
}

impl Capacity {
    /// For what these limits and these descriptors allow.
    pub fn new(limits: Limits, descriptors: DescriptorPool) -> Self {
        Self(Arc::new(Shared { scope: LimitScope::new(limits, Refused::Total), descriptors }))
    }

    fn enter(&self, source: Option<Source>, descriptors: u32) -> Result<Descriptors, Refused> {
        let Shared { scope, descriptors: pool } = &*self.0;
        scope.enter(source, pool.free() / descriptors as usize, || pool.try_take(descriptors))
    }

    fn leave(&self, source: Option<Source>) {
        self.0.scope.leave(source);
    }
}

/// What connections, or flows, of a service have to pass; one for all of its workers.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) scopes: Vec<Arc<LimitScope>>,
    pub(super) capacity: Capacity,
    /// Descriptors that each takes.
    pub(super) descriptors: u32,
    /// They speak for many, so that there are no limits for them as sources.
    pub(super) proxies: Vec<Prefix>,
    /// Which clients the service allows, where the back end leaves it to the service to check that.
    pub(super) sources: Option<Arc<SourceLists>>,
}

impl Gate {
    /// Whether the service takes what comes from there.
    pub(super) fn allows(&self, client: IpAddr) -> bool {
        self.sources.as_ref().is_none_or(|sources| sources.allows(client.to_canonical()))
    }

    /// Lets a client in until the pass is dropped.
    pub(super) fn admit(self: &Arc<Self>, client: IpAddr) -> Result<Pass, Refused> {
        let client = client.to_canonical();
        if !self.allows(client) {
            return Err(Refused::Denied);
        }
        let is_proxy = self.proxies.iter().any(|prefix| prefix.contains(client));
        let source = (!is_proxy).then(|| Source::of(client));
        // What was entered already is left again when this is dropped.
        let mut pass = Pass { gate: Arc::clone(self), source, entered: 0, descriptors: None };
        for scope in &self.scopes {
            scope.enter(source, usize::MAX, || Some(()))?;
            pass.entered += 1;
        }
        pass.descriptors = Some(self.capacity.enter(source, self.descriptors)?);
        Ok(pass)
    }
}

/// A connection or flow that was let in; counted until this is dropped.
#[derive(Debug)]
pub(super) struct Pass {
    gate: Arc<Gate>,
    source: Option<Source>,
    /// How many limit scopes it is in.
    entered: usize,
    descriptors: Option<Descriptors>,
}

impl Drop for Pass {
    fn drop(&mut self) {
        for scope in &self.gate.scopes[..self.entered] {
            scope.leave(self.source);
        }
        if self.descriptors.take().is_some() {
            self.gate.capacity.leave(self.source);
        }
    }
}

#[cfg(test)]
mod tests;
