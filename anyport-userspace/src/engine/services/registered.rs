//! Sockets that other processes registered: which are there, which are gone, and what stands in for them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    net::SocketAddr,
    path::Path,
    sync::Arc,
};

use anyhow::Context as _;
use anyport_common::{flow::Transport, maps::SOCKETS_PER_SERVICE};
use socket2::{Domain, SockRef};
use tracing::{error, warn};

use super::{Running, Services};
use crate::{
    closing::PassedFd,
    host,
    log_limit::LogLimit,
    privileges,
    register::{Candidate, KeptSocket, Process, Registered, holders},
    rules::{Protocol, RuleSet, ServiceName},
    service::{Family, HandlerKind, Queue, SocketInfo},
    steering::{BackEnd, GroupSocket, Holder},
    store::Store,
};

/// Owners can cause this line.
static GONE: LogLimit = LogLimit::new();

const KINDS_COUNT: usize = SOCKETS_PER_SERVICE as usize;

/// In the order of [`anyport_common::flow::Flow::socket_offset`].
pub(in crate::engine) const KINDS: [(Family, Transport); KINDS_COUNT] = [
    (Family::Ipv4, Transport::Tcp),
    (Family::Ipv4, Transport::Udp),
    (Family::Ipv6, Transport::Tcp),
    (Family::Ipv6, Transport::Udp),
];

/// What was registered for a service, in the order of [`KINDS`].
#[derive(Clone, Debug, Default)]
pub(in crate::engine) struct Registrations {
    live: [Option<Arc<Registered>>; KINDS_COUNT],
    /// Why sockets went, until others come in their place.
    lost: [Option<String>; KINDS_COUNT],
}

/// What a check of the registered sockets has found.
#[derive(Debug)]
pub(in crate::engine) struct Look {
    pub(in crate::engine) queues: Vec<Queue>,
    /// Whether one is closed.
    pub(in crate::engine) has_lost: bool,
}

impl Registrations {
    /// The socket at this place.
    pub(in crate::engine) fn live(&self, place: usize) -> Option<&Arc<Registered>> {
        self.live[place].as_ref()
    }

    /// Has a socket take a place. Returns whether that makes a difference.
    pub(in crate::engine) fn put(&mut self, place: usize, socket: &Arc<Registered>) -> bool {
        self.lost[place] = None;
        let was = self.live[place].replace(Arc::clone(socket));
        was.is_none_or(|was| was.cookie != socket.cookie)
    }

    /// Gives a place up. Returns whether something was there.
    pub(in crate::engine) fn clear(&mut self, place: usize) -> bool {
        let (live, lost) = (self.live[place].take(), self.lost[place].take());
        live.is_some() || lost.is_some()
    }

    fn is_empty(&self) -> bool {
        self.live.iter().all(Option::is_none)
    }
}

impl Services {
    /// What is registered for a service.
    pub(in crate::engine) fn registrations(&self, service: &ServiceName) -> Option<&Registrations> {
        self.registered.get(service)
    }

    /// Has other sockets be registered for a service.
    pub(in crate::engine) fn register(&mut self, service: ServiceName, registrations: Registrations) {
        self.registered.insert(service, registrations);
        self.witness_clients();
    }

    /// Has the clients of registered UDP sockets be known, before anything is steered to these.
    fn witness_clients(&self) {
        let is_udp = |socket: &Arc<Registered>| socket.transport == Transport::Udp;
        if self.registered.values().flat_map(|it| it.live.iter().flatten()).any(is_udp) {
            self.context.witness.open(self.context.workers.first());
        }
    }

    /// One socket of each group for a service: its own, or those that were registered, or else those of its fallback.
    pub(in crate::engine) fn groups_of(
        &self,
        running: &Running,
    ) -> [Option<GroupSocket>; SOCKETS_PER_SERVICE as usize] {
        let config = running.config();
        if config.handler != HandlerKind::Registered {
            return running.service.groups();
        }
        let fallback = config.fallback.as_ref().and_then(|name| self.get(name));
        let mut groups = fallback.map(|running| running.service.groups()).unwrap_or_default();
        let registered = self.registered.get(&config.name).into_iter().flat_map(|it| &it.live);
        for (group, socket) in groups.iter_mut().zip(registered) {
            if let Some(socket) = socket {
                let holder = Holder::Owner(Arc::clone(socket));
                *group = Some(GroupSocket { cookie: socket.cookie, bound: socket.local, holder });
            }
        }
        groups
    }

    /// The sockets of a service as people see them, without those of its fallback.
    pub(in crate::engine) fn sockets_of(&self, running: &Running) -> Vec<SocketInfo> {
        let registered = self.registered.get(&running.config().name).into_iter().flat_map(|it| &it.live);
        let registered = KINDS.iter().zip(registered).filter_map(|((family, transport), socket)| {
            let Registered { local, cookie, owner, .. } = &**socket.as_ref()?;
            let protocol = Protocol::from(*transport);
            Some(SocketInfo { family: *family, protocol, local: *local, cookie: *cookie, pid: owner.pid })
        });
        running.service.sockets().iter().cloned().chain(registered).collect()
    }

    /// What `status` says about services without a live socket.
    pub(in crate::engine) fn lost_sockets(&self, rules: &RuleSet) -> Vec<String> {
        let (mut lines, mut unregistered) = (Vec::new(), BTreeSet::new());
        let registered = self.running.iter().filter(|(_, it)| it.config().handler == HandlerKind::Registered);
        let reasons: Vec<_> = registered
            .map(|(name, running)| {
                let Registrations { live, lost } = self.registered.get(name).cloned().unwrap_or_default();
                let reasons: Vec<String> = lost.into_iter().flatten().collect();
                if reasons.is_empty() && live.iter().all(Option::is_none) {
                    unregistered.insert(name);
                }
                (name, running, reasons)
            })
            .collect();
        let without_rules = without_rules(unregistered.clone(), rules);
        for (name, running, mut reasons) in reasons {
            if unregistered.contains(name) && !without_rules.contains(name) {
                reasons.push("nobody has registered one".into());
            }
            reasons.dedup();
            let instead = match &running.config().fallback {
                Some(fallback) => format!("{fallback} stands in"),
                None => "clients are refused".into(),
            };
            lines.extend(reasons.into_iter().map(|why| format!("service {name} has no live socket: {why}; {instead}")));
        }
        lines
    }

    /// Checks the registered sockets: notices those that are closed, and processes that hold one no more. Nothing where
    /// there are none.
    ///
    /// # Errors
    /// The kernel does not list its sockets.
    pub(in crate::engine) fn look_at_registered(&mut self) -> anyhow::Result<Option<Look>> {
        if self.registered.values().all(Registrations::is_empty) {
            return Ok(None);
        }
        let open: HashMap<u64, host::Listener> = host::listeners()?.into_iter().map(|it| (it.inode, it)).collect();
        let live = self.registered.values().flat_map(|it| it.live.iter().flatten());
        let queue = |socket: &Arc<Registered>| {
            let waiting = open.get(&socket.inode)?.waiting;
            Some(Queue { cookie: socket.cookie, waiting, accepted: None })
        };
        let queues = live.filter_map(queue).collect();
        let mut has_lost = false;
        for (name, registrations) in &mut self.registered {
            let Registrations { live, lost } = registrations;
            for (live, lost) in live.iter_mut().zip(lost) {
                let Some(socket) = live.as_ref() else { continue };
                let host::Owner { pid, name: comm } = &socket.owner;
                if !open.contains_key(&socket.inode) {
                    let end = if socket.has_owner_ended() { "exited" } else { "closed it" };
                    let why = format!("its owner, pid {pid} ({comm}), {end}");
                    if let Some(left_out) = GONE.next() {
                        let transport = Protocol::from(socket.transport);
                        warn!("service {name}: {transport} {} is gone: {why}{left_out}", socket.local);
                    }
                    (*live, *lost) = (None, Some(why));
                    has_lost = true;
                } else if socket.has_owner_ended()
                    && let Some((pid, _)) = holders(socket.inode).next()
                {
                    *live = Some(Arc::new(socket.held_by(pid, &self.owner_exits)));
                }
            }
        }
        Ok(Some(Look { queues, has_lost }))
    }

    /// Takes up what was registered with an earlier daemon and is still open.
    /// `can_adopt` says of a cookie whether packets can be steered to its socket without a descriptor.
    pub(in crate::engine) fn restore_registered(&mut self, kept: Vec<KeptSocket>, can_adopt: impl Fn(u64) -> bool) {
        for kept in kept {
            let takes = |running: &Running| running.config().handler == HandlerKind::Registered;
            if !self.get(&kept.service).is_some_and(takes) {
                continue;
            }
            let socket = self.find(&kept, &can_adopt).map(Arc::new);
            let registrations = self.registered.entry(kept.service.clone()).or_default();
            for place in kept.places.iter().copied().filter(|place| *place < KINDS.len()) {
                match &socket {
                    Ok(socket) => registrations.live[place] = Some(Arc::clone(socket)),
                    Err(why) => registrations.lost[place] = Some(why.clone()),
                }
            }
        }
        self.witness_clients();
    }

    /// The socket that was kept, from the first source that has it: the keeper, which fetched it while it was root; a
    /// process that holds it; or, without a descriptor, the kernel, which has it still.
    fn find(&self, kept: &KeptSocket, can_adopt: impl Fn(u64) -> bool) -> Result<Registered, String> {
        let KeptSocket { cookie, local, pid, .. } = *kept;
        let through_keeper = || {
            let name = kept_name(cookie);
            let fetched = self.context.keeper.take_one(&name)?;
            // Where it stayed, it would keep the socket open when its owner is gone.
            self.context.keeper.forget(name);
            Some((Candidate::new(fetched).ok().filter(|it| it.cookie == cookie)?, pid))
        };
        if let Some((candidate, pid)) = through_keeper().or_else(|| fetch(kept)) {
            let candidate = candidate.in_our_namespace().map_err(|unfit| unfit.to_string())?;
            if self.back_end == BackEnd::Tproxy
                && let Err(problem) = make_group_transparent(&candidate)
            {
                error!("service {}: {problem}", kept.service);
            }
            return Ok(Registered::new(candidate, pid, &self.owner_exits));
        }
        let open = host::listeners().map_err(|error| format!("{error:#}"))?;
        let Some(listener) = open.iter().find(|it| it.inode == kept.inode) else {
            return Err(format!("its owner closed {local} meanwhile"));
        };
        if !can_adopt(cookie) {
            return Err(format!(
                "anyportd has been stopped meanwhile, and may not fetch {local} from its owner, pid {pid}, by itself: \
                 register it again"
            ));
        }
        Ok(Registered::in_kernel(kept, listener.transport, &self.owner_exits))
    }

    /// Closes our descriptors of registered sockets, which are in the kernel's map by now.
    pub(in crate::engine) fn let_go_of_registered(&self) {
        self.registered.values().flat_map(|it| &it.live).flatten().for_each(|socket| socket.let_go());
    }

    /// Forgets what was registered for a service that is closed, unless another one has its name. Returns whether there was anything.
    pub(in crate::engine) fn forget_registered(&mut self, service: &ServiceName) -> bool {
        let is_there = self.get(service).is_some_and(|it| it.config().handler == HandlerKind::Registered);
        !is_there && self.registered.remove(service).is_some()
    }

    /// What is registered, as it is kept.
    pub(in crate::engine) fn kept_registered(&self) -> Vec<KeptSocket> {
        let mut kept: BTreeMap<(&ServiceName, u64), KeptSocket> = BTreeMap::new();
        for (name, registrations) in &self.registered {
            for (place, socket) in registrations.live.iter().enumerate() {
                let Some(socket) = socket else { continue };
                let Registered { cookie, inode, local, owner: host::Owner { pid, .. }, .. } = **socket;
                let new = || KeptSocket { service: name.clone(), places: Vec::new(), cookie, inode, local, pid };
                kept.entry((name, cookie)).or_insert_with(new).places.push(place);
            }
        }
        kept.into_values().collect()
    }
}

/// The sockets that were registered and are still open, with the names under which the server asks the keeper for them. For who may take
/// them out of their owners.
pub fn fetch_registered(state_dir: &Path) -> Vec<(String, PassedFd)> {
    let kept = Store::look_for_registered(state_dir, &boot_id());
    kept.iter().filter_map(|kept| Some((kept_name(kept.cookie), fetch(kept)?.0.descriptor))).collect()
}

/// No service has such a name.
fn kept_name(cookie: u64) -> String {
    format!(":registered/{cookie}")
}

/// The socket that was kept, and a process that holds it. Its cookie differs from those of all other sockets since the boot.
fn fetch(kept: &KeptSocket) -> Option<(Candidate, u32)> {
    holders(kept.inode).find_map(|(pid, descriptor)| {
        let candidate = Process::open(pid).ok()?.candidate(descriptor).ok()?;
        (candidate.cookie == kept.cookie).then_some((candidate, pid))
    })
}

/// Distinguishes cookies of this boot from those of another one.
pub(in crate::engine) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim_end().to_owned()
}

/// Lets TPROXY find a socket and the others of its group, whatever process holds them: it passes over those that are not
/// transparent (`nf_tproxy_sk_is_transparent`). The option is the socket's, not the descriptor's.
pub(in crate::engine) fn make_group_transparent(candidate: &Candidate) -> anyhow::Result<()> {
    let attempt = || format!("set IP_TRANSPARENT, which TPROXY needs, on {candidate}");
    set_transparent(candidate).with_context(attempt)?;
    if !candidate.shares {
        return Ok(());
    }
    let local: SocketAddr = candidate.local;
    let group = host::listeners_of(candidate.transport)?.into_iter();
    for other in group.filter(|it| it.local == local && it.inode != candidate.inode) {
        let Some((pid, descriptor)) = holders(other.inode).next() else { continue };
        let member = Process::open(pid).and_then(|process| process.candidate(descriptor));
        set_transparent(&member.with_context(attempt)?).with_context(attempt)?;
    }
    Ok(())
}

fn set_transparent(candidate: &Candidate) -> std::io::Result<()> {
    let _raised = privileges::raise(privileges::NET_ADMIN);
    let socket = SockRef::from(&candidate.descriptor);
    if socket.domain()? == Domain::IPV6 {
        socket.set_ip_transparent_v6(true)
    } else {
        socket.set_ip_transparent_v4(true)
    }
}

/// Those of some services to which no rule steers.
fn without_rules<'a>(mut services: BTreeSet<&'a ServiceName>, rules: &RuleSet) -> BTreeSet<&'a ServiceName> {
    for (_, of_prefix) in rules.prefixes() {
        if services.is_empty() {
            break;
        }
        for rule in of_prefix {
            services.remove(&rule.terms.service);
        }
    }
    services
}
