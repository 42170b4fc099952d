//! Tests of the services at work: opening, closing and registered sockets.

use crate::{
    engine::{
        desired::DRAINED_SLOT,
        tests::fixtures::{Fixture, adding, rule},
    },
    rules::{Origin, ServiceName},
    service::{HandlerKind, ServiceConfig},
};

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

impl Fixture {
    fn open(&mut self, text: &str, handler: HandlerKind) {
        let Self { services, desired, .. } = self;
        let fallback = (handler == HandlerKind::Registered).then(|| name("web"));
        let config = ServiceConfig { fallback, ..ServiceConfig::new(name(text), handler) };
        services.open(config, Origin::Added, || desired.take_slot()).unwrap();
    }
}

#[tokio::test]
async fn a_fallback_stands_in_for_sockets_that_nobody_registered() {
    let mut it = Fixture::new().await;
    it.open("web", HandlerKind::Discard);
    it.open("app", HandlerKind::Registered);
    let [web, app] = ["web", "app"].map(|text| it.services.get(&name(text)).unwrap());
    let cookies = |running| it.services.groups_of(running).map(|group| group.map(|it| it.cookie));
    assert_eq!(cookies(app), cookies(web));
    assert!(cookies(web)[0].is_some());
    assert!(it.services.sockets_of(app).is_empty());
    // That is worth a word only once rules steer there.
    assert!(it.services.lost_sockets(it.desired.rules()).is_empty());
}

#[tokio::test]
async fn a_plan_has_what_refuses_besides_the_services() {
    let mut it = Fixture::new().await;
    it.open("web", HandlerKind::Discard);
    let sockets = it.services.sockets();
    assert_eq!(sockets.iter().map(|it| it.slot).collect::<Vec<_>>(), [0, DRAINED_SLOT, 1]);
    assert!(sockets[..2].iter().all(|it| it.groups.iter().all(Option::is_none)));
}

#[tokio::test]
async fn a_service_is_taken_out_and_put_back() {
    let mut it = Fixture::new().await;
    it.open("web", HandlerKind::Discard);
    let problem = it.services.expect(&name("app")).unwrap_err();
    assert_eq!(problem.hint, "the services are: web; add-service makes a new one");
    assert_eq!(it.services.change_origin(&name("web"), Origin::Config), Some(Origin::Added));
    let taken = it.services.take(&name("web")).unwrap();
    assert!(it.services.expect(&name("web")).is_err() && it.services.iter().len() == 0);
    it.services.put_back([(name("web"), taken)]);
    assert_eq!(it.services.configs_of(Origin::Config).len(), 1);
    assert!(it.services.configs_of(Origin::Added).is_empty());
}

#[tokio::test]
async fn a_service_without_sockets_is_named_once_rules_steer_there() {
    let mut it = Fixture::new().await;
    it.open("web", HandlerKind::Discard);
    it.open("app", HandlerKind::Registered);
    let mut rule = rule("192.0.2.0/24", "80", Origin::Added);
    std::sync::Arc::make_mut(&mut rule.terms).service = name("app");
    let change = adding(&it.desired, &[rule]);
    it.desired.begin(change).unwrap();
    assert_eq!(
        it.services.lost_sockets(it.desired.rules()),
        ["service app has no live socket: nobody has registered one; web stands in"]
    );
    assert!(!it.services.forget_registered(&name("app")));
}
