//! Nodes: daemons, each on a host of its own, and what happens to them and to those who have sockets registered there.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64},
    },
    time::{Duration, Instant},
};

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use super::{
    CORE, HAND, OWNED,
    ledger::{Fault, Ledger, Span},
};
use crate::{
    backbone::Backbone,
    daemon::{Daemon, Setup},
    dial::tcp_text,
    host::wait_for,
    netns::Netns,
    owners::Owner,
    random::Random,
    steady::{Clients, Tally},
};

const BETWEEN: Span = (300, 3_000);
/// Shorter than clients are patient.
const FROZEN: Span = (200, 3_000);
const WITHOUT_OWNER: Span = (100, 1_500);
const CABLE_BETWEEN: Span = (3_000, 15_000);
const CABLE_LASTING: Span = (500, 8_000);
/// Longer than the lease of a node's report.
const CABLE_LONG: Span = (31_000, 45_000);
/// Within which something is noticed on a host that does nothing else.
const SOON: Duration = Duration::from_secs(10);

/// A daemon that follows the ring `main`.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) number: usize,
    pub(super) daemon: Daemon,
    /// When its server was killed.
    kills: Mutex<Vec<Instant>>,
}

/// What a node has by hand.
enum ByHand {
    Nothing,
    /// A service, and perhaps a rule for it.
    Service {
        with_rule: bool,
    },
}

impl Node {
    /// A daemon that has nothing of its own but a service with a registered socket and a rule for it.
    pub(super) fn start(host: &Netns, number: usize, back_end: &'static str, etcd: &str, files: &Path) -> Self {
        let config = files.join(format!("n{number}.toml"));
        let urls: Vec<&str> = etcd.split(',').collect();
        let text = format!("[fleet]\netcd = {urls:?}\nring = \"main\"\nnode = \"n{number}\"\n");
        fs::write(&config, text).expect("a configuration");
        let daemon = Setup::new(host, back_end).config(config).start();
        daemon.ok("add-service owned --handler registered --fallback default");
        daemon.ok(&format!("add-prefix {OWNED} --service owned"));
        Self { number, daemon, kills: Mutex::default() }
    }

    /// Has clients on the host dial what is in every set.
    pub(super) fn dial_until(&self, is_over: &AtomicBool) -> Tally {
        let (namespace, pause) = (self.daemon.namespace(), Duration::from_millis(4));
        let (clients, served) = (Clients { namespace, prefixes: &CORE, count: 2, pause }, AtomicU64::new(0));
        let failures = clients.dial_until(is_over, &served);
        Tally { served: served.into_inner(), failures }
    }

    pub(super) fn kills(&self) -> Vec<Instant> {
        self.kills.lock().expect("a list").clone()
    }

    /// Makes trouble on this node, and ends it.
    pub(super) fn trouble(&self, versions: &[PathBuf], ledger: &Ledger) {
        use Fault::{ChangedByHand, OwnerEnded, OwnerKilled, ServerFrozen, ServerKilled, TakenOver};
        let _guard = ledger.guard();
        let mut random = Random::new(&format!("node {}", self.number));
        // Changes by hand stay while other things happen.
        let mut faults = [ServerKilled, TakenOver, ServerFrozen, OwnerKilled, OwnerEnded, ChangedByHand, ChangedByHand];
        let mut by_hand = ByHand::Nothing;
        let mut owner = self.register("owner 0");
        let mut owners = 0;
        let mut has_all_happened = false;
        'trouble: loop {
            random.shuffle(&mut faults);
            for fault in faults {
                if !ledger.goes_on(&mut random, BETWEEN, has_all_happened) {
                    break 'trouble;
                }
                ledger.count(fault);
                match fault {
                    ServerKilled => self.kill(),
                    TakenOver => self.take_over(random.pick::<PathBuf>(versions), ledger),
                    ServerFrozen => self.freeze(&mut random, ledger),
                    ChangedByHand => by_hand = self.change(&by_hand, ledger),
                    _ => {
                        self.end(owner, fault, &mut random);
                        ledger.wait(&mut random, WITHOUT_OWNER);
                        owners += 1;
                        owner = self.register(&format!("owner {owners}"));
                    }
                }
                self.expect_owned(&format!("owner {owners} at "), fault, &mut random, ledger);
            }
            has_all_happened = true;
        }
        if matches!(by_hand, ByHand::Service { .. }) {
            self.change(&by_hand, ledger);
        }
    }

    fn kill(&self) {
        let server = self.daemon.pid();
        self.kills.lock().expect("a list").push(Instant::now());
        kill(server, Signal::SIGKILL).expect("SIGKILL to the server");
        self.daemon.wait_for_successor(server);
    }

    fn take_over(&self, version: &Path, ledger: &Ledger) {
        let before = self.daemon.pid();
        let outcome = self.daemon.take_over(version);
        if outcome.status == 0 {
            self.daemon.wait_for_successor(before);
        } else {
            ledger.wrong(format_args!("n{}: nobody has taken over: {outcome}", self.number));
        }
    }

    fn freeze(&self, random: &mut Random, ledger: &Ledger) {
        self.daemon.pause();
        ledger.wait(random, FROZEN);
        self.daemon.resume();
    }

    /// Adds a service and a rule by hand, or removes them. The rule may contradict the active set.
    fn change(&self, by_hand: &ByHand, ledger: &Ledger) -> ByHand {
        let must = |arguments: &str| {
            let outcome = self.ctl(arguments);
            if outcome.status != 0 {
                ledger.wrong(format_args!("n{}: {arguments}: {outcome}", self.number));
            }
        };
        if let ByHand::Service { with_rule } = by_hand {
            if *with_rule {
                must(&format!("remove-prefix {HAND}"));
            }
            must("remove-service hand");
            return ByHand::Nothing;
        }
        must("add-service hand --handler discard");
        let arguments = format!("add-prefix {HAND} --service hand");
        let outcome = self.ctl(&arguments);
        if outcome.status != 0 && !outcome.stderr.contains("contradicts") {
            ledger.wrong(format_args!("n{}: {arguments}: {outcome}", self.number));
        }
        ByHand::Service { with_rule: outcome.status == 0 }
    }

    fn ctl(&self, arguments: &str) -> crate::host::Outcome {
        self.daemon.ctl(&arguments.split_whitespace().collect::<Vec<_>>())
    }

    fn register(&self, name: &str) -> Owner {
        let owner = Owner::greeter(self.daemon.namespace(), name, "127.0.0.1", 0);
        self.daemon.ok(&format!("register owned --pid {} --fd {}", owner.pid(), owner.descriptor()));
        owner
    }

    /// Ends who has the registered socket, after which the fallback serves.
    fn end(&self, owner: Owner, fault: Fault, random: &mut Random) {
        if fault == Fault::OwnerKilled {
            drop(owner);
        } else {
            owner.signal(Signal::SIGTERM);
            owner.wait_for_end();
        }
        wait_for("fallback of a registered socket", SOON, || {
            match self.owned(SocketAddr::new(random.address(OWNED), 80)) {
                Ok(text) if text.starts_with("hello") => Ok(()),
                other => Err(format!("n{}: {other:?}", self.number)),
            }
        });
    }

    /// A registered socket stays, whatever has happened to the daemon.
    fn expect_owned(&self, answer: &str, fault: Fault, random: &mut Random, ledger: &Ledger) {
        let to = SocketAddr::new(random.address(OWNED), random.port());
        match self.owned(to) {
            Ok(text) if text.starts_with(answer) => {}
            other => ledger.wrong(format_args!("n{} after {fault:?}: {to} answers {other:?}", self.number)),
        }
    }

    fn owned(&self, to: SocketAddr) -> std::io::Result<String> {
        self.daemon.namespace().enter(|| tcp_text(to))
    }

    /// The prefixes that it has of the fleet, in order.
    pub(super) fn fleet_prefixes(&self) -> Vec<String> {
        let rules = self.daemon.json("prefixes");
        let of_fleet = rules.as_array().expect("rules").iter().filter(|it| it["origin"] == "fleet");
        let mut prefixes: Vec<String> = of_fleet.filter_map(|it| Some(it["prefix"].as_str()?.to_owned())).collect();
        prefixes.sort_unstable();
        prefixes
    }

    /// What it says of the fleet.
    pub(super) fn view(&self) -> Value {
        self.daemon.json("status")["fleet"].clone()
    }
}

/// Cuts a node off from etcd now and then.
pub(super) fn trouble_cable(backbone: &Backbone, host: usize, ledger: &Ledger) {
    let _guard = ledger.guard();
    let mut random = Random::new(&format!("cable {host}"));
    while ledger.wait(&mut random, CABLE_BETWEEN) {
        ledger.count(Fault::CableCut);
        backbone.cut(host);
        ledger.wait_mostly(&mut random, CABLE_LASTING, CABLE_LONG);
        backbone.mend(host);
    }
}
