//! What a process holds, and what it has used.

use std::{
    fmt::Display,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{time::ClockId, unistd::Pid};

/// What a process holds at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub descriptors: usize,
    /// KiB of memory that no other process shares.
    pub memory: u64,
    /// KiB of kernel memory of the BPF maps that it has open (`memlock` of `proc_pid_fdinfo(5)`), each counted once.
    pub maps: u64,
}

impl Holdings {
    /// Of a process.
    ///
    /// # Errors
    /// It has ended, or belongs to another user.
    pub fn of(pid: impl Display) -> io::Result<Self> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let rollup = fs::read_to_string(process.join("smaps_rollup"))?;
        let private = rollup.lines().filter(|line| line.starts_with("Private_"));
        let memory = private.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum();
        let descriptors = fs::read_dir(process.join("fd"))?.count();
        Ok(Self { descriptors, memory, maps: maps(&process)? >> 10 })
    }
}

/// Processor time that a process has used so far, also by threads that have ended.
///
/// # Errors
/// It has ended.
pub fn cpu_time(process: Pid) -> io::Result<Duration> {
    Ok(ClockId::pid_cpu_clock_id(process)?.now()?.into())
}

fn maps(process: &Path) -> io::Result<u64> {
    let mut maps = Vec::new();
    for entry in fs::read_dir(process.join("fdinfo"))? {
        // One that is closed meanwhile is none.
        let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
        let number =
            |name: &str| -> Option<u64> { info.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()) };
        maps.extend(number("map_id:").zip(number("memlock:")));
    }
    maps.sort_unstable();
    maps.dedup();
    Ok(maps.iter().map(|(_, bytes)| bytes).sum())
}
