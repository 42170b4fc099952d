//! Lists that the kernel hands out over netlink.

use std::{fmt::Debug, os::fd::AsRawFd as _};

use anyhow::bail;
use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::Socket;
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, send},
};

/// The kernel puts no more than 32 KiB into a datagram of a list.
const LONGEST_DATAGRAM: usize = 1 << 16;

/// Asks for a list in the thread's network namespace, and hands over its messages.
///
/// # Errors
/// The kernel refuses, or its answer can't be read.
pub(super) fn dump<M>(protocol: isize, request: M, mut found: impl FnMut(M)) -> anyhow::Result<()>
where
    M: NetlinkSerializable + NetlinkDeserializable + Debug,
    NetlinkPayload<M>: From<M>,
{
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, request.into());
    message.finalize();
    let mut buffer = vec![0; LONGEST_DATAGRAM];
    message.serialize(&mut buffer);
    send(socket.as_raw_fd(), &buffer[..message.buffer_len()], MsgFlags::empty())?;
    loop {
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => continue,
            length => length?,
        };
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let message = NetlinkMessage::<M>::deserialize(rest)?;
            match message.payload {
                NetlinkPayload::InnerMessage(message) => found(message),
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io().into()),
                NetlinkPayload::Overrun(_) => bail!("the kernel's answer was lost"),
                _ => {}
            }
            // Messages begin at multiples of four bytes.
            let end = (message.header.length as usize).next_multiple_of(4).clamp(1, rest.len());
            rest = &rest[end..];
        }
    }
}
