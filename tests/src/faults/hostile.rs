//! A node that an attacker has taken over: it has the rights of nodes in etcd, and no others.

use anyport::fleet::layout::Hash;
use serde_json::json;

use super::ledger::{Fault, Ledger, Span};
use crate::{etcdctl::Etcdctl, random::Random};

const BETWEEN: Span = (200, 3_000);
const NAME: &str = "evil";

/// Writes and removes what nodes may write, over and over.
pub(super) fn trouble(client: &Etcdctl, nodes: usize, ledger: &Ledger) {
    let _guard = ledger.guard();
    let mut random = Random::new("hostile node");
    let mut faults = [Fault::ForgedClaim, Fault::ForgedClaim, Fault::ReportOverwritten, Fault::ReportRemoved];
    let mut has_all_happened = false;
    loop {
        random.shuffle(&mut faults);
        for fault in faults {
            if !ledger.goes_on(&mut random, BETWEEN, has_all_happened) {
                return;
            }
            if strike(client, fault, nodes, &mut random) {
                ledger.count(fault);
            }
        }
        // etcd may have refused.
        has_all_happened = faults.iter().all(|fault| ledger.has_counted(*fault));
    }
}

/// Whether etcd has taken it.
fn strike(client: &Etcdctl, fault: Fault, nodes: usize, random: &mut Random) -> bool {
    let put = |key: &str, value: &str| etcdctl(client, &["put", "--", key, value]);
    let victim = format!("/anyport/nodes/main/n{}", random.below(nodes));
    match fault {
        Fault::ForgedClaim => {
            let member = json!({ "node": NAME, "ring": "main", "since": "2026-01-31T23:59:59Z" });
            put(&format!("/anyport/members/main/{NAME}"), &member.to_string())
                && put(&format!("/anyport/nodes/main/{NAME}"), &claim(NAME, random))
        }
        Fault::ReportOverwritten => {
            let words = match random.below(3) {
                0 => "nonsense".to_owned(),
                1 => claim(NAME, random),
                _ => claim(victim.rsplit('/').next().unwrap_or_default(), random),
            };
            put(&victim, &words)
        }
        _ => etcdctl(client, &["del", &victim]),
    }
}

fn claim(node: &str, random: &mut Random) -> String {
    let sequence = *random.pick(&[u64::MAX, u64::MAX - 1, 1 << 40, 1_000]);
    let set = Hash::of("nobody has published this").to_string();
    json!({
        "node": node, "ring": "main", "sequence": sequence, "seen": sequence, "set": set, "revision": 1, "generation": 1,
        "backend": "sk-lookup", "health": "good", "version": "0.1.0", "since": "2026-01-31T23:59:59Z",
        "reported": "2026-01-31T23:59:59Z", "refused": { "sequence": sequence, "set": set, "error": "why not" },
    })
    .to_string()
}

fn etcdctl(client: &Etcdctl, arguments: &[&str]) -> bool {
    client.run([&["--command-timeout=4s"], arguments].concat()).status == 0
}
