//! From root to an ordinary user, once, before there is a second thread.

use std::{
    ffi::CString,
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, fchown, lchown},
    path::Path,
    str::FromStr,
};

use super::{ALL, expect};
use crate::{
    as_text::as_text,
    back_end::Choice,
    paths::{DEFAULT_SOCKET, DEFAULT_STATE_DIR, Paths, make_private},
};
use anyhow::{Context as _, anyhow, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{self, Gid, Group, Uid, getgrouplist, setegid, seteuid, setgroups, setresgid, setresuid},
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities, set_no_new_privs,
};

/// Members of this group may use the whole API, as root may.
pub const GROUP: &str = "anyport";
/// The user that the daemon becomes unless told otherwise.
pub const USER: &str = "anyport";
/// What `iptables` of the older kind locks against others of its kind (`xtables.lock` in iptables(8)).
const XTABLES_LOCK: (&str, &str) = ("XTABLES_LOCKFILE", "/run/xtables.lock");

/// What root needs to become another user, and to give it directories before that.
const TO_BECOME: CapabilitySet = CapabilitySet::CHOWN.union(CapabilitySet::SETGID).union(CapabilitySet::SETUID);

/// A user by name, or by the numbers of user and group: `anyport` or `64998:64998`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User(String);

impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_pair =
            text.split_once(':').is_some_and(|(uid, gid)| [uid, gid].iter().all(|it| it.parse::<u32>().is_ok()));
        let is_safe = |it: char| it.is_ascii_alphanumeric() || "_-.".contains(it);
        let is_name = text.starts_with(|it: char| it.is_ascii_alphabetic() || it == '_') && text.chars().all(is_safe);
        if is_pair || is_name {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!("{text:?} is no name of a user, nor UID:GID"))
        }
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

as_text!(User);

/// Who it is to be.
#[derive(Clone, Copy, Debug)]
struct Account {
    uid: Uid,
    gid: Gid,
}

/// Where the process was started as root, makes what takes root to make, gives it to the user, and becomes that user with the
/// capabilities that servers need, which processes that are started from now on inherit. Started as anybody else it stays that.
///
/// The answer is why it stays root, if it does.
///
/// # Errors
/// There is no such user, or the kernel refuses.
pub fn become_user(
    wanted: Option<&User>,
    paths: Paths<'_>,
    choice: Choice,
    make_pin_directory: impl Fn(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<Option<String>> {
    let held = capabilities(None).context("ask for the capabilities")?.permitted & ALL;
    let why = if Uid::effective().is_root() {
        match account(wanted)? {
            Ok(account) => {
                let pins = (choice != Choice::Tproxy && make_pin_directory(paths.bpffs).is_ok()).then_some(paths.bpffs);
                let became = prepare(paths, choice, pins, account).with_context(|| format!("make ready for {account}"));
                let became = became.and_then(|()| switch(account).with_context(|| format!("become {account}")));
                became.or_else(|refused| {
                    // Root of a container may lack what it takes.
                    expect(TO_BECOME).map_err(|lacking| anyhow!("{refused:#}; {lacking}"))?;
                    Err(refused)
                })?;
                None
            }
            Err(why) => Some(why),
        }
    } else {
        None
    };
    if why.is_none() {
        let keep = || {
            let sets = CapabilitySets { effective: CapabilitySet::empty(), permitted: held, inheritable: held };
            set_capabilities(None, sets)?;
            set_keep_capabilities(false)?;
            held.iter().try_for_each(|capability| configure_capability_in_ambient_set(capability, true))
        };
        keep().context("keep the capabilities that servers need, and no others")?;
    }
    set_no_new_privs(true).context("give up the way to other privileges")?;
    Ok(why)
}

/// Makes sure that there is the user that [`become_user`] is to become.
///
/// # Errors
/// There is none of that name.
pub fn expect_user(wanted: Option<&User>) -> anyhow::Result<()> {
    account(wanted).map(drop)
}

/// Where this process is root, has it act as the owner of a directory from now on: what it makes there is that user's, and it gets no
/// further than that user by what stands there.
///
/// # Errors
/// There is no such directory, or the kernel refuses.
pub fn act_as_owner_of(directory: &Path) -> anyhow::Result<()> {
    let attempt = || format!("act as the owner of {}", directory.display());
    let owner = fs::metadata(directory).with_context(attempt)?;
    if Uid::effective().is_root() && owner.uid() != 0 {
        let act = || {
            setgroups(&[])?;
            setegid(Gid::from_raw(owner.gid()))?;
            seteuid(Uid::from_raw(owner.uid()))
        };
        act().with_context(attempt)?;
    }
    Ok(())
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "user {}, group {}", self.uid, self.gid)
    }
}

/// Or why it is to stay root.
fn account(wanted: Option<&User>) -> anyhow::Result<Result<Account, String>> {
    if let Some((uid, gid)) = wanted.and_then(|wanted| wanted.0.split_once(':')) {
        return Ok(Ok(Account { uid: Uid::from_raw(uid.parse()?), gid: Gid::from_raw(gid.parse()?) }));
    }
    let name = wanted.map_or(USER, |wanted| wanted.0.as_str());
    let found = unistd::User::from_name(name).with_context(|| format!("look up the user {name}"))?;
    Ok(match (found, wanted) {
        (Some(user), _) if user.uid.is_root() => Err(format!("user = {name}")),
        (Some(unistd::User { uid, gid, .. }), _) => Ok(Account { uid, gid }),
        (None, Some(_)) => bail!("there is no user {name}, as which anyportd is to run; name another with --user"),
        (None, None) => {
            Err(format!("there is no user {name} to become: `useradd --system {name}` makes one, --user names another"))
        }
    })
}

fn switch(Account { uid, gid }: Account) -> anyhow::Result<()> {
    // What is not wanted can't come back, whatever is started.
    for capability in (CapabilitySet::all() - ALL).iter() {
        remove_capability_from_bounding_set(capability).ok();
    }
    set_keep_capabilities(true)?;
    // Whichever user it is, it gives the control socket to that group. Its other groups may give access to a router's socket.
    let control = Group::from_name(GROUP)?.map(|group| group.gid);
    let name = unistd::User::from_uid(uid)?.and_then(|user| CString::new(user.name).ok());
    let others = name.map(|name| getgrouplist(&name, gid)).transpose()?.unwrap_or_default();
    let mut groups: Vec<Gid> = [Some(gid), control].into_iter().flatten().chain(others).collect();
    groups.sort_unstable_by_key(|group| group.as_raw());
    groups.dedup();
    setgroups(&groups)?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    Ok(())
}

/// What takes root, and what must be the user's: of the pins, if there is a directory for them. Where there is none, the server says
/// what it lacks.
fn prepare(paths: Paths<'_>, choice: Choice, pins: Option<&Path>, account: Account) -> anyhow::Result<()> {
    // The lock of a network namespace may be a file there, wherever the sockets are.
    for directory in [Some(usual_parent()), paths.socket.parent()].into_iter().flatten() {
        give_directory(directory, |it| fs::create_dir_all(it), directory == usual_parent(), account)?;
    }
    give_directory(paths.state_dir, make_private, paths.state_dir == Path::new(DEFAULT_STATE_DIR), account)?;
    if !matches!(choice, Choice::SkLookup | Choice::Tc) {
        // Without the lock the older kind of iptables does not work; it will say so.
        give_lock(account).ok();
    }
    if let Some(pins) = pins {
        give_tree(pins, account)?;
        open_way(pins, account)?;
    }
    Ok(())
}

fn usual_parent() -> &'static Path {
    Path::new(DEFAULT_SOCKET).parent().unwrap_or(Path::new("/"))
}

/// Makes a directory, and gives it to the user if it was not there or is the usual one. Any other one keeps its owner.
fn give_directory(
    path: &Path,
    make: impl FnOnce(&Path) -> io::Result<()>,
    is_usual: bool,
    account: Account,
) -> anyhow::Result<()> {
    let attempt = || format!("make the directory {}", path.display());
    if path.is_dir() && !is_usual {
        return Ok(());
    }
    make(path).with_context(attempt)?;
    give_tree(path, account)
}

/// A directory that is root's, and the files in it. In one that is the user's already, names may lead anywhere.
fn give_tree(path: &Path, Account { uid, gid }: Account) -> anyhow::Result<()> {
    let give = || {
        if fs::metadata(path)?.uid() != 0 {
            return Ok(());
        }
        for entry in fs::read_dir(path)? {
            lchown(entry?.path(), Some(uid.as_raw()), Some(gid.as_raw()))?;
        }
        chown(path, Some(uid.as_raw()), Some(gid.as_raw()))
    };
    give().with_context(|| format!("give {} to the user {uid}", path.display()))
}

/// Users that may read the lock may take it (flock(2)).
fn give_lock(Account { gid, .. }: Account) -> io::Result<()> {
    let path = std::env::var_os(XTABLES_LOCK.0).unwrap_or_else(|| XTABLES_LOCK.1.into());
    let mut options = OpenOptions::new();
    let lock: File =
        options.read(true).write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(path)?;
    fchown(&lock, None, Some(gid.as_raw()))?;
    lock.set_permissions(fs::Permissions::from_mode(0o640))
}

/// Where the user can't get to the pins, since systemd has mounted `/sys/fs/bpf` for root alone, gives this process a view of its
/// own: the mount point with nothing in it but the path to that directory.
fn open_way(path: &Path, account: Account) -> anyhow::Result<()> {
    let is_open =
        |directory: &Path| fs::metadata(directory).map(|it| it.mode() & 0o001 != 0 || it.uid() == account.uid.as_raw());
    for closed in path.ancestors().skip(1).filter(|it| matches!(is_open(it), Ok(false))) {
        let attempt =
            || format!("open a way through {}, which is closed to the user, to {}", closed.display(), path.display());
        let way = || {
            let none = None::<&Path>;
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
            // What is mounted can only come from the same view.
            let pins = File::open(path)?;
            mount(
                Some("anyport"),
                closed,
                Some("tmpfs"),
                MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
                Some("mode=755,size=4k"),
            )?;
            fs::create_dir_all(path)?;
            let source = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&pins));
            mount(Some(source.as_str()), path, none, MsFlags::MS_BIND, none)?;
            Ok::<_, io::Error>(())
        };
        if closed.starts_with("/sys/fs/bpf") {
            way().with_context(attempt)?;
        } else {
            return Err(io::Error::from(ErrorKind::PermissionDenied)).with_context(attempt);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::User;

    #[test]
    fn users_are_names_or_numbers() {
        for text in ["anyport", "_anyport-2", "0:0", "64998:64999"] {
            assert_eq!(text.parse::<User>().unwrap().to_string(), text);
        }
        for text in ["", "1000", "1:", ":1", "a b", "-x", "a\n", "1:-2", "x:y"] {
            assert!(text.parse::<User>().is_err(), "{text:?}");
        }
    }
}
