//! What is taken out of service for a while: withdrawn first, and refused later, without touching what is established.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::{error, info};

use super::{Engine, change::Steps};
use crate::{
    announce::Announcer,
    api::{Changed, DrainRequest, DrainState, DrainView, Kind, Problem, Undrain},
    host,
    rules::{Change, Decision, Prefix, PrefixRules, ServiceName, Terms, decide},
    store::KeptDrain,
};

/// The longest wait: a day.
const LONGEST_WAIT: u64 = 24 * 60 * 60;
/// Before another try where newcomers could not be refused.
const PAUSE: Duration = Duration::from_secs(2);

/// What is drained.
#[derive(Clone, Debug, Default)]
pub(super) struct Drains(BTreeMap<Scope, Drain>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Scope {
    Node,
    Service(ServiceName),
    Prefix(Prefix),
}

#[derive(Clone, Copy, Debug)]
struct Drain {
    wait: Duration,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Until the router announces by the judgement of this number.
    Withdrawing(u64),
    /// Until then others learn of it.
    Waiting(Instant),
    /// Newcomers are refused.
    Refusing,
}

impl Scope {
    fn includes(&self, prefix: &Prefix, terms: &Terms) -> bool {
        match self {
            Self::Node => true,
            Self::Service(name) => terms.service == *name,
            Self::Prefix(outer) => prefix.is_within(outer),
        }
    }

    fn parts(&self) -> (Option<ServiceName>, Option<Prefix>) {
        match self {
            Self::Node => (None, None),
            Self::Service(name) => (Some(name.clone()), None),
            Self::Prefix(prefix) => (None, Some(*prefix)),
        }
    }

    fn all(service: Option<ServiceName>, prefixes: Vec<Prefix>) -> Vec<Self> {
        let scopes: Vec<_> =
            service.map(Self::Service).into_iter().chain(prefixes.into_iter().map(Self::Prefix)).collect();
        if scopes.is_empty() { vec![Self::Node] } else { scopes }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node => f.write_str("the node"),
            Self::Service(name) => write!(f, "the service {name}"),
            Self::Prefix(prefix) => prefix.fmt(f),
        }
    }
}

impl Drains {
    /// Whether a rule is drained.
    pub(super) fn include(&self, prefix: &Prefix, terms: &Terms) -> bool {
        self.0.keys().any(|scope| scope.includes(prefix, terms))
    }

    /// Whether the whole node is.
    pub(super) fn include_all(&self) -> bool {
        self.0.contains_key(&Scope::Node)
    }

    /// What was kept. Who was about to withdraw does so again.
    pub(super) fn restored(kept: Vec<KeptDrain>) -> Self {
        let drains = kept.into_iter().flat_map(|KeptDrain { service, prefix, wait, is_refusing }| {
            // The first judgement of a process has the number 1.
            let phase = if is_refusing { Phase::Refusing } else { Phase::Withdrawing(1) };
            let drain = Drain { wait: Duration::from_secs(wait), phase };
            Scope::all(service, prefix.into_iter().collect()).into_iter().map(move |scope| (scope, drain))
        });
        Self(drains.collect())
    }

    fn kept(&self) -> Vec<KeptDrain> {
        let kept = self.0.iter().map(|(scope, Drain { wait, phase })| {
            let (service, prefix) = scope.parts();
            KeptDrain { service, prefix, wait: wait.as_secs(), is_refusing: *phase == Phase::Refusing }
        });
        kept.collect()
    }

    fn refusing(&self) -> impl Iterator<Item = &Scope> {
        self.0.iter().filter(|(_, drain)| drain.phase == Phase::Refusing).map(|(scope, _)| scope)
    }
}

impl Engine {
    /// What is drained, as `status` shows it.
    pub(super) fn drain_views(&self) -> Vec<DrainView> {
        let complaint = self.announcer.as_ref().and_then(Announcer::complaint);
        let view = |(scope, Drain { phase, .. }): (&Scope, &Drain)| {
            let (service, prefix) = scope.parts();
            let (state, left, why) = match phase {
                Phase::Withdrawing(_) => (DrainState::Withdrawing, None, complaint.clone()),
                Phase::Waiting(until) => {
                    (DrainState::Waiting, Some(until.saturating_duration_since(Instant::now()).as_secs()), None)
                }
                Phase::Refusing => (DrainState::Refusing, None, None),
            };
            DrainView { service, prefix, state, left, why, connections: None }
        };
        self.drains.0.iter().map(view).collect()
    }

    /// Takes something out of service: it is withdrawn at once, and refused after a while. Established connections go on.
    ///
    /// # Errors
    /// See [`Kind`]. Nothing has changed.
    pub async fn drain(&mut self, request: DrainRequest) -> Result<Vec<DrainView>, Problem> {
        let DrainRequest { service, prefixes, wait } = request;
        if wait > LONGEST_WAIT {
            return Err(Problem::new(Kind::Invalid, format!("drain: {LONGEST_WAIT} s is the longest wait")));
        }
        if let Some(service) = &service {
            self.expect_service(service)?;
        }
        for prefix in &prefixes {
            self.expect_rules_within(prefix)?;
        }
        let before = self.drains.clone();
        let wait = Duration::from_secs(wait);
        for scope in Scope::all(service, prefixes) {
            let is_refusing = before.0.get(&scope).is_some_and(|drain| drain.phase == Phase::Refusing);
            let phase = if is_refusing { Phase::Refusing } else { Phase::Withdrawing(u64::MAX) };
            self.drains.0.insert(scope, Drain { wait, phase });
        }
        self.keep_drains(before)?;
        let withdrawal = self.judge();
        for drain in self.drains.0.values_mut().filter(|drain| drain.phase == Phase::Withdrawing(u64::MAX)) {
            drain.phase = match withdrawal {
                // Who does not want to wait does not wait for the router either.
                Some(number) if !wait.is_zero() => Phase::Withdrawing(number),
                _ => Phase::Waiting(Instant::now() + wait),
            };
        }
        self.go_on_draining().await;
        self.drains()
    }

    /// Has something served again.
    ///
    /// # Errors
    /// See [`Kind`]; that it is not drained is one. Nothing has changed.
    pub async fn undrain(&mut self, request: Undrain) -> Result<Changed, Problem> {
        let Undrain { service, prefixes } = request;
        let before = self.drains.clone();
        let mut ended = before.0.len();
        if service.is_none() && prefixes.is_empty() {
            self.drains = Drains::default();
        } else {
            let scopes = Scope::all(service, prefixes);
            ended = scopes.len();
            for scope in scopes {
                if self.drains.0.remove(&scope).is_none() {
                    self.drains = before;
                    return Err(Problem::new(Kind::NotFound, format!("{scope} is not drained by itself"))
                        .hint("anyportctl status lists what is drained"));
                }
            }
        }
        let was_refusing = before.refusing().count() > self.drains.refusing().count();
        self.keep_drains(before.clone())?;
        if was_refusing && let Err(error) = self.steer(None, &Steps::default()) {
            self.drains = before.clone();
            self.keep_drains(before)?;
            self.repair().await;
            return Err(error.into());
        }
        self.judge();
        Ok(self.changed(ended, Vec::new()))
    }

    /// What is drained, and how many connections each of it has still.
    ///
    /// # Errors
    /// The kernel does not tell its connections.
    pub fn drains(&self) -> Result<Vec<DrainView>, Problem> {
        let mut counts: Vec<u64> = vec![0; self.drains.0.len()];
        if !counts.is_empty() {
            host::for_each_connection(|host::Connection { transport, local, remote }| {
                let decided = decide(&self.rules, local.ip(), transport, local.port(), remote.ip());
                let Decision::Steer(rule) = decided else { return };
                for (scope, count) in self.drains.0.keys().zip(&mut counts) {
                    *count += u64::from(scope.includes(&rule.prefix, rule.terms));
                }
            })?;
        }
        let views = self.drain_views().into_iter().zip(counts);
        Ok(views.map(|(view, connections)| DrainView { connections: Some(connections), ..view }).collect())
    }

    /// From the withdrawal to waiting, and from waiting to refusing.
    pub(super) async fn go_on_draining(&mut self) {
        let now = Instant::now();
        let mut begun = Vec::new();
        for (scope, drain) in &mut self.drains.0 {
            if let Phase::Withdrawing(number) = drain.phase
                && self.announcer.as_ref().is_none_or(|announcer| announcer.has_done(number))
            {
                drain.phase = Phase::Waiting(now + drain.wait);
            }
            if let Phase::Waiting(until) = drain.phase
                && until <= now
            {
                drain.phase = Phase::Refusing;
                begun.push(scope.clone());
            }
        }
        if begun.is_empty() {
            return;
        }
        let kept = self.store.save_drains(&self.drains.kept());
        match kept.and_then(|()| self.steer(None, &Steps::default())) {
            Ok(()) => begun.iter().for_each(|scope| info!("drained {scope}: newcomers are refused from now on")),
            Err(error) => {
                error!("refuse newcomers of what is drained, which is tried again: {error:#}");
                for (_, drain) in self.drains.0.iter_mut().filter(|(scope, _)| begun.contains(scope)) {
                    drain.phase = Phase::Waiting(now + PAUSE);
                }
                self.repair().await;
            }
        }
    }

    /// The rules that are refused though they name a service, as the kernel is to see them. Numbers and order stay.
    pub(super) fn refusals(&self) -> Change {
        let mut change = Change::default();
        let scopes: Vec<&Scope> = self.drains.refusing().collect();
        if scopes.is_empty() {
            return change;
        }
        let mut known: HashMap<*const Terms, Arc<Terms>> = HashMap::new();
        for (prefix, rules) in self.rules.prefixes() {
            let mut refusing = PrefixRules::default();
            refusing.first_number = rules.first_number;
            let mut is_drained = false;
            for held in rules {
                if !scopes.iter().any(|scope| scope.includes(prefix, &held.terms)) {
                    refusing.insert_unchecked(&held.terms, held.origins);
                    continue;
                }
                is_drained = true;
                let refused = || Arc::new(Terms { service: ServiceName::drained(), ..Terms::clone(&held.terms) });
                let terms = known.entry(Arc::as_ptr(&held.terms)).or_insert_with(refused);
                refusing.insert_unchecked(terms, held.origins);
            }
            if is_drained {
                change.removed.push((*prefix, rules.clone()));
                change.added.push((*prefix, refusing));
            }
        }
        change
    }

    /// Keeps what is drained now, or goes back to what was before.
    fn keep_drains(&mut self, before: Drains) -> Result<(), Problem> {
        self.forget_needs();
        let kept = self.store.save_drains(&self.drains.kept());
        if kept.is_err() {
            self.drains = before;
        }
        Ok(kept?)
    }

    fn expect_rules_within(&self, prefix: &Prefix) -> Result<(), Problem> {
        if self.rules.within(*prefix).next().is_some() {
            return Ok(());
        }
        let hint = match self.rules.around(*prefix).next() {
            Some((outer, _)) => format!("it is part of {outer}, which can be drained as a whole"),
            None => "anyportctl prefixes lists what is steered".to_owned(),
        };
        Err(Problem::new(Kind::NotFound, format!("no rule is about {prefix} or a part of it")).hint(hint))
    }
}
