//! TPROXY in network namespaces of the tests' own. Needs root.

pub(super) mod fixtures;

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, Protocol as IpProtocol, Socket, Type};

use anyport_common::{
    flow::{Flow, Transport},
    maps::Counters,
};

use self::fixtures::{rule, rule_set};
use super::{Tproxy, chain_rules::LineTarget, remove_leftovers};
use crate::{
    rules::{Prefix, Protocol, RuleSet, ServiceName, to_address},
    steering::{GroupSocket, Holder, Plan, ServiceSockets, Steering},
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

/// The service under test: says over TCP what the original destination was, and counts datagrams.
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
        let sockets = ServiceSockets { slot: 1, name: ServiceName::default_service(), groups, sources: Arc::default() };
        Self { sockets, udp }
    }

    fn got_datagram(&self, address: IpAddr) -> bool {
        self.udp[&address.is_ipv4()].recv_from(&mut [0; 64]).is_ok()
    }
}

fn group(bound: SocketAddr, socket: impl Into<OwnedFd>) -> GroupSocket {
    GroupSocket { cookie: 0, bound, holder: Holder::Us(Arc::new(socket.into())) }
}

/// Rules for the service under test, with numbers.
struct Rules {
    rules: RuleSet,
    services: Vec<ServiceSockets>,
}

fn plan(service: &Service, rules: &[(&str, Protocol, &str)]) -> Rules {
    let rules: Vec<_> =
        rules.iter().map(|(prefix, protocol, except)| rule(prefix, *protocol, "all", except, "default")).collect();
    Rules { rules: rule_set(&rules), services: vec![service.sockets.clone()] }
}

impl Rules {
    fn all(&self) -> Plan<'_> {
        let Self { rules, services } = self;
        Plan { generation: 1, rules: rules.view(), changed: None, fresh: &[], freed: &[], moved: &[], services }
    }

    fn changed<'a>(&'a self, changed: &'a [Prefix]) -> Plan<'a> {
        Plan { changed: Some(changed), ..self.all() }
    }

    fn number(&self, prefix: &str) -> u32 {
        self.rules.of_prefix(&prefix.parse().unwrap()).unwrap().first_number
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

/// All sets, everything of `nf_tables`, and the rules and chains of the legacy flavour, whose tables once made never go.
fn kernel_state() -> String {
    let legacy = run("iptables-legacy-save") + &run("ip6tables-legacy-save");
    let legacy = legacy.lines().filter(|line| line.starts_with('-') || line.contains(" - ["));
    run("ipset list -name") + &run("nft --stateless list ruleset") + &legacy.collect::<String>()
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
        let rules = plan(&service, &[("192.0.2.0/24", Protocol::Both, "22"), ("2001:db8::/64", Protocol::Both, "22")]);
        tproxy.apply(&rules.all()).unwrap();
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
        assert_eq!((counters(0).steered, counters(1).steered), (8, 8));
        drop(counters);
        // Put back what was taken away from outside; counts go on.
        run("iptables -t mangle -F ANYPORT-RULES");
        run("iptables -t mangle -D PREROUTING -j ANYPORT");
        let mut tproxy = tproxy;
        let rules = plan(&service, &[("192.0.2.0/24", Protocol::Both, "22")]);
        tproxy.apply(&rules.all()).unwrap();
        assert_eq!(dial("192.0.2.7:7".parse().unwrap()).unwrap(), "192.0.2.7:7");
        tproxy.apply(&rules.all()).unwrap();
        assert_eq!(tproxy.counters().unwrap()(0).steered, 1);
        // A crash.
        drop(tproxy);
        assert_ne!(kernel_state(), before);
        remove_leftovers().unwrap();
        assert_eq!(kernel_state(), before);
        let mut tproxy = Tproxy::open().unwrap();
        assert_eq!(kernel_state(), before);
        tproxy.apply(&rules.all()).unwrap();
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
        let rules = plan(&service, &[("192.0.2.0/24", Protocol::Both, "22"), ("2001:db8::/64", Protocol::Tcp, "")]);
        tproxy.apply(&rules.all()).unwrap();
        let saved = run("iptables-save -t mangle");
        let first = saved.lines().find(|line| line.starts_with("-A PREROUTING"));
        assert_eq!(first, Some("-A PREROUTING -j ANYPORT"));
        tproxy.apply(&plan(&service, &[]).all()).unwrap();
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
        tproxy.apply(&plan(&service, &[("192.0.2.0/24", Protocol::Both, "")]).all()).unwrap();
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
        tproxy.apply(&without_sockets.all()).unwrap();
        tproxy
    });
    exchange("while dropping");
    client.run(|| send("192.0.2.5:53".parse().unwrap()));
    holder.kill().unwrap();
    holder.wait().unwrap();
    server.run(move || {
        assert_eq!(tproxy.counters().unwrap()(0).no_socket, 1);
        Box::new(tproxy).detach().unwrap();
    });
    exchange("without rules");
}

fn explain(tproxy: &Tproxy, transport: Transport, to: &str) -> (Option<LineTarget>, Option<u32>) {
    let to: SocketAddr = to.parse().unwrap();
    let source: IpAddr = if to.is_ipv4() { "198.51.100.2" } else { "2001:db8:1::2" }.parse().unwrap();
    let flow = Flow { source: to_address(source), address: to_address(to.ip()), transport, port: to.port() };
    let live = tproxy.decide_live(&flow).unwrap();
    (live.verdict, live.rule)
}

/// Twenty addresses of each family of which the same is said, one of which more, and what is around them.
fn many(service: &Service, of_each: u32) -> Rules {
    let addresses = (0..of_each).flat_map(|it| [format!("192.0.2.{it}"), format!("2001:db8::{it:x}")]);
    let mut rules: Vec<_> = addresses.map(|it| rule(&it, Protocol::Both, "all", "22", "default")).collect();
    rules.push(rule("192.0.2.3 from 198.51.100.0/24", Protocol::Tcp, "22", "", "default"));
    rules.push(rule("192.0.2.0/24", Protocol::Both, "7", "", "default"));
    Rules { rules: rule_set(&rules), services: vec![service.sockets.clone()] }
}

#[test]
fn many_prefixes_go_through_sets() {
    let (server, client) = server_and_client();
    let before = server.run(kernel_state);
    let (service, mut tproxy, rules) = server.run(|| {
        let service = Service::start();
        let mut tproxy = Tproxy::open().unwrap();
        let rules = many(&service, 20);
        tproxy.apply(&rules.all()).unwrap();
        (service, tproxy, rules)
    });
    let reached = |address: &str| {
        let address: SocketAddr = address.parse().unwrap();
        client.run(move || dial(address)).is_ok_and(|it| it == address.to_string())
    };
    for (address, is_steered) in [
        ("192.0.2.3:80", true),
        ("192.0.2.3:22", true),
        ("192.0.2.4:22", false),
        ("192.0.2.19:65535", true),
        ("192.0.2.20:80", false),
        ("192.0.2.20:7", true),
        ("[2001:db8::13]:80", true),
        ("[2001:db8::14]:80", false),
    ] {
        assert_eq!(reached(address), is_steered, "{address}");
    }
    client.run(|| send("192.0.2.19:53".parse().unwrap()));
    assert!(service.got_datagram("192.0.2.19".parse().unwrap()));
    server.run(move || {
        for (tool, set) in [("iptables", "anyport-4-0"), ("ip6tables", "anyport-6-0")] {
            assert!(run(&format!("{tool} -t mangle -S")).contains(&format!("--match-set {set} dst")));
        }
        let [at_3, at_19, around, six] =
            ["192.0.2.3/32", "192.0.2.19/32", "192.0.2.0/24", "2001:db8::13/128"].map(|it| rules.number(it));
        let steered = |tproxy: &Tproxy| {
            let counters = tproxy.counters().unwrap();
            [at_3, at_3 + 1, at_3 + 2, at_19, around, six].map(|number| counters(number).steered)
        };
        assert_eq!(steered(&tproxy), [1, 1, 0, 2, 1, 1]);
        assert!(tproxy.unmatched().unwrap() >= 2, "192.0.2.20:80 and its like");

        let tcp = |address| explain(&tproxy, Transport::Tcp, address);
        let to = |offset: usize| Some(LineTarget::Tproxy(service.sockets.groups[offset].as_ref().unwrap().bound));
        let (v4, v6) = (to(0), to(2));
        assert_eq!(tcp("192.0.2.3:22"), (v4, Some(at_3)));
        assert_eq!(tcp("192.0.2.3:80"), (v4, Some(at_3 + 1)));
        assert_eq!(tcp("192.0.2.19:22"), (Some(LineTarget::Return), Some(at_19)));
        assert_eq!(tcp("192.0.2.20:7"), (v4, Some(around)));
        assert_eq!(tcp("192.0.2.20:8"), (None, None));
        assert_eq!(tcp("[2001:db8::13]:80"), (v6, Some(six)));
        assert_eq!(explain(&tproxy, Transport::Udp, "[2001:db8::14]:80"), (None, None));

        // What is rebuilt counts on, as do numbers that move, and nothing else does.
        tproxy.apply(&rules.all()).unwrap();
        assert_eq!(steered(&tproxy), [1, 1, 0, 2, 1, 1]);
        tproxy.restore_counters(&[(at_19, Counters { steered: 5, ..Counters::default() })]).unwrap();
        let (fresh, moved) = ([at_3..at_3 + 1, 1000..2000], [(at_19, around), (around, at_19)]);
        tproxy.apply(&Plan { fresh: &fresh, moved: &moved, ..rules.all() }).unwrap();
        assert_eq!(steered(&tproxy), [0, 1, 0, 1, 7, 1]);

        // A crash.
        drop(tproxy);
        remove_leftovers().unwrap();
        assert_eq!(kernel_state(), before);
        let mut tproxy = Tproxy::open().unwrap();
        tproxy.apply(&rules.all()).unwrap();
        drop(tproxy);
        // What was left is active until the first plan, and nothing of it afterwards.
        let left = kernel_state();
        let mut tproxy = Tproxy::open().unwrap();
        assert_eq!(kernel_state(), left);
        tproxy.apply(&rules.all()).unwrap();
        assert_eq!(steered(&tproxy), [0; 6]);
        Box::new(tproxy).detach().unwrap();
        assert_eq!(kernel_state(), before);
    });
}

#[test]
fn small_changes_leave_the_lines_alone() {
    let server = Namespace::new();
    server.run(|| {
        run("ip route add local 192.0.2.0/24 dev lo src 127.0.0.1");
        let before = kernel_state();
        let service = Service::start();
        let mut tproxy = Tproxy::open().unwrap();
        tproxy.apply(&many(&service, 20).all()).unwrap();
        // Apart from the numbers, which each of these plans allocates again.
        let lines = || {
            let lines = run("iptables -t mangle -S") + &run("ip6tables -t mangle -S");
            lines.lines().map(|line| line.split(" --comment").next().unwrap().to_owned()).collect::<Vec<_>>().concat()
        };
        let lines_before = lines();
        let is_steered = |it: u32| dial(format!("192.0.2.{it}:80").parse().unwrap()).is_ok();
        assert!(is_steered(19) && !is_steered(20));

        let prefixes: Vec<Prefix> = ["192.0.2.20", "2001:db8::14"].map(|it| it.parse().unwrap()).into();
        tproxy.apply(&many(&service, 21).changed(&prefixes)).unwrap();
        assert!(is_steered(19) && is_steered(20));
        tproxy.apply(&many(&service, 20).changed(&prefixes)).unwrap();
        assert!(is_steered(19) && !is_steered(20));
        assert_eq!(lines(), lines_before);

        // The last ones of a group take the line and the set with them.
        let prefixes: Vec<Prefix> = (0..20)
            .flat_map(|it| [format!("192.0.2.{it}"), format!("2001:db8::{it:x}")])
            .map(|it| it.parse().unwrap())
            .collect();
        tproxy.apply(&many(&service, 0).changed(&prefixes)).unwrap();
        assert!(!is_steered(19) && dial("192.0.2.1:7".parse().unwrap()).is_ok());
        assert!(!lines().contains("match-set"));
        // Another program's doing: what fails half-way is put right by the plan that is applied next.
        tproxy.apply(&many(&service, 20).changed(&prefixes)).unwrap();
        let set = run("ipset list -name").lines().find(|name| name.starts_with("anyport-4-")).unwrap().to_owned();
        run(&format!("ipset add {set} 192.0.2.20"));
        let prefixes: Vec<Prefix> = vec!["192.0.2.20".parse().unwrap()];
        assert!(tproxy.apply(&many(&service, 21).changed(&prefixes)).is_err());
        assert!(is_steered(19));
        tproxy.apply(&many(&service, 20).changed(&prefixes)).unwrap();
        assert!(is_steered(19) && !is_steered(20));
        Box::new(tproxy).detach().unwrap();
        assert_eq!(kernel_state(), before);
    });
}

#[test]
fn a_prefix_that_changes_sides_is_never_in_between() {
    let server = Namespace::new();
    server.run(|| run("ip route add local 192.0.2.0/24 dev lo src 127.0.0.1"));
    let [a, b, around] = server.run(|| [(); 3].map(|()| Service::start()));
    let services: Vec<_> = [("a", &a), ("b", &b), ("around", &around)]
        .map(|(name, service)| ServiceSockets { name: name.parse().unwrap(), ..service.sockets.clone() })
        .into();
    let rules = |side: &str| {
        let others = (100..140).map(|it| (format!("192.0.2.{it}"), if it < 120 { "a" } else { "b" }));
        let all = others.chain([("192.0.2.1".to_owned(), side), ("192.0.2.0/24".to_owned(), "around")]);
        let all: Vec<_> = all.map(|(prefix, of)| rule(&prefix, Protocol::Udp, "all", "", of)).collect();
        Rules { rules: rule_set(&all), services: services.clone() }
    };
    let sides = [rules("a"), rules("b")];
    let mut tproxy = server.run(|| Tproxy::open().unwrap());
    tproxy = {
        let first = rules("b");
        server.run(move || {
            tproxy.apply(&first.all()).unwrap();
            tproxy
        })
    };
    let is_over = Arc::new(AtomicBool::new(false));
    let sender = {
        let (socket, is_over) = (server.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()), Arc::clone(&is_over));
        thread::spawn(move || {
            while !is_over.load(Relaxed) {
                socket.send_to(b"which", "192.0.2.1:9").unwrap();
            }
        })
    };
    server.run(move || {
        for _ in 0..20 {
            for side in &sides {
                tproxy.apply(&side.changed(&["192.0.2.1".parse().unwrap()])).unwrap();
            }
        }
        is_over.store(true, Relaxed);
        sender.join().unwrap();
        assert_eq!(tproxy.unmatched().unwrap(), 0);
        Box::new(tproxy).detach().unwrap();
    });
    assert!(a.got_datagram("192.0.2.1".parse().unwrap()) && b.got_datagram("192.0.2.1".parse().unwrap()));
    around.udp[&true].set_nonblocking(true).unwrap();
    assert!(!around.got_datagram("192.0.2.1".parse().unwrap()), "a datagram met the rule around");
}
