//! Sockets that other processes hand over: what is asked for, how a descriptor gets here and what it must be.
//!
//! We keep no descriptor of them. The kernel's map holds a socket without keeping it open, so when its owner ends or
//! closes it the map forgets it at once, and new connections are refused rather than left in a queue that nobody serves.

mod client;
#[cfg(feature = "daemon")]
mod process;
#[cfg(feature = "daemon")]
mod registered;
mod request;
#[cfg(feature = "daemon")]
mod socket;

#[cfg(feature = "daemon")]
use std::path::{Path, PathBuf};

#[cfg(feature = "daemon")]
pub use self::{
    process::{Process, Watch, holders},
    registered::{KeptSocket, Registered},
    socket::{Candidate, Chosen, choose},
};
pub use client::{open, send};
pub use request::{Answer, Listen, Register, Request, Unregister};

/// The socket for registering that belongs to a control socket.
#[cfg(feature = "daemon")]
pub fn socket_beside(control: &Path) -> PathBuf {
    control.with_extension("register.sock")
}
