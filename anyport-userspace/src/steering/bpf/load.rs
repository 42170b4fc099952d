//! Loading programs, and what is said where the kernel does not take them.

use std::{fs, io};

use aya::programs::ProgramError;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use tracing::debug;

use crate::back_end::BackEnd;

/// Of the verifier's words to people. The debug log has all of them.
const LONGEST_LINE: usize = 200;

/// The kernel does not take a program.
#[derive(Debug, thiserror::Error)]
#[error("{said}")]
pub(in crate::steering) struct NotTaken {
    said: String,
    /// What the kernel returned, if it was asked.
    pub(in crate::steering) code: Option<i32>,
}

/// Loads a program of a back end. What the verifier writes goes to the debug log, where it may be hundreds of kilobytes; its
/// verdict, which is its last line but for statistics, goes to people.
pub(super) fn load_program(
    back_end: BackEnd,
    name: &str,
    load: impl FnOnce() -> Result<(), ProgramError>,
) -> anyhow::Result<()> {
    load().map_err(|error| {
        let (said, code) = match &error {
            ProgramError::LoadError { io_error, verifier_log } => {
                (refusal(name, io_error, &verifier_log.to_string()), io_error.raw_os_error())
            }
            other => (other.to_string(), None),
        };
        let limit = named_limit(&anyhow::Error::new(error)).map(|it| format!("; {it}")).unwrap_or_default();
        let said = format!("the kernel does not take the BPF program {name}: {said}; {}{limit}", needs(back_end));
        NotTaken { said, code }.into()
    })
}

/// What is said of a program that the verifier refuses.
fn refusal(name: &str, error: &io::Error, log: &str) -> String {
    debug!("the verifier about the program {name}: {log}");
    match verdict(log) {
        Some(verdict) => format!("{error}: {verdict}"),
        None => error.to_string(),
    }
}

/// Which kernel a back end needs, and which one this is.
pub(super) fn needs(back_end: BackEnd) -> String {
    let needed = match back_end {
        BackEnd::SkLookup => "5.10",
        BackEnd::Tc => "6.6",
        BackEnd::Tproxy => return format!("this is Linux {}", release()),
    };
    format!("{back_end} needs Linux {needed} or later, this is {}", release())
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".into(), |text| text.trim_end().to_owned())
}

/// The last line of a verifier's log that is no statistics.
fn verdict(log: &str) -> Option<String> {
    const STATISTICS: [&str; 3] = ["processed ", "verification time ", "stack depth "];
    let lines = log.lines().rev().map(str::trim);
    let line = lines.filter(|line| !line.is_empty()).find(|line| !STATISTICS.iter().any(|it| line.starts_with(it)))?;
    Some(line.chars().take(LONGEST_LINE).collect())
}

/// Adds the limit of locked memory to an error where that may be what was met.
pub(super) fn with_memory_limit(error: anyhow::Error) -> anyhow::Error {
    match named_limit(&error) {
        Some(limit) => error.context(limit),
        None => error,
    }
}

fn named_limit(error: &anyhow::Error) -> Option<String> {
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    let codes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()?.raw_os_error());
    memory_limit(codes, &release(), soft)
}

/// Before Linux 5.11 maps and programs count against the limit of locked memory, and what goes beyond it is not permitted.
fn memory_limit(mut codes: impl Iterator<Item = i32>, release: &str, limit: u64) -> Option<String> {
    let mut numbers = release.split(|it: char| !it.is_ascii_digit()).map_while(|it| it.parse::<u32>().ok());
    let version = (numbers.next()?, numbers.next()?);
    let is_met = codes.any(|code| [libc::EPERM, libc::ENOMEM].contains(&code));
    (is_met && version < (5, 11) && limit != RLIM_INFINITY).then(|| {
        format!(
            "before Linux 5.11 (this is {release}) BPF maps and programs count against the limit of locked memory, which is {} KiB here: \
             start anyportd as root, or with LimitMEMLOCK=infinity in the unit (ulimit -l unlimited)",
            limit >> 10
        )
    })
}

#[cfg(test)]
mod tests {
    use std::io;

    use aya::{programs::ProgramError, sys::SyscallError};
    use nix::sys::resource::RLIM_INFINITY;

    use super::{BackEnd, LONGEST_LINE, load_program, memory_limit, refusal, verdict};

    #[test]
    fn people_see_the_verdict_and_the_versions() {
        let log = "0: (bf) r6 = r1\n".repeat(10_000)
            + "12: (85) call bpf_get_current_pid_tgid#14\nunknown func bpf_get_current_pid_tgid#14\n\
               processed 2 insns (limit 1000000) max_states_per_insn 0\nverification time 70 usec\n\n";
        let said = refusal("anyport_sk", &io::Error::from_raw_os_error(libc::EINVAL), &log);
        assert_eq!(said, "Invalid argument (os error 22): unknown func bpf_get_current_pid_tgid#14");
        assert_eq!(verdict(&"x".repeat(1_000)).map(|it| it.len()), Some(LONGEST_LINE));
        assert_eq!(verdict("processed 2 insns\n"), None);
        let error = io::Error::from_raw_os_error(libc::EBADF);
        let refuse = || Err(ProgramError::SyscallError(SyscallError { call: "bpf_prog_load", io_error: error }));
        let error = format!("{:#}", load_program(BackEnd::SkLookup, "anyport_sk", refuse).unwrap_err());
        for part in ["anyport_sk", "bpf_prog_load", "sk-lookup needs Linux 5.10 or later, this is "] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn the_limit_of_locked_memory_is_named_where_it_counts() {
        for (code, release, limit, is_named) in [
            (libc::EPERM, "5.10.0-35-amd64", 65_536, true),
            (libc::ENOMEM, "5.10.0", 65_536, true),
            (libc::EPERM, "5.10.0", RLIM_INFINITY, false),
            (libc::EINVAL, "5.10.0", 65_536, false),
            (libc::EPERM, "5.11.0", 65_536, false),
            (libc::EPERM, "6.1.0", 65_536, false),
        ] {
            let named = memory_limit([code].into_iter(), release, limit);
            assert_eq!(named.is_some(), is_named, "{code} {release} {limit}");
            assert!(named.is_none_or(|it| it.contains("64 KiB") && it.contains("LimitMEMLOCK=infinity")));
        }
    }
}
