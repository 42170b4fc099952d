//! What is taken out of service for a while: in which phase that is, and which rules that are refused.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    api::{DrainState, DrainView},
    rules::{Prefix, PrefixRules, RuleSpec, RuleView, ServiceName},
    store::KeptDrain,
};

/// What is drained.
#[derive(Clone, Debug, Default)]
pub(in crate::engine) struct Drains(BTreeMap<Scope, Drain>);

/// What one drain is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::engine) enum Scope {
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
    /// Until the router announces by a judgement, whose number is not known yet.
    Begun,
    /// Until the router announces by the judgement of this number.
    Withdrawing(u64),
    /// Until then the withdrawal is converging.
    Waiting(Instant),
    /// New connections are refused.
    Refusing,
}

impl Scope {
    /// Those that a request names: a service, prefixes, or neither, which is the node.
    pub(in crate::engine) fn all(service: Option<ServiceName>, prefixes: Vec<Prefix>) -> Vec<Self> {
        let scopes: Vec<_> =
            service.map(Self::Service).into_iter().chain(prefixes.into_iter().map(Self::Prefix)).collect();
        if scopes.is_empty() { vec![Self::Node] } else { scopes }
    }

    fn includes(&self, prefix: &Prefix, terms: &RuleSpec) -> bool {
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
    /// What was kept. What was about to be withdrawn is withdrawn again.
    pub(in crate::engine) fn restored(kept: Vec<KeptDrain>) -> Self {
        let drains = kept.into_iter().flat_map(|KeptDrain { service, prefix, wait, is_refusing }| {
            // The first judgement of a process has the number 1.
            let phase = if is_refusing { Phase::Refusing } else { Phase::Withdrawing(1) };
            let drain = Drain { wait: Duration::from_secs(wait), phase };
            Scope::all(service, prefix.into_iter().collect()).into_iter().map(move |scope| (scope, drain))
        });
        Self(drains.collect())
    }

    /// What is to be kept.
    pub(in crate::engine) fn kept(&self) -> Vec<KeptDrain> {
        let kept = self.0.iter().map(|(scope, Drain { wait, phase })| {
            let (service, prefix) = scope.parts();
            KeptDrain { service, prefix, wait: wait.as_secs(), is_refusing: *phase == Phase::Refusing }
        });
        kept.collect()
    }

    /// How many drains there are.
    pub(in crate::engine) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether a rule is drained.
    pub(in crate::engine) fn include(&self, prefix: &Prefix, terms: &RuleSpec) -> bool {
        self.0.keys().any(|scope| scope.includes(prefix, terms))
    }

    /// Whether the whole node is.
    pub(in crate::engine) fn include_all(&self) -> bool {
        self.0.contains_key(&Scope::Node)
    }

    /// Adds one to the count of each drain that a rule belongs to. There are as many counts as drains.
    pub(in crate::engine) fn count(&self, prefix: &Prefix, terms: &RuleSpec, counts: &mut [u64]) {
        for (scope, count) in self.0.keys().zip(counts) {
            *count += u64::from(scope.includes(prefix, terms));
        }
    }

    /// Has these drained. What is refused already stays so.
    pub(in crate::engine) fn begin(&mut self, scopes: Vec<Scope>, wait: Duration) {
        for scope in scopes {
            let is_refusing = self.0.get(&scope).is_some_and(|drain| drain.phase == Phase::Refusing);
            let phase = if is_refusing { Phase::Refusing } else { Phase::Begun };
            self.0.insert(scope, Drain { wait, phase });
        }
    }

    /// What has begun is withdrawn by the judgement of this number, if the router announces at all.
    pub(in crate::engine) fn withdrawn_by(&mut self, withdrawal: Option<u64>, now: Instant) {
        for drain in self.0.values_mut().filter(|drain| drain.phase == Phase::Begun) {
            drain.phase = match withdrawal {
                // Without a pause for clients there is none for the router either.
                Some(number) if !drain.wait.is_zero() => Phase::Withdrawing(number),
                _ => Phase::Waiting(now + drain.wait),
            };
        }
    }

    /// From the withdrawal to waiting, and from waiting to refusing. Returns what is refused from now on.
    pub(in crate::engine) fn advance(&mut self, now: Instant, is_withdrawn: impl Fn(u64) -> bool) -> Vec<Scope> {
        let mut begun = Vec::new();
        for (scope, drain) in &mut self.0 {
            if let Phase::Withdrawing(number) = drain.phase
                && is_withdrawn(number)
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
        begun
    }

    /// These could not be refused: they wait again.
    pub(in crate::engine) fn postpone(&mut self, scopes: &[Scope], until: Instant) {
        for (_, drain) in self.0.iter_mut().filter(|(scope, _)| scopes.contains(scope)) {
            drain.phase = Phase::Waiting(until);
        }
    }

    /// Ends these.
    ///
    /// # Errors
    /// The first one that is not drained by itself.
    pub(in crate::engine) fn end(&mut self, scopes: Vec<Scope>) -> Result<(), Scope> {
        match scopes.into_iter().find(|scope| self.0.remove(scope).is_none()) {
            Some(scope) => Err(scope),
            None => Ok(()),
        }
    }

    /// How many refuse new connections.
    pub(in crate::engine) fn refusing_count(&self) -> usize {
        self.refusing().count()
    }

    fn refusing(&self) -> impl Iterator<Item = &Scope> {
        self.0.iter().filter(|(_, drain)| drain.phase == Phase::Refusing).map(|(scope, _)| scope)
    }

    /// As `status` shows them; `complaint` is why the router does not withdraw what it should.
    pub(in crate::engine) fn views(&self, complaint: Option<&String>) -> Vec<DrainView> {
        let view = |(scope, Drain { phase, .. }): (&Scope, &Drain)| {
            let (service, prefix) = scope.parts();
            let (state, left, why) = match phase {
                Phase::Begun | Phase::Withdrawing(_) => (DrainState::Withdrawing, None, complaint.cloned()),
                Phase::Waiting(until) => {
                    (DrainState::Waiting, Some(until.saturating_duration_since(Instant::now()).as_secs()), None)
                }
                Phase::Refusing => (DrainState::Refusing, None, None),
            };
            DrainView { service, prefix, state, left, why, connections: None }
        };
        self.0.iter().map(view).collect()
    }

    /// The prefixes with rules that are refused though they name a service, and all of their rules as the kernel is to read them.
    /// Numbers and order stay.
    pub(in crate::engine) fn refusals(&self, rules: RuleView<'_>) -> Vec<(Prefix, PrefixRules)> {
        let scopes: Vec<&Scope> = self.refusing().collect();
        let mut refusals = Vec::new();
        if scopes.is_empty() {
            return refusals;
        }
        let mut known: HashMap<*const RuleSpec, Arc<RuleSpec>> = HashMap::new();
        for (prefix, rules) in rules.prefixes() {
            let mut refusing = PrefixRules::default();
            refusing.first_number = rules.first_number;
            let mut is_drained = false;
            for held in rules {
                if !scopes.iter().any(|scope| scope.includes(prefix, &held.terms)) {
                    refusing.insert_unchecked(&held.terms, held.origins);
                    continue;
                }
                is_drained = true;
                let refused = || Arc::new(RuleSpec { service: ServiceName::drained(), ..RuleSpec::clone(&held.terms) });
                let terms = known.entry(Arc::as_ptr(&held.terms)).or_insert_with(refused);
                refusing.insert_unchecked(terms, held.origins);
            }
            if is_drained {
                refusals.push((*prefix, refusing));
            }
        }
        refusals
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Drains, Scope};
    use crate::{
        api::DrainState,
        rules::{Origin, Rule, RuleSet, RuleText, ServiceName},
    };

    const WAIT: Duration = Duration::from_secs(5);

    fn scope(prefix: &str) -> Scope {
        Scope::Prefix(prefix.parse().unwrap())
    }

    fn states(drains: &Drains) -> Vec<DrainState> {
        drains.views(None).into_iter().map(|it| it.state).collect()
    }

    fn rule(prefix: &str) -> Rule {
        let text = format!("prefix = \"{prefix}\"\nprotocol = \"tcp\"\nports = \"80\"");
        toml::from_str::<RuleText>(&text).unwrap().into_rule(Origin::Added)
    }

    #[test]
    fn a_drain_withdraws_waits_and_refuses() {
        let begin = Instant::now();
        let mut drains = Drains::default();
        drains.begin(vec![scope("192.0.2.0/24")], WAIT);
        drains.withdrawn_by(Some(7), begin);
        assert_eq!(states(&drains), [DrainState::Withdrawing]);
        assert!(drains.advance(begin, |number| number < 7).is_empty());
        assert!(drains.advance(begin, |number| number == 7).is_empty());
        assert_eq!(states(&drains), [DrainState::Waiting]);
        assert_eq!(drains.advance(begin + WAIT, |_| false), [scope("192.0.2.0/24")]);
        assert_eq!((states(&drains), drains.refusing_count()), (vec![DrainState::Refusing], 1));
        // Where that fails it is tried again.
        drains.postpone(&[scope("192.0.2.0/24")], begin + WAIT * 2);
        assert_eq!(states(&drains), [DrainState::Waiting]);
    }

    #[test]
    fn what_is_not_to_wait_does_not_wait_for_the_router() {
        let mut drains = Drains::default();
        drains.begin(vec![Scope::Node], Duration::ZERO);
        drains.withdrawn_by(Some(7), Instant::now());
        assert_eq!(drains.advance(Instant::now(), |_| false), [Scope::Node]);
        // What is refused already is not withdrawn once more.
        drains.begin(vec![Scope::Node], WAIT);
        assert_eq!(states(&drains), [DrainState::Refusing]);
        assert!(drains.include_all());
    }

    #[test]
    fn what_is_kept_comes_back() {
        let mut drains = Drains::default();
        let service = Scope::Service("web".parse().unwrap());
        drains.begin(vec![service.clone(), scope("2001:db8::/32")], WAIT);
        drains.withdrawn_by(None, Instant::now());
        let mut restored = Drains::restored(drains.kept());
        assert_eq!(states(&restored), [DrainState::Withdrawing; 2]);
        assert_eq!(restored.end(vec![service.clone(), Scope::Node]), Err(Scope::Node));
        assert_eq!(restored.end(vec![service.clone()]), Err(service));
        assert_eq!(restored.len(), 1);
    }

    #[test]
    fn what_is_refused_reads_so_under_its_numbers() {
        let mut rules = RuleSet::default();
        for prefix in ["192.0.2.0/25", "198.51.100.0/24"] {
            rules.insert(&rule(prefix)).unwrap();
        }
        let mut drains = Drains::default();
        drains.begin(vec![scope("192.0.2.0/24")], Duration::ZERO);
        assert!(drains.refusals(rules.view()).is_empty());
        drains.withdrawn_by(None, Instant::now());
        drains.advance(Instant::now(), |_| true);
        let refusals = drains.refusals(rules.view());
        let [(prefix, refused)] = &refusals[..] else { panic!("{refusals:?}") };
        assert_eq!(prefix.to_string(), "192.0.2.0/25");
        let before = rules.of_prefix(prefix).unwrap();
        assert_eq!((refused.len(), refused.first_number), (before.len(), before.first_number));
        assert!(refused.iter().all(|it| it.terms.service == ServiceName::drained()));
    }
}
