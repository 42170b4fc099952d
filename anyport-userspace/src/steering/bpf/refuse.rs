//! Sockets that refuse whatever reaches them.
//!
//! A tc program can drop a packet, but not answer it. So it assigns one of these: each is a group of its own whose
//! program selects nobody, on which the kernel answers as if no socket were there (`inet_lookup_reuseport`, 6.6).

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd as _,
};

use anyhow::Context as _;
use anyport_common::maps::{REFUSE, SOCKETS_PER_SERVICE};
use aya::{
    Ebpf,
    maps::{MapData, SockMap},
    programs::SkReuseport,
};
use nix::libc;
use socket2::{Domain, Socket, Type};

use super::hooks::program;

#[derive(Debug)]
pub(super) struct RefuseSockets(#[expect(dead_code, reason = "keeps the sockets open")] Vec<Socket>);

impl RefuseSockets {
    pub(super) fn open(ebpf: &mut Ebpf, map: &mut SockMap<MapData>) -> anyhow::Result<Self> {
        let program: &mut SkReuseport = program(ebpf, "anyport_refuse")?;
        program.load().context("load the program that refuses (Linux 4.19 or later is needed)")?;
        let mut sockets = Vec::new();
        let addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), (Ipv6Addr::LOCALHOST, 0).into()];
        for address in addresses {
            for kind in [Type::STREAM, Type::DGRAM] {
                let index = u32::from(REFUSE) * SOCKETS_PER_SERVICE + u32::try_from(sockets.len())?;
                let socket = match Socket::new(Domain::for_address(address), kind, None) {
                    // A host without IPv6 has nothing to refuse there.
                    Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => break,
                    socket => socket,
                }
                .and_then(|socket| listen(socket, address))
                .with_context(|| format!("open a socket on {address} that refuses"))?;
                program.attach(&socket).context("attach the program that refuses")?;
                map.set(index, &socket.as_raw_fd(), 0).context("put the socket that refuses into the BPF map")?;
                sockets.push(socket);
            }
        }
        Ok(Self(sockets))
    }
}

fn listen(socket: Socket, address: SocketAddr) -> std::io::Result<Socket> {
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        // ::1 may be absent where IPv6 is switched off by sysctl.
        socket.set_freebind_v6(true)?;
    }
    socket.bind(&address.into())?;
    if socket.r#type()? == Type::STREAM {
        socket.listen(1)?;
    }
    Ok(socket)
}
