//! What others do to interfaces, to `lo`, and to our routes, as the kernel reports it.

use std::{future::pending, io::ErrorKind, os::fd::AsRawFd as _};

use anyhow::Context as _;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::socket::{MsgFlags, recv};
use socket2::{SockFilter, SockRef};
use tokio::io::unix::AsyncFd;

use super::{LOOPBACK_INDEX, ROUTE_PROTOCOL, wire};
use crate::sys;

/// Of `linux/rtnetlink.h`: the groups in which the kernel reports interfaces, addresses and routes.
const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];

/// What has happened since the last check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// An interface appeared, changed or went.
    pub of_interfaces: bool,
    /// Routes of ours may be gone.
    pub of_routes: bool,
}

/// A socket on which the kernel reports changes.
///
/// It lets only that through which matters: interfaces, addresses of `lo`, and routes of ours that others delete. So a
/// change of our own, or a router with a million routes, costs next to nothing here.
#[derive(Debug)]
pub struct Watch {
    socket: AsyncFd<Socket>,
}

impl Watch {
    /// Listens in the thread's network namespace, to what is not done through the netlink socket with this port. Must be
    /// called within a tokio runtime.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn open(own_port: u32) -> anyhow::Result<Self> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind(&SocketAddr::new(0, 0))?;
            SockRef::from(&socket).attach_filter(&filter(own_port))?;
            for group in GROUPS {
                socket.add_membership(group)?;
            }
            socket.set_non_blocking(true)?;
            sys::watch_readable(socket)
        };
        let socket = open().context("opening a netlink socket for news of interfaces and routes")?;
        Ok(Self { socket })
    }

    /// What has happened, as soon as something has.
    pub async fn next(&self) -> News {
        let mut news = News::default();
        let mut buffer = [0; 4096];
        loop {
            let Ok(mut guard) = self.socket.readable().await else {
                // The runtime is about to end.
                return pending().await;
            };
            while let Ok(received) =
                guard.try_io(|socket| Ok(recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?))
            {
                match received {
                    Ok(length) => wire::news(&buffer[..length], &mut news),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    // Some were lost (ENOBUFS).
                    Err(_) => return News { of_interfaces: true, of_routes: true },
                }
            }
            if news != News::default() {
                return news;
            }
        }
    }
}

/// A program of classic BPF, which the kernel runs on each message (`sk_filter` in `do_one_broadcast`). Numbers are loaded as
/// big-endian ones.
fn filter(own_port: u32) -> [SockFilter; 15] {
    const LOAD_WORD: u16 = 0x20;
    const LOAD_HALF: u16 = 0x28;
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    // `struct nlmsghdr`
    const KIND: u32 = 4;
    const PORT: u32 = 12;
    // `struct rtmsg` and `struct ifaddrmsg` behind it
    const PROTOCOL: u32 = 16 + 5;
    const INDEX: u32 = 16 + 4;
    let load = |how, at| SockFilter::new(how, 0, 0, at);
    let kind =
        |kind: u16, yes, no| SockFilter::new(JUMP_IF_EQUAL, yes, no, u16::from_be_bytes(kind.to_ne_bytes()).into());
    let number =
        |number: u32, yes, no| SockFilter::new(JUMP_IF_EQUAL, yes, no, u32::from_be_bytes(number.to_ne_bytes()));
    [
        load(LOAD_HALF, KIND),
        kind(libc::RTM_NEWLINK, 12, 0),
        kind(libc::RTM_DELLINK, 11, 0),
        kind(libc::RTM_DELROUTE, 3, 0),
        kind(libc::RTM_NEWADDR, 6, 0),
        kind(libc::RTM_DELADDR, 5, 0),
        SockFilter::new(RETURN, 0, 0, 0),
        // A route is deleted: ours, and not by us.
        load(LOAD_BYTE, PROTOCOL),
        SockFilter::new(JUMP_IF_EQUAL, 0, 4, ROUTE_PROTOCOL.into()),
        load(LOAD_WORD, PORT),
        number(own_port, 2, 3),
        // An address comes or goes, which takes the routes along whose source it is.
        load(LOAD_WORD, INDEX),
        number(LOOPBACK_INDEX, 1, 0),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ]
}
