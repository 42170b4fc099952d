//! Our chains in the table mangle of one family, through the tools of iptables.

use std::{
    fmt::Write as _,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::ErrorKind,
    process::Command,
};

use anyhow::Context as _;
use nix::libc;

use super::{
    chain_rules::{COMMENT, Family},
    counted::Counted,
    groups::Effect,
    nftables, tool,
};

const TABLE: &str = "mangle";
const HOOK: &str = "PREROUTING";
/// What PREROUTING jumps to: it sorts out what is no business of the rules.
const CHAIN: &str = "ANYPORT";
/// The rules in order of precedence.
pub(super) const RULES_CHAIN: &str = "ANYPORT-RULES";
/// These stand for a moment, and no packet comes to them.
const PROBE_CHAIN: &str = "ANYPORT-PROBE";
const PROBE_TARGET: &str = "ANYPORT-PROBE-2";
const OUR_CHAINS: [&str; 4] = [CHAIN, RULES_CHAIN, PROBE_CHAIN, PROBE_TARGET];

/// iptables makes the table and the hook's chain of `nf_tables` as it needs them but never takes them away. A line
/// without effect keeps in mind that we had it make them, also for the one who comes after a crash.
const MADE_TABLE: &str = "anyport made this table";
const MADE_HOOK: &str = "anyport made the chain PREROUTING";

/// What stands behind all rules and counts the new connections that get there.
pub(super) const UNMATCHED: &str = "anyport unmatched";

/// The table mangle of one family.
#[derive(Debug)]
pub(super) struct MangleTable {
    family: Family,
    pub(super) is_legacy: bool,
}

impl MangleTable {
    /// Looks which flavour of iptables is installed; nothing if there is none.
    pub(super) fn find(family: Family) -> anyhow::Result<Option<Self>> {
        let tool = restore_tool(family);
        let output = match Command::new(tool).arg("--version").output() {
            Ok(output) => output,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("running {tool}")),
        };
        // Before 1.8 there was only the legacy flavour, and it did not say so.
        let is_legacy = !String::from_utf8_lossy(&output.stdout).contains("nf_tables");
        Ok(Some(Self { family, is_legacy }))
    }

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
        let is_alone = our_chains(&before).next().is_none();
        let removed = if is_alone {
            self.save().and_then(|saved| self.remove(&saved))
        } else if tried.is_ok() {
            let commands = ["-F", "-X"].map(|verb| format!("{verb} {PROBE_CHAIN}\n{verb} {PROBE_TARGET}\n"));
            self.restore(&format!("*{TABLE}\n{}COMMIT\n", commands.concat()))
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

    fn write(&self, saved: &str, entry: &str, chains: &[(&str, &[String])], with_jump: bool) -> anyhow::Result<()> {
        let mut script = format!("*{TABLE}\n");
        for (chain, _) in chains {
            // Makes the chain or empties it.
            let _ = writeln!(script, ":{chain} - [0:0]");
        }
        if let Some(mark) = self.mark(saved)? {
            let _ = writeln!(script, "-A {entry} -m comment --comment \"{mark}\"");
        }
        for (chain, lines) in chains {
            for line in *lines {
                let _ = writeln!(script, "-A {chain} {line}");
            }
        }
        if with_jump {
            script.extend(deletions_of_jumps(saved));
            let _ = writeln!(script, "-I {HOOK} 1 -j {CHAIN}");
        }
        script.push_str("COMMIT\n");
        self.restore(&script)
    }

    /// Takes away everything of ours, and what iptables made for it if it is empty now.
    ///
    /// A process that is killed half-way leaves the mark behind, by which the next one goes on.
    pub(super) fn remove(&self, saved: &str) -> anyhow::Result<()> {
        let chains: Vec<_> = our_chains(saved).collect();
        if chains.is_empty() {
            return Ok(());
        }
        let marked = [MADE_TABLE, MADE_HOOK].into_iter().find_map(|mark| Some((mark, chain_with(saved, mark)?)));
        let unmarked = chains.iter().filter(|chain| marked.is_none_or(|(_, marked)| **chain != marked));
        let mut script = format!("*{TABLE}\n");
        script.extend(deletions_of_jumps(saved));
        for chain in &chains {
            let _ = writeln!(script, "-F {chain}");
        }
        for chain in unmarked {
            let _ = writeln!(script, "-X {chain}");
        }
        if let Some((mark, chain)) = marked {
            let _ = writeln!(script, "-A {chain} -m comment --comment \"{mark}\"");
        }
        script.push_str("COMMIT\n");
        self.restore(&script)?;
        match marked {
            Some((mark, chain)) => self.remove_marked(mark, chain),
            None => Ok(()),
        }
    }

    /// Takes away the chain with the mark together with what the mark names.
    fn remove_marked(&self, mark: &str, chain: &str) -> anyhow::Result<()> {
        let kernel = self.in_kernel();
        let has_hook = kernel.has_chain(HOOK).context("asking nf_tables for the chain PREROUTING")?;
        let hook = if has_hook { &[HOOK][..] } else { &[] };
        let is_done = kernel
            .delete(chain, hook, mark == MADE_TABLE)
            .with_context(|| format!("removing the empty table {TABLE} of nf_tables"))?;
        if is_done {
            return Ok(());
        }
        // Another program has rules there by now, so it stays.
        self.restore(&format!("*{TABLE}\n-F {chain}\n-X {chain}\nCOMMIT\n"))
    }

    /// What of the table and its hook's chain would not be there without us.
    fn mark(&self, saved: &str) -> anyhow::Result<Option<&'static str>> {
        let marks = [MADE_TABLE, MADE_HOOK];
        if let Some(mark) = marks.into_iter().find(|mark| saved.contains(mark)) {
            return Ok(Some(mark));
        }
        if self.is_legacy {
            return Ok(None);
        }
        let kernel = self.in_kernel();
        let exists = kernel.exists().and_then(|table| Ok((table, kernel.has_chain(HOOK)?)));
        Ok(match exists.context("asking nf_tables for the table mangle")? {
            (false, _) => Some(MADE_TABLE),
            (true, false) => Some(MADE_HOOK),
            (true, true) => None,
        })
    }

    fn in_kernel(&self) -> nftables::NfTable {
        let family = match self.family {
            Family::V4 => libc::NFPROTO_IPV4,
            Family::V6 => libc::NFPROTO_IPV6,
        };
        nftables::NfTable { family, name: TABLE }
    }

    /// The table as `iptables-save` shows it, with counters.
    pub(super) fn save(&self) -> anyhow::Result<String> {
        // The legacy tool would make the table only to show that it is empty, and it can't be taken away again.
        if self.is_legacy && !self.is_legacy_table_loaded() {
            return Ok(String::new());
        }
        let tool = match self.family {
            Family::V4 => "iptables-save",
            Family::V6 => "ip6tables-save",
        };
        tool::read(tool, &["--counters", "--table", TABLE])
    }

    fn is_legacy_table_loaded(&self) -> bool {
        let names = match self.family {
            Family::V4 => "ip_tables_names",
            Family::V6 => "ip6_tables_names",
        };
        match fs::read_to_string(format!("/proc/thread-self/net/{names}")) {
            Ok(names) => names.lines().any(|name| name == TABLE),
            Err(error) => error.kind() != ErrorKind::NotFound,
        }
    }

    fn restore(&self, script: &str) -> anyhow::Result<()> {
        tool::feed(restore_tool(self.family), &["--wait", "5", "--noflush"], |to| to.write_all(script.as_bytes()))
    }
}

fn restore_tool(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-restore",
        Family::V6 => "ip6tables-restore",
    }
}

fn our_chains(saved: &str) -> impl Iterator<Item = &str> {
    let names = saved.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
    names.filter(|name| OUR_CHAINS.contains(name))
}

/// The chain of ours that has a line with this mark.
fn chain_with<'a>(saved: &'a str, mark: &str) -> Option<&'a str> {
    let line = saved.lines().find(|line| line.contains(mark))?;
    let (_, rule) = line.split_once("-A ")?;
    rule.split(' ').next()
}

/// Commands that take away every jump from elsewhere into our chain, however it came there.
fn deletions_of_jumps(saved: &str) -> impl Iterator<Item = String> {
    saved.lines().filter_map(|line| {
        let (_, rule) = line.split_once("] -A ")?;
        let leads_to_us = ["-j", "-g"].iter().any(|verb| rule.ends_with(&format!(" {verb} {CHAIN}")));
        leads_to_us.then(|| format!("-D {rule}\n"))
    })
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
    /// Given what [`MangleTable::save`] showed.
    pub(super) fn of(saved: &str) -> Self {
        let mut shown = Self::default();
        let mut hashes = [DefaultHasher::new(), DefaultHasher::new()];
        for line in saved.lines() {
            let Some((_, rule)) = line.split_once("] -A ") else { continue };
            let (at, chain) = match rule.split_once(' ') {
                Some((RULES_CHAIN, _)) => (1, &mut shown.rules),
                Some((CHAIN, rest)) if !rest.contains(MADE_TABLE) && !rest.contains(MADE_HOOK) => (0, &mut shown.entry),
                Some((HOOK, rest)) => {
                    shown.has_jump |= rest == format!("-j {CHAIN}");
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

    /// Whether there are as many lines as [`MangleTable::replace`] wrote, given so many guards and lines of rules.
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

/// The lines of the rules' chain without what they counted, given what [`MangleTable::save`] showed.
pub(super) fn rules_lines(saved: &str) -> impl Iterator<Item = &str> {
    saved.lines().filter_map(|line| line.split_once("-A ")?.1.strip_prefix(RULES_CHAIN)?.strip_prefix(' '))
}

/// What the lines have counted, given what [`MangleTable::save`] showed.
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
        "TPROXY" => Effect::Steer,
        "DROP" => Effect::Drop,
        _ => return None,
    };
    Some((rule.parse().ok()?, packets(line)?, effect))
}

#[cfg(test)]
mod tests;
