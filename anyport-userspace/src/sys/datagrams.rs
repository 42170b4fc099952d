//! Datagrams in batches: many with one system call, and joined where the kernel can (UDP GRO, Linux 5.0; UDP GSO,
//! Linux 4.18).

use std::{
    fmt, io, mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
    ptr,
};

use nix::sys::socket::MsgFlags;

/// Datagrams, or groups of joined ones, in a batch.
pub const BATCH: usize = 32;
/// Bytes of the largest datagram, and of a group.
const LARGEST: usize = 65_535;
/// Bytes between the beginnings of two places in the buffer.
const PLACE: usize = 1 << 16;

/// Room for two control messages that hold a number each, aligned as control messages are.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

/// Twice `CMSG_SPACE(sizeof(int))` on all 64-bit machines.
const CONTROL: usize = 48;

/// Bytes of an address of any family.
#[expect(clippy::cast_possible_truncation, reason = "it has 128 bytes")]
const ADDRESS: libc::socklen_t = size_of::<libc::sockaddr_storage>() as libc::socklen_t;

/// The hop limit where the kernel does not tell.
const UNTOLD: u8 = u8::MAX;

/// A batch, and its memory: 2 MiB, of which the kernel gives what is written to.
pub struct Batch {
    memory: Box<[u8]>,
    /// Bytes of what is in each place, and of its parts.
    lengths: [(usize, usize); BATCH],
    /// The hop limit of what is in each place, as far as the kernel tells; the datagrams that it joins have the same.
    hops: [u8; BATCH],
    count: usize,
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("count", &self.count).finish_non_exhaustive()
    }
}

impl Default for Batch {
    fn default() -> Self {
        Self { memory: vec![0; BATCH * PLACE].into(), lengths: [(0, 0); BATCH], hops: [UNTOLD; BATCH], count: 0 }
    }
}

/// What became of a batch that was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Datagrams that the kernel took.
    pub datagrams: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Datagrams that are lost.
    pub lost: u64,
    /// Why the first of them is.
    pub error: Option<i32>,
    /// Datagrams that were not sent, as they have gone round for too long.
    pub looped: u64,
}

impl Sent {
    /// Adds what became of others.
    pub fn add(&mut self, other: Self) {
        self.datagrams += other.datagrams;
        self.bytes += other.bytes;
        self.lost += other.lost;
        self.error = self.error.or(other.error);
        self.looped += other.looped;
    }

    /// Counts one datagram, and what became of it.
    fn count(&mut self, datagram: &[u8], outcome: io::Result<()>) {
        match outcome {
            Ok(()) => {
                self.datagrams += 1;
                self.bytes += datagram.len() as u64;
            }
            Err(error) => {
                self.lost += 1;
                self.error = self.error.or(error.raw_os_error());
            }
        }
    }
}

/// A datagram that came to a socket that is connected to another peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stray {
    /// Where it came from.
    pub source: SocketAddr,
    /// What it says.
    pub bytes: Vec<u8>,
    /// The hop limit, as far as the kernel tells.
    pub hops: u8,
}

impl Batch {
    /// Receives what is there on a socket that is connected to `peer`, without waiting; `WouldBlock` if there is nothing. Returns
    /// how much there was.
    ///
    /// What others have sent goes into `strays`. Where many sockets are bound to one address and port, the kernel takes
    /// microseconds to look through them. It may choose one that is not connected yet, and when it has seen all of them that one is
    /// connected, and counts as found (`__udp4_lib_lookup`, net/ipv4/udp.c, Linux 6.18; seen with thousands of sockets).
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn receive_from(&mut self, socket: impl AsFd, peer: SocketAddr, strays: &mut Vec<Stray>) -> io::Result<usize> {
        // SAFETY: an address of zeros is one of no family.
        let mut names: [libc::sockaddr_storage; BATCH] = unsafe { mem::zeroed() };
        let count = self.receive_named(socket, Some(&mut names))?;
        for at in (0..count).rev() {
            let Some(source) = address(&names[at]) else { continue };
            if (source.ip(), source.port()) != (peer.ip(), peer.port()) {
                let hops = self.hops[at];
                strays.extend(self.datagrams_of(at, at + 1).map(|it| Stray { source, bytes: it.to_vec(), hops }));
                self.leave_out(at);
            }
        }
        Ok(count)
    }

    /// Puts what is in the last place into this one.
    fn leave_out(&mut self, at: usize) {
        self.count -= 1;
        let last = self.count;
        let length = self.lengths[last].0;
        self.memory.copy_within(last * PLACE..last * PLACE + length, at * PLACE);
        (self.lengths[at], self.hops[at]) = (self.lengths[last], self.hops[last]);
    }

    /// Receives what is there on a socket, without waiting; `WouldBlock` if there is nothing.
    ///
    /// # Errors
    /// The kernel's, such as `ECONNREFUSED` where the peer of a connected socket has answered by ICMP.
    pub fn receive(&mut self, socket: impl AsFd) -> io::Result<usize> {
        self.receive_named(socket, None)
    }

    fn receive_named(
        &mut self,
        socket: impl AsFd,
        names: Option<&mut [libc::sockaddr_storage; BATCH]>,
    ) -> io::Result<usize> {
        let mut controls = [Control([0; CONTROL]); BATCH];
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: LARGEST }; BATCH];
        // SAFETY: a header of zeros says that there is no name, no buffer and no control message.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        let places = self.memory.chunks_exact_mut(PLACE);
        for (((header, part), control), place) in headers.iter_mut().zip(&mut parts).zip(&mut controls).zip(places) {
            part.iov_base = place.as_mut_ptr().cast();
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = CONTROL;
        }
        for (header, name) in headers.iter_mut().zip(names.into_iter().flatten()) {
            header.msg_hdr.msg_name = ptr::from_mut(name).cast();
            header.msg_hdr.msg_namelen = ADDRESS;
        }
        self.count = 0;
        // SAFETY: every header points to buffers that are as long as it says and outlive the call.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                headers.as_mut_ptr(),
                libc::c_uint::try_from(BATCH).unwrap_or(0),
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        self.count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for ((header, length), hops) in headers.iter().zip(&mut self.lengths).zip(&mut self.hops).take(self.count) {
            let all = (header.msg_len as usize).min(LARGEST);
            let told = told(&header.msg_hdr);
            *length = (all, told.segment.filter(|part| *part > 0).unwrap_or(all));
            *hops = told.hops.unwrap_or(UNTOLD);
        }
        Ok(self.count)
    }

    /// Puts one datagram, which came with this hop limit, into an empty batch, to be sent. Bytes beyond the largest datagram are
    /// left out.
    pub fn put(&mut self, datagram: &[u8], hops: u8) {
        let length = datagram.len().min(LARGEST);
        self.memory[..length].copy_from_slice(&datagram[..length]);
        self.lengths[0] = (length, length);
        self.hops[0] = hops;
        self.count = 1;
    }

    /// Each datagram of the batch.
    pub fn datagrams(&self) -> impl Iterator<Item = &[u8]> {
        self.datagrams_of(0, self.count)
    }

    /// Each datagram of the places from `begin` to before `end`.
    fn datagrams_of(&self, begin: usize, end: usize) -> impl Iterator<Item = &[u8]> {
        let places = self.memory.chunks_exact(PLACE).zip(&self.lengths).take(end).skip(begin);
        places.flat_map(|(place, (all, part))| {
            let empty = (*all == 0).then_some(&place[..0]);
            empty.into_iter().chain(place[..*all].chunks((*part).max(1)))
        })
    }

    /// Sends the batch over a connected socket, without waiting: what the kernel does not take now is lost, as
    /// datagrams may be.
    pub fn send(&self, socket: impl AsFd) -> Sent {
        self.send_places(socket, 0, self.count)
    }

    /// Has `send` take the places, those together that came with the same hop limit, which it is told.
    pub fn by_hops(&self, mut send: impl FnMut(u8, Part<'_>) -> Sent) -> Sent {
        let mut sent = Sent::default();
        let mut begin = 0;
        for run in self.hops[..self.count].chunk_by(u8::eq) {
            let part = Part { batch: self, begin, end: begin + run.len() };
            begin = part.end;
            sent.add(send(run[0], part));
        }
        sent
    }

    fn send_places(&self, socket: impl AsFd, begin: usize, end: usize) -> Sent {
        let mut controls = [Control([0; CONTROL]); BATCH];
        let mut parts = [libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 }; BATCH];
        // SAFETY: as in `receive`.
        let mut headers: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
        let places = self.memory.chunks_exact(PLACE).zip(&self.lengths).take(self.count);
        for (((header, io), control), (place, (all, part))) in
            headers.iter_mut().zip(&mut parts).zip(&mut controls).zip(places)
        {
            // The kernel only reads what is to be sent.
            *io = libc::iovec { iov_base: place.as_ptr().cast_mut().cast(), iov_len: *all };
            header.msg_hdr.msg_iov = io;
            header.msg_hdr.msg_iovlen = 1;
            if part < all {
                set_segment(&mut header.msg_hdr, control, *part);
            }
        }
        let mut sent = Sent::default();
        let mut at = begin;
        while at < end {
            let rest = &mut headers[at..end];
            // SAFETY: as in `receive`.
            let count = unsafe {
                libc::sendmmsg(
                    socket.as_fd().as_raw_fd(),
                    rest.as_mut_ptr(),
                    libc::c_uint::try_from(rest.len()).unwrap_or(0),
                    libc::MSG_DONTWAIT,
                )
            };
            let taken = usize::try_from(count).unwrap_or(0);
            for (all, part) in &self.lengths[at..at + taken] {
                sent.datagrams += datagrams(*all, *part);
                sent.bytes += *all as u64;
            }
            at += taken;
            if taken == 0 {
                let error = io::Error::last_os_error();
                self.send_parts(socket.as_fd(), at, &error, &mut sent);
                // One that is too large, or an error that was pending, says nothing about the next.
                at += 1;
            }
        }
        sent
    }

    /// Sends what is in a place by itself, after the whole was refused: the kernel divides nothing into parts that are too
    /// large for the way, but it fragments those that come alone.
    fn send_parts(&self, socket: BorrowedFd<'_>, at: usize, error: &io::Error, sent: &mut Sent) {
        let (all, part) = self.lengths[at];
        if part == all || error.kind() == io::ErrorKind::WouldBlock {
            sent.error = sent.error.or(error.raw_os_error());
            sent.lost += datagrams(all, part);
            return;
        }
        for datagram in self.memory[at * PLACE..][..all].chunks(part) {
            let outcome = nix::sys::socket::send(socket.as_raw_fd(), datagram, MsgFlags::MSG_DONTWAIT);
            sent.count(datagram, outcome.map(drop).map_err(Into::into));
        }
    }

    /// Has each datagram sent by itself.
    pub fn send_each(&self, send: impl FnMut(&[u8]) -> io::Result<()>) -> Sent {
        Part { batch: self, begin: 0, end: self.count }.send_each(send)
    }
}

/// Some places of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Part<'batch> {
    batch: &'batch Batch,
    begin: usize,
    end: usize,
}

impl Part<'_> {
    /// As [`Batch::send`].
    pub fn send(self, socket: impl AsFd) -> Sent {
        self.batch.send_places(socket, self.begin, self.end)
    }

    /// As [`Batch::send_each`].
    pub fn send_each(self, mut send: impl FnMut(&[u8]) -> io::Result<()>) -> Sent {
        let mut sent = Sent::default();
        for datagram in self.batch.datagrams_of(self.begin, self.end) {
            sent.count(datagram, send(datagram));
        }
        sent
    }

    /// None of it is sent, as it has gone round for too long.
    pub fn looped(self) -> Sent {
        Sent { looped: self.batch.datagrams_of(self.begin, self.end).count() as u64, ..Sent::default() }
    }
}

/// How many datagrams there are in a place.
fn datagrams(all: usize, part: usize) -> u64 {
    all.div_ceil(part.max(1)).max(1) as u64
}

/// What the kernel tells about what is in a place.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    /// Bytes of each part of joined datagrams.
    segment: Option<usize>,
    /// The hop limit.
    hops: Option<u8>,
}

/// The address that the kernel has written there, if it has.
fn address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let name = ptr::from_ref(name);
    // SAFETY: the place is as long as an address of any family and aligned for it, and each consists of numbers only.
    unsafe {
        match libc::c_int::from((*name).ss_family) {
            libc::AF_INET => {
                let v4 = name.cast::<libc::sockaddr_in>().read();
                Some((Ipv4Addr::from_bits(u32::from_be(v4.sin_addr.s_addr)), u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                let v6 = name.cast::<libc::sockaddr_in6>().read();
                Some((Ipv6Addr::from(v6.sin6_addr.s6_addr), u16::from_be(v6.sin6_port)).into())
            }
            _ => None,
        }
    }
}

fn told(header: &libc::msghdr) -> Told {
    let mut told = Told::default();
    // SAFETY: the header is one that `recvmmsg` has filled in, and its buffer of control messages is still there.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header).as_ref() };
    while let Some(control) = next {
        // SAFETY: a control message of the types below holds an `int` (`udp_cmsg_recv`, include/linux/udp.h; ip(7), ipv6(7)),
        // and there is room for one in any case.
        let number = unsafe { libc::CMSG_DATA(control).cast::<libc::c_int>().read_unaligned() };
        match (control.cmsg_level, control.cmsg_type) {
            (libc::SOL_UDP, libc::UDP_GRO) => told.segment = usize::try_from(number).ok(),
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                told.hops = u8::try_from(number).ok();
            }
            _ => {}
        }
        // SAFETY: as for the first one.
        next = unsafe { libc::CMSG_NXTHDR(header, control).as_ref() };
    }
    told
}

/// Has the kernel divide what a header sends into parts.
fn set_segment(header: &mut libc::msghdr, control: &mut Control, part: usize) {
    /// Of the `u16` that `UDP_SEGMENT` takes.
    const LENGTH: libc::c_uint = 2;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    // SAFETY: the header has room for one control message, as `Control` is long and aligned enough for an `int`.
    unsafe {
        let first = &mut *libc::CMSG_FIRSTHDR(header);
        first.cmsg_level = libc::SOL_UDP;
        first.cmsg_type = libc::UDP_SEGMENT;
        first.cmsg_len = libc::CMSG_LEN(LENGTH) as usize;
        libc::CMSG_DATA(first).cast::<u16>().write_unaligned(u16::try_from(part).unwrap_or(u16::MAX));
        header.msg_controllen = libc::CMSG_SPACE(LENGTH) as usize;
    }
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsRawFd as _, time::Duration};

    use nix::sys::socket::{setsockopt, sockopt};

    use super::{BATCH, Batch, Sent};

    fn pair(local: &str) -> (UdpSocket, UdpSocket) {
        let (one, other) = (UdpSocket::bind(local).unwrap(), UdpSocket::bind(local).unwrap());
        one.connect(other.local_addr().unwrap()).unwrap();
        other.connect(one.local_addr().unwrap()).unwrap();
        for socket in [&one, &other] {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        }
        (one, other)
    }

    #[test]
    fn many_go_from_socket_to_socket() {
        let (client, here) = pair("127.0.0.1:0");
        let (there, server) = pair("[::1]:0");
        let mut batch = Batch::default();
        let long = vec![7; 60_000];
        let all: Vec<&[u8]> = vec![b"one", b"", b"three", &long];
        for datagram in &all {
            client.send(datagram).unwrap();
        }
        assert_eq!(batch.receive(&here).unwrap(), 4);
        assert_eq!(batch.datagrams().collect::<Vec<_>>(), all);
        assert_eq!(batch.send(&there), Sent { datagrams: 4, bytes: 60_008, ..Sent::default() });
        let mut buffer = vec![0; 65_536];
        for datagram in &all {
            let length = server.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], *datagram);
        }
        assert_eq!(batch.receive(&here).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        assert_eq!(batch.datagrams().count(), 0);
        for _ in 0..2 * BATCH {
            client.send(b"x").unwrap();
        }
        assert_eq!((batch.receive(&here).unwrap(), batch.receive(&here).unwrap()), (BATCH, BATCH));
    }

    /// What one side joins the other one divides again.
    #[test]
    fn what_others_have_sent_comes_apart() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let socket = UdpSocket::bind(local).unwrap();
            let to = socket.local_addr().unwrap();
            let [peer, other] = [(); 2].map(|()| UdpSocket::bind(local).unwrap());
            // As if it had been connected after they had come.
            for (number, sender) in [&other, &peer, &peer, &other, &peer].into_iter().enumerate() {
                sender.send_to(&[u8::try_from(number).unwrap()], to).unwrap();
            }
            let (peer, other) = (peer.local_addr().unwrap(), other.local_addr().unwrap());
            socket.connect(peer).unwrap();
            let (mut batch, mut strays) = (Batch::default(), Vec::new());
            assert_eq!(batch.receive_from(&socket, peer, &mut strays).unwrap(), 5);
            let mut received: Vec<u8> = batch.datagrams().map(|it| it[0]).collect();
            received.sort_unstable();
            assert_eq!(received, [1, 2, 4]);
            let mut apart: Vec<u8> = strays.iter().map(|it| it.bytes[0]).collect();
            apart.sort_unstable();
            assert!(apart == [0, 3] && strays.iter().all(|it| it.source == other), "{strays:?}");
        }
    }

    #[test]
    fn joined_ones_stay_joined() {
        let (client, here) = pair("127.0.0.1:0");
        let (there, server) = pair("127.0.0.1:0");
        setsockopt(&client, sockopt::UdpGsoSegment, &1000).unwrap();
        setsockopt(&here, sockopt::UdpGroSegment, &true).unwrap();
        let bytes: Vec<u8> = (0..10_500_u32).map(|it| (it % 251) as u8).collect();
        client.send(&bytes).unwrap();
        let mut batch = Batch::default();
        assert_eq!(batch.receive(&here).unwrap(), 1);
        assert_eq!(batch.datagrams().count(), 11);
        assert_eq!(batch.send(&there), Sent { datagrams: 11, bytes: 10_500, ..Sent::default() });
        let mut buffer = [0; 2000];
        for part in bytes.chunks(1000) {
            let length = server.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], part);
        }
    }

    /// Without joining, where the whole is refused.
    #[test]
    fn parts_go_alone_where_they_do_not_go_together() {
        let (client, here) = pair("127.0.0.1:0");
        let (there, server) = pair("127.0.0.1:0");
        setsockopt(&client, sockopt::UdpGsoSegment, &1000).unwrap();
        setsockopt(&here, sockopt::UdpGroSegment, &true).unwrap();
        let yes: libc::c_int = 1;
        // The kernel divides nothing that is to have no checksum.
        // SAFETY: the option's value is a number of that length.
        let failed = unsafe {
            libc::setsockopt(there.as_raw_fd(), libc::SOL_SOCKET, libc::SO_NO_CHECK, (&raw const yes).cast(), 4)
        };
        assert_eq!(failed, 0);
        client.send(&[7; 2500]).unwrap();
        let mut batch = Batch::default();
        assert_eq!(batch.receive(&here).unwrap(), 1);
        assert_eq!(batch.send(&there), Sent { datagrams: 3, bytes: 2500, ..Sent::default() });
        let mut buffer = vec![0; 65_536];
        let lengths: Vec<usize> = (0..3).map(|_| server.recv(&mut buffer).unwrap()).collect();
        assert_eq!(lengths, [1000, 1000, 500]);
    }

    #[test]
    fn what_is_not_taken_is_told() {
        let (client, here) = pair("[::1]:0");
        let (there, server) = pair("127.0.0.1:0");
        let (first, long) = (b"first", vec![7; 65_520]);
        client.send(first).unwrap();
        client.send(&long).unwrap();
        client.send(first).unwrap();
        let mut batch = Batch::default();
        assert_eq!(batch.receive(&here).unwrap(), 3);
        assert_eq!(
            batch.send(&there),
            Sent { datagrams: 2, bytes: 10, lost: 1, error: Some(libc::EMSGSIZE), looped: 0 }
        );
        let mut buffer = [0; 9];
        assert_eq!((server.recv(&mut buffer).unwrap(), server.recv(&mut buffer).unwrap()), (5, 5));
        batch.put(b"alone", 64);
        assert_eq!(batch.datagrams().collect::<Vec<_>>(), [b"alone"]);
    }
}
