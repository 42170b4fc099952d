//! Starting and stopping.

use std::{
    collections::HashSet,
    io::Write as _,
    net::{Shutdown, TcpListener, TcpStream, UdpSocket},
};

use super::{HandlerKind, Scene, TCP, UDP, eventually, rest};
use crate::{rules::Protocol, service::Family};

#[test]
fn connections_outlive_their_service() {
    let scene = Scene::new(HandlerKind::Echo, None);
    let mut streams = TCP.map(|group| scene.dial(group));
    eventually("both are open", || scene.service.stats().active == 2);
    let addresses = TCP.map(|group| scene.address(group));
    let _workers = scene.stop();
    for address in addresses {
        assert!(TcpStream::connect(address).is_err());
    }
    for stream in &mut streams {
        stream.write_all(b"still there?").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(rest(stream), "still there?");
    }
}

#[test]
fn stopping_frees_the_ports() {
    let scene = Scene::new(HandlerKind::Hello, None);
    let addresses = [0, 1, 2, 3].map(|group| scene.address(group));
    scene.stop();
    for group in TCP {
        TcpListener::bind(addresses[group]).unwrap();
    }
    for group in UDP {
        UdpSocket::bind(addresses[group]).unwrap();
    }
}

#[test]
fn says_what_its_sockets_are() {
    let scene = Scene::new(HandlerKind::Hello, None);
    let sockets = scene.service.sockets();
    assert_eq!(sockets.len(), 12);
    let cookies: HashSet<u64> = sockets.iter().map(|socket| socket.cookie).collect();
    assert_eq!(cookies.len(), 12);
    assert_eq!((sockets[0].family, sockets[0].protocol), (Family::Ipv4, Protocol::Tcp));
    assert_eq!((sockets[11].family, sockets[11].protocol), (Family::Ipv6, Protocol::Udp));
    let json = serde_json::to_value(&sockets[3]).unwrap();
    assert_eq!((&json["family"], &json["protocol"]), (&"ipv4".into(), &"udp".into()));
    for (group, first) in scene.service.groups().iter().zip(sockets.chunks(3)) {
        let group = group.as_ref().unwrap();
        assert_eq!(group.cookie, first[0].cookie);
        assert_eq!(group.bound, first[0].local);
    }
}
