//! The service manager above the keeper, if there is one: its descriptor store keeps the sockets while the unit restarts.

use std::{
    collections::BTreeMap,
    env, fs, io,
    os::fd::{BorrowedFd, RawFd},
    process::{self, Command},
};

use sd_notify::NotifyState;

use super::server::OF_SERVERS;
use crate::{
    closing::PassedFd,
    journal::{Priority, tell},
    sys,
};

/// Where `Type=notify` units find the manager's socket (`sd_notify(3)`).
const SOCKET: &str = "NOTIFY_SOCKET";
/// The first descriptor that the manager passes (`sd_listen_fds(3)`).
const LISTEN_FDS_START: RawFd = 3;

/// Whether a service manager is told what happens, and keeps what it is given.
pub(super) fn is_there() -> bool {
    env::var_os(SOCKET).is_some()
}

/// The sockets that the manager has kept (`LISTEN_FDS`), by the names under which it was given them. To be called once.
pub(super) fn kept() -> BTreeMap<String, PassedFd> {
    let names = match passed_names(|name| env::var(name).ok()) {
        Ok(names) => names,
        Err(error) => {
            let what = format_args!("take the sockets that the service manager kept: {error}");
            tell(Priority::Warning, &what);
            return BTreeMap::new();
        }
    };
    let numbers = LISTEN_FDS_START..;
    numbers
        .zip(names)
        .filter_map(|(number, name)| Some((name, PassedFd::new(sys::take_inherited(number)?, OF_SERVERS))))
        .collect()
}

/// The names of the descriptors that were passed to this process, as the environment has them (`sd_listen_fds(3)`).
fn passed_names(variable: impl Fn(&str) -> Option<String>) -> Result<Vec<String>, String> {
    let number = |name: &str, text: String| text.parse().map_err(|_| format!("{name} is {text:?}, which is no number"));
    let Some(pid) = variable("LISTEN_PID") else { return Ok(Vec::new()) };
    if number("LISTEN_PID", pid)? != process::id() {
        return Ok(Vec::new());
    }
    let Some(count) = variable("LISTEN_FDS") else { return Ok(Vec::new()) };
    let count = number("LISTEN_FDS", count)?;
    let Some(names) = variable("LISTEN_FDNAMES") else { return Ok((0..count).map(|_| "unknown".into()).collect()) };
    let names: Vec<String> = names.split(':').map(Into::into).collect();
    if u32::try_from(names.len()) != Ok(count) {
        return Err(format!("LISTEN_FDS is {count}, but LISTEN_FDNAMES has {} names", names.len()));
    }
    Ok(names)
}

/// Has the manager keep a socket.
pub(super) fn keep(name: &str, socket: BorrowedFd<'_>) {
    // Without FDPOLL=0 the manager would drop a socket that has an error, although a process is about to read that error.
    let state = [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
    complain(sd_notify::notify_with_fds(&state, &[socket]));
}

/// Has it keep one no more.
pub(super) fn forget(name: &str) {
    complain(sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]));
}

/// Tells that connections are served.
pub(super) fn ready() {
    complain(sd_notify::notify(&[NotifyState::Ready]));
}

/// Tells that this process and the server go on, if the manager wants to know (`WatchdogSec=`).
pub(super) fn alive() {
    if env::var_os("WATCHDOG_USEC").is_some() {
        complain(sd_notify::notify(&[NotifyState::Watchdog]));
    }
}

/// Whether the unit of this process is being restarted rather than stopped: only its job says so. Without an answer it is stopped.
pub(super) fn is_restarting() -> bool {
    let Some(unit) = own_unit() else { return false };
    let jobs = Command::new("systemctl").args(["list-jobs", "--full", "--plain", "--no-legend", "--no-pager"]).output();
    jobs.is_ok_and(|output| is_restart_of(&unit, &String::from_utf8_lossy(&output.stdout)))
}

/// By lines such as `123 anyport.service restart running`.
fn is_restart_of(unit: &str, jobs: &str) -> bool {
    jobs.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next() == Some(unit) && words.next() == Some("restart")
    })
}

/// The last unit in the path of the process's control group, such as `0::/system.slice/anyport.service`.
fn own_unit() -> Option<String> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    path.rsplit('/').find(|part| part.ends_with(".service")).map(ToOwned::to_owned)
}

fn complain(told: io::Result<()>) {
    if let Err(error) = told {
        tell(Priority::Warning, &format_args!("tell the service manager: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::{is_restart_of, passed_names};

    #[test]
    fn passed_names_follow_the_environment() {
        let pid = process::id().to_string();
        let of = |variables: &[(&str, &str)]| {
            passed_names(|name| variables.iter().find(|(it, _)| *it == name).map(|(_, value)| (*value).into()))
        };
        let own = ("LISTEN_PID", pid.as_str());
        assert_eq!(of(&[("LISTEN_FDS", "1")]).unwrap(), [""; 0]);
        assert_eq!(of(&[("LISTEN_PID", "1"), ("LISTEN_FDS", "1")]).unwrap(), [""; 0]);
        assert_eq!(of(&[own]).unwrap(), [""; 0]);
        assert_eq!(of(&[own, ("LISTEN_FDS", "2")]).unwrap(), ["unknown"; 2]);
        assert_eq!(of(&[own, ("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", "a:b")]).unwrap(), ["a", "b"]);
        for wrong in [&[own, ("LISTEN_FDS", "x")][..], &[own, ("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "a:b")]] {
            of(wrong).unwrap_err();
        }
        of(&[("LISTEN_PID", "x")]).unwrap_err();
    }

    #[test]
    fn a_restart_is_told_from_a_stop() {
        let jobs = "  88 anyport.service restart running\n 91 other.service stop waiting\n";
        assert!(is_restart_of("anyport.service", jobs));
        assert!(!is_restart_of("other.service", jobs));
        assert!(!is_restart_of("port.service", jobs));
    }
}
