//! Tests of the whole engine over a simulated kernel, and what tests of its parts share.

mod faults;
pub(super) mod fixtures;

pub(super) use self::faults::simulated;
