//! Tests of the hold on the kernel: transitions, routes and repairs over a simulated kernel.

use std::collections::BTreeSet;

use crate::{
    engine::{
        Progress,
        tests::fixtures::{Fixture, adding, removing, rule},
        tests::simulated::open,
    },
    rules::{Change, Origin, Prefix},
};

impl Fixture {
    async fn try_to_change(&mut self, change: Change) -> anyhow::Result<()> {
        let Self { desired, kernel, services, .. } = self;
        let transition = desired.begin(change).unwrap();
        let done = kernel.activate(desired, services, &transition, &Progress::default()).await;
        if done.is_ok() {
            desired.finish(transition);
        } else {
            desired.roll_back(transition);
            kernel.roll_back(desired);
        }
        done
    }

    async fn change(&mut self, change: Change) {
        self.try_to_change(change).await.unwrap();
    }

    /// What the simulated kernel steers, and what is local there.
    fn held(&self) -> (Vec<Prefix>, BTreeSet<Prefix>) {
        let world = open(&self.world);
        (world.rules.keys().copied().collect(), world.routes.clone())
    }
}

fn prefixes(texts: &[&str]) -> BTreeSet<Prefix> {
    texts.iter().map(|it| it.parse().unwrap()).collect()
}

#[tokio::test]
async fn a_connection_keeps_its_route_when_its_prefix_goes() {
    let mut it = Fixture::new().await;
    let rules = [rule("192.0.2.0/24", "80", Origin::Added), rule("198.51.100.0/24", "80", Origin::Added)];
    it.change(adding(&it.desired, &rules)).await;
    assert_eq!(it.held().1, prefixes(&["192.0.2.0/24", "198.51.100.0/24"]));

    let patches = it.desired.patches();
    it.change(removing(&it.desired, "192.0.2.0/24")).await;
    assert_eq!(it.desired.patches(), patches + 1);
    let address: Prefix = "192.0.2.5/32".parse().unwrap();
    assert_eq!(it.held(), (vec![rules[1].prefix], prefixes(&["192.0.2.5/32", "198.51.100.0/24"])));
    assert_eq!(it.kernel.draining(), [address]);
    assert!(it.kernel.covers(&address));
}

#[tokio::test]
async fn many_prefixes_are_compared_as_one_by_one() {
    let mut it = Fixture::new().await;
    let many: Vec<_> = (0..=20_u32).flat_map(|high| (0..=255_u32).map(move |low| (high, low))).collect();
    let rules: Vec<_> = many
        .iter()
        .map(|(high, low)| rule(&format!("2001:db8:{high:x}:{low:x}::/64"), "80", Origin::Applied))
        .collect();
    it.change(adding(&it.desired, &rules)).await;
    assert_eq!(it.held().0.len(), many.len());
    // All 256 of each are one block.
    assert_eq!(it.held().1.iter().filter(|it| it.len() == 56).count(), 21);
    it.change(removing(&it.desired, "2001:db8:3:7::/64")).await;
    assert!(!it.kernel.covers(&"2001:db8:3:7::/64".parse().unwrap()));
    assert!(it.kernel.covers(&"2001:db8:3:8::/64".parse().unwrap()));
}

#[tokio::test]
async fn a_failure_is_broken_until_it_is_repaired() {
    let mut it = Fixture::new().await;
    it.change(adding(&it.desired, &[rule("192.0.2.0/24", "80", Origin::Added)])).await;
    let (before, generation) = (it.held(), it.kernel.generation());
    open(&it.world).fails = Some(1);
    let change = adding(&it.desired, &[rule("198.51.100.0/24", "80", Origin::Added)]);
    it.try_to_change(change).await.unwrap_err();
    it.kernel.repair(&it.desired, &it.services).await;
    assert!(it.kernel.broken().is_some() && !it.kernel.is_repair_due());
    assert_eq!(it.kernel.unsteered(&"192.0.2.0/24".parse().unwrap()).as_ref(), it.kernel.broken());

    open(&it.world).fails = None;
    it.kernel.hurry();
    assert!(it.kernel.is_repair_due());
    it.kernel.repair(&it.desired, &it.services).await;
    assert_eq!((it.held(), it.kernel.broken()), (before, None));
    assert!(it.kernel.generation() > generation);
}

#[tokio::test]
async fn what_others_remove_is_drift_and_is_reconciled() {
    let mut it = Fixture::new().await;
    it.change(adding(&it.desired, &[rule("192.0.2.0/24", "80", Origin::Added)])).await;
    let before = it.held();
    open(&it.world).rules.clear();
    it.kernel.reconcile(&it.desired, &it.services, false).await;
    assert_eq!((it.kernel.drift(false).len(), it.kernel.repairs().len()), (1, 0));
    assert!(it.kernel.lost_steering().is_some());
    it.kernel.reconcile(&it.desired, &it.services, true).await;
    assert_eq!((it.held(), it.kernel.lost_steering()), (before.clone(), None));
    assert_eq!(it.kernel.repairs()[0].times, 1);

    open(&it.world).routes.clear();
    it.kernel.look_at_once();
    it.kernel.suspect_routes();
    it.kernel.reconcile(&it.desired, &it.services, true).await;
    assert_eq!(it.held(), before);
}
