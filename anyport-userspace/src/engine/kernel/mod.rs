//! The hold on the kernel: what steers, which routes are there, and what is lost of it.
//!
//! Every step makes the kernel equal to what is desired and can be repeated, so a failure is undone by applying the previous state
//! again.

mod reconcile;
#[cfg(test)]
mod tests;
mod transition;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
    ops::Range,
    sync::Arc,
};

use anyhow::Context as _;
use anyport_common::{flow::Flow, maps::Counters};
use tracing::error;

use self::reconcile::{BackOff, RepairsByKind, RoutesLook};
use super::{
    desired::{Desired, Steps},
    services::Services,
};
use crate::{
    events::EventBus,
    host::{self, Host, Peer, Role},
    routes::{AnswerWay, Coverage, Route, Routes, Watch},
    rules::{Overlay, Prefix, SourceLists},
    steering::{
        BackEnd, Decided, Plan, SharedCounters, Steering,
        choose::{Chosen, Outcome},
    },
    table::{OwnSegments, Published, Receiver, Table},
};

/// See [`crate::host::connected_addresses`].
pub type Connected = fn() -> anyhow::Result<HashSet<IpAddr>>;

/// See [`crate::host::look`].
pub type Look = fn() -> anyhow::Result<Host>;

/// See [`crate::host::peers`].
pub type Peers = fn(&BTreeSet<IpAddr>, &dyn Fn(IpAddr) -> bool) -> anyhow::Result<Vec<Peer>>;

/// What the kernel holds, and what holds it.
#[derive(Debug)]
pub(super) struct Kernel {
    steering: Box<dyn Steering>,
    outcomes: Vec<Outcome>,
    /// The lookup table as the handlers see it, by which they recognize loops.
    published: Arc<Published>,
    /// That table, where the back end has none.
    table: Option<Table>,
    /// Follows the slots of services.
    events: Arc<EventBus>,
    generation: u64,
    routes: Routes,
    /// Lists the addresses of this host that have connections.
    connected: Connected,
    /// Lists the addresses and listeners of this host.
    look: Look,
    /// Lists others that this host talks to.
    peers: Peers,
    /// What our routes make local.
    coverage: Coverage,
    /// Blocks whose local route was there before us.
    foreign_routes: Vec<Prefix>,
    /// Addresses that keep their route for connections that outlive their rule.
    draining: HashSet<Prefix>,
    /// Why the kernel may not hold the rules that it should.
    broken: Option<String>,
    /// When that is to be tried again.
    retry: BackOff,
    /// What others have removed, and what became of it.
    drift: RepairsByKind,
    routes_look: RoutesLook,
    /// What steers otherwise than the rules demand, until it is made again.
    wrong: Option<String>,
    /// Why it could not be seen what the kernel has.
    unseen: Option<String>,
}

/// What an engine has its hold on the kernel by.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) chosen: Chosen,
    pub(super) routes: Routes,
    pub(super) connected: Connected,
    pub(super) look: Look,
    pub(super) peers: Peers,
    /// The back end's table, for readers in this process.
    pub(super) published: Arc<Published>,
    /// The event bus and its subscribers.
    pub(super) events: Arc<EventBus>,
}

impl Kernel {
    /// A hold on a kernel that has what an earlier daemon left.
    pub(super) async fn new(parts: Parts) -> anyhow::Result<Self> {
        let Parts { chosen, routes, connected, look, peers, published, events } = parts;
        let has_no_table = chosen.steering.back_end() == BackEnd::Tproxy;
        let own_segments = || OwnSegments { readers: Arc::clone(&published) };
        Ok(Self {
            table: has_no_table.then(|| Table::new(Box::new(own_segments()))),
            steering: chosen.steering,
            outcomes: chosen.outcomes,
            published,
            events,
            generation: 0,
            // What a daemon left that was killed is local too, and stays so where it still has to be.
            coverage: routes.ours().await?.into_iter().collect(),
            routes,
            connected,
            look,
            peers,
            foreign_routes: Vec::new(),
            draining: HashSet::new(),
            broken: None,
            retry: BackOff::default(),
            drift: RepairsByKind::default(),
            routes_look: RoutesLook::default(),
            wrong: None,
            unseen: None,
        })
    }

    /// Activates the first rules of all.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(super) async fn begin(&mut self, desired: &Desired, services: &Services, steps: &Steps) -> anyhow::Result<()> {
        // Routes of a daemon that was killed stay where they are still wanted.
        let wanted = self.wanted_coverage(desired.rules());
        self.routes.set(&self.coverage.intersection(&wanted)).await?;
        self.steer(desired, services, None, steps)?;
        self.foreign_routes = self.routes.set(&wanted).await?;
        self.coverage = wanted;
        Ok(())
    }

    /// The rules are those before a change that failed, and so is what is to be local. [`Self::repair`] carries that out.
    pub(super) fn roll_back(&mut self, desired: &Desired) {
        self.coverage = self.wanted_coverage(desired.rules());
    }

    /// Makes the kernel equal to the rules, whatever it holds.
    pub(super) async fn repair(&mut self, desired: &Desired, services: &Services) {
        let forgotten = self.steering.forget_lost();
        let steered = forgotten.and_then(|()| self.steer(desired, services, None, &Steps::default()));
        let result = match steered {
            Ok(()) => self.routes.set(&self.coverage).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(foreign) => {
                self.foreign_routes = foreign;
                self.broken = None;
                self.retry = BackOff::default();
            }
            Err(error) => {
                let pause = self.retry.fail();
                error!("make the kernel hold the rules, which is tried again in {} s: {error:#}", pause.as_secs());
                self.broken = Some(format!("the kernel may not hold these rules, which is tried again: {error:#}"));
            }
        }
    }

    /// Has the back end steer by the rules, of which these prefixes have changed; nothing says that anything may have. What is drained
    /// is refused.
    pub(super) fn steer(
        &mut self,
        desired: &Desired,
        services: &Services,
        changed: Option<&[Prefix]>,
        steps: &Steps,
    ) -> anyhow::Result<()> {
        self.steer_through(Overlay::default(), desired, services, changed, steps)
    }

    /// As [`Self::steer`], by the rules as they are read through an overlay.
    fn steer_through(
        &mut self,
        mut overlay: Overlay,
        desired: &Desired,
        services: &Services,
        changed: Option<&[Prefix]>,
        steps: &Steps,
    ) -> anyhow::Result<()> {
        let rules = desired.drained(&mut overlay);
        self.generation += 1;
        let services = services.sockets();
        let plan = Plan {
            generation: self.generation,
            rules,
            changed,
            fresh: &steps.fresh,
            freed: &steps.freed,
            moved: &steps.moved,
            services: &services,
        };
        if let Some(table) = &mut self.table {
            // This table does not know which clients services allow. It only shows what is steered at all.
            let receiver = |slot| Receiver { slot, sources: SourceLists::EVERYBODY };
            let receivers: HashMap<_, _> = services.iter().map(|it| (&it.name, receiver(it.slot))).collect();
            let find = |name: &_| receivers.get(name).copied().with_context(|| format!("there is no service {name}"));
            let made = match changed {
                Some(prefixes) => table.change(rules, prefixes, &find),
                None => table.make(rules, &find),
            };
            if let Err(error) = made {
                table.abort();
                return Err(error);
            }
            // Before the first datagram can arrive that is to be seen as a loop.
            self.published.publish(table.reader());
            table.commit();
        }
        self.steering.apply(&plan)?;
        self.events.follow(|name| services.iter().find(|it| it.name == *name).map(|it| it.slot));
        if let Some(reader) = self.steering.reader() {
            self.published.publish(reader);
        }
        Ok(())
    }

    /// The number of the rule set that the kernel holds.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Which back end is in use.
    pub(super) fn back_end(&self) -> BackEnd {
        self.steering.back_end()
    }

    /// Which back ends were tried.
    pub(super) fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    /// The lookup table, for readers in this process.
    pub(super) fn published(&self) -> &Arc<Published> {
        &self.published
    }

    /// The event bus and its subscribers.
    pub(super) fn events(&self) -> &Arc<EventBus> {
        &self.events
    }

    /// What became of the packets: gives the counters of a rule by its number.
    pub(super) fn counters(&self) -> anyhow::Result<Box<dyn Fn(u32) -> Counters + '_>> {
        self.steering.counters()
    }

    /// What was counted under numbers that the last change freed.
    pub(super) fn left(&self, numbers: &[Range<u32>]) -> Vec<(u32, Counters)> {
        self.steering.left(numbers)
    }

    /// The same for readers that have no hold on the kernel, where counters can be read without asking it.
    pub(super) fn shared_counters(&self) -> Option<Arc<dyn SharedCounters>> {
        self.steering.shared_counters()
    }

    /// Adds what was counted before, by the numbers of rules.
    pub(super) fn restore_counters(&mut self, counted: &[(u32, Counters)]) -> anyhow::Result<()> {
        self.steering.restore_counters(counted)
    }

    /// How many packets were dropped for a fault, where that is counted.
    pub(super) fn dropped(&self) -> anyhow::Result<Option<u64>> {
        self.steering.dropped()
    }

    /// Packets that no rule is about.
    pub(super) fn unmatched(&self) -> anyhow::Result<u64> {
        self.steering.unmatched()
    }

    /// Bytes of the kernel's memory that rules and counters take.
    pub(super) fn bytes(&self) -> u64 {
        self.steering.bytes()
    }

    /// The interfaces that are watched, where the back end works by interface.
    pub(super) fn interfaces(&self) -> Vec<String> {
        self.steering.interfaces()
    }

    /// Whether a socket that an earlier daemon steered to can be steered to without a descriptor of it.
    pub(super) fn can_adopt(&self, cookie: u64) -> bool {
        self.steering.can_adopt(cookie)
    }

    /// What the kernel decides about the first packet of a flow.
    pub(super) fn decide(&self, flow: &Flow) -> anyhow::Result<Decided> {
        self.steering.decide(flow)
    }

    /// The route that the kernel takes to an address.
    pub(super) async fn route_to(&self, address: IpAddr) -> anyhow::Result<Option<Route>> {
        self.routes.to(address).await
    }

    /// The way of an answer to a client, from where that has dialled, if it is local.
    pub(super) async fn way_of_answer(
        &self,
        client: IpAddr,
        from: Option<IpAddr>,
        mark: u32,
    ) -> anyhow::Result<AnswerWay> {
        self.routes.of_answer(client, from, mark).await
    }

    /// Whether the filter of reverse paths drops what a client sends there by this interface.
    pub(super) async fn is_filtered(&self, client: IpAddr, to: IpAddr, interface: &str) -> anyhow::Result<bool> {
        self.routes.is_filtered(client, to, interface).await
    }

    /// Whether routes of ours make all of a prefix local.
    pub(super) fn covers(&self, prefix: &Prefix) -> bool {
        self.coverage.covers(prefix)
    }

    /// The blocks that our routes make local.
    #[cfg(test)]
    pub(super) fn blocks(&self) -> impl Iterator<Item = Prefix> {
        self.coverage.blocks()
    }

    /// The host's addresses and gateways.
    pub(super) async fn host(&self) -> anyhow::Result<Host> {
        Ok(Host { addresses: host::addresses()?, gateways: self.routes.gateways().await?, ..Host::default() })
    }

    /// The host's addresses and listeners.
    pub(super) fn look_at_host(&self) -> anyhow::Result<Host> {
        (self.look)()
    }

    /// Others that this host talks to, gateways among them, at addresses that routes of ours make local.
    pub(super) async fn peers_inside(&self, own: &BTreeSet<IpAddr>) -> anyhow::Result<Vec<Peer>> {
        if self.coverage.blocks().next().is_none() {
            return Ok(Vec::new());
        }
        let is_inside = |address: IpAddr| !own.contains(&address) && self.covers(&Prefix::host(address));
        let gateways = self.routes.gateways().await?.into_iter().filter(|it| is_inside(*it));
        let mut inside: Vec<Peer> = gateways.map(|address| Peer { address, role: Role::Gateway }).collect();
        inside.extend((self.peers)(own, &is_inside)?);
        Ok(inside)
    }

    /// What the last change left as it was found.
    pub(super) fn notes_on_routes(&self) -> Vec<String> {
        let foreign = self.foreign_routes.iter();
        foreign.map(|it| format!("{it} has a local route already, which is left as it was found")).collect()
    }

    /// Addresses that keep their route for connections that outlive their rule, in order.
    pub(super) fn draining(&self) -> Vec<Prefix> {
        let mut draining: Vec<_> = self.draining.iter().copied().collect();
        draining.sort_by_key(|prefix| (!prefix.is_ipv4(), prefix.bounds()));
        draining
    }

    /// Why the kernel may not hold the rules that it should.
    pub(super) fn broken(&self) -> Option<&String> {
        self.broken.as_ref()
    }

    /// Notes why that is so; [`Self::repair`] has to run then.
    pub(super) fn note_broken(&mut self, why: String) {
        self.broken = Some(why);
    }

    /// Notes what steers otherwise than the rules demand: a full rebuild puts it right.
    pub(super) fn note_wrong(&mut self, what: String) {
        self.wrong = Some(what);
    }

    /// Whether the kernel may not hold the rules, and that is to be tried again now.
    pub(super) fn is_repair_due(&self) -> bool {
        self.broken.is_some() && self.retry.is_over()
    }

    /// Why it is not known what the kernel holds.
    pub(super) fn uncertain(&self) -> impl Iterator<Item = &String> {
        self.broken.iter().chain(&self.unseen)
    }

    /// What the back end itself says does not work.
    pub(super) fn degraded_steering(&self) -> Vec<String> {
        self.steering.degraded()
    }

    /// Reports what others do to interfaces and to our routes. Must be called within a tokio runtime.
    pub(super) fn watch(&self) -> anyhow::Result<Watch> {
        self.routes.watch()
    }

    /// Releases memory of the lookup table that is no longer used.
    pub(super) fn trim(&mut self) -> anyhow::Result<()> {
        self.table.as_mut().map_or(Ok(()), Table::trim)
    }

    /// Leaves steering in the kernel, for another process to go on with.
    pub(super) fn leave(self) {
        self.steering.leave();
    }

    /// Takes the routes out of the kernel, and then what steers.
    pub(super) async fn detach(self) -> anyhow::Result<()> {
        let routes = self.routes.set(&Coverage::default()).await.map(drop);
        let steering = self.steering.detach();
        routes.and(steering)
    }
}
