//! What nodes say of themselves. Pure.
//!
//! Each node signs its reports with a key of its own, and its member record has the public key: so that a report which another client
//! has written in its place is told apart. Who may write both records can take a node's name all the same; etcd's roles keep
//! others from that.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    layout::{Hash, Name, Pointer, Time},
    signing::{NodeKey, PublicKey, Signature},
};
/// A report is written again every 5 minutes. Clocks may differ by some minutes, too.
const STALE: Duration = Duration::from_mins(15);

/// What a node says of itself, under a lease that ends with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The node.
    pub node: Name,
    /// Its ring.
    pub ring: Name,
    /// The sequence of the active pointer; 0 before the first.
    pub sequence: u64,
    /// The highest sequence that it has seen, which it keeps on its disk: none below is followed any more.
    #[serde(default)]
    pub seen: u64,
    /// The active set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<Hash>,
    /// etcd's revision of the last pointer that it has seen.
    pub revision: i64,
    /// The generation that its kernel holds.
    pub generation: u64,
    /// Its back end.
    pub backend: String,
    /// How it is.
    pub health: Health,
    /// What does not work as it should.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub degraded: Vec<String>,
    /// Of anyportd.
    pub version: String,
    /// The last pointer that it did not follow, unless it has followed a later one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
    /// Since when the set is active.
    pub since: Time,
    /// When this was written.
    pub reported: Time,
}

/// How a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// All is well.
    Good,
    /// Something does not work as it should.
    Degraded,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Good => "good",
            Self::Degraded => "degraded",
        })
    }
}

/// A pointer that a node did not follow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// Its sequence.
    pub sequence: u64,
    /// Its set.
    pub set: Hash,
    /// Why not.
    pub error: String,
}

/// That there is such a node, which stays when its report goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The node.
    pub node: Name,
    /// Its ring.
    pub ring: Name,
    /// When it reported first with this key.
    pub since: Time,
    /// The key that signs its reports; nothing from before reports were signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PublicKey>,
}

/// A report with what shows whose it is.
#[derive(Clone, Debug)]
pub struct SignedReport {
    /// What it says.
    pub report: Report,
    message: Vec<u8>,
    signature: Option<Signature>,
}

impl SignedReport {
    const SIGNATURE: &str = "signature";

    /// Makes the record of a report: its JSON, with a signature over all the rest of it.
    ///
    /// # Errors
    /// The report can't be written as JSON.
    pub fn record(report: &Report, key: &NodeKey) -> serde_json::Result<String> {
        let mut record = serde_json::to_value(report)?;
        let signature = key.sign(record.to_string().as_bytes());
        if let Value::Object(fields) = &mut record {
            fields.insert(Self::SIGNATURE.into(), serde_json::to_value(signature)?);
        }
        serde_json::to_string(&record)
    }

    /// Reads a record. What the version of this program does not know is signed all the same.
    ///
    /// # Errors
    /// It is no report.
    pub fn read(record: &[u8]) -> serde_json::Result<Self> {
        let mut record: Value = serde_json::from_slice(record)?;
        let signature = record.as_object_mut().and_then(|fields| fields.remove(Self::SIGNATURE));
        let signature = signature.map(serde_json::from_value).transpose()?;
        let message = record.to_string().into_bytes();
        Ok(Self { report: serde_json::from_value(record)?, message, signature })
    }

    /// Whether this is the key that has signed it.
    pub fn is_by(&self, key: &PublicKey) -> bool {
        self.signature.is_some_and(|signature| key.has_signed(&self.message, signature))
    }
}

/// What a node makes of its ring's pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// The set is active on it.
    Current,
    /// Not yet.
    Behind,
    /// It does not follow the pointer.
    Refused,
    /// It has followed a later pointer: etcd has lost something.
    Ahead,
    /// It was there and does not report any more.
    Missing,
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Current => "current",
            Self::Behind => "behind",
            Self::Refused => "refused",
            Self::Ahead => "ahead",
            Self::Missing => "missing",
        })
    }
}

impl NodeState {
    /// What a report says, if there is one, about the pointer, if there is one.
    pub fn of(pointer: Option<&Pointer>, report: Option<&Report>) -> Self {
        let Some(report) = report else { return Self::Missing };
        let (sequence, set) = pointer.map_or((0, None), |it| (it.sequence, Some(it.set)));
        if report.refused.as_ref().is_some_and(|it| it.sequence == sequence) {
            Self::Refused
        } else if report.sequence == sequence && report.set == set {
            Self::Current
        } else if report.sequence > sequence {
            Self::Ahead
        } else {
            Self::Behind
        }
    }
}

impl Report {
    /// The highest sequence that the node will not go below. One that it refuses as forged is none.
    pub fn seen(&self) -> u64 {
        self.sequence.max(self.seen)
    }

    /// Whether it was written long ago, though its lease lives: any client of etcd can keep a lease alive.
    pub fn is_stale(&self) -> bool {
        self.reported.age() > STALE
    }
}

/// A report for tests, of a node that is well.
#[cfg(test)]
pub(crate) fn sample(node: &str, ring: &str, sequence: u64) -> Report {
    Report {
        node: node.parse().unwrap(),
        ring: ring.parse().unwrap(),
        sequence,
        seen: sequence,
        set: Some(Hash::of(&sequence.to_string())),
        revision: 1,
        generation: 1,
        backend: "tc".into(),
        health: Health::Good,
        degraded: Vec::new(),
        version: "0".into(),
        refused: None,
        since: Time::now(),
        reported: Time::now(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Health, NodeState, Report, SignedReport, sample};
    use crate::fleet::signing::NodeKey;

    fn report() -> Report {
        Report { health: Health::Degraded, degraded: vec!["why".into()], ..sample("n1", "main", 7) }
    }

    #[test]
    fn a_report_is_by_the_key_that_signed_it_as_it_is() {
        let (key, other) = (NodeKey::from_seed([1; 32]), NodeKey::from_seed([2; 32]));
        let record = SignedReport::record(&report(), &key).unwrap();
        let read = SignedReport::read(record.as_bytes()).unwrap();
        assert_eq!(read.report, Report { since: read.report.since, reported: read.report.reported, ..report() });
        assert!(read.is_by(&key.public()) && !read.is_by(&other.public()));
        // A field of a later version, before and after it was signed.
        let unsigned = record.replace("\"generation\"", "\"colour\":1,\"generation\"");
        assert!(!SignedReport::read(unsigned.as_bytes()).unwrap().is_by(&key.public()));
        for changed in
            [record.replace(":7", ":8"), record.replace("signature", "nothing"), record.replace("why", "why not")]
        {
            assert!(!SignedReport::read(changed.as_bytes()).unwrap().is_by(&key.public()), "{changed}");
        }
        assert!(SignedReport::read(b"[]").is_err());
    }

    #[test]
    fn nothing_of_a_node_is_taken_for_more_than_it_says() {
        assert_eq!(NodeState::of(None, Some(&Report { sequence: 0, set: None, ..report() })), NodeState::Current);
        assert_eq!(NodeState::of(None, Some(&report())), NodeState::Ahead);
        assert_eq!(NodeState::of(None, None), NodeState::Missing);
    }
}
