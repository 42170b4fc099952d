//! What the daemon itself finds wrong.

use crate::doctor::{Finding, Host};

#[expect(clippy::unnecessary_wraps, reason = "other checks may not be able to look")]
pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let Ok(daemon) = &host.daemon else { return Ok(Vec::new()) };
    let degraded = daemon.status.degraded.iter().map(|what| {
        Finding::broken(what, "The daemon says so itself; `anyportctl status` lists it as degraded.")
            .by_hand("docs/operations.md says what to do about each")
    });
    Ok(degraded.collect())
}
