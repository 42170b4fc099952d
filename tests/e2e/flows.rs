//! Datagrams that the handler `forward` carries to an upstream.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    process::{Command, Stdio},
    sync::Arc,
    thread::{self, sleep},
    time::Duration,
};

use anyport_tests::{
    dial::{PATIENCE, any, expect_udp_unanswered, receive, udp_over},
    host::wait_for,
    netns::Netns,
    prerequisites,
    topology::{CLIENT, SECOND, SERVER},
};
use libtest_mimic::Trial;
use nix::sys::socket::{setsockopt, sockopt};
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, ServerConfig, TokioRuntime,
    rustls::{RootCertStore, pki_types::PrivatePkcs8KeyDer},
};
use tokio::runtime::Builder;

use crate::cases::{Family, Lab, at, on_each_back_end, trial};

/// A steered prefix of each family.
const PREFIX: [&str; 2] = ["192.0.2.0/24", "2001:db8:0:a::/64"];
/// Addresses in them.
const ONE: [&str; 2] = ["192.0.2.201", "2001:db8:0:a::201"];
/// Where upstreams listen.
const PORT: u16 = 4_242;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(on_each_back_end("flows::answers come from what was dialled", answers));
    trials.extend(on_each_back_end("flows::batches arrive whole", batches));
    trials.extend(on_each_back_end("flows::idle ones are forgotten", idle));
    trials.push(trial("flows::the least recently used go first", evicted));
    trials.push(trial("flows::answered questions end a flow", responses));
    trials.push(trial("flows::a newcomer gets the descriptors of the oldest", few_descriptors));
    trials.push(trial("flows::who refuses gets no more", refused));
    trials.push(trial("flows::the upstream is told who dialled what", header));
    trials.push(trial("flows::version 1 of the PROXY protocol has no words for them", version_1));
    trials.push(trial("flows::the upstream sees the client", transparent));
    trials.push(trial("flows::they outlive their service", outlive));
    trials.push(trial("flows::DNS", dns));
    trials.extend(on_each_back_end("flows::QUIC", quic));
    trials
}

/// Hosts and a daemon that forwards all UDP of [`PREFIX`] to the server.
fn lab(backend: &str, upstreams: &[&str], settings: &str) -> Lab {
    let lab = Lab::new(backend);
    serve(&lab, upstreams, settings);
    lab
}

fn serve(lab: &Lab, upstreams: &[&str], settings: &str) {
    for (family, upstream) in Family::ALL.into_iter().zip(upstreams) {
        lab.daemon.ok(&format!("add-service up{family} --handler forward --upstream {upstream} {settings}"));
        lab.daemon.ok(&format!("add-prefix {} --protocol udp --service up{family}", family.of(PREFIX)));
    }
}

/// Upstreams that keep the port of the original destination.
fn same_port() -> [String; 2] {
    [format!("{}:*", SERVER[0]), format!("[{}]:*", SERVER[1])]
}

/// Answers each datagram with its source and itself, for as long as the test runs.
fn witness(lab: &Lab, address: SocketAddr) {
    let socket = lab.topology.server.enter(|| UdpSocket::bind(address)).expect("a UDP socket");
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let mut answer = format!("{from} ").into_bytes();
            answer.extend(&buffer[..length]);
            // Clients may be gone.
            socket.send_to(&answer, from).ok();
        }
    });
}

/// A socket that is connected to `to`, as clients have it.
fn client(lab: &Lab, to: SocketAddr) -> UdpSocket {
    lab.topology.client.enter(|| {
        let socket = UdpSocket::bind(any(to.ip())).expect("a UDP socket");
        socket.connect(to).expect("a connected UDP socket");
        socket
    })
}

/// Who the upstream saw, as [`witness`] tells.
fn seen(socket: &UdpSocket, question: &str) -> SocketAddr {
    let answer = udp_over(socket, question.as_bytes(), PATIENCE).expect("an answer");
    let answer = String::from_utf8(answer).expect("text");
    let (from, text) = answer.split_once(' ').expect("a source and a text");
    assert_eq!(text, question);
    from.parse().expect("an address")
}

/// The host's sockets of flows towards `client`.
fn flow_sockets(lab: &Lab, client: SocketAddr) -> usize {
    let sockets = lab.topology.host.run("ss", ["-Huan", "state", "connected"]);
    sockets.lines().filter(|line| line.split_whitespace().any(|word| word == client.to_string())).count()
}

/// A flow keeps its way, and another client has another one.
fn answers(backend: &'static str) {
    let upstreams = same_port();
    let lab = lab(backend, &[&upstreams[0], &upstreams[1]], "");
    for family in Family::ALL {
        let to = at(family.of(ONE), PORT);
        witness(&lab, at(family.of(SERVER), PORT));
        // A connected socket gets nothing but what comes from there.
        let (one, other) = (client(&lab, to), client(&lab, to));
        let own = one.local_addr().expect("an own address");
        let way = seen(&one, "first");
        assert_ne!(seen(&other, "other"), way);
        assert_eq!(flow_sockets(&lab, own), 0, "a single question has no socket towards the client");
        for round in 0..20 {
            assert_eq!(seen(&one, &format!("round {round}")), way);
        }
        assert_eq!(flow_sockets(&lab, own), 1);
        let _ = seen(&client(&lab, at(family.of(ONE), PORT)), "third");
        let counted = lab.service_after(&format!("up{family}"), 23);
        assert_eq!(counted["flows"], 3, "{counted}");
        assert_eq!(counted["upstreams"][0]["active"], 3, "{counted}");
        assert_eq!(counted["datagrams"], 23, "{counted}");
    }
    // A rule that goes takes its flows with it.
    lab.daemon.ok(&format!("remove-prefix {}", PREFIX[0]));
    lab.topology.client.enter(|| expect_udp_unanswered(at(ONE[0], PORT)));
    assert_eq!(lab.daemon.json("services")[1]["upstreams"][0]["active"], 0);
}

/// What the client's kernel joins, in both directions, and datagrams of all sizes.
fn batches(backend: &'static str) {
    let upstreams = same_port();
    let lab = lab(backend, &[&upstreams[0], &upstreams[1]], "");
    for family in Family::ALL {
        let to = at(family.of(ONE), PORT);
        let upstream = lab.topology.server.enter(|| UdpSocket::bind(at(family.of(SERVER), PORT)));
        let upstream = upstream.expect("a UDP socket");
        upstream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let socket = client(&lab, to);
        socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let mut buffer = vec![0; 65_536];
        let mut peer = None;
        for length in [1, 0, 1_400, 9_000, 60_000, 1_400] {
            socket.send(&vec![7; length]).expect("sending");
            let (received, from) = receive(&upstream, &mut buffer).expect("a datagram");
            assert_eq!((received, peer.unwrap_or(from)), (length, from));
            peer = Some(from);
        }
        let peer = peer.expect("a flow");
        // From the client, then to it: 40 of 1,200 bytes and a short one, by one system call.
        let bytes: Vec<u8> = (0..=250).cycle().take(40 * 1_200 + 77).collect();
        upstream.connect(peer).expect("a connected UDP socket");
        for (from, to) in [(&socket, &upstream), (&upstream, &socket)] {
            setsockopt(from, sockopt::UdpGsoSegment, &1_200).expect("UDP_SEGMENT");
            for _ in 0..20 {
                from.send(&bytes).expect("sending");
                let mut received: Vec<u8> = Vec::new();
                while received.len() < bytes.len() {
                    let (length, _) = receive(to, &mut buffer).expect("a datagram");
                    assert!(length == 1_200 || length == 77, "{length} bytes");
                    received.extend(&buffer[..length]);
                }
                assert!(received == bytes, "the datagrams came in another order or changed");
            }
        }
    }
}

fn idle(backend: &'static str) {
    let upstreams = same_port();
    let lab = lab(backend, &[&upstreams[0], &upstreams[1]], "--udp idle-timeout=1s");
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", lab.daemon.pid())).expect("its descriptors").count();
    for family in Family::ALL {
        let to = at(family.of(ONE), PORT);
        witness(&lab, at(family.of(SERVER), PORT));
        let before = descriptors();
        let (busy, quiet) = (client(&lab, to), client(&lab, to));
        let ways = [seen(&busy, "one"), seen(&quiet, "one")];
        let _ = (seen(&busy, "two"), seen(&quiet, "two"));
        let own = [&busy, &quiet].map(|socket| socket.local_addr().expect("an own address"));
        wait_for("end of the quiet flow", Duration::from_secs(10), || {
            assert_eq!(seen(&busy, "still there"), ways[0]);
            sleep(Duration::from_millis(50));
            if flow_sockets(&lab, own[1]) == 0 { Ok(()) } else { Err("it has a socket") }.map_err(str::to_owned)
        });
        assert_eq!(flow_sockets(&lab, own[0]), 1);
        assert_ne!(seen(&quiet, "again"), ways[1], "a new flow has a new socket");
        wait_for("end of all flows", Duration::from_secs(10), || {
            // Sockets to answer with have an age of their own.
            let now = descriptors();
            if now <= before { Ok(()) } else { Err(format!("{now} descriptors, {before} before")) }
        });
    }
}

fn evicted() {
    let lab = Lab::with("sk-lookup", |setup| setup.args(["--workers", "1"]));
    let upstreams = same_port();
    serve(&lab, &[&upstreams[0]], "--udp max-flows=4");
    let to = at(ONE[0], PORT);
    witness(&lab, at(SERVER[0], PORT));
    let kept = client(&lab, to);
    let way = seen(&kept, "kept");
    for number in 0..20 {
        let _ = seen(&client(&lab, to), &format!("client {number}"));
        assert_eq!(seen(&kept, "used in between"), way);
    }
    let counted = lab.daemon.json("services");
    let counted = counted.as_array().expect("services").iter().find(|it| it["name"] == "up4").expect("it");
    // A source has four fifths of the flows, and its oldest one goes for another.
    assert_eq!((&counted["flows"], &counted["evicted"]), (&21.into(), &18.into()), "{counted}");
    assert_eq!(counted["refused_source"], 0, "{counted}");
}

/// A flow is over when each question has as many answers as were told.
fn responses() {
    for responses in [1, 2] {
        let lab = Lab::with("sk-lookup", |setup| setup.args(["--workers", "1"]));
        let upstreams = same_port();
        serve(&lab, &[&upstreams[0]], &format!("--udp responses={responses}"));
        witness(&lab, at(SERVER[0], PORT));
        let socket = client(&lab, at(ONE[0], PORT));
        for number in 0..10 {
            // The witness answers each question once.
            let _ = seen(&socket, &format!("question {number}"));
        }
        let counted = lab.service_after("up4", 10);
        assert_eq!(counted["flows"], if responses == 1 { 10 } else { 1 }, "{counted}");
    }
}

/// Of 256 descriptors, a quarter is kept for other things, and a flow takes two.
fn few_descriptors() {
    const CLIENTS: u64 = 200;
    let lab = Lab::with("sk-lookup", |setup| setup.args(["--workers", "1"]).through(["prlimit", "--nofile=256:256"]));
    let upstreams = same_port();
    serve(&lab, &[&upstreams[0]], "");
    witness(&lab, at(SERVER[0], PORT));
    for number in 0..CLIENTS {
        // Asked once, and answered.
        let _ = seen(&client(&lab, at(ONE[0], PORT)), &format!("client {number}"));
    }
    let counted = lab.service_after("up4", CLIENTS);
    // Now and then a client has the port of one whose flow is still there.
    assert_eq!(counted["unforwarded"], 0, "{counted}");
    assert!(counted["evicted"].as_u64() >= Some(CLIENTS / 4), "{counted}");
}

/// One of two upstreams is not there: its host says so, and the flow's next datagram goes to the other one.
fn refused() {
    let lab = Lab::new("sk-lookup");
    let two = format!("{}:{PORT} --upstream {}:{PORT}", SECOND[0], SERVER[0]);
    serve(&lab, &[&two], "--ejection failures=1,time=1m");
    witness(&lab, at(SERVER[0], PORT));
    let socket = client(&lab, at(ONE[0], 99));
    wait_for("answer", PATIENCE, || {
        udp_over(&socket, b"anybody?", Duration::from_millis(200)).map_err(|error| error.to_string())
    });
    for number in 0..10 {
        let _ = seen(&client(&lab, at(ONE[0], 99)), &format!("client {number}"));
    }
    let counted = lab.daemon.json("services");
    assert!(counted.to_string().contains("\"state\":\"ejected\""), "{counted}");
    let degraded = lab.daemon.json("status")["degraded"].to_string();
    assert!(degraded.contains(SECOND[0]) && degraded.contains("refused"), "{degraded}");
}

/// Before each datagram, as any of them may come first.
fn header() {
    let upstreams = same_port();
    let lab = lab("sk-lookup", &[&upstreams[0], &upstreams[1]], "--proxy-protocol v2");
    for family in Family::ALL {
        let upstream = lab.topology.server.enter(|| UdpSocket::bind(at(family.of(SERVER), PORT)));
        let upstream = upstream.expect("a UDP socket");
        upstream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let socket = client(&lab, at(family.of(ONE), PORT));
        let own = socket.local_addr().expect("an own address");
        for text in ["one", "two", "three"] {
            socket.send(text.as_bytes()).expect("sending");
            let mut buffer = [0; 200];
            let (length, from) = receive(&upstream, &mut buffer).expect("a datagram");
            let mut expected = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
            let octets = |address: SocketAddr| match address {
                SocketAddr::V4(address) => address.ip().octets().to_vec(),
                SocketAddr::V6(address) => address.ip().octets().to_vec(),
            };
            expected.extend(family.of([[0x21, 0x12, 0, 12], [0x21, 0x22, 0, 36]]));
            expected.extend(octets(own));
            expected.extend(octets(at(family.of(ONE), PORT)));
            expected.extend(own.port().to_be_bytes());
            expected.extend(PORT.to_be_bytes());
            expected.extend(text.as_bytes());
            assert_eq!(&buffer[..length], expected);
            // Answers have none.
            upstream.send_to(text.as_bytes(), from).expect("answering");
            socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
            let (length, _) = receive(&socket, &mut buffer).expect("a datagram");
            assert_eq!(&buffer[..length], text.as_bytes());
        }
    }
}

fn version_1() {
    let upstreams = same_port();
    let lab = lab("sk-lookup", &[&upstreams[0]], "--proxy-protocol v1");
    witness(&lab, at(SERVER[0], PORT));
    assert!(lab.topology.client.enter(|| expect_udp_unanswered(at(ONE[0], PORT))), "an ICMP error was expected");
    assert_eq!(lab.daemon.json("prefixes")[0]["no_socket"], 1);
}

/// With the way back that docs/operations.md describes.
fn transparent() {
    let upstreams = same_port();
    let lab = lab("sk-lookup", &[&upstreams[0], &upstreams[1]], "--transparent-source");
    for family in Family::ALL {
        witness(&lab, at(family.of(SERVER), PORT));
        let (option, all) = family.of([("", "0.0.0.0/0"), ("-6 ", "::/0")]);
        lab.topology.host.ip(&format!("{option}rule add from {} iif server lookup 165", family.of(SERVER)));
        lab.topology.host.ip(&format!("{option}route add local {all} dev lo table 165"));
        let socket = client(&lab, at(family.of(ONE), PORT));
        let own = socket.local_addr().expect("an own address");
        assert_eq!(own.ip(), at(family.of(CLIENT), 0).ip());
        for text in ["one", "two", "three"] {
            assert_eq!(seen(&socket, text), own);
        }
    }
}

fn outlive() {
    let upstreams = same_port();
    let mut lab = lab("sk-lookup", &[&upstreams[0]], "--udp idle-timeout=2s,on-down=keep");
    witness(&lab, at(SERVER[0], PORT));
    let socket = client(&lab, at(ONE[0], PORT));
    let way = seen(&socket, "one");
    let _ = seen(&socket, "two");
    lab.daemon.ok(&format!("remove-prefix {}", PREFIX[0]));
    lab.daemon.ok("remove-service up4");
    assert_eq!(seen(&socket, "three"), way);
    let own = socket.local_addr().expect("an own address");
    assert_eq!(flow_sockets(&lab, own), 1);
    wait_for("end of the flow", Duration::from_secs(10), || match flow_sockets(&lab, own) {
        0 => Ok(()),
        count => Err(format!("{count} sockets")),
    });
    lab.daemon.stop();
}

/// A real server and client: over UDP, and what is too long for that over TCP.
fn dns() {
    let lab = Lab::new("sk-lookup");
    for family in Family::ALL {
        let server = family.of([SERVER[0].to_owned(), format!("[{}]", SERVER[1])]);
        lab.daemon.ok(&format!("add-service dns{family} --handler forward --upstream {server}:53"));
        lab.daemon.ok(&format!("add-prefix {} --protocol both --service dns{family}", family.of(PREFIX)));
    }
    let directory = prerequisites::scratch();
    let mut command = Command::new("setpriv");
    command.args([
        "--pdeathsig",
        "KILL",
        "--",
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
    ]);
    command.args(["--no-hosts", "--user=root", "--log-facility=-", "--address=/host.example/198.51.100.77"]);
    command.arg(format!("--pid-file={}", directory.path().join("pid").display()));
    for number in 0..60 {
        command.arg(format!("--txt-record=long.example,{}{number}", "x".repeat(60)));
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut server = lab.topology.server.spawn(command);
    for family in Family::ALL {
        let dig = |arguments: &str| {
            let at = format!("@{} -p 5353 +tries=1 +time=2 {arguments}", family.of(ONE));
            lab.topology.client.output(Command::new("dig").args(at.split_whitespace()))
        };
        wait_for("answer", Duration::from_secs(10), || {
            let answer = dig("+short host.example");
            if answer.stdout.trim() == "198.51.100.77" { Ok(()) } else { Err(answer.to_string()) }
        });
        // dig asks again over TCP when the answer is cut off.
        for how in ["+bufsize=512", "+bufsize=4096 +notcp", "+tcp"] {
            let answer = dig(&format!("{how} long.example TXT"));
            assert_eq!(answer.stdout.matches("xxxx").count() / 15, 60, "{how}: {answer}");
        }
    }
    server.kill().expect("SIGKILL to the server");
    server.wait().expect("its end");
}

/// A megabyte in each direction by a real implementation, which joins datagrams and moves its connections' ends as it likes.
fn quic(backend: &'static str) {
    const LENGTH: usize = 1 << 20;
    let upstreams = same_port();
    let lab = lab(backend, &[&upstreams[0], &upstreams[1]], "");
    let certificate = rcgen::generate_simple_self_signed(["origin.example".to_owned()]).expect("a certificate");
    let key = PrivatePkcs8KeyDer::from(certificate.signing_key.serialize_der());
    let certificate = certificate.cert.der().clone();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).expect("a trusted certificate");
    let open = |namespace: &Netns, address: SocketAddr, config: Option<ServerConfig>| {
        let socket = namespace.enter(|| UdpSocket::bind(address)).expect("a UDP socket");
        Endpoint::new(EndpointConfig::default(), config, socket, Arc::new(TokioRuntime)).expect("an endpoint")
    };
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        for family in Family::ALL {
            let config = ServerConfig::with_single_cert(vec![certificate.clone()], key.clone_key().into());
            let config = config.expect("a server's configuration");
            let server = open(&lab.topology.server, at(family.of(SERVER), PORT), Some(config));
            let echo = tokio::spawn(async move {
                let connection = server.accept().await.expect("a client").await.expect("a connection");
                let (mut answer, mut question) = connection.accept_bi().await.expect("a stream");
                let bytes = question.read_to_end(2 * LENGTH).await.expect("all of it");
                answer.write_all(&bytes).await.expect("a taker");
                answer.finish().expect("an open stream");
                connection.closed().await;
            });
            let to = at(family.of(ONE), PORT);
            let mut client = open(&lab.topology.client, any(to.ip()), None);
            let config = ClientConfig::with_root_certificates(Arc::new(roots.clone())).expect("a configuration");
            client.set_default_client_config(config);
            let connection = client.connect(to, "origin.example").expect("an attempt").await.expect("a connection");
            let (mut question, mut answer) = connection.open_bi().await.expect("a stream");
            let bytes: Vec<u8> = (0..=250).cycle().take(LENGTH).collect();
            question.write_all(&bytes).await.expect("a taker");
            question.finish().expect("an open stream");
            let back = answer.read_to_end(2 * LENGTH).await.expect("all of it");
            assert!(back == bytes, "{} bytes came back as {} or changed", bytes.len(), back.len());
            connection.close(0_u8.into(), b"done");
            client.wait_idle().await;
            echo.await.expect("a server that did not panic");
        }
    });
}
