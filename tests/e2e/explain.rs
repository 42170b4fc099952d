//! `explain`: what becomes of a packet, why, and what else a person has to know.

use std::{fs, process::Command};

use anyport_tests::{
    daemon::Daemon,
    dial::{SILENCE, expect_tcp_hello, read_text, tcp_server, tcp_within},
    netns::Netns,
    topology::SERVER,
};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{
    cases::{Lab, at, on_each_back_end, trial},
    control::{contains, start},
    rules::services,
};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("explain::bad input", bad_input),
        trial("explain::at most 200 rules are explained", many_rules),
        trial("listing::filters and pages", pages),
    ];
    trials.extend(on_each_back_end("explain::the rule that decides, and why the others do not", considered));
    trials.extend(on_each_back_end("explain::socket, owner and what it shadows", sockets));
    trials.extend(on_each_back_end("explain::what is left to the host", host));
    trials.extend(on_each_back_end("explain::clients decide too", clients));
    trials.extend(on_each_back_end("explain::local routes", routes));
    trials.extend(on_each_back_end("explain::a router and --no-route", on_a_router));
    trials.extend(on_each_back_end("explain::nothing is counted", uncounted));
    for backend in ["sk-lookup", "tc"] {
        trials.push(trial(format!("{backend}::explain::no live socket"), move || no_socket(backend)));
    }
    trials
}

fn whys(explanation: &Value) -> Vec<String> {
    let considered = explanation["considered"].as_array().expect("an array of rules");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    considered.iter().map(|rule| format!("{} {}", text(&rule["prefix"]), text(&rule["why"]))).collect()
}

fn considered(backend: &'static str) {
    let daemon = services(backend);
    daemon.ok("add-prefix 192.0.2.0/24 2001:db8::/48 --service one");
    daemon.ok("add-prefix 192.0.2.0/24 2001:db8::/48 --ports 80,443 --service two");
    daemon.ok("add-prefix 192.0.2.0/25 2001:db8::/64 --ports 443 --service three");
    daemon.ok("add-prefix 192.0.2.0/26 2001:db8::/80 --protocol udp --service echo");
    for (to, [wide, long, longest]) in [
        ("192.0.2.7:80", ["192.0.2.0/24", "192.0.2.0/25", "192.0.2.0/26"]),
        ("[2001:db8::7]:80", ["2001:db8::/48", "2001:db8::/64", "2001:db8::/80"]),
    ] {
        let explained = daemon.json(&format!("explain {to}"));
        assert_eq!(
            (&explained["verdict"], &explained["reason"], &explained["service"], &explained["backend"]),
            (&json!("steer"), &json!("steered"), &json!("two"), &json!(backend)),
            "{explained}"
        );
        assert_eq!(
            explained["rule"],
            json!({"prefix": wide, "protocol": "tcp", "ports": "80,443", "except": "", "service": "two", "route": true,
                   "origin": "added"}),
            "{explained}"
        );
        assert_eq!(
            whys(&explained),
            [
                format!("{longest} says nothing about tcp"),
                format!("{long} port 80 is not among its ports 443"),
                format!("{wide} decides: port 80 goes to two"),
                format!("{wide} covers more ports of the same prefix than the rule that decides: 65535, not 2"),
            ]
        );
        assert_eq!((&explained["left_out"], &explained["notes"]), (&json!(0), &json!([])), "{explained}");
        assert_eq!(explained["generation"], daemon.json("status")["generation"], "{explained}");
        let udp = daemon.json(&format!("explain udp {to}"));
        assert_eq!((&udp["service"], &udp["rule"]["prefix"]), (&json!("echo"), &json!(longest)), "{udp}");
        contains(&daemon.ok(&format!("explain {to}")), &["steered to the service two", "decides: port 80 goes to two"]);
    }
    let longer = daemon.json("explain 192.0.2.7:443");
    let last = whys(&longer).pop().expect("a rule");
    assert_eq!(last, "192.0.2.0/24 a longer prefix with a rule that matches port 443 comes first: 192.0.2.0/25");
}

fn sockets(backend: &'static str) {
    let namespace = Netns::new();
    namespace.enter(|| tcp_server(at("::", 8080), "a wildcard\n"));
    let daemon = Daemon::start(&namespace, backend);
    daemon.ok("add-prefix 192.0.2.0/24 2001:db8::/64");
    let all = daemon.json("services");
    let of_default = all[0]["sockets"].as_array().expect("sockets");
    for (to, family) in [("192.0.2.7:8080", "ipv4"), ("[2001:db8::7]:8080", "ipv6")] {
        let explained = daemon.json(&format!("explain {to}"));
        let socket = &explained["socket"];
        let group: Vec<&Value> =
            of_default.iter().filter(|it| it["family"] == family && it["protocol"] == "tcp").collect();
        assert!(group.iter().any(|it| it["cookie"] == socket["cookie"] && it["local"] == socket["local"]), "{socket}");
        assert_eq!(socket["group"], group.len(), "{socket}");
        assert_eq!(
            (&socket["pid"], &socket["process"]),
            (&json!(daemon.pid().as_raw()), &json!("anyportd")),
            "{socket}"
        );
        let mut shadowed = explained["shadowed"].clone();
        let inode = shadowed[0].as_object_mut().expect("a socket").remove("inode");
        assert!(inode.is_some_and(|it| it.as_u64().is_some_and(|it| it > 0)), "{explained}");
        let name = fs::read_to_string("/proc/self/comm").expect("the test's own name");
        assert_eq!(
            shadowed,
            json!([{"protocol": "tcp", "local": "[::]:8080", "pid": std::process::id(), "process": name.trim_end()}]),
        );
        let text = daemon.ok(&format!("explain {to}"));
        let me = format!("{}, pid {}", name.trim_end(), std::process::id());
        contains(&text, &[socket["local"].as_str().expect("an address"), "shadowed", &me, "anyportd, pid"]);
        assert_eq!(daemon.json(&format!("explain udp {to}"))["shadowed"], json!([]), "of UDP");
    }
}

fn host(backend: &'static str) {
    let namespace = Netns::new();
    namespace.enter(|| tcp_server(at("0.0.0.0", 22), "the host's own\n"));
    let daemon = Daemon::start(&namespace, backend);
    daemon.ok("add-prefix 192.0.2.0/24 --except 22,179");
    let excepted = daemon.json("explain 192.0.2.7:22");
    assert_eq!((&excepted["verdict"], &excepted["reason"]), (&json!("host"), &json!("excepted")), "{excepted}");
    assert_eq!(excepted["rule"]["except"], "22,179", "{excepted}");
    assert_eq!((&excepted["service"], &excepted["socket"]), (&Value::Null, &Value::Null), "{excepted}");
    assert_eq!(excepted["listeners"][0]["local"], "0.0.0.0:22", "{excepted}");
    assert_eq!(excepted["shadowed"], json!([]), "{excepted}");
    contains(&daemon.ok("explain 192.0.2.7:22"), &["left to the host: a rule excepts port 22.", "receiver"]);
    contains(&daemon.ok("explain 192.0.2.7:179"), &["excepts port 179, and nobody listens there."]);
    for (packet, rules) in [("udp 192.0.2.7:22", 1), ("127.0.0.1:22", 0), ("[::1]:22", 0)] {
        let unmatched = daemon.json(&format!("explain {packet}"));
        assert_eq!((&unmatched["verdict"], &unmatched["reason"]), (&json!("host"), &json!("unmatched")), "{packet}");
        assert_eq!((&unmatched["rule"], whys(&unmatched).len()), (&Value::Null, rules), "{packet}: {unmatched}");
    }
    contains(&daemon.ok("explain 127.0.0.1:22"), &["no rule is about that address."]);
}

fn clients(backend: &'static str) {
    let daemon = services(backend);
    daemon.ok("add-prefix 192.0.2.0/24 --service one");
    daemon.ok("add-prefix 192.0.2.0/24 --source 198.51.100.0/24 --service two");
    let assumed = daemon.json("explain 192.0.2.7:80");
    assert_eq!(
        (&assumed["service"], &assumed["from"], &assumed["from_assumed"]),
        (&json!("one"), &json!("127.0.0.1:40000"), &json!(true)),
        "{assumed}"
    );
    assert_eq!(whys(&assumed)[0], "192.0.2.0/24 is about clients from 198.51.100.0/24 only, not 127.0.0.1");
    contains(&daemon.ok("explain 192.0.2.7:80"), &["127.0.0.1:40000", "--from"]);
    let given = daemon.json("explain 192.0.2.7:80 --from 198.51.100.9:1234");
    assert_eq!(
        (&given["service"], &given["from"], &given["from_assumed"], &given["notes"]),
        (&json!("two"), &json!("198.51.100.9:1234"), &json!(false), &json!([])),
        "{given}"
    );
    assert_eq!(
        whys(&given)[1],
        "192.0.2.0/24 is about more clients than the rule that decides, which is about those from 198.51.100.0/24 only"
    );
}

fn routes(backend: &'static str) {
    let daemon = Daemon::start(&Netns::new(), backend);
    daemon.ok("add-prefix 192.0.2.0/25 192.0.2.128/25 2001:db8::/64");
    daemon.ok("add-prefix 198.51.100.0/24 2001:db8:1::/64 --no-route");
    for (to, block) in [("192.0.2.7:80", "192.0.2.0/24"), ("[2001:db8::7]:80", "2001:db8::/64")] {
        let route = &daemon.json(&format!("explain {to}"))["route"];
        assert_eq!((&route["local"], &route["block"], &route["protocol"]), (&json!(true), &json!(block), &json!(165)));
    }
    for (to, add) in [
        ("198.51.100.7:80", "route add local 198.51.100.0/24 dev lo src 127.0.0.1"),
        ("[2001:db8:1::7]:80", "-6 route add local 2001:db8:1::/64 dev lo src ::1"),
    ] {
        let explained = daemon.json(&format!("explain {to}"));
        assert_eq!((&explained["verdict"], &explained["route"]["local"]), (&json!("steer"), &json!(false)));
        let text = daemon.ok(&format!("explain {to}"));
        contains(&text, &["no packet comes that far", "--no-route", &format!("`ip {add}`")]);
        daemon.namespace().ip(add);
        let route = &daemon.json(&format!("explain {to}"))["route"];
        assert!(route["local"] == true && route["protocol"] != 165, "somebody else's route: {route}");
    }
    daemon.namespace().ip("route add 203.0.113.0/24 dev lo");
    contains(&daemon.ok("explain 203.0.113.7:80"), &["such packets go on by the route to 203.0.113.0/24"]);
    // Takes the route along, which can't be put back meanwhile.
    daemon.namespace().ip("link set lo down");
    contains(&daemon.ok("explain [2001:db8::7]:80"), &["another program removed anyport's own"]);
}

/// What is said of packets to a server behind this host is what becomes of them.
fn on_a_router(backend: &'static str) {
    let lab = Lab::new(backend);
    for (server, block) in SERVER.into_iter().zip(["203.0.113.0/28", "2001:db8:d::/64"]) {
        let to = at(server, 8_080);
        lab.topology.server.enter(|| tcp_server(to, "server"));
        let dial =
            || lab.topology.client.enter(|| tcp_within(to, SILENCE).and_then(|mut stream| read_text(&mut stream)));
        assert_eq!(dial().expect("an answer"), "server");
        lab.daemon.ok(&format!("add-prefix {server} --no-route"));
        let explained = lab.daemon.json(&format!("explain {to}"));
        assert_eq!((&explained["verdict"], &explained["route"]["local"]), (&json!("steer"), &json!(false)));
        let text = explained["route"]["text"].as_str().expect("text");
        if backend == "sk-lookup" {
            assert_eq!(dial().expect("an answer"), "server");
            assert!(text.contains(&format!("go on by the route to {block}")), "{text}");
        } else {
            assert!(dial().is_err(), "{text}");
            assert!(text.contains("they are dropped instead of going on"), "{text}");
        }
    }
}

fn uncounted(backend: &'static str) {
    let daemon = Daemon::start(&Netns::new(), backend);
    daemon.ok("add-prefix 192.0.2.0/24 2001:db8::/64 --protocol both --except 22");
    daemon.namespace().enter(|| expect_tcp_hello(at("192.0.2.7", 7)));
    let counters = || {
        let totals = daemon.json("status")["totals"].clone();
        (daemon.json("prefixes"), totals["steered"].clone(), totals["dropped"].clone(), totals["unmatched"].clone())
    };
    let before = counters();
    assert_eq!(before.1, 1, "one connection was steered");
    for to in ["192.0.2.7:80", "192.0.2.7:22", "198.51.100.7:80", "[2001:db8::7]:80", "[2001:db8:1::7]:80"] {
        for protocol in ["tcp", "udp"] {
            daemon.ok(&format!("explain {protocol} {to}"));
        }
    }
    assert_eq!(counters(), before, "counters after nothing but explanations");
}

/// As in the test of what becomes of such packets, the sockets are taken out of the kernel's map.
fn no_socket(backend: &'static str) {
    let daemon = Daemon::start(&Netns::new(), backend);
    daemon.ok("add-prefix 192.0.2.0/24");
    let pin = |name: &str| daemon.bpffs().join(name).display().to_string();
    let rules = daemon.namespace().run("bpftool", ["-j", "map", "dump", "pinned", &pin("rules")]);
    let rules: Value = serde_json::from_str(&rules).expect("JSON of bpftool");
    let slot = rules[0]["formatted"]["value"]["service"].as_u64().expect("the service's slot");
    let [a, b, c, d] = u32::try_from(slot * 4).expect("a small number").to_ne_bytes();
    let line = format!("bpftool map delete pinned {} key {a} {b} {c} {d}", pin("sockets"));
    daemon.namespace().output(Command::new("sh").args(["-c", &line]));
    let explained = daemon.json("explain 192.0.2.7:80");
    assert_eq!((&explained["verdict"], &explained["reason"]), (&json!("drop"), &json!("no-socket")), "{explained}");
    assert_eq!((&explained["service"], &explained["socket"]), (&json!("default"), &Value::Null), "{explained}");
    assert_eq!(explained["rule"]["prefix"], "192.0.2.0/24", "{explained}");
    contains(&daemon.ok("explain 192.0.2.7:80"), &["is refused: the service default has no live socket"]);
}

fn bad_input() {
    let daemon = start();
    for (words, complaint) in [
        ("192.0.2.7:0", "1 to 65535"),
        ("192.0.2.7", "ADDRESS:PORT"),
        ("example.com:80", "not an address and a port"),
        ("192.0.2.0/24:80", "not an address and a port"),
        ("[::ffff:192.0.2.7]:80", "IPv4-mapped"),
        ("both 192.0.2.7:80", "tcp or udp"),
        ("icmp 192.0.2.7:80", "\"icmp\": say tcp or udp"),
        ("192.0.2.7:80 --from [::1]:80", "same IP version"),
        ("192.0.2.7:80 --from 192.0.2.1", "ADDRESS:PORT"),
        ("tcp udp 192.0.2.7:80", ""),
        ("", "ADDR:PORT"),
    ] {
        contains(&daemon.refused(&format!("explain {words}"), 2), &[complaint]);
    }
}

fn many_rules() {
    let daemon = start();
    for port in 1..=205 {
        daemon.ok(&format!("add-prefix 192.0.2.0/24 --ports {port}"));
    }
    let explained = daemon.json("explain 192.0.2.7:205");
    assert_eq!((whys(&explained).len(), &explained["left_out"]), (200, &json!(5)));
    assert_eq!(explained["rule"]["ports"], "205");
    contains(&daemon.ok("explain 192.0.2.7:205"), &["and 5 more"]);
}

fn pages() {
    let daemon = start();
    daemon.ok("add-service one --handler echo");
    daemon.ok("add-prefix 192.0.2.0/24 192.0.2.0/25 198.51.100.0/24 2001:db8::/64 --ports 80 --no-route");
    daemon.ok("add-prefix 192.0.2.0/24 --ports 443 --except 22 --service one --no-route");
    let prefixes = |words: &str| -> Vec<String> {
        let rules = daemon.json(&format!("prefixes {words}"));
        let text = |rule: &Value| rule["prefix"].as_str().expect("a prefix").to_owned();
        rules.as_array().expect("an array").iter().map(text).collect()
    };
    let [long, wide, other, v6] = ["192.0.2.0/25", "192.0.2.0/24", "198.51.100.0/24", "2001:db8::/64"];
    for (words, expected) in [
        ("", &[long, wide, wide, other, v6][..]),
        ("--within 192.0.2.0/24", &[long, wide, wide]),
        ("--within 192.0.0.0/16 --service one", &[wide]),
        ("--within 192.0.2.7", &[]),
        ("--within ::/0", &[v6]),
        ("--port 22", &[wide]),
        ("--port 80 --after 192.0.2.0/24", &[other, v6]),
        ("--limit 2", &[long, wide]),
        ("--limit 1 --after 192.0.2.0/24", &[other]),
        ("--service nobody", &[]),
    ] {
        assert_eq!(prefixes(words), expected, "prefixes {words}");
    }
    for (words, last) in [
        ("--limit 1", "there are more, go on with --after 192.0.2.0/25"),
        // The two rules of this prefix are separated, so it comes again.
        ("--limit 2", "there are more, go on with --after 192.0.2.0/25"),
        ("--limit 3", "there are more, go on with --after 192.0.2.0/24"),
        ("--limit 1 --within 192.0.2.0/24 --after 192.0.2.0/25", "there are more, a larger --limit shows them"),
    ] {
        let text = daemon.ok(&format!("prefixes {words}"));
        assert_eq!(text.lines().last(), Some(last), "prefixes {words}: {text}");
    }
    for words in ["--limit 5", "--limit 9", "--within 198.51.100.0/24 --limit 1", ""] {
        let text = daemon.ok(&format!("prefixes {words}"));
        assert!(text.starts_with("PREFIX ") && !text.contains("there are more"), "prefixes {words}: {text}");
    }
    contains(&daemon.ok("prefixes --port 99"), &["there is no such rule"]);
    for words in ["--port 0", "--within 192.0.2.1/24", "--limit -1", "--service Ä"] {
        daemon.refused(&format!("prefixes {words}"), 2);
    }
}
