//! Services of one name, one after the other.
//!
//! A service whose settings change is replaced by another one of the same name. What is known of upstreams that stay is
//! handed on, and connections and flows that are there learn of upstreams that do not.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::{Forwarder, udp::Shared};
use crate::service::lock;

/// How often an upstream of any service has left so far.
static DEPARTURES: AtomicU64 = AtomicU64::new(0);

/// How often an upstream has become down, or was taken out, in this process.
pub(in crate::service) fn departures() -> u64 {
    DEPARTURES.load(Relaxed)
}

/// Has connections look whether their upstream is still there.
pub(super) fn note_departure() {
    DEPARTURES.fetch_add(1, Relaxed);
}

/// By the service's name.
#[derive(Clone, Debug, Default)]
pub struct Lineages(Arc<Mutex<BTreeMap<String, Arc<Lineage>>>>);

impl Lineages {
    /// Of the services of a name. Those that have ended are forgotten.
    pub(super) fn of(&self, name: &str) -> Arc<Lineage> {
        let mut all = lock(&self.0);
        all.retain(|_, lineage| lineage.current().is_some());
        Arc::clone(all.entry(name.to_owned()).or_default())
    }
}

/// The services of one name.
#[derive(Debug, Default)]
pub(super) struct Lineage {
    /// The latest last.
    forwarders: Mutex<Vec<Weak<Forwarder>>>,
    /// The flows of each of their sockets.
    flows: Mutex<Vec<Weak<Shared>>>,
}

impl Lineage {
    /// The latest one that is there.
    pub(super) fn current(&self) -> Option<Arc<Forwarder>> {
        lock(&self.forwarders).iter().rev().find_map(Weak::upgrade)
    }

    pub(super) fn add(&self, forwarder: &Arc<Forwarder>) {
        add(&mut lock(&self.forwarders), forwarder);
    }

    pub(super) fn add_flows(&self, flows: &Arc<Shared>) {
        add(&mut lock(&self.flows), flows);
    }

    /// The flows of all that are there.
    pub(super) fn flows(&self) -> Vec<Arc<Shared>> {
        lock(&self.flows).iter().filter_map(Weak::upgrade).collect()
    }
}

fn add<T>(all: &mut Vec<Weak<T>>, one: &Arc<T>) {
    all.retain(|it| it.strong_count() > 0);
    all.push(Arc::downgrade(one));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::{
        super::{Connected, Forwarder, UpstreamState, config::ForwardConfig},
        Lineages,
    };

    fn start(lineages: &Lineages, upstreams: &[&str], settings: &str) -> Arc<Forwarder> {
        let text = format!("{{\"name\":\"edge\",\"handler\":\"forward\",\"upstreams\":{upstreams:?}{settings}}}");
        let config: crate::service::ServiceConfig = serde_json::from_str(&text).unwrap();
        let config: ForwardConfig = *config.forward.unwrap();
        Forwarder::start("edge".to_owned(), config, Arc::new(|_, _, _| false), lineages)
    }

    fn shown(forwarder: &Forwarder) -> Vec<(String, UpstreamState, u64)> {
        forwarder.views().into_iter().map(|view| (view.address, view.state, view.active)).collect()
    }

    #[test]
    fn a_service_hands_on_what_it_knows() {
        const CHECKED: &str = r#","health-check":{"fall":1}"#;
        let lineages = Lineages::default();
        let first = start(&lineages, &["198.51.100.1:80", "198.51.100.2:80"], CHECKED);
        let [one, two] = [0, 1].map(|at| Arc::clone(&first.upstreams.load()[at]));
        let check = first.config.health_check.unwrap();
        assert!(one.checked(Err("refused".to_owned()), &check).is_some());
        let connections = [Connected::to(Arc::clone(&one)), Connected::to(Arc::clone(&two))];
        assert!(first.has_left(&one) && !first.has_left(&two), "one is down");

        let second = start(&lineages, &["198.51.100.3:80", "198.51.100.1:80"], CHECKED);
        assert!(Arc::ptr_eq(&first.current(), &second));
        assert!(Arc::ptr_eq(&second.upstreams.load()[1], &one));
        assert!(second.has_left(&two) && second.has_left(&one), "one was taken out, the other one is down");
        let expected = [("198.51.100.3:80", UpstreamState::Up, 0), ("198.51.100.1:80", UpstreamState::Down, 1)];
        let gone = ("198.51.100.2:80", UpstreamState::Gone, 1);
        let text = |(address, state, active): (&str, _, _)| (address.to_owned(), state, active);
        assert_eq!(shown(&second), [expected[0], expected[1], gone].map(text));
        drop(connections);
        assert_eq!(shown(&second).len(), 2);

        // One that is not looked at any more can't stay down.
        let third = start(&lineages, &["198.51.100.1:80"], "");
        assert_eq!(shown(&third), [text(("198.51.100.1:80", UpstreamState::Up, 0))]);
        assert!(Arc::ptr_eq(&first.current(), &third));
        // As if it had never been, such as after a change that was taken back.
        drop(third);
        assert!(Arc::ptr_eq(&first.current(), &second));
    }

    #[test]
    fn an_upstream_is_avoided_while_another_one_is_up() {
        let lineages = Lineages::default();
        let forwarder = start(&lineages, &["198.51.100.1:80", "198.51.100.2:80"], r#","ejection":{"failures":1}"#);
        let [one, two] = [0, 1].map(|at| Arc::clone(&forwarder.upstreams.load()[at]));
        assert!(!forwarder.avoids(&one));
        assert!(one.failed(&"silent", forwarder.config.ejection));
        assert!(forwarder.avoids(&one) && !forwarder.avoids(&two));
        assert!(two.failed(&"silent", forwarder.config.ejection));
        assert!(!forwarder.avoids(&one) && !forwarder.avoids(&two), "there is none to go to");
        // Its own answers say nothing of the others.
        one.answered(5);
        assert!(!forwarder.others_answer_since(&one, 5));
        two.answered(5);
        assert!(forwarder.others_answer_since(&one, 5) && !forwarder.others_answer_since(&one, 6));
    }

    #[test]
    fn connections_are_closed_where_that_is_wanted() {
        for (settings, closes) in [("", false), (r#","on-down":"close""#, true)] {
            let lineages = Lineages::default();
            let first = start(&lineages, &["198.51.100.1:80"], "");
            let upstream = Arc::clone(&first.upstreams.load()[0]);
            assert!(!first.closes(&upstream));
            let _second = start(&lineages, &["198.51.100.2:80"], settings);
            assert_eq!(first.closes(&upstream), closes, "as the service says that is there now");
        }
    }
}
