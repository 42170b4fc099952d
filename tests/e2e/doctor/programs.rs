//! BPF programs: ours where they should be no more, and those of others beside them.

use std::{
    fs::File,
    net::TcpListener,
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
    time::Duration,
};

use anyport_tests::{daemon::Daemon, dial, host::wait_for, netns::Netns, topology::Topology};
use aya::{
    Ebpf, EbpfLoader,
    maps::{LpmTrie, SockMap, lpm_trie::Key},
    programs::SkLookup,
};
use libtest_mimic::Trial;

use super::{ADDRESSES, PREFIXES, Report, V4, expect_not_steered, expect_steered, steering, unmended};
use crate::cases::{Lab, at, on_each_back_end, trial};

/// Attaches a program named `foreign` in front of all others at the ingress of the interface with the number that is its
/// argument, until its input ends. The program says `TC_ACT_OK` of each packet, after which nobody else is asked.
const FOREIGN_TC: &str = r#"
import ctypes, platform, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, 128)
    fd = libc.syscall({"x86_64": 321, "aarch64": 280}[platform.machine()], command, buffer, 128)
    assert fd >= 0, ctypes.get_errno()
    return fd
instructions = ctypes.create_string_buffer(struct.pack("BBhiBBhi", 0xb7, 0, 0, 0, 0x95, 0, 0, 0))
license = ctypes.create_string_buffer(b"GPL")
program = bpf(5, struct.pack("IIQQIIQII16s", 3, 2, ctypes.addressof(instructions), ctypes.addressof(license), 0, 0, 0, 0, 0, b"foreign"))
link = bpf(28, struct.pack("IIII", program, int(sys.argv[1]), 46, 8))
sys.stdin.read()
"#;

pub(super) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = on_each_back_end("doctor::what steers is taken away", taken_away).collect();
    trials.push(trial("sk-lookup::doctor::programs of others", foreign_sk_lookup));
    trials.push(trial("tc::doctor::programs of others", foreign_tc));
    trials
}

/// The number of an interface.
fn index(namespace: &Netns, interface: &str) -> u64 {
    let links: serde_json::Value =
        serde_json::from_str(&namespace.ip(&format!("-j link show {interface}"))).expect("JSON");
    links[0]["ifindex"].as_u64().expect("a number")
}

fn taken_away(backend: &'static str) {
    let mut lab = unmended(backend);
    expect_steered(&lab, &ADDRESSES);
    Report::of(&lab.daemon).expect_fine("attached");
    let host = &lab.topology.host;
    let detach = |pin: String| {
        let pin = lab.daemon.bpffs().join(pin);
        host.run("bpftool", ["link", "detach", "pinned", &pin.display().to_string()])
    };
    let part = match backend {
        "sk-lookup" => {
            detach("link-sk-lookup".to_owned());
            "sk_lookup program is not attached"
        }
        "tc" => {
            detach(format!("link-tc-{}", index(host, "client")));
            "not attached to client"
        }
        _ => {
            host.run("iptables", ["-t", "mangle", "-F", "PREROUTING"]);
            "PREROUTING of iptables"
        }
    };
    expect_not_steered(&lab, V4);
    Report::of(&lab.daemon).expect("attached", "broken", part);
    lab.daemon.stop();
    lab.daemon.restart();
    expect_steered(&lab, &ADDRESSES);
    Report::of(&lab.daemon).expect_fine("attached");
}

/// A program that steers port 80 of 192.0.2.0/24 to a socket of its own.
fn redirect(namespace: &Netns) -> (Ebpf, TcpListener) {
    const BEFORE_ADDRESS: u32 = 8 + 16;
    const SERVICE: u32 = 1;
    const OBJECT: &[u8] = aya::include_bytes_aligned!("../../../anyport-ebpf/prebuilt/baselines.o");
    let mut ebpf = EbpfLoader::new().map_max_entries("baseline_trie", 1).load(OBJECT).expect("the BPF object");
    let listener = namespace.enter(|| TcpListener::bind("127.0.0.1:0")).expect("a listener");
    let mut sockets: SockMap<_> = ebpf.map_mut("baseline_sock").expect("a map").try_into().expect("of sockets");
    sockets.set(SERVICE * 4, &listener.as_raw_fd(), 0).expect("the socket into the map");
    let mut trie: LpmTrie<_, [u8; 20], [u32; 2]> =
        ebpf.map_mut("baseline_trie").expect("a map").try_into().expect("a trie");
    let length = BEFORE_ADDRESS + 96 + 24;
    let mut key = [0; 20];
    key[0] = 6;
    key[1..3].copy_from_slice(&80_u16.to_be_bytes());
    key[13..19].copy_from_slice(&[0xff, 0xff, 192, 0, 2, 0]);
    trie.insert(&Key::new(length, key), [SERVICE, length], 0).expect("a rule");
    let program: &mut SkLookup = ebpf.program_mut("baseline_lpm").expect("a program").try_into().expect("sk_lookup");
    program.load().expect("loading the program");
    program.attach(File::open(namespace.path()).expect("the namespace's file")).expect("attaching the program");
    (ebpf, listener)
}

/// Where several programs select a socket the rules of anyport win, whichever program was attached first.
fn foreign_sk_lookup() {
    let topology = Topology::new();
    let (program, listener) = redirect(&topology.host);
    let daemon = Daemon::start(&topology.host, "sk-lookup");
    let lab = Lab { topology, daemon };
    lab.daemon.ok(&format!("add-prefix {PREFIXES} --protocol both"));
    expect_steered(&lab, V4);
    Report::of(&lab.daemon).expect("sk-lookup-programs", "note", "baseline_lpm");
    drop(program);
    Report::of(&lab.daemon).expect_fine("sk-lookup-programs");
    let (_program, later) = redirect(&lab.topology.host);
    expect_steered(&lab, V4);
    for listener in [listener, later] {
        listener.set_nonblocking(true).expect("not to wait");
        listener.accept().expect_err("a connection that was taken");
    }
}

/// A program in front keeps the packets from those behind it.
fn foreign_tc() {
    let mut lab = steering("tc");
    expect_steered(&lab, &ADDRESSES);
    Report::of(&lab.daemon).expect_fine("tc-order");
    let host = lab.topology.host.clone();
    let mut python = Command::new("python3");
    python.args(["-c", FOREIGN_TC, &index(&host, "client").to_string()]).stdin(Stdio::piped());
    let mut foreign = host.spawn(python);
    wait_for("finding", Duration::from_secs(10), || {
        let report = Report::of(&lab.daemon);
        let ok = report.0["ok"].as_array().expect("checks").iter().any(|it| it == "tc-order");
        if ok { Err(report.0.to_string()) } else { Ok(()) }
    });
    Report::of(&lab.daemon).expect("tc-order", "warning", "tc programs on client come before anyport's: foreign");
    let answer = lab.topology.client.enter(|| dial::tcp_within(at(ADDRESSES[0], 80), dial::SILENCE));
    assert!(answer.is_err(), "{answer:?}");
    lab.daemon.stop();
    lab.daemon.restart();
    expect_steered(&lab, &ADDRESSES);
    Report::of(&lab.daemon).expect_fine("tc-order");
    drop(foreign.stdin.take());
    foreign.wait().expect("the end of the program");
}
