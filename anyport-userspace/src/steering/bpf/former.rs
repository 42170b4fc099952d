use std::os::fd::{AsFd as _, OwnedFd};

use anyport_common::maps::{MAX_SERVICES, SOCKETS_PER_SERVICE};
use aya::maps::MapData;

use super::pins::PinDirectory;
use crate::sys;

/// The map of sockets of an earlier daemon. The kernel holds there what was registered, of which nobody but its owner has a descriptor.
#[derive(Debug)]
pub(super) struct FormerSockets {
    pub(super) map: OwnedFd,
}

impl FormerSockets {
    /// None if there is none, or none that is understood: then sockets are registered again.
    pub(super) fn open(pins: &PinDirectory) -> Option<Self> {
        let map = MapData::from_pin(pins.map("sockets")).ok()?;
        Some(Self { map: map.fd().as_fd().try_clone_to_owned().ok()? })
    }

    /// Where a socket is.
    pub(super) fn place_of(&self, cookie: u64) -> Option<u32> {
        let places = 0..MAX_SERVICES * SOCKETS_PER_SERVICE;
        places
            .into_iter()
            .find(|place| matches!(sys::bpf::socket_cookie(&self.map, *place), Ok(Some(it)) if it == cookie))
    }
}
