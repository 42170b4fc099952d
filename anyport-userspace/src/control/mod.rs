//! The daemon's side of its sockets: the control API, the handover to another version, and the socket for registering.

mod audit;
mod budget;
mod clients;
mod event_stream;
mod handover;
mod openapi;
mod outcomes;
mod read_limiter;
pub mod registrar;
mod requests;
mod server;
mod stream;

pub use self::{
    handover::{Handover, take_over},
    server::{ControlSocket, serve},
};
