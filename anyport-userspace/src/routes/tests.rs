use std::{
    collections::{HashMap, HashSet},
    process::Command,
};

use nix::sched::{CloneFlags, unshare};

use super::{Difference, Owners, Routes, difference, link_changes};
use crate::rules::Prefix;

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn prefixes(texts: &[&str]) -> HashSet<Prefix> {
    texts.iter().map(|text| prefix(text)).collect()
}

#[test]
fn difference_spares_what_is_not_ours() {
    let owners = |ours, others| Owners { ours, others };
    let found = HashMap::from([
        (prefix("192.0.2.0/24"), owners(true, false)),
        (prefix("198.51.100.0/24"), owners(true, false)),
        (prefix("203.0.113.0/24"), owners(false, true)),
        (prefix("203.0.113.7/32"), owners(false, true)),
        (prefix("2001:db8::/64"), owners(true, true)),
    ]);
    let wanted = prefixes(&["192.0.2.0/24", "203.0.113.0/24", "192.0.2.0/25"]);
    let mut difference = difference(&found, &wanted);
    difference.unwanted.sort_by_key(Prefix::len);
    assert_eq!(
        difference,
        Difference {
            unwanted: vec![prefix("198.51.100.0/24"), prefix("2001:db8::/64")],
            missing: vec![prefix("192.0.2.0/25")],
            left_as_found: vec![prefix("203.0.113.0/24")],
        }
    );
}

/// Runs `test` in a network namespace of its own, which goes with the thread. Needs root.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; run this test as root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn adds_and_removes_only_ours() {
    in_namespace(async || {
        ip("link set lo up");
        ip("route add local 198.51.100.0/24 dev lo");
        ip("-6 route add local 2001:db8:1::/64 dev lo metric 9");
        ip("route add 203.0.113.0/24 dev lo proto 165");
        let before = ip("route show table all") + &ip("-6 route show table all");
        let routes = Routes::open().unwrap();
        let wanted = prefixes(&[
            "192.0.2.0/24",
            "192.0.2.7",
            "0.0.0.0/0",
            "198.51.100.0/24",
            "2001:db8::/64",
            "2001:db8::7",
            "::/0",
            "2001:db8:1::/64",
        ]);
        for _ in 0..2 {
            let left_as_found = routes.add_missing(&wanted).await.unwrap();
            assert_eq!(HashSet::from_iter(left_as_found), prefixes(&["198.51.100.0/24", "2001:db8:1::/64"]));
            assert_eq!(routes.observe().await.unwrap().len(), 6);
        }
        assert!(ip("route get 192.0.2.77").contains("src 127.0.0.1"));
        assert!(ip("route get 2001:db8::77").contains("src ::1"));
        // A route of somebody else to the same destination outlives ours.
        ip("-6 route add local 2001:db8::/64 dev lo metric 2000 table local");
        routes.remove_unwanted(&wanted).await.unwrap();
        assert_eq!(routes.observe().await.unwrap().len(), 6);
        for _ in 0..2 {
            routes.remove_unwanted(&HashSet::new()).await.unwrap();
            assert!(routes.observe().await.unwrap().is_empty());
        }
        ip("-6 route del local 2001:db8::/64 dev lo metric 2000 table local");
        assert_eq!(ip("route show table all") + &ip("-6 route show table all"), before);
    });
}

#[test]
fn adds_more_than_the_socket_can_buffer() {
    in_namespace(async || {
        ip("link set lo up");
        let routes = Routes::open().unwrap();
        let wanted = (0..5000u32).map(|i| prefix(&format!("10.{}.{}.0/24", i >> 8, i & 0xff))).collect();
        routes.add_missing(&wanted).await.unwrap();
        assert_eq!(routes.observe().await.unwrap(), wanted);
        routes.remove_unwanted(&HashSet::new()).await.unwrap();
        assert!(routes.observe().await.unwrap().is_empty());
    });
}

#[test]
fn a_loopback_that_is_down_is_named() {
    in_namespace(async || {
        let routes = Routes::open().unwrap();
        for text in ["192.0.2.0/24", "2001:db8::/64"] {
            let error = routes.add_missing(&prefixes(&[text])).await.unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("ip link set lo up"), "{error}");
        }
    });
}

#[test]
fn finds_gateways_of_every_kind() {
    in_namespace(async || {
        for command in [
            "link add port0 type veth peer port1",
            "link set port1 up",
            "link set port0 up",
            "address add 192.0.2.1/24 dev port0",
            "route add default via 192.0.2.254",
            "route add 198.51.100.0/24 table 7 nexthop via 192.0.2.2 nexthop via 192.0.2.3",
            "route add 203.0.113.0/24 via inet6 fe80::1 dev port0",
            "-6 route add default via fe80::2 dev port0",
        ] {
            ip(command);
        }
        let gateways = Routes::open().unwrap().gateways().await.unwrap();
        let texts: Vec<_> = gateways.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["192.0.2.2", "192.0.2.3", "192.0.2.254", "fe80::1", "fe80::2"]);
    });
}

#[test]
fn tells_of_new_interfaces() {
    use futures_util::StreamExt as _;
    in_namespace(async || {
        let mut changes = link_changes().unwrap();
        ip("link add port0 type veth peer port1");
        let change = tokio::time::timeout(std::time::Duration::from_secs(5), changes.next());
        assert_eq!(change.await.unwrap(), Some(()));
    });
}
