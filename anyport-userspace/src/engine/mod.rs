//! Desired state, and the one way by which it gets into the kernel.
//!
//! Order on the way up: sockets, rules, routes; so nothing reaches the host before somebody is there to take it. On
//! the way down it is the reverse. Every step makes the kernel equal to what is desired and can be repeated, so a
//! failure is undone by applying the former state again.

mod numbers;
mod views;

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use anyport_common::{
    flow::Transport,
    maps::{MAX_RULES, MAX_SERVICES},
};
use arc_swap::ArcSwap;
use tokio::runtime::Handle;
use tracing::{error, info};

use self::numbers::Numbers;
use crate::{
    api::{AddPrefixes, Changed, Kind, Problem, RemovePrefixes},
    config::Config,
    host::{self, Host},
    routes::Routes,
    rules::{Conflict, Decision, Origin, Prefix, Rule, RuleSet, ServiceName, decide},
    service::{Commons, DescriptorPool, LoopGuard, Service, ServiceConfig},
    steering::{
        NumberedRule, Plan, ServiceSockets, Steering, bpf,
        choose::{Outcome, choose, remove_leftovers},
    },
    store::{State, Store},
};

/// The daemon's state and its hold on the kernel.
#[derive(Debug)]
pub struct Engine {
    rules: RuleSet,
    services: BTreeMap<ServiceName, Running>,
    /// The rules as the handlers see them, for telling loops.
    published: Arc<ArcSwap<RuleSet>>,
    generation: u64,
    rule_numbers: Numbers<Rule>,
    service_slots: Numbers<ServiceName>,
    steering: Box<dyn Steering>,
    outcomes: Vec<Outcome>,
    routes: Routes,
    /// Prefixes whose local route was there before us.
    foreign_routes: Vec<Prefix>,
    /// Addresses that keep their route for connections that outlive their rule.
    draining: HashSet<Prefix>,
    /// Why the kernel may not hold the rules that it should.
    broken: Option<String>,
    store: Store,
    commons: Commons,
}

#[derive(Debug)]
struct Running {
    service: Service,
    origin: Origin,
}

impl Engine {
    /// Finds a back end, opens the services' sockets, and puts configuration and kept state into the kernel.
    /// What an earlier daemon left is replaced or removed.
    ///
    /// # Errors
    /// What does not work, and nothing is left behind.
    pub async fn start(config: &Config, data: Handle) -> anyhow::Result<Self> {
        let (store, state) = Store::open(&config.state_dir)?;
        let (services, rules) = desired(config, &state)?;
        let routes = Routes::open()?;
        let options = bpf::Options {
            bpffs: config.bpffs.clone(),
            interfaces: config.interfaces.clone(),
            debug: config.log_level >= crate::config::LogLevel::Debug,
        };
        let chosen = choose(config.steering.back_end(), &options)?;
        remove_leftovers(chosen.steering.back_end(), &options).context("remove what an earlier daemon left")?;
        let published: Arc<ArcSwap<RuleSet>> = Arc::default();
        let commons = Commons {
            runtime: data,
            workers: config.workers,
            descriptors: DescriptorPool::of_process()?,
            loop_guard: loop_guard(&published),
        };
        let mut engine = Self {
            rules: RuleSet::default(),
            services: BTreeMap::new(),
            published,
            generation: 0,
            rule_numbers: Numbers::new(0..MAX_RULES),
            // Slot 0 refuses.
            service_slots: Numbers::new(1..MAX_SERVICES),
            steering: chosen.steering,
            outcomes: chosen.outcomes,
            routes,
            foreign_routes: Vec::new(),
            draining: HashSet::new(),
            broken: None,
            store,
            commons,
        };
        match engine.bring_up(services, rules).await {
            Ok(()) => Ok(engine),
            Err(error) => {
                if let Err(second) = engine.stop().await {
                    error!("clean up after a start that failed: {second:#}");
                }
                Err(error)
            }
        }
    }

    async fn bring_up(&mut self, services: Vec<(ServiceConfig, Origin)>, rules: RuleSet) -> anyhow::Result<()> {
        for (config, origin) in services {
            let name = config.name.clone();
            let service = Service::start(config, &self.commons)?;
            self.services.insert(name, Running { service, origin });
        }
        self.put_in_force(rules).await
    }

    /// Adds a rule for each prefix, or none.
    ///
    /// # Errors
    /// See [`Kind`]. Nothing has changed.
    pub async fn add_prefixes(&mut self, request: AddPrefixes) -> Result<Changed, Problem> {
        let AddPrefixes { prefixes, protocol, ports, except, service, route, force } = request;
        if prefixes.is_empty() {
            return Err(Problem::new(Kind::Invalid, "add prefixes: there are none in the request"));
        }
        self.expect_service(&service)?;
        let mut rules = self.rules.clone();
        let mut added = Vec::new();
        for prefix in prefixes {
            let rule = Rule {
                prefix,
                protocol,
                ports: ports.clone(),
                except: except.clone(),
                service: service.clone(),
                route,
                origin: Origin::Added,
            };
            rule.validate().map_err(|error| Problem::new(Kind::Invalid, error.to_string()))?;
            if rules.insert(rule.clone()).map_err(|conflict| conflict_problem(&conflict))? {
                added.push(rule);
            }
        }
        self.expect_room_for(rules.len())?;
        if !force {
            self.expect_safe(&added).await?;
        }
        if !added.is_empty() {
            self.change(rules).await?;
        }
        let foreign = self.foreign_routes.iter().filter(|it| added.iter().any(|rule| rule.prefix == **it));
        let notes = foreign.map(|it| format!("{it} has a local route already, which is left as it was found"));
        Ok(Changed { generation: self.generation, changed: added.len(), notes: notes.collect() })
    }

    /// Removes the rules that the request selects.
    ///
    /// # Errors
    /// See [`Kind`]; a prefix without such a rule is one. Nothing has changed.
    pub async fn remove_prefixes(&mut self, request: RemovePrefixes) -> Result<Changed, Problem> {
        if request.prefixes.is_empty() {
            return Err(Problem::new(Kind::Invalid, "remove prefixes: there are none in the request"));
        }
        for prefix in &request.prefixes {
            let of_prefix = self.rules.of_prefix(prefix);
            if !of_prefix.iter().any(|rule| request.selects(rule)) {
                let hint = match of_prefix {
                    [] => "anyportctl prefixes lists the rules".to_owned(),
                    rules => {
                        let rules: Vec<String> = rules.iter().map(ToString::to_string).collect();
                        format!("its rules are: {}", rules.join("; "))
                    }
                };
                return Err(Problem::new(Kind::NotFound, format!("{prefix} has no such rule")).hint(hint));
            }
        }
        let mut rules = self.rules.clone();
        let removed = rules.remove(|rule| request.selects(rule));
        let notes = match removed.iter().find(|rule| rule.origin == Origin::Config) {
            Some(rule) => vec![format!("{rule} is in the configuration and comes back with the next start")],
            None => Vec::new(),
        };
        self.change(rules).await?;
        Ok(Changed { generation: self.generation, changed: removed.len(), notes })
    }

    /// Opens a new service's sockets.
    ///
    /// # Errors
    /// See [`Kind`]; another service of that name is one.
    pub async fn add_service(&mut self, config: ServiceConfig) -> Result<Changed, Problem> {
        config.validate().map_err(|error| Problem::new(Kind::Invalid, error.to_string()))?;
        if let Some(running) = self.services.get(&config.name) {
            return if *running.service.config() == config {
                Ok(Changed { generation: self.generation, changed: 0, notes: Vec::new() })
            } else {
                Err(Problem::new(Kind::Conflict, format!("there is a service {} with other settings", config.name))
                    .hint("anyportctl services lists the services; remove it first, or use another name"))
            };
        }
        if self.services.len() >= self.service_slots.capacity() {
            let limit = self.service_slots.capacity();
            return Err(Problem::new(Kind::Failed, format!("there are {limit} services, which is the limit")));
        }
        let name = config.name.clone();
        let service = Service::start(config, &self.commons)?;
        self.services.insert(name.clone(), Running { service, origin: Origin::Added });
        if let Err(problem) = self.change(self.rules.clone()).await {
            if let Some(running) = self.services.remove(&name) {
                running.service.stop().await;
            }
            self.go_back_to(self.rules.clone()).await;
            return Err(problem);
        }
        Ok(Changed { generation: self.generation, changed: 1, notes: Vec::new() })
    }

    /// Closes a service that no rule steers to. Its connections go on until they end.
    ///
    /// # Errors
    /// See [`Kind`]; that a rule steers to it is one.
    pub async fn remove_service(&mut self, name: ServiceName) -> Result<Changed, Problem> {
        self.expect_service(&name)?;
        let users: Vec<String> =
            self.rules.iter().filter(|rule| rule.service == name).map(ToString::to_string).collect();
        if let Some(first) = users.first() {
            return Err(Problem::new(
                Kind::Conflict,
                format!("{} rules steer to the service {name}, the first is: {first}", users.len()),
            )
            .hint("remove those prefixes first, or steer them to another service"));
        }
        let Some(removed) = self.services.remove(&name) else {
            return Err(Problem::new(Kind::Failed, format!("the service {name} went away")));
        };
        let notes = match removed.origin {
            Origin::Config => vec![format!("{name} comes back with the next start, as configured")],
            Origin::Added => Vec::new(),
        };
        if let Err(problem) = self.change(self.rules.clone()).await {
            self.services.insert(name, removed);
            self.go_back_to(self.rules.clone()).await;
            return Err(problem);
        }
        removed.service.stop().await;
        Ok(Changed { generation: self.generation, changed: 1, notes })
    }

    /// Looks again at what may have changed outside: interfaces, and connections whose address can be given up. Tries
    /// again what could not be undone.
    pub async fn refresh(&mut self) {
        if self.broken.is_some() {
            self.go_back_to(self.rules.clone()).await;
        }
        if let Err(error) = self.steering.refresh() {
            error!("look again at the interfaces: {error:#}");
        }
        if let Err(error) = self.end_draining().await {
            error!("remove the routes of connections that have ended: {error:#}");
        }
    }

    async fn end_draining(&mut self) -> anyhow::Result<()> {
        if self.draining.is_empty() {
            return Ok(());
        }
        let connected = host::connected_addresses()?;
        self.draining.retain(|prefix| connected.contains(&prefix.address()));
        self.routes.remove_unwanted(&self.wanted_routes(&self.rules)).await
    }

    /// Takes everything out of the kernel. The state file stays.
    ///
    /// # Errors
    /// What could not be removed; the rest is.
    pub async fn stop(self) -> anyhow::Result<()> {
        let routes = self.routes.remove_unwanted(&HashSet::new()).await;
        let steering = self.steering.detach();
        for running in self.services.into_values() {
            running.service.stop().await;
        }
        routes.and(steering)
    }

    /// Makes the kernel and the state file equal to these rules and the services at hand, or leaves both as they are.
    async fn change(&mut self, rules: RuleSet) -> Result<(), Problem> {
        let former = self.rules.clone();
        let result = match self.put_in_force(rules).await {
            Ok(()) => self.store.save(&self.state()),
            Err(error) => Err(error),
        };
        let Err(error) = result else { return Ok(()) };
        self.go_back_to(former).await;
        Err(error.into())
    }

    async fn go_back_to(&mut self, former: RuleSet) {
        self.broken = self.put_in_force(former).await.err().map(|error| {
            error!("go back to the rules before, which is tried again: {error:#}");
            format!("the kernel may not hold these rules: {error:#}")
        });
    }

    async fn put_in_force(&mut self, rules: RuleSet) -> anyhow::Result<()> {
        // Before the first datagram can arrive that is to be seen as a loop.
        self.published.store(Arc::new(rules.clone()));
        let given_up = self.given_up(&rules);
        if !given_up.is_empty() {
            self.keep_connections_of(&rules, &given_up).await?;
        }
        let wanted = self.wanted_routes(&rules);
        self.routes.remove_unwanted(&wanted).await?;
        let plan = self.plan(&rules, &[])?;
        self.steering.apply(&plan)?;
        self.foreign_routes = self.routes.add_missing(&wanted).await?;
        self.rule_numbers.keep(rules.iter());
        self.service_slots.keep(self.services.keys());
        self.rules = rules;
        for running in self.services.values() {
            running.service.forget_replies();
        }
        info!("generation {}: {} rules", self.generation, self.rules.len());
        Ok(())
    }

    /// The rules in force whose prefixes will not be local any more.
    fn given_up(&self, rules: &RuleSet) -> Vec<Rule> {
        let remains_local = |prefix: &Prefix| {
            rules
                .iter()
                .any(|rule| rule.route && rule.prefix.contains(prefix.address()) && rule.prefix.len() <= prefix.len())
        };
        self.rules.iter().filter(|rule| rule.route && !remains_local(&rule.prefix)).cloned().collect()
    }

    /// Gives the connections of prefixes that are given up a route of their own.
    ///
    /// First everybody new is refused there, so that whoever is in can be found: established, waiting to be
    /// accepted, or in the middle of its handshake.
    async fn keep_connections_of(&mut self, rules: &RuleSet, given_up: &[Rule]) -> anyhow::Result<()> {
        let plan = self.plan(rules, given_up)?;
        self.steering.apply(&plan)?;
        let is_given_up = |address: &IpAddr| given_up.iter().any(|rule| rule.prefix.contains(*address));
        let connected = host::connected_addresses()?;
        self.draining.extend(connected.into_iter().filter(is_given_up).map(Prefix::host));
        self.routes.add_missing(&self.draining).await?;
        Ok(())
    }

    /// A plan under a new number: these rules, and refusals in the place of those that are given up.
    fn plan(&mut self, rules: &RuleSet, refused: &[Rule]) -> anyhow::Result<Plan> {
        self.generation += 1;
        let mut numbered = Vec::with_capacity(rules.len() + refused.len());
        for rule in rules {
            let number = self.rule_numbers.get(rule).context("there are too many rules")?;
            numbered.push(NumberedRule { number, rule: rule.clone() });
        }
        let mut services = vec![ServiceSockets::refusing()];
        for rule in refused {
            let number = self.rule_numbers.get(rule).context("there are too many rules")?;
            let rule = Rule { service: services[0].name.clone(), ..rule.clone() };
            numbered.push(NumberedRule { number, rule });
        }
        numbered.sort_by(|a, b| a.rule.precedence().cmp(&b.rule.precedence()));
        for (name, running) in &self.services {
            let slot = self.service_slots.get(name).context("there are too many services")?;
            let groups = running.service.groups();
            services.push(ServiceSockets { slot: slot.try_into()?, name: name.clone(), groups });
        }
        Ok(Plan { generation: self.generation, rules: numbered, services })
    }

    fn wanted_routes(&self, rules: &RuleSet) -> HashSet<Prefix> {
        rules.iter().filter(|rule| rule.route).map(|rule| rule.prefix).chain(self.draining.iter().copied()).collect()
    }

    fn state(&self) -> State {
        let services = self.services.values().filter(|it| it.origin == Origin::Added);
        let rules = self.rules.iter().filter(|it| it.origin == Origin::Added);
        State::new(services.map(|it| it.service.config().clone()).collect(), rules.cloned().collect())
    }

    fn expect_service(&self, name: &ServiceName) -> Result<(), Problem> {
        if self.services.contains_key(name) {
            return Ok(());
        }
        let names: Vec<&str> = self.services.keys().map(ServiceName::as_str).collect();
        Err(Problem::new(Kind::NotFound, format!("there is no service {name}"))
            .hint(format!("the services are: {}; add-service makes a new one", names.join(", "))))
    }

    fn expect_room_for(&self, rules: usize) -> Result<(), Problem> {
        let limit = self.rule_numbers.capacity();
        if rules <= limit {
            return Ok(());
        }
        Err(Problem::new(Kind::Failed, format!("there would be {rules} rules; the limit is {limit}"))
            .hint("use shorter prefixes, or fewer"))
    }

    async fn expect_safe(&self, rules: &[Rule]) -> Result<(), Problem> {
        let mut host =
            Host { addresses: host::addresses()?, gateways: self.routes.gateways().await?, listeners: Vec::new() };
        // Reading who listens is the expensive part, and only matters where an address of the host is concerned.
        let is_concerned = |rule: &Rule| host.addresses.iter().any(|(it, _)| rule.prefix.contains(*it));
        if rules.iter().any(is_concerned) {
            host.listeners = host::listeners()?;
        }
        let objections: Vec<String> = rules.iter().flat_map(|rule| host::objections(rule, &host)).collect();
        if objections.is_empty() {
            return Ok(());
        }
        Err(Problem::new(Kind::Unsafe, format!("refused for safety: {}", objections.join("; ")))
            .hint("--force does it anyway"))
    }
}

/// Tells sources that are steered themselves, to which an answer would come back.
fn loop_guard(published: &Arc<ArcSwap<RuleSet>>) -> LoopGuard {
    let published = Arc::clone(published);
    Arc::new(move |source| {
        let rules = published.load();
        matches!(decide(&rules, source.ip(), Transport::Udp, source.port()), Decision::Steer(_))
    })
}

/// What configuration and state file say together. They must not contradict each other.
fn desired(config: &Config, state: &State) -> anyhow::Result<(Vec<(ServiceConfig, Origin)>, RuleSet)> {
    const ADVICE: &str = "change the configuration, or what was added by hand: state.json in the state directory";
    let mut services: Vec<_> = config.services.iter().map(|it| (it.clone(), Origin::Config)).collect();
    for added in &state.services {
        match services.iter().find(|(service, _)| service.name == added.name) {
            Some((configured, _)) if configured == added => {}
            Some(_) => bail!("the service {} was added by hand with other settings; {ADVICE}", added.name),
            None => services.push((added.clone(), Origin::Added)),
        }
    }
    let default = ServiceConfig::default_service();
    if !services.iter().any(|(service, _)| service.name == default.name) {
        services.push((default, Origin::Config));
    }
    let mut rules = config.rules.clone();
    for rule in &state.rules {
        rule.validate().context(ADVICE)?;
        if !services.iter().any(|(service, _)| service.name == rule.service) {
            bail!(
                "there is no service {} any more, to which a rule that was added by hand steers: {rule}; {ADVICE}",
                rule.service
            );
        }
        rules.insert(rule.clone()).context(ADVICE)?;
    }
    Ok((services, rules))
}

fn conflict_problem(conflict: &Conflict) -> Problem {
    Problem::new(Kind::Conflict, conflict.to_string()).hint("remove the rule that is there first, or change the ports")
}
