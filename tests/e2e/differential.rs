//! Random rules and random packets: every back end decides as the contract says, in the words of this test.

use std::net::{IpAddr, SocketAddr};

use anyport_tests::{
    daemon::Daemon,
    dial::{first_words, tcp_from},
    random::Random,
};
use libtest_mimic::Trial;

use crate::{cases::on_each_back_end, rules::services};

/// Connections to each of six sets of rules.
const DIALS: usize = 350;

pub(crate) fn trials() -> Vec<Trial> {
    on_each_back_end("rules::random rules, random packets", differential).collect()
}

/// A rule of the random trial.
#[derive(Clone, Debug)]
struct Rule {
    base: IpAddr,
    length: u32,
    ports: (u16, u16),
    except: Option<u16>,
    /// The clients that the rule matches; IPv6 has only one.
    source: Option<&'static str>,
    service: &'static str,
}

/// Clients of IPv4, and prefixes around some of them.
const CLIENTS: [&str; 3] = ["127.0.0.1", "127.0.0.2", "127.0.0.5"];
const SOURCES: [&str; 3] = ["127.0.0.0/30", "127.0.0.2/32", "127.0.0.4/30"];

impl Rule {
    /// A random rule in 192.0.2.0/24 or `2001:db8:9::/120`. Ports, like addresses, are few, so that rules overlap.
    fn random(random: &mut Random) -> Self {
        let full = *random.pick(&[32_u32, 128]);
        let length = full - u32::try_from(random.below(9)).expect("a small number");
        let base = mask(address(random, full), length);
        let first = u16::try_from(1 + random.below(20)).expect("a port");
        let last =
            if random.below(3) == 0 { u16::MAX } else { first + u16::try_from(random.below(8)).expect("a port") };
        let inside = random.below(2) == 0 && first < last;
        Self {
            base,
            length,
            ports: (first, last),
            except: inside.then_some(first + 1),
            source: (base.is_ipv4() && random.below(3) == 0).then(|| *random.pick(&SOURCES)),
            service: ["one", "two", "three"][random.below(3)],
        }
    }

    fn words(&self) -> String {
        let Self { base, length, ports: (first, last), except, source, service } = self;
        let except = except.map_or_else(String::new, |port| format!(" --except {port}"));
        let source = source.map_or_else(String::new, |source| format!(" --source {source}"));
        format!("{base}/{length} --ports {first}-{last}{except}{source} --service {service}")
    }

    /// What the rule says about a client and a port: which service it gets, if the rule matches.
    fn verdict(&self, from: IpAddr, port: u16) -> Option<&'static str> {
        if let Some(source) = self.source {
            let (base, length) = source.split_once('/')?;
            if mask(from, length.parse().ok()?) != base.parse::<IpAddr>().ok()? {
                return None;
            }
        }
        let (first, last) = self.ports;
        match self.except {
            Some(except) if except == port => Some("no"),
            _ => (first..=last).contains(&port).then_some(self.service),
        }
    }
}

/// One of 256 addresses of the family whose addresses have `full` bits.
fn address(random: &mut Random, full: u32) -> IpAddr {
    random.address(if full == 32 { "192.0.2.0/24" } else { "2001:db8:9::/120" })
}

/// `address` without its bits after `length`.
fn mask(address: IpAddr, length: u32) -> IpAddr {
    match address {
        IpAddr::V4(address) => IpAddr::V4((address.to_bits() & (u32::MAX << (32 - length).min(31))).into()),
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & (u128::MAX << (128 - length).min(127))).into()),
    }
}

/// The contract in the words of this test alone: the longest prefix with a rule that matches the client and the port.
fn decide(rules: &[Rule], from: IpAddr, to: IpAddr, port: u16) -> &'static str {
    let about = rules.iter().filter(|rule| rule.base.is_ipv4() == to.is_ipv4() && mask(to, rule.length) == rule.base);
    let matching = about.filter_map(|rule| Some((rule.length, rule.verdict(from, port)?)));
    matching.max_by_key(|&(length, _)| length).map_or("no", |(_, service)| service)
}

/// Who answers a client.
fn who_from(daemon: &Daemon, from: IpAddr, to: SocketAddr) -> String {
    let answer = daemon.namespace().enter(|| {
        let mut stream = tcp_from((from, 0).into(), to).ok()?;
        first_words(&mut stream).ok()
    });
    answer.unwrap_or_else(|| "no".to_owned())
}

/// What the kernel does, compared with [`decide`], for rules that overlap in every way.
fn differential(backend: &'static str) {
    let daemon = services(backend);
    let mut random = Random::new("differential");
    // What is not steered finds a local route, so that the answer is a refusal.
    daemon.namespace().ip("route add local 192.0.2.0/24 dev lo");
    daemon.namespace().ip("-6 route add local 2001:db8:9::/64 dev lo");
    let mut rules: Vec<Rule> = Vec::new();
    for _ in 0..6 {
        for _ in 0..8 {
            let rule = Rule::random(&mut random);
            let same = |other: &Rule| other.base == rule.base && other.length == rule.length;
            // Two rules of one prefix could conflict; those have tests of their own.
            if !rules.iter().any(same) {
                daemon.ok(&format!("add-prefix {}", rule.words()));
                rules.push(rule);
            }
        }
        for _ in 0..DIALS {
            let near = random.pick(&rules).clone();
            let to = address(&mut random, if near.base.is_ipv4() { 32 } else { 128 });
            let to = if random.below(2) == 0 { to } else { near.base };
            let port = u16::try_from(1 + random.below(30)).expect("a port");
            let from: IpAddr = if to.is_ipv4() { random.pick(&CLIENTS) } else { &"::1" }.parse().expect("an address");
            let seen = who_from(&daemon, from, (to, port).into());
            let expected = decide(&rules, from, to, port);
            assert_eq!(
                seen,
                expected,
                "tcp from {from} to {to} port {port} under {:#?}",
                rules.iter().map(Rule::words).collect::<Vec<_>>()
            );
        }
        let gone = rules.swap_remove(random.below(rules.len()));
        daemon.ok(&format!("remove-prefix {}/{}", gone.base, gone.length));
    }
}
