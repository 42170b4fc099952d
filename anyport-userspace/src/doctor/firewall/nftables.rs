//! What `nft -j list ruleset` prints, see libnftables-json(5).

use serde_json::Value;

use super::{Action, Chain, Families, Hook, How, Match, Rule, Ruleset, Tool, What};
use crate::rules::Prefix;

/// Protocols of which a field in a match says that the packet is one of theirs, and so of no other.
const TRANSPORTS: [&str; 10] = ["tcp", "udp", "icmp", "icmpv6", "igmp", "sctp", "dccp", "udplite", "esp", "ah"];
const TABLES_OF_IPTABLES: [&str; 5] = ["raw", "mangle", "nat", "filter", "security"];

/// Adds the chains that `json` shows; without those of iptables, which are known, if `by_iptables`.
pub(super) fn read(json: &Value, by_iptables: bool, ruleset: &mut Ruleset) {
    let first = ruleset.chains.len();
    for item in json["nftables"].as_array().into_iter().flatten() {
        if let Some(chain) = item.get("chain").and_then(|it| read_chain(it, by_iptables)) {
            let order = match item["chain"]["hook"].as_str() {
                Some("prerouting") => Some(0),
                Some("input") => Some(1),
                _ => None,
            };
            let priority = item["chain"]["prio"].as_i64().unwrap_or_default();
            ruleset.hooks.extend(order.map(|order| Hook { order: (order, priority), chain: ruleset.chains.len() }));
            ruleset.chains.push(chain);
        }
    }
    for rule in json["nftables"].as_array().into_iter().flatten().filter_map(|item| item.get("rule")) {
        let Some(families) = families(rule) else { continue };
        let here = |it: &&mut Chain| rule["table"] == it.table && rule["chain"] == it.name && it.families == families;
        if let Some(chain) = ruleset.chains[first..].iter_mut().find(here) {
            chain.rules.extend(rules(&resolved(rule, json)));
        }
    }
}

/// A rule with what is in named sets in the place of their names.
fn resolved(rule: &Value, json: &Value) -> Value {
    let mut rule = rule.clone();
    let (family, table) = (rule["family"].clone(), rule["table"].clone());
    let sets = json["nftables"].as_array().into_iter().flatten().filter_map(|item| item.get("set"));
    let here: Vec<&Value> = sets.filter(|set| set["family"] == family && set["table"] == table).collect();
    for expression in rule["expr"].as_array_mut().into_iter().flatten() {
        let Some(right) = expression.get_mut("match").and_then(|it| it.get_mut("right")) else { continue };
        let name = right.as_str().and_then(|it| it.strip_prefix('@'));
        // What comes and goes with time is left open.
        let set = here.iter().find(|set| name.is_some_and(|name| set["name"] == name) && set.get("timeout").is_none());
        if let Some(set) = set {
            *right = serde_json::json!({"set": set.get("elem").cloned().unwrap_or_else(|| serde_json::json!([]))});
        }
    }
    rule
}

fn families(item: &Value) -> Option<Families> {
    match item["family"].as_str()? {
        "ip" => Some(Families::V4),
        "ip6" => Some(Families::V6),
        "inet" => Some(Families::Both),
        _ => None,
    }
}

fn read_chain(chain: &Value, by_iptables: bool) -> Option<Chain> {
    let families = families(chain)?;
    let (table, name) = (chain["table"].as_str()?.to_owned(), chain["name"].as_str()?.to_owned());
    if by_iptables && families != Families::Both && TABLES_OF_IPTABLES.contains(&table.as_str()) {
        return None;
    }
    let drops_by_policy = chain["policy"] == "drop";
    Some(Chain { tool: Tool::Nft, families, table, name, drops_by_policy, rules: Vec::new() })
}

/// A rule for each of its verdicts: several where a map of connection states has some.
fn rules(rule: &Value) -> Vec<Rule> {
    let (mut matches, mut found) = (Vec::new(), Vec::new());
    let text = format!("the rule with handle {}", rule["handle"]);
    let mut push = |matches: &[Match], action| {
        found.push(Rule { text: text.clone(), matches: matches.to_vec(), action });
    };
    for expression in rule["expr"].as_array().into_iter().flatten() {
        let Some((kind, content)) = expression.as_object().and_then(|it| it.iter().next()) else { continue };
        match kind.as_str() {
            "match" => matches.extend(conditions(content)),
            "vmap" if content["key"]["ct"]["key"] == "state" => {
                for (states, verdict) in elements(&content["data"]) {
                    let states = Match::yes(What::States(strings(states)));
                    push(&[matches.as_slice(), &[states]].concat(), action(verdict));
                }
            }
            "vmap" => push(&matches, Action::MayAccept),
            "counter" | "log" | "mangle" | "notrack" | "ct helper" | "ct timeout" | "ct expectation" | "meta"
            | "comment" | "set" | "map" | "secmark" | "dup" | "last" | "flow" => {}
            // With `xt`, what iptables has put there and only it understands.
            "xt" | "limit" | "quota" | "ct count" | "meter" | "connlimit" => matches.push(Match::yes(What::Unknown)),
            _ => push(&matches, action(expression)),
        }
    }
    found
}

fn action(verdict: &Value) -> Action {
    let Some((kind, content)) = verdict.as_object().and_then(|it| it.iter().next()) else {
        return Action::MayAccept;
    };
    let target = || content["target"].as_str().unwrap_or_default().to_owned();
    match kind.as_str() {
        "accept" => Action::Accept,
        "drop" | "reject" => Action::Stop(How::Dropped),
        "dnat" | "redirect" => Action::Stop(How::Translated),
        "tproxy" => Action::Stop(How::Taken),
        "return" => Action::Return,
        "continue" => Action::Continue,
        "jump" => Action::Jump(target()),
        "goto" => Action::Goto(target()),
        _ => Action::MayAccept,
    }
}

/// The pairs of a map of verdicts.
fn elements(data: &Value) -> impl Iterator<Item = (&Value, &Value)> {
    let pairs = data["set"].as_array().into_iter().flatten().filter_map(Value::as_array);
    pairs.filter_map(|pair| Some((pair.first()?, pair.get(1)?)))
}

/// A condition, with what it takes for granted.
fn conditions(content: &Value) -> Vec<Match> {
    let (left, right) = (&content["left"], &content["right"]);
    let what = match (content["op"].as_str(), what(left, right)) {
        (Some("==" | "in" | "!="), Some(what)) => what,
        _ => What::Unknown,
    };
    // Of `tcp flags & (fin | syn) == syn`, too.
    let payload = left.get("payload").or_else(|| left["&"].get(0)?.get("payload"));
    let implied = match payload.and_then(|it| it["protocol"].as_str()) {
        Some(version @ ("ip" | "ip6")) => Some(What::Ipv4(version == "ip")),
        Some(protocol) if TRANSPORTS.contains(&protocol) => Some(What::Protocol(vec![protocol.to_owned()])),
        _ => None,
    };
    implied.map(Match::yes).into_iter().chain([Match { what, negated: content["op"] == "!=" }]).collect()
}

fn what(left: &Value, right: &Value) -> Option<What> {
    if let Some(payload) = left.get("payload") {
        return match (payload["protocol"].as_str()?, payload["field"].as_str()?) {
            ("ip" | "ip6", "daddr") => all(right, prefix).map(What::Destination),
            ("ip" | "ip6", "saddr") => all(right, prefix).map(What::Source),
            ("tcp" | "udp" | "th", "dport") => all(right, ports).map(What::Ports),
            ("ip", "protocol") | ("ip6", "nexthdr") => Some(What::Protocol(strings(right))),
            _ => None,
        };
    }
    match left["ct"]["key"].as_str() {
        Some("state") => return Some(What::States(strings(right))),
        Some("status") => return Some(What::Status),
        _ => {}
    }
    if let Some(fib) = left.get("fib") {
        let is_of = |flag: &str| fib["flags"] == flag || fib["flags"] == serde_json::json!([flag]);
        return match fib["result"].as_str()? {
            "type" if is_of("daddr") => Some(What::ToType(strings(right))),
            "type" if is_of("saddr") => Some(What::FromType(strings(right))),
            _ => None,
        };
    }
    if let Some([masked, mask]) = left["&"].as_array().map(Vec::as_slice) {
        let is_of_tcp = masked["payload"]["protocol"] == "tcp" && masked["payload"]["field"] == "flags";
        return is_of_tcp.then(|| What::TcpFlags { of: flags(mask), set: flags(right) });
    }
    match left["meta"]["key"].as_str()? {
        "iifname" | "iif" => right.as_str().map(|name| What::Interface(name.to_owned())),
        "l4proto" => Some(What::Protocol(strings(right))),
        "pkttype" => Some(What::PacketType(strings(right))),
        "nfproto" if right == "ipv4" || right == "ipv6" => Some(What::Ipv4(right == "ipv4")),
        _ => None,
    }
}

/// What stands on the right: one thing, or a set of them.
fn all<T>(right: &Value, one: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    match right["set"].as_array() {
        Some(set) => set.iter().map(one).collect(),
        None => Some(vec![one(right)?]),
    }
}

fn strings(right: &Value) -> Vec<String> {
    let items = right["set"].as_array().or(right.as_array()).map_or(std::slice::from_ref(right), Vec::as_slice);
    items.iter().filter_map(|it| it.as_str().map(str::to_owned)).collect()
}

/// Flags of TCP: one, or several by `|`.
fn flags(value: &Value) -> Vec<String> {
    match value.get("|") {
        Some(all) => all.as_array().into_iter().flatten().flat_map(flags).collect(),
        None => strings(value),
    }
}

fn prefix(value: &Value) -> Option<Prefix> {
    match value.get("prefix") {
        Some(prefix) => format!("{}/{}", prefix["addr"].as_str()?, prefix["len"]).parse().ok(),
        None => value.as_str()?.parse().ok(),
    }
}

fn ports(value: &Value) -> Option<(u16, u16)> {
    let port = |value: &Value| value.as_u64().and_then(|it| u16::try_from(it).ok());
    match value["range"].as_array().map(Vec::as_slice) {
        Some([first, last]) => Some((port(first)?, port(last)?)),
        _ => port(value).map(|port| (port, port)),
    }
}
