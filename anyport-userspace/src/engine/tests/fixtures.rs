//! The parts of an engine over a simulated kernel, for tests of each.

use std::{
    collections::HashSet,
    io::Write as _,
    net::IpAddr,
    num::NonZeroUsize,
    sync::{Arc, Mutex},
};

use clap::Parser as _;

use super::simulated::{Shared, Simulated, SimulatedRoutes, World};
use crate::{
    config::{Config, Options},
    engine::{
        desired::{Desired, Drains},
        kernel::{Kernel, Parts},
        services::Services,
    },
    host::Host,
    keeper::Link,
    routes::Routes,
    rules::{Change, Draft, Origin, Rule, RuleText},
    service::Workers,
    steering::choose::Chosen,
};

/// What an engine is made of, but for what it keeps.
pub(in crate::engine) struct Fixture {
    pub(in crate::engine) world: Shared,
    pub(in crate::engine) desired: Desired,
    pub(in crate::engine) kernel: Kernel,
    pub(in crate::engine) services: Services,
    _workers: Workers,
}

/// 192.0.2.5 has a connection.
#[expect(clippy::unnecessary_wraps, reason = "so it is in the real world")]
fn connected() -> anyhow::Result<HashSet<IpAddr>> {
    Ok(HashSet::from(["192.0.2.5".parse().unwrap()]))
}

impl Fixture {
    /// Without rules and services.
    pub(in crate::engine) async fn new() -> Self {
        let world: Shared = Arc::new(Mutex::new(World::new(1)));
        let steering = Box::new(Simulated::new(&world));
        let parts = Parts {
            chosen: Chosen { steering, outcomes: Vec::new() },
            routes: Routes::held_by(Arc::new(Mutex::new(SimulatedRoutes(Arc::clone(&world))))).unwrap(),
            connected,
            published: Arc::default(),
            look: || Ok(Host::default()),
            peers: |_, _| Ok(Vec::new()),
            events: Arc::default(),
        };
        let kernel = Kernel::new(parts).await.unwrap();
        let workers = Workers::start(NonZeroUsize::MIN).unwrap();
        let services = Services::new(
            &config(""),
            (kernel.back_end(), kernel.published(), kernel.events()),
            workers.handles(),
            Link::default(),
        )
        .unwrap();
        Self { world, desired: Desired::new(Drains::default()), kernel, services, _workers: workers }
    }
}

/// A configuration of one worker, out of this text.
pub(in crate::engine) fn config(text: &str) -> Config {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let options = Options::parse_from(["anyportd", "--workers", "1"]);
    Config::new(options.settings, Some(file.path())).unwrap()
}

/// A rule for TCP that steers to the service `default`.
pub(in crate::engine) fn rule(prefix: &str, ports: &str, origin: Origin) -> Rule {
    let text = format!("prefix = \"{prefix}\"\nprotocol = \"tcp\"\nports = \"{ports}\"");
    toml::from_str::<RuleText>(&text).unwrap().into_rule(origin)
}

/// A change that adds rules.
pub(in crate::engine) fn adding(desired: &Desired, rules: &[Rule]) -> Change {
    let mut draft = Draft::of(desired.rules());
    for rule in rules {
        draft.prefix(rule.prefix).insert(rule).unwrap();
    }
    draft.finish()
}

/// A change that removes all rules of a prefix.
pub(in crate::engine) fn removing(desired: &Desired, prefix: &str) -> Change {
    let mut draft = Draft::of(desired.rules());
    draft.prefix(prefix.parse().unwrap()).remove(|_| true);
    draft.finish()
}
