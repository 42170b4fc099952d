//! Runs the programs that steer on the first packet of a flow.

use std::os::fd::AsFd as _;

use anyport_common::flow::{Address, Flow, Transport, Version};
use aya::programs;
use nix::libc::{AF_INET, AF_INET6, EOPNOTSUPP};

use crate::{
    steering::{
        BackEnd,
        bpf::{
            Bpf,
            hooks::{SK_LOOKUP_PROGRAM, loaded},
            tc::ETHERNET_PROGRAM,
        },
    },
    sys::bpf::{SkLookup, run_classifier, run_sk_lookup},
};

const SOURCE_PORT: u16 = 40_000;

impl Bpf {
    /// Runs the attached program (Linux 5.13 where sockets are looked up). It counts and publishes as for any packet.
    pub(in crate::steering::bpf) fn run(&self, flow: &Flow) {
        let ebpf = self.hook.ebpf();
        match self.hook.back_end() {
            BackEnd::SkLookup => {
                let program: &programs::SkLookup = loaded(ebpf, SK_LOOKUP_PROGRAM).unwrap();
                match run_sk_lookup(program.fd().unwrap().as_fd(), &mut sk_lookup(flow), 1) {
                    // The program ran, and selected a socket out of a group, of which the kernel can't name the one in the end.
                    Err(error) if error.raw_os_error() == Some(EOPNOTSUPP) => {}
                    ran => drop(ran.unwrap()),
                }
            }
            BackEnd::Tc => {
                let program: &programs::SchedClassifier = loaded(ebpf, ETHERNET_PROGRAM).unwrap();
                run_classifier(program.fd().unwrap().as_fd(), &mut frame(flow)).unwrap();
            }
            BackEnd::Tproxy => unreachable!("it has no program"),
        }
    }
}

/// The flow's first packet, as an `sk_lookup` program sees it.
fn sk_lookup(flow: &Flow) -> SkLookup {
    let mut context = SkLookup {
        protocol: flow.transport.number().into(),
        remote_port: SOURCE_PORT.to_be(),
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
fn frame(flow: &Flow) -> Vec<u8> {
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
    transport[..2].copy_from_slice(&SOURCE_PORT.to_be_bytes());
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
