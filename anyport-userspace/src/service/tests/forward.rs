//! `forward` with upstreams on the loopback interface.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use super::{DescriptorPool, Scene, ServiceConfig, TCP, UDP, eventually, rest};
use crate::{service::UpstreamState, sys};
use socket2::{Domain, SockRef, Socket, Type};

/// Sends each client `name` and then what the client sent until its end.
fn upstream(address: &str, name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap();
    let bound = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || {
                let mut stream = stream.unwrap();
                let mut heard = Vec::new();
                if stream.read_to_end(&mut heard).is_ok() {
                    drop(stream.write_all(&[name.as_bytes(), b" heard ", &heard].concat()));
                }
            });
        }
    });
    bound
}

/// An address at which nobody listens, and nobody will while the socket is there.
fn refusing() -> (Socket, SocketAddr) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    (socket, address)
}

fn scene(upstreams: &[String], settings: &str) -> Scene {
    let text = format!("name = \"test\"\nhandler = \"forward\"\nupstreams = {upstreams:?}\n{settings}");
    let config: ServiceConfig = toml::from_str(&text).unwrap();
    Scene::of(config, DescriptorPool::new(100), |_, _| false)
}

fn ask(mut stream: TcpStream, question: &str) -> String {
    stream.write_all(question.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    rest(&mut stream)
}

#[test]
fn version_1_of_the_header_is_for_tcp() {
    for (version, has_udp) in [("v1", false), ("v2", true)] {
        let scene = scene(&["127.0.0.1:9".to_owned()], &format!("proxy-protocol = {version:?}"));
        let groups = scene.service.groups();
        assert!(TCP.iter().all(|group| groups[*group].is_some()));
        assert!(UDP.iter().all(|group| groups[*group].is_some() == has_udp));
    }
}

#[test]
fn takes_turns_and_counts() {
    let upstreams = [upstream("127.0.0.1:0", "one").to_string(), upstream("[::1]:0", "two").to_string()];
    let scene = scene(&upstreams, "");
    for group in TCP {
        let mut answers = [0; 2].map(|_| ask(scene.dial(group), "abc"));
        answers.sort();
        assert_eq!(answers, ["one heard abc", "two heard abc"]);
    }
    eventually("connections end", || scene.service.stats().active == 0);
    for view in scene.service.upstreams() {
        assert_eq!((view.active, view.connections, view.failures), (0, 2, 0));
        assert_eq!((view.bytes_to, view.bytes_from), (6, 26));
    }
    assert!(scene.service.degraded().is_empty());
}

#[test]
fn tells_upstreams_who_dialled_what() {
    let upstreams = [upstream("127.0.0.1:0", "one").to_string()];
    for version in ["v1", "v2"] {
        let scene = scene(&upstreams, &format!("proxy-protocol = \"{version}\""));
        let stream = scene.dial(0);
        let (client, dialled) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
        let answer = ask(stream, "abc");
        if version == "v1" {
            let line = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n", client.port(), dialled.port());
            assert_eq!(answer, format!("one heard {line}abc"));
        } else {
            assert!(answer.starts_with("one heard \r\n\r\n\0\r\nQUIT\n") && answer.ends_with("abc"), "{answer:?}");
        }
    }
}

#[test]
fn what_the_client_has_said_leaves_with_the_header() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let upstreams = [listener.local_addr().unwrap().to_string()];
    let scene = scene(&upstreams, "proxy-protocol = \"v1\"");
    // It is accepted when the workers have time again, and has said something by then.
    for worker in scene.workers.handles().iter() {
        worker.spawn(async { thread::sleep(Duration::from_millis(300)) });
    }
    thread::sleep(Duration::from_millis(50));
    let mut client = scene.dial(0);
    client.write_all(b"early words").unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    let mut packet = [0; 200];
    let length = stream.read(&mut packet).unwrap();
    let packet = str::from_utf8(&packet[..length]).unwrap();
    assert!(packet.starts_with("PROXY ") && packet.ends_with("\r\nearly words"), "{packet:?}");
}

/// A client that has reset the connection before there was an upstream.
#[test]
fn what_a_client_that_is_gone_has_said_arrives() {
    for header in ["", "proxy-protocol = \"v1\""] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let scene = scene(&[listener.local_addr().unwrap().to_string()], header);
        for worker in scene.workers.handles().iter() {
            worker.spawn(async { thread::sleep(Duration::from_millis(300)) });
        }
        thread::sleep(Duration::from_millis(50));
        let mut client = scene.dial(0);
        client.write_all(b"last words").unwrap();
        while sys::unacknowledged(&client).unwrap() > 0 {
            thread::sleep(Duration::from_millis(1));
        }
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        let (mut stream, _) = listener.accept().unwrap();
        let mut heard = Vec::new();
        let end = stream.read_to_end(&mut heard).map_err(|error| error.kind());
        assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
        assert!(heard.ends_with(b"last words") && heard.starts_with(b"PROXY") != header.is_empty(), "{heard:?}");
    }
}

/// The host of the client's upstream is there, so another one would be the wrong one.
#[test]
fn a_refused_connection_goes_nowhere_else_by_source_hash() {
    let mut refused = 0;
    for _ in 0..16 {
        let (_closed, one) = refusing();
        let upstreams = [one.to_string(), upstream("127.0.0.1:0", "other").to_string()];
        let scene = scene(&upstreams, "balance = \"source-hash\"\nejection = { failures = 0 }");
        let mut stream = scene.dial(0);
        stream.write_all(b"abc").ok();
        stream.shutdown(Shutdown::Write).ok();
        let mut text = String::new();
        let is_answered = stream.read_to_string(&mut text).is_ok() && text == "other heard abc";
        let failures = scene.service.upstreams()[0].failures;
        assert_eq!(failures, u64::from(!is_answered), "{text:?}");
        refused += failures;
    }
    assert!((1..16).contains(&refused), "{refused} of 16 were the other one's");
}

#[test]
fn believes_the_peers_that_it_is_told_to() {
    let upstreams = [upstream("127.0.0.1:0", "one").to_string()];
    let scene = scene(&upstreams, "proxy-protocol = \"v1\"\naccept-proxy = [\"127.0.0.0/8\"]");
    let header = "PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n";
    assert_eq!(ask(scene.dial(0), &format!("{header}abc")), format!("one heard {header}abc"));
    // In pieces.
    let mut stream = scene.dial(0);
    for piece in header.as_bytes().chunks(7) {
        stream.write_all(piece).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(ask(stream, "abc"), format!("one heard {header}abc"));
    // Over IPv6 the peer is not one of them.
    assert!(ask(scene.dial(2), header).starts_with("one heard PROXY TCP6 ::1 ::1 "));
    let mut bad = scene.dial(0);
    bad.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(bad.read(&mut [0]).is_err(), "it is reset");
    drop(scene.dial(0));
    eventually("both are counted", || scene.service.stats().bad_headers == 2);
}

#[test]
fn tries_the_next_one() {
    let (_socket, nobody) = refusing();
    let upstreams = [nobody.to_string(), upstream("127.0.0.1:0", "one").to_string()];
    let scene = scene(&upstreams, "ejection = { failures = 4, time = \"1m\" }");
    for _ in 0..20 {
        assert_eq!(ask(scene.dial(0), "abc"), "one heard abc");
    }
    let [bad, good] = &scene.service.upstreams()[..] else { panic!("two upstreams") };
    assert_eq!((bad.state, bad.connections, bad.failures), (UpstreamState::Ejected, 0, 4));
    assert_eq!((good.state, good.connections, good.failures), (UpstreamState::Up, 20, 0));
    let degraded = scene.service.degraded();
    assert!(degraded[0].contains("is ejected for 0 s: 4 failures in a row, the last one: Connection refused"));
}

#[test]
fn nobody_left_is_told_at_once() {
    let (_socket, nobody) = refusing();
    let scene = scene(&[nobody.to_string()], "");
    let mut stream = scene.dial(0);
    assert!(stream.read(&mut [0]).is_err(), "it is reset");
    eventually("it is counted", || scene.service.stats().unforwarded == 1);
}

#[test]
fn does_not_dial_itself() {
    // The original destination is the service itself.
    let scene = scene(&["127.0.0.1:*".to_owned()], "");
    assert!(scene.dial(0).read(&mut [0]).is_err(), "it is reset");
    assert_eq!(scene.service.stats().accepted, 1);
}

#[test]
fn health_checks_take_upstreams_down_and_up() {
    let (socket, address) = refusing();
    let upstreams = [address.to_string(), upstream("127.0.0.1:0", "one").to_string()];
    let scene = scene(&upstreams, "health-check = { interval = \"20ms\", timeout = \"1s\", rise = 3, fall = 2 }");
    eventually("it is down", || scene.service.upstreams()[0].state == UpstreamState::Down);
    assert!(scene.service.degraded()[0].contains("health check: Connection refused"));
    for _ in 0..4 {
        assert_eq!(ask(scene.dial(0), "abc"), "one heard abc");
    }
    assert_eq!(scene.service.upstreams()[0].failures, 0, "nobody was connected to it");
    socket.listen(10).unwrap();
    eventually("it is up", || scene.service.upstreams()[0].state == UpstreamState::Up);
    assert!(scene.service.degraded().is_empty());
}

#[test]
fn resolves_names() {
    let port = upstream("127.0.0.1:0", "one").port();
    let scene = scene(&[format!("localhost:{port}"), "name.invalid:80".to_owned()], "");
    // At once: who comes before the answer waits for it.
    assert_eq!(ask(scene.dial(0), "abc"), "one heard abc");
    // The other name is asked for by itself.
    let complaint = "the name name.invalid does not resolve, it has no addresses yet";
    eventually("the complaint", || scene.service.degraded().iter().any(|it| it.contains(complaint)));
    let views = scene.service.upstreams();
    assert!(views.iter().all(|it| it.name.as_deref() == Some("localhost")));
}

#[test]
fn a_connection_takes_two_descriptors() {
    let upstreams = [upstream("127.0.0.1:0", "one").to_string()];
    let text = format!("name = \"test\"\nhandler = \"forward\"\nupstreams = {upstreams:?}");
    let scene = Scene::of(toml::from_str(&text).unwrap(), DescriptorPool::new(5), |_, _| false);
    let first = scene.dial(0);
    eventually("one is served", || scene.service.stats().active == 1);
    let second = scene.dial(0);
    // Only one more would be let in, which is kept for a source that has none.
    eventually("the other is refused", || scene.service.stats().refused_source == 1);
    assert_eq!(scene.service.stats().active, 1);
    assert_eq!(ask(first, "my turn"), "one heard my turn");
    drop(second);
}

#[test]
fn time_limits_are_those_of_the_settings() {
    let upstreams = [upstream("127.0.0.1:0", "one").to_string()];
    for limit in ["idle-timeout", "max-duration"] {
        let scene = scene(&upstreams, &format!("{limit} = \"100ms\""));
        let mut stream = scene.dial(0);
        let end = stream.read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset), "nobody takes that for the end");
        eventually("it is closed", || scene.service.stats().active == 0);
    }
}
