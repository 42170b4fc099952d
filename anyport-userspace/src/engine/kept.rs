//! What is kept for a daemon that comes later: rules and services of this node, the set of the fleet, counters, drains and registered
//! sockets.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use anyport_common::maps::Counters;
use tracing::warn;

use super::{
    desired::{Desired, Drains},
    kernel::Kernel,
    services::Services,
};
use crate::{
    register::KeptSocket,
    rules::{Change, Origin, Prefix, PrefixRules},
    store::{self, FleetState, KeptCounters, State, Store},
};

/// How often the counters are kept, for the case that this daemon is killed.
const COUNTERS_INTERVAL: Duration = Duration::from_mins(1);

/// Whether a change is there after a restart.
#[derive(Debug)]
pub(super) enum Keep {
    OnDisk,
    /// So that what is kept of the applied rules are these lines, if there are any.
    AppliedOnDisk(Option<String>),
    /// The set of the fleet, with what it belongs to.
    SetOnDisk {
        state: FleetState,
        text: Arc<str>,
    },
    /// Not yet: it may be taken back.
    InMemory,
}

/// What is on the disk and is not read by a later daemon yet.
#[derive(Debug)]
#[must_use = "it is to be activated or discarded"]
pub(super) struct Written {
    file: store::Written,
    /// Where this node stands in its fleet then, if that changes.
    fleet: Option<FleetState>,
}

/// The state directory, and what is known of it.
#[derive(Debug)]
pub(super) struct Kept {
    store: Store,
    /// When the counters were kept last; nothing while they do not go on from those of an earlier daemon yet.
    counters_at: Option<Instant>,
    /// Why the state directory could not be written, at the last attempt.
    failure: Option<String>,
    /// Where this node stands in its fleet.
    fleet: FleetState,
    /// Whether the active set has each of its rules once, and nothing else.
    is_fleet_plain: bool,
}

impl Kept {
    /// Continues from a state directory that has been read.
    pub(super) fn new(store: Store, fleet: FleetState) -> Self {
        // Until a set is read that says so, it is not plain.
        Self { store, counters_at: None, failure: None, fleet, is_fleet_plain: false }
    }

    /// Writes what has to be there after a restart of rules and services as they are after this change, if it is to be kept.
    pub(super) fn write(
        &self,
        keep: Keep,
        desired: &Desired,
        services: &Services,
        change: &Change,
    ) -> anyhow::Result<Option<Written>> {
        match keep {
            Keep::InMemory => Ok(None),
            Keep::OnDisk => self.write_state(desired, services, change, None).map(Some),
            Keep::AppliedOnDisk(lines) => self.write_state(desired, services, change, lines).map(Some),
            Keep::SetOnDisk { state, text } => {
                let file = self.store.write_fleet(&state, Some(&text))?;
                Ok(Some(Written { file, fleet: Some(state) }))
            }
        }
    }

    /// The rules that were applied are written again only if they changed; `lines` may say the same as they do.
    fn write_state(
        &self,
        desired: &Desired,
        services: &Services,
        change: &Change,
        lines: Option<String>,
    ) -> anyhow::Result<Written> {
        let is_applied =
            |(_, rules): &(Prefix, PrefixRules)| rules.iter().any(|it| it.origins.contains(Origin::Applied));
        let is_written = change.removed.iter().chain(&change.added).any(is_applied);
        let applied = is_written.then(|| lines.unwrap_or_else(|| desired.applied_lines()));
        let state = State {
            services: services.configs_of(Origin::Added),
            rules: desired.added_by_hand(),
            applied_services: services.configs_of(Origin::Applied),
            ..State::default()
        };
        Ok(Written { file: self.store.write(&state, applied.as_deref())?, fleet: None })
    }

    /// What was written is what a later daemon starts with.
    pub(super) fn activate(&mut self, Written { file, fleet }: Written) -> anyhow::Result<()> {
        self.store.activate(file)?;
        if let Some(fleet) = fleet {
            self.fleet = fleet;
        }
        Ok(())
    }

    /// What was written is not to be.
    pub(super) fn discard(&self, Written { file, .. }: Written) {
        self.store.discard(file);
    }

    /// Keeps where this node stands in its fleet, and the set if that is another one.
    pub(super) fn save_fleet(&mut self, state: FleetState, text: Option<&str>) -> anyhow::Result<()> {
        self.store.save_fleet(&state, text)?;
        self.fleet = state;
        Ok(())
    }

    /// The text of the fleet's set on the disk, if there is one.
    pub(super) fn fleet_set(&self) -> anyhow::Result<Option<String>> {
        self.store.fleet_set()
    }

    /// Where this node stands in its fleet.
    pub(super) fn fleet(&self) -> &FleetState {
        &self.fleet
    }

    /// Whether the active set has each of its rules once, and nothing else.
    pub(super) fn is_fleet_plain(&self) -> bool {
        self.is_fleet_plain
    }

    /// Notes whether that is so.
    pub(super) fn note_fleet_plain(&mut self, is_plain: bool) {
        self.is_fleet_plain = is_plain;
    }

    /// Keeps what is drained.
    pub(super) fn save_drains(&self, drains: &Drains) -> anyhow::Result<()> {
        self.store.save_drains(&drains.kept())
    }

    /// Whether the counters have not been kept for long.
    pub(super) fn are_counters_due(&self) -> bool {
        self.counters_at.is_some_and(|at| at.elapsed() >= COUNTERS_INTERVAL)
    }

    /// Keeps what was counted, unless what an earlier daemon counted is not part of it yet. What does not go is a complaint, and no
    /// reason to do anything else: the rules are there.
    pub(super) fn save_counters(&mut self, desired: &Desired, services: &Services, kernel: &Kernel) {
        if self.counters_at.is_none() {
            return;
        }
        self.counters_at = Some(Instant::now());
        let saved = self.try_save_counters(desired, services, kernel).context("keep the counters");
        self.note(saved);
    }

    /// Sees whether the state directory can be written, before something is to be kept.
    pub(super) fn try_out(&mut self) {
        let tried = self.store.try_out();
        self.note(tried);
    }

    fn note(&mut self, outcome: anyhow::Result<()>) {
        let failure = outcome.err().map(|error| format!("{error:#}"));
        if let Some(failure) = &failure
            && self.failure.is_none()
        {
            warn!("the state directory can't be written: {failure}");
        }
        self.failure = failure;
    }

    /// What does not work as it should.
    pub(super) fn complaint(&self) -> Option<String> {
        let failure = self.failure.as_ref()?;
        Some(format!("the state directory can't be written, so changes are refused and counts will be lost: {failure}"))
    }

    fn try_save_counters(&self, desired: &Desired, services: &Services, kernel: &Kernel) -> anyhow::Result<()> {
        let counters = kernel.counters()?;
        let counted = desired.rules().iter().map(|rule| (rule.prefix, Arc::clone(rule.terms), counters(rule.number)));
        let counted = counted.filter(|(_, _, it)| *it != Counters::default());
        self.store.save_counters(counted, services.past().counters())
    }

    /// Has the kernel go on with what an earlier daemon counted for rules that are still there. Those that are not leave it.
    pub(super) fn restore_counters(
        &mut self,
        desired: &Desired,
        services: &mut Services,
        kernel: &mut Kernel,
    ) -> anyhow::Result<()> {
        let KeptCounters { rules, services: left } = self.store.counters();
        let past = services.past_mut();
        for (name, counters) in &left {
            past.leave_rule(name, counters);
        }
        let mut counted = Vec::new();
        for (prefix, terms, counters) in rules {
            let mut of_prefix = desired.rules().of_prefix(&prefix).into_iter().flat_map(|it| it.numbered(prefix));
            match of_prefix.find(|rule| **rule.terms == *terms) {
                Some(rule) => counted.push((rule.number, counters)),
                None => past.leave_rule(&terms.service, &counters),
            }
        }
        kernel.restore_counters(&counted)?;
        self.counters_at = Some(Instant::now());
        Ok(())
    }

    /// The sockets that were registered with an earlier daemon since this boot.
    pub(super) fn registered(&self, boot: &str) -> Vec<KeptSocket> {
        self.store.registered(boot)
    }

    /// Keeps the sockets that are registered.
    pub(super) fn save_registered(&self, boot: &str, sockets: Vec<KeptSocket>) -> anyhow::Result<()> {
        self.store.save_registered(boot, sockets)
    }
}

#[cfg(test)]
mod tests {
    use super::{Keep, Kept};
    use crate::{
        engine::tests::fixtures::{Fixture, adding, rule},
        rules::{Change, Origin},
        store::{Files as _, FleetState, State, Store, tests::simulated::Simulated as Disk},
    };

    fn open(disk: &Disk) -> (Kept, State) {
        let (store, state) = Store::of(Box::new(disk.clone())).unwrap();
        (Kept::new(store, FleetState::default()), state)
    }

    #[tokio::test]
    async fn what_was_added_and_applied_is_kept_and_configuration_is_not() {
        let (disk, mut it) = (Disk::default(), Fixture::new().await);
        let (mut kept, _) = open(&disk);
        let rules = [
            rule("192.0.2.1", "80", Origin::Added),
            rule("192.0.2.2", "80", Origin::Applied),
            rule("192.0.2.3", "80", Origin::Config),
        ];
        let change = adding(&it.desired, &rules);
        let transition = it.desired.begin(change).unwrap();
        let write = |kept: &Kept, keep| kept.write(keep, &it.desired, &it.services, transition.change()).unwrap();
        assert!(write(&kept, Keep::InMemory).is_none());
        let discarded = write(&kept, Keep::OnDisk).unwrap();
        kept.discard(discarded);
        assert!(disk.names().unwrap().is_empty());
        let written = write(&kept, Keep::OnDisk).unwrap();
        assert!(!disk.names().unwrap().contains(&"state.json".to_owned()));
        kept.activate(written).unwrap();
        let (_, state) = open(&disk);
        let prefixes = |rules: Vec<crate::rules::Rule>| rules.iter().map(|it| it.prefix).collect::<Vec<_>>();
        assert_eq!(
            (prefixes(state.rules), prefixes(state.applied_rules)),
            (vec![rules[0].prefix], vec![rules[1].prefix])
        );
    }

    #[tokio::test]
    async fn the_set_of_the_fleet_is_kept_with_where_the_node_stands() {
        let (disk, it) = (Disk::default(), Fixture::new().await);
        let (mut kept, _) = open(&disk);
        let state = FleetState { ring: "main".into(), sequence: 7, ..FleetState::default() };
        let keep = Keep::SetOnDisk { state: state.clone(), text: "192.0.2.4/30 tcp 80\n".into() };
        let written = kept.write(keep, &it.desired, &it.services, &Change::default()).unwrap().unwrap();
        assert_eq!(*kept.fleet(), FleetState::default());
        kept.activate(written).unwrap();
        assert_eq!(*kept.fleet(), state);
        let fleet = open(&disk).1.fleet.unwrap();
        assert_eq!((fleet.state, fleet.rules.len()), (state.clone(), 1));
        // A disk that does not write leaves what is known as it was.
        disk.fail_after(Some(0));
        assert!(kept.save_fleet(FleetState { sequence: 8, ..state.clone() }, None).is_err());
        assert_eq!(*kept.fleet(), state);
    }

    #[tokio::test]
    async fn counters_are_kept_only_once_earlier_ones_are_part_of_them() {
        let (disk, mut it) = (Disk::default(), Fixture::new().await);
        let (mut kept, _) = open(&disk);
        kept.save_counters(&it.desired, &it.services, &it.kernel);
        assert!(kept.counters_at.is_none() && disk.names().unwrap().is_empty());
        kept.restore_counters(&it.desired, &mut it.services, &mut it.kernel).unwrap();
        assert!(kept.counters_at.is_some() && !kept.are_counters_due());
        // A disk that does not write is told of, until it does again.
        disk.fail_after(Some(0));
        kept.save_counters(&it.desired, &it.services, &it.kernel);
        assert!(kept.complaint().unwrap().contains("can't be written"));
        disk.fail_after(None);
        kept.save_counters(&it.desired, &it.services, &it.kernel);
        assert_eq!(kept.complaint(), None);
    }
}
