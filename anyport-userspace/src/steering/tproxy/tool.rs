//! Running the tools of iptables and ipset.

use std::{
    io::{self, BufWriter, Write},
    process::{Command, Output, Stdio},
};

use anyhow::{Context as _, bail};

/// Runs a tool to its end and gives what it wrote.
pub(super) fn read(tool: &str, args: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(tool).args(args).output().with_context(|| format!("running {tool}"))?;
    check(tool, &output)?;
    String::from_utf8(output.stdout).with_context(|| format!("reading what {tool} wrote"))
}

/// Runs a tool that reads what `write` gives it.
pub(super) fn feed(
    tool: &str,
    args: &[&str],
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> anyhow::Result<()> {
    let mut child = Command::new(tool)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {tool}"))?;
    // A tool that ends early says why on its standard error, which is worth more than a broken pipe.
    let written = child.stdin.take().map(|stdin| {
        let mut stdin = BufWriter::with_capacity(1 << 16, stdin);
        write(&mut stdin).and_then(|()| stdin.flush())
    });
    let output = child.wait_with_output().with_context(|| format!("running {tool}"))?;
    check(tool, &output)?;
    written.transpose().with_context(|| format!("writing to {tool}"))?;
    Ok(())
}

fn check(tool: &str, output: &Output) -> anyhow::Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: Vec<_> = said.lines().filter(|line| !line.starts_with('#')).map(str::trim).collect();
    bail!("{tool} failed ({}): {}", output.status, said.join(" "))
}
