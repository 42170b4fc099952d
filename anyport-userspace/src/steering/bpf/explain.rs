//! Asking the loaded program itself what it would do with a packet.

use std::sync::atomic::Ordering;

use anyhow::bail;
use anyport_common::{
    flow::{Address, Flow, Transport, Version},
    maps::{
        EXPLAINED_ASSIGN_ERROR, EXPLAINED_DENIED, EXPLAINED_HOST, EXPLAINED_NO_SOCKET, EXPLAINED_STEER,
        EXPLAINED_UNMATCHED, Explained, SOCKETS_PER_SERVICE,
    },
};
use nix::libc::{AF_INET, AF_INET6};

use super::Bpf;
use crate::{
    steering::{Decided, Fate},
    sys::bpf::SkLookup,
};

/// Words of what a program writes down.
pub(super) const EXPLAINED_WORDS: usize = size_of::<Explained>() / 8;
/// Between a run and the look at what it wrote down, real packets on this thread could write, too.
const ATTEMPTS: usize = 10;

impl Bpf {
    /// Runs the program on the first packet of a flow, and reads what it wrote down.
    pub(super) fn decide(&self, flow: &Flow, source_port: u16) -> anyhow::Result<Decided> {
        for _ in 0..ATTEMPTS {
            self.explained.words().iter().for_each(|word| word.store(0, Ordering::Relaxed));
            self.table.explained(|| self.hook.run(flow, source_port))?;
            let words: Vec<u64> = self.explained.words().iter().map(|word| word.load(Ordering::Relaxed)).collect();
            let explained: Explained = bytemuck::pod_read_unaligned(bytemuck::cast_slice(&words));
            let Address { high, low, .. } = flow.address;
            if explained.address == [high, low] && explained.port == u32::from(flow.port) {
                return self.decided(flow, explained);
            }
        }
        bail!("run the BPF program to see what it decides: it wrote nothing down about this packet")
    }

    fn decided(&self, flow: &Flow, explained: Explained) -> anyhow::Result<Decided> {
        let Explained { generation, verdict, rule, service, .. } = explained;
        let socket = || {
            let index = service * SOCKETS_PER_SERVICE + flow.socket_offset();
            self.sockets.cookie(index)
        };
        let (fate, rule, cookie) = match verdict {
            EXPLAINED_UNMATCHED => (Fate::Unmatched, None, None),
            EXPLAINED_HOST => (Fate::Host, Some(rule), None),
            EXPLAINED_STEER => (Fate::Steer, Some(rule), socket()?),
            EXPLAINED_NO_SOCKET | EXPLAINED_ASSIGN_ERROR => (Fate::Drop, Some(rule), None),
            EXPLAINED_DENIED => (Fate::Deny, Some(rule), None),
            other => bail!("the BPF program wrote down a verdict that is not known here: {other}"),
        };
        Ok(Decided { fate, rule, cookie, bound: None, generation: Some(generation) })
    }
}

/// The flow's first packet, as an `sk_lookup` program sees it.
pub(super) fn sk_lookup(flow: &Flow, source_port: u16) -> SkLookup {
    let mut context = SkLookup {
        protocol: flow.transport.number().into(),
        remote_port: source_port.to_be(),
        local_port: flow.port.into(),
        ..SkLookup::default()
    };
    match flow.address.version {
        Version::V4 => {
            context.family = AF_INET.cast_unsigned();
            [context.remote_ip4, ..] = words(flow.source);
            [context.local_ip4, ..] = words(flow.address);
        }
        Version::V6 => {
            context.family = AF_INET6.cast_unsigned();
            context.remote_ip6 = words(flow.source);
            context.local_ip6 = words(flow.address);
        }
    }
    context
}

/// The flow's first packet in an Ethernet frame.
pub(super) fn frame(flow: &Flow, source_port: u16) -> Vec<u8> {
    let (source, destination) = (bytes(flow.source), bytes(flow.address));
    let protocol = flow.transport.number();
    let mut frame = vec![0; 12];
    match flow.address.version {
        Version::V4 => {
            frame.extend([0x08, 0x00, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0]);
            frame.extend(&source[..4]);
            frame.extend(&destination[..4]);
        }
        Version::V6 => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, protocol, 64]);
            frame.extend(source);
            frame.extend(destination);
        }
    }
    let mut transport = [0; 20];
    transport[..2].copy_from_slice(&source_port.to_be_bytes());
    transport[2..4].copy_from_slice(&flow.port.to_be_bytes());
    match flow.transport {
        // A header of five words, and SYN.
        Transport::Tcp => transport[12..14].copy_from_slice(&[0x50, 0x02]),
        Transport::Udp => transport[4..6].copy_from_slice(&20_u16.to_be_bytes()),
    }
    frame.extend(transport);
    frame
}

fn bytes(Address { high, low, .. }: Address) -> [u8; 16] {
    (u128::from(high) << 64 | u128::from(low)).to_be_bytes()
}

/// An address in network byte order; IPv4 takes the first word.
fn words(address: Address) -> [u32; 4] {
    bytemuck::cast(bytes(address))
}
