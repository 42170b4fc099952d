//! Sockets that other processes register: what they ask for, and what becomes of it.

use std::{collections::HashSet, sync::Arc, time::Instant};

use tracing::error;

use super::{
    Engine,
    kept::Keep,
    services::{KINDS, Registrations, Running, boot_id, make_group_transparent},
};
use crate::{
    api::{Changed, Peer, Problem, ProblemKind},
    closing::PassedFd,
    log_limit::LogLimit,
    register::{Candidate, Registered, Unregister, choose},
    rules::{Change, ServiceName},
    service::{HandlerKind, ServiceConfig},
    steering::BackEnd,
};

/// Owners can cause these lines.
static REGISTERED: LogLimit = LogLimit::new();

impl Engine {
    /// Refuses those who may not register sockets for the service, and services for which nobody can.
    ///
    /// # Errors
    /// See [`ProblemKind`].
    pub fn expect_registrant(&self, service: &ServiceName, peer: &Peer) -> Result<(), Problem> {
        let config = self.services.get(service).map(Running::config);
        let is_owner = |config: &ServiceConfig| {
            let is_meant = config.owners.iter().any(|owner| owner.is_meant(peer.uid.as_raw(), &peer.groups));
            config.handler == HandlerKind::Registered && is_meant
        };
        // Strangers do not learn which services there are.
        if !peer.is_in_control() && !config.is_some_and(is_owner) {
            let uid = peer.uid;
            return Err(Problem::new(
                ProblemKind::NotPermitted,
                format!("user {uid} may not register sockets for the service {service}"),
            )
            .hint(format!("its setting owners has to name user:{uid} or one of its groups")));
        }
        let Some(ServiceConfig { handler, .. }) = config else {
            return Err(Problem::new(ProblemKind::NotFound, format!("there is no service {service}"))
                .hint(format!("anyportctl add-service {service} --handler registered makes it")));
        };
        if *handler != HandlerKind::Registered {
            return Err(Problem::new(
                ProblemKind::Conflict,
                format!("the service {service} has the handler {handler}; sockets are for the handler registered"),
            )
            .hint("add-service NAME --handler registered makes one that takes sockets"));
        }
        Ok(())
    }

    /// Has sockets of the process `pid` receive what is steered to a service, in place of those that did before.
    ///
    /// # Errors
    /// See [`ProblemKind`]. Nothing has changed.
    pub async fn register(
        &mut self,
        service: &ServiceName,
        candidates: Vec<Candidate>,
        pid: u32,
        peer: &Peer,
    ) -> Result<Changed, Problem> {
        self.expect_registrant(service, peer)?;
        let chosen = choose(&candidates).map_err(|unfit| {
            Problem::new(ProblemKind::Conflict, format!("register for {service}: {unfit}"))
                .hint("name one of them: --fd N, or an address that only one of them has")
        })?;
        if self.kernel.back_end() == BackEnd::Tproxy {
            candidates.iter().try_for_each(make_group_transparent)?;
        }
        let before = self.services.registrations(service).cloned().unwrap_or_default();
        let mut sockets: Vec<Option<Candidate>> = candidates.into_iter().map(Some).collect();
        let mut after = before.clone();
        let mut changed = 0;
        for at in chosen.iter().flatten().copied().collect::<HashSet<_>>() {
            let Some(candidate) = sockets[at].take() else { continue };
            let socket = Arc::new(Registered::new(candidate, pid, self.services.owner_exits()));
            for place in (0..KINDS.len()).filter(|place| chosen[*place] == Some(at)) {
                changed += usize::from(after.put(place, &socket));
            }
        }
        // Where it gets nothing, others may have taken the socket out of the kernel's map.
        let is_same = changed == 0 && self.dropping.fault_of(service, self.kernel.back_end()).is_none();
        self.replace_registrations(service, before, after, is_same).await?;
        if !is_same && let Some(left_out) = REGISTERED.next() {
            let what = format!("service {service}: the process {pid} registered {changed} sockets{left_out}");
            self.record(peer.author(), "register", what);
        }
        Ok(self.changed(changed, Vec::new()))
    }

    /// Unregisters sockets of a service; they stay open, and so do their connections.
    ///
    /// # Errors
    /// See [`ProblemKind`]; that there is none is one. Nothing has changed.
    pub async fn unregister(&mut self, request: &Unregister, peer: &Peer) -> Result<Changed, Problem> {
        let Unregister { service, protocol, family } = request;
        self.expect_registrant(service, peer)?;
        let before = self.services.registrations(service).cloned().unwrap_or_default();
        let mut after = before.clone();
        let mut changed = 0;
        for (place, (of_family, transport)) in KINDS.iter().enumerate() {
            let is_meant = protocol.is_none_or(|it| it.transports().contains(transport))
                && family.is_none_or(|family| family == *of_family);
            if is_meant {
                changed += usize::from(after.clear(place));
            }
        }
        if changed == 0 {
            return Err(Problem::new(
                ProblemKind::NotFound,
                format!("no such socket is registered for the service {service}"),
            )
            .hint("anyportctl services --json lists the sockets"));
        }
        self.replace_registrations(service, before, after, false).await?;
        if let Some(left_out) = REGISTERED.next() {
            let what = format!("service {service}: {changed} sockets were given up{left_out}");
            self.record(peer.author(), "unregister", what);
        }
        Ok(self.changed(changed, Vec::new()))
    }

    /// Sends what comes over this connection from what is steered to a service, until the service is closed.
    ///
    /// # Errors
    /// See [`ProblemKind`].
    pub fn answer_for(&mut self, service: &ServiceName, peer: &Peer, connection: PassedFd) -> Result<Changed, Problem> {
        self.expect_registrant(service, peer)?;
        self.services.answer_for(service, connection)?;
        Ok(self.changed(0, Vec::new()))
    }

    async fn replace_registrations(
        &mut self,
        service: &ServiceName,
        before: Registrations,
        after: Registrations,
        is_same: bool,
    ) -> Result<(), Problem> {
        self.services.register(service.clone(), after);
        // While something waits to be confirmed the rules are not to be written down, so sockets have a file of their own. A disk
        // that is full is found before the kernel is changed.
        let mut done = self.keep_registered().map_err(Problem::from);
        let is_kept = done.is_ok();
        if is_kept && !is_same {
            done = self.change(Change::default(), Keep::InMemory).await.map(drop);
        }
        self.services.let_go_of_registered();
        if done.is_err() {
            self.services.register(service.clone(), before);
            if is_kept && let Err(error) = self.keep_registered() {
                error!("keep which sockets are registered for the service {service}: {error:#}");
            }
            self.repair().await;
        }
        done
    }

    /// Notices registered sockets that are closed, and processes that hold one no more.
    pub(super) async fn look_after_registered(&mut self) -> anyhow::Result<()> {
        let Some(look) = self.services.look_at_registered()? else { return Ok(()) };
        self.served.look_at_registered(look.queues, Instant::now());
        if !look.has_lost {
            return Ok(());
        }
        self.change(Change::default(), Keep::InMemory).await?;
        self.keep_registered()
    }

    /// Forgets what was registered for a service that is closed, unless another one has its name.
    pub(super) fn forget_registered(&mut self, service: &ServiceName) {
        if self.services.forget_registered(service)
            && let Err(error) = self.keep_registered()
        {
            error!("forget the sockets of the service {service}, which is closed: {error:#}");
        }
    }

    fn keep_registered(&self) -> anyhow::Result<()> {
        self.kept.save_registered(&boot_id(), self.services.kept_registered())
    }
}
