//! What no thread of the server needs, and what is therefore taken from all of them and from the tools that they start.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use landlock::{ABI, AccessFs, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, path_beneath_rules};
use nix::unistd::Uid;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter, apply_filter_all_threads};

use crate::{
    back_end::{BackEnd, Choice},
    paths::{Paths, RUN_DIRECTORY, make_private},
};

/// What tproxy starts.
const TOOLS: [&str; 5] = ["iptables-restore", "iptables-save", "ip6tables-restore", "ip6tables-save", "ipset"];
/// Where dynamic linkers are, which run whatever is linked dynamically.
const LINKERS: [&str; 2] = ["/lib64", "/lib"];

/// Calls by which one process gets hold of another or of the kernel, or changes its view of the system; and those by which code runs
/// that is no file, or of which much has gone wrong. Neither the server nor the tools that it starts use any of them.
const DENIED: [libc::c_long; 48] = [
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_chroot,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_memfd_create,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// Confines this thread and all that start from it: files are written in the daemon's own directories alone, no program is executed but
/// those tools, and some calls are refused. Says what could not be had here. Nothing is done to root, who could undo it.
///
/// # Errors
/// The kernel refuses what it has.
pub fn confine(paths: Paths<'_>, choice: Choice) -> anyhow::Result<Option<&'static str>> {
    if Uid::effective().is_root() {
        return Ok(None);
    }
    deny(&DENIED, false)?;
    let status = restrict_files(paths, choice).context("confine what files are written and executed (Landlock)")?;
    Ok((status == RulesetStatus::NotEnforced)
        .then_some("this kernel has no Landlock: files are guarded by their modes alone"))
}

fn restrict_files(
    Paths { socket, state_dir, bpffs, announced }: Paths<'_>,
    choice: Choice,
) -> anyhow::Result<RulesetStatus> {
    // Its rights, and what kernels before Linux 6.2 lack of them is left out.
    const VERSION: ABI = ABI::V3;
    let writing = AccessFs::from_write(VERSION);
    let announced = announced.and_then(Path::parent);
    let own = [Some(RUN_DIRECTORY.as_ref()), socket.parent(), Some(state_dir), Some(bpffs), announced];
    let own: Vec<&Path> = own.into_iter().flatten().collect();
    // What is not there yet can't be allowed. The code that needs the directory reports why it can't be made.
    let has_pins = choice != Choice::Tproxy;
    for path in own.iter().filter(|path| has_pins || **path != bpffs) {
        let is_private = **path == *state_dir || **path == *bpffs;
        if is_private { make_private(path) } else { fs::create_dir_all(path) }.ok();
    }
    let restricted = Ruleset::default()
        .handle_access(writing | AccessFs::Execute)?
        .create()?
        .add_rules(path_beneath_rules(own, writing))?
        // What becomes of the output of tools.
        .add_rules(path_beneath_rules(["/dev/null"], AccessFs::WriteFile))?
        .add_rules(path_beneath_rules(executables(), AccessFs::Execute))?
        .restrict_self()?;
    Ok(restricted.ruleset)
}

/// The tools, by the files that their names lead to, and what links them.
fn executables() -> Vec<PathBuf> {
    let search: Vec<PathBuf> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    let places = TOOLS.iter().flat_map(|tool| search.iter().map(move |directory| directory.join(tool)));
    let tools = places.filter_map(|path| fs::canonicalize(path).ok());
    let linkers = LINKERS.into_iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten().flatten();
    let linkers = linkers.filter(|entry| entry.file_name().to_string_lossy().starts_with("ld-"));
    tools.chain(linkers.map(|entry| entry.path())).collect()
}

/// Takes from all threads what the back end in use does not need: `bpf(2)`, or programs to execute.
///
/// # Errors
/// The kernel refuses.
pub fn narrow(back_end: BackEnd) -> anyhow::Result<()> {
    if Uid::effective().is_root() {
        return Ok(());
    }
    match back_end {
        BackEnd::SkLookup | BackEnd::Tc => deny(&[libc::SYS_execve], true),
        BackEnd::Tproxy => deny(&[libc::SYS_bpf], true),
    }
}

/// Has these calls fail with `EPERM`.
fn deny(calls: &[libc::c_long], is_for_all_threads: bool) -> anyhow::Result<()> {
    let filter = || {
        let rules: BTreeMap<i64, _> = calls.iter().map(|call| (*call, Vec::new())).collect();
        let refuse = SeccompAction::Errno(libc::EPERM.cast_unsigned());
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, env::consts::ARCH.try_into()?)?;
        let program = BpfProgram::try_from(filter)?;
        if is_for_all_threads { apply_filter_all_threads(&program) } else { apply_filter(&program) }?;
        Ok::<_, anyhow::Error>(())
    };
    filter().context("have the kernel refuse calls that are not needed (seccomp)")
}

#[cfg(test)]
mod tests {
    use std::{fs, io::ErrorKind, process::Command, thread};

    use nix::{
        errno::Errno,
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
        unistd::{Gid, chown, getpid},
    };
    use rustix::{process::Uid, thread::set_thread_res_uid};

    use super::confine;
    use crate::{back_end::Choice, paths::Paths};

    /// All of it is a thread's, so that one is enough to lose it.
    #[test]
    fn what_is_not_needed_is_refused() {
        const NOBODY: u32 = 65_534;
        let directory = tempfile::tempdir().unwrap();
        let [own, foreign] = ["own", "foreign"].map(|name| directory.path().join(name));
        for path in [directory.path(), &own, &foreign] {
            fs::create_dir_all(path).unwrap();
            chown(path, Some(NOBODY.into()), None::<Gid>).unwrap();
        }
        let [socket, state_dir, bpffs] = ["run/anyportd.sock", "state", "pins"].map(|name| own.join(name));
        let confined = move || {
            let nobody = Uid::from_raw(NOBODY);
            set_thread_res_uid(nobody, nobody, nobody).unwrap();
            rustix::thread::set_no_new_privs(true).unwrap();
            assert!(Command::new("/bin/true").status().unwrap().success());
            fs::write(foreign.join("before"), "").unwrap();
            let paths = Paths { socket: &socket, state_dir: &state_dir, bpffs: &bpffs, announced: None };
            assert_eq!(confine(paths, Choice::Tproxy).unwrap(), None, "this kernel lacks what the test is about");

            for name in ["run/one", "state/two"] {
                fs::write(own.join(name), "").unwrap();
            }
            for path in [foreign.join("after"), own.join("beside"), "/dev/shm/anyport-test".into()] {
                assert_eq!(fs::write(path, "").unwrap_err().kind(), ErrorKind::PermissionDenied);
            }
            assert!(fs::remove_file(foreign.join("before")).is_err() && foreign.join("before").exists());
            assert_eq!(Command::new("/bin/true").status().unwrap_err().kind(), ErrorKind::PermissionDenied);
            assert!(Command::new("iptables-save").arg("--version").output().unwrap().status.success());

            assert_eq!(unshare(CloneFlags::CLONE_NEWUSER), Err(Errno::EPERM));
            assert_eq!(mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE, None::<&str>), Err(Errno::EPERM));
            let traced = nix::sys::uio::process_vm_readv(getpid(), &mut [], &[]);
            assert_eq!(traced, Err(Errno::EPERM));
        };
        thread::spawn(confined).join().unwrap();
    }
}
