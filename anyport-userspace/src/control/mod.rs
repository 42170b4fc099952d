//! The daemon's side of its sockets: the control API, the handover to another version, and the socket for registering.

mod clients;
mod events;
mod handover;
pub mod registrar;
mod server;
mod turns;

pub use self::{
    handover::{Handover, take_over},
    server::{adopt, bind, serve},
};
