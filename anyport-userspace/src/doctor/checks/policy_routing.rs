//! Rules of policy routing that come before the table `local`.

use crate::{
    doctor::{Finding, Host, PolicyRule, host::known},
    rules::Prefix,
    text::list_of,
};

/// `RT_TABLE_LOCAL`
const LOCAL: u32 = 255;

pub(super) fn look(host: &Host) -> anyhow::Result<Vec<Finding>> {
    let policy = known(&host.policy)?;
    let mut findings = Vec::new();
    for (is_ipv4, ip) in [(true, "ip"), (false, "ip -6")] {
        let rules: Vec<&PolicyRule> = policy.iter().filter(|rule| rule.is_ipv4 == is_ipv4).collect();
        if rules.is_empty() {
            // A kernel without this family, or without policy routing.
            continue;
        }
        let Some(place) = rules.iter().position(|rule| rule.table == LOCAL && rule.is_for_all) else {
            let finding = format!("no rule of `{ip} rule` leads all packets to the table local");
            let why = "Nothing is local to packets that are not led there, whatever routes there are.";
            findings.push(Finding::broken(finding, why).by_hand(format!("{ip} rule add pref 0 lookup local")));
            continue;
        };
        if place > 0 {
            findings.extend(before_local(host, &rules[..place], is_ipv4, ip)?);
        }
    }
    Ok(findings)
}

fn before_local(host: &Host, before: &[&PolicyRule], is_ipv4: bool, ip: &str) -> anyhow::Result<Option<Finding>> {
    let priorities: Vec<u32> = before.iter().map(|rule| rule.priority).collect();
    let rules = format!("rules of `{ip} rule` before the table local (priority {})", list_of(&priorities));
    // Prefixes without a local route are reported by another check.
    let local = &known(&host.local)?.local;
    let diverted: Vec<Prefix> = known(&host.routes)?
        .iter()
        .filter(|(prefix, _)| prefix.is_ipv4() == is_ipv4 && local.covers(prefix))
        .filter(|(_, route)| route.is_none_or(|route| !route.is_local))
        .map(|(prefix, _)| *prefix)
        .collect();
    let step = format!("{ip} rule add pref 0 lookup local");
    if !diverted.is_empty() {
        let why = "Their packets are routed elsewhere before the local routes are asked.";
        let finding = format!("{rules} lead {} away", list_of(&diverted));
        return Ok(Some(Finding::broken(finding, why).by_hand(step)));
    }
    if host.steered().iter().all(|it| it.prefix.is_ipv4() != is_ipv4) || before.iter().all(|it| it.table == 0) {
        return Ok(None);
    }
    let why =
        "Packets that such a rule speaks of may be routed elsewhere before the local routes are asked; others are not.";
    Ok(Some(Finding::note(format!("there are {rules}"), why).by_hand(step)))
}
