//! Groups of sockets and kernels to which tc can't assign them.

use crate::{
    doctor::{Finding, Host},
    steering::BackEnd,
};

/// `bpf_sk_assign` takes sockets with `SO_REUSEPORT` from here on (commit 9c02bec95954).
const SINCE: (u32, u32) = (6, 6);

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let Ok(daemon) = &host.daemon else { return Ok(Vec::new()) };
    let (major, minor) = host.release()?;
    if daemon.status.backend != BackEnd::Tc || daemon.status.workers < 2 || (major, minor) >= SINCE {
        return Ok(Vec::new());
    }
    let finding = format!("tc with {} workers on Linux {major}.{minor}", daemon.status.workers);
    let why = "Before Linux 6.6 a tc program can't assign sockets that share a port, as those of several workers do: packets are \
               dropped, and `assign_error` in `anyportctl services --json` counts them.";
    Ok(vec![Finding::broken(finding, why).by_hand("anyportd --workers 1, or --steering sk-lookup")])
}
