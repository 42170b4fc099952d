//! Tests of the limits on connections, sources and rates.

use std::{net::IpAddr, num::NonZeroU32, sync::Arc, thread};

use super::{Capacity, DescriptorPool, Gate, LimitScope, Limits, Pass, Refused};

const GREEDY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 1));

fn other(number: u8) -> IpAddr {
    [198, 51, 100, 100 + number].into()
}

fn limits(max_connections: u32, per_source: u32, rate: Option<&str>) -> Limits {
    Limits {
        max_connections: NonZeroU32::new(max_connections),
        max_connections_per_source: NonZeroU32::new(per_source),
        accept_rate_per_source: rate.map(|rate| rate.parse().unwrap()),
    }
}

fn gate(of_service: Limits, of_daemon: Limits, descriptors: usize) -> Arc<Gate> {
    let capacity = Capacity::new(of_daemon, DescriptorPool::new(descriptors));
    let proxies = vec!["203.0.113.0/24".parse().unwrap()];
    let scopes = LimitScope::of_service(of_service).into_iter().collect();
    Arc::new(Gate { scopes, capacity, descriptors: 2, proxies, sources: None })
}

/// Passes for as many as are let in, and why the next one is not.
fn fill(gate: &Arc<Gate>, source: IpAddr) -> (Vec<Pass>, Refused) {
    let mut passes = Vec::new();
    loop {
        match gate.admit(source) {
            Ok(pass) => passes.push(pass),
            Err(refused) => return (passes, refused),
        }
    }
}

#[test]
fn a_greedy_source_leaves_room() {
    const NONE: Limits =
        Limits { max_connections: None, max_connections_per_source: None, accept_rate_per_source: None };
    for (name, gate) in [
        ("descriptors", gate(NONE, NONE, 200)),
        ("daemon", gate(NONE, limits(100, 0, None), 1000)),
        ("service", gate(limits(100, 0, None), NONE, 1000)),
    ] {
        let (held, why) = fill(&gate, GREEDY);
        assert_eq!((held.len(), why), (80, Refused::Share), "{name}");
        // The others are let in, and none of them takes all that is left.
        let others: Vec<_> = (0..3).map(|number| fill(&gate, other(number))).collect();
        let counts: Vec<_> = others.iter().map(|(held, _)| held.len()).collect();
        assert_eq!(counts, [16, 3, 1], "{name}");
        assert!(gate.admit(other(4)).is_err(), "{name}");
        drop((held, others));
        assert_eq!(fill(&gate, GREEDY).0.len(), 80, "{name}: all places came back");
    }
}

#[test]
fn limits_have_their_names() {
    let none = Limits::default;
    for (gate, expected) in [
        (gate(none(), none(), 1), (0, Refused::Total)),
        (gate(none(), none(), 3), (1, Refused::Total)),
        (gate(none(), limits(5, 9, None), 100), (5, Refused::Total)),
        (gate(none(), limits(5, 3, None), 100), (3, Refused::Source)),
        (gate(limits(5, 9, None), none(), 100), (5, Refused::Service)),
        (gate(limits(0, 5, None), none(), 100), (5, Refused::Source)),
        (gate(limits(0, 0, Some("7/h")), none(), 100), (7, Refused::Rate)),
    ] {
        let (held, why) = fill(&gate, GREEDY);
        assert_eq!((held.len(), why), expected);
    }
}

#[test]
fn who_is_refused_takes_no_place() {
    // The service would have a place left for it, the daemon has not.
    let gate = gate(limits(3, 0, None), Limits::default(), 4);
    let held = [gate.admit(other(1)).unwrap(), gate.admit(other(2)).unwrap()];
    for _ in 0..10 {
        assert_eq!(gate.admit(other(3)).unwrap_err(), Refused::Total);
    }
    drop(held);
    let _held = [gate.admit(other(1)).unwrap(), gate.admit(other(2)).unwrap()];
}

#[test]
fn proxies_speak_for_many() {
    let gate = gate(limits(0, 2, Some("2/h")), Limits::default(), 20);
    let (held, why) = fill(&gate, "203.0.113.9".parse().unwrap());
    assert_eq!((held.len(), why), (10, Refused::Total));
}

#[test]
fn flows_of_one_source_do_not_drive_out_all_others() {
    let flows = |most: u32, limits| {
        let capacity = Capacity::new(Limits::default(), DescriptorPool::new(1000));
        let scopes = vec![LimitScope::of_flows(NonZeroU32::new(most).unwrap(), limits)];
        Arc::new(Gate { scopes, capacity, descriptors: 2, proxies: Vec::new(), sources: None })
    };
    // A configured limit is no share: the source's oldest flow does not go for a new one.
    for (gate, expected) in [
        (flows(10, Limits::default()), (8, Refused::Share)),
        (flows(1, Limits::default()), (1, Refused::Share)),
        (flows(10, limits(0, 20, None)), (20, Refused::Source)),
    ] {
        let (held, why) = fill(&gate, GREEDY);
        assert_eq!((held.len(), why), expected);
    }
}

#[test]
fn workers_that_come_at_once_let_in_no_more() {
    let gate = gate(limits(500, 0, None), Limits::default(), 10_000);
    let admit_some = |source| {
        thread::spawn({
            let gate = Arc::clone(&gate);
            move || (0..1_000).filter_map(|_| gate.admit(source).ok()).collect::<Vec<_>>()
        })
    };
    let threads: Vec<_> = (0..4).map(|_| admit_some(GREEDY)).collect();
    let held: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
    assert_eq!(held.len(), 400);
}
