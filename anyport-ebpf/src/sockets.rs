//! A map of sockets that user space can read, and the assignment of a socket to a packet.

use core::ptr::{self, NonNull};

use aya_ebpf::{
    EbpfContext,
    bindings::{bpf_map_type::BPF_MAP_TYPE_SOCKMAP, bpf_sock},
    helpers::{bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release},
};

/// A socket map with 64-bit values, in which user space finds the cookies of the sockets (Linux 5.7, `sock_map_lookup_sys` in
/// net/core/sock_map.c). The library's own has 32-bit values, which say nothing.
#[repr(C)]
pub struct SocketMap<const ENTRIES: usize> {
    r#type: *const [i32; BPF_MAP_TYPE_SOCKMAP as usize],
    key: *const u32,
    value: *const u64,
    max_entries: *const [i32; ENTRIES],
    map_flags: *const [i32; 0],
}

// SAFETY: the fields only say what the loader is to make; no program follows them.
unsafe impl<const ENTRIES: usize> Sync for SocketMap<ENTRIES> {}

impl<const ENTRIES: usize> SocketMap<ENTRIES> {
    /// What the loader replaces by the map.
    pub const fn new() -> Self {
        Self {
            r#type: ptr::null(),
            key: ptr::null(),
            value: ptr::null(),
            max_entries: ptr::null(),
            map_flags: ptr::null(),
        }
    }

    /// The socket at a place, with a reference that the caller must give back.
    #[inline(always)]
    pub fn get(&self, index: u32) -> Option<NonNull<bpf_sock>> {
        // SAFETY: the map's address is what the loader replaces by the map; the key outlives the call.
        let socket =
            unsafe { bpf_map_lookup_elem(ptr::from_ref(self).cast_mut().cast(), ptr::from_ref(&index).cast()) };
        NonNull::new(socket.cast())
    }
}

/// Assigns the socket to the packet and gives its reference back; returns 0 or a negative error number.
#[inline(always)]
pub fn assign(ctx: &impl EbpfContext, socket: NonNull<bpf_sock>, flags: u64) -> i64 {
    // SAFETY: the socket is referenced until it is released here; both pointers are the kernel's own.
    unsafe {
        let error = bpf_sk_assign(ctx.as_ptr(), socket.as_ptr().cast(), flags);
        bpf_sk_release(socket.as_ptr().cast());
        error
    }
}
