//! Sockets that refuse whatever reaches them.
//!
//! A tc program can drop a packet, but not answer it. So it assigns one of these: each is a group of its own whose
//! program selects nobody, on which the kernel answers as if no socket were there (`inet_lookup_reuseport`, 6.6).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Context as _;
use anyport_common::maps::{REFUSE, SOCKETS_PER_SERVICE};
use aya::{Ebpf, programs::SkReuseport};
use nix::libc;
use socket2::{Domain, Socket, Type};

use super::{hooks::program, load::load_program, sockets::Sockets};
use crate::back_end::BackEnd;

/// The program's.
const NAME: &str = "anyport_refuse";
/// Where they stand in the map.
const FIRST: u32 = REFUSE as u32 * SOCKETS_PER_SERVICE;

#[derive(Debug)]
pub(super) struct RefuseSockets(Vec<Socket>);

impl RefuseSockets {
    pub(super) fn open(ebpf: &mut Ebpf, map: &Sockets) -> anyhow::Result<Self> {
        let program: &mut SkReuseport = program(ebpf, NAME)?;
        load_program(BackEnd::Tc, NAME, || program.load())?;
        let mut sockets = Vec::new();
        let addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), (Ipv6Addr::LOCALHOST, 0).into()];
        for address in addresses {
            for kind in [Type::STREAM, Type::DGRAM] {
                let socket = match Socket::new(Domain::for_address(address), kind, None) {
                    // A host without IPv6 has nothing to refuse there.
                    Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => break,
                    socket => socket,
                }
                .and_then(|socket| listen(socket, address))
                .with_context(|| format!("open a socket on {address} that refuses"))?;
                program.attach(&socket).context("attach the program that refuses")?;
                sockets.push(socket);
            }
        }
        let opened = Self(sockets);
        opened.put_back(map)?;
        Ok(opened)
    }

    /// Puts those into the map in whose place there is none or another one. Returns how many that were.
    pub(super) fn put_back(&self, map: &Sockets) -> anyhow::Result<usize> {
        let mut count = 0;
        for (index, socket) in (FIRST..).zip(&self.0) {
            let cookie = socket.cookie().context("ask for the cookie of a socket that refuses")?;
            count += usize::from(map.put_back(index, cookie, socket)?);
        }
        Ok(count)
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
