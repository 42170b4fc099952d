//! Services at work: those that are open, the sockets that other processes registered for them, and what all of them share.

mod registered;
mod wanted;

use std::{
    collections::BTreeMap,
    mem,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use anyport_common::{
    flow::{Flow, Transport},
    maps::MAX_SERVICES,
    table::Verdict,
};
use tokio::{runtime::Handle, sync::Notify};

pub use self::registered::fetch_registered;
pub(super) use self::registered::{KINDS, Registrations, boot_id, make_group_transparent};
use super::{desired::DRAINED_SLOT, past::Past};
use crate::{
    api::{Problem, ProblemKind},
    closing::PassedFd,
    config::Config,
    datagram::Ends,
    events::{EventBus, EventPublisher},
    keeper::Link,
    rules::{Origin, ServiceName, SourceLists, to_address},
    service::{
        AnswerGuard, Capacity, DescriptorPool, ForwardGuard, HandlerKind, Lineages, LoopGuard, OwnedGuard, Service,
        ServiceConfig, SharedContext, Witness, WorkerHandles,
    },
    steering::{BackEnd, ServiceSockets},
    table::Published,
};

/// The services, by name.
#[derive(Debug)]
pub(super) struct Services {
    running: BTreeMap<ServiceName, Running>,
    /// What was counted by rules and services that are gone.
    past: Past,
    /// By service: they outlive a service that is replaced by one of the same name.
    registered: BTreeMap<ServiceName, Registrations>,
    /// Notified when a process has ended that registered a socket.
    owner_exits: Arc<Notify>,
    /// What all services share.
    context: SharedContext,
    /// What steers to them.
    back_end: BackEnd,
    /// To which of them.
    published: Arc<Published>,
    /// By slot: whether its service is one of the handler `forward`.
    forwarding: Arc<[AtomicBool]>,
    /// How many services there were when it was measured what they need.
    measured: usize,
    /// By slot: whether its service is one of the handler `registered`.
    owned: Arc<[AtomicBool]>,
}

/// A service at work.
#[derive(Debug)]
pub(super) struct Running {
    service: Service,
    origin: Origin,
    slot: u16,
}

impl Running {
    /// What it does.
    pub(super) fn service(&self) -> &Service {
        &self.service
    }

    /// What it was made of.
    pub(super) fn config(&self) -> &ServiceConfig {
        self.service.config()
    }

    /// Where it came from.
    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// By which the kernel knows it.
    pub(super) fn slot(&self) -> u16 {
        self.slot
    }

    /// Whether this is the service that is there when nobody has made one of its name.
    pub(super) fn is_preset(&self) -> bool {
        self.origin == Origin::Config && *self.config() == ServiceConfig::default_service()
    }

    /// Closes its sockets. Its connections go on until they end.
    pub(super) async fn stop(self) {
        self.service.stop().await;
    }
}

impl Services {
    /// No services yet.
    ///
    /// # Errors
    /// This process may have no descriptors for clients.
    pub(super) fn new(
        config: &Config,
        (back_end, published, events): (BackEnd, &Arc<Published>, &Arc<EventBus>),
        workers: WorkerHandles,
        keeper: Link,
    ) -> anyhow::Result<Self> {
        let descriptors = DescriptorPool::of_process()?;
        let by_slot = || -> Arc<[AtomicBool]> { (0..MAX_SERVICES).map(|_| AtomicBool::new(false)).collect() };
        let (forwarding, owned) = (by_slot(), by_slot());
        let context = SharedContext {
            workers,
            control: Handle::current(),
            capacity: Capacity::new(config.limits(), descriptors.clone()),
            sees_to_sources: back_end == BackEnd::Tproxy,
            descriptors,
            loop_guard: loop_guard(published),
            forward_guard: forward_guard(published, &forwarding),
            lineages: Lineages::default(),
            publisher: (!events.is_connected()).then(|| EventPublisher::new(Arc::clone(events), Arc::clone(published))),
            witness: Witness::new(owned_guard(published, &owned)),
            keeper,
        };
        Ok(Self {
            running: BTreeMap::new(),
            past: Past::default(),
            registered: BTreeMap::new(),
            owner_exits: Arc::default(),
            context,
            back_end,
            published: Arc::clone(published),
            forwarding,
            measured: 0,
            owned,
        })
    }

    /// What all services share.
    pub(super) fn context(&self) -> &SharedContext {
        &self.context
    }

    /// Notified when a process has ended that registered a socket.
    pub(super) fn owner_exits(&self) -> &Arc<Notify> {
        &self.owner_exits
    }

    /// The service of this name.
    pub(super) fn get(&self, name: &ServiceName) -> Option<&Running> {
        self.running.get(name)
    }

    /// All of them, by name.
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (&ServiceName, &Running)> {
        self.running.iter()
    }

    /// What they were made of.
    pub(super) fn configs(&self) -> impl Iterator<Item = &ServiceConfig> {
        self.running.values().map(Running::config)
    }

    /// What those of an origin were made of.
    pub(super) fn configs_of(&self, origin: Origin) -> Vec<ServiceConfig> {
        let services = self.running.values().filter(|it| it.origin == origin);
        services.map(|it| it.config().clone()).collect()
    }

    /// Which clients a service allows.
    pub(super) fn sources_of(&self, name: &ServiceName) -> &SourceLists {
        self.get(name).map_or(SourceLists::EVERYBODY, |it| &*it.config().sources)
    }

    /// Refuses a service that is not there.
    pub(super) fn expect(&self, name: &ServiceName) -> Result<(), Problem> {
        if self.running.contains_key(name) {
            return Ok(());
        }
        Err(Problem::new(ProblemKind::NotFound, format!("there is no service {name}")).hint(self.hint_at_names()))
    }

    /// The services that there are.
    pub(super) fn hint_at_names(&self) -> String {
        let names: Vec<&str> = self.running.keys().map(ServiceName::as_str).collect();
        format!("the services are: {}; add-service makes a new one", names.join(", "))
    }

    /// Where the back end leaves it to services to refuse sources, registered sockets would take all of them.
    pub(super) fn expect_enforceable(&self, config: &ServiceConfig) -> Result<(), Problem> {
        let ServiceConfig { name, handler, sources, .. } = config;
        if *handler != HandlerKind::Registered || sources.is_empty() || !self.context.sees_to_sources {
            return Ok(());
        }
        Err(Problem::new(
            ProblemKind::Invalid,
            format!("service {name}: with tproxy nobody would keep sources from registered sockets"),
        )
        .hint("leave source-allow and source-deny out, or steer by sk-lookup or tc"))
    }

    /// Opens the sockets of a service. They receive nothing before the next plan. The slot is taken once they are open.
    pub(super) fn open(
        &mut self,
        config: ServiceConfig,
        origin: Origin,
        slot: impl FnOnce() -> anyhow::Result<u16>,
    ) -> anyhow::Result<()> {
        let name = config.name.clone();
        self.expect_enforceable(&config)?;
        let service = Service::start(config, &self.context)?;
        let slot = slot()?;
        let is_forwarding = service.config().handler == HandlerKind::Forward;
        self.forwarding[usize::from(slot)].store(is_forwarding, Relaxed);
        let is_owned = service.config().handler == HandlerKind::Registered;
        self.owned[usize::from(slot)].store(is_owned, Relaxed);
        self.running.insert(name, Running { service, origin, slot });
        self.measured = usize::MAX;
        Ok(())
    }

    /// Counts again how many descriptors are left for clients, if services have come or gone. Where that can't be seen, what was seen last holds.
    pub(super) fn measure_descriptors(&mut self) {
        if self.measured != self.running.len() && self.context.descriptors.measure().is_ok() {
            self.measured = self.running.len();
        }
    }

    /// Takes a service out, which goes on until it is stopped.
    pub(super) fn take(&mut self, name: &ServiceName) -> Option<Running> {
        let running = self.running.remove(name)?;
        self.past.take_out(name, running.slot, &running.service);
        Some(running)
    }

    /// A service that was taken out is about to be stopped, and leaves what it has counted.
    pub(super) fn bury(&mut self, running: &Running) {
        let Self { past, running: all, .. } = self;
        past.close(&running.config().name, running.slot, &running.service);
        past.fold(|name| all.contains_key(name));
    }

    /// What was counted by rules and services that are gone.
    pub(super) fn past(&self) -> &Past {
        &self.past
    }

    /// The same, to be changed.
    pub(super) fn past_mut(&mut self) -> &mut Past {
        &mut self.past
    }

    /// Puts services back that were taken out.
    pub(super) fn put_back(&mut self, services: impl IntoIterator<Item = (ServiceName, Running)>) {
        for (name, running) in services {
            self.past.put_back(running.slot);
            self.running.insert(name, running);
        }
    }

    /// Has a service come from there from now on. Returns where it came from before.
    pub(super) fn change_origin(&mut self, name: &ServiceName, origin: Origin) -> Option<Origin> {
        Some(mem::replace(&mut self.running.get_mut(name)?.origin, origin))
    }

    /// What rules may name, as a plan has it.
    pub(super) fn sockets(&self) -> Vec<ServiceSockets> {
        let drained = ServiceSockets { slot: DRAINED_SLOT, name: ServiceName::drained(), ..ServiceSockets::refusing() };
        let mut services = vec![ServiceSockets::refusing(), drained];
        for (name, running) in &self.running {
            let (groups, sources) = (self.groups_of(running), Arc::clone(&running.config().sources));
            services.push(ServiceSockets { slot: running.slot, name: name.clone(), groups, sources });
        }
        services
    }

    /// Sends what comes over this connection from what is steered to a service, until the service is closed.
    pub(super) fn answer_for(&mut self, name: &ServiceName, connection: PassedFd) -> anyhow::Result<()> {
        let Some(running) = self.running.get_mut(name) else { return Ok(()) };
        let is_ours = steered_to(&self.published, [running.slot; 2]);
        running.service.answer_for(connection, is_ours, &self.context)
    }

    /// Has the sockets go that answer from addresses, and flows that are forwarded, since those may be steered no more.
    pub(super) fn rules_changed(&self) {
        for running in self.running.values() {
            // What is being drained takes no new flows, and keeps those that it has.
            running.service.rules_changed(&steered_to(&self.published, [running.slot, DRAINED_SLOT]));
        }
    }

    /// Leaves the sockets with the keeper. Connections go on in this process; they are over when what is returned is whole again.
    pub(super) async fn leave(self) -> DescriptorPool {
        for running in self.running.into_values() {
            running.service.leave().await;
        }
        self.context.descriptors
    }

    /// Closes all of them.
    pub(super) async fn stop(self) {
        for running in self.running.into_values() {
            running.stop().await;
        }
    }
}

/// Recognizes sources that are steered themselves, to which an answer would come back.
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

/// Recognizes what comes back to a service that forwards when this host sends it.
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

/// Recognizes what is steered to registered sockets.
fn owned_guard(published: &Arc<Published>, owned: &Arc<[AtomicBool]>) -> OwnedGuard {
    let (published, owned) = (Arc::clone(published), Arc::clone(owned));
    Arc::new(move |ends| match published.read(|reader| reader.lookup(&flow_of(ends))) {
        Verdict::Steer { service, .. } => owned[usize::from(service)].load(Relaxed),
        _ => false,
    })
}

fn flow_of(Ends { client, dialled }: Ends) -> Flow {
    Flow {
        source: to_address(client.ip()),
        address: to_address(dialled.ip()),
        transport: Transport::Udp,
        port: dialled.port(),
    }
}

/// Recognizes what is steered to one of these.
fn steered_to(published: &Arc<Published>, slots: [u16; 2]) -> AnswerGuard {
    let published = Arc::clone(published);
    Arc::new(move |ends| {
        let verdict = published.read(|reader| reader.lookup(&flow_of(ends)));
        matches!(verdict, Verdict::Steer { service, .. } if slots.contains(&service))
    })
}

/// Each fallback must be a service that has sockets of its own.
///
/// # Errors
/// Names the first one that is not.
pub(super) fn expect_fallbacks(services: &[&ServiceConfig]) -> Result<(), Problem> {
    for ServiceConfig { name, fallback, .. } in services {
        let Some(fallback) = fallback else { continue };
        let problem = match services.iter().find(|it| it.name == *fallback) {
            Some(it) if it.handler != HandlerKind::Registered => continue,
            Some(_) => "has the handler registered itself",
            None => "is not there",
        };
        return Err(Problem::new(
            ProblemKind::Conflict,
            format!("{fallback}, the fallback of the service {name}, {problem}"),
        )
        .hint("a fallback is a service with sockets of its own, such as default"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
