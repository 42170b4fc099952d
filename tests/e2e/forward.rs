//! `forward`: real proxies on either side, large transfers, and upstreams that come and go.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread::{self, sleep},
    time::Duration,
};

use anyport_tests::{
    dial::{PATIENCE, again, tcp},
    host::wait_for,
    netns::Netns,
    servers::Server,
    topology::{HOST, SECOND, SERVER},
};
use libtest_mimic::Trial;
use serde_json::Value;
use socket2::SockRef;

use crate::cases::{Family, Lab, at, on_each_back_end, trial};

/// Steered prefixes, an address in each, and the original destinations there.
const PREFIX: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
const ONE: [&str; 2] = ["192.0.2.77", "2001:db8:0:a::77"];
/// Bytes of a large transfer, in each direction.
const LARGE: u64 = 1 << 30;
/// Connections that are open and silent at the same time. A forwarded one takes two descriptors of the daemon, which keeps
/// a quarter of its 20,000 for other things, and two of this process.
const IDLE: usize = 5_000;
/// Most memory of the daemon that an idle connection may take, in bytes of the unoptimised program.
const IDLE_MEMORY: usize = 2 << 10;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("forward::upstreams read our PROXY header", told));
    trials.extend(on_each_back_end("forward::the dialled port is kept", kept_port));
    trials.push(trial("forward::a proxy in front tells who dialled", in_front));
    trials.push(trial("forward::no packet is spent on what another one can carry", few_packets));
    trials.push(trial("forward::1 GiB each way", large));
    trials.push(trial("forward::a slow reader costs no memory", slow_reader));
    trials.push(trial("forward::half-close both ways", half_close));
    trials.push(trial("forward::an upstream that dies resets its clients", dies));
    trials.push(trial("forward::no request fails while one upstream flaps", flapping));
    trials.push(trial("forward::a silent upstream is passed over", silent));
    trials.push(trial("forward::health checks", health));
    trials.push(trial("forward::transparent source", transparent));
    trials.push(trial("forward::idle connections cost little", idle));
    trials.push(trial("forward::settings are checked and kept", settings));
    trials
}

/// A lab whose prefixes go to a service `edge` with these options.
fn lab(backend: &str, options: &str) -> Lab {
    let lab = Lab::new(backend);
    lab.daemon.ok(&format!("add-service edge --handler forward {options}"));
    lab.daemon.ok(&format!("add-prefix {} --service edge", PREFIX.join(" ")));
    lab
}

/// Has `serve` deal with each connection to `address`, on a thread of its own. Ends with the process.
fn server(namespace: &Netns, address: SocketAddr, serve: fn(TcpStream) -> io::Result<()>) {
    let listener = namespace.enter(|| TcpListener::bind(address)).expect("a listening socket");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("a connection");
            thread::spawn(move || drop(serve(stream)));
        }
    });
}

/// Returns what it gets, at its end.
fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    stream.write_all(&all)
}

fn ask(stream: &mut TcpStream, question: &str) -> io::Result<String> {
    stream.write_all(question.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Asks until the servers behind are up.
fn answer(lab: &Lab, to: SocketAddr, question: &str) -> (SocketAddr, String) {
    wait_for("answer of the upstream", PATIENCE, || {
        lab.topology.client.enter(|| {
            let mut stream = tcp(to).map_err(|error| error.to_string())?;
            let own = stream.local_addr().expect("an own address");
            match ask(&mut stream, question) {
                Ok(text) if !text.is_empty() => Ok((own, text)),
                other => Err(format!("{other:?}")),
            }
        })
    })
}

fn upstreams(lab: &Lab) -> Vec<Value> {
    let services = lab.daemon.json("services");
    let edge = services.as_array().expect("services").iter().find(|it| it["name"] == "edge").expect("edge").clone();
    edge["upstreams"].as_array().expect("upstreams").clone()
}

/// An address as an option wants it.
fn shown(address: &str, port: impl std::fmt::Display) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

const HAPROXY_ECHO: &str = "frontend f\n  mode http\n  bind :::8081 v4v6 accept-proxy\n  \
     http-request return status 200 content-type text/plain lf-string \"saw %[src] %[src_port] %[dst] %[dst_port]\\n\"";

fn told(backend: &'static str) {
    for version in ["v1", "v2"] {
        for family in Family::ALL {
            let options = |port| format!("--upstream {} --proxy-protocol {version}", shown(family.of(SERVER), port));
            let lab = lab(backend, &options(8081));
            let _haproxy = Server::haproxy(&lab.topology.server, HAPROXY_ECHO);
            let nginx_echo = "server { listen [::]:8082 ipv6only=off proxy_protocol; return \"saw $proxy_protocol_addr \
                 $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port\\n\"; }";
            let _nginx = Server::nginx(&lab.topology.server, nginx_echo);
            let to = at(family.of(ONE), 31_337);
            let expect = |(own, text): (SocketAddr, String)| {
                let expected = format!("saw {} {} {} {}", own.ip(), own.port(), to.ip(), to.port());
                assert!(text.contains(&expected), "{text:?} lacks {expected:?}");
            };
            expect(answer(&lab, to, "GET / HTTP/1.0\r\n\r\n"));
            lab.daemon.ok(&format!("remove-prefix {}", PREFIX.join(" ")));
            lab.daemon.ok("remove-service edge");
            lab.daemon.ok(&format!("add-service edge --handler forward {}", options(8082)));
            lab.daemon.ok(&format!("add-prefix {} --service edge", PREFIX.join(" ")));
            expect(answer(&lab, to, ""));
        }
    }
}

fn kept_port(backend: &'static str) {
    for family in Family::ALL {
        let lab = lab(backend, &format!("--upstream {}", shown(family.of(SERVER), "*")));
        for port in [7_001, 7_002] {
            server(&lab.topology.server, at(family.of(SERVER), port), |mut stream| {
                let text = stream.local_addr()?.port().to_string();
                stream.write_all(text.as_bytes())
            });
            assert_eq!(answer(&lab, at(family.of(ONE), port), "").1, port.to_string());
        }
    }
}

fn in_front() {
    for (version, option) in [("v1", "send-proxy"), ("v2", "send-proxy-v2")] {
        let [client_v4, client_v6] = ["198.51.100.1/32", "2001:db8:c::1/128"];
        let upstream = shown(SERVER[0], 8081);
        let options =
            format!("--upstream {upstream} --proxy-protocol {version} --accept-proxy {client_v4},{client_v6}");
        let lab = lab("sk-lookup", &options);
        let _upstream = Server::haproxy(&lab.topology.server, HAPROXY_ECHO);
        for family in Family::ALL {
            let to = shown(family.of(ONE), 31_337);
            let front = format!(
                "listen l\n  mode tcp\n  bind {}\n  server s {to} {option}",
                shown(family.of(["127.0.0.1", "::1"]), 9_000)
            );
            let _front = Server::haproxy(&lab.topology.client, &front);
            // The upstream sees the client that dials the proxy in front.
            let dialled = at(family.of(["127.0.0.1", "::1"]), 9_000);
            let (own, text) = answer(&lab, dialled, "GET / HTTP/1.0\r\n\r\n");
            let expected = format!("saw {} {} {} 9000", own.ip(), own.port(), dialled.ip());
            assert!(text.contains(&expected), "{text:?} lacks {expected:?}");
        }
        // Without a header the same peer is reset.
        let refused = lab.topology.client.enter(|| ask(&mut tcp(at(ONE[0], 1))?, "GET /\r\n\r\n"));
        assert!(refused.is_err(), "{refused:?}");
        let services = lab.daemon.json("services");
        let bad = services.as_array().expect("services").iter().map(|it| it["bad_headers"].as_u64().expect("a count"));
        assert_eq!(bad.sum::<u64>(), 1);
    }
}

/// Packets of TCP that a host has got.
fn packets(host: &Netns) -> u64 {
    /// The column `InSegs`.
    const IN_SEGS: usize = 10;
    let text = host.enter(|| fs::read_to_string("/proc/thread-self/net/snmp")).expect("the kernel's counts");
    let numbers = text.lines().filter(|line| line.starts_with("Tcp:")).nth(1).expect("a line of TCP");
    numbers.split_whitespace().nth(IN_SEGS).and_then(|it| it.parse().ok()).expect("a number")
}

fn few_packets() {
    /// By then everything has arrived, what was delayed by the kernel too.
    const SETTLED: Duration = Duration::from_millis(500);
    let lab = lab("sk-lookup", &format!("--upstream {}:7001 --proxy-protocol v1", SERVER[0]));
    let server_host = &lab.topology.server;
    server(server_host, at(SERVER[0], 7001), |mut stream| {
        stream.read_to_end(&mut Vec::new())?;
        sleep(SETTLED * 4);
        Ok(())
    });
    let before = packets(server_host);
    let stream = lab.topology.client.enter(|| tcp(at(ONE[0], 31_337))).expect("a connection");
    sleep(SETTLED);
    let greeted = packets(server_host);
    assert_eq!(greeted - before, 2, "the SYN, and the header that ends the handshake");
    // The client's kernel keeps these for the end of the stream.
    SockRef::from(&stream).send_with_flags(b"last words", libc::MSG_MORE).expect("words");
    stream.shutdown(Shutdown::Write).expect("the end");
    sleep(SETTLED);
    assert_eq!(packets(server_host) - greeted, 1, "the last words with the end");
}

/// Sends [`LARGE`] bytes; what follows of a position is told by it.
fn send(stream: &mut TcpStream) -> io::Result<()> {
    let mut chunk = vec![0; 1 << 20];
    for number in 0..LARGE >> 20 {
        fill(&mut chunk, number);
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)
}

fn fill(chunk: &mut [u8], number: u64) {
    let mut word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for place in chunk.chunks_exact_mut(512) {
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        place[..8].copy_from_slice(&word.to_le_bytes());
    }
}

/// Receives what [`send`] sends, and nothing else.
fn receive(stream: &mut TcpStream) -> io::Result<()> {
    let (mut expected, mut chunk) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for number in 0..LARGE >> 20 {
        fill(&mut expected, number);
        stream.read_exact(&mut chunk)?;
        assert!(expected == chunk, "MiB {number} differs from what was sent");
    }
    assert_eq!(again(|| stream.read(&mut chunk))?, 0);
    Ok(())
}

fn both_ways(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    let mut writer = stream.try_clone()?;
    let writing = thread::spawn(move || send(&mut writer));
    receive(&mut stream)?;
    writing.join().expect("a sender")
}

fn large() {
    let lab = lab("sk-lookup", &format!("--upstream {}", shown(SERVER[0], 7_000)));
    server(&lab.topology.server, at(SERVER[0], 7_000), both_ways);
    let stream = lab.topology.client.enter(|| tcp(at(ONE[0], 1))).expect("a connection");
    both_ways(stream).expect("a transfer both ways");
    wait_for("end of the connection", PATIENCE, || {
        let upstream = &upstreams(&lab)[0];
        let is_right = upstream["bytes_to"] == LARGE && upstream["bytes_from"] == LARGE && upstream["active"] == 0;
        if is_right { Ok(()) } else { Err(upstream.to_string()) }
    });
}

/// Bytes of memory that the daemon has for itself.
fn memory(lab: &Lab) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", lab.daemon.pid())).expect("the daemon's state");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

fn slow_reader() {
    let lab = lab("sk-lookup", &format!("--upstream {}", shown(SERVER[0], 7_000)));
    server(&lab.topology.server, at(SERVER[0], 7_000), |mut stream| send(&mut stream));
    let before = memory(&lab);
    let readers: Vec<TcpStream> =
        (0..20).map(|_| lab.topology.client.enter(|| tcp(at(ONE[0], 1))).expect("a connection")).collect();
    sleep(Duration::from_secs(2));
    let grown = memory(&lab).saturating_sub(before);
    assert!(grown < 20 * (128 << 10), "{grown} bytes more for 20 connections that nobody reads from");
    // They have not been forgotten either.
    let mut reader = &readers[0];
    let mut chunk = vec![0; 16 << 20];
    reader.read_exact(&mut chunk).expect("16 MiB");
}

fn half_close() {
    let lab = lab("sk-lookup", &format!("--upstream {}", shown(SERVER[0], 7_000)));
    server(&lab.topology.server, at(SERVER[0], 7_000), echo);
    server(&lab.topology.server, at(SERVER[0], 7_001), |mut stream| {
        stream.write_all(b"first the server")?;
        stream.shutdown(Shutdown::Write)?;
        let mut heard = String::new();
        stream.read_to_string(&mut heard)?;
        assert_eq!(heard, "then the client");
        Ok(())
    });
    assert_eq!(answer(&lab, at(ONE[0], 1), "the client first").1, "the client first");
    lab.daemon.ok(&format!("add-service other --handler forward --upstream {}", shown(SERVER[0], 7_001)));
    lab.daemon.ok("add-prefix 192.0.2.9/32 --service other");
    let mut stream = lab.topology.client.enter(|| tcp(at("192.0.2.9", 1))).expect("a connection");
    let mut heard = String::new();
    stream.read_to_string(&mut heard).expect("words until their end");
    assert_eq!(heard, "first the server");
    stream.write_all(b"then the client").expect("sending");
    stream.shutdown(Shutdown::Write).expect("half-close");
    wait_for("end of all connections", PATIENCE, || match &lab.daemon.json("status")["totals"]["active"] {
        active if *active == 0 => Ok(()),
        active => Err(active.to_string()),
    });
}

fn dies() {
    let lab = lab("sk-lookup", &format!("--upstream {}", shown(SERVER[0], 7_000)));
    server(&lab.topology.server, at(SERVER[0], 7_000), |mut stream| {
        stream.write_all(&vec![b'x'; 8 << 20])?;
        // As if the process was killed with words of its client unread.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))
    });
    let mut stream = lab.topology.client.enter(|| tcp(at(ONE[0], 1))).expect("a connection");
    let error = stream.read_to_end(&mut Vec::new()).expect_err("a part is not the whole");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

fn flapping() {
    const CLIENTS: usize = 4;
    let [one, two] = [SERVER[0], SECOND[0]].map(|address| shown(address, 7_000));
    let lab = lab("sk-lookup", &format!("--upstream {one} --upstream {two} --ejection failures=3,time=50ms"));
    for address in [SERVER[0], SECOND[0]] {
        server(&lab.topology.server, at(address, 7_000), echo);
    }
    assert_eq!(answer(&lab, at(ONE[0], 1), "hi").1, "hi");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope.spawn(|| {
                    let mut requests = 0;
                    lab.topology.client.enter(|| {
                        while !is_over.load(Relaxed) {
                            let mut stream = tcp(at(ONE[0], 80)).expect("a connection");
                            assert_eq!(ask(&mut stream, "question").expect("an answer"), "question");
                            requests += 1;
                        }
                    });
                    requests
                })
            })
            .collect();
        let refuse = format!("INPUT -d {} -p tcp --syn --dport 7000 -j REJECT --reject-with tcp-reset", SERVER[0]);
        for _ in 0..10 {
            for action in ["-A", "-D"] {
                lab.topology.server.run("iptables", format!("{action} {refuse}").split(' '));
                sleep(Duration::from_millis(150));
            }
        }
        is_over.store(true, Relaxed);
        let requests: usize = clients.into_iter().map(|client| client.join().expect("no failed request")).sum();
        assert!(requests > 100, "{requests} requests");
    });
    let upstreams = upstreams(&lab);
    assert!(upstreams[0]["failures"].as_u64() > Some(0) && upstreams[0]["connections"].as_u64() > Some(0));
    assert_eq!(upstreams[1]["failures"], 0);
}

fn silent() {
    let [one, two] = [SERVER[0], SECOND[0]].map(|address| shown(address, 7_000));
    let lab = lab("sk-lookup", &format!("--upstream {one} --upstream {two} --connect-timeout 300ms"));
    server(&lab.topology.server, at(SECOND[0], 7_000), echo);
    let drop_all = format!("-A INPUT -d {} -p tcp --dport 7000 -j DROP", SERVER[0]);
    lab.topology.server.run("iptables", drop_all.split(' '));
    for _ in 0..8 {
        assert_eq!(answer(&lab, at(ONE[0], 1), "hi").1, "hi");
    }
    let upstream = &upstreams(&lab)[0];
    assert_eq!((&upstream["state"], &upstream["failures"]), (&"ejected".into(), &3.into()));
    let why = upstream["why"].as_str().expect("a reason");
    assert!(why.contains("no answer within connect-timeout = 300ms"), "{why}");
}

fn health() {
    let one = shown(SERVER[0], 7_000);
    let lab = lab("sk-lookup", &format!("--upstream {one} --health-check=interval=50ms,timeout=200ms,rise=2,fall=2"));
    let is_in = |state: &str| {
        wait_for("state of the upstream", PATIENCE, || match &upstreams(&lab)[0]["state"] {
            found if found == state => Ok(()),
            found => Err(found.to_string()),
        });
    };
    is_in("down");
    let degraded = lab.daemon.json("status")["degraded"].to_string();
    assert!(degraded.contains("the upstream 203.0.113.2:7000 is down") && degraded.contains("refused"), "{degraded}");
    let refused = lab.topology.client.enter(|| ask(&mut tcp(at(ONE[0], 1))?, "hi"));
    assert!(refused.is_err(), "{refused:?}");
    server(&lab.topology.server, at(SERVER[0], 7_000), echo);
    is_in("up");
    assert_eq!(answer(&lab, at(ONE[0], 1), "hi").1, "hi");
    assert!(lab.daemon.ok("services").contains("203.0.113.2:7000  up"));
    assert_eq!(lab.daemon.json("status")["degraded"], Value::Array(Vec::new()));
}

fn transparent() {
    for family in Family::ALL {
        let upstream = family.of(SERVER);
        let options = format!("--upstream {} --transparent-source --connect-timeout 500ms", shown(upstream, 7_000));
        let lab = lab("sk-lookup", &options);
        server(&lab.topology.server, at(upstream, 7_000), |mut stream| {
            let text = stream.peer_addr()?.ip().to_string();
            stream.write_all(text.as_bytes())
        });
        let to = at(family.of(ONE), 1);
        let refused = lab.topology.client.enter(|| ask(&mut tcp(to)?, ""));
        assert!(refused.is_err(), "{refused:?}");
        let complaint = wait_for("complaint about the way back", PATIENCE, || {
            let degraded = lab.daemon.json("status")["degraded"].to_string();
            if degraded.contains("transparent-source: ") { Ok(degraded) } else { Err(degraded) }
        });
        let (_, commands) = complaint.split_once("run: ").expect("what to do");
        let commands = commands.split_once('"').expect("the end of a text").0;
        assert_eq!(commands.matches("ip ").count(), 2, "{commands}");
        // It is typed as it stands there.
        lab.topology.host.run("sh", ["-e", "-c", commands]);
        let (own, text) = answer(&lab, to, "");
        assert_eq!(text, own.ip().to_string());
        let host: IpAddr = family.of(HOST).parse().expect("an address");
        assert_ne!(text, host.to_string());
    }
}

fn idle() {
    let lab = lab("sk-lookup", &format!("--upstream {}", shown(SERVER[0], 7_000)));
    let listener = lab.topology.server.enter(|| TcpListener::bind(at(SERVER[0], 7_000))).expect("a listening socket");
    SockRef::from(&listener).set_read_timeout(Some(PATIENCE)).expect("a time limit");
    // One after the other, so that none waits for the listener and is lost there.
    let open = |count| -> Vec<(TcpStream, TcpStream)> {
        lab.topology.client.enter(|| {
            let one = |_| (tcp(at(ONE[0], 1)).expect("a connection"), listener.accept().expect("its other end").0);
            (0..count).map(one).collect()
        })
    };
    // What is allocated once only is there after the first connection.
    let mut lines = open(1);
    let before = memory(&lab);
    lines.extend(open(IDLE));
    let each = memory(&lab).saturating_sub(before) / IDLE;
    assert!(each < IDLE_MEMORY, "{each} bytes for each connection");
    // All of them still work.
    for (number, (client, upstream)) in lines.iter_mut().enumerate() {
        let number = number.to_be_bytes();
        upstream.write_all(&number).expect("sending");
        let mut heard = [0; size_of::<usize>()];
        client.read_exact(&mut heard).expect("a number");
        assert_eq!(heard, number);
    }
}

fn settings() {
    let mut lab =
        lab("sk-lookup", "--upstream 203.0.113.2:* --balance source-hash --health-check=port=7 --tcp keepalive=1m");
    for (options, status, why) in [
        ("", 2, "needs upstreams"),
        ("--upstream 203.0.113.2", 2, "has no port"),
        ("--upstream 203.0.113.2:* --health-check", 2, "needs a port"),
        ("--upstream a:1 --upstream a:1", 2, "stands there twice"),
        ("--upstream a:1 --health-check=raise=1", 2, "unknown field"),
        ("--upstream a:1 --connect-timeout 3", 2, "not a time"),
        ("--upstream a:1 --accept-proxy 192.0.2.1/24", 2, "did you mean"),
    ] {
        let error = lab.daemon.refused(&format!("add-service new --handler forward {options}"), status);
        assert!(error.contains(why), "{options}: {error}");
    }
    let before = lab.daemon.json("services");
    lab.daemon.stop();
    lab.daemon.restart();
    let after = lab.daemon.json("services");
    let names = |services: &Value| -> Vec<String> {
        services.as_array().expect("services").iter().map(|it| it["name"].to_string()).collect()
    };
    assert_eq!(names(&before), names(&after));
    assert_eq!(upstreams(&lab)[0]["address"], "203.0.113.2:*");
}
