//! The control API: HTTP and JSON on a Unix socket.

mod client;
mod problem;
mod server;
mod types;

pub use client::Client;
pub use problem::{Kind, Problem};
pub use server::{Shared, bind, serve};
pub use types::{
    AddPrefixes, BackEndView, Changed, PrefixView, RemovePrefixes, ServiceView, StatusView, Totals, parse,
};
