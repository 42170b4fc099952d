//! Pipes through which large transfers go from socket to socket without a copy to user space.

use std::{
    cell::RefCell,
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    unistd::pipe2,
};

use crate::service::descriptors::{DescriptorPool, Descriptors};

/// Bytes that a pipe holds: with less, wake-ups per byte grow; with more, so does what a slow reader ties up.
const CAPACITY: usize = 256 << 10;
/// Empty pipes that a worker keeps for the next transfer.
const KEPT: usize = 16;

thread_local! {
    static KEPT_PIPES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe, and how many bytes are in it.
#[derive(Debug)]
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    length: usize,
    _descriptors: Descriptors,
}

impl Pipe {
    /// An empty pipe: one that this worker has kept, or a new one. None if there is none to be had; transfers go on
    /// without.
    pub(super) fn take(pool: &DescriptorPool) -> Option<Box<Self>> {
        KEPT_PIPES.with_borrow_mut(Vec::pop).or_else(|| Self::open(pool)).map(Box::new)
    }

    fn open(pool: &DescriptorPool) -> Option<Self> {
        let descriptors = pool.try_take(2)?;
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).ok()?;
        // Refused beyond fs.pipe-user-pages-soft; then it stays at 64 KiB.
        let size = i32::try_from(CAPACITY).unwrap_or(i32::MAX);
        fcntl(&write, FcntlArg::F_SETPIPE_SZ(size)).ok();
        Some(Self { read, write, length: 0, _descriptors: descriptors })
    }

    /// Keeps the pipe, which is empty, for the next transfer, unless there are enough.
    pub(super) fn give_back(self: Box<Self>) {
        KEPT_PIPES.with_borrow_mut(|kept| {
            if self.is_empty() && kept.len() < KEPT {
                kept.push(*self);
            }
        });
    }

    /// Bytes that are in it.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Moves what `from` has into the pipe, which must be empty: only then does `WouldBlock` mean that `from` has
    /// nothing. 0 at the end of the stream.
    pub(super) fn fill(&mut self, from: &impl AsFd) -> io::Result<usize> {
        let moved = splice(from, None, &self.write, None, CAPACITY, flags())?;
        self.length += moved;
        Ok(moved)
    }

    /// Moves what `to` takes out of the pipe, which must not be empty.
    pub(super) fn drain(&mut self, to: &impl AsFd) -> io::Result<usize> {
        let moved = splice(&self.read, None, to, None, self.length, flags())?;
        self.length -= moved;
        Ok(moved)
    }
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK
}
