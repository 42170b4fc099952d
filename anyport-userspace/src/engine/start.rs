//! The daemon's start: from configuration and state directory to what the kernel holds.

use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, Mutex},
};

use anyhow::{Context as _, bail};
use tracing::{error, warn};

use super::{
    Connected, Engine, Look, Peers,
    answers::Answers,
    decisions::Decisions,
    desired::{Desired, Drains},
    dropping::Dropping,
    kept::Kept,
    kernel::{Kernel, Parts},
    reload::Settings,
    served::Served,
    services::{Running, Services, boot_id, expect_fallbacks},
    shadow::Shadow,
};
use crate::{
    config::Config,
    events::EventBus,
    fleet::FleetBoard,
    host,
    keeper::{Begin, Link},
    paths::DEFAULT_STATE_DIR,
    routes::{Holder, Routes},
    rules::{Change, Conflict, Origin, Rule, RuleSet, RuleSpec},
    service::{ServiceConfig, WorkerHandles},
    steering::{
        Steering, bpf,
        choose::{Chosen, Remembered, choose, remove_leftovers},
    },
    store::{FleetState, KeptFleet, State, Store},
    table::Published,
};

/// What stands in for this machine's kernel in tests and simulations.
#[derive(Debug)]
pub struct Simulation {
    /// The back end.
    pub steering: Box<dyn Steering>,
    /// What holds local routes.
    pub routes: Arc<Mutex<dyn Holder>>,
    /// Lists the addresses of this host that have connections.
    pub connected: Connected,
    /// Lists the addresses and listeners of this host.
    pub look: Look,
    /// Lists others that this host talks to.
    pub peers: Peers,
}

impl Engine {
    /// Finds a back end, opens the services' sockets, and puts configuration and kept state into the kernel.
    /// What an earlier daemon left is replaced or removed.
    ///
    /// # Errors
    /// What does not work. Nothing is left behind, except by a successor: what was steered before still is, and new connections wait.
    pub async fn start(config: &Config, workers: WorkerHandles, keeper: Link, begin: &Begin) -> anyhow::Result<Self> {
        let (store, state) = Store::open(&config.state_dir)?;
        let initial = initial(config, state)?;
        let routes = Routes::open()?;
        let published: Arc<Published> = Arc::default();
        let events: Arc<EventBus> = Arc::default();
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
        let kernel = Kernel::new(Parts {
            chosen,
            routes,
            connected: host::connected_addresses,
            look: host::look,
            peers: host::peers,
            published,
            events,
        })
        .await?;
        let begun = Self::begin(config, (store, kernel), initial, workers, keeper, begin.is_successor);
        let mut engine = Box::pin(begun).await?;
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
        Simulation { steering, routes, connected, look, peers }: Simulation,
        workers: WorkerHandles,
    ) -> anyhow::Result<Self> {
        let initial = initial(config, state)?;
        let chosen = Chosen { steering, outcomes: Vec::new() };
        let (routes, published, events) = (Routes::held_by(routes)?, Arc::default(), Arc::default());
        let kernel = Kernel::new(Parts { chosen, routes, connected, look, peers, published, events }).await?;
        Box::pin(Self::begin(config, (store, kernel), initial, workers, Link::default(), false)).await
    }

    /// Brings up an engine out of its parts.
    async fn begin(
        config: &Config,
        (store, kernel): (Store, Kernel),
        Initial { services, rules, fleet_state }: Initial,
        workers: WorkerHandles,
        keeper: Link,
        is_successor: bool,
    ) -> anyhow::Result<Self> {
        let mut engine = Self {
            desired: Desired::new(Drains::restored(store.drains()?)),
            services: Services::new(config, (kernel.back_end(), kernel.published(), kernel.events()), workers, keeper)?,
            kernel,
            settings: Settings::new(config),
            unconfirmed: None,
            served: Served::default(),
            dropping: Dropping::default(),
            shadow: Shadow::default(),
            answers: Answers::new(),
            decisions: Decisions::default(),
            fleet: config.fleet_view().map(|view| Arc::new(FleetBoard::new(view, &fleet_state))),
            complaints: Vec::new(),
            progress: Arc::default(),
            kept: Kept::new(store, fleet_state),
        };
        match engine.bring_up(services, rules).await {
            Ok(()) => Ok(engine),
            Err(error) => {
                if is_successor {
                    engine.leave().await;
                } else if let Err(second) = engine.stop().await {
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
        initial(config, Store::look(&config.state_dir)?).map(drop)
    }

    async fn bring_up(&mut self, services: Vec<(ServiceConfig, Origin)>, rules: RuleSet) -> anyhow::Result<()> {
        for (config, origin) in services {
            self.open_service(config, origin)?;
        }
        let registered = self.kept.registered(&boot_id());
        self.services.restore_registered(registered, |cookie| self.kernel.can_adopt(cookie));
        let added = rules.prefixes().map(|(prefix, rules)| (*prefix, rules.clone())).collect();
        let change = Change { removed: Vec::new(), added };
        // Nobody could be asked, so nothing is refused.
        match self.objections(&change).await {
            Ok(objections) => objections.iter().for_each(|it| warn!("the rules that are there at the start: {it}")),
            Err(error) => error!("look what the rules take from the host: {error:#}"),
        }
        let transition = self.desired.begin(change)?;
        self.kernel.begin(&self.desired, &self.services, transition.steps()).await?;
        self.services.let_go_of_registered();
        self.services.context().keeper.forget_rest();
        self.kept.try_out();
        self.kept.restore_counters(&self.desired, &mut self.services, &mut self.kernel)
    }

    /// Opens the sockets of a service. They receive nothing before the next plan.
    pub(super) fn open_service(&mut self, config: ServiceConfig, origin: Origin) -> anyhow::Result<()> {
        let Self { services, desired, .. } = self;
        services.open(config, origin, || desired.take_slot())
    }

    /// Closes the sockets of a service that is not steered to any more.
    pub(super) async fn close_service(&mut self, running: Running) {
        self.services.bury(&running);
        self.desired.give_back_slot(running.slot());
        let name = running.config().name.clone();
        running.stop().await;
        self.forget_registered(&name);
    }
}

/// What configuration and state directory say together.
#[derive(Debug)]
pub(super) struct Initial {
    pub(super) services: Vec<(ServiceConfig, Origin)>,
    pub(super) rules: RuleSet,
    /// Where this node stands in its fleet.
    pub(super) fleet_state: FleetState,
}

/// Puts together what was configured, given by the fleet, applied and added. They must not contradict each other.
pub(super) fn initial(config: &Config, state: State) -> anyhow::Result<Initial> {
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
        let is_of_fleet = rule.origins.contains(Origin::Fleet);
        let advice = || if is_of_fleet { ADVICE.to_owned() } else { way_out(config, rule) };
        rule.terms.validate(&rule.prefix).with_context(advice)?;
        if !names.contains(&rule.terms.service) {
            bail!(
                "there is no service {} any more, to which a rule that was {} steers: {rule}; {}",
                rule.terms.service,
                came(rule.origins.first()),
                advice()
            );
        }
    }
    rules.extend(fleet.rules.into_iter()).context(ADVICE)?;
    if let Err(conflict) = rules.extend(state.applied_rules.into_iter().chain(state.rules)) {
        let is_of_node = |rule: &Rule| [Origin::Added, Origin::Applied].iter().any(|it| rule.origins.contains(*it));
        let rule = match &conflict {
            Conflict::Targets { new, .. } if is_of_node(new) => new,
            Conflict::Targets { old, .. } => old,
            // It differs from the one of this node in nothing else.
            Conflict::Route(rule) => rule,
        };
        bail!("{conflict}; {}", way_out(config, rule));
    }
    Ok(Initial { services, rules, fleet_state: fleet.state })
}

/// What to do about a rule that was added or applied and that keeps the daemon from starting.
fn way_out(config: &Config, rule: &Rule) -> String {
    let Rule { prefix, terms, .. } = rule;
    let RuleSpec { protocol, ports, except, source, service, route: _ } = &**terms;
    let is_usual = config.state_dir == Path::new(DEFAULT_STATE_DIR);
    let directory = if is_usual { String::new() } else { format!(" --state-dir {}", config.state_dir.display()) };
    let except = if except.is_empty() { String::new() } else { format!(" --except {except}") };
    let source = source.map(|it| format!(" --source {it}")).unwrap_or_default();
    format!(
        "change the configuration, or take the rule that was added or applied out of state.json: anyportctl --offline{directory} \
         remove-prefix {prefix} --protocol {protocol} --ports {ports} --service {service}{except}{source} (without --offline \
         while an anyportd runs)"
    )
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
        let FleetState { set, since, key, .. } = kept.state;
        kept.state = FleetState { ring: view.ring, set, since, key, ..FleetState::default() };
    }
    kept
}
