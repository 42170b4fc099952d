//! What `iptables-save` prints.

use std::str::SplitAsciiWhitespace;

use super::{Action, Chain, Families, Hook, How, Match, Rule, Ruleset, Tool, What};
use crate::rules::Prefix;

/// The chains that a packet passes on its way in: table, chain, and place by `linux/netfilter_ipv4.h`.
const HOOKS: [(&str, &str, (u8, i64)); 6] = [
    ("raw", "PREROUTING", (0, -300)),
    ("mangle", "PREROUTING", (0, -150)),
    ("nat", "PREROUTING", (0, -100)),
    ("mangle", "INPUT", (1, -150)),
    ("filter", "INPUT", (1, 0)),
    ("security", "INPUT", (1, 50)),
];

/// Adds the chains that `text` shows.
pub(super) fn read(text: &str, tool: Tool, ruleset: &mut Ruleset) {
    let families = if tool == Tool::Iptables { Families::V4 } else { Families::V6 };
    let mut table = "";
    let first = ruleset.chains.len();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split_ascii_whitespace();
            let name = words.next().unwrap_or_default();
            let drops_by_policy = words.next() == Some("DROP");
            for (_, _, order) in HOOKS.iter().filter(|(in_table, hook, _)| (*in_table, *hook) == (table, name)) {
                ruleset.hooks.push(Hook { order: *order, chain: ruleset.chains.len() });
            }
            let (table, name) = (table.to_owned(), name.to_owned());
            ruleset.chains.push(Chain { tool, families, table, name, drops_by_policy, rules: Vec::new() });
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let Some((chain, rest)) = rule.split_once(' ') else { continue };
            let here = |it: &&mut Chain| it.table == table && it.name == chain;
            if let Some(chain) = ruleset.chains[first..].iter_mut().find(here) {
                chain.rules.push(Rule { text: line.to_owned(), ..parse(rest) });
            }
        }
    }
}

fn parse(rule: &str) -> Rule {
    let mut rule = Rule { text: String::new(), matches: Vec::new(), action: Action::Continue }.with(rule);
    match &rule.action {
        // Our own chain lets pass or takes, and nobody after it sees what it takes.
        Action::Jump(chain) if chain == "ANYPORT" => rule.action = Action::Accept,
        // This one is for what is refused since its service has no live socket.
        Action::Jump(chain) if chain == "ANYPORT-REFUSE" => rule.action = Action::Continue,
        _ => {}
    }
    rule
}

impl Rule {
    fn with(mut self, text: &str) -> Self {
        let mut words = text.split_ascii_whitespace();
        let mut negated = false;
        while let Some(word) = words.next() {
            if word == "!" {
                negated = true;
                continue;
            }
            let mut value = || words.next().unwrap_or_default();
            let what = match word {
                "-d" | "--destination" => Some(addresses(value(), What::Destination)),
                "-s" | "--source" => Some(addresses(value(), What::Source)),
                "-p" | "--protocol" => Some(What::Protocol(vec![value().to_owned()])),
                "--dport" | "--dports" | "--destination-port" => Some(ports(value())),
                "-i" | "--in-interface" => Some(What::Interface(value().to_owned())),
                "--dst-type" => Some(What::ToType(list(value()))),
                "--src-type" => Some(What::FromType(list(value()))),
                "--pkt-type" => Some(What::PacketType(list(value()))),
                "--tcp-flags" => Some(What::TcpFlags { of: list(value()), set: flags(value()) }),
                "--ctstatus" => Some(What::Status),
                // DNAT and SNAT are what was done to a connection before.
                "--ctstate" | "--state" => Some(What::States(list(value()))),
                "-m" | "--match" => match value() {
                    // What these ask stands in the options behind.
                    "tcp" | "udp" | "icmp" | "icmp6" | "addrtype" | "conntrack" | "state" | "multiport" | "pkttype"
                    | "comment" => None,
                    _ => Some(What::Unknown),
                },
                "--comment" => {
                    skip_quoted(value(), &mut words);
                    None
                }
                "-j" | "--jump" => {
                    self.action = action(value());
                    break;
                }
                "-g" | "--goto" => {
                    self.action = Action::Goto(value().to_owned());
                    break;
                }
                _ if word.starts_with('-') => Some(What::Unknown),
                // The value of an option that is not understood.
                _ => None,
            };
            self.matches.extend(what.map(|what| Match { what, negated }));
            negated = false;
        }
        self
    }
}

fn action(target: &str) -> Action {
    match target {
        "ACCEPT" => Action::Accept,
        "DROP" | "REJECT" => Action::Stop(How::Dropped),
        "DNAT" | "REDIRECT" => Action::Stop(How::Translated),
        "TPROXY" => Action::Stop(How::Taken),
        "RETURN" => Action::Return,
        "QUEUE" | "NFQUEUE" | "SYNPROXY" => Action::MayAccept,
        "AUDIT" | "CHECKSUM" | "CLASSIFY" | "CONNMARK" | "CONNSECMARK" | "CT" | "DSCP" | "LOG" | "MARK" | "NFLOG"
        | "NOTRACK" | "SECMARK" | "SET" | "TCPMSS" | "TEE" | "TOS" | "TRACE" | "TTL" | "HL" | "ULOG" => {
            Action::Continue
        }
        chain => Action::Jump(chain.to_owned()),
    }
}

/// The rest of a comment that has blanks and so stands in quotation marks.
fn skip_quoted(first: &str, words: &mut SplitAsciiWhitespace<'_>) {
    let ends = |word: &str| word.ends_with('"') && !word.ends_with("\\\"");
    if first.starts_with('"') && !(first.len() > 1 && ends(first)) {
        words.find(|word| ends(word));
    }
}

fn addresses(text: &str, what: impl Fn(Vec<Prefix>) -> What) -> What {
    text.parse::<Prefix>().map_or(What::Unknown, |prefix| what(vec![prefix]))
}

fn ports(text: &str) -> What {
    let range = |text: &str| {
        let (first, last) = text.split_once(':').unwrap_or((text, text));
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    text.split(',').map(range).collect::<Option<_>>().map_or(What::Unknown, What::Ports)
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::to_lowercase).collect()
}

/// The flags that are set; `NONE` is none.
fn flags(text: &str) -> Vec<String> {
    list(text).into_iter().filter(|flag| flag != "none").collect()
}
