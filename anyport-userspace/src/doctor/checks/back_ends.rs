//! Which back ends the kernel has.

use crate::{
    doctor::{Finding, Host, host::known},
    steering::BackEnd,
};

const TPROXY: [&str; 2] = ["iptables-restore", "iptables-save"];

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    if let Ok(daemon) = &host.daemon {
        let passed_over = daemon.status.backends.iter().filter(|it| it.usable == Some(false));
        return Ok(passed_over
            .map(|it| {
                let finding = format!("{} is not used: {}", it.name, it.reason.replace('\n', " "));
                Finding::note(finding, format!("{} steers instead, which works as well.", daemon.status.backend))
            })
            .collect());
    }
    let [sk_lookup, tc] = *known(&host.programs)?;
    let missing = host.missing(&TPROXY);
    if !sk_lookup && !tc && !missing.is_empty() {
        let finding = format!("no back end works here: the kernel has no BPF, and {} is missing", missing.join(", "));
        let why = "sk-lookup needs Linux 5.9, tc 5.8, tproxy iptables with its TPROXY target.";
        return Ok(vec![Finding::broken(finding, why).by_hand("apt-get install iptables")]);
    }
    if sk_lookup {
        return Ok(Vec::new());
    }
    let next = if tc { BackEnd::Tc } else { BackEnd::Tproxy };
    let why = format!("`auto` takes {next} then, which works as well.");
    Ok(vec![Finding::note("the kernel has no sk_lookup programs (Linux 5.9)", why)])
}
