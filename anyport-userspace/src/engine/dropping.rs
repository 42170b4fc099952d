//! Services to which packets are steered, and all of them dropped for a fault: the programs' counters show it.
//!
//! A drop is a fault where the kernel would not assign a socket, or where the program found none though the service has one
//! for all that its rules steer. Others are intended: of a service without sockets, of sources that its ACL does not allow,
//! of what is drained.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyport_common::{flow::Transport, maps::Counters};
use tracing::error;

use super::{Facts, services::Services, views::Sums};
use crate::{back_end::BackEnd, rules::ServiceName};

/// How often the counters are checked for dropped packets.
const INTERVAL: Duration = Duration::from_secs(2);
/// How many times longer than reading the counters of all rules takes the pause until that is done again is at least.
const SHARE: u32 = 20;
/// So many drops, and no packet that is steered meanwhile, are no accident.
const MANY: u64 = 8;
/// Nearly all: to one packet that is steered there are as many drops.
const NEARLY: u64 = 20;

/// What was seen of the packets that were dropped.
#[derive(Debug, Default)]
pub(super) struct Dropping {
    /// When the counters were read last, and how long that took.
    at: Option<Instant>,
    took: Duration,
    /// All packets dropped by then, and the generation.
    dropped: u64,
    generation: u64,
    services: BTreeMap<ServiceName, Watched>,
}

/// A service, as it was seen last.
#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    seen: Seen,
    /// Faults since a packet was steered.
    errors: u64,
    lost: u64,
}

/// What was counted for a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    steered: u64,
    no_socket: u64,
    assign_error: u64,
    /// Whether it has a socket for all that is steered to it.
    is_served: bool,
}

impl Watched {
    /// Takes another check into account.
    fn look(&mut self, now: Seen) {
        let Seen { steered, no_socket, assign_error, is_served } = std::mem::replace(&mut self.seen, now);
        let grown = |now: u64, before: u64| now.checked_sub(before);
        if !now.is_served {
            // A fault of sockets ends with them.
            self.lost = 0;
        }
        let (Some(steered), Some(no_socket), Some(assign_error)) =
            (grown(now.steered, steered), grown(now.no_socket, no_socket), grown(now.assign_error, assign_error))
        else {
            // Rules went, and their counters with them.
            return;
        };
        // While there was none to be found, that was no fault.
        let lost = if is_served && now.is_served { no_socket } else { 0 };
        if steered > 0 && lost + assign_error < steered.saturating_mul(NEARLY) {
            (self.errors, self.lost) = (0, 0);
        } else {
            self.errors += assign_error;
            self.lost += lost;
        }
    }

    /// Why it gets nothing, if that is so.
    fn fault(&self, name: &ServiceName, back_end: BackEnd) -> Option<String> {
        let Self { errors, lost, .. } = *self;
        let why = match back_end {
            _ if errors < lost => "the program finds none of its sockets (no_socket)",
            BackEnd::Tc => "the kernel would not assign its sockets, or they were fragments (assign_error)",
            _ => "the kernel would not assign its sockets (assign_error)",
        };
        (errors + lost >= MANY).then(|| {
            format!("service {name} gets nothing: the last {} packets steered to it were dropped: {why}", errors + lost)
        })
    }
}

impl Dropping {
    /// Why a service gets nothing of what is steered to it, if that is so.
    pub(super) fn fault_of(&self, name: &ServiceName, back_end: BackEnd) -> Option<String> {
        self.services.get(name)?.fault(name, back_end)
    }

    /// The same of all services.
    pub(super) fn faults(&self, back_end: BackEnd) -> impl Iterator<Item = String> {
        self.services.iter().filter_map(move |(name, watched)| watched.fault(name, back_end))
    }

    fn is_due(&self) -> bool {
        self.at.is_none_or(|at| at.elapsed() >= INTERVAL.max(self.took * SHARE))
    }

    /// Whether something may be seen that was not: other services or rules, another drop, or the end of a row of them.
    fn is_news(&self, generation: u64, dropped: u64) -> bool {
        let has_row = self.services.values().any(|it| it.errors + it.lost > 0);
        generation != self.generation || dropped != self.dropped || has_row
    }
    /// Checks whether what is steered is dropped, where the back end counts that.
    pub(super) fn look(&mut self, facts: Facts<'_>) {
        if !self.is_due() {
            return;
        }
        let at = Instant::now();
        if let Err(error) = self.see(facts) {
            error!("look whether packets are dropped: {error:#}");
        }
        (self.at, self.took) = (Some(Instant::now()), at.elapsed());
    }

    fn see(&mut self, facts: Facts<'_>) -> anyhow::Result<()> {
        let Facts { desired, services, kernel } = facts;
        let Some(dropped) = kernel.dropped()? else { return Ok(()) };
        if !self.is_news(kernel.generation(), dropped) {
            return Ok(());
        }
        let mut needs: BTreeMap<&ServiceName, Needs> = BTreeMap::new();
        let counters = kernel.counters()?;
        let sums = Sums::read(
            desired.rules(),
            |rule| counters(rule.number),
            |it| {
                let terms = &it.rule.terms;
                let needs = needs.entry(&terms.service).or_default();
                needs.is_drained |= desired.drains().include(&it.rule.prefix, terms);
                for transport in terms.protocol.transports() {
                    let place =
                        usize::from(*transport == Transport::Udp) + if it.rule.prefix.is_ipv4() { 0 } else { 2 };
                    needs.places[place] = true;
                }
            },
        );
        let mut previous = std::mem::take(&mut self.services);
        for (name, needs) in needs {
            let now = seen(services, name, &needs, &sums);
            // Of a new one, only what comes from now on is checked.
            let mut watched = previous.remove(name).unwrap_or(Watched { seen: now, ..Watched::default() });
            watched.look(now);
            self.services.insert(name.clone(), watched);
        }
        (self.dropped, self.generation) = (dropped, kernel.generation());
        Ok(())
    }
}

fn seen(services: &Services, name: &ServiceName, needs: &Needs, sums: &Sums) -> Seen {
    let groups = services.get(name).map(|running| services.groups_of(running)).unwrap_or_default();
    let has_all = groups.iter().zip(needs.places).all(|(group, is_needed)| group.is_some() || !is_needed);
    let (_, Counters { steered, no_socket, assign_error, .. }) = sums.of(name);
    Seen { steered, no_socket, assign_error, is_served: has_all && !needs.is_drained }
}

/// What the rules of a service steer to it.
#[derive(Debug, Default)]
struct Needs {
    /// In the order of [`super::services::KINDS`].
    places: [bool; 4],
    /// Whether one of them is drained, so that its packets are dropped as they should be.
    is_drained: bool,
}

#[cfg(test)]
mod tests {
    use super::{BackEnd, MANY, Seen, Watched};

    /// Checks one after the other: what came in between, and whether that is a fault.
    fn expect(looks: &[([u64; 3], bool, bool)]) {
        let mut watched = Watched { seen: Seen { is_served: true, ..Seen::default() }, ..Watched::default() };
        let mut now = watched.seen;
        for (at, ([steered, no_socket, assign_error], is_served, is_fault)) in looks.iter().copied().enumerate() {
            now.steered += steered;
            now.no_socket += no_socket;
            now.assign_error += assign_error;
            now.is_served = is_served;
            watched.look(now);
            let fault = watched.fault(&"web".parse().unwrap(), BackEnd::SkLookup);
            assert_eq!(fault.is_some(), is_fault, "look {at}: {fault:?}");
        }
    }

    #[test]
    fn only_drops_for_a_fault_are_one() {
        // Few, then many, then nothing, which says nothing, then one that gets through.
        expect(&[([0, 0, 2], true, false), ([0, 0, MANY], true, true), ([0; 3], true, true), ([1, 0, 0], true, false)]);
        // Nearly all.
        expect(&[([1, 0, 99], true, true), ([50, 0, 99], true, false)]);
        // The program finds none of the sockets that are there.
        expect(&[([0, MANY, 0], true, true)]);
        // There are none, or there were none until a moment ago, or what is steered is drained.
        expect(&[([0, 99, 0], false, false), ([0, 99, 0], true, false), ([0, 0, 0], true, false)]);
        // What got lost while there were sockets is no fault any more once they are gone.
        expect(&[([0, MANY, 0], true, true), ([0; 3], false, false)]);
        // Some are served.
        expect(&[([100, 99, 99], true, false)]);
    }

    #[test]
    fn rules_that_go_take_their_counters_along() {
        let mut watched = Watched::default();
        watched.look(Seen { steered: 10, no_socket: 90, assign_error: 90, is_served: true });
        let before = (watched.errors, watched.lost);
        watched.look(Seen { steered: 0, no_socket: 95, assign_error: 99, is_served: true });
        assert_eq!((watched.errors, watched.lost), before);
    }
}
