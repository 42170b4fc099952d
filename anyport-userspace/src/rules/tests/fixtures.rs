//! Rules for tests.

use crate::rules::{Origin, PortSet, Protocol, Rule, RuleText};

/// A rule for a prefix such as `192.0.2.0/24` or `192.0.2.0/24 from 198.51.100.0/24`.
pub(crate) fn rule(prefix: &str, protocol: Protocol, ports: &str, except: &str, service: &str) -> Rule {
    let (prefix, source) =
        prefix.split_once(" from ").map_or((prefix, None), |(prefix, source)| (prefix, Some(source)));
    RuleText {
        prefix: prefix.parse().unwrap(),
        protocol,
        ports: if ports == "all" { PortSet::all() } else { ports.parse().unwrap() },
        except: except.parse().unwrap(),
        source: source.map(|it| it.parse().unwrap()),
        service: service.parse().unwrap(),
        route: true,
    }
    .into_rule(Origin::Added)
}
