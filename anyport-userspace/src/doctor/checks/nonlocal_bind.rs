//! Sockets at addresses that the host does not have.

use crate::doctor::{Finding, Host};

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    if host.number("net/ipv6/ip_nonlocal_bind")?.unwrap_or_default() == 0 {
        return Ok(Vec::new());
    }
    let why = "anyport does not need it, and it hides mistakes: any process may bind to any address, whether it is here or not.";
    Ok(vec![Finding::note("net.ipv6.ip_nonlocal_bind=1", why).by_hand("sysctl -w net.ipv6.ip_nonlocal_bind=0")])
}
