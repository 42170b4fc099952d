//! A table of iptables in which chains of ours stand, of one family, through the tools.

use std::{fmt::Write as _, fs, io::ErrorKind, process::Command};

use anyhow::Context as _;
use nix::libc;

use super::{chain_rules::Family, nftables, tool};

/// iptables makes the table and the hook's chain of `nf_tables` as it needs them but never takes them away. A line
/// without effect keeps in mind that we had it make them, also for the one who comes after a crash.
const MADE_TABLE: &str = "anyport made this table";
/// As above; the hook's name follows.
const MADE_HOOK: &str = "anyport made the chain ";

/// What of a table is ours.
#[derive(Debug)]
pub(super) struct Layout {
    /// The table's name.
    pub(super) table: &'static str,
    /// The chain of the kernel's from which we are jumped to.
    pub(super) hook: &'static str,
    /// Which packets are; ends with a blank unless it is empty.
    pub(super) condition: &'static str,
    /// What is jumped to.
    pub(super) entry: &'static str,
    /// Our chains, that one among them.
    pub(super) chains: &'static [&'static str],
}

/// A table of one family.
#[derive(Clone, Copy, Debug)]
pub(super) struct IpTable {
    pub(super) family: Family,
    pub(super) is_legacy: bool,
    pub(super) layout: &'static Layout,
}

impl IpTable {
    /// Looks which flavour of iptables is installed; nothing if there is none.
    pub(super) fn find(family: Family, layout: &'static Layout) -> anyhow::Result<Option<Self>> {
        let tool = restore_tool(family);
        let output = match Command::new(tool).arg("--version").output() {
            Ok(output) => output,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("running {tool}")),
        };
        // Before 1.8 there was only the legacy flavour, and it did not say so.
        let is_legacy = !String::from_utf8_lossy(&output.stdout).contains("nf_tables");
        Ok(Some(Self { family, is_legacy, layout }))
    }

    /// Makes these chains consist of these lines, whatever they were before, in one transaction.
    pub(super) fn write(
        &self,
        saved: &str,
        entry: &str,
        chains: &[(&str, &[String])],
        with_jump: bool,
    ) -> anyhow::Result<()> {
        let Layout { table, hook, .. } = self.layout;
        let mut script = format!("*{table}\n");
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
            script.extend(self.layout.deletions_of_jumps(saved));
            let _ = writeln!(script, "-I {hook} 1 {}", self.layout.jump());
        }
        script.push_str("COMMIT\n");
        self.restore(&script)
    }

    /// Takes away everything of ours, and what iptables made for it if it is empty now.
    ///
    /// A process that is killed half-way leaves the mark behind, by which the next one goes on.
    pub(super) fn remove(&self, saved: &str) -> anyhow::Result<()> {
        let chains: Vec<_> = self.layout.our_chains(saved).collect();
        if chains.is_empty() {
            return Ok(());
        }
        let marked = self.marks().into_iter().find_map(|mark| {
            let chain = chain_with(saved, &mark)?;
            Some((mark, chain))
        });
        let unmarked = chains.iter().filter(|chain| marked.as_ref().is_none_or(|(_, marked)| *chain != marked));
        let mut script = format!("*{}\n", self.layout.table);
        script.extend(self.layout.deletions_of_jumps(saved));
        for chain in &chains {
            let _ = writeln!(script, "-F {chain}");
        }
        for chain in unmarked {
            let _ = writeln!(script, "-X {chain}");
        }
        if let Some((mark, chain)) = &marked {
            let _ = writeln!(script, "-A {chain} -m comment --comment \"{mark}\"");
        }
        script.push_str("COMMIT\n");
        self.restore(&script)?;
        match marked {
            Some((mark, chain)) => self.remove_marked(saved, &mark, chain),
            None => Ok(()),
        }
    }

    /// Takes away the chain with the mark together with what the mark names.
    fn remove_marked(&self, saved: &str, mark: &str, chain: &str) -> anyhow::Result<()> {
        let Layout { table, hook, .. } = self.layout;
        let kernel = self.in_kernel();
        let has_hook = kernel.has_chain(hook).with_context(|| format!("asking nf_tables for the chain {hook}"))?;
        let hooks = if has_hook { &[*hook][..] } else { &[] };
        // A policy that another program has set since is its own, and goes with the chain.
        let has_policy = saved.lines().any(|line| line.starts_with(&format!(":{hook} DROP")));
        let is_done = !has_policy
            && kernel
                .delete(chain, hooks, mark == MADE_TABLE)
                .with_context(|| format!("removing the empty table {table} of nf_tables"))?;
        if is_done {
            return Ok(());
        }
        // Another program has rules there by now, so it stays.
        self.restore(&format!("*{table}\n-F {chain}\n-X {chain}\nCOMMIT\n"))
    }

    fn marks(&self) -> [String; 2] {
        [MADE_TABLE.to_owned(), format!("{MADE_HOOK}{}", self.layout.hook)]
    }

    /// What of the table and its hook's chain would not be there without us.
    fn mark(&self, saved: &str) -> anyhow::Result<Option<String>> {
        if let Some(mark) = self.marks().into_iter().find(|mark| saved.contains(mark)) {
            return Ok(Some(mark));
        }
        if self.is_legacy {
            return Ok(None);
        }
        let kernel = self.in_kernel();
        let exists = kernel.exists().and_then(|table| Ok((table, kernel.has_chain(self.layout.hook)?)));
        let [made_table, made_hook] = self.marks();
        Ok(match exists.with_context(|| format!("asking nf_tables for the table {}", self.layout.table))? {
            (false, _) => Some(made_table),
            (true, false) => Some(made_hook),
            (true, true) => None,
        })
    }

    fn in_kernel(&self) -> nftables::NfTable {
        let family = match self.family {
            Family::V4 => libc::NFPROTO_IPV4,
            Family::V6 => libc::NFPROTO_IPV6,
        };
        nftables::NfTable { family, name: self.layout.table }
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
        tool::read(tool, &["--counters", "--table", self.layout.table])
    }

    fn is_legacy_table_loaded(&self) -> bool {
        let names = match self.family {
            Family::V4 => "ip_tables_names",
            Family::V6 => "ip6_tables_names",
        };
        match fs::read_to_string(format!("/proc/thread-self/net/{names}")) {
            Ok(names) => names.lines().any(|name| name == self.layout.table),
            Err(error) => error.kind() != ErrorKind::NotFound,
        }
    }

    pub(super) fn restore(&self, script: &str) -> anyhow::Result<()> {
        tool::feed(restore_tool(self.family), &["--wait", "5", "--noflush"], |to| to.write_all(script.as_bytes()))
    }
}

impl Layout {
    /// The jump to us, without the chain in which it stands.
    pub(super) fn jump(&self) -> String {
        format!("{}-j {}", self.condition, self.entry)
    }

    /// Those of our chains that are there.
    pub(super) fn our_chains<'a>(&self, saved: &'a str) -> impl Iterator<Item = &'a str> {
        let names = saved.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
        names.filter(|name| self.chains.contains(name))
    }

    /// Commands that take away every jump from elsewhere into our chain, however it came there.
    pub(super) fn deletions_of_jumps(&self, saved: &str) -> impl Iterator<Item = String> {
        saved.lines().filter_map(|line| {
            let (_, rule) = line.split_once("] -A ")?;
            let leads_to_us = ["-j", "-g"].iter().any(|verb| rule.ends_with(&format!(" {verb} {}", self.entry)));
            leads_to_us.then(|| format!("-D {rule}\n"))
        })
    }
}

/// Whether a line of our chains is such a mark.
pub(super) fn is_mark(rule: &str) -> bool {
    rule.contains(MADE_TABLE) || rule.contains(MADE_HOOK)
}

fn restore_tool(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-restore",
        Family::V6 => "ip6tables-restore",
    }
}

/// The chain of ours that has a line with this mark.
fn chain_with<'a>(saved: &'a str, mark: &str) -> Option<&'a str> {
    let line = saved.lines().find(|line| line.contains(mark))?;
    let (_, rule) = line.split_once("-A ")?;
    rule.split(' ').next()
}
