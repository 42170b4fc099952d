//! What stands in etcd: keys and records. Pure.
//!
//! All keys are below a prefix. `sets/HASH` and `sets/HASH/NNNN` hold a set, `deltas/HASH/FROM` what makes it out of another one,
//! `rings/RING` points to the one that a ring's
//! nodes are to have, `history/RING/SEQUENCE` is what it pointed to over time, and `nodes/RING/NODE` is what a node
//! reports, for as long as it lives. `members/RING/NODE` stays, so that a node is missed.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::signing::Signature;
use crate::{as_text::as_text, rules::InvalidText, text::excerpt};

/// The prefix of all keys, if the configuration names no other one.
pub const DEFAULT_PREFIX: &str = "/anyport/";
/// Records of the history that each ring keeps.
pub const HISTORY: u64 = 100;
/// How far a ring's sequence may go with one change. It goes by one, and further only where an operator says so after etcd was
/// restored; so whatever etcd is made to say, a ring never gets to the end of its sequences.
pub const STEP: u64 = 1_000_000;
const LONGEST_NAME: usize = 63;

/// The content of a set, by which it is found: SHA-256 of its text.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash([u8; 32]);

impl Hash {
    /// That of a set's text.
    pub fn of(text: &str) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
        Self(hash)
    }

    /// Checks that a text is the set of this hash. Each text of a set goes through here, wherever it comes from.
    ///
    /// # Errors
    /// It is another one: its hash.
    pub fn expect(&self, text: &str) -> Result<(), Self> {
        let found = Self::of(text);
        if found == *self { Ok(()) } else { Err(found) }
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Enough of it for people to distinguish sets.
    pub fn short(&self) -> String {
        hex(&self.0[..6])
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hash({self})")
    }
}

impl FromStr for Hash {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        from_hex(text)
            .map(Self)
            .ok_or_else(|| InvalidText(format!("hash {}: use 64 hexadecimal digits", excerpt(text))))
    }
}

as_text!(Hash);

/// Name of a ring or a node: a letter or digit, then up to 62 of those, dots, underscores and hyphens.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let is_valid = text.len() <= LONGEST_NAME
            && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if is_valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidText(format!(
                "name {} of a ring or node: use a letter or digit, then up to 62 of those and . _ -",
                excerpt(text)
            )))
        }
    }
}

as_text!(Name);

/// A time by its writer's clock, by RFC 3339, to the second: so that what is read is what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(SystemTime);

impl Time {
    /// By this machine's clock.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self(SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs()))
    }

    /// How long ago that was; nothing for times to come, which clocks that disagree make.
    pub fn age(self) -> Duration {
        self.0.elapsed().unwrap_or_default()
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", humantime::format_rfc3339_seconds(self.0))
    }
}

impl FromStr for Time {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        let time = humantime::parse_rfc3339(text);
        time.map(Self)
            .map_err(|error| InvalidText(format!("time {}: {error}; use 2026-01-31T23:59:59Z", excerpt(text))))
    }
}

as_text!(Time);

/// A record, and etcd's revision of the change that wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen<T> {
    /// The record.
    pub value: T,
    /// `mod_revision` of its key.
    pub revision: i64,
}

/// Which set a ring's nodes are to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pointer {
    /// The ring.
    pub ring: Name,
    /// Rises with every change of the ring, and never comes again.
    pub sequence: u64,
    /// The set.
    pub set: Hash,
    /// When it was written.
    pub published: Time,
    /// Who wrote it: `USER@HOST`.
    pub by: String,
    /// What it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Another set, for nodes that have it: what makes this one out of that is stored, see [`Keys::delta`]. A help and no more, so
    /// that nobody signs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Hash>,
    /// Over ring, sequence and set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<Signature>,
}

/// How a set is stored. Sets are larger than what etcd takes at once, so they come in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Bytes of the set's text.
    pub bytes: usize,
    /// Number of chunks.
    pub chunks: usize,
    /// What the chunks are, put together.
    pub compression: Compression,
}

/// What was done to a text to make it smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Nothing.
    None,
    /// gzip, RFC 1952.
    Gzip,
}

/// Where everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Below a prefix, which ends with a slash or gets one.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: format!("{}/", prefix.trim_end_matches('/')) }
    }

    /// The prefix of all rings' pointers.
    pub fn rings(&self) -> String {
        format!("{}rings/", self.prefix)
    }

    /// A ring's pointer.
    pub fn ring(&self, ring: &Name) -> String {
        format!("{}{ring}", self.rings())
    }

    /// The prefix of the history of all rings.
    pub fn histories(&self) -> String {
        format!("{}history/", self.prefix)
    }

    /// The prefix of a ring's history.
    pub fn history(&self, ring: &Name) -> String {
        format!("{}{ring}/", self.histories())
    }

    /// What a ring's pointer was at a sequence. Keys sort as sequences do.
    pub fn history_at(&self, ring: &Name, sequence: u64) -> String {
        format!("{}{sequence:020}", self.history(ring))
    }

    /// The prefix of the reports of all nodes.
    pub fn nodes(&self) -> String {
        format!("{}nodes/", self.prefix)
    }

    /// The prefix of the reports of a ring's nodes.
    pub fn nodes_of(&self, ring: &Name) -> String {
        format!("{}{ring}/", self.nodes())
    }

    /// A node's report.
    pub fn node(&self, ring: &Name, node: &Name) -> String {
        format!("{}{node}", self.nodes_of(ring))
    }

    /// The prefix of all nodes that there have been.
    pub fn members(&self) -> String {
        format!("{}members/", self.prefix)
    }

    /// The prefix of all nodes of a ring that there have been.
    pub fn members_of(&self, ring: &Name) -> String {
        format!("{}{ring}/", self.members())
    }

    /// That a node is one of a ring's.
    pub fn member(&self, ring: &Name, node: &Name) -> String {
        format!("{}{node}", self.members_of(ring))
    }

    /// The prefix of all sets.
    pub fn sets(&self) -> String {
        format!("{}sets/", self.prefix)
    }

    /// A set's manifest. Its chunks come right after it.
    pub fn set(&self, hash: &Hash) -> String {
        format!("{}{hash}", self.sets())
    }

    /// A chunk of a set, from 0 on.
    pub fn chunk(&self, hash: &Hash, number: usize) -> String {
        format!("{}/{number:04}", self.set(hash))
    }

    /// The prefix of all that makes one set out of another.
    pub fn deltas(&self) -> String {
        format!("{}deltas/", self.prefix)
    }

    /// The prefix of what makes a set out of others.
    pub fn deltas_to(&self, to: &Hash) -> String {
        format!("{}{to}/", self.deltas())
    }

    /// What makes one set out of another.
    pub fn delta(&self, from: &Hash, to: &Hash) -> String {
        format!("{}{from}", self.deltas_to(to))
    }

    /// The set that a key of [`Self::delta`] leads to.
    pub fn delta_to(&self, key: &str) -> Option<Hash> {
        key.strip_prefix(&self.deltas())?.split('/').next()?.parse().ok()
    }

    /// The set that a key belongs to, be it of the manifest or of a chunk.
    pub fn set_of(&self, key: &str) -> Option<Hash> {
        let name = key.strip_prefix(&self.sets())?;
        name.split('/').next()?.parse().ok()
    }
}

/// Lower-case hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|it| char::from(DIGITS[usize::from(it)])).collect()
}

/// The bytes that `2 * N` hexadecimal digits stand for.
pub(super) fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits: Vec<u8> = text.chars().map(|it| it.to_digit(16)?.try_into().ok()).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks(2).map(|pair| Some(pair[0] << 4 | pair.get(1)?)).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Hash, Keys, Name, Pointer, Signature, Time, from_hex, hex};
    use crate::as_text::expect_same_json;

    #[test]
    fn json_of_values() {
        expect_same_json::<Hash>(&["ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"]);
        expect_same_json::<Name>(&["canary", "Node-1.example_x"]);
        expect_same_json::<Time>(&["2026-01-31T23:59:59Z"]);
        expect_same_json::<Signature>(&["0f".repeat(64).as_str()]);
    }

    #[test]
    fn a_hash_is_that_of_sha256sum() {
        let hash = Hash::of("abc");
        assert_eq!(hash.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(hash.to_string().parse::<Hash>().unwrap(), hash);
        assert_eq!(hash.short(), "ba7816bf8f01");
        for text in ["", "ba78", &"g".repeat(64), &"a".repeat(63), &"a".repeat(65), &"ä".repeat(64)] {
            assert!(text.parse::<Hash>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_never_reach_beyond_their_place() {
        for name in ["canary", "0", "Node-1.example_x"] {
            assert!(name.parse::<Name>().is_ok(), "{name}");
        }
        for name in ["", "a/b", "..", "-a", "a b", "ä", "a\0", &"x".repeat(64)] {
            assert!(name.parse::<Name>().is_err(), "{name}");
        }
    }

    #[test]
    fn keys_of_one_thing_are_no_prefix_of_another() {
        let keys = Keys::new("/anyport");
        let (ring, node) = ("main".parse().unwrap(), "n1".parse().unwrap());
        let hash = Hash::of("");
        assert_eq!(keys, Keys::new("/anyport/"));
        assert_eq!(keys.ring(&ring), "/anyport/rings/main");
        assert_eq!(keys.history_at(&ring, 7), "/anyport/history/main/00000000000000000007");
        assert_eq!(keys.node(&ring, &node), "/anyport/nodes/main/n1");
        assert_eq!(keys.chunk(&hash, 12), format!("/anyport/sets/{hash}/0012"));
        for key in [keys.set(&hash), keys.chunk(&hash, 12)] {
            assert_eq!(keys.set_of(&key), Some(hash), "{key}");
        }
        let delta = keys.delta(&Hash::of("a"), &hash);
        assert_eq!(
            (delta.as_str(), keys.delta_to(&delta)),
            (&*format!("/anyport/deltas/{hash}/{}", Hash::of("a")), Some(hash))
        );
        assert_eq!((keys.set_of(&delta), keys.delta_to(&keys.set(&hash))), (None, None));
        for key in ["/anyport/sets/x".to_owned(), keys.ring(&ring), format!("/other/sets/{hash}")] {
            assert_eq!(keys.set_of(&key), None, "{key}");
        }
    }

    #[test]
    fn a_pointer_is_written_as_documented() {
        let text = format!(
            r#"{{"ring":"main","sequence":7,"set":"{}","published":"2026-01-31T23:59:59Z","by":"a@b","note":"n"}}"#,
            Hash::of("")
        );
        let pointer: Pointer = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&pointer).unwrap(), text);
        assert_eq!(pointer.published.to_string().parse::<Time>().unwrap(), pointer.published);
        let now = Pointer { published: Time::now(), ..pointer.clone() };
        assert_eq!(serde_json::from_str::<Pointer>(&serde_json::to_string(&now).unwrap()).unwrap(), now);
        // A later version may know more.
        let more = text.replace("\"note\":\"n\"", "\"colour\":\"blue\"");
        assert_eq!(serde_json::from_str::<Pointer>(&more).unwrap(), Pointer { note: None, ..pointer });
        for wrong in ["{}", "[]", "null", &text.replace("main", "a/b"), &text.replace(":7", ":-7")] {
            assert!(serde_json::from_str::<Pointer>(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn hexadecimal_there_and_back(bytes: [u8; 9]) {
            prop_assert_eq!(from_hex(&hex(&bytes)), Some(bytes));
        }

        #[test]
        fn history_sorts_by_sequence(a: u64, b: u64) {
            let (keys, ring) = (Keys::new("x"), "r".parse().unwrap());
            prop_assert_eq!(keys.history_at(&ring, a).cmp(&keys.history_at(&ring, b)), a.cmp(&b));
        }
    }
}
