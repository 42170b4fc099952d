//! The interface `lo`, to which all local routes lead.

use crate::doctor::{Finding, Host};

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    if host.links()?.iter().any(|link| link.name == "lo") {
        return Ok(Vec::new());
    }
    let why =
        "Local routes lead to lo: with lo down they can't be added, and clients on the host itself reach nothing.";
    Ok(vec![Finding::broken("the interface lo is down", why).by_hand("ip link set lo up")])
}
