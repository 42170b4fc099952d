//! Frames of all kinds, most of them damaged: whatever comes in, nobody gets what is not his, and nothing breaks or stays behind.

use std::{
    collections::{HashMap, HashSet},
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use anyport::Registration;
use anyport_tests::{
    daemon::LogOnPanic,
    dial::{expect_tcp_hello, expect_udp_unanswered},
    host::wait_for,
    netns::Netns,
    owners::register_socket,
    packet::{Extra, Wire, sum_ipv4, syn_packets, udp_packets},
    random::Random,
    topology::{CLIENT, HOST},
};
use libtest_mimic::Trial;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};

use crate::cases::{Family, Lab, at, on_each_back_end};

/// A steered prefix of each family.
const PREFIX: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// A port that is steered there, which the host listens at, too, and one that is left to the host.
const PORT: u16 = 5_000;
const LEFT: u16 = 6_000;
/// Frames, and how many are sent before what should have arrived has to be there.
const FRAMES: u32 = 12_000;
const BURST: u32 = 100;

pub(crate) fn trials() -> Vec<Trial> {
    on_each_back_end("fuzzed::frames", frames).collect()
}

/// What arrived undamaged, by number, and what should not have arrived where it did.
#[derive(Debug, Default)]
struct Arrived {
    steered: HashSet<u32>,
    left: HashSet<u32>,
    wrong: Vec<String>,
}

/// A datagram before it is damaged.
struct Sent {
    packets: Vec<Vec<u8>>,
    /// Whether it is for the service, if it is for anybody.
    is_steered: Option<bool>,
}

fn frames(backend: &'static str) {
    let lab = Lab::new(backend);
    let _log = LogOnPanic(&lab.daemon);
    let host = &lab.topology.host;
    for family in ["4", "6"] {
        // Fragments without the rest are forgotten after a second.
        let name = if family == "4" { "net.ipv4.ipfrag_time" } else { "net.ipv6.ip6frag_time" };
        host.sysctl(name, "1");
    }
    let witnesses: Vec<UdpSocket> =
        host.enter(|| Family::ALL.iter().flat_map(|it| [PORT, LEFT].map(|port| witness(*it, port))).collect());
    lab.daemon.ok("add-service sink --handler registered");
    let prefixes = PREFIX.join(" ");
    lab.daemon.ok(&format!("add-prefix {prefixes} --protocol udp --except {LEFT} --service sink --force"));
    lab.daemon.ok(&format!("add-prefix {prefixes} --force"));
    let registration = Registration::new("sink").expect("a service").at(register_socket(&lab.daemon));
    let service = host.enter(|| registration.udp_socket()).expect("a registered socket");
    let (pid, before) = (lab.daemon.pid(), descriptors(&lab));
    let (arrived, is_over) = (Mutex::new(Arrived::default()), AtomicBool::new(false));
    scope(|scope| {
        let _end = End(&is_over, &service);
        scope.spawn(|| {
            let mut buffer = vec![0; 2_048];
            while let Ok(Some(datagram)) = service.recv(&mut buffer) {
                let to = datagram.ends.dialled;
                arrived.lock().expect("a lock").take(to, datagram.data, is_steered(to));
            }
        });
        for witness in &witnesses {
            let (arrived, is_over) = (&arrived, &is_over);
            scope.spawn(move || {
                while !is_over.load(Relaxed) {
                    if let Ok((to, data)) = receive(witness) {
                        arrived.lock().expect("a lock").take(to, &data, !is_steered(to));
                    }
                }
            });
        }
        lab.topology.client.enter(|| send_all(backend, host, &arrived));
    });
    let Arrived { steered, left, wrong } = arrived.into_inner().expect("a lock");
    assert!(wrong.is_empty(), "{} went wrong, such as {}", wrong.len(), wrong[0]);
    assert!(steered.len() > 1_000 && left.len() > 500, "{} and {} were undamaged", steered.len(), left.len());

    // The daemon is the same one, and does what it did.
    assert_eq!(lab.daemon.pid(), pid);
    let status = lab.daemon.json("status");
    let degraded = status["degraded"].as_array().expect("a list");
    // Many frames name a sender that no route leads to.
    let is_expected = |it: &serde_json::Value| it.as_str().is_some_and(|it| it.starts_with("clients get no answers"));
    assert!(degraded.iter().all(is_expected), "{status}");
    lab.topology.client.enter(|| PREFIX.iter().for_each(|prefix| expect_tcp_hello(first_of(prefix))));
    let counted: u64 = PREFIX.iter().map(|prefix| lab.daemon.count(prefix, "steered")).sum();
    assert!(counted >= steered.len() as u64, "{} arrived, {counted} were counted", steered.len());
    wait_for("end of everything", Duration::from_secs(20), || {
        let fragments = host.enter(|| std::fs::read_to_string("/proc/thread-self/net/sockstat")).expect("counters");
        let now = descriptors(&lab);
        let is_empty = fragments.lines().any(|line| line == "FRAG: inuse 0 memory 0");
        if is_empty && now <= before { Ok(()) } else { Err(format!("{now} descriptors, {before} before; {fragments}")) }
    });
}

/// Ends the threads also when the test fails.
struct End<'a>(&'a AtomicBool, &'a anyport::UdpSocket);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
        self.1.drain();
    }
}

impl Arrived {
    fn take(&mut self, to: SocketAddr, data: &[u8], is_right: bool) {
        if !is_right {
            return self.wrong.push(format!("{to}: {data:?}"));
        }
        let number = data.strip_prefix(b"whole ").and_then(|it| it.first_chunk()).map(|it| u32::from_be_bytes(*it));
        if let Some(number) = number.filter(|_| data.len() == 6 + 4) {
            if is_steered(to) { &mut self.steered } else { &mut self.left }.insert(number);
        }
    }
}

fn descriptors(lab: &Lab) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", lab.daemon.pid())).expect("the daemon's descriptors").count()
}

fn first_of(prefix: &str) -> SocketAddr {
    at(&format!("{}7", prefix.split('/').next().expect("an address").trim_end_matches('0')), 80)
}

/// Whether the rules give a datagram to the service.
fn is_steered(to: SocketAddr) -> bool {
    let is_within = match to.ip() {
        IpAddr::V4(ip) => ip.octets()[..3] == [192, 0, 2],
        IpAddr::V6(ip) => ip.segments()[..4] == [0x2001, 0xdb8, 0, 0xa],
    };
    is_within && to.port() != LEFT
}

/// A socket of the host at all of its addresses, which answers with the original destination.
fn witness(family: Family, port: u16) -> UdpSocket {
    let socket =
        socket2::Socket::new(family.of([socket2::Domain::IPV4, socket2::Domain::IPV6]), socket2::Type::DGRAM, None);
    let socket = socket.expect("a socket");
    match family {
        Family::V4 => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true),
        Family::V6 => setsockopt(&socket, sockopt::Ipv6V6Only, &true)
            .and_then(|()| setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)),
    }
    .expect("an option");
    socket.bind(&at(family.of(["0.0.0.0", "::"]), port).into()).expect("a port");
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(Duration::from_millis(100))).expect("a time limit");
    socket
}

fn receive(witness: &UdpSocket) -> io::Result<(SocketAddr, Vec<u8>)> {
    let mut buffer = vec![0; 2_048];
    let mut control = nix::cmsg_space!([u8; 64]);
    let (to, length) = {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let received =
            recvmsg::<SockaddrStorage>(witness.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
        let to = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::Ipv4PacketInfo(info) => Some(IpAddr::from(info.ipi_addr.s_addr.to_ne_bytes())),
            ControlMessageOwned::Ipv6PacketInfo(info) => Some(IpAddr::from(info.ipi6_addr.s6_addr)),
            _ => None,
        });
        (to.ok_or(io::ErrorKind::InvalidData)?, received.bytes)
    };
    buffer.truncate(length);
    Ok((SocketAddr::new(to, witness.local_addr()?.port()), buffer))
}

fn send_all(backend: &str, host: &Netns, arrived: &Mutex<Arrived>) {
    let mut random = Random::new("frames");
    let wire = Wire::to(host);
    // So that both sides know each other.
    expect_udp_unanswered(at(HOST[0], 9));
    expect_udp_unanswered(at(HOST[1], 9));
    let mut whole: HashMap<u32, Sent> = HashMap::new();
    for number in 0..FRAMES {
        let mut sent = packets(backend, &mut random, number);
        let is_damaged = random.below(10) < 7;
        let tags: &[u8] = if is_damaged && random.below(20) == 0 { &[0x81, 0, 0, 7] } else { &[] };
        for packet in &mut sent.packets {
            if is_damaged {
                damage(packet, &mut random);
            }
            wire.send(tags, packet);
        }
        if !is_damaged && sent.is_steered.is_some() {
            whole.insert(number, sent);
        }
        if (number + 1) % BURST == 0 {
            expect_all(&wire, &mut whole, arrived);
        }
    }
    // The last damaged ones.
    sleep(Duration::from_millis(200));
}

/// Waits until everything has arrived where it should. On a busy machine the rest of a fragment may come too late, so what is missing is
/// sent again, which helps nothing that is dropped for what it is.
fn expect_all(wire: &Wire, whole: &mut HashMap<u32, Sent>, arrived: &Mutex<Arrived>) {
    let mut last = Instant::now();
    wait_for("what was sent undamaged", Duration::from_secs(20), || {
        {
            let Arrived { steered, left, .. } = &*arrived.lock().expect("a lock");
            whole.retain(|number, sent| !if sent.is_steered == Some(true) { steered } else { left }.contains(number));
        }
        if whole.is_empty() {
            return Ok(());
        }
        if last.elapsed() > Duration::from_secs(2) {
            whole.values().flat_map(|sent| &sent.packets).for_each(|packet| wire.send(&[], packet));
            last = Instant::now();
        }
        Err(format!("{} have not arrived where they should", whole.len()))
    });
}

/// A datagram, or a SYN now and then.
fn packets(backend: &str, random: &mut Random, number: u32) -> Sent {
    let family = *random.pick(&Family::ALL);
    let from = at(family.of(CLIENT), 10_000 + u16::try_from(random.below(50_000)).expect("a port"));
    let any = random.port();
    let port = *random.pick(&[PORT, PORT, LEFT, any]);
    let to = match random.below(4) {
        0 => at(family.of(HOST), *random.pick(&[PORT, LEFT])),
        _ => SocketAddr::new(random.address(family.of(PREFIX)), port),
    };
    let extra = match (family, random.below(4)) {
        (Family::V4, 0) => Extra::Fragments(8),
        (Family::V4, 1) => Extra::Options(&[1, 1, 1, 0]),
        (Family::V4, _) => Extra::Options(&[]),
        (Family::V6, 0) => Extra::Chain(&[0, 60]),
        (Family::V6, 1) => Extra::Chain(&[60, 60, 60, 60, 60, 60, 60, 60, 60]),
        (Family::V6, _) => Extra::Chain(&[]),
    };
    if random.below(8) == 0 {
        return Sent { packets: syn_packets(from, to, extra), is_steered: None };
    }
    let payload = [b"whole ".as_slice(), &number.to_be_bytes()].concat();
    // What tc can't read or assign it drops, see the documentation.
    let is_hidden = backend == "tc" && matches!(extra, Extra::Fragments(_) | Extra::Chain([_, _, _, ..]));
    let is_steered = is_steered(to);
    let expected = if is_hidden && is_within_prefix(to) { None } else { Some(is_steered) };
    let mut packets = udp_packets(from, to, extra, &payload);
    for packet in packets.iter_mut().filter(|_| family == Family::V4) {
        // So that fragments of one are not taken for those of another, which was damaged.
        packet[4..6].copy_from_slice(&number.to_be_bytes()[2..]);
        sum_ipv4(packet);
    }
    Sent { packets, is_steered: expected }
}

fn is_within_prefix(to: SocketAddr) -> bool {
    is_steered(SocketAddr::new(to.ip(), PORT))
}

/// Does what networks and attackers do.
fn damage(packet: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let (length, byte) = (packet.len(), u8::try_from(random.below(256)).expect("a byte"));
        match random.below(8) {
            0 => packet.truncate(random.below(length)),
            1 => packet.extend(std::iter::repeat_n(byte, random.below(64))),
            // The length of the header, the length of the packet, fragments, what follows.
            2 if length > 0 => packet[0] = packet[0] & 0xf0 | byte & 0x0f,
            3 if length > 5 => packet[random.below(4) + 2] = byte,
            4 if length > 7 => packet[6] = byte,
            5 if length > 9 => packet[9] = byte,
            _ if length > 0 => packet[random.below(length)] = byte,
            _ => {}
        }
        if packet.is_empty() {
            return;
        }
    }
    // Others would go no further than to the first look.
    if packet.len() >= 20 && random.below(8) > 0 {
        sum_ipv4(packet);
    }
}
