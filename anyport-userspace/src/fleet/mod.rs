//! Rule sets for many machines, from etcd.

pub mod layout;
pub mod pack;
pub mod signing;
