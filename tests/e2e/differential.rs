//! Random rules and random packets: every back end decides as the contract says, in the words of this test.

use std::net::IpAddr;

use anyport_tests::random::Random;
use libtest_mimic::Trial;

use crate::{
    cases::on_each_back_end,
    rules::{services, who},
};

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
    service: &'static str,
}

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
            service: ["one", "two", "three"][random.below(3)],
        }
    }

    fn words(&self) -> String {
        let Self { base, length, ports: (first, last), except, service } = self;
        let except = except.map_or_else(String::new, |port| format!(" --except {port}"));
        format!("{base}/{length} --ports {first}-{last}{except} --service {service}")
    }

    /// What the rule says about a port: who gets it, if it has an opinion.
    fn opinion(&self, port: u16) -> Option<&'static str> {
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

/// The contract in the words of this test alone: the longest prefix with an opinion on the port.
fn decide(rules: &[Rule], to: IpAddr, port: u16) -> &'static str {
    let about = rules.iter().filter(|rule| rule.base.is_ipv4() == to.is_ipv4() && mask(to, rule.length) == rule.base);
    let opinions = about.filter_map(|rule| Some((rule.length, rule.opinion(port)?)));
    opinions.max_by_key(|&(length, _)| length).map_or("no", |(_, service)| service)
}

/// What the kernel does, compared with [`decide`], for rules that overlap in every way.
fn differential(backend: &'static str) {
    let daemon = services(backend);
    let mut random = Random::new("differential");
    // Whoever is not steered finds a local route, so that the answer is a refusal.
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
        for _ in 0..60 {
            let near = random.pick(&rules).clone();
            let to = address(&mut random, if near.base.is_ipv4() { 32 } else { 128 });
            let to = if random.below(2) == 0 { to } else { near.base };
            let port = u16::try_from(1 + random.below(30)).expect("a port");
            let seen = who(&daemon, "tcp", &to.to_string(), port);
            let expected = decide(&rules, to, port);
            assert_eq!(
                seen,
                expected,
                "tcp {to} port {port} under {:#?}",
                rules.iter().map(Rule::words).collect::<Vec<_>>()
            );
        }
        let gone = rules.swap_remove(random.below(rules.len()));
        daemon.ok(&format!("remove-prefix {}/{}", gone.base, gone.length));
    }
}
