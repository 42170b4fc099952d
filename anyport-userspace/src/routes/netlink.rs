//! The socket on which routes are changed and listed, many at a time.

use std::{fmt, os::fd::AsRawFd as _};

use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::{
    errno::Errno,
    sys::socket::{
        MsgFlags, getsockopt, recv, send, setsockopt,
        sockopt::{RcvBuf, RcvBufForce, SndBuf},
    },
};

use super::wire::{
    Attributes, Change, LONGEST_REQUEST, Lookup, Message, RouteHeader, destination, interface, messages, put_change,
    put_lookup, put_query,
};
use crate::{privileges, rules::Prefix};

/// Requests that are sent at once, if the socket's buffers allow it. The kernel takes its lock on all network configuration
/// for each request and releases it after that, so that others get theirs between them.
const BATCH: usize = 1_000;

/// What a refusal takes of the receive buffer at most, with all that the kernel counts in.
const REFUSAL: usize = 2_048;

/// The kernel puts no more than 32 KiB into a datagram of a list.
const LONGEST_DATAGRAM: usize = 1 << 16;

/// A blocking socket: a request is carried out while it is being sent, by the thread that sends it.
pub(super) struct Netlink {
    socket: Socket,
    /// By this number the kernel marks what is done through this socket.
    pub(super) port: u32,
    sequence: u32,
    batch: usize,
    requests: Vec<u8>,
    answers: Vec<u8>,
}

/// A route that was asked for.
pub(super) struct Found {
    pub(super) block: Prefix,
    pub(super) route: RouteHeader,
    /// By which packets leave.
    pub(super) interface: Option<u32>,
}

impl Netlink {
    pub(super) fn open() -> anyhow::Result<Self> {
        // The kernel checks who opened a socket, and who sends over it.
        let _raised = privileges::raise(privileges::NET_ADMIN);
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let port = socket.bind_auto()?.port_number();
        // What makes the kernel filter lists by table and type: a router may hold a million routes.
        socket.set_netlink_get_strict_chk(true)?;
        // A refusal need not repeat the request.
        socket.set_cap_ack(true)?;
        // All requests of a batch may be refused, and no answer must be lost. Without the right to a large buffer,
        // which comes with the right to change routes, the batches are smaller.
        let _ = setsockopt(&socket, RcvBufForce, &(BATCH * REFUSAL));
        let by_answers = getsockopt(&socket, RcvBuf)? / REFUSAL;
        let by_requests = getsockopt(&socket, SndBuf)? / 2 / LONGEST_REQUEST;
        let batch = BATCH.min(by_answers).min(by_requests).max(1);
        Ok(Self { socket, port, sequence: 0, batch, requests: Vec::new(), answers: vec![0; LONGEST_DATAGRAM] })
    }

    /// Makes the same change for each of the prefixes, in an order of its own, and hands over those to which the
    /// kernel says no. Ends with the batch in which `refused` gives an error.
    pub(super) fn change(
        &mut self,
        change: Change,
        prefixes: &[Prefix],
        mut refused: impl FnMut(&Prefix, Errno) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for batch in scattered(prefixes).chunks(self.batch) {
            let first = self.sequence;
            self.requests.clear();
            for (i, prefix) in batch.iter().enumerate() {
                let acknowledged = i + 1 == batch.len();
                put_change(&mut self.requests, change, prefix, self.sequence, acknowledged);
                self.sequence = self.sequence.wrapping_add(1);
            }
            self.send()?;
            let mut result = Ok(());
            let mut answered = false;
            while !answered {
                for (sequence, message) in messages(receive(&self.socket, &mut self.answers)?) {
                    let place = sequence.wrapping_sub(first) as usize;
                    let (Some(prefix), Message::Outcome(outcome)) = (batch.get(place), message) else { continue };
                    if let Err(errno) = outcome {
                        result = result.and_then(|()| refused(prefix, errno));
                    }
                    // The kernel goes through a batch in order.
                    answered = place + 1 == batch.len();
                }
            }
            result?;
        }
        Ok(())
    }

    /// Hands over the routes that have the family, the table, the type and the protocol of `like`, where it has them.
    pub(super) fn list(
        &mut self,
        like: &RouteHeader,
        mut found: impl FnMut(&RouteHeader, Attributes<'_>),
    ) -> Result<(), Errno> {
        let query = self.sequence;
        self.sequence = self.sequence.wrapping_add(1);
        self.requests.clear();
        put_query(&mut self.requests, like, query);
        self.send()?;
        loop {
            for (sequence, message) in messages(receive(&self.socket, &mut self.answers)?) {
                match message {
                    _ if sequence != query => {}
                    // A kernel without IPv6 answers with the routes of the families that it has.
                    Message::Route(route, attributes) if route.family == like.family => found(&route, attributes),
                    // The table comes into being with its first route.
                    Message::Outcome(Err(Errno::ENOENT)) | Message::End(Err(Errno::ENOENT)) => return Ok(()),
                    Message::Outcome(outcome) | Message::End(outcome) => return outcome,
                    Message::Route(..) | Message::Other => {}
                }
            }
        }
    }

    /// The route that a packet takes, or why it takes none.
    pub(super) fn find(&mut self, lookup: Lookup) -> Result<Result<Found, Errno>, Errno> {
        let query = self.sequence;
        self.sequence = self.sequence.wrapping_add(1);
        self.requests.clear();
        put_lookup(&mut self.requests, &lookup, query);
        self.send()?;
        loop {
            for (sequence, message) in messages(receive(&self.socket, &mut self.answers)?) {
                match message {
                    Message::Route(route, attributes) if sequence == query => {
                        let interface = interface(attributes.clone());
                        let block = destination(&route, attributes).ok_or(Errno::EBADMSG)?;
                        return Ok(Ok(Found { block, route, interface }));
                    }
                    // The answers of routes of the types unreachable, prohibit and blackhole, too.
                    Message::Outcome(Err(
                        why @ (Errno::ENETUNREACH
                        | Errno::EHOSTUNREACH
                        | Errno::EACCES
                        | Errno::EINVAL
                        | Errno::EAFNOSUPPORT
                        // The source does not belong to the interface (rp_filter).
                        | Errno::EXDEV),
                    )) if sequence == query => return Ok(Err(why)),
                    Message::Outcome(Err(errno)) if sequence == query => return Err(errno),
                    _ => {}
                }
            }
        }
    }

    fn send(&self) -> Result<(), Errno> {
        let _raised = privileges::raise(privileges::NET_ADMIN);
        loop {
            match send(self.socket.as_raw_fd(), &self.requests, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                result => return result.map(drop),
            }
        }
    }
}

impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// The prefixes in the order in which they are changed fastest, if they come in order of address.
///
/// The kernel holds IPv4 routes in a trie whose nodes it resizes by how full they are (`net/ipv4/fib_trie.c`). Removals
/// in order of address keep it busy with that: 39 to 90 s for a million single addresses. The order here is that of the
/// numbers from zero with their bits reversed, which thins out everywhere alike, and takes 2 s. The tree of the IPv6
/// routes is fastest in order.
fn scattered(prefixes: &[Prefix]) -> Vec<Prefix> {
    let (v4, v6): (Vec<Prefix>, Vec<Prefix>) = prefixes.iter().partition(|prefix| prefix.is_ipv4());
    let numbers = v4.len().next_power_of_two();
    let unused = usize::BITS - numbers.trailing_zeros();
    let places = (0..numbers).map(|i| i.reverse_bits().checked_shr(unused).unwrap_or(0));
    places.filter_map(|place| v4.get(place).copied()).chain(v6).collect()
}

/// The next datagram. That an answer was lost is an error, `ENOBUFS`.
fn receive<'a>(socket: &Socket, buffer: &'a mut [u8]) -> Result<&'a [u8], Errno> {
    loop {
        match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => {}
            result => return result.map(|length| &buffer[..length]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scatters_ipv4_and_nothing_is_lost() {
        let host = |is_ipv4, last| Prefix::from_bits(is_ipv4, last, if is_ipv4 { 32 } else { 128 });
        for (count, order) in [(0, &[][..]), (1, &[0]), (2, &[0, 1]), (6, &[0, 4, 2, 1, 5, 3])] {
            let of_family = |is_ipv4| (0..count).map(move |i| host(is_ipv4, i));
            let prefixes: Vec<Prefix> = of_family(true).chain(of_family(false)).collect();
            let expected: Vec<Prefix> = order.iter().map(|i| host(true, *i)).chain(of_family(false)).collect();
            assert_eq!(scattered(&prefixes), expected);
        }
    }
}
