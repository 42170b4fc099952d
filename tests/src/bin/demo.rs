//! A demonstration for new users, on each back end, in namespaces that end with this program.
//!
//! A client and a host that runs anyport are joined by a cable. Whole prefixes are steered to one socket, and the
//! client dials whatever comes to its mind. Nothing on the machine itself is touched.
#![expect(clippy::print_stdout, reason = "the demonstration is what it prints")]

use std::{
    net::{IpAddr, SocketAddr},
    process::Command,
};

use anyhow::{Result, ensure};
use anyport_tests::{
    daemon::{Daemon, Setup},
    dial::{QUESTION, tcp_text, udp},
    netns::Netns,
    prerequisites,
    random::Random,
    topology::Topology,
};

/// Steered by every part of the demonstration.
const PREFIXES: [&str; 2] = ["192.0.2.0/24", "2001:db8::/64"];

fn main() -> Result<()> {
    prerequisites::prepare()?;
    heading("Three namespaces of their own: a client, the host that runs anyport, a server behind it");
    let topology = Topology::new();
    shell(&topology.client, "client", "ip route get 192.0.2.77");
    say("The client sends 192.0.2.0/24 and 2001:db8::/64 to the anyport host, where nothing answers yet:");
    let to = SocketAddr::new([192, 0, 2, 77].into(), 31_337);
    ensure!(!dial(&topology.client, "client", to, "tcp"), "{to} is answered before there is anyport");
    for backend in ["sk-lookup", "tc", "tproxy"] {
        back_end(&topology, backend)?;
    }
    say("\nThat was all of it; the namespaces end with this program.");
    Ok(())
}

/// One back end from start to stop.
fn back_end(topology: &Topology, backend: &str) -> Result<()> {
    heading(&format!("Back end {backend}"));
    command("host", &format!("anyportd --steering {backend} &"));
    let mut daemon = Setup::new(&topology.host, backend).bpffs("/sys/fs/bpf/anyport").start();
    control(&daemon, &format!("add-prefix {} --protocol both", PREFIXES.join(" ")));
    say("One socket now answers for every address and port of both prefixes, and knows what was dialled:");
    let mut random = Random::new(backend);
    for (prefix, protocol) in
        PREFIXES.into_iter().flat_map(|prefix| [(prefix, "tcp"), (prefix, "tcp"), (prefix, "udp")])
    {
        let to = SocketAddr::new(random.address(prefix), random.port());
        ensure!(dial(&topology.client, "client", to, protocol), "{to} was not answered as it should");
    }
    say("A client on the anyport host itself:");
    let to = SocketAddr::new(random.address(PREFIXES[0]), 22);
    ensure!(dial(&topology.host, "host", to, "tcp"), "{to} was not answered as it should");
    control(&daemon, "prefixes");
    say("What the kernel holds:");
    shell(&topology.host, "host", "ip -4 route show table local proto 165; ip -6 route show table local proto 165");
    if backend == "tproxy" {
        shell(&topology.host, "host", "iptables -t mangle -S | grep ANYPORT");
    } else {
        shell(&topology.host, "host", "bpftool map show | grep anyport_");
        shell(&topology.host, "host", "bpftool map dump pinned /sys/fs/bpf/anyport/rules | head -16");
    }
    command("host", "kill %1");
    daemon.stop();
    say("Stopped, and nothing is left:");
    shell(&topology.host, "host", "ip -4 route show table local proto 165; ip -6 route show table local proto 165");
    shell(&topology.host, "host", "ls /sys/fs/bpf/anyport 2>/dev/null");
    shell(&topology.host, "host", "iptables-save | grep ANYPORT");
    let to = SocketAddr::new(random.address(PREFIXES[0]), random.port());
    ensure!(!dial(&topology.client, "client", to, "tcp"), "{to} is still answered");
    Ok(())
}

/// Dials and prints the question as a command, then the answer; says whether it names the original destination.
fn dial(namespace: &Netns, host: &str, to: SocketAddr, protocol: &str) -> bool {
    let (address, port): (IpAddr, u16) = (to.ip(), to.port());
    let answer = if protocol == "tcp" {
        command(host, &format!("nc {address} {port}"));
        namespace.enter(|| tcp_text(to))
    } else {
        command(host, &format!("echo ???... | nc -u {address} {port}"));
        namespace.enter(|| udp(to, QUESTION)).map(|(_, answer)| String::from_utf8_lossy(&answer).into_owned())
    };
    let text = answer.unwrap_or_else(|error| format!("{to}: {error}\n"));
    print!("{text}");
    text.ends_with(&format!("you reached {to} over {protocol}\n"))
}

/// Runs `anyportctl`, shown without the options that only this test harness needs.
fn control(daemon: &Daemon, arguments: &str) {
    command("host", &format!("anyportctl {arguments}"));
    print!("{}", daemon.ok(arguments));
}

/// Runs a line of shell and prints it with what it says.
fn shell(namespace: &Netns, host: &str, line: &str) {
    command(host, line);
    print!("{}", namespace.output(Command::new("sh").args(["-c", line])).stdout);
}

fn command(host: &str, line: &str) {
    println!("{host} $ {line}");
}

fn say(text: &str) {
    println!("{text}");
}

fn heading(text: &str) {
    println!("\n=== {text} ===\n");
}
