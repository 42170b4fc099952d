//! A map of sockets that user space can read.

use core::ptr::{self, NonNull};

use aya_ebpf::{
    bindings::{bpf_map_type::BPF_MAP_TYPE_SOCKMAP, bpf_sock},
    helpers::bpf_map_lookup_elem,
};

/// A socket map with 64-bit values, in which user space finds the cookies of the sockets (Linux 5.7, `sock_map_lookup_sys` in
/// net/core/sock_map.c). The library's own has 32-bit values, which tell nothing.
#[repr(C)]
pub struct SocketMap<const ENTRIES: usize> {
    r#type: *const [i32; BPF_MAP_TYPE_SOCKMAP as usize],
    key: *const u32,
    value: *const u64,
    max_entries: *const [i32; ENTRIES],
    map_flags: *const [i32; 0],
}

// SAFETY: the fields only say what the loader is to make; nobody follows them.
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
