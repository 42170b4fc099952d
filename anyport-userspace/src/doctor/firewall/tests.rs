//! Tests that follow packets through rule sets of iptables and nftables.

use serde_json::{Value, json};

use super::{How, Packet, Ruleset, Stopped, Tool, iptables, nftables};

/// What ufw makes of `ufw enable` and `ufw allow 22/tcp`, shortened.
const UFW: &str = r#"
*filter
:INPUT DROP [0:0]
:ufw-before-input - [0:0]
:ufw-not-local - [0:0]
:ufw-user-input - [0:0]
:ufw-logging-deny - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-user-input
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j ufw-logging-deny
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -d 224.0.0.251/32 -p udp -m udp --dport 5353 -j ACCEPT
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j ufw-logging-deny
-A ufw-not-local -j DROP
-A ufw-logging-deny -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW BLOCK] "
-A ufw-user-input -p tcp -m tcp --dport 22 -m comment --comment "allow \"ssh\" -j DROP" -j ACCEPT
COMMIT
"#;

fn iptables(text: &str) -> Ruleset {
    let mut ruleset = Ruleset::default();
    iptables::read(text, Tool::Iptables, &mut ruleset);
    ruleset.hooks.sort_by_key(|hook| hook.order);
    ruleset
}

fn nftables(json: &Value) -> Ruleset {
    let mut ruleset = Ruleset::default();
    nftables::read(json, false, &mut ruleset);
    ruleset
}

/// A chain of the hook `input` with these rules, that drops by its policy.
fn input(rules: &[Value]) -> Ruleset {
    let chain = json!({"chain": {"family": "inet", "table": "filter", "name": "input", "handle": 1, "type": "filter",
        "hook": "input", "prio": 0, "policy": "drop"}});
    let rules = rules.iter().map(|expressions| {
        json!({"rule": {"family": "inet", "table": "filter", "chain": "input", "handle": 7, "expr": expressions}})
    });
    let items: Vec<Value> = [chain].into_iter().chain(rules).collect();
    nftables(&json!({"nftables": items}))
}

/// What stops a packet for certain.
fn stops(ruleset: &Ruleset, protocol: &'static str, to: &str, port: u16) -> Option<Stopped> {
    ruleset.stops(&Packet { to: to.parse().unwrap(), protocol, port }).find(|it| it.doubts.is_empty())
}

/// The rules that could let a packet pass which is stopped otherwise.
fn doubts(ruleset: &Ruleset, protocol: &'static str, to: &str, port: u16) -> Vec<String> {
    let packet = Packet { to: to.parse().unwrap(), protocol, port };
    ruleset.stops(&packet).flat_map(|it| it.doubts).map(|it| format!("{}: {}", it.chain, it.rule)).collect()
}

#[test]
fn what_ufw_allows_and_what_it_drops() {
    let ruleset = iptables(UFW);
    assert_eq!(stops(&ruleset, "tcp", "192.0.2.3", 22), None);
    for (protocol, port) in [("tcp", 80), ("udp", 22), ("udp", 68)] {
        // Where the client's port decides, it may pass.
        let stopped = stops(&ruleset, protocol, "192.0.2.3", port);
        assert_eq!(stopped.is_some(), port != 68, "{protocol} {port}: {stopped:?}");
    }
    let Stopped { how, by, tool, table, chain, .. } = stops(&ruleset, "tcp", "192.0.2.3", 80).unwrap();
    assert_eq!((how, by.as_str(), tool), (How::Dropped, "its policy", Tool::Iptables));
    assert_eq!((table.as_str(), chain.as_str()), ("filter", "INPUT"));
    // It is about IPv4.
    assert_eq!(stops(&ruleset, "tcp", "2001:db8::3", 80), None);
    assert_eq!(ruleset.ports(), [31_337, 22, 68, 5353]);
}

#[test]
fn what_is_left_open_may_pass() {
    for allowed in [
        "-s 198.51.100.0/24 -j ACCEPT",
        "-i eth0 -j ACCEPT",
        "-m set --match-set good src -j ACCEPT",
        "-m mark --mark 0x1 -j ACCEPT",
        "-d 192.0.2.0/24 -j ACCEPT",
        "! -d 203.0.113.0/24 -p tcp -m multiport --dports 80,8000:8999 -j ACCEPT",
        "-m conntrack --ctstate NEW -j ACCEPT",
        "-s 0.0.0.0/0 -j ACCEPT",
        "! -s 127.0.0.0/8 -j ACCEPT",
        "-m addrtype --dst-type LOCAL,BROADCAST -j ACCEPT",
        "-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT",
        "-j NFQUEUE --queue-num 0",
        "-m addrtype --dst-type LOCAL -g ELSEWHERE",
    ] {
        let ruleset = iptables(&format!("*filter\n:INPUT DROP [0:0]\n-A INPUT {allowed}\nCOMMIT\n"));
        assert_eq!(stops(&ruleset, "tcp", "192.0.2.3", 80), None, "{allowed}");
    }
    for not_allowed in [
        "-i lo -j ACCEPT",
        "-s 127.0.0.0/8 -j ACCEPT",
        "-m addrtype --dst-type BROADCAST -j ACCEPT",
        "-m addrtype --src-type LOCAL -j ACCEPT",
        "-m pkttype --pkt-type multicast -j ACCEPT",
        "-p icmp -m icmp --icmp-type 8 -j ACCEPT",
        "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT",
        "-p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK -j ACCEPT",
        "-m conntrack --ctstatus DNAT -j ACCEPT",
        "! -d 192.0.2.0/24 -j ACCEPT",
        "-p udp -j ACCEPT",
        "-p tcp -m tcp --dport 81 -j ACCEPT",
        "! -p tcp -j ACCEPT",
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-j LOG",
        "-j EMPTY",
        "-m addrtype ! --dst-type LOCAL -j ACCEPT",
    ] {
        let text = format!("*filter\n:INPUT DROP [0:0]\n:EMPTY - [0:0]\n-A INPUT {not_allowed}\nCOMMIT\n");
        assert!(stops(&iptables(&text), "tcp", "192.0.2.3", 80).is_some(), "{not_allowed}");
    }
}

#[test]
fn a_drop_that_is_left_open_is_no_drop() {
    for (rule, is_stopped) in [
        ("-s 198.51.100.0/24 -j DROP", false),
        ("-m limit --limit 3/min -j DROP", false),
        ("-s 198.51.100.0/24 -j CHAIN", false),
        ("-j CHAIN", true),
        ("-g CHAIN", true),
        ("-p tcp -j REJECT --reject-with tcp-reset", true),
    ] {
        let text = format!("*filter\n:INPUT ACCEPT [0:0]\n:CHAIN - [0:0]\n-A INPUT {rule}\n-A CHAIN -j DROP\nCOMMIT\n");
        assert_eq!(stops(&iptables(&text), "tcp", "192.0.2.3", 80).is_some(), is_stopped, "{rule}");
    }
    // A return that may happen or not.
    let text = "*filter\n:INPUT ACCEPT [0:0]\n:CHAIN - [0:0]\n-A INPUT -j CHAIN\n-A CHAIN -s 198.51.100.1/32 -j RETURN\n\
                -A CHAIN -j DROP\nCOMMIT\n";
    assert_eq!(stops(&iptables(text), "tcp", "192.0.2.3", 80), None);
}

#[test]
fn docker_takes_the_ports_that_it_publishes() {
    let ruleset = iptables(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
         -A DOCKER -i docker0 -j RETURN\n\
         -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 198.51.100.2:80\nCOMMIT\n",
    );
    // Which interface is left open, and so it may pass.
    assert_eq!(stops(&ruleset, "tcp", "192.0.2.3", 8080), None);
    let everywhere = "*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp -m tcp --dport 8080 -j DNAT --to-destination 198.51.100.2:80\nCOMMIT\n";
    assert_eq!(stops(&iptables(everywhere), "tcp", "192.0.2.3", 8080).map(|it| it.how), Some(How::Translated));
    assert_eq!(stops(&iptables(everywhere), "tcp", "192.0.2.3", 80), None);
}

#[test]
fn chains_that_go_round_come_to_an_end() {
    let text = "*filter\n:INPUT DROP [0:0]\n:A - [0:0]\n-A INPUT -j A\n-A A -j A\nCOMMIT\n";
    assert_eq!(stops(&iptables(text), "tcp", "192.0.2.3", 80), None);
}

#[test]
fn expressions_of_nftables() {
    let matching = |left: Value, right: Value| json!({"match": {"op": "==", "left": left, "right": right}});
    let field = |protocol: &str, field: &str| json!({"payload": {"protocol": protocol, "field": field}});
    let accept = json!({"accept": null});
    let states = json!({"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [
        [{"set": ["established", "related"]}, {"accept": null}], ["invalid", {"drop": null}]
    ]}}});
    assert!(stops(&input(&[json!([states])]), "tcp", "192.0.2.3", 80).is_some());
    let ports = json!({"set": [22, {"range": [79, 81]}]});
    let prefix = json!({"prefix": {"addr": "192.0.2.0", "len": 24}});
    for (condition, passes) in [
        (matching(field("tcp", "dport"), ports.clone()), [true, false, false, true]),
        (matching(field("th", "dport"), ports), [true, true, false, true]),
        (matching(field("ip", "daddr"), prefix), [true, true, true, false]),
        (matching(json!({"meta": {"key": "l4proto"}}), json!("udp")), [false, true, false, false]),
        (matching(json!({"meta": {"key": "iifname"}}), json!("lo")), [false; 4]),
        (matching(json!({"meta": {"key": "iifname"}}), json!("eth0")), [true; 4]),
        (matching(json!({"meta": {"key": "nfproto"}}), json!("ipv6")), [false, false, false, true]),
        (matching(json!({"fib": {"result": "type", "flags": ["daddr"]}}), json!("local")), [true; 4]),
        (matching(json!({"ct": {"key": "state"}}), json!(["established", "related"])), [false; 4]),
        (matching(field("ip", "saddr"), json!("@good")), [true, true, true, false]),
        (matching(field("icmp", "type"), json!("echo-request")), [false; 4]),
        (matching(field("icmpv6", "type"), json!({"set": ["nd-neighbor-solicit", "echo-request"]})), [false; 4]),
        (matching(field("sctp", "dport"), json!(80)), [false; 4]),
        (matching(json!({"ct": {"key": "status"}}), json!("dnat")), [false; 4]),
        (matching(json!({"meta": {"key": "pkttype"}}), json!({"set": ["broadcast", "multicast"]})), [false; 4]),
        (matching(json!({"fib": {"result": "type", "flags": ["saddr"]}}), json!("local")), [false; 4]),
        (
            matching(json!({"fib": {"result": "type", "flags": "daddr"}}), json!({"set": ["broadcast", "anycast"]})),
            [false; 4],
        ),
        (
            matching(json!({"&": [field("tcp", "flags"), {"|": ["fin", "syn", "rst", "ack"]}]}), json!("syn")),
            [true, false, true, true],
        ),
        (matching(json!({"meta": {"key": "mark"}}), json!(1)), [true; 4]),
        (json!({"xt": {"type": "match", "name": "owner"}}), [true; 4]),
    ] {
        let ruleset = input(&[json!([condition, {"counter": {"packets": 0, "bytes": 0}}, accept])]);
        let packets =
            [("tcp", "192.0.2.3", 80), ("udp", "192.0.2.3", 80), ("tcp", "192.0.2.3", 443), ("tcp", "2001:db8::3", 80)];
        let passed = packets.map(|(protocol, to, port)| stops(&ruleset, protocol, to, port).is_none());
        assert_eq!(passed, passes, "{condition}");
    }
}

#[test]
fn anything_can_be_read() {
    for json in [json!(null), json!({"nftables": [{"rule": {}}, {"chain": {"family": "inet"}}, 7]}), json!([])] {
        assert!(nftables(&json).chains.is_empty());
    }
    for text in
        ["", "*", ":", "*filter\n:INPUT\n-A INPUT\n-A INPUT -d\n-A OTHER -j DROP\n-A INPUT -m\n-A INPUT --comment \""]
    {
        assert_eq!(stops(&iptables(text), "tcp", "192.0.2.3", 80), None, "{text}");
    }
}

#[test]
fn what_is_left_open_is_named() {
    let text = "*filter\n:INPUT DROP [0:0]\n:OWN - [0:0]\n-A INPUT -p icmp -j ACCEPT\n-A INPUT -s 198.51.100.0/24 -j ACCEPT\n\
                -A INPUT -i eth1 -j OWN\n-A OWN -p udp -j ACCEPT\n-A OWN -m mark --mark 0x1 -j ACCEPT\nCOMMIT\n";
    let ruleset = iptables(text);
    assert_eq!(stops(&ruleset, "tcp", "192.0.2.3", 80), None);
    assert_eq!(
        doubts(&ruleset, "tcp", "192.0.2.3", 80),
        ["INPUT: -A INPUT -s 198.51.100.0/24 -j ACCEPT", "OWN: -A OWN -m mark --mark 0x1 -j ACCEPT"]
    );
    assert_eq!(
        doubts(&ruleset, "udp", "192.0.2.3", 80),
        ["INPUT: -A INPUT -s 198.51.100.0/24 -j ACCEPT", "INPUT: -A INPUT -i eth1 -j OWN"]
    );
    // A rule that lets everything pass behind what is left open.
    let text = "*filter\n:INPUT DROP [0:0]\n-A INPUT -s 198.51.100.0/24 -j ACCEPT\n-A INPUT -j ACCEPT\nCOMMIT\n";
    assert!(doubts(&iptables(text), "tcp", "192.0.2.3", 80).is_empty());
}

/// Of several chains at one hook each has a say.
#[test]
fn a_later_chain_drops_what_an_earlier_one_accepts() {
    let chain = |name: &str, priority: i64, policy: &str| {
        json!({"chain": {"family": "inet", "table": "t", "name": name, "handle": 1, "type": "filter", "hook": "input",
            "prio": priority, "policy": policy}})
    };
    let rule = |chain: &str, verdict: &str| {
        let verdict = json!({verdict: null});
        json!({"rule": {"family": "inet", "table": "t", "chain": chain, "handle": 7, "expr": [verdict]}})
    };
    let ruleset = nftables(
        &json!({"nftables": [chain("early", -10, "drop"), chain("late", 10, "drop"), rule("early", "accept")]}),
    );
    assert_eq!(stops(&ruleset, "tcp", "192.0.2.3", 80).map(|it| it.chain).as_deref(), Some("late"));
}

#[test]
fn named_sets_are_looked_into() {
    let matching =
        json!({"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": "@ports"}});
    let rule = json!({"rule": {"family": "inet", "table": "f", "chain": "in", "handle": 7, "expr": [matching, {"accept": null}]}});
    let chain = json!({"chain": {"family": "inet", "table": "f", "name": "in", "handle": 1, "type": "filter", "hook": "input",
        "prio": 0, "policy": "drop"}});
    let set = |table: &str| json!({"set": {"family": "inet", "table": table, "name": "ports", "type": "inet_service", "elem": [22, {"range": [79, 81]}]}});
    let ruleset = nftables(&json!({"nftables": [set("f"), chain, rule]}));
    let passes = [22, 80, 82].map(|port| stops(&ruleset, "tcp", "192.0.2.3", port).is_none());
    assert_eq!(passes, [true, true, false]);
    // Another table's is another set.
    let ruleset = nftables(&json!({"nftables": [set("g"), chain, rule]}));
    assert_eq!(doubts(&ruleset, "tcp", "192.0.2.3", 82).len(), 1);
}

/// The shape of what `OpenWrt`'s fw4 makes: accept from the LAN, reject the rest.
#[test]
fn what_openwrt_rejects() {
    let interface = |name: &str| json!({"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": name}});
    let jump = |to: &str| json!({"jump": {"target": to}});
    let syn = json!({"match": {"op": "==", "left": {"&": [{"payload": {"protocol": "tcp", "field": "flags"}},
        {"|": ["fin", "syn", "rst", "ack"]}]}, "right": "syn"}});
    let states = json!({"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [
        ["established", {"accept": null}], ["related", {"accept": null}]]}}});
    let base = json!({"chain": {"family": "inet", "table": "fw4", "name": "input", "handle": 1, "type": "filter",
        "hook": "input", "prio": 0, "policy": "drop"}});
    let chain = |name: &str| json!({"chain": {"family": "inet", "table": "fw4", "name": name, "handle": 2}});
    let rule = |chain: &str, expressions: Value| json!({"rule": {"family": "inet", "table": "fw4", "chain": chain, "handle": 7, "expr": expressions}});
    let icmp = json!({"match": {"op": "==", "left": {"payload": {"protocol": "icmp", "field": "type"}}, "right": "echo-request"}});
    let items = json!({"nftables": [
        base, chain("syn_flood"), chain("input_lan"), chain("input_wan"), chain("handle_reject"),
        rule("input", json!([interface("lo"), {"accept": null}])),
        rule("input", json!([states])),
        rule("input", json!([syn, jump("syn_flood")])),
        rule("input", json!([interface("br-lan"), jump("input_lan")])),
        rule("input", json!([interface("wan"), jump("input_wan")])),
        rule("input", json!([jump("handle_reject")])),
        rule("syn_flood", json!([{"limit": {"rate": 25, "per": "second"}}, {"return": null}])),
        rule("syn_flood", json!([{"drop": null}])),
        rule("input_lan", json!([{"accept": null}])),
        rule("input_wan", json!([icmp, {"accept": null}])),
        rule("handle_reject", json!([{"reject": {"type": "icmpx", "expr": "port-unreachable"}}])),
    ]});
    let ruleset = nftables(&items);
    let stopped: Vec<Stopped> =
        ruleset.stops(&Packet { to: "192.0.2.3".parse().unwrap(), protocol: "tcp", port: 80 }).collect();
    assert_eq!(stopped.len(), 1);
    assert_eq!((stopped[0].chain.as_str(), stopped[0].doubts.len()), ("handle_reject", 1), "{stopped:?}");
    assert_eq!(stopped[0].doubts[0].chain, "input");
}

/// The shape of what firewalld makes with its zone `public`.
#[test]
fn what_firewalld_rejects() {
    let matching = |left: Value, right: Value| json!({"match": {"op": "==", "left": left, "right": right}});
    let base = json!({"chain": {"family": "inet", "table": "firewalld", "name": "filter_INPUT", "handle": 1, "type": "filter",
        "hook": "input", "prio": 10, "policy": "accept"}});
    let chain = |name: &str| json!({"chain": {"family": "inet", "table": "firewalld", "name": name, "handle": 2}});
    let rule = |chain: &str, expressions: Value| json!({"rule": {"family": "inet", "table": "firewalld", "chain": chain, "handle": 7, "expr": expressions}});
    let (accept, dport) = (json!({"accept": null}), json!({"payload": {"protocol": "tcp", "field": "dport"}}));
    let items = json!({"nftables": [
        base, chain("filter_INPUT_ZONES"), chain("filter_IN_public"), chain("filter_IN_public_allow"),
        rule("filter_INPUT", json!([matching(json!({"ct": {"key": "state"}}), json!({"set": ["established", "related"]})), accept])),
        rule("filter_INPUT", json!([matching(json!({"ct": {"key": "status"}}), json!("dnat")), accept])),
        rule("filter_INPUT", json!([matching(json!({"meta": {"key": "iifname"}}), json!("lo")), accept])),
        rule("filter_INPUT", json!([matching(json!({"ct": {"key": "state"}}), json!("invalid")), {"drop": null}])),
        rule("filter_INPUT", json!([{"jump": {"target": "filter_INPUT_ZONES"}}])),
        rule("filter_INPUT", json!([{"reject": {"type": "icmpx", "expr": "admin-prohibited"}}])),
        rule("filter_INPUT_ZONES", json!([{"goto": {"target": "filter_IN_public"}}])),
        rule("filter_IN_public", json!([{"jump": {"target": "filter_IN_public_allow"}}])),
        rule("filter_IN_public", json!([matching(json!({"meta": {"key": "l4proto"}}), json!({"set": ["icmp", "ipv6-icmp"]})), accept])),
        rule("filter_IN_public_allow", json!([matching(dport, json!(22)), accept])),
    ]});
    let ruleset = nftables(&items);
    assert!(stops(&ruleset, "tcp", "192.0.2.3", 22).is_none());
    for (protocol, to) in [("tcp", "192.0.2.3"), ("udp", "2001:db8::3")] {
        assert_eq!(stops(&ruleset, protocol, to, 80).map(|it| it.chain).as_deref(), Some("filter_INPUT"));
    }
}

/// The shape of what Docker and kube-proxy put in the way of packets that come in.
#[test]
fn what_containers_hosts_do_is_no_stop() {
    let ruleset = iptables(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n\
         -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n-A DOCKER -i docker0 -j RETURN\n\
         -A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-X\n\
         -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n:KUBE-SVC-X - [0:0]\n\
         -A KUBE-SVC-X -j DNAT --to-destination 10.0.0.1:6443\nCOMMIT\n\
         *filter\n:INPUT ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n-A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
         -A INPUT -j KUBE-FIREWALL\n-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP\n\
         -A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP\nCOMMIT\n",
    );
    for (protocol, port) in [("tcp", 80), ("tcp", 443), ("udp", 53)] {
        let packet = Packet { to: "192.0.2.3".parse().unwrap(), protocol, port };
        assert_eq!(ruleset.stops(&packet).collect::<Vec<_>>(), []);
    }
}
