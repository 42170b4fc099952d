//! How many files the daemon may open.

use std::fs;

use anyhow::Context as _;

use crate::doctor::{Finding, Host};

/// Some hundred of these anyportd needs for itself.
const LOW: u64 = 4096;

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let Ok(daemon) = &host.daemon else { return Ok(Vec::new()) };
    let pid = daemon.status.pid;
    let limits = host.read(format!("{pid}/limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft = line.and_then(|line| line.split_ascii_whitespace().next()).context("there is no limit of open files")?;
    let Ok(soft) = soft.parse::<u64>() else { return Ok(Vec::new()) };
    let directory = host.proc.join(format!("{pid}/fd"));
    let open = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?.count() as u64;
    let (all, used) = (daemon.status.client_descriptors, daemon.status.client_descriptors_in_use);
    // Clients wait for one another where nothing is left.
    let is_full = used * 10 >= all * 9;
    if soft >= LOW && !is_full {
        return Ok(Vec::new());
    }
    let finding = format!(
        "anyportd (pid {pid}) has {open} files open and may have {soft}: clients may take {all} of them, and take {used}"
    );
    let why = "A connection takes a descriptor, and one that is forwarded two or more. Where there are none left, clients wait until \
               others have gone.";
    let step =
        "LimitNOFILE=1048576 in the unit of anyportd, or `ulimit -n 1048576` before it is started; then start it again";
    Ok(vec![Finding::warning(finding, why).by_hand(step)])
}
