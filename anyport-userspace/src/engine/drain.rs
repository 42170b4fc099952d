//! What is taken out of service for a while: withdrawn first, and refused later, without touching what is established.

use std::time::{Duration, Instant};

use tracing::{error, info};

use super::{
    Engine,
    desired::{Drains, Scope, Steps},
};
use crate::{
    api::{Changed, DrainRequest, DrainView, LONGEST_WAIT, Problem, ProblemKind, Undrain},
    host,
    rules::{Decision, Prefix, RuleSet, decide},
};

/// Before another try where new connections could not be refused.
const PAUSE: Duration = Duration::from_secs(2);

impl Engine {
    /// What is drained, as `status` shows it.
    pub(super) fn drain_views(&self) -> Vec<DrainView> {
        self.desired.drains().views(self.served.complaint().as_ref())
    }

    /// Takes something out of service: it is withdrawn at once, and refused after a while. Established connections go on.
    ///
    /// # Errors
    /// See [`ProblemKind`]. Nothing has changed.
    pub async fn drain(&mut self, request: DrainRequest) -> Result<Vec<DrainView>, Problem> {
        let DrainRequest { service, prefixes, wait } = request;
        if wait > LONGEST_WAIT {
            return Err(Problem::new(ProblemKind::Invalid, format!("drain: {LONGEST_WAIT} s is the longest wait")));
        }
        if let Some(service) = &service {
            self.services.expect(service)?;
        }
        for prefix in &prefixes {
            self.expect_rules_within(prefix)?;
        }
        let before = self.desired.drains().clone();
        self.desired.drains_mut().begin(Scope::all(service, prefixes), Duration::from_secs(wait));
        self.keep_drains(before)?;
        let withdrawal = self.judge();
        self.desired.drains_mut().withdrawn_by(withdrawal, Instant::now());
        self.go_on_draining().await;
        with_connections(self.drain_views(), self.desired.rules(), self.desired.drains())
    }

    /// Has something served again.
    ///
    /// # Errors
    /// See [`ProblemKind`]; that it is not drained is one. Nothing has changed.
    pub async fn undrain(&mut self, request: Undrain) -> Result<Changed, Problem> {
        let Undrain { service, prefixes } = request;
        let before = self.desired.drains().clone();
        let mut ended = before.len();
        if service.is_none() && prefixes.is_empty() {
            *self.desired.drains_mut() = Drains::default();
        } else {
            let scopes = Scope::all(service, prefixes);
            ended = scopes.len();
            if let Err(scope) = self.desired.drains_mut().end(scopes) {
                *self.desired.drains_mut() = before;
                return Err(Problem::new(ProblemKind::NotFound, format!("{scope} is not drained by itself"))
                    .hint("anyportctl status lists what is drained"));
            }
        }
        let was_refusing = before.refusing_count() > self.desired.drains().refusing_count();
        self.keep_drains(before.clone())?;
        if was_refusing && let Err(error) = self.steer() {
            *self.desired.drains_mut() = before.clone();
            self.keep_drains(before)?;
            self.repair().await;
            return Err(error.into());
        }
        self.judge();
        Ok(self.changed(ended, Vec::new()))
    }

    /// From the withdrawal to waiting, and from waiting to refusing.
    pub(super) async fn go_on_draining(&mut self) {
        let now = Instant::now();
        let Self { desired, served, .. } = self;
        let begun = desired.drains_mut().advance(now, |number| served.has_withdrawn(number));
        if begun.is_empty() {
            return;
        }
        let kept = self.kept.save_drains(self.desired.drains());
        match kept.and_then(|()| self.steer()) {
            Ok(()) => begun.iter().for_each(|scope| info!("drained {scope}: new connections are refused from now on")),
            Err(error) => {
                error!("refuse new connections to what is drained, which is tried again: {error:#}");
                self.desired.drains_mut().postpone(&begun, now + PAUSE);
                self.repair().await;
            }
        }
    }

    /// Has the kernel follow what is drained.
    fn steer(&mut self) -> anyhow::Result<()> {
        self.kernel.steer(&self.desired, &self.services, None, &Steps::default())
    }

    /// Keeps what is drained now, or goes back to what was before.
    fn keep_drains(&mut self, before: Drains) -> Result<(), Problem> {
        self.served.forget_needs();
        let kept = self.kept.save_drains(self.desired.drains());
        if kept.is_err() {
            *self.desired.drains_mut() = before;
        }
        Ok(kept?)
    }

    fn expect_rules_within(&self, prefix: &Prefix) -> Result<(), Problem> {
        if self.desired.rules().within(*prefix).next().is_some() {
            return Ok(());
        }
        let hint = match self.desired.rules().around(*prefix).next() {
            Some((outer, _)) => format!("it is part of {outer}, which can be drained as a whole"),
            None => "anyportctl prefixes lists what is steered".to_owned(),
        };
        Err(Problem::new(ProblemKind::NotFound, format!("no rule is about {prefix} or a part of it")).hint(hint))
    }
}

/// Counts the connections that what is drained has still.
///
/// # Errors
/// The kernel does not list its connections.
pub(super) fn with_connections(
    views: Vec<DrainView>,
    rules: &RuleSet,
    drains: &Drains,
) -> Result<Vec<DrainView>, Problem> {
    let mut counts: Vec<u64> = vec![0; drains.len()];
    if !counts.is_empty() {
        host::for_each_connection(|host::Connection { transport, local, remote, .. }| {
            if let Decision::Steer(rule) = decide(rules, local.ip(), transport, local.port(), remote.ip()) {
                drains.count(&rule.prefix, rule.terms, &mut counts);
            }
        })?;
    }
    let views = views.into_iter().zip(counts);
    Ok(views.map(|(view, connections)| DrainView { connections: Some(connections), ..view }).collect())
}
