//! Tests of local routes, in network namespaces of their own.

use std::{collections::HashSet, fs, process::Command, time::Duration};

use futures_util::StreamExt as _;
use netlink_packet_route::{RouteNetlinkMessage, route::RouteMessage};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{MulticastGroup, packet_core::NetlinkPayload};
use tokio::time::timeout;

use super::{Coverage, Edits, News, ROUTE_PROTOCOL, Route, Routes};
use crate::rules::Prefix;

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn prefixes<T: FromIterator<Prefix>>(texts: &[&str]) -> T {
    texts.iter().map(|text| prefix(text)).collect()
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

fn all_routes() -> String {
    ip("route show table all") + &ip("-6 route show table all")
}

#[test]
fn finds_the_one_route_to_an_address() {
    in_namespace(async || {
        ip("link set lo up");
        ip("route add local 198.51.100.0/24 dev lo");
        ip("route add 203.0.113.0/24 dev lo");
        let routes = Routes::open().unwrap();
        assert_eq!(routes.to("192.0.2.7".parse().unwrap()).await.unwrap(), None);
        routes.add(&prefixes::<Vec<_>>(&["192.0.2.0/24", "2001:db8::/64"])).await.unwrap();
        ip("route add blackhole 192.0.0.0/16");
        for (address, block, is_local, protocol) in [
            ("192.0.2.7", "192.0.2.0/24", true, ROUTE_PROTOCOL),
            ("2001:db8::7", "2001:db8::/64", true, ROUTE_PROTOCOL),
            // `boot` and `kernel`
            ("198.51.100.7", "198.51.100.0/24", true, 3),
            ("203.0.113.7", "203.0.113.0/24", false, 3),
            ("127.0.0.1", "127.0.0.1/32", true, 2),
        ] {
            let expected = Route { block: prefix(block), is_local, protocol };
            assert_eq!(routes.to(address.parse().unwrap()).await.unwrap(), Some(expected), "{address}");
        }
        for address in ["192.0.3.7", "2001:db8:1::7"] {
            assert_eq!(routes.to(address.parse().unwrap()).await.unwrap(), None, "{address}");
        }
    });
}

#[test]
fn adds_and_removes_only_ours() {
    in_namespace(async || {
        ip("link set lo up");
        ip("route add local 198.51.100.0/24 dev lo");
        ip("-6 route add local 2001:db8:1::/64 dev lo metric 9");
        ip("route add 203.0.113.0/24 dev lo proto 165");
        let before = all_routes();
        let routes = Routes::open().unwrap();
        let wanted: Coverage = prefixes(&[
            "192.0.2.0/24",
            "192.0.2.7",
            "198.51.100.0/24",
            "2001:db8::/64",
            "2001:db8::7",
            "2001:db8:1::/64",
            "192.0.3.0/24",
            "2001:db8:2::/64",
        ]);
        let ours: Vec<Prefix> = prefixes(&["192.0.2.0/23", "2001:db8::/64", "2001:db8:2::/64"]);
        for _ in 0..2 {
            let left_as_found = routes.set(&wanted).await.unwrap();
            assert_eq!(left_as_found, prefixes::<Vec<_>>(&["198.51.100.0/24", "2001:db8:1::/64"]));
            assert_eq!(routes.ours().await.unwrap(), ours);
        }
        assert!(ip("route get 192.0.2.77").contains("src 127.0.0.1"));
        assert!(ip("route get 2001:db8::77").contains("src ::1"));
        // Another program's route to the same destination outlives ours.
        ip("-6 route add local 2001:db8::/64 dev lo metric 2000 table local");
        routes.set(&wanted).await.unwrap();
        assert_eq!(routes.ours().await.unwrap(), ours);
        for _ in 0..2 {
            routes.set(&Coverage::default()).await.unwrap();
            assert!(routes.ours().await.unwrap().is_empty());
        }
        ip("-6 route del local 2001:db8::/64 dev lo metric 2000 table local");
        assert_eq!(all_routes(), before);
    });
}

#[test]
fn everything_may_be_local() {
    in_namespace(async || {
        ip("link set lo up");
        let before = all_routes();
        let routes = Routes::open().unwrap();
        routes.set(&prefixes(&["0.0.0.0/1", "128.0.0.0/1", "::/0"])).await.unwrap();
        assert_eq!(routes.ours().await.unwrap(), prefixes::<Vec<_>>(&["0.0.0.0/0", "::/0"]));
        routes.set(&Coverage::default()).await.unwrap();
        assert_eq!(all_routes(), before);
    });
}

#[test]
fn small_changes_mind_what_is_there() {
    in_namespace(async || {
        ip("link set lo up");
        ip("route add local 198.51.100.0/24 dev lo");
        ip("-6 route add local 2001:db8:0:1::/64 dev lo");
        let before = all_routes();
        let routes = Routes::open().unwrap();
        let foreign: Vec<Prefix> = prefixes(&["198.51.100.0/24", "2001:db8:0:1::/64"]);
        let mut coverage = Coverage::default();
        let mut edits = Edits::default();
        for prefix in foreign.iter().copied().chain(prefixes::<Vec<_>>(&["192.0.2.0/24", "2001:db8::/64"])) {
            coverage.add(&prefix, &mut edits);
        }
        let there_and_back = edits.difference();
        // Two of these are one block, of which another program has but a half.
        assert_eq!(routes.apply(&there_and_back).await.unwrap(), prefixes::<Vec<_>>(&["198.51.100.0/24"]));
        assert_eq!(routes.ours().await.unwrap(), prefixes::<Vec<_>>(&["192.0.2.0/24", "2001:db8::/63"]));
        // It is no harm that another program was faster.
        ip("route del local 192.0.2.0/24 dev lo proto 165 table local");
        routes.apply(&there_and_back.reversed()).await.unwrap();
        assert_eq!(all_routes(), before);
        assert_eq!(routes.add(&foreign).await.unwrap(), foreign);
        routes.remove(&foreign).await.unwrap();
        assert_eq!(all_routes(), before);
    });
}

#[test]
fn only_the_difference_is_changed_and_first_what_comes() {
    in_namespace(async || {
        ip("link set lo up");
        let routes = Routes::open().unwrap();
        routes.set(&prefixes(&["192.0.2.0/24", "198.51.100.0/24", "2001:db8::/64"])).await.unwrap();
        let groups = [MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
        let (connection, _handle, mut news) = rtnetlink::new_multicast_connection(&groups).unwrap();
        tokio::spawn(connection);
        let latter = prefixes(&["192.0.2.0/25", "198.51.100.0/24", "2001:db8::/63"]);
        for _ in 0..2 {
            routes.set(&latter).await.unwrap();
        }
        let mut changes = Vec::new();
        while let Ok(Some((message, _))) = timeout(Duration::from_millis(200), news.next()).await {
            changes.push(match message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => ('+', len(&route)),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(route)) => ('-', len(&route)),
                other => panic!("{other:?}"),
            });
        }
        assert_eq!(changes, [('+', 25), ('+', 63), ('-', 24), ('-', 64)]);
    });
}

fn len(route: &RouteMessage) -> u8 {
    route.header.destination_prefix_length
}

#[test]
fn answers_to_large_batches_are_not_lost() {
    in_namespace(async || {
        ip("link set lo up");
        let routes = Routes::open().unwrap();
        let every_other = |is_ipv4, base: u128, len| {
            (0..5_000u128).map(move |i| Prefix::from_bits(is_ipv4, base | i << 9, len)).collect::<Vec<_>>()
        };
        let prefixes = [every_other(true, 0x7f80_0000, 24), every_other(false, 0x2001_0db8 << 96, 120)].concat();
        assert!(routes.add(&prefixes).await.unwrap().is_empty());
        assert_eq!(routes.ours().await.unwrap(), prefixes);
        // Each of these is refused.
        let refused: HashSet<Prefix> = routes.add(&prefixes).await.unwrap().into_iter().collect();
        assert_eq!(refused, prefixes.iter().copied().collect());
        routes.remove(&prefixes).await.unwrap();
        routes.remove(&prefixes).await.unwrap();
        assert!(routes.ours().await.unwrap().is_empty());
    });
}

#[test]
fn a_loopback_that_is_down_is_named() {
    in_namespace(async || {
        let routes = Routes::open().unwrap();
        for text in ["192.0.2.0/24", "2001:db8::/64"] {
            let error = routes.add(&[prefix(text)]).await.unwrap_err().to_string();
            assert!(error.contains(text) && error.contains("ip link set lo up"), "{error}");
        }
    });
}

#[test]
fn ipv6_that_is_off_is_named() {
    in_namespace(async || {
        ip("link set lo up");
        fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "1").unwrap();
        let routes = Routes::open().unwrap();
        // The refused one is identified among the others of its batch.
        let prefixes: Vec<Prefix> = prefixes(&["192.0.2.0/24", "2001:db8::/64", "198.51.100.0/24"]);
        let error = routes.add(&prefixes).await.unwrap_err().to_string();
        assert!(error.contains("2001:db8::/64") && error.contains("disable_ipv6"), "{error}");
        routes.set(&Coverage::default()).await.unwrap();
        assert!(routes.ours().await.unwrap().is_empty());
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
fn tells_of_what_others_do() {
    in_namespace(async || {
        ip("link set lo up");
        let routes = Routes::open().unwrap();
        let watch = routes.watch().unwrap();
        let of_interfaces = News { of_interfaces: true, of_routes: false };
        let of_routes = News { of_interfaces: false, of_routes: true };
        let expect = async |news: Option<News>, what: &str| {
            let patience = Duration::from_millis(if news.is_some() { 5000 } else { 50 });
            assert_eq!(timeout(patience, watch.next()).await.ok(), news, "{what}");
        };
        let blocks: Vec<_> = prefixes(&["192.0.2.0/24", "2001:db8::/64"]);
        for (block, family) in blocks.iter().zip(["-4", "-6"]) {
            // Our own changes, and those of others that do not concern us.
            routes.add(&[*block]).await.unwrap();
            routes.remove(&[*block]).await.unwrap();
            routes.add(&[*block]).await.unwrap();
            ip("route add local 198.51.100.0/24 dev lo");
            ip("route del local 198.51.100.0/24 dev lo");
            expect(None, "our own").await;
            ip(&format!("{family} route del local {block} dev lo"));
            expect(Some(of_routes), "deleted").await;
            let coverage: Coverage = blocks.iter().copied().collect();
            assert!(routes.missing(&coverage).await.unwrap().contains(block));
        }
        ip("link add port0 type veth peer port1");
        expect(Some(of_interfaces), "a new interface").await;
        ip("address add 192.0.2.1/24 dev port0");
        expect(None, "an address elsewhere").await;
        // Takes the routes along whose source it is, and the kernel does not report those.
        ip("address del 127.0.0.1/8 dev lo");
        expect(Some(of_routes), "an address of lo").await;
        ip("link set lo down");
        expect(Some(News { of_interfaces: true, of_routes: true }), "lo").await;
    });
}
