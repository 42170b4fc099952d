//! What of `bpf(2)` aya has no function for. The attributes are those of `union bpf_attr` in `linux/bpf.h`.

use std::{
    ffi::{CString, c_long, c_void},
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use bytemuck::{Pod, Zeroable};

const MAP_CREATE: c_long = 0;
const MAP_LOOKUP_ELEM: c_long = 1;
const MAP_UPDATE_ELEM: c_long = 2;
const MAP_DELETE_ELEM: c_long = 3;
const OBJ_PIN: c_long = 6;
const OBJ_GET: c_long = 7;
const PROG_LOAD: c_long = 5;
const PROG_TEST_RUN: c_long = 10;
const OBJ_GET_INFO_BY_FD: c_long = 15;
const PROG_QUERY: c_long = 16;
const MAP_UPDATE_BATCH: c_long = 26;

const MAP_TYPE_ARRAY: u32 = 2;
const ATTACH_SK_LOOKUP: u32 = 36;
/// `MAX_BPF_ATTACH` of `kernel/bpf/net_namespace.c`: a network namespace takes no more programs.
pub const MAX_SK_LOOKUP: usize = 64;
const F_MMAPABLE: u32 = 1 << 10;

/// The types of a map's keys and values, by which `bpftool` shows them with the names of their fields.
#[derive(Debug)]
pub struct Types {
    btf: OwnedFd,
    key: u32,
    value: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
    ifindex: u32,
    btf_fd: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct MapElement {
    map_fd: u32,
    reserved: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct Batch {
    begin: u64,
    end: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct GetInfo {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct Query {
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    prog_count: u32,
    reserved: u32,
}

/// `struct bpf_map_info` up to the types.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct MapInfo {
    map_type: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    name: [u8; 16],
    ifindex: u32,
    btf_vmlinux_value_type_id: u32,
    netns_dev: u64,
    netns_ino: u64,
    btf_id: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
    reserved: u32,
}

/// `struct bpf_link_info` up to what the link is attached to: for network namespaces their inode, for tcx the interface's index.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct LinkInfo {
    link_type: u32,
    id: u32,
    prog_id: u32,
    padding: u32,
    target: u32,
    attach_type: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

/// `struct bpf_btf_info`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct BtfInfo {
    btf: u64,
    btf_size: u32,
    id: u32,
    name: u64,
    name_len: u32,
    kernel_btf: u32,
}

/// `struct bpf_sk_lookup`: what an `sk_lookup` program is asked.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct SkLookup {
    /// Afterwards the cookie of the socket that was selected, 0 if none was.
    pub cookie: u64,
    /// `AF_INET` or `AF_INET6`.
    pub family: u32,
    /// IP protocol number.
    pub protocol: u32,
    /// The client's IPv4 address in network byte order.
    pub remote_ip4: u32,
    /// The client's IPv6 address in network byte order.
    pub remote_ip6: [u32; 4],
    /// The client's port in network byte order.
    pub remote_port: u16,
    /// Nothing.
    pub reserved: u16,
    /// The IPv4 address of the original destination in network byte order.
    pub local_ip4: u32,
    /// The IPv6 address of the original destination in network byte order.
    pub local_ip6: [u32; 4],
    /// The port of the original destination in host byte order.
    pub local_port: u32,
    /// The interface, which the kernel sets by itself: 0 here.
    pub ingress_ifindex: u32,
    /// Nothing.
    pub end: u32,
}

/// What came of a test run.
#[derive(Clone, Copy, Debug)]
pub struct Ran {
    /// What the program returned.
    pub returned: u32,
    /// Nanoseconds of one run, the mean of all.
    pub nanoseconds: u32,
}

/// Makes an array map that can be mapped into memory. From Linux 5.15 to 6.1 (commits 68134668c17f and db559117828d) a map of maps
/// takes one with types only if what it was created with has types, too, and one without only if that has none.
///
/// # Errors
/// The kernel's, such as `ENOMEM`.
pub fn create_array(name: &str, value_size: usize, entries: u32, types: &Types) -> io::Result<OwnedFd> {
    let Types { btf, key, value } = types;
    let mut attr = MapCreate {
        map_type: MAP_TYPE_ARRAY,
        key_size: 4,
        value_size: size(value_size)?,
        max_entries: entries,
        map_flags: F_MMAPABLE,
        btf_fd: number(btf.as_raw_fd())?,
        btf_key_type_id: *key,
        btf_value_type_id: *value,
        ..MapCreate::default()
    };
    // The last byte stays 0.
    for (to, from) in attr.name[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let fd = invoke(MAP_CREATE, &mut attr)?;
    owned(fd)
}

/// The types of a map. They must have come from this process, which holds them still.
///
/// # Errors
/// The kernel's; `NotFound` for a map without types.
pub fn types_of(map: impl AsFd) -> io::Result<Types> {
    let mut info = MapInfo::default();
    let mut attr = GetInfo {
        fd: number(map.as_fd().as_raw_fd())?,
        len: size(size_of::<MapInfo>())?,
        info: address(ptr::from_mut(&mut info).cast()),
    };
    invoke(OBJ_GET_INFO_BY_FD, &mut attr)?;
    let btf = own_btf(info.btf_id)?;
    Ok(Types { btf, key: info.btf_key_type_id, value: info.btf_value_type_id })
}

/// A second descriptor of types that this process has given to the kernel. To ask the kernel by their number takes
/// `CAP_SYS_ADMIN` (`btf_get_fd_by_id` in kernel/bpf/syscall.c, Linux 6.18).
fn own_btf(id: u32) -> io::Result<OwnedFd> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let is_btf = fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == "anon_inode:btf");
        let number_of = || entry.file_name().to_str()?.parse().ok();
        let Some(Ok(descriptor)) = is_btf.then(number_of).flatten().map(duplicate) else { continue };
        let mut info = BtfInfo::default();
        let mut attr = GetInfo {
            fd: number(descriptor.as_raw_fd())?,
            len: size(size_of::<BtfInfo>())?,
            info: address(ptr::from_mut(&mut info).cast()),
        };
        // Another thread may have closed it and opened something else there, which has no such information.
        if invoke(OBJ_GET_INFO_BY_FD, &mut attr).is_ok() && info.id == id {
            return Ok(descriptor);
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// A second descriptor of what is open at this number at this moment, whichever code of this process opened it. Only for
/// BTF, which never changes, so that a second descriptor makes no difference to the owner of the first.
fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes plain numbers and opens a descriptor, or fails where none is open.
    let duplicate = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 0) };
    if duplicate < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate) })
}

/// Puts maps into a map of maps. For each call the kernel waits until all programs that run have ended, some 10 ms; so
/// many maps at once are better than one after the other.
///
/// # Errors
/// The kernel's, such as `EINVAL` for a map that is not of the type and size that are expected there.
pub fn set_inner<F: AsFd>(outer: impl AsFd, inner: &[(u32, F)]) -> io::Result<()> {
    if inner.is_empty() {
        return Ok(());
    }
    let map_fd = number(outer.as_fd().as_raw_fd())?;
    let keys: Vec<u32> = inner.iter().map(|(key, _)| *key).collect();
    let values = inner.iter().map(|(_, map)| number(map.as_fd().as_raw_fd())).collect::<io::Result<Vec<u32>>>()?;
    let mut attr = Batch {
        keys: address(keys.as_ptr().cast()),
        values: address(values.as_ptr().cast()),
        count: size(inner.len())?,
        map_fd,
        ..Batch::default()
    };
    if invoke(MAP_UPDATE_BATCH, &mut attr).is_ok() {
        return Ok(());
    }
    // Kernels before 5.13 have no batches for this.
    for (key, value) in keys.iter().zip(&values) {
        let mut attr = MapElement {
            map_fd,
            key: address(ptr::from_ref(key).cast()),
            value: address(ptr::from_ref(value).cast()),
            ..MapElement::default()
        };
        invoke(MAP_UPDATE_ELEM, &mut attr)?;
    }
    Ok(())
}

/// Puts a socket into a place of a socket map with 64-bit values (Linux 5.7), whatever is there.
///
/// # Errors
/// The kernel's.
pub fn put_socket(map: impl AsFd, key: u32, socket: impl AsFd) -> io::Result<()> {
    let value = u64::from(number(socket.as_fd().as_raw_fd())?);
    let mut attr = MapElement {
        map_fd: number(map.as_fd().as_raw_fd())?,
        key: address(ptr::from_ref(&key).cast()),
        value: address(ptr::from_ref(&value).cast()),
        ..MapElement::default()
    };
    invoke(MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Takes a socket out of a socket map, if there is one in its place.
///
/// # Errors
/// The kernel's.
pub fn remove_socket(map: impl AsFd, key: u32) -> io::Result<()> {
    let mut attr = MapElement {
        map_fd: number(map.as_fd().as_raw_fd())?,
        key: address(ptr::from_ref(&key).cast()),
        ..MapElement::default()
    };
    match invoke(MAP_DELETE_ELEM, &mut attr) {
        // `__sock_map_delete` (net/core/sock_map.c) says so where there is none.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        removed => removed.map(drop),
    }
}

/// Reads the cookie of a socket in a socket map with 64-bit values (Linux 5.7); nothing where there is no socket, or
/// where the values have no room for a cookie.
///
/// # Errors
/// The kernel's.
pub fn socket_cookie(map: impl AsFd, key: u32) -> io::Result<Option<u64>> {
    let mut cookie = 0_u64;
    let mut attr = MapElement {
        map_fd: number(map.as_fd().as_raw_fd())?,
        key: address(ptr::from_ref(&key).cast()),
        value: address(ptr::from_mut(&mut cookie).cast()),
        ..MapElement::default()
    };
    match invoke(MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(Some(cookie)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOSPC)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a link to a network namespace or an interface (tcx) still is attached to it. Both fill in 0 once it is not
/// (`bpf_netns_link_fill_info`, `tcx_link_fill_info`).
///
/// # Errors
/// The kernel's.
pub fn is_link_attached(link: impl AsFd) -> io::Result<bool> {
    let mut info = LinkInfo::default();
    let mut attr = GetInfo {
        fd: number(link.as_fd().as_raw_fd())?,
        len: size(size_of::<LinkInfo>())?,
        info: address(ptr::from_mut(&mut info).cast()),
    };
    invoke(OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info.target != 0)
}

/// Pins a map or a link.
///
/// # Errors
/// The kernel's, such as `EEXIST`.
pub fn pin(object: impl AsFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let bpf_fd = number(object.as_fd().as_raw_fd())?;
    let mut attr = Object { pathname: address(path.as_ptr().cast()), bpf_fd, ..Object::default() };
    invoke(OBJ_PIN, &mut attr).map(drop)
}

/// A descriptor of what is pinned at a path.
///
/// # Errors
/// The kernel's, such as `ENOENT`.
pub fn pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Object { pathname: address(path.as_ptr().cast()), ..Object::default() };
    owned(invoke(OBJ_GET, &mut attr)?)
}

/// Has another socket map hold a socket, too, without a descriptor of it (Linux 5.10). Says whether it was still there.
///
/// Only programs get at the sockets in such a map, so one is made for this, and run once.
///
/// # Errors
/// The kernel's.
pub fn copy_socket(from: BorrowedFd<'_>, from_key: u32, to: BorrowedFd<'_>, to_key: u32) -> io::Result<bool> {
    const PROG_TYPE_SCHED_CLS: u32 = 3;
    const MAP_FD: u8 = 1;
    // The registers of include/uapi/linux/bpf.h, the helpers of `bpf-helpers(7)` by their numbers there.
    let [r0, r1, r2, r3, r4, r6, r7, stack] = [0, 1, 2, 3, 4, 6, 7, 10_u8];
    let instruction = |code: u8, to: u8, from: u8, offset: i16, value: i32| {
        u64::from(code)
            | u64::from(to | from << 4) << 8
            | u64::from(offset.cast_unsigned()) << 16
            | u64::from(value.cast_unsigned()) << 32
    };
    let set = |to, value| instruction(0xb7, to, 0, 0, value);
    let copy = |to, from| instruction(0xbf, to, from, 0, 0);
    let call = |helper| instruction(0x85, 0, 0, 0, helper);
    let map = |fd: BorrowedFd<'_>| [instruction(0x18, r1, MAP_FD, 0, fd.as_raw_fd()), 0];
    let key = |key: u32| {
        [
            set(r1, key.cast_signed()),
            instruction(0x63, stack, r1, -4, 0),
            copy(r2, stack),
            instruction(0x07, r2, 0, 0, -4),
        ]
    };
    let exit = instruction(0x95, 0, 0, 0, 0);
    let absent = -libc::ENOENT;
    let program: Vec<u64> = [
        &key(from_key)[..],
        &map(from),
        // bpf_map_lookup_elem; past the rest of the way where there is none.
        &[call(1), instruction(0x15, r0, 0, 15, 0), copy(r6, r0)],
        &key(to_key),
        &map(to),
        // bpf_map_update_elem, bpf_sk_release
        &[copy(r3, r6), set(r4, 0), call(2), copy(r7, r0), copy(r1, r6), call(86), copy(r0, r7), exit],
        &[set(r0, absent), exit],
    ]
    .concat();
    let mut load = ProgLoad {
        prog_type: PROG_TYPE_SCHED_CLS,
        insn_cnt: size(program.len())?,
        insns: address(program.as_ptr().cast()),
        license: address(c"Dual MIT/GPL".as_ptr().cast()),
        ..ProgLoad::default()
    };
    let loaded = owned(invoke(PROG_LOAD, &mut load)?)?;
    // A packet as short as Ethernet allows.
    match run_classifier(&loaded, &mut [0; 64])?.cast_signed() {
        0 => Ok(true),
        error if error == absent => Ok(false),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Runs a classifier of tc (Linux 4.12) once on a packet, in which it may write. Returns what the program returned.
///
/// # Errors
/// The kernel's, such as `EINVAL` for a packet that is shorter than an Ethernet header.
pub fn run_classifier(program: impl AsFd, packet: &mut [u8]) -> io::Result<u32> {
    let asked = packet.to_vec();
    let mut attr = TestRun {
        prog_fd: number(program.as_fd().as_raw_fd())?,
        data_size_in: size(asked.len())?,
        data_size_out: size(packet.len())?,
        data_in: address(asked.as_ptr().cast()),
        data_out: address(packet.as_mut_ptr().cast_const().cast()),
        ..TestRun::default()
    };
    invoke(PROG_TEST_RUN, &mut attr)?;
    Ok(attr.retval)
}

/// Runs an `sk_lookup` program (Linux 5.13) `repeat` times on what `context` says, and leaves there what it selected.
///
/// # Errors
/// The kernel's.
pub fn run_sk_lookup(program: impl AsFd, context: &mut SkLookup, repeat: u32) -> io::Result<Ran> {
    let asked = *context;
    let mut attr = TestRun {
        prog_fd: number(program.as_fd().as_raw_fd())?,
        repeat,
        ctx_size_in: size(size_of::<SkLookup>())?,
        ctx_size_out: size(size_of::<SkLookup>())?,
        ctx_in: address(ptr::from_ref(&asked).cast()),
        ctx_out: address(ptr::from_mut(context).cast()),
        ..TestRun::default()
    };
    invoke(PROG_TEST_RUN, &mut attr)?;
    Ok(Ran { returned: attr.retval, nanoseconds: attr.duration })
}

/// The ids of the `sk_lookup` programs of a network namespace, in the order in which they run.
///
/// # Errors
/// The kernel's, such as `EPERM` without `CAP_NET_ADMIN`, and `EINVAL` before Linux 5.9.
pub fn sk_lookup_programs(namespace: impl AsFd) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; MAX_SK_LOOKUP];
    let mut attr = Query {
        target_fd: number(namespace.as_fd().as_raw_fd())?,
        attach_type: ATTACH_SK_LOOKUP,
        prog_ids: address(ids.as_mut_ptr().cast_const().cast()),
        prog_count: size(ids.len())?,
        ..Query::default()
    };
    invoke(PROG_QUERY, &mut attr)?;
    Ok(ids.iter().copied().take(attr.prog_count as usize).collect())
}

/// Makes the call. What `attr` points to must be as long as it says and live until this returns.
fn invoke<T: Pod>(command: c_long, attr: &mut T) -> io::Result<c_long> {
    // SAFETY: the kernel reads and writes `attr`, whose size it is told, and what the addresses in it point to, which
    // the callers in this module have from references that they hold.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(pointer: *const c_void) -> u64 {
    pointer as u64
}

fn number(fd: RawFd) -> io::Result<u32> {
    u32::try_from(fd).map_err(io::Error::other)
}

fn size(bytes: usize) -> io::Result<u32> {
    u32::try_from(bytes).map_err(io::Error::other)
}
