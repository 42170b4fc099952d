//! Our sets of prefixes in the kernel, through the tool `ipset`.

use std::{
    io::{BufRead as _, BufReader, ErrorKind},
    net::IpAddr,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use super::{chain_rules::Family, change::Element, ip_table::IpTable, tool};
use crate::rules::Prefix;

const TOOL: &str = "ipset";
/// How the names of our sets begin.
const NAMES: &str = "anyport-";
/// A set is in use until the kernel has cleaned up behind the lines that named it, which it does a moment later.
const PATIENCE: Duration = Duration::from_secs(3);

/// The sets of one family.
#[derive(Debug)]
pub(super) struct Sets {
    family: Family,
    /// How many names were given out. None comes again, so that no line ever means another set.
    named: u64,
    is_tried_out: bool,
    /// Sets that no line names any more, but which the kernel has not destroyed yet.
    discarded: Vec<String>,
}

impl Sets {
    /// Knows of no set; the first name is one that nobody else has.
    pub(super) fn new(family: Family, others: &[String]) -> Self {
        let number = |name: &String| name.rsplit('-').next()?.parse::<u64>().ok();
        let named = others.iter().filter_map(number).max().map_or(0, |number| number.saturating_add(1));
        Self { family, named, is_tried_out: false, discarded: Vec::new() }
    }

    /// A name that no set had before.
    pub(super) fn new_name(&mut self) -> String {
        let name = name(self.family, self.named);
        self.named += 1;
        name
    }

    /// Shows once that sets and lines that name them work here.
    ///
    /// # Errors
    /// What is missing and how to get it.
    pub(super) fn try_out(&mut self, table: &IpTable) -> anyhow::Result<()> {
        if self.is_tried_out {
            return Ok(());
        }
        let name = self.new_name();
        let tried = self.make(&[(name.clone(), Vec::new())]).and_then(|()| {
            let line = format!("-p tcp -m set --match-set {name} dst ! --update-counters -j RETURN");
            let tried = table.try_lines(&[line]);
            self.discard([name]);
            tried
        });
        tried.context(
            "so many prefixes take sets of addresses: `apt-get install ipset`, and the kernel modules of \
             `modprobe -a ip_set_hash_net xt_set`",
        )?;
        self.is_tried_out = true;
        Ok(())
    }

    /// Makes sets that consist of these prefixes. If that fails there are none of them.
    pub(super) fn make(&mut self, sets: &[(String, Vec<Prefix>)]) -> anyhow::Result<()> {
        let family = match self.family {
            Family::V4 => "inet",
            Family::V6 => "inet6",
        };
        let made = tool::feed(TOOL, &["restore"], |to| {
            for (name, prefixes) in sets {
                // With two elements a bucket nothing has to be moved while the set is filled.
                let buckets = (prefixes.len() / 2).next_power_of_two().max(1024);
                let most = u32::MAX;
                writeln!(to, "create {name} hash:net family {family} hashsize {buckets} maxelem {most} counters")?;
                prefixes.iter().try_for_each(|prefix| writeln!(to, "add {name} {prefix}"))?;
            }
            Ok(())
        });
        if made.is_err() {
            self.discard(sets.iter().map(|(name, _)| name.clone()));
        }
        made
    }

    /// Adds elements to sets and removes others, each of them in one step.
    pub(super) fn change(added: &[Element], removed: &[Element]) -> anyhow::Result<()> {
        tool::feed(TOOL, &["restore"], |to| {
            added.iter().try_for_each(|it| writeln!(to, "add {} {}", it.set, it.prefix))?;
            removed.iter().try_for_each(|it| writeln!(to, "del {} {}", it.set, it.prefix))
        })
    }

    /// Has these sets destroyed as soon as the kernel does it.
    pub(super) fn discard(&mut self, names: impl IntoIterator<Item = String>) {
        for name in names {
            if !self.discarded.contains(&name) {
                self.discarded.push(name);
            }
        }
        self.sweep();
    }

    /// Destroys what could not be destroyed when it was discarded.
    pub(super) fn sweep(&mut self) {
        if self.discarded.is_empty() {
            return;
        }
        let destroyed = tool::feed(TOOL, &["restore"], |to| {
            self.discarded.iter().try_for_each(|name| writeln!(to, "destroy {name}"))
        });
        // The tool stops at the first one that is in use. Another one is the first next time.
        if let Err(error) = destroyed {
            tracing::debug!("destroying sets that no line names any more: {error:#}");
            let there = names(self.family).unwrap_or_default();
            self.discarded.retain(|name| there.contains(name));
            if !self.discarded.is_empty() {
                self.discarded.rotate_left(1);
            }
        } else {
            self.discarded.clear();
        }
    }
}

fn name(family: Family, number: u64) -> String {
    format!("{}{number}", prefix_of_names(family))
}

fn prefix_of_names(family: Family) -> String {
    let family = match family {
        Family::V4 => 4,
        Family::V6 => 6,
    };
    format!("{NAMES}{family}-")
}

fn destroy(name: &str) -> anyhow::Result<()> {
    tool::read(TOOL, &["destroy", name]).with_context(|| format!("destroying the set {name}")).map(drop)
}

/// The names of our sets of this family that are there. Where sets don't work there are none.
pub(super) fn names(family: Family) -> anyhow::Result<Vec<String>> {
    let output = match Command::new(TOOL).args(["list", "-name"]).output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("running ipset"),
    };
    let prefix = prefix_of_names(family);
    let names = String::from_utf8_lossy(&output.stdout);
    Ok(names.lines().filter(|name| name.starts_with(&prefix)).map(ToOwned::to_owned).collect())
}

/// Destroys all our sets of this family, which no line names any more.
pub(super) fn destroy_all(family: Family) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let failures: Vec<_> = names(family)?.iter().filter_map(|name| destroy(name).err()).collect();
        match failures.into_iter().next() {
            None => return Ok(()),
            Some(error) if Instant::now() > deadline => return Err(error),
            Some(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The elements of these sets that packets have matched, and how many, each with its set.
pub(super) fn counts(sets: &[&str]) -> anyhow::Result<Vec<(String, Prefix, u64)>> {
    let mut command = Command::new(TOOL);
    command.arg("save");
    match sets {
        [] => return Ok(Vec::new()),
        [set] => drop(command.arg(set)),
        // Reading the sets of others too takes less than running the tool for each of ours.
        _ => {}
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("running ipset")?;
    let mut counts = Vec::new();
    let mut line = String::new();
    let stdout = child.stdout.take().context("ipset has no standard output")?;
    let mut stdout = BufReader::with_capacity(1 << 16, stdout);
    while stdout.read_line(&mut line).context("reading what ipset wrote")? > 0 {
        counts.extend(counted_element(&line).map(|(set, prefix, packets)| (set.to_owned(), prefix, packets)));
        line.clear();
    }
    let status = child.wait().context("running ipset")?;
    // Others may have destroyed the one that was asked for, which is put back soon.
    if !status.success() && sets.len() > 1 {
        bail!("ipset failed to show our sets ({status})");
    }
    Ok(counts)
}

/// The set, the element and the packets of a line such as `add anyport-4-0 192.0.2.0/24 packets 3 bytes 180`, if that
/// is one of our sets and there are packets.
fn counted_element(line: &str) -> Option<(&str, Prefix, u64)> {
    let (element, counts) = line.strip_prefix("add ")?.split_once(" packets ")?;
    let (packets, _) = counts.split_once(' ')?;
    if packets == "0" || !element.starts_with(NAMES) {
        return None;
    }
    let (set, prefix) = element.split_once(' ')?;
    Some((set, prefix.parse().ok()?, packets.parse().ok()?))
}

/// What a set takes of the kernel's memory; nothing if the tool does not say so.
pub(super) fn bytes(name: &str) -> Option<u64> {
    let shown = tool::read(TOOL, &["list", "-terse", name]).ok()?;
    shown.lines().find_map(|line| line.strip_prefix("Size in memory: ")?.trim().parse().ok())
}

/// Whether the kernel finds the address in a set.
pub(super) fn contains(name: &str, address: IpAddr) -> anyhow::Result<bool> {
    let address = address.to_string();
    let output = Command::new(TOOL).args(["test", name, &address]).output().context("running ipset")?;
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => Ok(true),
        false if said.contains("is NOT in set") => Ok(false),
        false => bail!("ipset failed ({}): {}", output.status, said.trim()),
    }
}

#[cfg(test)]
mod tests {
    use super::{Family, Sets, counted_element};

    #[test]
    fn names_never_come_again() {
        let others = ["anyport-4-7".to_owned(), "anyport-4-x".to_owned()];
        let mut sets = Sets::new(Family::V4, &others);
        assert_eq!((sets.new_name(), sets.new_name()), ("anyport-4-8".into(), "anyport-4-9".into()));
        assert_eq!(Sets::new(Family::V6, &[]).new_name(), "anyport-6-0");
    }

    #[test]
    fn elements_are_read_with_what_they_counted() {
        for (line, element) in [
            ("add anyport-4-0 192.0.2.0/24 packets 3 bytes 180\n", Some(("192.0.2.0/24", 3))),
            ("add anyport-4-0 192.0.2.7 packets 18446744073709551615 bytes 0\n", Some(("192.0.2.7/32", u64::MAX))),
            ("add anyport-6-0 2001:db8::/64 packets 1 bytes 1\n", Some(("2001:db8::/64", 1))),
            ("add anyport-4-0 192.0.2.0/24 packets 0 bytes 0\n", None),
            ("add theirs 192.0.2.0/24 packets 3 bytes 180\n", None),
            ("add theirs 192.0.2.0/24 timeout 7 packets 3 bytes 180\n", None),
            ("create anyport-4-0 hash:net family inet hashsize 1024 maxelem 4294967295 counters\n", None),
            ("", None),
        ] {
            let element = element.map(|(prefix, packets)| (prefix.to_owned(), packets));
            let read = counted_element(line).map(|(_, prefix, packets)| (prefix.to_string(), packets));
            assert_eq!(read, element, "{line}");
        }
    }
}
