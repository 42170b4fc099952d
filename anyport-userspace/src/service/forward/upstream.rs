//! Upstreams: what is known of each, and which one gets a connection.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::{NonZeroU16, NonZeroU32},
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::config::{Balance, Ejection, HealthCheck};
use crate::service::{counts::Traffic, lock};

/// One address that clients are connected to. All workers share it; nothing that a connection needs takes a lock.
#[derive(Debug)]
#[repr(align(128))]
pub(in crate::service) struct Upstream {
    pub(super) address: IpAddr,
    /// The port to dial; the one that the client dialled if there is none.
    pub(super) port: Option<NonZeroU16>,
    /// The name that led here.
    pub(super) name: Option<String>,
    pub(super) traffic: Traffic,
    open: AtomicU64,
    total: AtomicU64,
    failures: AtomicU64,
    /// Failures since a client was last connected, or answered.
    failures_in_a_row: AtomicU32,
    /// By [`now`]; 0 if it never was.
    ejected_until: AtomicU64,
    is_down: AtomicBool,
    /// When a datagram came from it, on the clock of flows; 0 if none did.
    last_answer: AtomicU64,
    story: Mutex<Story>,
}

/// What is shown to users of an upstream's state.
#[derive(Debug, Default)]
struct Story {
    /// When it became as it is.
    since: Option<Instant>,
    why: String,
    /// Checks in a row that speak against its state.
    contrary_checks: u32,
}

/// Whether clients are connected to an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum UpstreamState {
    /// Yes.
    Up,
    /// No: health checks fail.
    Down,
    /// Not for a while, since clients could not be connected; only if there is no other.
    Ejected,
    /// No: it is not among the upstreams any more.
    Gone,
}

impl fmt::Display for UpstreamState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::Down => "down",
            Self::Ejected => "ejected",
            Self::Gone => "gone",
        })
    }
}

/// What is known of an upstream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UpstreamView {
    /// `ADDR:PORT`, or `ADDR:*`.
    pub address: String,
    /// The name that it was resolved from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whether clients are connected to it.
    pub state: UpstreamState,
    /// For how many seconds that is so, if it is not up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// Why it is not up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Connections that are open.
    pub active: u64,
    /// Connections that came to be.
    pub connections: u64,
    /// Connections that did not.
    pub failures: u64,
    /// Bytes of clients.
    pub bytes_to: u64,
    /// Bytes for clients.
    pub bytes_from: u64,
}

/// Milliseconds since the first call, from 1 on.
fn now() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
}

impl Upstream {
    pub(super) fn new(address: IpAddr, port: Option<NonZeroU16>, name: Option<String>) -> Self {
        Self {
            address,
            port,
            name,
            traffic: Traffic::default(),
            open: AtomicU64::new(0),
            total: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            failures_in_a_row: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            is_down: AtomicBool::new(false),
            last_answer: AtomicU64::new(0),
            story: Mutex::default(),
        }
    }

    /// Where a client is connected to that dialled this port.
    pub(super) fn target(&self, dialled: u16) -> SocketAddr {
        SocketAddr::new(self.address, self.port.map_or(dialled, NonZeroU16::get))
    }

    pub(super) fn state(&self) -> UpstreamState {
        if self.is_down.load(Relaxed) {
            return UpstreamState::Down;
        }
        let until = self.ejected_until.load(Relaxed);
        if until > 0 && until > now() { UpstreamState::Ejected } else { UpstreamState::Up }
    }

    /// It belongs to a service with these settings from now on: what they do not look at does not last.
    pub(super) fn adopt(&self, is_checked: bool, ejection: Ejection) {
        if !is_checked {
            self.is_down.store(false, Relaxed);
        }
        if ejection.failures == 0 {
            self.ejected_until.store(0, Relaxed);
        }
    }

    /// A connection or a flow has begun.
    pub(super) fn opened(&self) {
        self.open.fetch_add(1, Relaxed);
        self.total.fetch_add(1, Relaxed);
    }

    /// It takes connections, or answers.
    pub(super) fn succeeded(&self) {
        if self.failures_in_a_row.load(Relaxed) > 0 {
            self.failures_in_a_row.store(0, Relaxed);
            self.ejected_until.store(0, Relaxed);
        }
    }

    /// A datagram has come from it, for any client.
    pub(super) fn answered(&self, moment: u64) {
        self.last_answer.store(moment, Relaxed);
    }

    pub(super) fn has_answered_since(&self, moment: u64) -> bool {
        self.last_answer.load(Relaxed) >= moment
    }

    /// A client that was connected is not any more.
    pub(super) fn closed(&self) {
        self.open.fetch_sub(1, Relaxed);
    }

    /// A client could not be connected. Whether that ejects the upstream.
    pub(super) fn failed(&self, why: &dyn fmt::Display, ejection: Ejection) -> bool {
        self.failures.fetch_add(1, Relaxed);
        let in_a_row = self.failures_in_a_row.fetch_add(1, Relaxed).saturating_add(1);
        if ejection.failures == 0 || in_a_row < ejection.failures || self.state() != UpstreamState::Up {
            return false;
        }
        let time = u64::try_from(ejection.time.0.as_millis()).unwrap_or(u64::MAX);
        self.ejected_until.store(now().saturating_add(time), Relaxed);
        let mut story = lock(&self.story);
        story.since = Some(Instant::now());
        story.why = format!("{in_a_row} failures in a row, the last one: {why}");
        true
    }

    /// Takes the outcome of a health check into account. The new state if it changes.
    pub(super) fn checked(&self, outcome: Result<(), String>, check: &HealthCheck) -> Option<UpstreamState> {
        let was_down = self.is_down.load(Relaxed);
        let mut story = lock(&self.story);
        if outcome.is_err() == was_down {
            story.contrary_checks = 0;
            return None;
        }
        story.contrary_checks += 1;
        let needed = if was_down { check.rise } else { check.fall };
        if NonZeroU32::new(story.contrary_checks).is_none_or(|checks| checks < needed) {
            return None;
        }
        *story = Story { since: Some(Instant::now()), why: outcome.err().unwrap_or_default(), contrary_checks: 0 };
        self.is_down.store(!was_down, Relaxed);
        if was_down {
            self.ejected_until.store(0, Relaxed);
            self.failures_in_a_row.store(0, Relaxed);
        }
        Some(self.state())
    }

    pub(super) fn view(&self) -> UpstreamView {
        let state = self.state();
        let story = lock(&self.story);
        let is_up = state == UpstreamState::Up;
        UpstreamView {
            address: self.to_string(),
            name: self.name.clone(),
            state,
            since: story.since.filter(|_| !is_up).map(|since| since.elapsed().as_secs()),
            why: (!is_up).then(|| story.why.clone()),
            active: self.open.load(Relaxed),
            connections: self.total.load(Relaxed),
            failures: self.failures.load(Relaxed),
            bytes_to: self.traffic.from_client.get(),
            bytes_from: self.traffic.to_client.get(),
        }
    }

    /// Of one that is not among the upstreams any more, if it still has connections.
    pub(super) fn view_as_gone(&self) -> Option<UpstreamView> {
        let view = UpstreamView { state: UpstreamState::Gone, since: None, why: None, ..self.view() };
        (view.active > 0).then_some(view)
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.port) {
            (address, Some(port)) => write!(f, "{}", SocketAddr::new(address, port.get())),
            (IpAddr::V4(address), None) => write!(f, "{address}:*"),
            (IpAddr::V6(address), None) => write!(f, "[{address}]:*"),
        }
    }
}

/// Chooses upstreams for one service.
#[derive(Debug, Default)]
pub(super) struct Balancer {
    next: AtomicUsize,
}

impl Balancer {
    /// The upstream for a client, out of those that `is_allowed`. One that is ejected only if there is no other.
    pub(super) fn choose<'a>(
        &self,
        balance: Balance,
        client: IpAddr,
        upstreams: &'a [Arc<Upstream>],
        is_allowed: impl Fn(&Arc<Upstream>) -> bool,
    ) -> Option<&'a Arc<Upstream>> {
        type Candidates<'a> = SmallVec<[&'a Arc<Upstream>; 16]>;
        let in_state = |state| -> Candidates<'a> {
            upstreams.iter().filter(|upstream| upstream.state() == state && is_allowed(upstream)).collect()
        };
        let mut candidates = in_state(UpstreamState::Up);
        if candidates.is_empty() {
            candidates = in_state(UpstreamState::Ejected);
        }
        match balance {
            _ if candidates.len() < 2 => candidates.first().copied(),
            Balance::RoundRobin => {
                let turn = self.next.fetch_add(1, Relaxed);
                Some(candidates[turn % candidates.len()])
            }
            Balance::LeastConnections => {
                // Round robin decides between those with equally many connections.
                let turn = self.next.fetch_add(1, Relaxed) % candidates.len();
                candidates.rotate_left(turn);
                candidates.into_iter().min_by_key(|upstream| upstream.open.load(Relaxed))
            }
            // Rendezvous hashing: when an upstream comes or goes, only its own clients move.
            Balance::SourceHash => candidates.into_iter().max_by_key(|upstream| score(client, upstream)),
        }
    }
}

/// How much a client belongs to an upstream: the same in every process and on every machine.
fn score(client: IpAddr, upstream: &Upstream) -> u64 {
    let port = upstream.port.map_or(0, NonZeroU16::get);
    let [client, address] = [client, upstream.address].map(|address| match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    });
    let words = [client, address].map(u128::to_le_bytes);
    let mut sum = mixed(u64::from(port));
    for half in words.as_flattened().chunks_exact(size_of::<u64>()) {
        let half = half.try_into().map_or(0, u64::from_le_bytes);
        sum = mixed(sum ^ half);
    }
    sum
}

/// The finalizer of splitmix64: each bit of the input changes half of the output's.
fn mixed(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, net::IpAddr, sync::Arc, thread::sleep, time::Duration};

    use super::{
        super::config::{Balance, Ejection, HealthCheck},
        Balancer, Upstream, UpstreamState,
    };
    use crate::human_duration::HumanDuration;

    const EJECTION: Ejection = Ejection { failures: 2, time: HumanDuration(Duration::from_millis(50)) };

    fn upstreams(count: u8) -> Vec<Arc<Upstream>> {
        (1..=count).map(|last| Arc::new(Upstream::new([198, 51, 100, last].into(), None, None))).collect()
    }

    fn client(number: u32) -> IpAddr {
        IpAddr::V4((0xc000_0200 + number).into())
    }

    fn chosen(balancer: &Balancer, balance: Balance, number: u32, upstreams: &[Arc<Upstream>]) -> String {
        balancer.choose(balance, client(number), upstreams, |_| true).unwrap().to_string()
    }

    #[test]
    fn round_robin_takes_turns() {
        let (balancer, upstreams) = (Balancer::default(), upstreams(3));
        let six: Vec<String> = (0..6).map(|_| chosen(&balancer, Balance::RoundRobin, 0, &upstreams)).collect();
        assert_eq!(six[..3], six[3..]);
        assert!(six[0] != six[1] && six[1] != six[2] && six[2] != six[0]);
        upstreams[1].is_down.store(true, super::Relaxed);
        let mut counts = HashMap::new();
        for _ in 0..10 {
            *counts.entry(chosen(&balancer, Balance::RoundRobin, 0, &upstreams)).or_insert(0) += 1;
        }
        assert_eq!(counts.into_values().collect::<Vec<_>>(), [5, 5]);
    }

    #[test]
    fn least_connections_fills_up() {
        let (balancer, upstreams) = (Balancer::default(), upstreams(3));
        upstreams[0].opened();
        upstreams[0].opened();
        upstreams[2].opened();
        for _ in 0..6 {
            let found = balancer.choose(Balance::LeastConnections, client(0), &upstreams, |_| true).unwrap();
            found.opened();
        }
        assert_eq!(upstreams.iter().map(|it| it.view().active).collect::<Vec<_>>(), [3, 3, 3]);
        upstreams[1].closed();
        assert_eq!(chosen(&balancer, Balance::LeastConnections, 0, &upstreams), "198.51.100.2:*");
    }

    #[test]
    fn source_hash_moves_only_the_clients_of_who_goes() {
        let (balancer, upstreams) = (Balancer::default(), upstreams(5));
        let all = || (0..1000).map(|number| chosen(&balancer, Balance::SourceHash, number, &upstreams)).collect();
        let before: Vec<String> = all();
        let again: Vec<String> = all();
        assert_eq!(before, again);
        for upstream in &upstreams {
            let share = before.iter().filter(|it| **it == upstream.to_string()).count();
            assert!((140..260).contains(&share), "{upstream} has {share} of 1000 clients");
        }
        upstreams[3].is_down.store(true, super::Relaxed);
        let after: Vec<String> = all();
        for (before, after) in before.iter().zip(&after) {
            assert!(before == after || *before == upstreams[3].to_string());
        }
        // Numbers that must not change: several daemons, and later versions, agree on them.
        upstreams[3].is_down.store(false, super::Relaxed);
        assert_eq!(before[..3], ["198.51.100.1:*", "198.51.100.5:*", "198.51.100.2:*"]);
    }

    #[test]
    fn failures_in_a_row_eject_for_a_while() {
        let (balancer, upstreams) = (Balancer::default(), upstreams(2));
        assert!(!upstreams[0].failed(&"refused", EJECTION));
        upstreams[0].succeeded();
        assert!(!upstreams[0].failed(&"refused", EJECTION));
        assert!(upstreams[0].failed(&"refused", EJECTION));
        let view = upstreams[0].view();
        assert_eq!(view.state, UpstreamState::Ejected);
        assert_eq!(view.why.unwrap(), "2 failures in a row, the last one: refused");
        for _ in 0..4 {
            assert_eq!(chosen(&balancer, Balance::RoundRobin, 0, &upstreams), "198.51.100.2:*");
        }
        // Better one that is ejected than none.
        let only = balancer.choose(Balance::RoundRobin, client(0), &upstreams, |it| it.address == upstreams[0].address);
        assert_eq!(only.unwrap().to_string(), "198.51.100.1:*");
        sleep(Duration::from_millis(60));
        assert_eq!(upstreams[0].state(), UpstreamState::Up);
        assert!(upstreams[0].failed(&"refused", EJECTION), "the next failure ejects again");
        assert!((0..100).all(|_| !upstreams[1].failed(&"refused", Ejection { failures: 0, ..EJECTION })));
    }

    #[test]
    fn checks_count_in_a_row() {
        let upstream = Upstream::new([198, 51, 100, 1].into(), None, None);
        let check = HealthCheck::default();
        let bad = || upstream.checked(Err("refused".to_owned()), &check);
        let good = || upstream.checked(Ok(()), &check);
        assert_eq!([bad(), bad(), good(), bad(), bad()], [None; 5]);
        assert_eq!(bad(), Some(UpstreamState::Down));
        assert_eq!(upstream.view().why.unwrap(), "refused");
        assert_eq!([bad(), good(), bad(), good()], [None; 4]);
        assert_eq!(good(), Some(UpstreamState::Up));
        assert_eq!(upstream.view().why, None);
    }
}
