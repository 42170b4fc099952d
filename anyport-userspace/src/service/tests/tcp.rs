//! Conversations over TCP.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::AsFd as _,
    process::Command,
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use socket2::{Domain, SockRef, Socket, Type};

use super::{DescriptorPool, HandlerKind, Scene, TCP, eventually, rest};

#[test]
fn hello_over_tcp() {
    let scene = Scene::new(HandlerKind::Hello, None);
    for group in TCP {
        // More than one worker's share.
        for _ in 0..20 {
            let mut stream = scene.dial(group);
            let line =
                format!("hello {}, you reached {} over tcp\n", stream.local_addr().unwrap(), scene.address(group));
            // Unread words of the client must not cost it the answer.
            stream.write_all(&[b'x'; 3000]).unwrap();
            assert_eq!(rest(&mut stream), line);
        }
    }
    assert_eq!(scene.service.stats().accepted, 40);
    eventually("connections end", || scene.service.stats().active == 0);
}

#[test]
fn hello_waits_for_no_client_for_long() {
    let scene = Scene::new(HandlerKind::Hello, None);
    let mut stream = scene.dial(0);
    assert!(rest(&mut stream).starts_with("hello "));
    eventually("the service closes", || scene.service.stats().active == 0);
}

#[test]
fn echo_over_tcp() {
    let scene = Scene::new(HandlerKind::Echo, None);
    let sent: Vec<u8> = (0..1_000_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    for group in TCP {
        let mut stream = scene.dial(group);
        stream.write_all(b"one").unwrap();
        let mut three = [0; 3];
        stream.read_exact(&mut three).unwrap();
        assert_eq!(&three, b"one");
        let mut writer = stream.try_clone().unwrap();
        let mut received = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                writer.write_all(&sent).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            stream.read_to_end(&mut received).unwrap();
        });
        assert!(received == sent);
    }
}

#[test]
fn discard_after_a_banner() {
    let scene = Scene::new(HandlerKind::Discard, Some("SSH-2.0-x\r\n"));
    for group in TCP {
        let mut stream = scene.dial(group);
        let mut banner = [0; 11];
        stream.read_exact(&mut banner).unwrap();
        assert_eq!(&banner, b"SSH-2.0-x\r\n");
        stream.write_all(&vec![b'x'; 1_000_000]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rest(&mut stream), "");
    }
}

#[test]
fn accepted_connections_are_set_up_by_their_listener() {
    let scene = Scene::new(HandlerKind::Echo, None);
    for group in TCP {
        let handle = scene.service.groups()[group].clone().unwrap();
        let descriptor = handle.descriptor().unwrap();
        let descriptor = descriptor.as_fd();
        let listener = SockRef::from(&descriptor);
        // The workers accept too; one of many connections is left for the test.
        listener.set_nonblocking(false).unwrap();
        listener.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let accepted = (0..200).find_map(|_| {
            let _client = scene.dial(group);
            listener.accept().ok()
        });
        let (accepted, _) = accepted.expect("one of 200 connections");
        assert!(accepted.tcp_nodelay().unwrap() && accepted.keepalive().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), Duration::from_mins(5));
    }
}

#[test]
fn who_finds_no_descriptor_is_refused() {
    let in_namespace = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        // All of a network at the loopback interface is local.
        for line in ["link set lo up", "address add 198.51.100.1/24 dev lo"] {
            assert!(Command::new("ip").args(line.split(' ')).status().unwrap().success(), "{line}");
        }
        let scene = Scene::with(HandlerKind::Echo, None, DescriptorPool::new(2), |_, _| false);
        // Each from a source of its own, of which none takes more than its share.
        let dial = |source: u8| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::from(([198, 51, 100, source], 0)).into()).unwrap();
            socket.connect(&scene.address(0).into()).unwrap();
            TcpStream::from(socket)
        };
        let served = |mut stream: TcpStream| {
            stream.write_all(b"my turn")?;
            stream.shutdown(Shutdown::Write)?;
            let mut heard = String::new();
            stream.read_to_string(&mut heard).map(|_| heard)
        };
        let held = [dial(1), dial(2)];
        eventually("two are served", || scene.service.stats().active == 2);
        for source in 3..6 {
            assert!(served(dial(source)).is_err(), "it is reset");
        }
        let stats = scene.service.stats();
        assert_eq!((stats.accepted, stats.active, stats.refused_total), (5, 2, 3));
        for stream in held {
            assert_eq!(served(stream).unwrap(), "my turn");
        }
        eventually("both have ended", || scene.service.stats().active == 0);
        assert_eq!(served(dial(3)).unwrap(), "my turn");
    };
    thread::spawn(in_namespace).join().unwrap();
}
