//! Modules that the kernel lacks.

use crate::{
    back_end::BackEnd,
    doctor::{Finding, Host},
    text::list_of,
};

/// By which sockets are listed (`NETLINK_SOCK_DIAG`).
const ALWAYS: [&str; 3] = ["inet_diag", "tcp_diag", "udp_diag"];
/// What lines of tproxy are made of.
const TPROXY: [&str; 6] = ["xt_TPROXY", "xt_socket", "xt_multiport", "xt_comment", "nf_tproxy_ipv4", "nf_tproxy_ipv6"];
/// By which the two flavours of iptables get them into the kernel.
const NFT: &str = "nft_compat";
const LEGACY: [&str; 2] = ["iptable_mangle", "ip6table_mangle"];
const SETS: [&str; 3] = ["ip_set", "ip_set_hash_net", "xt_set"];

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let Some(modules) = host.modules()? else { return Ok(Vec::new()) };
    let mut findings = Vec::new();
    let mut note_missing = |missing: Vec<&str>, why: &str| {
        if !missing.is_empty() {
            let finding = format!("Linux {} has no module {}", host.release()?, list_of(&missing));
            let step = "install the package that has them (Debian: linux-image-amd64 in place of a reduced one), or a kernel \
                        that is configured with them";
            findings.push(Finding::warning(finding, why).by_hand(step));
        }
        Ok::<_, anyhow::Error>(())
    };
    let why = "Without them the sockets of the host can't be listed: rules are not checked against those, and none can be added.";
    note_missing(modules.missing(&ALWAYS), why)?;
    if !host.depends_on(BackEnd::Tproxy) {
        return Ok(findings);
    }
    let mut missing = modules.missing(&TPROXY);
    let by_legacy = modules.missing(&LEGACY);
    let by_nft = modules.missing(&[NFT]);
    if !by_nft.is_empty() && !by_legacy.is_empty() {
        missing.extend(by_nft.into_iter().chain(by_legacy));
    }
    note_missing(missing, "tproxy is what can steer here, and its lines are made of them.")?;
    let why =
        "Without sets each prefix takes lines of its own in iptables, which every packet passes; 16,384 are the limit.";
    note_missing(modules.missing(&SETS), why)?;
    Ok(findings)
}
