//! One message in each direction: JSON, and descriptors with the request.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::{Result, retry_on_intr},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recvmsg, sendmsg,
    },
};

/// Bytes of the largest request, and of the largest answer.
pub(crate) const MAX_MESSAGE: usize = 16 << 10;
/// `SCM_MAX_FD`: the kernel takes no more descriptors with a message.
pub(crate) const MAX_DESCRIPTORS: usize = 253;

/// A message that has arrived.
#[derive(Debug)]
#[cfg_attr(not(feature = "daemon"), expect(dead_code, reason = "only the daemon is sent descriptors"))]
pub(crate) struct Message {
    pub(crate) text: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
    /// Whether there was more than fits.
    pub(crate) is_cut_off: bool,
}

/// Takes a message from a socket; an empty one if the other side has closed it.
pub(crate) fn receive(socket: impl AsFd) -> Result<Message> {
    let mut text = vec![0; MAX_MESSAGE];
    let (length, descriptors, is_cut_off) = receive_into(socket, &mut text)?;
    text.truncate(length);
    Ok(Message { text, descriptors, is_cut_off })
}

/// The same, into a buffer: how many bytes came, the descriptors with them, and whether there was more than fits.
pub(crate) fn receive_into(socket: impl AsFd, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    // With a time limit the kernel does not begin again by itself, such as after the process was stopped.
    let received =
        retry_on_intr(|| recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC))?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    let is_cut_off = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
    Ok((received.bytes, descriptors, is_cut_off))
}

/// Puts a message into a socket.
pub(crate) fn put(socket: impl AsFd, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(rustix::io::Errno::TOOMANYREFS);
    }
    retry_on_intr(|| sendmsg(&socket, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)).map(drop)
}
