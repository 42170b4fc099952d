//! Conversations over UDP.

use std::net::UdpSocket;

use super::{DescriptorPool, HandlerKind, Scene, TIMEOUT, UDP, eventually};

/// A UDP client that hears only what comes from the group's very address and port.
fn client(scene: &Scene, group: usize) -> UdpSocket {
    let address = scene.address(group);
    let client = UdpSocket::bind((address.ip(), 0)).unwrap();
    client.connect(address).unwrap();
    client.set_read_timeout(Some(TIMEOUT)).unwrap();
    client
}

fn answer(client: &UdpSocket, question: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0; 65_535];
    client.send(question).unwrap();
    let length = client.recv(&mut buffer).unwrap();
    buffer.truncate(length);
    buffer
}

#[test]
fn hello_over_udp() {
    let scene = Scene::new(HandlerKind::Hello, None);
    for group in UDP {
        let client = client(&scene, group);
        let line = format!("hello {}, you reached {} over udp\n", client.local_addr().unwrap(), scene.address(group));
        assert_eq!(answer(&client, b""), line.as_bytes());
        assert_eq!(answer(&client, &[0; 9000]), line.as_bytes());
    }
    eventually("it counts", || scene.service.stats().answered == 4);
    assert_eq!(scene.service.stats().datagrams, 4);
}

#[test]
fn echo_over_udp() {
    let scene = Scene::new(HandlerKind::Echo, None);
    for (group, largest) in UDP.into_iter().zip([65_507, 65_487]) {
        let client = client(&scene, group);
        for length in [0, 1, 1472, largest] {
            let question = vec![b'x'; length];
            assert!(answer(&client, &question) == question, "{length}");
        }
    }
}

#[test]
fn a_steered_source_gets_no_answer() {
    let scene = Scene::with(HandlerKind::Echo, None, DescriptorPool::new(100), |_, _| true);
    for group in UDP {
        let client = client(&scene, group);
        client.send(b"again").unwrap();
    }
    eventually("it counts", || scene.service.stats().refused_loop == 2);
    assert_eq!(scene.service.stats().answered, 0);
}

#[test]
fn discard_counts() {
    let scene = Scene::new(HandlerKind::Discard, None);
    for group in UDP {
        client(&scene, group).send(b"anyone?").unwrap();
    }
    eventually("it counts", || scene.service.stats().datagrams == 2);
    assert_eq!(scene.service.stats().answered, 0);
}
