//! TPROXY in network namespaces of the tests' own. Needs root.

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    process::Command,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Protocol as IpProtocol, Socket, Type};

use super::{Tproxy, remove_leftovers};
use crate::{
    rules::{Origin, PortSet, Protocol, Rule, ServiceName},
    steering::{GroupSocket, NumberedRule, Plan, ServiceSockets, Steering},
};

const PATIENCE: Duration = Duration::from_secs(2);

fn run(command: &str) -> String {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

type Task = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread that lives in it.
struct Namespace {
    tasks: mpsc::Sender<Task>,
    path: String,
}

impl Namespace {
    fn new() -> Self {
        let (tasks, inbox) = mpsc::channel::<Task>();
        let (path_sender, path) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; run this test as root");
            let path = format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid());
            path_sender.send(path).unwrap();
            run("ip link set lo up");
            for task in inbox {
                task();
            }
        });
        Self { tasks, path: path.recv().unwrap() }
    }

    fn run<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, result) = mpsc::channel();
        self.tasks.send(Box::new(move || sender.send(task()).unwrap())).unwrap();
        result.recv().expect("the task panicked")
    }
}

fn transparent(address: &str, kind: Type) -> Socket {
    let address: SocketAddr = address.parse().unwrap();
    let protocol = if kind == Type::STREAM { IpProtocol::TCP } else { IpProtocol::UDP };
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol)).unwrap();
    if address.is_ipv4() {
        socket.set_ip_transparent_v4(true).unwrap();
    } else {
        socket.set_ip_transparent_v6(true).unwrap();
    }
    socket.bind(&address.into()).unwrap();
    if kind == Type::DGRAM {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    socket
}

/// The service under test: says over TCP what was dialled, and counts datagrams.
struct Service {
    sockets: ServiceSockets,
    udp: HashMap<bool, UdpSocket>,
}

impl Service {
    fn start() -> Self {
        let mut udp = HashMap::new();
        let mut groups = [const { None }; 4];
        for (offset, loopback) in [(0, "127.0.0.1:0"), (2, "[::1]:0")] {
            let listener = transparent(loopback, Type::STREAM);
            listener.listen(16).unwrap();
            let listener = TcpListener::from(listener);
            groups[offset] = Some(group(listener.local_addr().unwrap(), listener.try_clone().unwrap()));
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    write!(stream, "{}", stream.local_addr().unwrap()).unwrap();
                }
            });
            let socket = UdpSocket::from(transparent(loopback, Type::DGRAM));
            groups[offset + 1] = Some(group(socket.local_addr().unwrap(), socket.try_clone().unwrap()));
            udp.insert(offset == 0, socket);
        }
        let sockets = ServiceSockets { slot: 1, name: ServiceName::default_service(), groups };
        Self { sockets, udp }
    }

    fn got_datagram(&self, address: IpAddr) -> bool {
        self.udp[&address.is_ipv4()].recv_from(&mut [0; 64]).is_ok()
    }
}

fn group(bound: SocketAddr, socket: impl Into<OwnedFd>) -> GroupSocket {
    GroupSocket { socket: Arc::new(socket.into()), bound }
}

fn plan(service: &Service, rules: &[(&str, Protocol, &str)]) -> Plan {
    let rule = |(prefix, protocol, except): &(&str, Protocol, &str)| Rule {
        prefix: prefix.parse().unwrap(),
        protocol: *protocol,
        ports: PortSet::all(),
        except: except.parse().unwrap(),
        service: ServiceName::default_service(),
        route: true,
        origin: Origin::Added,
    };
    Plan {
        generation: 1,
        rules: (0..).zip(rules).map(|(number, r)| NumberedRule { number, rule: rule(r) }).collect(),
        services: vec![service.sockets.clone()],
    }
}

fn dial(address: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn send(to: SocketAddr) {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    UdpSocket::bind(any).unwrap().send_to(b"question", to).unwrap();
}

/// Everything of `nf_tables`, and the rules and chains of the legacy flavour, whose tables once made never go.
fn kernel_state() -> String {
    let legacy = run("iptables-legacy-save") + &run("ip6tables-legacy-save");
    let legacy = legacy.lines().filter(|line| line.starts_with('-') || line.contains(" - ["));
    run("nft list ruleset") + &legacy.collect::<String>()
}

/// A server with the `AnyIP` prefixes of the documentation, and a client on the other end of a wire.
fn server_and_client() -> (Namespace, Namespace) {
    let (server, client) = (Namespace::new(), Namespace::new());
    let path = client.path.clone();
    server.run(move || {
        run(&format!("ip link add wire0 type veth peer wire1 netns {path}"));
        run("ip link set wire0 up");
        run("ip address add 198.51.100.1/24 dev wire0");
        run("ip address add 2001:db8:1::1/64 dev wire0 nodad");
        run("ip route add local 192.0.2.0/24 dev lo src 127.0.0.1");
        run("ip route add local 2001:db8::/64 dev lo src ::1 table local");
    });
    client.run(|| {
        run("ip link set wire1 up");
        run("ip address add 198.51.100.2/24 dev wire1");
        run("ip address add 2001:db8:1::2/64 dev wire1 nodad");
        run("ip route add 192.0.2.0/24 via 198.51.100.1");
        run("ip route add 2001:db8::/64 via 2001:db8:1::1");
    });
    (server, client)
}

#[test]
fn steers_and_leaves_nothing_behind() {
    let (server, client) = server_and_client();
    let before = server.run(kernel_state);
    let (service, tproxy) = server.run(|| {
        let service = Service::start();
        let mut tproxy = Tproxy::open().unwrap();
        assert_eq!(tproxy.degraded(), Vec::<String>::new());
        tproxy
            .apply(&plan(&service, &[("192.0.2.0/24", Protocol::Both, "22"), ("2001:db8::/64", Protocol::Both, "22")]))
            .unwrap();
        (service, tproxy)
    });
    for address in ["192.0.2.77:31337", "[2001:db8::77]:31337", "192.0.2.0:1", "[2001:db8::]:65535"] {
        let address: SocketAddr = address.parse().unwrap();
        for namespace in [&server, &client] {
            assert_eq!(namespace.run(move || dial(address)).unwrap(), address.to_string());
            namespace.run(move || send(address));
            assert!(service.got_datagram(address.ip()), "{address}");
        }
    }
    let excepted: SocketAddr = "192.0.2.77:22".parse().unwrap();
    assert!(client.run(move || dial(excepted)).is_err());
    server.run(move || {
        let counters = tproxy.counters().unwrap();
        assert_eq!((counters[&0].steered, counters[&1].steered), (8, 8));
        // Put back what was taken away from outside; counts go on.
        run("iptables -t mangle -F ANYPORT-RULES");
        run("iptables -t mangle -D PREROUTING -j ANYPORT");
        let mut tproxy = tproxy;
        let rules = [("192.0.2.0/24", Protocol::Both, "22")];
        tproxy.apply(&plan(&service, &rules)).unwrap();
        assert_eq!(dial("192.0.2.7:7".parse().unwrap()).unwrap(), "192.0.2.7:7");
        tproxy.apply(&plan(&service, &rules)).unwrap();
        assert_eq!(tproxy.counters().unwrap()[&0].steered, 1);
        // A crash.
        drop(tproxy);
        assert_ne!(kernel_state(), before);
        remove_leftovers().unwrap();
        assert_eq!(kernel_state(), before);
        let mut tproxy = Tproxy::open().unwrap();
        assert_eq!(kernel_state(), before);
        tproxy.apply(&plan(&service, &rules)).unwrap();
        Box::new(tproxy).detach().unwrap();
        assert_eq!(kernel_state(), before);
    });
}

#[test]
fn leaves_the_rules_of_others_alone() {
    let server = Namespace::new();
    server.run(|| {
        for command in [
            "iptables -t mangle -A PREROUTING -p tcp --dport 9 -j MARK --set-mark 9",
            "iptables -t mangle -N OTHERS",
            "ip6tables -t mangle -A FORWARD -p tcp --dport 9 -j DROP",
            "iptables -A INPUT -p tcp --dport 9 -j DROP",
        ] {
            run(command);
        }
        let before = kernel_state();
        let service = Service::start();
        let mut tproxy = Tproxy::open().unwrap();
        assert_eq!(kernel_state(), before);
        let rules = [("192.0.2.0/24", Protocol::Both, "22"), ("2001:db8::/64", Protocol::Tcp, "")];
        tproxy.apply(&plan(&service, &rules)).unwrap();
        let saved = run("iptables-save -t mangle");
        let first = saved.lines().find(|line| line.starts_with("-A PREROUTING"));
        assert_eq!(first, Some("-A PREROUTING -j ANYPORT"));
        tproxy.apply(&Plan::default()).unwrap();
        assert_eq!(kernel_state(), before);
        Box::new(tproxy).detach().unwrap();
        assert_eq!(kernel_state(), before);
    });
}

#[test]
fn spares_connections_and_wins_over_waiting_sockets() {
    let (server, client) = server_and_client();
    let tcp = server.run(|| TcpListener::bind("192.0.2.5:80").unwrap());
    let mut near = client.run(|| TcpStream::connect("192.0.2.5:80").unwrap());
    let (mut far, _) = tcp.accept().unwrap();
    // Another process's, for anyport's own never wait at addresses that are steered.
    let waiting: OwnedFd = server.run(|| UdpSocket::bind("192.0.2.5:53").unwrap()).into();
    let mut holder = Command::new("sleep").arg("60").stdin(waiting).spawn().unwrap();
    let connected = server.run(|| {
        let socket = UdpSocket::bind("192.0.2.5:5353").unwrap();
        socket.connect("198.51.100.2:53").unwrap();
        socket
    });
    let resolver = client.run(|| UdpSocket::bind("198.51.100.2:53").unwrap());
    connected.set_read_timeout(Some(PATIENCE)).unwrap();
    let (service, mut tproxy) = server.run(|| {
        let service = Service::start();
        let mut tproxy = Tproxy::open().unwrap();
        tproxy.apply(&plan(&service, &[("192.0.2.0/24", Protocol::Both, "")])).unwrap();
        (service, tproxy)
    });
    let mut exchange = |what: &str| {
        near.write_all(b"ping").unwrap();
        far.set_read_timeout(Some(PATIENCE)).unwrap();
        far.read_exact(&mut [0; 4]).expect(what);
        resolver.send_to(b"reply", "192.0.2.5:5353").unwrap();
        connected.recv(&mut [0; 8]).expect(what);
    };
    exchange("while steering");
    assert_eq!(client.run(|| dial("192.0.2.5:80".parse().unwrap())).unwrap(), "192.0.2.5:80");
    client.run(|| send("192.0.2.5:53".parse().unwrap()));
    assert!(service.got_datagram("192.0.2.5".parse().unwrap()));
    // A transparent socket that answers from the address that was asked takes no questions.
    let answering = server.run(|| transparent("192.0.2.6:7", Type::DGRAM));
    client.run(|| send("192.0.2.6:7".parse().unwrap()));
    assert!(service.got_datagram("192.0.2.6".parse().unwrap()));
    drop(answering);
    let mut without_sockets = plan(&service, &[("192.0.2.0/24", Protocol::Both, "")]);
    without_sockets.services[0].groups = [const { None }; 4];
    tproxy = server.run(move || {
        tproxy.apply(&without_sockets).unwrap();
        tproxy
    });
    exchange("while dropping");
    client.run(|| send("192.0.2.5:53".parse().unwrap()));
    holder.kill().unwrap();
    holder.wait().unwrap();
    server.run(move || {
        assert_eq!(tproxy.counters().unwrap()[&0].no_socket, 1);
        Box::new(tproxy).detach().unwrap();
    });
    exchange("without rules");
}
