//! Rule sets for many machines, from etcd.

#[cfg(feature = "fleet")]
pub mod agent;
mod board;
#[cfg(feature = "fleet")]
pub mod delta;
#[cfg(feature = "fleet")]
pub mod difference;
#[cfg(feature = "fleet")]
pub mod etcd;
#[cfg(feature = "fleet")]
pub mod layout;
#[cfg(feature = "fleet")]
pub mod pack;
#[cfg(feature = "fleet")]
pub mod report;
#[cfg(feature = "fleet")]
pub mod reporter;
#[cfg(feature = "fleet")]
pub mod settings;
#[cfg(feature = "fleet")]
pub mod signing;
#[cfg(feature = "fleet")]
pub mod source;
#[cfg(feature = "fleet")]
pub mod watch;

pub use self::board::{Condition, FleetBoard, LineEdits};
