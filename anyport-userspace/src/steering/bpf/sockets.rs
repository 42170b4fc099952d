//! The map of sockets that the programs steer to.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use anyhow::Context as _;
use anyport_common::maps::{MAX_SERVICES, SOCKETS_PER_SERVICE};
use aya::maps::{Map, MapData};

use super::{fd_of, pins::PinDirectory};
use crate::sys;

/// A socket map whose values are wide enough for cookies. The kernel holds there what was registered, too, of which only
/// its owner has a descriptor.
#[derive(Debug)]
pub(super) struct Sockets(OwnedFd);

impl Sockets {
    pub(super) fn new(map: &Map) -> anyhow::Result<Self> {
        fd_of(map).map(Self)
    }

    /// That of an earlier daemon. None if there is none, or none that is understood: then sockets are registered again.
    pub(super) fn previous(pins: &PinDirectory) -> Option<Self> {
        let map = MapData::from_pin(pins.map("sockets")).ok()?;
        map.fd().as_fd().try_clone_to_owned().ok().map(Self)
    }

    /// Puts a socket into a place, whatever is there.
    pub(super) fn put(&self, place: u32, socket: impl AsFd) -> anyhow::Result<()> {
        sys::bpf::put_socket(&self.0, place, socket).context("put a socket into the BPF map")
    }

    /// Puts a socket into its place where there is none or another one. Returns whether it did.
    pub(super) fn put_back(&self, place: u32, cookie: u64, socket: impl AsFd) -> anyhow::Result<bool> {
        let is_there = self.cookie(place)? == Some(cookie);
        if !is_there {
            self.put(place, socket)?;
        }
        Ok(!is_there)
    }

    /// Whose socket is there.
    pub(super) fn cookie(&self, place: u32) -> anyhow::Result<Option<u64>> {
        sys::bpf::socket_cookie(&self.0, place).context("look a socket up in the BPF map")
    }

    /// Where a socket is.
    pub(super) fn place_of(&self, cookie: u64) -> Option<u32> {
        let mut places = 0..MAX_SERVICES * SOCKETS_PER_SERVICE;
        places.find(|place| matches!(self.cookie(*place), Ok(Some(it)) if it == cookie))
    }

    /// Has another place hold a socket, too. Says whether it was still there.
    pub(super) fn copy(&self, place: u32, to: &Self, at: u32) -> io::Result<bool> {
        sys::bpf::copy_socket(self.0.as_fd(), place, to.0.as_fd(), at)
    }

    /// Takes a socket out, if it is still there.
    pub(super) fn clear(&self, place: u32) -> anyhow::Result<()> {
        sys::bpf::remove_socket(&self.0, place).context("take a socket out of the BPF map")
    }
}
