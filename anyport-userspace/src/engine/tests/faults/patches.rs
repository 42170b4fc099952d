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

    /// The problem that a command has on a disk on which everything fails after so many steps.
    async fn with_little_disk<T: std::fmt::Debug>(
        &mut self,
        steps: usize,
        command: impl AsyncFnOnce(&mut super::Engine) -> Result<T, Problem>,
    ) -> Problem {
        self.disk.fail_after(Some(steps));
        let problem = command(self.engine()).await.unwrap_err();
        self.disk.fail_after(None);
        problem
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

#[test]
fn a_disk_that_is_full_is_found_before_the_kernel_is_touched() {
    in_namespace(async {
        let mut scene = Box::pin(Scene::new(2)).await;
        let apply = Apply { dry_run: false, confirm: None, prune: false, force: true };
        scene.engine().add_prefixes(added("192.0.2.4/30")).await.unwrap();
        let kept = scene.kept();
        // Whatever would be asked of the kernel fails, and says so.
        open(&scene.world).fails = Some(1);
        for steps in 0..2 {
            let told = [
                scene.with_little_disk(steps, async |it| it.add_prefixes(added("192.0.2.32/30")).await).await,
                scene.with_little_disk(steps, async |it| it.remove_prefixes(removed("192.0.2.4/30")).await).await,
            ];
            assert!(scene.engine().degraded().is_empty());
            // With services that were put back, the kernel is repaired for safety's sake.
            let applied = async |it: &mut super::Engine| it.apply("192.0.2.8/30 tcp 80\n".into(), &apply).await;
            let told = told.into_iter().chain([scene.with_little_disk(steps, applied).await]);
            for problem in told {
                assert!(problem.error.contains("write the state file"), "{problem:?}");
            }
            open(&scene.world).fails = None;
            scene.converge().await;
            open(&scene.world).fails = Some(1);
        }
        open(&scene.world).fails = None;
        scene.expect_equal("after all that");
        assert_eq!(scene.kept(), kept);
    });
}
