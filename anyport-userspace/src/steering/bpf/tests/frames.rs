//! Crafted frames run through the loaded tc program (`BPF_PROG_TEST_RUN`), also of shapes that no device here makes,
//! such as VLAN tags.

use std::sync::Arc;

use aya::{
    Ebpf,
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};

use anyport_common::maps::names;

use crate::{
    rules::{Origin, RuleSet, RuleText},
    steering::{
        Plan, ServiceSockets,
        bpf::{hooks::program, load, table::BpfTable, take_map},
    },
};

/// There are no sockets in the map, so what is to be steered is dropped (`TC_ACT_SHOT`).
const STEERED: u32 = 2;
/// `TC_ACT_UNSPEC`: left to the next program.
const LEFT: u32 = u32::MAX;

const V4_DESTINATION: [u8; 4] = [192, 0, 2, 77];

/// The program with the rules `192.0.2.0/24` and `2001:db8::/64`, UDP and TCP, except port 22. What is returned beside it
/// keeps the generation active.
fn steering() -> (Ebpf, BpfTable) {
    let mut rules = RuleSet::default();
    for prefix in ["192.0.2.0/24", "2001:db8::/64"] {
        let rule = format!(r#"{{"prefix": "{prefix}", "protocol": "both", "except": "22"}}"#);
        rules.insert(&serde_json::from_str::<RuleText>(&rule).unwrap().into_rule(Origin::Added)).unwrap();
    }
    let services = [ServiceSockets {
        slot: 1,
        name: "default".parse().unwrap(),
        groups: [const { None }; 4],
        sources: Arc::default(),
    }];

    let mut ebpf = load(false).unwrap();
    // Before the maps' descriptors go.
    program::<SchedClassifier>(&mut ebpf, "anyport_eth").unwrap().load().unwrap();
    let [table, segment, control] =
        [names::TABLE, names::SEGMENT, names::CONTROL].map(|name| take_map(&mut ebpf, name).unwrap());
    let mut table = BpfTable::new(table, &segment, control, Arc::default()).unwrap();
    let numbers = 0..2;
    let plan = Plan {
        generation: 1,
        rules: rules.view(),
        changed: None,
        fresh: std::slice::from_ref(&numbers),
        freed: &[],
        moved: &[],
        services: &services,
    };
    table.publish(&plan).unwrap();
    (ebpf, table)
}

fn verdict(ebpf: &mut Ebpf, frame: &[u8]) -> u32 {
    let program: &SchedClassifier = program::<SchedClassifier>(ebpf, "anyport_eth").unwrap();
    let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::new() };
    program.test_run(options).unwrap().return_value
}

fn ethernet(tags: &[u16], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let tags = tags.iter().flat_map(|tag| [tag.to_be_bytes(), [0, 7]]).flatten();
    [0; 12].into_iter().chain(tags).chain(ethertype.to_be_bytes()).chain(packet.iter().copied()).collect()
}

/// The first fragment of a SYN, of which there are `len` bytes.
fn small_fragment(len: usize, destination: [u8; 4]) -> Vec<u8> {
    let mut packet = ipv4(6, 0, 0x2000, destination, 443);
    packet.truncate(20 + len);
    packet[3] = u8::try_from(packet.len()).unwrap();
    packet
}

/// This many headers of destination options, the last of which leads to `next`.
fn chain(headers: usize, next: u8) -> Vec<u8> {
    let header_to = |next| [next, 0, 1, 4, 0, 0, 0, 0];
    [[header_to(60)].repeat(headers - 1).concat(), header_to(next).to_vec()].concat()
}

fn ipv4(protocol: u8, options: usize, fragment: u16, destination: [u8; 4], port: u16) -> Vec<u8> {
    let words = 5 + u8::try_from(options).unwrap();
    let mut packet = vec![0x40 | words, 0, 0, 60, 0, 0];
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0, 198, 51, 100, 1]);
    packet.extend(destination);
    packet.extend(vec![1; options * 4]);
    packet.extend(transport(port));
    packet
}

fn ipv6(next: u8, extensions: &[u8], destination: u8, port: u16) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 40, next, 64];
    packet.extend([0x20, 0x01, 0x0d, 0xb8, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([0x20, 0x01, 0x0d, 0xb8, 0, destination, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
    packet.extend(extensions);
    packet.extend(transport(port));
    packet
}

/// As much of a UDP header, or of a SYN, as is read.
fn transport(port: u16) -> [u8; 20] {
    let mut header = [0; 20];
    header[..2].copy_from_slice(&1000u16.to_be_bytes());
    header[2..4].copy_from_slice(&port.to_be_bytes());
    header[13] = 0x02;
    header
}

#[test]
fn tc_judges_every_shape_of_frame() {
    let (mut ebpf, _table) = steering();
    let plain = ipv4(17, 0, 0, V4_DESTINATION, 443);
    let hop_by_hop = [17, 0, 1, 4, 0, 0, 0, 0];
    let fragment = |offset: u8| [17, 0, 0, offset, 0, 0, 0, 0];
    let long = |destination| ethernet(&[], 0x86dd, &ipv6(60, &chain(9, 6), destination, 443));
    // The fragment ends with its header and the first one of the chain; what follows is padding of the frame.
    let mut short_chain = ipv6(44, &[[60, 0, 0, 1, 0, 0, 0, 0].to_vec(), chain(1, 6)].concat(), 0, 22);
    short_chain[5] = 16;
    for (what, expected, frame) in [
        ("UDP", STEERED, ethernet(&[], 0x0800, &plain)),
        ("TCP", STEERED, ethernet(&[], 0x0800, &ipv4(6, 0, 0, V4_DESTINATION, 443))),
        ("VLAN", STEERED, ethernet(&[0x8100], 0x0800, &plain)),
        ("QinQ", STEERED, ethernet(&[0x88a8, 0x8100], 0x0800, &plain)),
        ("three tags", LEFT, ethernet(&[0x8100; 3], 0x0800, &plain)),
        ("VLAN, IPv6", STEERED, ethernet(&[0x8100], 0x86dd, &ipv6(17, &[], 0, 443))),
        ("options", STEERED, ethernet(&[], 0x0800, &ipv4(17, 10, 0, V4_DESTINATION, 443))),
        ("first fragment", STEERED, ethernet(&[], 0x0800, &ipv4(17, 0, 0x2000, V4_DESTINATION, 443))),
        ("later fragment", LEFT, ethernet(&[], 0x0800, &ipv4(17, 0, 0x2001, V4_DESTINATION, 443))),
        ("exception", LEFT, ethernet(&[], 0x0800, &ipv4(17, 0, 0, V4_DESTINATION, 22))),
        ("port 0", LEFT, ethernet(&[], 0x0800, &ipv4(17, 0, 0, V4_DESTINATION, 0))),
        ("other address", LEFT, ethernet(&[], 0x0800, &ipv4(17, 0, 0, [192, 0, 3, 1], 443))),
        ("ICMP", LEFT, ethernet(&[], 0x0800, &ipv4(1, 0, 0, V4_DESTINATION, 443))),
        ("ARP", LEFT, ethernet(&[], 0x0806, &plain)),
        ("IPv6", STEERED, ethernet(&[], 0x86dd, &ipv6(6, &[], 0, 443))),
        ("IPv6, exception", LEFT, ethernet(&[], 0x86dd, &ipv6(6, &[], 0, 22))),
        ("IPv6, other address", LEFT, ethernet(&[], 0x86dd, &ipv6(6, &[], 8, 443))),
        ("hop-by-hop", STEERED, ethernet(&[], 0x86dd, &ipv6(0, &hop_by_hop, 0, 443))),
        ("IPv6, first fragment", STEERED, ethernet(&[], 0x86dd, &ipv6(44, &fragment(1), 0, 443))),
        ("IPv6, later fragment", LEFT, ethernet(&[], 0x86dd, &ipv6(44, &fragment(8), 0, 443))),
        ("eight bytes of a SYN", STEERED, ethernet(&[], 0x0800, &small_fragment(8, V4_DESTINATION))),
        ("eight bytes, other address", LEFT, ethernet(&[], 0x0800, &small_fragment(8, [192, 0, 3, 1]))),
        ("eight extension headers", STEERED, ethernet(&[], 0x86dd, &ipv6(60, &chain(8, 6), 0, 443))),
        ("eight extension headers, exception", LEFT, ethernet(&[], 0x86dd, &ipv6(60, &chain(8, 6), 0, 22))),
        ("nine extension headers", STEERED, long(0)),
        ("nine extension headers, other address", LEFT, long(8)),
        ("nothing but extension headers in a fragment", STEERED, ethernet(&[], 0x86dd, &short_chain)),
        ("ICMPv6", LEFT, ethernet(&[], 0x86dd, &ipv6(58, &[], 0, 443))),
        ("ICMPv6 behind options", LEFT, ethernet(&[], 0x86dd, &ipv6(60, &chain(1, 58), 0, 443))),
        ("cut off", STEERED, ethernet(&[], 0x0800, &plain[..21])),
        ("cut off, other address", LEFT, ethernet(&[], 0x0800, &ipv4(17, 0, 0, [192, 0, 3, 1], 443)[..21])),
    ] {
        assert_eq!(verdict(&mut ebpf, &frame), expected, "{what}");
    }
}
