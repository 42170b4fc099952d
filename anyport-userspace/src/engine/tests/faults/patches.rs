//! How often a command changes the rules: once forward, and once back where it fails.

use super::{AddPrefixes, Apply, Arc, FleetState, HandlerKind, IS_CONNECTED, Scene, ServiceConfig, in_namespace, open};
use crate::{
    api::{DrainRequest, Problem, RemovePrefixes, Undrain},
    rules::ServiceName,
};

impl Scene {
    /// How often the rules are changed by what this does.
    async fn patches<T>(&mut self, command: impl AsyncFnOnce(&mut super::Engine) -> Result<T, Problem>) -> (bool, u64) {
        let before = self.engine().desired.patches();
        let is_done = command(self.engine()).await.is_ok();
        (is_done, self.engine().desired.patches() - before)
    }

    fn services_of_rules(&self) -> Vec<ServiceName> {
        let world = open(&self.world);
        world.rules.values().flatten().map(|(_, terms)| terms.service.clone()).collect()
    }
}

fn added(prefix: &str) -> AddPrefixes {
    serde_json::from_str(&format!(
        "{{\"prefixes\": [\"{prefix}\"], \"protocol\": \"tcp\", \"ports\": \"80\", \"force\": true}}"
    ))
    .unwrap()
}

fn removed(prefix: &str) -> RemovePrefixes {
    serde_json::from_str(&format!("{{\"prefixes\": [\"{prefix}\"]}}")).unwrap()
}

#[test]
fn a_command_changes_the_rules_once_forward_and_once_back() {
    in_namespace(async {
        let mut scene = Box::pin(Scene::new(1)).await;
        assert_eq!(scene.patches(async |it| it.add_prefixes(added("192.0.2.4/30")).await).await, (true, 1));
        assert_eq!(scene.patches(async |it| it.add_prefixes(added("192.0.2.32/30")).await).await, (true, 1));

        // What is drained is read as refused by each plan from now on, and the rules stay as they are.
        let request = DrainRequest { service: None, prefixes: Vec::new(), wait: 0 };
        assert_eq!(scene.patches(async |it| it.drain(request).await).await, (true, 0));
        assert!(scene.services_of_rules().iter().all(|it| *it == ServiceName::drained()));

        // Three plans in one command: refuse, then without the prefix, and what is drained in each.
        IS_CONNECTED.set(true);
        assert_eq!(scene.patches(async |it| it.remove_prefixes(removed("192.0.2.4/30")).await).await, (true, 1));
        assert_eq!(scene.engine().kernel.draining().len(), 1);
        assert_eq!(scene.services_of_rules(), [ServiceName::drained()]);
        let request = Undrain { service: None, prefixes: Vec::new() };
        assert_eq!(scene.patches(async |it| it.undrain(request).await).await, (true, 0));
        assert_eq!(scene.services_of_rules(), [ServiceName::default_service()]);

        let apply = |dry_run| Apply { dry_run, confirm: None, prune: false, force: true };
        let text = "192.0.2.8/30 tcp 80\n";
        assert_eq!(scene.patches(async |it| it.apply(text.into(), &apply(true)).await).await, (true, 0));
        assert_eq!(scene.patches(async |it| it.apply(text.into(), &apply(false)).await).await, (true, 1));
        let state = FleetState { ring: "main".into(), sequence: 1, seen: 1, ..FleetState::default() };
        let set = Arc::from("192.0.2.12/30 tcp 80\n");
        assert_eq!(scene.patches(async |it| it.take_set(set, None, state).await).await, (true, 1));
        let service = ServiceConfig::new("one".parse().unwrap(), HandlerKind::Discard);
        assert_eq!(scene.patches(async |it| it.add_service(service).await).await, (true, 0));

        // What is not confirmed goes back once, and gives back the numbers of its own rules only.
        let numbers = |scene: &Scene| open(&scene.world).rules.values().flatten().map(|it| it.0).collect::<Vec<_>>();
        let before = numbers(&scene);
        let options = Apply { confirm: Some(60), ..apply(false) };
        let text = "192.0.2.8/30 tcp 80\n192.0.2.16/30 tcp 80\n";
        assert_eq!(scene.patches(async |it| it.apply(text.into(), &options).await).await, (true, 1));
        let applied = numbers(&scene);
        scene.time_passes();
        let back = async |it: &mut super::Engine| {
            it.refresh().await;
            Ok::<_, Problem>(())
        };
        assert_eq!(scene.patches(back).await, (true, 1));
        assert_eq!(numbers(&scene), before);
        for _ in 0..40 {
            let text = "192.0.2.8/30 tcp 80\n192.0.2.20/30 tcp 80\n";
            assert_eq!(scene.patches(async |it| it.apply(text.into(), &apply(false)).await).await, (true, 1));
            let text = "192.0.2.8/30 tcp 80\n";
            assert_eq!(scene.patches(async |it| it.apply(text.into(), &apply(false)).await).await, (true, 1));
            scene.expect_equal("numbers go round");
        }
        assert!(applied.len() > before.len());

        open(&scene.world).fails = Some(1);
        assert_eq!(scene.patches(async |it| it.add_prefixes(added("192.0.2.4/30")).await).await, (false, 2));
        assert_eq!(scene.patches(async |it| it.remove_prefixes(removed("192.0.2.32/30")).await).await, (false, 2));
        scene.converge().await;
    });
}
