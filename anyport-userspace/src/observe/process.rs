//! Numbers of this process, as the kernel tells them.

use std::fs;

use nix::{
    sys::{
        resource::{Resource, getrlimit},
        stat::stat,
    },
    unistd::{SysconfVar, sysconf},
};

/// What is known of the process; nothing for what the kernel does not tell.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Numbers {
    pub(super) cpu_seconds: Option<f64>,
    /// Since 1970.
    pub(super) start_seconds: Option<f64>,
    pub(super) resident_bytes: Option<f64>,
    pub(super) virtual_bytes: Option<f64>,
    pub(super) threads: Option<f64>,
    pub(super) open_files: Option<f64>,
    pub(super) max_files: Option<f64>,
}

impl Numbers {
    pub(super) fn read() -> Self {
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The name before may contain anything.
        let fields: Vec<&str> = stat.rsplit_once(") ").map_or_else(Vec::new, |(_, rest)| rest.split(' ').collect());
        // proc_pid_stat(5) counts from 1; the third one is the first here.
        let field = |number: usize| fields.get(number - 3)?.trim_end().parse::<f64>().ok();
        let unit = |variable| sysconf(variable).ok().flatten().map(count);
        let ticks = unit(SysconfVar::CLK_TCK);
        let seconds = |ticks_passed: Option<f64>| Some(ticks_passed? / ticks?);
        Self {
            cpu_seconds: seconds(field(14).zip(field(15)).map(|(user, system)| user + system)),
            start_seconds: boot_seconds().zip(seconds(field(22))).map(|(boot, after)| boot + after),
            resident_bytes: field(24).zip(unit(SysconfVar::PAGE_SIZE)).map(|(pages, size)| pages * size),
            virtual_bytes: field(23),
            threads: field(20),
            open_files: open_files(),
            max_files: getrlimit(Resource::RLIMIT_NOFILE)
                .ok()
                .map(|(soft, _)| soft)
                .and_then(|it| i64::try_from(it).ok())
                .map(count),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "these numbers are far below 2^53")]
fn count(number: i64) -> f64 {
    number as f64
}

/// When the machine was started, in seconds since 1970.
fn boot_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// Since Linux 6.2 the size of the directory tells how many there are (`proc_fd_getattr` in `fs/proc/fd.c`). Before, they have to be counted.
fn open_files() -> Option<f64> {
    const DIRECTORY: &str = "/proc/self/fd";
    match stat(DIRECTORY).ok()?.st_size {
        0 => Some(count(i64::try_from(fs::read_dir(DIRECTORY).ok()?.count()).ok()?)),
        size => Some(count(size)),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        time::{SystemTime, UNIX_EPOCH},
    };

    use super::Numbers;

    #[test]
    fn the_kernel_tells_of_this_process() {
        let numbers = Numbers::read();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let age = now - numbers.start_seconds.unwrap();
        assert!((-2.0..600.0).contains(&age), "{age} seconds old");
        assert!((0.0..600.0).contains(&numbers.cpu_seconds.unwrap()));
        assert!(
            numbers.resident_bytes.unwrap() > 1e6 && numbers.virtual_bytes.unwrap() > numbers.resident_bytes.unwrap()
        );
        assert!(numbers.threads.unwrap() >= 1.0 && numbers.max_files.unwrap() >= 16.0);
        let files: Vec<_> = (0..1000).map(|_| File::open("/dev/null").unwrap()).collect();
        // Other tests open and close some meanwhile.
        let more = Numbers::read().open_files.unwrap() - numbers.open_files.unwrap();
        assert!((500.0..1500.0).contains(&more), "{more} more");
        drop(files);
    }
}
