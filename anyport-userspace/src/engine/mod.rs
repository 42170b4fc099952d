//! Desired state, and the one way by which it gets into the kernel.
//!
//! Order on the way up: sockets, rules, routes; so nothing reaches the host before somebody is there to take it. On
//! the way down it is the reverse. Every step makes the kernel equal to what is desired and can be repeated, so a
//! failure is undone by applying the former state again.

mod apply;
mod change;
mod commands;
mod drain;
mod dropping;
mod events;
mod explain;
#[cfg(test)]
mod faults;
mod fleet;
mod mend;
mod numbers;
mod observed;
mod progress;
mod register;
mod reload;
mod served;
mod start;
mod views;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use tokio::sync::Notify;
use tracing::error;

use self::{
    apply::Unconfirmed,
    drain::Drains,
    dropping::Dropping,
    mend::{BackOff, Mends, RoutesLook},
    numbers::Numbers,
    register::Registrations,
    served::Served,
};
pub use self::{
    events::Clock,
    observed::{Observed, ObservedService},
    progress::Progress,
    register::fetch_registered,
    start::Simulation,
    views::Counted,
};
use crate::{
    announce::Announcer,
    config::Config,
    events::Board,
    fleet::FleetBoard,
    routes::{Coverage, Edits, Routes, Watch},
    rules::{Origin, Prefix, RuleSet, ServiceName, Terms},
    service::{Commons, DescriptorPool, Service, ServiceConfig},
    steering::{BackEnd, Steering, choose::Outcome},
    store::{FleetState, Store},
    table::{Published, Table},
};

/// How often the counters are kept, for the case that this daemon is killed.
const COUNTERS_INTERVAL: Duration = Duration::from_mins(1);

/// See [`crate::host::connected_addresses`].
pub type Connected = fn() -> anyhow::Result<HashSet<IpAddr>>;

/// The engine, until the daemon stops.
pub type Shared = Arc<tokio::sync::Mutex<Option<Engine>>>;

/// The daemon's state and its hold on the kernel.
#[derive(Debug)]
pub struct Engine {
    /// What the kernel holds.
    rules: RuleSet,
    services: BTreeMap<ServiceName, Running>,
    /// By service: they outlive a service that is replaced by one of the same name.
    registered: BTreeMap<ServiceName, Registrations>,
    /// Notified when a process has ended that registered a socket.
    owner_exits: Arc<Notify>,
    /// The lookup table as the handlers see it, for telling loops.
    published: Arc<Published>,
    /// That table, where the back end has none.
    own_table: Option<Table>,
    generation: u64,
    rule_numbers: Numbers,
    service_slots: Numbers,
    /// That of rules that are drained, which never has a socket.
    drained_slot: u16,
    max_rules: usize,
    /// The prefixes with rules that were added by hand.
    added: BTreeSet<Prefix>,
    /// What rules say, each once.
    terms: HashSet<Arc<Terms>>,
    steering: Box<dyn Steering>,
    outcomes: Vec<Outcome>,
    routes: Routes,
    /// Tells the addresses of this host that have connections.
    connected: Connected,
    /// What our routes make local.
    coverage: Coverage,
    /// Blocks whose local route was there before us.
    foreign_routes: Vec<Prefix>,
    /// Addresses that keep their route for connections that outlive their rule.
    draining: HashSet<Prefix>,
    /// Why the kernel may not hold the rules that it should.
    broken: Option<String>,
    /// When that is to be tried again.
    repairs: BackOff,
    /// What others have removed, and what became of it.
    mends: Mends,
    /// What is dropped that should be served.
    dropping: Dropping,
    routes_look: RoutesLook,
    /// Why it could not be seen what the kernel has.
    unseen: Option<String>,
    /// What was applied and waits to be confirmed.
    unconfirmed: Option<Unconfirmed>,
    /// What is drained.
    drains: Drains,
    /// Has the router announce what is served, where it is to.
    announcer: Option<Announcer>,
    /// By which that is judged.
    served: Served,
    /// How far a long command is.
    progress: Arc<Progress>,
    /// When the counters were kept last; nothing while they do not go on from those of an earlier daemon yet.
    counters_kept: Option<Instant>,
    /// Who listens to events.
    events: Arc<Board>,
    /// The settings, without services and rules.
    config: Config,
    /// Why the configuration was not taken when it was read again last.
    not_reloaded: Option<String>,
    store: Store,
    /// Where this node stands in its fleet, as it is kept.
    fleet_state: FleetState,
    /// Whether the set in force has each of its rules once, and nothing else.
    is_fleet_plain: bool,
    /// What is told of the fleet, if this node belongs to one.
    fleet: Option<Arc<FleetBoard>>,
    commons: Commons,
    /// By slot: whether its service is one of the handler `forward`.
    forwarding: Arc<[AtomicBool]>,
}

/// A service at work.
#[derive(Debug)]
struct Running {
    service: Service,
    origin: Origin,
    /// By which the kernel knows it.
    slot: u16,
}

impl Running {
    /// Whether this is the service that is there when nobody has made one of its name.
    fn is_preset(&self) -> bool {
        self.origin == Origin::Config && *self.service.config() == ServiceConfig::default_service()
    }
}

impl Engine {
    /// How far a long command is, for those who can't wait for it.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Which back end is in use.
    pub fn back_end(&self) -> BackEnd {
        self.steering.back_end()
    }

    /// Notified when a process has ended that registered a socket: time to [`Self::refresh`].
    pub fn owner_exits(&self) -> Arc<Notify> {
        Arc::clone(&self.owner_exits)
    }

    /// Tells of what others do to interfaces and to our routes. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel's.
    pub fn watch(&self) -> anyhow::Result<Watch> {
        self.routes.watch()
    }

    /// Looks again at what may have changed outside: interfaces, what others have removed of ours, and connections whose address
    /// can be given up. Tries again what could not be undone.
    pub async fn refresh(&mut self) {
        self.roll_back_if_due().await;
        if self.broken.is_some() && self.repairs.is_over() {
            self.repair().await;
        }
        if let Err(error) = self.look_after_registered().await {
            error!("look after the sockets that were registered: {error:#}");
        }
        match self.steering.refresh() {
            Ok(news) => self.note_put_right(news),
            Err(error) => error!("look again at interfaces and sockets: {error:#}"),
        }
        self.mend().await;
        self.look_for_drops();
        self.judge();
        self.go_on_draining().await;
        if let Err(error) = self.end_draining().await {
            error!("remove the routes of connections that have ended: {error:#}");
            // All routes are compared then.
            self.broken =
                Some(format!("routes of connections that have ended may be there, which is mended: {error:#}"));
        }
        if let Some(table) = &mut self.own_table
            && let Err(error) = table.trim()
        {
            error!("give memory of the lookup table back: {error:#}");
        }
        if self.counters_kept.is_some_and(|at| at.elapsed() >= COUNTERS_INTERVAL) {
            if let Err(error) = self.keep_counters() {
                error!("keep the counters: {error:#}");
            }
            self.counters_kept = Some(Instant::now());
        }
    }

    /// What the services were made of.
    fn configs(&self) -> impl Iterator<Item = &ServiceConfig> {
        self.services.values().map(|running| running.service.config())
    }

    /// These terms, as all rules that say the same share them.
    fn shared(&mut self, terms: Terms) -> Arc<Terms> {
        const MANY: usize = 4096;
        if let Some(known) = self.terms.get(&terms) {
            return Arc::clone(known);
        }
        if self.terms.len() >= MANY.max(self.rules.len()) {
            self.terms.retain(|it| Arc::strong_count(it) > 1);
        }
        let terms = Arc::new(terms);
        self.terms.insert(Arc::clone(&terms));
        terms
    }

    async fn end_draining(&mut self) -> anyhow::Result<()> {
        if self.draining.is_empty() {
            return Ok(());
        }
        let connected = (self.connected)()?;
        let ended: Vec<Prefix> = self.draining.extract_if(|prefix| !connected.contains(&prefix.address())).collect();
        let mut edits = Edits::default();
        for prefix in &ended {
            let around = self.rules.around(*prefix).filter(|(_, rules)| rules.is_routed()).map(|(prefix, _)| prefix);
            self.coverage.remove(prefix, around, &mut edits);
        }
        self.routes.apply(&edits.difference()).await.map(drop)
    }

    /// Leaves steering in the kernel and the sockets with the keeper, for another process to go on with. Connections go on in this
    /// one; they are over when what is returned is whole again.
    ///
    /// # Errors
    /// The counters could not be kept.
    pub async fn leave(mut self) -> anyhow::Result<DescriptorPool> {
        if let Some(announcer) = self.announcer.take() {
            announcer.leave().await;
        }
        let counters = if self.counters_kept.is_some() { self.keep_counters() } else { Ok(()) };
        for running in self.services.into_values() {
            running.service.leave().await;
        }
        self.steering.leave();
        counters.map(|()| self.commons.descriptors)
    }

    /// Takes everything out of the kernel. The state file stays.
    ///
    /// # Errors
    /// What could not be removed; the rest is.
    pub async fn stop(self) -> anyhow::Result<()> {
        let counters = if self.counters_kept.is_some() { self.keep_counters() } else { Ok(()) };
        let routes = self.routes.set(&Coverage::default()).await.map(drop);
        let steering = self.steering.detach();
        for running in self.services.into_values() {
            running.service.stop().await;
        }
        routes.and(steering).and(counters)
    }
}
