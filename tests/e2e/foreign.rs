//! Frames that reach an interface of the host and are for others: containers on macvlan, machines behind a bridge, VLANs that the host
//! lacks. Their addresses are inside of a steered prefix all the same.

use std::{
    io::{self, Write as _},
    net::{TcpListener, UdpSocket},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread::{scope, sleep},
    time::Duration,
};

use anyport_tests::{
    dial::{expect_tcp_hello, expect_udp_hello, tcp_text, udp},
    host::wait_for,
    netns::Netns,
    packet::{Extra, Wire, udp_packets},
    steady::EndOfWork,
    topology::CLIENT,
};
use libtest_mimic::Trial;

use crate::cases::{Lab, at, on_each_back_end, trial};

const PREFIX: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// The container's or machine's own addresses, inside of those.
const ADDRESS: [&str; 2] = ["192.0.2.77", "2001:db8:0:a::77"];
const OTHER: [&str; 2] = ["192.0.2.78", "2001:db8:0:a::78"];
const MAC: &str = "02:00:00:00:00:77";
const PORT: u16 = 7_777;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> =
        on_each_back_end("foreign::a container on macvlan has its own packets", macvlan).collect();
    trials.extend(on_each_back_end("foreign::what a bridge passes on is left alone", bridge));
    trials.push(trial("tc::foreign::frames of a VLAN that the host lacks", vlan));
    trials
}

/// Says `own` over TCP and UDP at the addresses, until the guard is dropped.
fn serve(namespace: &Netns, is_over: &AtomicBool) -> io::Result<()> {
    const TICK: Duration = Duration::from_millis(50);
    namespace.enter(|| {
        let mut listeners = Vec::new();
        for address in ADDRESS {
            let (tcp, udp) = (TcpListener::bind(at(address, PORT))?, UdpSocket::bind(at(address, PORT))?);
            tcp.set_nonblocking(true)?;
            udp.set_read_timeout(Some(TICK))?;
            listeners.push((tcp, udp));
        }
        while !is_over.load(Relaxed) {
            for (tcp, udp) in &listeners {
                if let Ok((mut stream, _)) = tcp.accept() {
                    stream.set_nonblocking(false)?;
                    stream.write_all(b"own")?;
                }
                let mut question = [0; 64];
                if let Ok((_, from)) = udp.recv_from(&mut question) {
                    udp.send_to(b"own", from)?;
                }
            }
        }
        Ok(())
    })
}

/// Has the client reach the addresses by that link-layer address on the interface, and no others.
fn resolve(client: &Netns, interface: &str, mac: &str) {
    for address in ADDRESS {
        client.ip(&format!("route add {address} dev {interface}"));
        client.ip(&format!("neigh replace {address} lladdr {mac} dev {interface} nud permanent"));
    }
}

fn give_addresses(namespace: &Netns, interface: &str, client: [&str; 2]) {
    namespace.ip("link set lo up");
    namespace.ip(&format!("link set {interface} address {MAC} up"));
    for (address, length) in ADDRESS.into_iter().zip([32, 128]) {
        namespace.ip(&format!("address add {address}/{length} dev {interface} nodad"));
    }
    for address in client {
        namespace.ip(&format!("route add {address} dev {interface}"));
    }
}

/// What has these addresses is served by its own server, and everything beside it by anyport.
fn expect_own(lab: &Lab, client: &Netns, own: &Netns) {
    let is_over = AtomicBool::new(false);
    scope(|scope| {
        let serving = scope.spawn(|| serve(own, &is_over).expect("a server"));
        let end = EndOfWork(&is_over);
        sleep(Duration::from_millis(200));
        client.enter(|| {
            for address in ADDRESS {
                let said = tcp_text(at(address, PORT)).unwrap_or_else(|error| panic!("TCP to {address}: {error}"));
                assert_eq!(said, "own", "{address}");
                let (_, said) =
                    udp(at(address, PORT), b"who").unwrap_or_else(|error| panic!("UDP to {address}: {error}"));
                assert_eq!(said, b"own", "{address}");
            }
        });
        drop(end);
        serving.join().expect("a server that ends");
    });
    for prefix in PREFIX {
        assert_eq!(lab.daemon.count(prefix, "steered"), 0, "packets of {prefix} that are for somebody else");
    }
}

fn lab(back_end: &str) -> Lab {
    let lab = Lab::new(back_end);
    lab.daemon.ok(&format!("add-prefix {} --protocol both", PREFIX.join(" ")));
    lab
}

fn macvlan(back_end: &'static str) {
    let lab = lab(back_end);
    let (host, client) = (&lab.topology.host, &lab.topology.client);
    let container = Netns::new();
    host.ip("link add link client name mv0 type macvlan mode bridge");
    host.ip(&format!("link set mv0 netns {}", container.path()));
    give_addresses(&container, "mv0", CLIENT);
    resolve(client, "eth0", MAC);
    expect_own(&lab, client, &container);
    client.enter(|| {
        for address in OTHER {
            expect_tcp_hello(at(address, PORT));
            expect_udp_hello(at(address, PORT));
        }
    });
    for prefix in PREFIX {
        wait_for("count of what is steered", Duration::from_secs(10), || {
            if lab.daemon.count(prefix, "steered") > 0 { Ok(()) } else { Err(prefix.to_owned()) }
        });
    }
}

/// Two machines on ports of one bridge of the host.
fn bridge(back_end: &'static str) {
    const BEHIND: [&str; 2] = ["198.51.100.65", "2001:db8:b::65"];
    let lab = lab(back_end);
    let host = &lab.topology.host;
    // With br_netfilter the chains of iptables see frames that are only passed on, and count them.
    if std::path::Path::new("/proc/sys/net/bridge").exists() {
        host.sysctl("net.bridge.bridge-nf-call-iptables", "0");
        host.sysctl("net.bridge.bridge-nf-call-ip6tables", "0");
    }
    host.ip("link add br0 type bridge");
    host.ip("link set br0 up");
    host.ip("address add 198.51.100.66/26 dev br0");
    host.ip("address add 2001:db8:b::66/64 dev br0 nodad");
    let (client, machine) = (Netns::new(), Netns::new());
    client.join(host, ("eth0", &["198.51.100.65/26", "2001:db8:b::65/64"]), ("port1", &[]));
    machine.join(host, ("eth0", &[]), ("port2", &[]));
    for port in ["port1", "port2"] {
        host.ip(&format!("link set {port} master br0"));
        host.ip(&format!("link set {port} up"));
    }
    give_addresses(&machine, "eth0", BEHIND);
    resolve(&client, "eth0", MAC);
    expect_own(&lab, &client, &machine);
    // What is for the host itself still comes by the bridge.
    for (address, gateway) in OTHER.into_iter().zip(["198.51.100.66", "2001:db8:b::66"]) {
        client.ip(&format!("route add {address} via {gateway}"));
        client.enter(|| {
            expect_tcp_hello(at(address, PORT));
            expect_udp_hello(at(address, PORT));
        });
    }
}

/// Frames with tags, as they come from a switch: the interface of a VLAN is a module that not every kernel has.
fn vlan() {
    let lab = lab("tc");
    let (host, client) = (&lab.topology.host, &lab.topology.client);
    let send = |tag: u16| {
        client.enter(|| {
            let wire = Wire::to(host);
            for (from, to) in CLIENT.into_iter().zip(ADDRESS) {
                let none = if from.contains(':') { Extra::Chain(&[]) } else { Extra::Options(&[]) };
                for packet in udp_packets(at(from, PORT), at(to, PORT), none, b"who") {
                    wire.send(&[&[0x81, 0][..], &tag.to_be_bytes()].concat(), &packet);
                }
            }
        });
    };
    let counts = || PREFIX.map(|prefix| lab.daemon.count(prefix, "steered"));
    // VLAN 9, with a priority and without; the one without a number is none.
    send(9);
    send(0x6009);
    send(0x6000);
    wait_for("packets of no VLAN", Duration::from_secs(10), || {
        let counts = counts();
        if counts == [1, 1] { Ok(()) } else { Err(format!("{counts:?}")) }
    });
    sleep(Duration::from_millis(500));
    assert_eq!(counts(), [1, 1], "packets of a VLAN that the host lacks");
}
