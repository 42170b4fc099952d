//! Whatever fails, whenever it fails: what is reported as done is in the kernel, what is not done has changed nothing or is
//! said to be degraded, and when nothing fails any more all is as it should be.
//!
//! Back end, routes and disk are simulated, and fail at random: before, during or after an operation.
//! Others take things away, and the daemon is restarted or killed at random.

mod patches;
pub(in crate::engine) mod simulated;

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet, HashSet},
    env,
    fmt::Write as _,
    net::IpAddr,
    num::NonZeroUsize,
    process::Command,
    sync::{Arc, Mutex},
    thread,
    time::Instant,
};

use anyport_common::maps::SOCKETS_PER_SERVICE;
use nix::sched::{CloneFlags, unshare};
use tokio::runtime;

use self::simulated::{Numbered, Random, Shared, Simulated, SimulatedRoutes, World, open};
use super::fixtures::config;
use crate::{
    api::{AddPrefixes, Apply, Problem, RemovePrefixes},
    config::Config,
    engine::{
        Engine, Simulation,
        start::{Initial, initial},
    },
    fleet::delta::Delta,
    host::Host,
    rule_file::RuleFile,
    rules::{Origin, Prefix, RuleSpec},
    service::{HandlerKind, ServiceConfig, Workers},
    store::{FleetState, Store, tests::simulated::Simulated as Disk},
};

/// Steps in all, and how many daemons take them at the same time.
const STEPS: u64 = 100_000;
const SCENES: u64 = 4;

thread_local! {
    /// Whether there are connections.
    static IS_CONNECTED: Cell<bool> = const { Cell::new(false) };
}

#[expect(clippy::unnecessary_wraps, reason = "so it is in the real world")]
fn connected() -> anyhow::Result<HashSet<IpAddr>> {
    let all = ["192.0.2.5", "192.0.2.33", "2001:db8:0:7::7"].map(|it| it.parse().unwrap());
    Ok(all.into_iter().filter(|_| IS_CONNECTED.get()).collect())
}

#[expect(clippy::unnecessary_wraps, reason = "so it is in the real world")]
fn look() -> anyhow::Result<Host> {
    Ok(Host::default())
}

/// A daemon and its world.
struct Scene {
    world: Shared,
    disk: Disk,
    config: Config,
    workers: Workers,
    engine: Option<Engine>,
    random: Random,
    /// Whether others have taken something away since all was seen to be well.
    is_robbed: bool,
    /// The set of the fleet that this daemon has taken last.
    set_in_force: Option<String>,
    /// How often the rules had been changed when the command began.
    patches: u64,
    /// What was counted when that was seen last.
    counted: BTreeMap<String, u64>,
    done: u32,
    failed: u32,
}

impl Scene {
    async fn new(seed: u64) -> Self {
        let config = config("[fleet]\netcd = [\"http://127.0.0.1:1\"]\nring = \"main\"\nnode = \"n\"\n");
        let mut scene = Self {
            world: Arc::new(Mutex::new(World::new(seed))),
            disk: Disk::default(),
            config,
            workers: Workers::start(NonZeroUsize::MIN).unwrap(),
            engine: None,
            random: Random(seed),
            is_robbed: false,
            set_in_force: None,
            patches: 0,
            counted: BTreeMap::new(),
            done: 0,
            failed: 0,
        };
        scene.start().await;
        scene
    }

    /// Starts a daemon, which may take some attempts.
    async fn start(&mut self) {
        for attempt in 0.. {
            if attempt == 5 {
                self.calm();
            }
            assert!(attempt < 7, "the start fails though nothing else does");
            if let Ok(engine) = self.try_to_start().await {
                self.engine = Some(engine);
                break;
            }
        }
        self.is_robbed = false;
        self.set_in_force = None;
        self.counted.clear();
        self.expect_equal("after a start");
    }

    async fn try_to_start(&self) -> anyhow::Result<Engine> {
        let kept = Store::of(Box::new(self.disk.clone()))?;
        let routes = Arc::new(Mutex::new(SimulatedRoutes(Arc::clone(&self.world))));
        let simulation = Simulation {
            steering: Box::new(Simulated::new(&self.world)),
            routes,
            connected,
            look,
            peers: |_, _| Ok(Vec::new()),
        };
        let engine = Engine::simulated(&self.config, kept, simulation, self.workers.handles()).await?;
        // Nobody asks etcd here, which would be said to be silent.
        engine.fleet_board().into_iter().for_each(|board| board.heard(Instant::now()));
        Ok(engine)
    }

    fn calm(&mut self) {
        open(&self.world).fails = None;
        self.disk.fail_after(None);
    }

    fn trouble(&mut self) {
        open(&self.world).fails = [Some(4), Some(20), None][self.random.below(3)];
        let steps = self.random.below(40);
        self.disk.fail_after((steps < 12).then_some(steps));
    }

    fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().unwrap()
    }

    /// The differences between what the engine holds to be active and the world.
    fn difference(&self) -> Option<String> {
        let engine = self.engine.as_ref().unwrap();
        let world = open(&self.world);
        let mut rules: BTreeMap<Prefix, Vec<Numbered>> = BTreeMap::new();
        for rule in engine.desired.rules().iter() {
            rules.entry(rule.prefix).or_default().push((rule.number, RuleSpec::clone(rule.terms)));
        }
        let places = engine.services.iter().flat_map(|(_, running)| {
            let first = u32::from(running.slot()) * SOCKETS_PER_SERVICE;
            let groups = engine.services.groups_of(running).into_iter();
            (first..).zip(groups).filter_map(|(place, group)| Some((place, group?.cookie)))
        });
        let sockets: BTreeMap<u32, u64> = places.collect();
        let routes: BTreeSet<Prefix> = engine.kernel.blocks().collect();
        let numbers: BTreeSet<u32> = rules.values().flatten().map(|(number, _)| *number).collect();
        if numbers.len() != engine.desired.rules().len() {
            return Some(format!("two rules have the same number: {rules:?}"));
        }
        if rules != world.rules {
            return Some(format!("rules: {rules:?} in the engine, {:?} in the world", world.rules));
        }
        if sockets != world.sockets {
            return Some(format!("sockets: {sockets:?} in the engine, {:?} in the world", world.sockets));
        }
        if routes != world.routes {
            return Some(format!("routes: {routes:?} in the engine, {:?} in the world", world.routes));
        }
        (!world.is_attached).then(|| "nothing is attached".to_owned())
    }

    fn expect_equal(&self, when: &str) {
        if let Some(difference) = self.difference() {
            panic!("{when}: {difference}");
        }
    }

    /// The rules and services as texts.
    fn desired(&self) -> BTreeSet<String> {
        let engine = self.engine.as_ref().unwrap();
        let rules = engine.desired.rules().iter().map(|rule| rule.to_rule().to_string());
        rules
            .chain(engine.services.iter().map(|(_, it)| format!("{:?} {}", it.config(), it.origin().as_str())))
            .chain([format!("{:?}", engine.fleet_state())])
            .collect()
    }

    /// What a daemon would start with.
    fn kept(&self) -> BTreeSet<String> {
        let (_, state) = Store::of(Box::new(self.disk.clone())).unwrap();
        let Initial { services, rules, fleet_state } = initial(&self.config, state).unwrap();
        let rules = rules.iter().map(|rule| rule.to_rule().to_string()).collect::<Vec<_>>();
        rules
            .into_iter()
            .chain(services.iter().map(|(config, origin)| format!("{config:?} {}", origin.as_str())))
            .chain([format!("{fleet_state:?}")])
            .collect()
    }

    /// What a command has said must be true.
    fn judge<T>(&mut self, what: &str, before: &BTreeSet<String>, said: &Result<T, Problem>) {
        let is_confirmed = self.engine().unconfirmed.is_none();
        let degraded = self.engine().degraded();
        let patches = self.engine().desired.patches() - self.patches;
        match said {
            Ok(_) => {
                self.done += 1;
                assert!(patches <= 1, "{what} changed the rules {patches} times");
                if !self.is_robbed && degraded.is_empty() {
                    self.expect_equal(&format!("{what} says done"));
                }
                // That takes longer than the command.
                if is_confirmed && self.random.one_in(8) {
                    self.disk.fail_after(None);
                    assert_eq!(self.kept(), self.desired(), "{what} says done, kept and active");
                }
            }
            Err(problem) => {
                self.failed += 1;
                assert!(matches!(patches, 0 | 2), "{what} failed and changed the rules {patches} times");
                assert_eq!(self.desired(), *before, "{what} says failed: {problem}");
                if !self.is_robbed && degraded.is_empty() {
                    self.expect_equal(&format!("{what} says failed ({problem}) and nothing is degraded"));
                }
            }
        }
    }

    fn prefix(&mut self) -> Prefix {
        let number = self.random.below(12);
        let text = match self.random.below(4) {
            0 => format!("192.0.2.{}/30", number * 4),
            1 => format!("192.0.2.{number}/32"),
            2 => format!("2001:db8:0:{number:x}::/64"),
            _ => format!("2001:db8:0:{number:x}::7/128"),
        };
        text.parse().unwrap()
    }

    fn service(&mut self) -> crate::rules::ServiceName {
        ["default", "one", "two"][self.random.below(3)].parse().unwrap()
    }

    async fn command(&mut self) {
        let before = self.desired();
        self.patches = self.engine().desired.patches();
        let kind = self.random.below(12);
        match kind {
            0..=2 => {
                let prefixes = (0..=self.random.below(3)).map(|_| self.prefix()).collect();
                let (service, ports) =
                    (self.service(), ["80", "443", "1-65535"][self.random.below(3)].parse().unwrap());
                let request: AddPrefixes = AddPrefixes {
                    prefixes,
                    protocol: crate::rules::Protocol::Both,
                    ports,
                    except: crate::rules::PortSet::default(),
                    source: None,
                    service,
                    route: !self.random.one_in(8),
                    force: true,
                };
                let said = self.engine().add_prefixes(request).await;
                self.judge("add-prefix", &before, &said);
            }
            3..=4 => {
                let all: Vec<_> = self.engine().desired.rules().prefixes().map(|(prefix, _)| *prefix).collect();
                let Some(prefix) = self.random.one_of(&all) else { return };
                let request = RemovePrefixes {
                    prefixes: vec![prefix],
                    protocol: None,
                    ports: None,
                    except: None,
                    source: None,
                    service: None,
                };
                let said = self.engine().remove_prefixes(request).await;
                self.judge("remove-prefix", &before, &said);
            }
            5 if self.random.one_in(10) => {
                let name = ["one", "two"][self.random.below(2)].parse().unwrap();
                let said = self.engine().add_service(ServiceConfig::new(name, HandlerKind::Discard)).await;
                self.judge("add-service", &before, &said);
            }
            6 if self.random.one_in(10) => {
                let name = ["one", "two"][self.random.below(2)].parse().unwrap();
                let said = self.engine().remove_service(name).await;
                self.judge("remove-service", &before, &said);
            }
            7..=8 => {
                let mut lines = String::new();
                for _ in 0..self.random.below(6) {
                    let (prefix, service) = (self.prefix(), self.service());
                    let _ = writeln!(lines, "{prefix} both service={service}");
                }
                let confirm = self.random.one_in(3).then_some(10);
                let prune = self.random.one_in(3);
                let said = self.engine().apply(lines, &Apply { dry_run: false, confirm, prune, force: true }).await;
                self.judge("apply", &before, &said);
            }
            9..=10 => {
                let text = self.set();
                let sequence = self.engine().fleet_state().sequence + 1;
                let state = FleetState { ring: "main".into(), sequence, seen: sequence, ..FleetState::default() };
                let known = self.set_in_force.take().filter(|_| self.random.one_in(2));
                let edits = known.map(|it| Delta::between(&it, &text).apply(&it).unwrap().1);
                let said = self.engine().take_set(text.as_str().into(), edits, state).await;
                self.judge("a set of the fleet", &before, &said);
                if said.is_ok() {
                    self.expect_set(&text);
                    self.set_in_force = Some(text);
                }
            }
            _ => {
                let said = self.engine().confirm().await;
                self.judge("confirm", &before, &said);
            }
        }
    }

    /// The rules of the fleet are those of this set.
    fn expect_set(&mut self, text: &str) {
        let wanted = RuleFile::parse(text, Arc::new).unwrap().rules;
        let wanted: HashSet<(Prefix, RuleSpec)> =
            wanted.into_iter().map(|((it, terms), _)| (it, (*terms).clone())).collect();
        let of_fleet = self.engine().desired.rules().iter().filter(|it| it.origins.contains(Origin::Fleet));
        let found: Vec<_> = of_fleet.map(|it| (it.prefix, RuleSpec::clone(it.terms))).collect();
        assert_eq!(found.len(), wanted.len());
        assert!(found.iter().all(|it| wanted.contains(it)), "{found:?}\n{text}");
    }

    /// What a fleet may want, in either form, sometimes with services that rules of others steer to.
    fn set(&mut self) -> String {
        let count = self.random.below(6);
        let rules: Vec<_> = (0..count).map(|_| (self.prefix(), self.service())).collect();
        let mut text = String::new();
        if self.random.one_in(2) {
            for (prefix, service) in rules {
                let _ = writeln!(text, "{prefix} both service={service}");
            }
            return text;
        }
        let banner = self.random.below(2);
        let _ = write!(text, "[[service]]\nname = \"three\"\nhandler = \"discard\"\nbanner = \"{banner}\"\n");
        if self.random.one_in(4) {
            let _ = write!(text, "[[service]]\nname = \"default\"\nhandler = \"echo\"\n");
        }
        for (prefix, _) in rules {
            let _ = write!(text, "[[rule]]\nprefix = \"{prefix}\"\nprotocol = \"both\"\nservice = \"three\"\n");
        }
        text
    }

    /// All pauses are over, and so is the time for a confirmation.
    fn time_passes(&mut self) {
        let engine = self.engine();
        engine.kernel.hurry();
        if let Some(unconfirmed) = &mut engine.unconfirmed {
            unconfirmed.until = Instant::now();
        }
    }

    /// What is not said to be degraded after a check is well.
    async fn refresh(&mut self) {
        self.engine().kernel.look_at_once();
        self.engine().refresh().await;
        if self.engine().degraded().is_empty() {
            self.expect_equal("after a look, and nothing is degraded");
            self.is_robbed = false;
        }
    }

    async fn restart(&mut self) {
        let engine = self.engine.take().unwrap();
        match self.random.below(3) {
            // Each of them may fail in part, and what is left is the next one's business.
            0 => drop(engine.stop().await),
            1 => drop(engine.leave().await),
            _ => drop(engine),
        }
        self.start().await;
    }

    async fn step(&mut self) {
        open(&self.world).steer();
        self.expect_no_fall();
        match self.random.below(100) {
            0..=69 => self.command().await,
            70..=79 => {
                self.is_robbed = true;
                let is_route = open(&self.world).lose();
                if is_route {
                    self.engine().suspect_routes();
                }
            }
            80..=91 => {
                if self.random.one_in(2) {
                    self.time_passes();
                }
                IS_CONNECTED.set(self.random.one_in(2));
                self.refresh().await;
            }
            92..=97 => self.trouble(),
            98 if self.random.one_in(10) => self.restart().await,
            _ => self.converge().await,
        }
    }

    /// No sum falls, whatever becomes of rules and services.
    fn expect_no_fall(&mut self) {
        let mut rows: BTreeMap<String, u64> = BTreeMap::new();
        let observed = self.engine().observe(|it| {
            let row = format!("{} {} {}", it.rule.prefix, it.rule.terms.protocol, it.rule.terms.service);
            // Rules that are gone are those of the row, whichever of its rules they are told with.
            *rows.entry(row).or_insert(it.past.steered) += it.counters.steered;
        });
        let Ok(observed) = observed else {
            // A row may end and come back before the next time.
            self.counted.retain(|name, _| !name.contains('/'));
            return;
        };
        let services = observed.services.iter().map(|it| (it.view.name.to_string(), it.view.steered));
        let total = ("in all".to_owned(), observed.status.totals.steered);
        let now: BTreeMap<String, u64> = rows.into_iter().chain(services).chain([total]).collect();
        for (name, count) in &now {
            let before = self.counted.get(name).copied().unwrap_or_default();
            assert!(*count >= before, "{name}: {before} packets were steered, and then {count}");
        }
        // A row that ends begins at zero if it comes back, and a service goes on.
        self.counted.retain(|name, _| !name.contains('/'));
        self.counted.extend(now);
    }

    /// When nothing fails any more all is well soon.
    async fn converge(&mut self) {
        self.calm();
        for _ in 0..4 {
            self.time_passes();
            self.refresh().await;
        }
        let degraded = self.engine().degraded();
        assert!(degraded.is_empty(), "nothing fails any more: {degraded:?}");
        self.expect_equal("nothing fails any more");
        assert_eq!(self.kept(), self.desired(), "kept and active");
    }
}

/// Runs in a network namespace of its own, since the services' sockets are real.
fn in_namespace(work: impl Future<Output = ()>) {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; run this test as root");
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(up.success());
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work);
}

fn run(seed: u64, steps: u64) {
    in_namespace(async {
        let mut scene = Box::pin(Scene::new(seed)).await;
        for _ in 0..steps {
            scene.step().await;
        }
        scene.converge().await;
        let Scene { done, failed, .. } = scene;
        assert!(done > failed / 4 && failed > done / 50, "{done} commands done, {failed} failed");
    });
}

/// `ANYPORT_SEED` repeats a run, `ANYPORT_STEPS` makes it a longer one.
#[test]
fn whatever_fails_nothing_false_is_said() {
    let number = |name: &str| env::var(name).ok().and_then(|text| text.parse().ok());
    let steps = number("ANYPORT_STEPS").unwrap_or(STEPS);
    let seeds: Vec<u64> = number("ANYPORT_SEED").map_or_else(|| (1..=SCENES).collect(), |seed| vec![seed]);
    let scenes: Vec<_> = seeds
        .iter()
        .map(|seed| {
            (
                *seed,
                thread::spawn({
                    let seed = *seed;
                    move || run(seed, steps / SCENES)
                }),
            )
        })
        .collect();
    for (seed, scene) in scenes {
        assert!(scene.join().is_ok(), "repeat this with ANYPORT_SEED={seed}");
    }
}
