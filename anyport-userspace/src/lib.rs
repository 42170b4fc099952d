//! anyport: one Linux socket that answers for every address and every port of whole prefixes.
//!
//! This crate is the daemon, its client, and what a program needs that wants to *be* a service: a [`Listener`] or a
//! [`UdpSocket`] that receives what is steered to a service of the handler `registered`, and names the original
//! destination. Such a program needs no privilege; the service's `owners` have to name its user or group. It takes
//! the crate without the daemon, which leaves few dependencies:
//!
//! ```toml
//! [dependencies]
//! anyport = { package = "anyport-userspace", path = "…", default-features = false }
//! ```
//!
//! The feature `tokio` adds [`tokio::Listener`] and [`tokio::UdpSocket`]. `examples/service.rs` is a whole program.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "threads of tests may have all capabilities"))]

#[cfg(feature = "daemon")]
pub mod announce;
#[cfg(feature = "daemon")]
pub mod back_end;
#[cfg(feature = "daemon")]
pub mod cli;
#[cfg(feature = "daemon")]
pub mod closing;
#[cfg(feature = "daemon")]
mod complaint;
#[cfg(feature = "daemon")]
pub mod config;
#[cfg(feature = "daemon")]
pub mod control;
#[cfg(feature = "daemon")]
pub mod daemon;
#[cfg(feature = "daemon")]
pub mod doctor;
#[cfg(feature = "daemon")]
pub mod engine;
#[cfg(feature = "daemon")]
pub mod events;
#[cfg(feature = "daemon")]
pub mod fleet;
#[cfg(feature = "daemon")]
mod hops;
#[cfg(feature = "daemon")]
pub mod host;
#[cfg(feature = "daemon")]
pub mod human_duration;
#[cfg(feature = "daemon")]
pub mod journal;
#[cfg(feature = "daemon")]
pub mod keeper;
#[cfg(feature = "daemon")]
pub mod lock;
#[cfg(feature = "daemon")]
mod log_limit;
#[cfg(feature = "daemon")]
pub mod logging;
#[cfg(feature = "daemon")]
pub mod observe;
#[cfg(feature = "daemon")]
pub mod paths;
#[cfg(feature = "daemon")]
mod plain_words;
#[cfg(feature = "daemon")]
pub mod privileges;
#[cfg(feature = "daemon")]
pub mod routes;
#[cfg(feature = "daemon")]
pub mod rule_file;
#[cfg(feature = "daemon")]
pub mod service;
#[cfg(feature = "daemon")]
pub mod socket_file;
#[cfg(feature = "daemon")]
pub mod steering;
#[cfg(feature = "daemon")]
pub mod store;
#[cfg(feature = "daemon")]
pub mod sys;
#[cfg(feature = "daemon")]
pub mod table;
#[cfg(feature = "daemon")]
mod text;
#[cfg(feature = "daemon")]
pub mod usage;
#[cfg(feature = "daemon")]
mod write_timeout;

pub mod api;
mod as_text;
mod datagram;
mod owner;
mod problem;
pub mod register;
pub mod rules;
mod scm_rights;

#[cfg(feature = "tokio")]
pub use self::owner::tokio;
pub use self::{
    datagram::Ends,
    owner::{Accepted, Datagram, Listener, Registration, UdpSocket},
};
