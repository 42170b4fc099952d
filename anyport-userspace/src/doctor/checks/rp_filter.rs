//! Strict reverse path filters.

use crate::doctor::{Change, Finding, Host, Sysctl};

const STRICT: u64 = 1;

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let mut strict = Vec::new();
    for link in host.outer_links()? {
        if host.effective(link, "rp_filter")? == STRICT {
            strict.push(link.name.clone());
        }
    }
    let dropped = host.counter("TcpExt", "IPReversePathFilter")?;
    if strict.is_empty() || dropped == 0 {
        // With one way out and in, the strict filter does no harm.
        return Ok(Vec::new());
    }
    let finding = format!(
        "{dropped} packets were dropped as they came by another interface than the way back leaves by (rp_filter=1 on {})",
        strict.join(", ")
    );
    let why = "Clients who are reached by another way than they come by get no answer, and nothing is logged. The larger of \
               `all` and the interface counts; 2 asks only whether there is any way back.";
    let changes =
        strict.iter().map(|link| Change::Sysctl { name: Sysctl::of_interface(link, "rp_filter"), value: "2".into() });
    Ok(vec![changes.fold(Finding::warning(finding, why), Finding::by_change)])
}
