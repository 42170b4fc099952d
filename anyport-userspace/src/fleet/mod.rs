//! Rule sets for many machines, from etcd.

pub mod agent;
pub mod delta;
pub mod difference;
pub mod etcd;
pub mod layout;
pub mod node;
pub mod pack;
pub mod settings;
pub mod signing;
pub mod source;
pub mod watch;
