//! The messages of etcd's API version 3 that a fleet uses, field by field as etcd's `rpc.proto` and `kv.proto` number them.
//!
//! They are written down here rather than generated, so that building needs no protobuf compiler. Field numbers of a
//! published protobuf API never change, and fields that are left out are skipped when they are read. Keys and values are
//! bytes; a revision is a number that grows by one with each change of the cluster, and 0 where there is none.

/// What every answer begins with.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct ResponseHeader {
    /// Revision of the store when the answer was made.
    #[prost(int64, tag = "3")]
    pub(crate) revision: i64,
}

/// A key with its value.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct KeyValue {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) key: Vec<u8>,
    /// Revision of its last change.
    #[prost(int64, tag = "3")]
    pub(crate) mod_revision: i64,
    #[prost(bytes = "vec", tag = "5")]
    pub(crate) value: Vec<u8>,
    /// The lease with which it goes; 0 for none.
    #[prost(int64, tag = "6")]
    pub(crate) lease: i64,
}

impl KeyValue {
    /// The key, if it is text.
    pub(crate) fn key_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.key).ok()
    }
}

/// The least key behind all that have this prefix.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return end;
        }
    }
    // etcd's word for "to the end of all keys".
    vec![0]
}

/// Reads a key, or those from `key` up to but not including `range_end`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) range_end: Vec<u8>,
    /// Greatest number of keys to return; 0 for all.
    #[prost(int64, tag = "3")]
    pub(crate) limit: i64,
    /// As of which revision; 0 for the present one.
    #[prost(int64, tag = "4")]
    pub(crate) revision: i64,
    #[prost(bool, tag = "8")]
    pub(crate) keys_only: bool,
}

impl RangeRequest {
    /// One key.
    pub(crate) fn key(key: &str) -> Self {
        Self { key: key.into(), ..Self::default() }
    }

    /// All keys with a prefix.
    pub(crate) fn prefix(prefix: &str) -> Self {
        Self { key: prefix.into(), range_end: prefix_end(prefix), ..Self::default() }
    }

    /// The same without values.
    #[must_use]
    pub(crate) fn keys_only(self) -> Self {
        Self { keys_only: true, ..self }
    }
}

/// The answer to [`RangeRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct RangeResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<ResponseHeader>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) kvs: Vec<KeyValue>,
    /// Whether the limit left keys out.
    #[prost(bool, tag = "3")]
    pub(crate) more: bool,
}

/// Writes a key.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) value: Vec<u8>,
    /// The lease with which the key goes; 0 for none.
    #[prost(int64, tag = "3")]
    pub(crate) lease: i64,
}

impl PutRequest {
    /// Of a key that stays until it is removed.
    pub(crate) fn new(key: &str, value: impl Into<Vec<u8>>) -> Self {
        Self { key: key.into(), value: value.into(), lease: 0 }
    }
}

/// The answer to [`PutRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct PutResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<ResponseHeader>,
}

/// Removes a key, or those from `key` up to but not including `range_end`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct DeleteRangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) range_end: Vec<u8>,
}

impl DeleteRangeRequest {
    /// One key.
    pub(crate) fn key(key: &str) -> Self {
        Self::range(key, "")
    }

    /// The keys from the first up to but not including the second.
    pub(crate) fn range(key: &str, end: &str) -> Self {
        Self { key: key.into(), range_end: end.into() }
    }

    /// All keys with a prefix.
    pub(crate) fn prefix(prefix: &str) -> Self {
        Self { key: prefix.into(), range_end: prefix_end(prefix) }
    }
}

/// The answer to [`DeleteRangeRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct DeleteRangeResponse {}

/// How a value of a key compares with one that is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum CompareResult {
    Equal = 0,
    Greater = 1,
    Less = 2,
}

/// Which value of a key is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
enum CompareTarget {
    Version = 0,
    Create = 1,
    Mod = 2,
}

/// The value that is given.
#[derive(Clone, Copy, PartialEq, Eq, prost::Oneof)]
enum Revision {
    #[prost(int64, tag = "5")]
    Create(i64),
    #[prost(int64, tag = "6")]
    Mod(i64),
}

/// A condition of a transaction: on one key, or on each of those up to but not including `range_end`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Compare {
    #[prost(enumeration = "CompareResult", tag = "1")]
    result: i32,
    #[prost(enumeration = "CompareTarget", tag = "2")]
    target: i32,
    #[prost(bytes = "vec", tag = "3")]
    key: Vec<u8>,
    #[prost(oneof = "Revision", tags = "5, 6")]
    revision: Option<Revision>,
    #[prost(bytes = "vec", tag = "64")]
    range_end: Vec<u8>,
}

impl Compare {
    /// The revision of a key's last change.
    pub(crate) fn mod_revision(key: &str, result: CompareResult, revision: i64) -> Self {
        Self::new(key, CompareTarget::Mod, result, Revision::Mod(revision))
    }

    /// The revision at which a key was created; 0 if there is no such key.
    pub(crate) fn create_revision(key: &str, result: CompareResult, revision: i64) -> Self {
        Self::new(key, CompareTarget::Create, result, Revision::Create(revision))
    }

    fn new(key: &str, target: CompareTarget, result: CompareResult, revision: Revision) -> Self {
        Self {
            result: result.into(),
            target: target.into(),
            key: key.into(),
            revision: Some(revision),
            range_end: Vec::new(),
        }
    }

    /// The same of every key that has this one as its prefix.
    #[must_use]
    pub(crate) fn of_prefix(self) -> Self {
        let range_end = prefix_end(&String::from_utf8_lossy(&self.key));
        Self { range_end, ..self }
    }

    /// The same of every key up to but not including this one.
    #[must_use]
    pub(crate) fn up_to(self, end: &str) -> Self {
        Self { range_end: end.into(), ..self }
    }
}

/// A part of a transaction.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct RequestOp {
    #[prost(oneof = "Operation", tags = "1, 2, 3")]
    operation: Option<Operation>,
}

/// What a part of a transaction does.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
enum Operation {
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    #[prost(message, tag = "2")]
    Put(PutRequest),
    #[prost(message, tag = "3")]
    DeleteRange(DeleteRangeRequest),
}

impl From<RangeRequest> for RequestOp {
    fn from(request: RangeRequest) -> Self {
        Self { operation: Some(Operation::Range(request)) }
    }
}

impl From<PutRequest> for RequestOp {
    fn from(request: PutRequest) -> Self {
        Self { operation: Some(Operation::Put(request)) }
    }
}

impl From<DeleteRangeRequest> for RequestOp {
    fn from(request: DeleteRangeRequest) -> Self {
        Self { operation: Some(Operation::DeleteRange(request)) }
    }
}

/// Does `success` if all conditions hold, and else `failure`, all of it at one revision.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    pub(crate) compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) success: Vec<RequestOp>,
    #[prost(message, repeated, tag = "3")]
    pub(crate) failure: Vec<RequestOp>,
}

/// The answer to [`TxnRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct TxnResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) header: Option<ResponseHeader>,
    /// Whether all conditions were true.
    #[prost(bool, tag = "2")]
    pub(crate) succeeded: bool,
    /// The answers to the parts that were done, in their order.
    #[prost(message, repeated, tag = "3")]
    pub(crate) responses: Vec<ResponseOp>,
}

/// The answer to a part of a transaction.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct ResponseOp {
    #[prost(oneof = "OperationResponse", tags = "1, 2, 3")]
    pub(crate) response: Option<OperationResponse>,
}

/// The answer to what a part of a transaction does.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub(crate) enum OperationResponse {
    #[prost(message, tag = "1")]
    Range(RangeResponse),
    #[prost(message, tag = "2")]
    Put(PutResponse),
    #[prost(message, tag = "3")]
    DeleteRange(DeleteRangeResponse),
}

/// Begins a watch on a stream.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct WatchRequest {
    #[prost(message, optional, tag = "1")]
    create_request: Option<WatchCreateRequest>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct WatchCreateRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(int64, tag = "3")]
    start_revision: i64,
}

impl WatchRequest {
    /// Of one key, from a revision on.
    pub(crate) fn new(key: &str, start_revision: i64) -> Self {
        Self { create_request: Some(WatchCreateRequest { key: key.into(), start_revision }) }
    }
}

/// What a watch reports.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct WatchResponse {
    /// Whether this is the last report.
    #[prost(bool, tag = "4")]
    pub(crate) canceled: bool,
    /// The oldest revision that is left, where the watch begins before it; else 0.
    #[prost(int64, tag = "5")]
    pub(crate) compact_revision: i64,
    #[prost(string, tag = "6")]
    pub(crate) cancel_reason: String,
    #[prost(message, repeated, tag = "11")]
    pub(crate) events: Vec<Event>,
}

/// What happened to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum EventType {
    Put = 0,
    Delete = 1,
}

/// A change of a key.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Event {
    #[prost(enumeration = "EventType", tag = "1")]
    pub(crate) r#type: i32,
    #[prost(message, optional, tag = "2")]
    pub(crate) kv: Option<KeyValue>,
}

/// Asks for a lease.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct LeaseGrantRequest {
    /// Seconds after which it ends unless it is extended.
    #[prost(int64, tag = "1")]
    pub(crate) ttl: i64,
}

/// The answer to [`LeaseGrantRequest`].
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct LeaseGrantResponse {
    #[prost(int64, tag = "2")]
    pub(crate) id: i64,
}

/// Extends a lease.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct LeaseKeepAliveRequest {
    #[prost(int64, tag = "1")]
    pub(crate) id: i64,
}

/// The answer to [`LeaseKeepAliveRequest`].
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct LeaseKeepAliveResponse {
    /// Seconds that the lease has; 0 if it has ended.
    #[prost(int64, tag = "3")]
    pub(crate) ttl: i64,
}

/// Asks for a token.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct AuthenticateRequest {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(string, tag = "2")]
    pub(crate) password: String,
}

/// The answer to [`AuthenticateRequest`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct AuthenticateResponse {
    #[prost(string, tag = "2")]
    pub(crate) token: String,
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::{Compare, CompareResult, RangeRequest, TxnRequest, WatchRequest, prefix_end};

    #[test]
    fn a_prefix_ends_before_the_next_key() {
        assert_eq!(prefix_end("/a/"), b"/a0");
        assert_eq!(prefix_end(""), [0]);
    }

    /// Bytes as `protoc --encode=etcdserverpb.…` makes them of the same messages.
    #[test]
    fn messages_have_the_bytes_that_etcd_reads() {
        let range = RangeRequest { limit: 3, ..RangeRequest::prefix("/a/") }.keys_only();
        assert_eq!(range.encode_to_vec(), b"\x0a\x03/a/\x12\x03/a0\x18\x03\x40\x01");
        let compare = Compare::mod_revision("k", CompareResult::Less, 7).up_to("l");
        let txn = TxnRequest { compare: vec![compare], success: vec![RangeRequest::key("k").into()], failure: vec![] };
        let wanted = b"\x0a\x0d\x08\x02\x10\x02\x1a\x01k\x30\x07\x82\x04\x01l\x12\x05\x0a\x03\x0a\x01k";
        assert_eq!(txn.encode_to_vec(), wanted);
        let created = Compare::create_revision("k", CompareResult::Greater, 0);
        assert_eq!(created.encode_to_vec(), b"\x08\x01\x10\x01\x1a\x01k\x28\x00");
        assert_eq!(WatchRequest::new("k", 9).encode_to_vec(), b"\x0a\x05\x0a\x01k\x18\x09");
    }
}
