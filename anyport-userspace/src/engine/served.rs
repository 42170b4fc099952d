//! What is served, as the announcements need it.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    sync::Arc,
    time::{Duration, Instant},
};

use anyport_common::flow::Transport;

use super::{
    Facts,
    desired::{Desired, Drains},
    services::{KINDS, Running, Services},
};
use crate::{
    announce::{Announce, Announcer, Judged, Judgement, Needs, Serving},
    api::AnnounceView,
    rules::{Origin, Prefix, PrefixRules, Protocol, ServiceName},
    service::{HandlerKind, Queue, UpstreamState},
    text::list_of,
};

/// A queue that was not empty at each check for so long, and from which nothing was accepted, does not move.
const STUCK: Duration = Duration::from_secs(3);
/// More prefixes of rules than this are not announced.
const MAX_PREFIXES: usize = 65_536;

/// What is needed to judge what is served.
#[derive(Debug, Default)]
pub(super) struct Served {
    /// Has the router announce what is served, where it is to.
    announcer: Option<Announcer>,
    /// What the prefixes that may be announced need, as long as nothing has changed.
    needs: Option<(u64, Needed)>,
    /// Whether there are more prefixes than are announced.
    is_cut: bool,
    /// Of the daemon's own listening sockets.
    own: Queues,
    /// Of those that were registered.
    registered: Queues,
}

/// What each prefix needs.
type Needed = Vec<(Prefix, BTreeSet<Need>)>;

/// A place of a service at which packets of a prefix arrive.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Need {
    service: ServiceName,
    /// As in [`KINDS`].
    place: usize,
    is_drained: bool,
}

/// Queues of listening sockets, by cookie.
#[derive(Debug, Default)]
struct Queues(HashMap<u64, Watched>);

#[derive(Debug)]
struct Watched {
    queue: Queue,
    /// When it was empty, or something had been accepted from it.
    moved: Instant,
}

impl Queues {
    /// Takes a check of all of them into account.
    fn look(&mut self, queues: impl Iterator<Item = Queue>, now: Instant) {
        let mut previous = std::mem::take(&mut self.0);
        let watch = |queue: Queue| {
            let moved = match previous.remove(&queue.cookie) {
                Some(before) if !queue.has_moved_since(&before.queue) => before.moved,
                _ => now,
            };
            (queue.cookie, Watched { queue, moved })
        };
        self.0 = queues.map(watch).collect();
    }

    /// Why this one does not move, if it does not.
    fn stuck(&self, cookie: u64, now: Instant) -> Option<String> {
        let Watched { queue, moved } = self.0.get(&cookie)?;
        let is_stuck = now.duration_since(*moved) >= STUCK;
        is_stuck.then(|| {
            let socket = queue.cookie;
            format!("connections wait at its socket {socket}, and none has been accepted for {} s", STUCK.as_secs())
        })
    }
}

impl Queue {
    /// Where accepted connections are not counted, it has moved when it is shorter than before.
    fn has_moved_since(&self, before: &Self) -> bool {
        self.waiting == 0
            || match (self.accepted, before.accepted) {
                (Some(now), Some(before)) => now != before,
                _ => self.waiting < before.waiting,
            }
    }
}

impl Served {
    /// Forgets what the prefixes need, since that has changed.
    pub(super) fn forget_needs(&mut self) {
        self.needs = None;
    }

    /// Takes a check of the registered sockets into account.
    pub(super) fn look_at_registered(&mut self, queues: Vec<Queue>, now: Instant) {
        self.registered.look(queues.into_iter(), now);
    }

    /// Whether the router announces by the judgement of this number. Nothing has to be withdrawn where nothing is announced.
    pub(super) fn has_withdrawn(&self, number: u64) -> bool {
        self.announcer.as_ref().is_none_or(|announcer| announcer.has_done(number))
    }

    /// Why the router does not announce what it should.
    pub(super) fn complaint(&self) -> Option<String> {
        self.announcer.as_ref().and_then(Announcer::complaint)
    }

    /// What `status` shows of announcing, if something is announced.
    pub(super) fn view(&self, announce: &Announce) -> Option<AnnounceView> {
        Some(self.announcer.as_ref()?.view(announce))
    }

    /// What `status` says does not work of announcing.
    pub(super) fn degraded(&self) -> impl Iterator<Item = String> {
        let cut = || format!("there are more than {MAX_PREFIXES} prefixes to announce, the rest is not announced");
        self.complaint().map(|it| format!("announcing: {it}")).into_iter().chain(self.is_cut.then(cut))
    }

    /// Leaves what is announced to another process.
    pub(super) async fn leave(&mut self) {
        if let Some(announcer) = self.announcer.take() {
            announcer.leave().await;
        }
    }

    /// Continues with what an earlier daemon announced.
    pub(super) fn start(&mut self, announce: &Announce, services: &Services) {
        let (control, ends) = (&services.context().control, Arc::clone(services.owner_exits()));
        self.announcer = Some(Announcer::start(announce, control, ends));
    }

    /// Withdraws everything that is announced.
    pub(super) async fn withdraw(&self) {
        if let Some(announcer) = &self.announcer {
            announcer.withdraw().await;
        }
    }

    /// Has announced what is served now. Returns the number of this judgement, if something is announced at all.
    pub(super) fn judge(&mut self, announce: &Announce, facts: Facts<'_>) -> Option<u64> {
        self.announcer.as_ref()?;
        let generation = facts.kernel.generation();
        if self.needs.as_ref().is_none_or(|(of, _)| *of != generation) {
            let mut needs = Self::needs(announce, facts.desired);
            self.is_cut = needs.len() > MAX_PREFIXES;
            needs.truncate(MAX_PREFIXES);
            self.needs = Some((generation, needs));
        }
        let now = Instant::now();
        let (_, needs) = self.needs.as_ref()?;
        let names: BTreeSet<_> = needs.iter().flat_map(|(_, needs)| needs).map(|need| &need.service).collect();
        let services = names.into_iter().filter_map(|name| facts.services.get(name));
        self.own.look(services.flat_map(|running| running.service().queues()), now);
        let mut known = HashMap::new();
        let prefixes = needs.iter().map(|(prefix, needs)| {
            let verdict = self.verdict(prefix, needs, announce.needs, facts, &mut known, now);
            Judged { prefix: *prefix, verdict }
        });
        let judgement = Judgement { number: 0, prefixes: prefixes.collect(), hold_down: announce.hold_down.0 };
        Some(self.announcer.as_ref()?.judge(judgement))
    }

    /// The prefixes that may be announced, and what each of them needs.
    fn needs(announce: &Announce, desired: &Desired) -> Needed {
        let Announce { prefixes, rules_within, .. } = announce;
        let mut all: HashMap<Prefix, BTreeSet<Need>> = HashMap::new();
        for prefix in prefixes {
            let overlapping = desired.rules().around(*prefix).filter(|(outer, _)| outer != prefix);
            let needs = all.entry(*prefix).or_default();
            overlapping
                .chain(desired.rules().within(*prefix))
                .for_each(|(at, rules)| add_needs(at, rules, desired.drains(), needs));
        }
        for (prefix, rules) in rules_within.iter().flat_map(|within| desired.rules().within(*within)) {
            let is_left = rules.iter().all(|it| it.origins == Origin::Host.into());
            if let Entry::Vacant(place) = all.entry(prefix)
                && !is_left
            {
                add_needs(prefix, rules, desired.drains(), place.insert(BTreeSet::new()));
            }
        }
        let mut needs: Vec<_> = all.into_iter().collect();
        needs.sort_unstable_by_key(|(prefix, _)| *prefix);
        needs
    }

    fn verdict<'a>(
        &self,
        prefix: &Prefix,
        needs: &'a BTreeSet<Need>,
        policy: Needs,
        facts: Facts<'_>,
        known: &mut HashMap<(&'a ServiceName, usize), Serving>,
        now: Instant,
    ) -> Serving {
        let is_drained = match policy {
            Needs::All => needs.iter().any(|need| need.is_drained),
            Needs::Any => !needs.is_empty() && needs.iter().all(|need| need.is_drained),
        };
        if is_drained {
            return Serving::Drained;
        }
        if let Some(why) = facts.kernel.unsteered(prefix) {
            return Serving::Unserved(why);
        }
        let verdicts = needs.iter().filter(|need| !need.is_drained).map(|Need { service, place, .. }| {
            known
                .entry((service, *place))
                .or_insert_with(|| self.verdict_of(service, *place, facts.services, now))
                .clone()
        });
        combined(verdicts, policy)
    }

    /// Whether what arrives at this place of a service is served.
    fn verdict_of(&self, name: &ServiceName, place: usize, services: &Services, now: Instant) -> Serving {
        let Some(running) = services.get(name) else {
            return Serving::Unserved(format!("there is no service {name}"));
        };
        let config = running.config();
        if config.handler != HandlerKind::Registered {
            return serves(running, place, &self.own, now);
        }
        if let Some(socket) = services.registrations(name).and_then(|it| it.live(place)) {
            let stuck = self.registered.stuck(socket.cookie, now);
            return stuck.map_or(Serving::Served, |why| Serving::Unserved(format!("service {name}: {why}")));
        }
        match config.fallback.as_ref().and_then(|fallback| services.get(fallback)) {
            Some(fallback) => serves(fallback, place, &self.own, now),
            None => Serving::Unserved(no_socket(name, place)),
        }
    }
}

fn add_needs(prefix: Prefix, rules: &PrefixRules, drains: &Drains, needs: &mut BTreeSet<Need>) {
    for held in rules.iter().filter(|it| it.origins != Origin::Host.into()) {
        let is_drained = drains.include(&prefix, &held.terms);
        for transport in held.terms.protocol.transports() {
            let place = usize::from(*transport == Transport::Udp) + if prefix.is_ipv4() { 0 } else { 2 };
            needs.insert(Need { service: held.terms.service.clone(), place, is_drained });
        }
    }
}

/// Of a service with sockets of its own.
fn serves(running: &Running, place: usize, queues: &Queues, now: Instant) -> Serving {
    let (service, name) = (running.service(), &running.config().name);
    if service.groups()[place].is_none() {
        return Serving::Unserved(no_socket(name, place));
    }
    let (family, transport) = KINDS[place];
    let of_place = service.sockets().iter().filter(|it| it.family == family && it.protocol == transport.into());
    if let Some(why) = of_place.filter(|_| transport == Transport::Tcp).find_map(|it| queues.stuck(it.cookie, now)) {
        return Serving::Unserved(format!("service {name}: {why}"));
    }
    if service.config().handler == HandlerKind::Forward {
        if !service.knows_upstreams() {
            return Serving::Unknown;
        }
        if service.upstreams().iter().all(|it| it.state != UpstreamState::Up) {
            return Serving::Unserved(format!("service {name} has no upstream that is up"));
        }
    }
    Serving::Served
}

fn no_socket(name: &ServiceName, place: usize) -> String {
    let (family, transport) = KINDS[place];
    format!("service {name} has no live socket for {} over {family}", Protocol::from(transport))
}

/// Out of the verdicts about all that a prefix needs.
fn combined(verdicts: impl Iterator<Item = Serving>, policy: Needs) -> Serving {
    let (mut served, mut is_unknown, mut reasons) = (0, false, Vec::new());
    for verdict in verdicts {
        match verdict {
            Serving::Served => served += 1,
            Serving::Unserved(why) if !reasons.contains(&why) => reasons.push(why),
            Serving::Unserved(_) => {}
            Serving::Unknown | Serving::Drained => is_unknown = true,
        }
    }
    match policy {
        Needs::Any if served > 0 => Serving::Served,
        Needs::All if !reasons.is_empty() => Serving::Unserved(list_of(&reasons)),
        _ if is_unknown => Serving::Unknown,
        _ if !reasons.is_empty() => Serving::Unserved(list_of(&reasons)),
        _ if served > 0 => Serving::Served,
        _ => Serving::Unserved("no rule steers any of it".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Needs, Queue, Queues, Serving, combined};

    fn unserved(why: &str) -> Serving {
        Serving::Unserved(why.to_owned())
    }

    #[test]
    fn all_rules_have_to_be_served_or_any() {
        use Serving::{Served, Unknown};
        let none = unserved("no rule steers any of it");
        for (verdicts, all, any) in [
            (vec![], none.clone(), none),
            (vec![Served], Served, Served),
            (vec![Served, unserved("a")], unserved("a"), Served),
            (vec![Served, Unknown], Unknown, Served),
            (vec![Unknown, unserved("a")], unserved("a"), Unknown),
            (vec![unserved("a"), unserved("b"), unserved("a")], unserved("a, b"), unserved("a, b")),
        ] {
            let both = [Needs::All, Needs::Any].map(|policy| combined(verdicts.clone().into_iter(), policy));
            assert_eq!(both, [all, any], "{verdicts:?}");
        }
    }

    #[test]
    fn a_queue_moves_when_somebody_leaves_it() {
        let begin = Instant::now();
        let mut queues = Queues::default();
        let mut look = |second: u64, waiting, accepted| {
            let now = begin + Duration::from_secs(second);
            queues.look([Queue { cookie: 7, waiting, accepted }].into_iter(), now);
            queues.stuck(7, now).is_some()
        };
        for (second, waiting, accepted, is_stuck) in [
            (0, 5, Some(1), false),
            (2, 9, Some(2), false),
            (4, 9, Some(2), false),
            (5, 9, Some(2), true),
            (6, 0, Some(2), false),
            (8, 1, Some(2), false),
            (9, 1, Some(2), true),
            (10, 1, Some(3), false),
            // Accepted connections are not counted.
            (11, 4, None, false),
            (13, 3, None, false),
            (15, 3, None, false),
            (16, 4, None, true),
            (17, 3, None, false),
        ] {
            assert_eq!(look(second, waiting, accepted), is_stuck, "second {second}");
        }
        assert!(queues.stuck(8, begin).is_none());
    }
}
