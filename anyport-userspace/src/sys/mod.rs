//! Every raw system call, and so every `unsafe` of user space.
#![expect(unsafe_code, reason = "the one module in which system calls without a safe wrapper are made")]

pub mod bpf;
pub mod datagrams;

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd as _, OwnedFd, RawFd},
    ptr::NonNull,
    slice,
    sync::{Mutex, PoisonError, atomic::AtomicU64},
    thread,
    time::Duration,
};

use tokio::io::{Interest, unix::AsyncFd};

/// Registers a descriptor with the runtime, for reading.
///
/// # Errors
/// The kernel's error, such as `EPERM` for a descriptor that can't be polled.
pub fn watch_readable<T: AsFd + AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: what implements `AsFd` owns or borrows its descriptor, so that it stays open and the same for as long
    // as `owner` lives, which the `AsyncFd` does not outlive.
    unsafe { AsyncFd::register_with_interest(owner, Interest::READABLE) }.map_err(Into::into)
}

/// Has the C library give back what is free of its memory: by its own choice (mallopt(3)) each thread's heap keeps as much as twice the
/// largest block that was ever freed, such as a file of rules. Must be called before there is another thread.
#[cfg(target_env = "gnu")]
pub fn return_free_memory() {
    /// Larger blocks are mapped by themselves, and unmapped when they are freed.
    const MAPPED: libc::c_int = 1 << 20;
    /// A heap with more free memory than this at its end gives it back.
    const KEPT: libc::c_int = 1 << 20;
    // SAFETY: sets numbers of the allocator, with no other thread that could read them.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Other C libraries give it back by themselves.
#[cfg(not(target_env = "gnu"))]
pub fn return_free_memory() {}

/// Has the kernel refuse descriptors that peers pass over this Unix socket, and over those accepted from it, with `EPERM` at the
/// sender (`SO_PASSRIGHTS`, Linux 6.16). Says whether the kernel can.
///
/// # Errors
/// The kernel's, other than that it has no such option.
pub fn refuse_descriptors(socket: impl AsFd) -> io::Result<bool> {
    /// include/uapi/asm-generic/socket.h; the C library does not have it yet.
    const SO_PASSRIGHTS: libc::c_int = 83;
    /// Of a `c_int`.
    const BYTES: libc::socklen_t = 4;
    let off: libc::c_int = 0;
    // SAFETY: the kernel reads a number of the length that it is told, from where it lies.
    let outcome = unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const off).cast(), BYTES)
    };
    match outcome {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(false),
            error => Err(error),
        },
    }
}

/// The values of a BPF array map that was created with `BPF_F_MMAPABLE` (Linux 5.5), shared with the programs.
#[derive(Debug)]
pub struct MappedWords {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping belongs to this value alone, and its words are only ever accessed atomically.
unsafe impl Send for MappedWords {}
// SAFETY: as above.
unsafe impl Sync for MappedWords {}

impl MappedWords {
    /// Maps the first `words` 8-byte words of the map behind `fd`.
    ///
    /// # Errors
    /// The kernel's error, such as `EPERM` for a map without `BPF_F_MMAPABLE`.
    pub fn new(fd: impl AsFd, words: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                words * size_of::<AtomicU64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_fd().as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, words })
    }

    /// The words. BPF programs may read them at any time.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is that long, page-aligned, and lives as long as `self`.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for MappedWords {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made, and nothing borrows from it any more.
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU64>());
        }
    }
}

/// Lets clients of a listening TCP socket send data with their first packet (`TCP_FASTOPEN`, Linux 3.7); so many of them may
/// wait for the end of their handshake.
///
/// # Errors
/// The kernel's error.
pub fn set_fast_open(socket: impl AsFd, queue: u32) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&queue)).map_err(io::Error::other)?;
    // SAFETY: the kernel reads a number of the length that it is told, from where it lies.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN,
            (&raw const queue).cast(),
            length,
        )
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The groups, beside its primary one, of the process at the other end of a Unix socket, as they were when it
/// connected (`SO_PEERGROUPS`, Linux 4.13).
///
/// # Errors
/// The kernel's error.
pub fn peer_groups(socket: impl AsFd) -> io::Result<Vec<libc::gid_t>> {
    // setgroups(2) takes no more.
    const NGROUPS_MAX: usize = 65_536;
    let mut groups: Vec<libc::gid_t> = vec![0; NGROUPS_MAX];
    let mut length = libc::socklen_t::try_from(size_of_val(groups.as_slice())).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes to the buffer, which is that long, and how many to `length`.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    groups.truncate(length as usize / size_of::<libc::gid_t>());
    Ok(groups)
}

/// What the kernel could not give to a socket (`SO_MEMINFO`, Linux 4.12): to a listening one since its queue of connections was
/// full, to one for datagrams since its buffer was.
///
/// # Errors
/// The kernel's error.
pub fn drops(socket: impl AsFd) -> io::Result<u32> {
    // include/uapi/linux/sock_diag.h: the ninth number.
    const SK_MEMINFO_DROPS: usize = 8;
    let mut numbers = [0_u32; SK_MEMINFO_DROPS + 1];
    let mut length = libc::socklen_t::try_from(size_of_val(&numbers)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes to the buffer, which is that long, and how many to `length`.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            numbers.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if failed == 0 { Ok(numbers[SK_MEMINFO_DROPS]) } else { Err(io::Error::last_os_error()) }
}

/// How long ago a TCP connection last sent data, to the jiffy. One that was accepted and has sent nothing counts from the end of its
/// handshake (`tcp_create_openreq_child` in `net/ipv4/tcp_minisocks.c`, looked at in Linux 6.18): for as long it has waited to be accepted.
///
/// # Errors
/// The kernel's error.
pub fn time_since_sent(socket: impl AsFd) -> io::Result<Duration> {
    Ok(Duration::from_millis(tcp_info(socket)?.tcpi_last_data_sent.into()))
}

/// How many connections wait at a listening socket to be accepted (`tcp_get_info` in `net/ipv4/tcp.c`, looked at in Linux 6.18).
///
/// # Errors
/// The kernel's error.
pub fn waiting(listener: impl AsFd) -> io::Result<u32> {
    Ok(tcp_info(listener)?.tcpi_unacked)
}

/// `TCP_INFO` of tcp(7), Linux 2.6.
fn tcp_info(socket: impl AsFd) -> io::Result<libc::tcp_info> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes to the buffer, which is that long, and how many to `length`.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it consists of numbers, for which all zeros, or what the kernel wrote, are values.
    Ok(unsafe { info.assume_init() })
}

/// Waits until every BPF program that runs now has ended.
///
/// Programs run under RCU's read lock, and `MEMBARRIER_CMD_GLOBAL` (Linux 4.3) is a grace period of RCU, 8 to 16 ms
/// where it was measured. Kernels that run with `nohz_full` refuse it (`kernel/sched/membarrier.c`); there a wait of
/// a second stands in for it, a million times what a program takes.
pub fn wait_for_running_programs() {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: the call takes plain numbers and touches no memory of ours.
    let failed = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if failed != 0 {
        thread::sleep(Duration::from_secs(1));
    }
}

/// The cookie of the network namespace that a socket belongs to (`SO_NETNS_COOKIE`, Linux 5.14), which is no other's
/// before the next boot.
///
/// # Errors
/// The kernel's error, such as `ENOPROTOOPT` where it is too old.
pub fn netns_cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes to the number, which is that long, and how many to `length`.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if failed == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Bytes that were written to a TCP socket and that the peer has not acknowledged; the end of the stream counts as one
/// (`SIOCOUTQ`, tcp(7)).
///
/// # Errors
/// The kernel's error, such as `EINVAL` for a socket that listens.
pub fn unacknowledged(socket: impl AsFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one int to where the pointer leads, which is ours for the whole call.
    let failed = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if failed == 0 { Ok(usize::try_from(bytes).unwrap_or(0)) } else { Err(io::Error::last_os_error()) }
}

/// The network namespace that a socket belongs to, as a descriptor (`SIOCGSKNS`, Linux 4.10).
///
/// # Errors
/// The kernel's error, such as `EPERM` without `CAP_NET_ADMIN` there.
pub fn network_namespace(socket: impl AsFd) -> io::Result<OwnedFd> {
    // include/uapi/linux/sockios.h
    const SIOCGSKNS: libc::Ioctl = 0x894c;
    // SAFETY: the call takes no argument and touches no memory of ours.
    let descriptor = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for this call, so nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Takes a descriptor that this process was started with, such as those of `LISTEN_FDS` (`sd_listen_fds(3)`). Nothing is
/// taken if the number is not open, was taken already, is a standard stream, or was opened by this process.
pub fn take_inherited(number: RawFd) -> Option<OwnedFd> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    // The standard library has the descriptors below for its own.
    if number <= libc::STDERR_FILENO {
        return None;
    }
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the call takes plain numbers and only looks.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    // execve(2) closes what has the flag, and this process opens nothing without it.
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return None;
    }
    // SAFETY: the call takes plain numbers, and sets a flag that no user of the descriptor sees.
    if unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) } != 0 {
        return None;
    }
    // SAFETY: it is open and came by execve(2), so no other code of this process owns it; the flag, set under the lock,
    // keeps a second call from taking it.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Seek as _, Write as _},
        os::fd::{AsRawFd as _, IntoRawFd as _},
    };

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};

    use super::take_inherited;

    #[test]
    fn take_inherited_takes_a_descriptor_once() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"all").unwrap();
        // As a parent leaves it.
        fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let number = file.into_raw_fd();
        let mut taken = File::from(take_inherited(number).unwrap());
        assert_eq!(taken.stream_position().unwrap(), 3);
        assert!(take_inherited(number).is_none());
        let flags = fcntl(&taken, FcntlArg::F_GETFD).unwrap();
        assert_eq!(FdFlag::from_bits_retain(flags), FdFlag::FD_CLOEXEC);
    }

    #[test]
    fn take_inherited_leaves_what_this_process_owns() {
        let own = tempfile::tempfile().unwrap();
        for number in [own.as_raw_fd(), 0, 1, 2, -1, i32::MAX] {
            assert!(take_inherited(number).is_none(), "{number}");
        }
    }
}
