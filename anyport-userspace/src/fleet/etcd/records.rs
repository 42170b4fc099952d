//! What a ring's records say, as far as they can be read and are by those whose place they stand at.

use std::collections::BTreeMap;

use serde::{Serialize, de::DeserializeOwned};

use super::messages::KeyValue;
use crate::{
    api::{Problem, ProblemKind},
    fleet::{
        layout::{Keys, Name, Pointer, STEP, Seen, Time},
        report::{Member, Report, SignedReport},
    },
    text::{excerpt, remark},
};

/// A node of a ring.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub name: Name,
    /// What it reports; nothing if it is missing.
    pub report: Option<Report>,
    /// When it reported first.
    pub since: Option<Time>,
}

/// A ring as it was at one moment.
#[derive(Clone, Debug)]
pub struct Ring {
    /// Its name.
    pub name: Name,
    /// What its nodes are to have.
    pub pointer: Option<Seen<Pointer>>,
    /// What that was before, by sequence; the present one, too.
    pub history: Vec<Pointer>,
    /// Its nodes, by name.
    pub nodes: Vec<Node>,
    /// What was not taken for a record of the ring.
    pub skipped: Vec<Skipped>,
}

impl Ring {
    /// The highest sequence that the ring has had, by its pointer and its history. Sequences that are farther than [`STEP`] from the
    /// others are none that commands made: with them the ring would come to the end of its sequences, or go back. Most of them count.
    pub fn highest(&self) -> u64 {
        let mut all: Vec<u64> = self.history.iter().map(|it| it.sequence).collect();
        all.extend(self.pointer.iter().map(|it| it.value.sequence));
        all.sort_unstable();
        let runs = all.chunk_by(|one, next| *next <= one.saturating_add(STEP));
        // Of two that are as long, the first one.
        let longest = runs.reduce(|longest, run| if run.len() > longest.len() { run } else { longest });
        longest.and_then(<[u64]>::last).copied().unwrap_or_default()
    }

    /// The nodes that report to have seen this sequence or a higher one, so that they don't follow it, with what they have seen. A client
    /// with a node's rights in etcd can write that.
    pub fn beyond(&self, sequence: u64) -> Vec<(&Name, u64)> {
        let reports = self.reports().map(|it| (&it.node, it.seen()));
        reports.filter(|(_, seen)| *seen >= sequence).collect()
    }

    /// Whether etcd has nothing of it.
    pub fn is_unknown(&self) -> bool {
        self.pointer.is_none() && self.history.is_empty() && self.nodes.is_empty() && self.skipped.is_empty()
    }

    /// What its nodes report.
    pub fn reports(&self) -> impl Iterator<Item = &Report> {
        self.nodes.iter().filter_map(|it| it.report.as_ref())
    }
}

/// A key that was not taken for a record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// It, as far as it is worth showing.
    pub key: String,
    /// Why not.
    pub why: String,
}

impl Skipped {
    pub(super) fn new(key: &[u8], why: &str) -> Self {
        Self { key: remark(&String::from_utf8_lossy(key)), why: remark(why) }
    }
}

pub(super) fn read_record<T: DeserializeOwned>(entry: &KeyValue) -> Result<T, String> {
    let key = String::from_utf8_lossy(&entry.key);
    serde_json::from_slice(&entry.value)
        .map_err(|error| format!("what etcd has under {} can't be read: {}", remark(&key), remark(&error.to_string())))
}

pub(in crate::fleet) fn read_pointer(entry: &KeyValue) -> Result<Seen<Pointer>, Problem> {
    let value = read_record(entry).map_err(|why| {
        let key = String::from_utf8_lossy(&entry.key);
        Problem::new(ProblemKind::Failed, why)
            .hint(format!("nodes go on with what they have; `etcdctl del {key}` lets the ring be published again"))
    })?;
    Ok(Seen { value, revision: entry.mod_revision })
}

/// What a ring's pointer was, each at the place of its sequence.
pub(super) fn history_of(keys: &Keys, ring: &Name, entries: &[KeyValue], skipped: &mut Vec<Skipped>) -> Vec<Pointer> {
    let mut records = Vec::with_capacity(entries.len());
    for entry in entries {
        match serde_json::from_slice::<Pointer>(&entry.value) {
            Ok(pointer) => match expect_place(&keys.history_at(ring, pointer.sequence), &pointer.ring, ring, entry) {
                Ok(()) => records.push(pointer),
                Err(why) => skipped.push(Skipped::new(&entry.key, &why)),
            },
            Err(error) => skipped.push(Skipped::new(&entry.key, &error.to_string())),
        }
    }
    records
}

/// The nodes of a ring: each has a member record, and a report of which that says who has signed it.
pub(super) fn nodes_of(
    keys: &Keys,
    ring: &Name,
    reports: &[KeyValue],
    members: &[KeyValue],
    skipped: &mut Vec<Skipped>,
) -> Vec<Node> {
    let mut signers = BTreeMap::new();
    let mut nodes = BTreeMap::new();
    for entry in members {
        match member_at(keys, ring, entry) {
            Ok(Member { node, since, key, .. }) => {
                signers.insert(node.clone(), key);
                nodes.insert(node.clone(), Node { name: node, report: None, since: Some(since) });
            }
            Err(why) => skipped.push(Skipped::new(&entry.key, &why)),
        }
    }
    for entry in reports {
        let report = report_at(keys, ring, entry).and_then(|signed| {
            let SignedReport { report, .. } = &signed;
            let signer = signers.get(&report.node).ok_or("there is no member record of that node")?;
            match signer {
                Some(key) if !signed.is_by(key) => Err(format!(
                    "it is not signed with the key {} of that node: another client has written it",
                    key.short()
                )),
                _ => Ok(signed.report),
            }
        });
        match report {
            Ok(report) => {
                if let Some(node) = nodes.get_mut(&report.node) {
                    node.report = Some(report);
                }
            }
            Err(why) => skipped.push(Skipped::new(&entry.key, &why)),
        }
    }
    nodes.into_values().collect()
}

fn member_at(keys: &Keys, ring: &Name, entry: &KeyValue) -> Result<Member, String> {
    let member: Member = serde_json::from_slice(&entry.value).map_err(|error| error.to_string())?;
    expect_place(&keys.member(ring, &member.node), &member.ring, ring, entry)?;
    Ok(member)
}

fn report_at(keys: &Keys, ring: &Name, entry: &KeyValue) -> Result<SignedReport, String> {
    let signed = SignedReport::read(&entry.value).map_err(|error| error.to_string())?;
    expect_place(&keys.node(ring, &signed.report.node), &signed.report.ring, ring, entry)?;
    Ok(signed)
}

/// A node may write its own records, and those are about that node alone.
fn expect_place(place: &str, named: &Name, ring: &Name, entry: &KeyValue) -> Result<(), String> {
    if entry.key == place.as_bytes() && named == ring {
        return Ok(());
    }
    Err(format!("it speaks of {}, of the ring {named}", excerpt(place)))
}

#[cfg(test)]
mod tests {
    use super::{Node, Ring, nodes_of};
    use crate::fleet::{
        etcd::messages::KeyValue,
        layout::{Hash, Keys, Name, Pointer, STEP, Seen, Time},
        report::{Member, SignedReport, sample},
        signing::NodeKey,
    };

    fn pointer(sequence: u64) -> Pointer {
        Pointer {
            ring: "main".parse().unwrap(),
            sequence,
            set: Hash::of(""),
            published: Time::now(),
            by: "a".into(),
            note: None,
            from: None,
            signature: None,
        }
    }

    fn ring(present: Option<u64>, history: &[u64]) -> Ring {
        Ring {
            name: "main".parse().unwrap(),
            pointer: present.map(|it| Seen { value: pointer(it), revision: 1 }),
            history: history.iter().map(|it| pointer(*it)).collect(),
            nodes: Vec::new(),
            skipped: Vec::new(),
        }
    }

    #[test]
    fn a_sequence_that_no_command_made_is_none() {
        for (present, history, highest) in [
            (None, &[][..], 0),
            (None, &[1, 2, 3], 3),
            (Some(4), &[1, 2, 3], 4),
            (Some(u64::MAX), &[1, 2, 3], 3),
            (Some(3), &[1, 2, 3, u64::MAX - 1], 3),
            (Some(3), &[1, 2, 3, 4, STEP], STEP),
            (Some(3), &[3, 4 + STEP], 3),
            (Some(7 * STEP), &[1, 7 * STEP, 7 * STEP - 1], 7 * STEP),
            // Alone, it is all that is known.
            (Some(u64::MAX), &[], u64::MAX),
            (None, &[5 * STEP, 5 * STEP + 1], 5 * STEP + 1),
        ] {
            assert_eq!(ring(present, history).highest(), highest, "{present:?} {history:?}");
        }
    }

    fn entry(key: &str, value: impl Into<Vec<u8>>) -> KeyValue {
        KeyValue { key: key.into(), value: value.into(), ..KeyValue::default() }
    }

    #[test]
    fn only_a_node_speaks_for_itself() {
        let (keys, ring): (_, Name) = (Keys::new("/a"), "main".parse().unwrap());
        let (key, other) = (NodeKey::from_seed([1; 32]), NodeKey::from_seed([2; 32]));
        let member = |node: &str, key: Option<&NodeKey>| {
            let record = Member {
                node: node.parse().unwrap(),
                ring: "main".parse().unwrap(),
                since: Time::now(),
                key: key.map(NodeKey::public),
            };
            entry(&format!("/a/members/main/{node}"), serde_json::to_vec(&record).unwrap())
        };
        let at = |place: &str, node: &str, key: &NodeKey| {
            entry(&format!("/a/nodes/main/{place}"), SignedReport::record(&sample(node, "main", 7), key).unwrap())
        };
        let members =
            [member("good", Some(&key)), member("old", None), member("forged", Some(&key)), member("gone", Some(&key))];
        let unsigned = entry("/a/nodes/main/gone", serde_json::to_vec(&sample("gone", "main", 7)).unwrap());
        let reports = [
            at("good", "good", &key),
            at("old", "old", &other),
            at("forged", "forged", &other),
            at("elsewhere", "good", &key),
            at("unknown", "unknown", &key),
            unsigned,
            entry("/a/nodes/main/x", "nonsense"),
            entry("/a/nodes/main/\u{1b}[2J", "x".repeat(9_000)),
        ];
        let mut skipped = Vec::new();
        let nodes = nodes_of(&keys, &ring, &reports, &members, &mut skipped);
        let heard: Vec<(&str, bool)> =
            nodes.iter().map(|Node { name, report, .. }| (name.as_str(), report.is_some())).collect();
        assert_eq!(heard, [("forged", false), ("gone", false), ("good", true), ("old", true)]);
        let skipped: Vec<String> = skipped.into_iter().map(|it| format!("{}: {}", it.key, it.why)).collect();
        let wanted = [
            "forged: it is not signed",
            "elsewhere: it speaks of",
            "unknown: there is no member",
            "gone: it is not signed",
            "x: ",
            "\\u001b[2J: ",
        ];
        assert_eq!(skipped.len(), wanted.len());
        for (skipped, wanted) in skipped.iter().zip(wanted) {
            assert!(skipped.contains(wanted) && skipped.len() < 300, "{skipped}");
        }
    }
}
