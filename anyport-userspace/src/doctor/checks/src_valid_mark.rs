//! Marks that make the kernel take clients for itself.

use crate::doctor::{Change, Finding, Host, Sysctl, host::known};

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let has_marks = known(&host.policy)?.iter().any(|rule| rule.is_ipv4 && rule.has_mark);
    if !has_marks || known(&host.local)?.all_local_tables == 0 {
        return Ok(Vec::new());
    }
    let mut concerned = Vec::new();
    for link in host.outer_links()? {
        if host.effective(link, "src_valid_mark")? != 0 {
            concerned.push(link.name.clone());
        }
    }
    if concerned.is_empty() {
        return Ok(Vec::new());
    }
    let finding = format!(
        "src_valid_mark=1 on {}, and marked packets are routed by a table in which everything is local",
        concerned.join(", ")
    );
    let why = "anyport sets no marks. But if another proxy marks what is steered, its clients seem to be this host itself and \
               their packets are dropped, which no counter shows. The larger of `all` and the interface counts.";
    let off = |name: &str| Change::Sysctl { name: Sysctl::of_interface(name, "src_valid_mark"), value: "0".into() };
    let interfaces = std::iter::once("all").chain(concerned.iter().map(String::as_str));
    let mut finding = Finding::warning(finding, why);
    for name in interfaces {
        if host.number(&format!("net/ipv4/conf/{name}/src_valid_mark"))? != Some(0) {
            finding = finding.by_change(off(name));
        }
    }
    Ok(vec![finding])
}
