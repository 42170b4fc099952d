//! Which back ends work here: what a daemon has found out, or what comes of trying.

use crate::{
    back_end::BackEnd,
    doctor::{
        Finding, Host,
        host::{Tried, known},
    },
};

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    if let Ok(daemon) = &host.daemon {
        let passed_over = daemon.status.backends.iter().filter(|it| it.usable == Some(false));
        return Ok(passed_over.map(|it| not_used(it.name, &it.reason, daemon.status.backend)).collect());
    }
    let tried = known(&host.back_ends)?;
    let Some(first) = tried.iter().find(|it| it.failure.is_none()) else {
        let reasons = tried.iter().map(|it| format!("{}: {}", it.back_end, it.failure.as_deref().unwrap_or_default()));
        let finding = format!("no back end works here. {}", reasons.collect::<Vec<_>>().join("; "));
        let why = "sk-lookup needs Linux 5.10, tc Linux 6.6, tproxy iptables with its TPROXY target.";
        let step = if host.missing(&["iptables-restore", "iptables-save"]).is_empty() {
            "anyportd --log-level debug, whose log has all that the kernel says"
        } else {
            "apt-get install iptables"
        };
        return Ok(vec![Finding::broken(finding, why).by_hand(step)]);
    };
    let failed = tried.iter().filter_map(|Tried { back_end, failure }| Some((*back_end, failure.as_deref()?)));
    Ok(failed.map(|(back_end, why)| not_used(back_end, why, first.back_end)).collect())
}

fn not_used(back_end: BackEnd, reason: &str, instead: BackEnd) -> Finding {
    let finding = format!("{back_end} is not used: {}", reason.replace('\n', " "));
    Finding::note(finding, format!("{instead} steers instead, which works as well."))
}
