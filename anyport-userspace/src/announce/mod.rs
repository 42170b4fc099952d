//! Which prefixes the site's router announces to other routers: those that are served, for as long as they are.
//!
//! The engine judges once a second, and whenever something happens, which prefixes are served and why others are not ([`Judgement`]). The
//! announcer, a task of its own, holds prefixes down that come back, writes those that are to be announced into a file, and has the router
//! read it. It may wait for the router; nobody waits for it but a drain and the daemon's end. BGP is the router's business.

mod announcer;
mod bird;
mod file;
mod holds;

pub use self::{
    announcer::{Announcer, has_ended_well, withdraw_all},
    holds::{Judged, Judgement, Serving},
};
pub use crate::config::{Announce, Format, Needs};
