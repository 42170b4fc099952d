//! Which end-to-end tests run on a kernel. A line that ends in `*` stands for all names that begin so; one that no test
//! has makes the test program fail.

use super::versions::numbers;

/// The first series in which the `tc` back end works.
const TC_SINCE: [u64; 2] = [6, 6];

/// Cases of each back end that run always.
const BRIEF: [&str; 10] = [
    "tcp4::*",
    "tcp6::*",
    "udp4::*",
    "udp6::*",
    "--except 22 leaves the host's listener",
    "explain::the rule that decides, and why the others do not",
    "events::connections and flows",
    "register::an unmodified server",
    "crash::nothing is left after SIGTERM",
    "rights::whose they are and which",
];
/// Cases of each back end that run in a whole pass, too. None with HAProxy: it takes the instruction CMPXCHG16B, which this
/// emulation lacks.
const WHOLE: [&str; 21] = [
    "tcp::1000 random pairs *",
    "other traffic stays as it was",
    "established connections survive *",
    "udp::answers leave from the dialled address and port",
    "udp::a connected socket of the host keeps its flow",
    "explain::socket, owner and what it shadows",
    "explain::clients decide too",
    "metrics::they tell what has happened",
    "register::a UDP socket",
    "register::a group of sockets",
    "register::the owner ends, a fallback stands in",
    "register::what was registered outlives the daemon",
    "forward::the dialled port is kept",
    "flows::answers come from what was dialled",
    "restarts::SIGKILL of the process that serves",
    "restarts::what is established goes on",
    "restarts::--keep leaves steering behind",
    "crash::SIGKILL during changes, then a start that converges",
    "changed::what others remove is put back",
    "lists::the longest prefix decides",
    "apply::100,000 rules",
];
/// Cases that have no back end, or choose it themselves.
const OTHERS: [&str; 6] = [
    "backends::auto takes sk-lookup",
    "backends::auto tries nothing behind its choice",
    "backends::auto without CAP_BPF takes tproxy",
    "crash::another back end takes over after SIGKILL",
    "tproxy::backends::iptables of the *",
    "forward::transparent source",
];
/// What a whole pass runs only from [`TC_SINCE`] on.
const WITH_TC: &str = "crash::another back end, tc too, takes over after SIGKILL";
/// What kernels below [`TC_SINCE`] show instead of the cases of `tc`.
const WITHOUT_TC: &str = "backends::tc is refused where the kernel is too old for it";

/// The back ends that must work on a kernel of this release.
pub(crate) fn back_ends(release: &str) -> Vec<&'static str> {
    let mut all = vec!["sk-lookup", "tproxy"];
    if has_tc(release) {
        all.push("tc");
    }
    all
}

/// Which of the cases are to run.
pub(crate) struct Selection<'a> {
    /// Only a few of each back end.
    pub(crate) brief: bool,
    /// Only those whose lines contain this.
    pub(crate) filter: Option<&'a str>,
}

/// The cases, a line each.
pub(crate) fn list(release: &str, &Selection { brief, filter }: &Selection<'_>) -> String {
    let mut cases: Vec<String> = Vec::new();
    for back_end in back_ends(release) {
        let further = if brief { &[][..] } else { &WHOLE };
        cases.extend(BRIEF.iter().chain(further).map(|case| format!("{back_end}::{case}")));
    }
    if !brief {
        cases.extend(OTHERS.map(str::to_owned));
    }
    if !has_tc(release) {
        cases.push(WITHOUT_TC.to_owned());
    } else if !brief {
        cases.push(WITH_TC.to_owned());
    }
    cases.retain(|case| filter.is_none_or(|filter| case.contains(filter)));
    cases.join("\n") + "\n"
}

fn has_tc(release: &str) -> bool {
    numbers(release) >= TC_SINCE.to_vec()
}

#[cfg(test)]
mod tests {
    use super::{Selection, back_ends, list};

    #[test]
    fn tc_is_left_out_below_6_6_and_nowhere_else() {
        for (release, has_tc) in [
            ("5.10.0-32-cloud-amd64", false),
            ("6.1.0-50", false),
            ("6.6.1", true),
            ("6.12.95+deb12", true),
            ("7.2", true),
        ] {
            assert_eq!(back_ends(release).contains(&"tc"), has_tc, "{release}");
            let list = |brief, filter| list(release, &Selection { brief, filter });
            assert_eq!(list(true, None).contains("tc::tcp"), has_tc, "{release}");
            assert_eq!(list(false, None).contains("tc is refused"), !has_tc, "{release}");
            assert!(list(false, Some("restarts::")).lines().all(|line| line.contains("restarts::")));
        }
    }
}
