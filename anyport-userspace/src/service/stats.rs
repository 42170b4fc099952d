//! What services count.

use std::ops::AddAssign;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    counts::{Count, Traffic},
    histogram::Times,
    limits::Refusals,
};

/// What became of the connections and datagrams of a service since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ServiceStats {
    /// Connections that are open now.
    pub active: u64,
    /// Connections accepted, those that were then refused included.
    pub accepted: u64,
    /// Failed attempts to accept.
    pub accept_errors: u64,
    /// Connections and flows refused: the daemon had as many as it may have.
    pub refused_total: u64,
    /// Connections and flows refused: the service had as many as it may have.
    pub refused_service: u64,
    /// Connections and flows refused: their source had as many as it may have.
    pub refused_source: u64,
    /// Connections and flows refused: their source came faster than it may.
    pub refused_rate: u64,
    /// Connections and datagrams refused since the service does not take their source: packets, where the back end sees to that.
    pub denied: u64,
    /// Connections closed since their peer had to send a PROXY header and did not.
    pub bad_headers: u64,
    /// Connections closed, and datagrams lost, since no upstream took them.
    pub unforwarded: u64,
    /// Bytes of clients, without headers: of datagrams, and of connections, each of which may lack the last MiB while it is open.
    pub bytes_from_clients: u64,
    /// Bytes for clients, likewise.
    pub bytes_to_clients: u64,
    /// Datagrams received.
    pub datagrams: u64,
    /// Datagrams answered.
    pub answered: u64,
    /// Not answered or forwarded: the source is steered itself, or is the very destination; or the hop limit is used up.
    pub refused_loop: u64,
    /// Not answered: the source seems to be a service that answers what it is answered.
    pub refused_conversation: u64,
    /// Answers of owners that were not sent: no client has asked for them lately, or they were more than their multiple.
    pub refused_unsolicited: u64,
    /// Not answered: the answer would be too large for the question.
    pub refused_size: u64,
    /// Not answered: to a group of hosts (broadcast, multicast), from port 0, cut off, or without a known destination; and
    /// answers that an owner wanted to be sent from what is not steered to the service.
    pub unanswerable: u64,
    /// Not answered: the destination could not be taken as source, or the kernel would not send.
    pub unsent: u64,
    /// Datagrams, at least, that the kernel gave to a socket meant for answers, and so were lost.
    pub strayed: u64,
    /// Flows of datagrams that were forwarded.
    pub flows: u64,
    /// Flows that had to go for others.
    pub evicted: u64,
    /// Attempts to connect that the kernel dropped, mostly since the queue of those that wait to be accepted was full.
    pub listen_drops: u64,
    /// Datagrams that the kernel dropped since the buffer of those that wait was full.
    pub receive_drops: u64,
}

/// Adds the fields of a structure, all of which are named, to those of another.
macro_rules! add_all {
    ($from:expr => $to:ident: $($field:ident),+ $(,)?) => {
        let Self { $($field),+ } = $from;
        $($to.$field += $field;)+
    };
}

impl AddAssign for ServiceStats {
    fn add_assign(&mut self, other: Self) {
        add_all! {
            other => self: active, accepted, accept_errors, refused_total, refused_service, refused_source, refused_rate, denied,
            bad_headers, unforwarded, bytes_from_clients, bytes_to_clients, datagrams, answered, refused_loop,
            refused_conversation, refused_unsolicited, refused_size, unanswerable, unsent, strayed, flows, evicted,
            listen_drops, receive_drops,
        }
    }
}

/// What a worker counts for one listening socket. Aligned so that workers share no cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct TcpCounts {
    pub(super) accepted: Count,
    /// Of the accepted ones, those that were let in.
    pub(super) served: Count,
    /// Of the served ones, those that are over.
    pub(super) ended: Count,
    pub(super) refused: Refusals,
    pub(super) accept_errors: Count,
    pub(super) bad_headers: Count,
    pub(super) unforwarded: Count,
    pub(super) traffic: Traffic,
    pub(super) times: Times,
}

/// What a worker counts for one UDP socket. Aligned so that workers share no cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct UdpCounts {
    pub(super) datagrams: Count,
    pub(super) answered: Count,
    pub(super) refused_loop: Count,
    pub(super) refused_conversation: Count,
    pub(super) refused_unsolicited: Count,
    pub(super) refused_size: Count,
    pub(super) unanswerable: Count,
    pub(super) unsent: Count,
    pub(super) strayed: Count,
    pub(super) unforwarded: Count,
    pub(super) flows: Count,
    pub(super) evicted: Count,
    pub(super) refused: Refusals,
    pub(super) traffic: Traffic,
}

impl UdpCounts {
    /// A datagram was answered.
    pub(super) fn note_answer(&self, answer: &[u8]) {
        self.answered.raise();
        self.traffic.add(0, answer.len() as u64);
    }
}

impl ServiceStats {
    /// Connections and flows that were over a limit.
    pub fn refused(&self) -> u64 {
        self.refused_total + self.refused_service + self.refused_source + self.refused_rate
    }

    fn add_refusals(&mut self, Refusals { total, service, source, rate, denied }: &Refusals) {
        self.refused_total += total.get();
        self.refused_service += service.get();
        self.refused_source += source.get();
        self.refused_rate += rate.get();
        self.denied += denied.get();
    }

    fn add_traffic(&mut self, Traffic { from_client, to_client }: &Traffic) {
        self.bytes_from_clients += from_client.get();
        self.bytes_to_clients += to_client.get();
    }

    pub(super) fn add_tcp(&mut self, counts: &TcpCounts) {
        let TcpCounts { accepted, served, ended, refused, accept_errors, bad_headers, unforwarded, traffic, times: _ } =
            counts;
        // Not read at one moment, so one that comes and goes in between must not make it negative.
        self.active += served.get().saturating_sub(ended.get());
        self.accepted += accepted.get();
        self.add_refusals(refused);
        self.add_traffic(traffic);
        self.accept_errors += accept_errors.get();
        self.bad_headers += bad_headers.get();
        self.unforwarded += unforwarded.get();
    }

    pub(super) fn add_udp(&mut self, counts: &UdpCounts) {
        let UdpCounts {
            datagrams,
            answered,
            refused_loop,
            refused_conversation,
            refused_unsolicited,
            refused_size,
            unanswerable,
            unsent,
            strayed,
            unforwarded,
            flows,
            evicted,
            refused,
            traffic,
        } = counts;
        self.add_refusals(refused);
        self.add_traffic(traffic);
        self.datagrams += datagrams.get();
        self.answered += answered.get();
        self.refused_loop += refused_loop.get();
        self.refused_conversation += refused_conversation.get();
        self.refused_unsolicited += refused_unsolicited.get();
        self.refused_size += refused_size.get();
        self.unanswerable += unanswerable.get();
        self.unsent += unsent.get();
        self.strayed += strayed.get();
        self.unforwarded += unforwarded.get();
        self.flows += flows.get();
        self.evicted += evicted.get();
    }
}
