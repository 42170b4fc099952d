//! Sockets that other processes registered: their coming, their end, and who stands in for them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs,
    net::SocketAddr,
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::Instant,
};

use anyhow::Context as _;
use anyport_common::{
    flow::{Flow, Transport},
    maps::SOCKETS_PER_SERVICE,
    table::Verdict,
};
use socket2::{Domain, SockRef};
use tracing::{error, info, warn};

use super::{Engine, Running, change::Keep};
use crate::{
    api::{Changed, Kind, Peer, Problem},
    datagram::Ends,
    host,
    register::{Candidate, KeptSocket, Process, Registered, Unregister, choose, holders},
    rights,
    rules::{Change, Protocol, ServiceName, to_address},
    service::{AnswerGuard, Family, HandlerKind, Queue, ServiceConfig, SocketInfo},
    steering::{BackEnd, GroupSocket, Holder},
    store::Store,
    table::Published,
};

/// In the order of [`anyport_common::flow::Flow::socket_offset`].
pub(super) const KINDS: [(Family, Transport); SOCKETS_PER_SERVICE as usize] = [
    (Family::Ipv4, Transport::Tcp),
    (Family::Ipv4, Transport::Udp),
    (Family::Ipv6, Transport::Tcp),
    (Family::Ipv6, Transport::Udp),
];

/// What was registered for a service, in the order of [`KINDS`].
#[derive(Clone, Debug, Default)]
pub(super) struct Registrations {
    pub(super) live: [Option<Arc<Registered>>; SOCKETS_PER_SERVICE as usize],
    /// Why sockets went, until others come in their place.
    lost: [Option<String>; SOCKETS_PER_SERVICE as usize],
}

impl Engine {
    /// Refuses those who may not register sockets for the service, and services for which nobody can.
    ///
    /// # Errors
    /// See [`Kind`].
    pub fn expect_registrant(&self, service: &ServiceName, peer: &Peer) -> Result<(), Problem> {
        let config = self.services.get(service).map(|running| running.service.config());
        let is_owner = |config: &ServiceConfig| {
            let is_meant = config.owners.iter().any(|owner| owner.is_meant(peer.uid.as_raw(), &peer.groups));
            config.handler == HandlerKind::Registered && is_meant
        };
        // Strangers are not told which services there are.
        if !peer.is_in_control() && !config.is_some_and(is_owner) {
            let uid = peer.uid;
            return Err(Problem::new(
                Kind::NotPermitted,
                format!("user {uid} may not register sockets for the service {service}"),
            )
            .hint(format!("its setting owners has to name user:{uid} or one of its groups")));
        }
        let Some(ServiceConfig { handler, .. }) = config else {
            return Err(Problem::new(Kind::NotFound, format!("there is no service {service}"))
                .hint(format!("anyportctl add-service {service} --handler registered makes it")));
        };
        if *handler != HandlerKind::Registered {
            return Err(Problem::new(
                Kind::Conflict,
                format!("the service {service} has the handler {handler}; sockets are for the handler registered"),
            )
            .hint("add-service NAME --handler registered makes one that takes sockets"));
        }
        Ok(())
    }

    /// Has sockets of the process `pid` receive what is steered to a service, in place of those that did before.
    ///
    /// # Errors
    /// See [`Kind`]. Nothing has changed.
    pub async fn register(
        &mut self,
        service: &ServiceName,
        candidates: Vec<Candidate>,
        pid: u32,
        peer: &Peer,
    ) -> Result<Changed, Problem> {
        self.expect_registrant(service, peer)?;
        let chosen = choose(&candidates).map_err(|unfit| {
            Problem::new(Kind::Conflict, format!("register for {service}: {unfit}"))
                .hint("name one of them: --fd N, or an address that only one of them has")
        })?;
        if self.steering.back_end() == BackEnd::Tproxy {
            candidates.iter().try_for_each(make_group_transparent)?;
        }
        let before = self.registered.get(service).cloned().unwrap_or_default();
        let mut sockets: Vec<Option<Candidate>> = candidates.into_iter().map(Some).collect();
        let mut after = before.clone();
        let mut changed = 0;
        for at in chosen.iter().flatten().copied().collect::<HashSet<_>>() {
            let Some(candidate) = sockets[at].take() else { continue };
            let cookie = candidate.cookie;
            let socket = Arc::new(Registered::new(candidate, pid, &self.owner_exits));
            for place in (0..KINDS.len()).filter(|place| chosen[*place] == Some(at)) {
                let was = after.live[place].replace(Arc::clone(&socket));
                after.lost[place] = None;
                changed += usize::from(was.is_none_or(|was| was.cookie != cookie));
            }
        }
        // Where it gets nothing, others may have taken the socket out of the kernel's map.
        let is_same = changed == 0 && self.dropping.fault_of(service, self.steering.back_end()).is_none();
        self.replace_registrations(service, before, after, is_same).await?;
        if !is_same {
            info!("service {service}: the process {pid} registered {changed} sockets");
        }
        Ok(self.changed(changed, Vec::new()))
    }

    /// Gives up sockets that were registered for a service; they stay open, and so do their connections.
    ///
    /// # Errors
    /// See [`Kind`]; that there is none is one. Nothing has changed.
    pub async fn unregister(&mut self, request: &Unregister, peer: &Peer) -> Result<Changed, Problem> {
        let Unregister { service, protocol, family } = request;
        self.expect_registrant(service, peer)?;
        let before = self.registered.get(service).cloned().unwrap_or_default();
        let mut after = before.clone();
        let mut changed = 0;
        for (place, (of_family, transport)) in KINDS.iter().enumerate() {
            let is_meant = protocol.is_none_or(|it| it.transports().contains(transport))
                && family.is_none_or(|family| family == *of_family);
            if is_meant {
                let (live, lost) = (after.live[place].take(), after.lost[place].take());
                changed += usize::from(live.is_some() || lost.is_some());
            }
        }
        if changed == 0 {
            return Err(Problem::new(
                Kind::NotFound,
                format!("no such socket is registered for the service {service}"),
            )
            .hint("anyportctl services --json lists the sockets"));
        }
        self.replace_registrations(service, before, after, false).await?;
        Ok(self.changed(changed, Vec::new()))
    }

    /// Sends what comes over this connection from what is steered to a service, until the service is closed.
    ///
    /// # Errors
    /// See [`Kind`].
    pub fn answer_for(&mut self, service: &ServiceName, peer: &Peer, connection: OwnedFd) -> Result<Changed, Problem> {
        self.expect_registrant(service, peer)?;
        if let Some(running) = self.services.get_mut(service) {
            let is_ours = steered_to(&self.published, running.slot);
            running.service.answer_for(connection, is_ours, &self.commons)?;
        }
        Ok(self.changed(0, Vec::new()))
    }

    async fn replace_registrations(
        &mut self,
        service: &ServiceName,
        before: Registrations,
        after: Registrations,
        is_same: bool,
    ) -> Result<(), Problem> {
        self.registered.insert(service.clone(), after);
        // While something waits to be confirmed the rules are not to be written down, so sockets have a file of their own.
        let mut done = if is_same { Ok(()) } else { self.change(Change::default(), Keep::InMemory).await };
        let is_in_force = done.is_ok();
        if is_in_force {
            done = self.keep_registered().map_err(Into::into);
        }
        self.let_go_of_registered();
        if done.is_err() {
            self.registered.insert(service.clone(), before);
            self.repair().await;
        }
        done
    }

    /// One socket of each group for a service: its own, or those that were registered, or else those of its fallback.
    pub(super) fn groups_of(&self, running: &Running) -> [Option<GroupSocket>; SOCKETS_PER_SERVICE as usize] {
        let config = running.service.config();
        if config.handler != HandlerKind::Registered {
            return running.service.groups();
        }
        let fallback = config.fallback.as_ref().and_then(|name| self.services.get(name));
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
    pub(super) fn sockets_of(&self, running: &Running) -> Vec<SocketInfo> {
        let registered = self.registered.get(&running.service.config().name).into_iter().flat_map(|it| &it.live);
        let registered = KINDS.iter().zip(registered).filter_map(|((family, transport), socket)| {
            let Registered { local, cookie, owner, .. } = &**socket.as_ref()?;
            let protocol = Protocol::from(*transport);
            Some(SocketInfo { family: *family, protocol, local: *local, cookie: *cookie, pid: owner.pid })
        });
        running.service.sockets().iter().cloned().chain(registered).collect()
    }

    /// What `status` says about services without a live socket.
    pub(super) fn lost_sockets(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (name, running) in &self.services {
            if running.service.config().handler != HandlerKind::Registered {
                continue;
            }
            let Registrations { live, lost } = self.registered.get(name).cloned().unwrap_or_default();
            let mut reasons: Vec<String> = lost.into_iter().flatten().collect();
            if reasons.is_empty()
                && live.iter().all(Option::is_none)
                && self.rules.iter().any(|rule| rule.terms.service == *name)
            {
                reasons.push("nobody has registered one".into());
            }
            reasons.dedup();
            let instead = match &running.service.config().fallback {
                Some(fallback) => format!("{fallback} stands in"),
                None => "clients are refused".into(),
            };
            lines.extend(reasons.into_iter().map(|why| format!("service {name} has no live socket: {why}; {instead}")));
        }
        lines
    }

    /// Notices registered sockets that are closed, and processes that hold one no more.
    pub(super) async fn look_after_registered(&mut self) -> anyhow::Result<()> {
        if self.registered.values().all(|it| it.live.iter().all(Option::is_none)) {
            return Ok(());
        }
        let open: HashMap<u64, host::Listener> = host::listeners()?.into_iter().map(|it| (it.inode, it)).collect();
        let live = self.registered.values().flat_map(|it| it.live.iter().flatten());
        let queue = |socket: &Arc<Registered>| {
            let waiting = open.get(&socket.inode)?.waiting;
            Some(Queue { cookie: socket.cookie, waiting, accepted: None })
        };
        self.served.registered.look(live.filter_map(queue), Instant::now());
        let mut has_lost = false;
        for (name, registrations) in &mut self.registered {
            let Registrations { live, lost } = registrations;
            for (live, lost) in live.iter_mut().zip(lost) {
                let Some(socket) = live.as_ref() else { continue };
                let host::Owner { pid, name: comm } = &socket.owner;
                if !open.contains_key(&socket.inode) {
                    let end = if socket.has_owner_ended() { "exited" } else { "closed it" };
                    let why = format!("its owner, pid {pid} ({comm}), {end}");
                    warn!("service {name}: {} {} is gone: {why}", Protocol::from(socket.transport), socket.local);
                    (*live, *lost) = (None, Some(why));
                    has_lost = true;
                } else if socket.has_owner_ended()
                    && let Some((pid, _)) = holders(socket.inode).next()
                {
                    *live = Some(Arc::new(socket.held_by(pid, &self.owner_exits)));
                }
            }
        }
        if !has_lost {
            return Ok(());
        }
        self.change(Change::default(), Keep::InMemory).await?;
        self.keep_registered()
    }

    /// Takes up what was registered with an earlier daemon and is still open.
    pub(super) fn restore_registered(&mut self) {
        for kept in self.store.registered(&boot_id()) {
            let takes = |running: &Running| running.service.config().handler == HandlerKind::Registered;
            if !self.services.get(&kept.service).is_some_and(takes) {
                continue;
            }
            let socket = self.find(&kept).map(Arc::new);
            let registrations = self.registered.entry(kept.service.clone()).or_default();
            for place in kept.places.iter().copied().filter(|place| *place < KINDS.len()) {
                match &socket {
                    Ok(socket) => registrations.live[place] = Some(Arc::clone(socket)),
                    Err(why) => registrations.lost[place] = Some(why.clone()),
                }
            }
        }
    }

    /// The socket that was kept, by whichever way leads to it: through the keeper, which has fetched it while it was root; out of
    /// whoever holds it; or without a descriptor, where the kernel has it still.
    fn find(&self, kept: &KeptSocket) -> Result<Registered, String> {
        let KeptSocket { cookie, local, pid, .. } = *kept;
        let through_keeper = || {
            let name = kept_name(cookie);
            let fetched = self.commons.keeper.take_one(&name)?;
            // Where it stayed, it would keep the socket open when its owner is gone.
            self.commons.keeper.forget(name);
            Some((Candidate::new(fetched).ok().filter(|it| it.cookie == cookie)?, pid))
        };
        if let Some((candidate, pid)) = through_keeper().or_else(|| fetch(kept)) {
            let candidate = candidate.in_our_namespace().map_err(|unfit| unfit.to_string())?;
            if self.steering.back_end() == BackEnd::Tproxy
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
        if !self.steering.goes_on_with(cookie) {
            return Err(format!(
                "anyportd has been stopped meanwhile, and may not fetch {local} from its owner, pid {pid}, by itself: \
                 register it again"
            ));
        }
        Ok(Registered::in_kernel(kept, listener.transport, &self.owner_exits))
    }

    /// Closes our descriptors of registered sockets, which are in the kernel's map by now.
    pub(super) fn let_go_of_registered(&self) {
        self.registered.values().flat_map(|it| &it.live).flatten().for_each(|socket| socket.let_go());
    }

    /// Forgets what was registered for a service that is closed, unless another one has its name.
    pub(super) fn forget_registered(&mut self, service: &ServiceName) {
        let is_there =
            self.services.get(service).is_some_and(|it| it.service.config().handler == HandlerKind::Registered);
        if !is_there
            && self.registered.remove(service).is_some()
            && let Err(error) = self.keep_registered()
        {
            error!("forget the sockets of the service {service}, which is closed: {error:#}");
        }
    }

    fn keep_registered(&self) -> anyhow::Result<()> {
        let mut kept: BTreeMap<(&ServiceName, u64), KeptSocket> = BTreeMap::new();
        for (name, registrations) in &self.registered {
            for (place, socket) in registrations.live.iter().enumerate() {
                let Some(socket) = socket else { continue };
                let Registered { cookie, inode, local, owner: host::Owner { pid, .. }, .. } = **socket;
                let new = || KeptSocket { service: name.clone(), places: Vec::new(), cookie, inode, local, pid };
                kept.entry((name, cookie)).or_insert_with(new).places.push(place);
            }
        }
        self.store.save_registered(&boot_id(), kept.into_values().collect())
    }
}

/// Tells which answers are of what is steered to a service.
fn steered_to(published: &Arc<Published>, slot: u16) -> AnswerGuard {
    let published = Arc::clone(published);
    Arc::new(move |Ends { client, dialled }| {
        let flow = Flow {
            source: to_address(client.ip()),
            address: to_address(dialled.ip()),
            transport: Transport::Udp,
            port: dialled.port(),
        };
        matches!(published.read(|reader| reader.lookup(&flow)), Verdict::Steer { service, .. } if service == slot)
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
        return Err(Problem::new(Kind::Conflict, format!("{fallback}, the fallback of the service {name}, {problem}"))
            .hint("a fallback is a service with sockets of its own, such as default"));
    }
    Ok(())
}

/// The sockets that were registered and are still open, with the names under which the server asks the keeper for them. For who may take
/// them out of their owners.
pub fn fetch_registered(state_dir: &Path) -> Vec<(String, OwnedFd)> {
    let kept = Store::look_for_registered(state_dir, &boot_id());
    kept.iter().filter_map(|kept| Some((kept_name(kept.cookie), fetch(kept)?.0.descriptor))).collect()
}

/// No service has such a name.
fn kept_name(cookie: u64) -> String {
    format!(":registered/{cookie}")
}

/// The socket that was kept, and a process that holds it. Cookies tell it from any other one since the boot.
fn fetch(kept: &KeptSocket) -> Option<(Candidate, u32)> {
    holders(kept.inode).find_map(|(pid, descriptor)| {
        let candidate = Process::open(pid).ok()?.candidate(descriptor).ok()?;
        (candidate.cookie == kept.cookie).then_some((candidate, pid))
    })
}

/// By which cookies of this boot are told from those of another one.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim_end().to_owned()
}

/// Lets TPROXY find a socket and the others of its group, whoever holds them: it passes over those that are not
/// transparent (`nf_tproxy_sk_is_transparent`). The option is the socket's, not the descriptor's.
fn make_group_transparent(candidate: &Candidate) -> anyhow::Result<()> {
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
    let _raised = rights::raise(rights::NET_ADMIN);
    let socket = SockRef::from(&candidate.descriptor);
    if socket.domain()? == Domain::IPV6 {
        socket.set_ip_transparent_v6(true)
    } else {
        socket.set_ip_transparent_v4(true)
    }
}
