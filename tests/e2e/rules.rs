//! Which rule decides: the longest prefix with a rule that matches, then fewer ports, whatever the order of insertion.
//!
//! Services differ by their banner or handler, so that a dial says who answered.

use std::net::SocketAddr;

use anyport_tests::{
    daemon::{Daemon, LogOnPanic},
    dial::{QUESTION, first_words, tcp, udp},
    netns::Netns,
    random::Random,
};
use libtest_mimic::Trial;

use crate::cases::{BACKENDS, at, trial};

/// Rules in the words of `add-prefix`, and who answers where.
struct Table {
    name: &'static str,
    rules: &'static [&'static str],
    probes: &'static [(&'static str, &'static str, u16, &'static str)],
}

/// "one", "two" and "three" are services with these banners for TCP; "echo" and "hello" tell UDP apart; "no" is nobody.
const TABLES: &[Table] = &[
    Table {
        name: "TestBindingPrecedence",
        rules: &[
            "198.51.100.0/24 --service one",
            "198.51.100.0/25 --service two",
            "198.51.100.7 --ports 80 --service three",
            "2001:db8:5::/48 --service one",
            "2001:db8:5::/64 --ports 443 --service two",
        ],
        probes: &[
            ("tcp", "198.51.100.200", 80, "one"),
            ("tcp", "198.51.100.100", 80, "two"),
            ("tcp", "198.51.100.7", 80, "three"),
            ("tcp", "198.51.100.7", 81, "two"),
            ("tcp", "2001:db8:5:1::1", 443, "one"),
            ("tcp", "2001:db8:5::1", 443, "two"),
            ("tcp", "2001:db8:5::1", 444, "one"),
        ],
    },
    Table {
        name: "TestBindingsSortMatchesDataplane",
        rules: &[
            "192.0.2.0/24 --service one",
            "192.0.2.0/24 --ports 80 --service two",
            "192.0.2.0/28 --service three",
            "2001:db8:6::/48 --service one",
            "2001:db8:6::/48 --ports 80 --service two",
            "2001:db8:6::/56 --service three",
        ],
        probes: &[
            ("tcp", "192.0.2.99", 80, "two"),
            ("tcp", "192.0.2.99", 81, "one"),
            // The longer prefix with all ports beats the shorter one with this port.
            ("tcp", "192.0.2.9", 80, "three"),
            ("tcp", "192.0.2.9", 81, "three"),
            ("tcp", "2001:db8:6:ff00::1", 80, "two"),
            ("tcp", "2001:db8:6:ff00::1", 81, "one"),
            ("tcp", "2001:db8:6::1", 80, "three"),
        ],
    },
    Table {
        name: "fewer ports within a prefix",
        rules: &[
            "192.0.2.0/24 --service one",
            "192.0.2.0/24 --ports 1000-1999 --service two",
            "192.0.2.0/24 --ports 1500,1600-1650 --service three",
        ],
        probes: &[
            ("tcp", "192.0.2.1", 1, "one"),
            ("tcp", "192.0.2.1", 999, "one"),
            ("tcp", "192.0.2.1", 1000, "two"),
            ("tcp", "192.0.2.1", 1499, "two"),
            ("tcp", "192.0.2.1", 1500, "three"),
            ("tcp", "192.0.2.1", 1501, "two"),
            ("tcp", "192.0.2.1", 1600, "three"),
            ("tcp", "192.0.2.1", 1650, "three"),
            ("tcp", "192.0.2.1", 1651, "two"),
            ("tcp", "192.0.2.1", 1999, "two"),
            ("tcp", "192.0.2.1", 2000, "one"),
            ("tcp", "192.0.2.1", 65535, "one"),
        ],
    },
    Table {
        name: "an exception is a match",
        rules: &[
            "192.0.2.0/24 --service one",
            "192.0.2.0/25 --except 22,8000-8010 --service two",
            "192.0.2.0/26 --ports 22 --service three",
        ],
        probes: &[
            ("tcp", "192.0.2.200", 22, "one"),
            ("tcp", "192.0.2.100", 22, "no"),
            ("tcp", "192.0.2.100", 21, "two"),
            ("tcp", "192.0.2.100", 23, "two"),
            ("tcp", "192.0.2.100", 7999, "two"),
            ("tcp", "192.0.2.100", 8000, "no"),
            ("tcp", "192.0.2.100", 8010, "no"),
            ("tcp", "192.0.2.100", 8011, "two"),
            ("tcp", "192.0.2.1", 22, "three"),
            // No rule of the /26 matches 8000, so that the /25 is asked.
            ("tcp", "192.0.2.1", 8000, "no"),
            ("tcp", "192.0.2.1", 80, "two"),
        ],
    },
    Table {
        name: "the protocol does not match",
        rules: &[
            "192.0.2.0/24 --protocol both --service hello",
            "192.0.2.0/25 --protocol udp --service echo",
            "192.0.2.0/26 --protocol tcp --service one",
            "2001:db8:7::/64 --protocol both --service hello",
            "2001:db8:7::/80 --protocol udp --ports 53 --service echo",
        ],
        probes: &[
            ("tcp", "192.0.2.200", 53, "hello"),
            ("udp", "192.0.2.200", 53, "hello"),
            ("tcp", "192.0.2.100", 53, "hello"),
            ("udp", "192.0.2.100", 53, "echo"),
            ("tcp", "192.0.2.1", 53, "one"),
            ("udp", "192.0.2.1", 53, "echo"),
            ("udp", "2001:db8:7::1", 53, "echo"),
            ("udp", "2001:db8:7::1", 54, "hello"),
            ("udp", "2001:db8:7:0:1::1", 53, "hello"),
            ("tcp", "2001:db8:7::1", 53, "hello"),
        ],
    },
    Table {
        name: "every prefix length on the way",
        rules: &[
            "198.51.100.0/24 --service one",
            "198.51.100.0/31 --service two",
            "198.51.100.1/32 --service three",
            "2001:db8::/33 --service one",
            "2001:db8:8::/127 --service two",
            "2001:db8:8::1/128 --service three",
        ],
        probes: &[
            ("tcp", "198.51.100.255", 5, "one"),
            ("tcp", "198.51.100.2", 5, "one"),
            ("tcp", "198.51.100.0", 5, "two"),
            ("tcp", "198.51.100.1", 5, "three"),
            ("tcp", "2001:db8:8::2", 5, "one"),
            ("tcp", "2001:db8:7fff:ffff::2", 5, "one"),
            ("tcp", "2001:db8:8::", 5, "two"),
            ("tcp", "2001:db8:8::1", 5, "three"),
        ],
    },
];

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for backend in BACKENDS {
        trials.push(trial(format!("{backend}::rules::tables"), move || tables(backend)));
        trials.push(trial(format!("{backend}::rules::TestReplaceBindingsOverlapping"), move || overlapping(backend)));
        trials.push(trial(format!("{backend}::rules::a name that comes again"), move || named_again(backend)));
    }
    trials
}

/// A host, a daemon and the services that tell who answers.
pub(crate) fn services(backend: &str) -> Daemon {
    let daemon = Daemon::start(&Netns::new(), backend);
    for name in ["one", "two", "three"] {
        daemon.ok(&format!("add-service {name} --handler discard --banner {name}"));
    }
    daemon.ok("add-service echo --handler echo");
    daemon.ok("add-service hello --handler hello");
    daemon
}

/// Who answers at `address`, seen from the host itself.
pub(crate) fn who(daemon: &Daemon, protocol: &str, address: &str, port: u16) -> String {
    let to = at(address, port);
    daemon.namespace().enter(|| match protocol {
        "tcp" => first_word(tcp_banner(to).as_deref()),
        _ => match udp(to, QUESTION) {
            Ok((_, answer)) if answer == QUESTION => "echo".to_owned(),
            answer => {
                first_word(answer.map(|(_, answer)| String::from_utf8_lossy(&answer).into_owned()).ok().as_deref())
            }
        },
    })
}

/// The first bytes that the peer says by itself. `discard` stays open after its banner, `hello` closes.
fn tcp_banner(to: SocketAddr) -> Option<String> {
    first_words(&mut tcp(to).ok()?).ok()
}

fn first_word(text: Option<&str>) -> String {
    text.and_then(|text| text.split_whitespace().next()).unwrap_or("no").to_owned()
}

/// Every table, with its rules put in forwards, backwards and shuffled.
fn tables(backend: &'static str) {
    let daemon = services(backend);
    let mut random = Random::new("rules");
    for Table { name, rules, probes } in TABLES {
        let mut order: Vec<&str> = rules.to_vec();
        for round in 0..3 {
            match round {
                0 => {}
                1 => order.reverse(),
                _ => random.shuffle(&mut order),
            }
            for rule in &order {
                daemon.ok(&format!("add-prefix {rule}"));
            }
            for &(protocol, address, port, expected) in *probes {
                let seen = who(&daemon, protocol, address, port);
                assert_eq!(seen, expected, "{name}: {protocol} {address} port {port}, rules in the order {order:#?}");
            }
            for rule in &order {
                let (prefix, _) = rule.split_once(' ').expect("a prefix and more");
                // An earlier round of the loop may have removed all rules of the prefix.
                daemon.ctl(&["remove-prefix", prefix]);
            }
            assert!(daemon.rules().is_empty(), "rules that are left: {:?}", daemon.rules());
        }
    }
}

/// A service of the name of one that is gone is another one, for the same rule too.
fn named_again(backend: &'static str) {
    let daemon = services(backend);
    for banner in ["first", "second", "third"] {
        daemon.ok(&format!("add-service again --handler discard --banner {banner}"));
        daemon.ok("add-prefix 192.0.2.0/24 --service again");
        assert_eq!(who(&daemon, "tcp", "192.0.2.7", 80), banner);
        daemon.ok("remove-prefix 192.0.2.0/24");
        daemon.ok("remove-service again");
    }
}

/// No moment of misdirection while a more specific rule comes and goes.
fn overlapping(backend: &'static str) {
    let daemon = services(backend);
    let _log = LogOnPanic(&daemon);
    daemon.ok("add-prefix 192.0.2.0/24 --service one");
    std::thread::scope(|scope| {
        let change = scope.spawn(|| {
            for _ in 0..10 {
                daemon.ok("add-prefix 192.0.2.0/24 --ports 80 --service two");
                daemon.ok("add-prefix 192.0.2.0/25 --service two");
                daemon.ok("remove-prefix 192.0.2.0/25");
                daemon.ok("remove-prefix 192.0.2.0/24 --ports 80");
            }
        });
        let mut dials = 0;
        while !change.is_finished() || dials == 0 {
            dials += 1;
            // Nothing that changes is about this one; for the other, both answers are right at some time.
            assert_eq!(who(&daemon, "tcp", "192.0.2.200", 81), "one", "dial {dials} of an unchanged port");
            let seen = who(&daemon, "tcp", "192.0.2.7", 80);
            assert!(seen == "one" || seen == "two", "dial {dials} of a changing port was answered by {seen}");
        }
    });
}
