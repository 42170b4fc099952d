//! Events: what is told of connections and flows to those who listen.

mod board;
mod teller;

pub use self::{
    board::{Board, Ears, Listener, NoRoom},
    teller::Teller,
};
