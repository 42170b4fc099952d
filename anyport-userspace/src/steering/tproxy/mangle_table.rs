//! Our chains in the table mangle of one family.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::{
    chain_rules::{COMMENT, REFUSE_MARK},
    counted::Counted,
    groups::Effect,
    ip_table::{IpTable, Layout, is_mark},
};

const HOOK: &str = "PREROUTING";
/// What PREROUTING jumps to: it sorts out what is no business of the rules.
const CHAIN: &str = "ANYPORT";
/// The rules in order of precedence.
pub(super) const RULES_CHAIN: &str = "ANYPORT-RULES";
/// These stand for a moment, and no packet comes to them.
const PROBE_CHAIN: &str = "ANYPORT-PROBE";
const PROBE_TARGET: &str = "ANYPORT-PROBE-2";

/// What of the table mangle is ours.
pub(super) const MANGLE: Layout = Layout {
    table: "mangle",
    hook: HOOK,
    condition: "",
    entry: CHAIN,
    chains: &[CHAIN, RULES_CHAIN, PROBE_CHAIN, PROBE_TARGET],
};

/// What stands behind all rules and counts the new connections that get there.
pub(super) const UNMATCHED: &str = "anyport unmatched";

impl IpTable {
    /// Shows that the kernel takes all that rules are made of, and leaves no trace of that.
    pub(super) fn probe(&self) -> anyhow::Result<()> {
        let to = self.family.loopback();
        self.try_lines(&[
            format!("-p tcp -m socket --transparent -g {PROBE_TARGET}"),
            "-p udp -m multiport --dports 1,2 -m comment --comment anyport -j RETURN".to_owned(),
            format!("-p tcp -m tcp --dport 1 -j TPROXY --on-ip {to} --on-port 1"),
        ])
    }

    /// Has the kernel hold these lines for a moment, beside what is there.
    pub(super) fn try_lines(&self, lines: &[String]) -> anyhow::Result<()> {
        let before = self.save()?;
        let tried = self.write(&before, PROBE_CHAIN, &[(PROBE_TARGET, &[]), (PROBE_CHAIN, lines)], false);
        let is_alone = self.layout.our_chains(&before).next().is_none();
        let removed = if is_alone {
            self.save().and_then(|saved| self.remove(&saved))
        } else if tried.is_ok() {
            let commands = ["-F", "-X"].map(|verb| format!("{verb} {PROBE_CHAIN}\n{verb} {PROBE_TARGET}\n"));
            self.restore(&format!("*{}\n{}COMMIT\n", self.layout.table, commands.concat()))
        } else {
            Ok(())
        };
        tried?;
        removed
    }

    /// Makes our chains consist of these lines, whatever they were before, in one transaction.
    pub(super) fn replace(&self, saved: &str, guards: &[String], rules: &[String]) -> anyhow::Result<()> {
        let mut entry = guards.to_vec();
        entry.push(format!("-g {RULES_CHAIN}"));
        let unmatched = ["tcp -m tcp --syn", "udp"].map(|it| format!("-p {it} -m comment --comment \"{UNMATCHED}\""));
        let rules = [rules, &unmatched].concat();
        self.write(saved, CHAIN, &[(RULES_CHAIN, &rules), (CHAIN, &entry)], true)
    }
}

/// What is of ours in the table, to find what another program has changed there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shown {
    has_jump: bool,
    entry: Chain,
    rules: Chain,
}

/// The lines of a chain: how many there are, and what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Chain {
    lines: usize,
    hash: u64,
}

impl Shown {
    /// Given what [`IpTable::save`] showed.
    pub(super) fn of(saved: &str) -> Self {
        let mut shown = Self::default();
        let mut hashes = [DefaultHasher::new(), DefaultHasher::new()];
        for line in saved.lines() {
            let Some((_, rule)) = line.split_once("] -A ") else { continue };
            let (at, chain) = match rule.split_once(' ') {
                Some((RULES_CHAIN, _)) => (1, &mut shown.rules),
                Some((CHAIN, rest)) if !is_mark(rest) => (0, &mut shown.entry),
                Some((HOOK, rest)) => {
                    shown.has_jump |= rest == MANGLE.jump();
                    continue;
                }
                _ => continue,
            };
            chain.lines += 1;
            rule.hash(&mut hashes[at]);
        }
        (shown.entry.hash, shown.rules.hash) = (hashes[0].finish(), hashes[1].finish());
        shown
    }

    /// Whether there are as many lines as [`IpTable::replace`] wrote, given so many guards and lines of rules.
    pub(super) fn is_complete(&self, guards: usize, rules: usize) -> bool {
        // One more leads from the guards to the rules, and two count what no rule matches.
        self.has_jump && self.entry.lines == guards + 1 && self.rules.lines == rules + 2
    }

    /// What another program has changed since, in words.
    pub(super) fn changed(&self, now: &Self) -> Vec<String> {
        let is_changed = [self.has_jump != now.has_jump, self.entry != now.entry, self.rules != now.rules];
        let names = [
            format!("the jump from {HOOK} to {CHAIN}"),
            format!("the chain {CHAIN}"),
            format!("the chain {RULES_CHAIN}"),
        ];
        names.into_iter().zip(is_changed).filter(|(_, is_changed)| *is_changed).map(|(name, _)| name).collect()
    }
}

/// The lines of the rules' chain without what they counted, given what [`IpTable::save`] showed.
pub(super) fn rules_lines(saved: &str) -> impl Iterator<Item = &str> {
    saved.lines().filter_map(|line| line.split_once("-A ")?.1.strip_prefix(RULES_CHAIN)?.strip_prefix(' '))
}

/// What the lines have counted, given what [`IpTable::save`] showed.
pub(super) fn counted(saved: &str) -> Counted {
    let mut counted = Counted::default();
    for line in saved.lines() {
        if let Some((rule, packets, target)) = counted_line(line) {
            counted.add(rule, target, packets);
        } else if line.contains(UNMATCHED) {
            counted.unmatched += packets(line).unwrap_or(0);
        }
    }
    counted
}

/// The packets that a line such as `[3:180] -A …` has counted.
fn packets(line: &str) -> Option<u64> {
    line.strip_prefix('[')?.split_once(':')?.0.parse().ok()
}

/// The rule's number, the packets and the effect of a line such as
/// `[3:180] -A ANYPORT-RULES … --comment "anyport rule 7" -j TPROXY …`; nothing for those that leave packets alone.
fn counted_line(line: &str) -> Option<(u32, u64, Effect)> {
    let (_, rest) = line.split_once(COMMENT)?;
    let (rule, rest) = rest.split_once('"')?;
    let effect = match rest.strip_prefix(" -j ")?.split(' ').next()? {
        "TPROXY" if rest.contains(REFUSE_MARK) => Effect::Drop,
        "TPROXY" => Effect::Steer,
        "DROP" => Effect::Drop,
        _ => return None,
    };
    Some((rule.parse().ok()?, packets(line)?, effect))
}

#[cfg(test)]
mod tests;
