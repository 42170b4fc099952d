//! What to do about what is degraded, as far as that is known.

/// Words of a message, what to do where a message has all of them, and where more is written. The first that fits counts.
const ADVICE: [(&[&str], &str, &str); 23] = [
    (
        &["gets nothing: the last"],
        "have the owner register its sockets again, or restart anyportd where the service has its own",
        "docs/operations.md",
    ),
    (
        &["has no live socket"],
        "start its owner, or look why it does not register: anyportctl services",
        "docs/services-and-forwarding.md",
    ),
    (
        &["nobody has registered"],
        "start its owner, or look why it does not register: anyportctl services",
        "docs/services-and-forwarding.md",
    ),
    (
        &["the upstream"],
        "look whether the upstream runs, and answers at that address from this host",
        "docs/services-and-forwarding.md",
    ),
    (
        &["the metrics", "out of reach"],
        "keep the port with --except in the rule that is named, or move the metrics",
        "docs/metrics.md",
    ),
    (&["the metrics are not served"], "free the address, or change --metrics", "docs/metrics.md"),
    (
        &["is not put back (mend)"],
        "restart anyportd, which puts it back",
        "docs/operations.md#when-others-change-things",
    ),
    (
        &["is gone and could not be put back"],
        "remove the reason that is named; it is tried again by itself",
        "docs/operations.md#when-others-change-things",
    ),
    (
        &["removed by others"],
        "find the program that removes it, such as a firewall manager, and have it leave anyport alone",
        "docs/operations.md#when-others-change-things",
    ),
    (
        &["is about to be put back"],
        "nothing: it comes back within a second",
        "docs/operations.md#when-others-change-things",
    ),
    (
        &["the interface", "is to be watched"],
        "bring it up, or take it out of the setting interfaces",
        "docs/configuration.md",
    ),
    (&["not followed"], "publish a set that this node can take, or remove the reason that is named", "docs/fleet.md"),
    (
        &["is inside of the steered prefix", "stays here"],
        "type what it names, or steer smaller prefixes; a rule about this very address says that it is meant",
        "docs/real-hosts.md#what-comes-later",
    ),
    (
        &["is inside of the steered prefix", "whose rules take its packets"],
        "set own-addresses to host, or add a rule about this very address, which says that it is meant",
        "docs/real-hosts.md#what-comes-later",
    ),
    (&["is not reached at"], "type what it names", "docs/real-hosts.md#what-comes-later"),
    (
        &["clients get no answers"],
        "give the clients' networks a route, or correct the rule of policy routing that stops answers: ip rule",
        "docs/real-hosts.md#answers",
    ),
    (&["etcd has no pointer"], "publish again with --sequence", "docs/fleet.md"),
    (&["can't report to the fleet"], "look at the node's rights in etcd and at its space", "docs/fleet.md"),
    (&["etcd has not answered"], "bring etcd back, or the way to it; steering goes on", "docs/fleet.md"),
    (&["prefixes to announce"], "announce larger prefixes", "docs/announce.md"),
    (&["announcing:"], "look at BIRD and its configuration: birdc show protocols all", "docs/announce.md"),
    (&["the state directory"], "make room, or the directory writable", "docs/configuration.md"),
    (&["configuration"], "correct the file, then: anyportctl reload", "docs/configuration.md"),
];
/// Where nothing is known of a message.
const GENERAL: (&str, &str) = ("see whether it is gone in a minute, and what the log says of it", "docs/operations.md");

/// What to do about something that `status` lists as degraded, and the document that has more.
pub fn advice(degraded: &str) -> (&'static str, &'static str) {
    let fits = |words: &[&str]| words.iter().all(|word| degraded.contains(word));
    ADVICE.iter().find(|(words, ..)| fits(words)).map_or(GENERAL, |(_, action, document)| (action, document))
}

#[cfg(test)]
mod tests {
    use super::{ADVICE, GENERAL, advice};

    #[test]
    fn what_is_known_has_advice_of_its_own() {
        for (degraded, document) in [
            ("service web gets nothing: the last 12 packets steered to it were dropped", "docs/operations.md"),
            ("service web: the upstream 192.0.2.1:80 is down for 3 s: timed out", "docs/services-and-forwarding.md"),
            ("announcing: no session", "docs/announce.md"),
        ] {
            assert_eq!(advice(degraded).1, document, "{degraded}");
            assert_ne!(advice(degraded), GENERAL, "{degraded}");
        }
        assert_eq!(advice("the moon is full"), GENERAL);
    }

    /// The words of this list are those of messages: a change of one of these belongs here, too.
    #[test]
    fn documents_that_are_named_have_what_is_meant() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        for (.., place) in ADVICE {
            let (file, section) = place.split_once('#').map_or((place, None), |(file, section)| (file, Some(section)));
            let text = std::fs::read_to_string(format!("{root}/{file}")).unwrap();
            let slug = |line: &str| line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
            let has = |section| text.lines().any(|line| line.starts_with('#') && slug(line) == section);
            assert!(section.is_none_or(has), "{place}");
        }
    }
}
