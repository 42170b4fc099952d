//! The daemon's start: from configuration and state directory to what the kernel holds.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use anyhow::{Context as _, bail};
use anyport_common::{
    flow::{Flow, Transport},
    maps::{MAX_RULES, MAX_SERVICES},
    table::Verdict,
};
use tokio::runtime::Handle;
use tracing::error;

use super::{
    Connected, Engine, Running,
    drain::Drains,
    dropping::Dropping,
    mend::{BackOff, Mends, RoutesLook},
    numbers::Numbers,
    register::expect_fallbacks,
    served::Served,
};
use crate::{
    api::{Kind, Problem},
    config::Config,
    events::{Board, Teller},
    fleet::FleetBoard,
    host,
    keeper::{Begin, Link},
    routes::{Holder, Routes},
    rules::{Change, Origin, RuleSet, to_address},
    service::{
        Capacity, Commons, DescriptorPool, ForwardGuard, HandlerKind, LoopGuard, Service, ServiceConfig, WorkerHandles,
    },
    steering::{
        BackEnd, Steering, bpf,
        choose::{Chosen, Remembered, choose, remove_leftovers},
    },
    store::{FleetState, KeptFleet, State, Store},
    table::{OwnSegments, Published, Table},
};

/// How many numbers of rules and slots of services rest before they are given out again.
const RESTING: usize = 32;

/// What an engine works on.
#[derive(Debug)]
struct Parts {
    store: Store,
    routes: Routes,
    connected: Connected,
    /// The back end's table, for those who read it here.
    published: Arc<Published>,
    /// Who listens to events.
    events: Arc<Board>,
    chosen: Chosen,
}

/// What stands in for this machine's kernel in tests and simulations.
#[derive(Debug)]
pub struct Simulation {
    /// The back end.
    pub steering: Box<dyn Steering>,
    /// What holds local routes.
    pub routes: Arc<Mutex<dyn Holder>>,
    /// Tells the addresses of this host that have connections.
    pub connected: Connected,
}

impl Engine {
    /// Finds a back end, opens the services' sockets, and puts configuration and kept state into the kernel.
    /// What an earlier daemon left is replaced or removed.
    ///
    /// # Errors
    /// What does not work. Nothing is left behind, except by a successor: what was steered before still is, and newcomers wait.
    pub async fn start(config: &Config, workers: WorkerHandles, keeper: Link, begin: &Begin) -> anyhow::Result<Self> {
        let (store, state) = Store::open(&config.state_dir)?;
        let desired = desired(config, state)?;
        let routes = Routes::open()?;
        let published: Arc<Published> = Arc::default();
        let events: Arc<Board> = Arc::default();
        let options = bpf::Options {
            bpffs: config.bpffs.clone(),
            interfaces: config.interface.clone(),
            debug: config.log_level >= crate::config::LogLevel::Debug,
            readers: Arc::clone(&published),
            events: Arc::clone(&events),
        };
        let wanted = config.steering.back_end();
        let chosen = choose(wanted, &options, begin.remembered.as_ref())?;
        keeper.remember(Remembered::new(wanted, &options, &chosen.outcomes));
        remove_leftovers(chosen.steering.back_end(), &options).context("remove what an earlier daemon left")?;
        let parts = Parts { store, routes, connected: host::connected_addresses, published, events, chosen };
        let mut engine = Self::begin(config, parts, desired, workers, keeper, begin.is_successor).await?;
        engine.start_announcing();
        Ok(engine)
    }

    /// An engine that steers nothing on this machine, though its services have sockets here.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn simulated(
        config: &Config,
        (store, state): (Store, State),
        Simulation { steering, routes, connected }: Simulation,
        workers: WorkerHandles,
    ) -> anyhow::Result<Self> {
        let desired = desired(config, state)?;
        let chosen = Chosen { steering, outcomes: Vec::new() };
        let (routes, published, events) = (Routes::held_by(routes)?, Arc::default(), Arc::default());
        let parts = Parts { store, routes, connected, published, events, chosen };
        Self::begin(config, parts, desired, workers, Link::default(), false).await
    }

    /// Brings up an engine out of its parts.
    async fn begin(
        config: &Config,
        parts: Parts,
        Desired { services, rules, fleet_state }: Desired,
        workers: WorkerHandles,
        keeper: Link,
        is_successor: bool,
    ) -> anyhow::Result<Self> {
        let Parts { store, routes, connected, published, events, chosen } = parts;
        let descriptors = DescriptorPool::of_process()?;
        let forwarding: Arc<[AtomicBool]> = (0..MAX_SERVICES).map(|_| AtomicBool::new(false)).collect();
        let commons = Commons {
            workers,
            control: Handle::current(),
            capacity: Capacity::new(config.limits(), descriptors.clone()),
            sees_to_sources: chosen.steering.back_end() == BackEnd::Tproxy,
            descriptors,
            loop_guard: loop_guard(&published),
            forward_guard: forward_guard(&published, &forwarding),
            teller: (!events.is_connected()).then(|| Teller::new(Arc::clone(&events), Arc::clone(&published))),
            keeper,
        };
        let own_segments = || OwnSegments { readers: Arc::clone(&published) };
        let has_no_table = chosen.steering.back_end() == BackEnd::Tproxy;
        let mut engine = Self {
            rules: RuleSet::default(),
            services: BTreeMap::new(),
            registered: BTreeMap::new(),
            owner_exits: Arc::default(),
            own_table: has_no_table.then(|| Table::new(Box::new(own_segments()))),
            published,
            generation: 0,
            rule_numbers: Numbers::new(0..MAX_RULES, RESTING),
            // Slot 0 refuses, and so does the last one.
            service_slots: Numbers::new(1..MAX_SERVICES - 1, RESTING),
            drained_slot: (MAX_SERVICES - 1).try_into()?,
            max_rules: config.max_rules,
            added: BTreeSet::new(),
            terms: HashSet::new(),
            steering: chosen.steering,
            outcomes: chosen.outcomes,
            // What a daemon left that was killed is local too, and stays so where it still has to be.
            coverage: routes.ours().await?.into_iter().collect(),
            routes,
            connected,
            foreign_routes: Vec::new(),
            draining: HashSet::new(),
            broken: None,
            repairs: BackOff::default(),
            mends: Mends::default(),
            dropping: Dropping::default(),
            routes_look: RoutesLook::default(),
            unseen: None,
            unconfirmed: None,
            drains: Drains::restored(store.drains()?),
            announcer: None,
            served: Served::default(),
            progress: Arc::default(),
            counters_kept: None,
            events,
            config: config.without_tables(),
            not_reloaded: None,
            store,
            fleet: config.fleet_view().map(|view| Arc::new(FleetBoard::new(view, &fleet_state))),
            fleet_state,
            // Until a set is read that says so.
            is_fleet_plain: false,
            commons,
            forwarding,
        };
        match engine.bring_up(services, rules).await {
            Ok(()) => Ok(engine),
            Err(error) => {
                let cleaned = if is_successor { engine.leave().await.map(drop) } else { engine.stop().await };
                if let Err(second) = cleaned {
                    error!("clean up after a start that failed: {second:#}");
                }
                Err(error)
            }
        }
    }

    /// Finds out whether configuration and state directory make sense together. Changes nothing.
    ///
    /// # Errors
    /// They do not.
    pub fn check(config: &Config) -> anyhow::Result<()> {
        desired(config, Store::look(&config.state_dir)?).map(drop)
    }

    async fn bring_up(&mut self, services: Vec<(ServiceConfig, Origin)>, rules: RuleSet) -> anyhow::Result<()> {
        for (config, origin) in services {
            self.open_service(config, origin)?;
        }
        self.restore_registered();
        let added = rules.prefixes().map(|(prefix, rules)| (*prefix, rules.clone())).collect();
        self.start_with(Change { removed: Vec::new(), added }).await?;
        self.let_go_of_registered();
        self.commons.keeper.forget_rest();
        self.restore_counters()
    }

    /// Opens the sockets of a service. They receive nothing before the next plan.
    pub(super) fn open_service(&mut self, config: ServiceConfig, origin: Origin) -> anyhow::Result<()> {
        let name = config.name.clone();
        self.expect_enforceable(&config)?;
        let service = Service::start(config, &self.commons)?;
        let slot = self.service_slots.take(1).context("there are too many services")?.start;
        let is_forwarding = service.config().handler == HandlerKind::Forward;
        self.forwarding[usize::try_from(slot)?].store(is_forwarding, Relaxed);
        self.services.insert(name, Running { service, origin, slot: slot.try_into()? });
        Ok(())
    }

    /// Where the back end leaves it to services to refuse sources, registered sockets would take all of them.
    pub(super) fn expect_enforceable(&self, config: &ServiceConfig) -> Result<(), Problem> {
        let ServiceConfig { name, handler, sources, .. } = config;
        if *handler != HandlerKind::Registered || sources.is_empty() || !self.commons.sees_to_sources {
            return Ok(());
        }
        Err(Problem::new(
            Kind::Invalid,
            format!("service {name}: with tproxy nobody would keep sources from registered sockets"),
        )
        .hint("leave source-allow and source-deny out, or steer by sk-lookup or tc"))
    }

    /// Closes the sockets of a service that is not steered to any more.
    pub(super) async fn close_service(&mut self, running: Running) {
        let slot = u32::from(running.slot);
        self.service_slots.give_back(slot..slot + 1);
        let name = running.service.config().name.clone();
        running.service.stop().await;
        self.forget_registered(&name);
    }
}

/// Tells sources that are steered themselves, to which an answer would come back.
fn loop_guard(published: &Arc<Published>) -> LoopGuard {
    let published = Arc::clone(published);
    Arc::new(move |asker, dialled| {
        let flow = Flow {
            source: to_address(dialled.ip()),
            address: to_address(asker.ip()),
            transport: Transport::Udp,
            port: asker.port(),
        };
        matches!(published.read(|reader| reader.lookup(&flow)), Verdict::Steer { .. })
    })
}

/// Tells what comes back to a service that forwards when this host sends it.
fn forward_guard(published: &Arc<Published>, forwarding: &Arc<[AtomicBool]>) -> ForwardGuard {
    let (published, forwarding) = (Arc::clone(published), Arc::clone(forwarding));
    Arc::new(move |transport, from, to| {
        let flow = Flow { source: to_address(from), address: to_address(to.ip()), transport, port: to.port() };
        match published.read(|reader| reader.lookup(&flow)) {
            Verdict::Steer { service, .. } => forwarding[usize::from(service)].load(Relaxed),
            _ => false,
        }
    })
}

/// What configuration and state directory say together.
#[derive(Debug)]
pub(super) struct Desired {
    pub(super) services: Vec<(ServiceConfig, Origin)>,
    pub(super) rules: RuleSet,
    /// Where this node stands in its fleet.
    pub(super) fleet_state: FleetState,
}

/// Puts together what was configured, given by the fleet, applied and added. They must not contradict each other.
pub(super) fn desired(config: &Config, state: State) -> anyhow::Result<Desired> {
    const ADVICE: &str = "change the configuration, or what was added by hand: state.json in the state directory; what the fleet gave is in fleet.json";
    let fleet = kept_of_fleet(config, state.fleet);
    let mut services: Vec<_> = config.services.iter().map(|it| (it.clone(), Origin::Config)).collect();
    let kept =
        [(fleet.services, Origin::Fleet), (state.applied_services, Origin::Applied), (state.services, Origin::Added)];
    for (added, origin) in kept.into_iter().flat_map(|(all, origin)| all.into_iter().map(move |it| (it, origin))) {
        match services.iter().find(|(service, _)| service.name == added.name) {
            Some((configured, _)) if *configured == added => {}
            Some(_) => bail!("the service {} was {} with other settings; {ADVICE}", added.name, came(origin)),
            None => services.push((added, origin)),
        }
    }
    let default = ServiceConfig::default_service();
    if !services.iter().any(|(service, _)| service.name == default.name) {
        services.push((default, Origin::Config));
    }
    expect_fallbacks(&services.iter().map(|(service, _)| service).collect::<Vec<_>>()).context(ADVICE)?;
    let names: HashSet<_> = services.iter().map(|(service, _)| &service.name).collect();
    let mut rules = config.rules.clone();
    for rule in fleet.rules.iter().chain(&state.applied_rules).chain(&state.rules) {
        rule.terms.validate(&rule.prefix).context(ADVICE)?;
        if !names.contains(&rule.terms.service) {
            bail!(
                "there is no service {} any more, to which a rule that was {} steers: {rule}; {ADVICE}",
                rule.terms.service,
                came(rule.origins.first())
            );
        }
    }
    rules.extend(fleet.rules.into_iter().chain(state.applied_rules).chain(state.rules)).context(ADVICE)?;
    Ok(Desired { services, rules, fleet_state: fleet.state })
}

/// How something of this origin came to be there.
fn came(origin: Origin) -> &'static str {
    if origin == Origin::Fleet { "given by the fleet" } else { origin.as_str() }
}

/// What is kept of the fleet, if the configuration still has this node in one. What was seen of another ring's pointer says nothing
/// of this one's, but its set is better than none.
fn kept_of_fleet(config: &Config, kept: Option<KeptFleet>) -> KeptFleet {
    let (Some(view), Some(mut kept)) = (config.fleet_view(), kept) else { return KeptFleet::default() };
    if kept.state.ring != view.ring {
        let FleetState { set, since, .. } = kept.state;
        kept.state = FleetState { ring: view.ring, set, since, ..FleetState::default() };
    }
    kept
}
