//! The flows that a worker keeps: a bounded table, from which the least recently used ones go.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Weak},
};

use crate::service::datagram::Ends;

/// How many of the oldest are looked at when one has to go.
const LOOKED_AT: usize = 16;
/// Where a name server answers (RFC 1035, 4.2.1).
const DNS: u16 = 53;

/// What knows when it was last used, on a clock of the caller's.
pub(super) trait Used {
    fn last_used(&self) -> u64;
}

/// For how long a flow stays that is not used, on the clock of [`Used`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    pub(super) dns: u64,
    pub(super) others: u64,
}

/// Flows by client and original destination. Those to name servers are many, and stay for a shorter time.
#[derive(Debug)]
pub(super) struct Flows<F> {
    by_ends: HashMap<Ends, Arc<F>>,
    dns: Row<F>,
    others: Row<F>,
    limit: usize,
}

/// Flows that stay for the same time, roughly by last use.
#[derive(Debug)]
struct Row<F> {
    idle: u64,
    /// Each flow once, with the time up to which its place in the row is right: using a flow does not move it. It is moved
    /// when its entry comes to the front. Entries of flows that have ended are removed then, too.
    entries: VecDeque<(u64, Ends, Weak<F>)>,
}

type ByEnds<F> = HashMap<Ends, Arc<F>>;

impl<F: Used> Flows<F> {
    /// An empty table for so many, at least one.
    pub(super) fn new(limit: usize, idle: Idle) -> Self {
        let row = |idle| Row { idle, entries: VecDeque::new() };
        Self { by_ends: HashMap::new(), dns: row(idle.dns), others: row(idle.others), limit: limit.max(1) }
    }

    pub(super) fn len(&self) -> usize {
        self.by_ends.len()
    }

    pub(super) fn get(&self, ends: &Ends) -> Option<&Arc<F>> {
        self.by_ends.get(ends)
    }

    /// All of them, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Ends, &Arc<F>)> {
        self.by_ends.iter()
    }

    fn row_of(&mut self, ends: &Ends) -> &mut Row<F> {
        if ends.dialled.port() == DNS { &mut self.dns } else { &mut self.others }
    }

    /// Adds a flow that is not there. Returns the one that had to go for it.
    pub(super) fn insert(&mut self, ends: Ends, flow: Arc<F>) -> Option<Arc<F>> {
        let gone = if self.by_ends.len() >= self.limit { self.remove_oldest(|_| true) } else { None };
        self.row_of(&ends).entries.push_back((flow.last_used(), ends, Arc::downgrade(&flow)));
        self.by_ends.insert(ends, flow);
        gone
    }

    /// Removes a flow, unless another one has its place.
    pub(super) fn remove(&mut self, ends: &Ends, flow: &Arc<F>) -> bool {
        let is_it = self.by_ends.get(ends).is_some_and(|it| Arc::ptr_eq(it, flow));
        if is_it {
            self.by_ends.remove(ends);
            // Those that ended stand in the row until they come to the front, but not more of them than there are others.
            let entries = self.dns.entries.len() + self.others.entries.len();
            if entries > 2 * self.by_ends.len() + LOOKED_AT {
                for row in [&mut self.dns, &mut self.others] {
                    row.entries.retain(|(_, ends, flow)| alive(&self.by_ends, ends, flow).is_some());
                }
            }
        }
        is_it
    }

    /// Removes the flows that were not used for as long as they may.
    pub(super) fn expire(&mut self, now: u64) -> Vec<Arc<F>> {
        let mut gone = Vec::new();
        for row in [&mut self.dns, &mut self.others] {
            row.expire(&mut self.by_ends, now, &mut gone);
        }
        gone
    }

    /// Removes the flow that would expire first, among those that come first in their row and may go.
    pub(super) fn remove_oldest(&mut self, may_go: impl Fn(&Ends) -> bool) -> Option<Arc<F>> {
        let rows = [&mut self.dns, &mut self.others];
        let oldest = rows.map(|row| row.oldest(&self.by_ends, &may_go));
        let (_, ends) = oldest.into_iter().flatten().min_by_key(|(expiry, _)| *expiry)?;
        self.by_ends.remove(&ends)
    }
}

impl<F: Used> Row<F> {
    fn expire(&mut self, flows: &mut ByEnds<F>, now: u64, gone: &mut Vec<Arc<F>>) {
        let before = now.saturating_sub(self.idle);
        while let Some((time, _, _)) = self.entries.front()
            && *time < before
            && let Some((_, ends, flow)) = self.entries.pop_front()
        {
            let Some(flow) = alive(flows, &ends, &flow) else { continue };
            let last_used = flow.last_used();
            if last_used < before {
                gone.extend(flows.remove(&ends));
            } else {
                self.entries.push_back((last_used, ends, Arc::downgrade(&flow)));
            }
        }
    }

    /// The flow that was not used for the longest time, among those that come first and may go: when it expires. It stays
    /// where it is.
    fn oldest(&mut self, flows: &ByEnds<F>, may_go: impl Fn(&Ends) -> bool) -> Option<(u64, Ends)> {
        let mut seen = Vec::with_capacity(LOOKED_AT);
        while seen.len() < LOOKED_AT
            && let Some((time, ends, flow)) = self.entries.pop_front()
        {
            let Some(flow) = alive(flows, &ends, &flow) else { continue };
            let last_used = flow.last_used();
            seen.push((time, last_used, ends, flow));
            if last_used <= time && may_go(&ends) {
                // Not used since, and all that follow have a later time.
                break;
            }
        }
        let allowed = seen.iter().filter(|(_, _, ends, _)| may_go(ends));
        let oldest =
            allowed.min_by_key(|(_, last_used, ..)| *last_used).map(|(_, last_used, ends, _)| (*last_used, *ends));
        for (time, last_used, ends, flow) in seen.into_iter().rev() {
            let flow = Arc::downgrade(&flow);
            if last_used <= time {
                self.entries.push_front((time, ends, flow));
            } else {
                self.entries.push_back((last_used, ends, flow));
            }
        }
        oldest.map(|(last_used, ends)| (last_used.saturating_add(self.idle), ends))
    }
}

fn alive<F>(flows: &ByEnds<F>, ends: &Ends, flow: &Weak<F>) -> Option<Arc<F>> {
    let there = flows.get(ends)?;
    std::ptr::eq(Arc::as_ptr(there), flow.as_ptr()).then(|| Arc::clone(there))
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    };

    use super::{DNS, Flows, Idle, LOOKED_AT, Used};
    use crate::service::datagram::Ends;

    /// What was last used before the time that is given.
    const AT_ONCE: Idle = Idle { dns: 0, others: 0 };

    #[derive(Debug)]
    struct At(AtomicU64);

    impl Used for At {
        fn last_used(&self) -> u64 {
            self.0.load(Relaxed)
        }
    }

    fn at(time: u64) -> Arc<At> {
        Arc::new(At(time.into()))
    }

    fn ends(port: u16) -> Ends {
        Ends { client: ([198, 51, 100, 1], port).into(), dialled: ([192, 0, 2, 1], 53).into() }
    }

    #[test]
    fn the_least_recently_used_goes() {
        let mut flows = Flows::new(3, AT_ONCE);
        for port in 1..=3 {
            assert!(flows.insert(ends(port), at(port.into())).is_none());
        }
        flows.get(&ends(1)).unwrap().0.store(10, Relaxed);
        assert_eq!(flows.insert(ends(4), at(11)).unwrap().last_used(), 2);
        assert_eq!(flows.insert(ends(5), at(12)).unwrap().last_used(), 3);
        assert_eq!(flows.insert(ends(6), at(13)).unwrap().last_used(), 10);
        assert_eq!(flows.len(), 3);
        assert!(flows.get(&ends(4)).is_some() && flows.get(&ends(1)).is_none());
    }

    #[test]
    fn only_those_go_that_may() {
        let mut flows = Flows::new(100, AT_ONCE);
        for port in 1..=4 {
            flows.insert(ends(port), at(port.into()));
        }
        let mut gone = |ports: &[u16]| {
            let may_go = |it: &Ends| ports.contains(&it.client.port());
            flows.remove_oldest(may_go).map(|it| it.last_used())
        };
        assert_eq!((gone(&[7]), gone(&[3, 2]), gone(&[2])), (None, Some(2), None));
        // The others are where they were.
        assert_eq!(flows.expire(4).iter().map(|it| it.last_used()).collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn one_goes_when_all_were_used() {
        let mut flows = Flows::new(100, AT_ONCE);
        for port in 1..=100 {
            flows.insert(ends(port), at(0));
        }
        for port in 1..=100 {
            flows.get(&ends(port)).unwrap().0.store(1000 - u64::from(port), Relaxed);
        }
        // Among the first that are looked at, the last one was used first.
        let gone = flows.insert(ends(101), at(1001)).unwrap();
        assert_eq!(gone.last_used(), 1000 - LOOKED_AT as u64);
        assert_eq!(flows.len(), 100);
    }

    #[test]
    fn what_is_idle_expires() {
        let mut flows = Flows::new(10, AT_ONCE);
        for port in 1..=4 {
            flows.insert(ends(port), at(port.into()));
        }
        flows.get(&ends(2)).unwrap().0.store(20, Relaxed);
        assert!(flows.expire(1).is_empty());
        let gone: Vec<u64> = flows.expire(4).iter().map(|it| it.last_used()).collect();
        assert_eq!((gone, flows.len()), (vec![1, 3], 2));
        let gone: Vec<u64> = flows.expire(20).iter().map(|it| it.last_used()).collect();
        assert_eq!(gone, [4]);
        assert_eq!(flows.expire(21).len(), 1);
        assert_eq!((flows.len(), flows.dns.entries.len()), (0, 0));
    }

    #[test]
    fn what_ended_leaves_no_trace() {
        let mut flows = Flows::new(10, AT_ONCE);
        for round in 0..10_000 {
            let flow = at(round);
            assert!(flows.insert(ends(1), Arc::clone(&flow)).is_none());
            assert!(flows.remove(&ends(1), &flow));
            assert!(!flows.remove(&ends(1), &flow));
        }
        assert_eq!(flows.len(), 0);
        assert!(flows.dns.entries.len() <= LOOKED_AT + 1);
        let (first, second) = (at(10_001), at(10_002));
        flows.insert(ends(1), Arc::clone(&first));
        flows.remove(&ends(1), &first);
        flows.insert(ends(1), Arc::clone(&second));
        assert!(!flows.remove(&ends(1), &first), "another flow has the place");
        assert!(flows.expire(10_002).is_empty());
        assert_eq!(flows.expire(10_003).len(), 1);
    }

    #[test]
    fn questions_to_name_servers_stay_for_a_shorter_time() {
        let ends = |port, dialled| Ends { dialled: ([192, 0, 2, 1], dialled).into(), ..ends(port) };
        let mut flows = Flows::new(3, Idle { dns: 10, others: 120 });
        flows.insert(ends(1, 4433), at(0));
        flows.insert(ends(2, DNS), at(0));
        flows.insert(ends(3, DNS), at(105));
        assert!(flows.expire(10).is_empty());
        assert_eq!(flows.expire(11).len(), 1);
        flows.insert(ends(4, DNS), at(112));
        // At 115 one of DNS, at 120 that of another service, at 122 the other one of DNS.
        for (port, dialled) in [(3, DNS), (1, 4433), (4, DNS)] {
            let gone = flows.insert(ends(port + 10, 4433), at(500));
            assert!(gone.is_some() && flows.get(&ends(port, dialled)).is_none(), "{port}");
        }
        assert!(flows.expire(620).is_empty());
        assert_eq!(flows.expire(621).len(), 3);
        assert_eq!((flows.len(), flows.dns.entries.len(), flows.others.entries.len()), (0, 0, 0));
    }
}
