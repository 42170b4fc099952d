use std::ops::Range;

use super::{Prefix, Rule};

/// Rules in order of precedence, without contradictions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSet(Vec<Rule>);

/// Two rules that can't both hold.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// Neither is more specific, and they disagree about a port.
    #[error(
        "{new} contradicts {old}: both cover the same number of ports of the same prefix and \
         disagree about port {port}"
    )]
    Targets {
        /// The rule that was to be added.
        new: Box<Rule>,
        /// The rule that is there.
        old: Box<Rule>,
        /// The lowest port that they disagree about.
        port: u16,
    },
    /// The same rule, once with a local route and once without.
    #[error("{0} is there already, but {there}", there = if .0.route { "with a local route" } else { "without a local route" })]
    Route(Box<Rule>),
}

impl RuleSet {
    /// The rules in order of precedence.
    pub fn iter(&self) -> std::slice::Iter<'_, Rule> {
        self.0.iter()
    }

    /// How many rules there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a rule. Returns whether the set changed: it does not if a rule that says the same is there.
    ///
    /// # Errors
    /// The rule contradicts one that is there; the set is as before.
    pub fn insert(&mut self, rule: Rule) -> Result<bool, Conflict> {
        let at = self.0.partition_point(|old| old.precedence() < rule.precedence());
        if let Some(old) = self.0.get(at)
            && old.says_the_same_as(&rule)
        {
            return if old.route == rule.route { Ok(false) } else { Err(Conflict::Route(Box::new(old.clone()))) };
        }
        for old in &self.0[self.range_of(&rule.prefix)] {
            if let Some(port) = contradiction(&rule, old) {
                return Err(Conflict::Targets { new: Box::new(rule), old: Box::new(old.clone()), port });
            }
        }
        self.0.insert(at, rule);
        Ok(true)
    }

    /// Takes out the rules for which `select` holds and returns them.
    pub fn remove(&mut self, mut select: impl FnMut(&Rule) -> bool) -> Vec<Rule> {
        self.0.extract_if(.., |rule| select(rule)).collect()
    }

    /// The rules of exactly this prefix.
    pub fn of_prefix(&self, prefix: &Prefix) -> &[Rule] {
        &self.0[self.range_of(prefix)]
    }

    fn range_of(&self, prefix: &Prefix) -> Range<usize> {
        let key = |prefix: &Prefix| (!prefix.is_ipv4(), std::cmp::Reverse(prefix.len()), prefix.bounds().0);
        let first = self.0.partition_point(|rule| key(&rule.prefix) < key(prefix));
        let last = self.0.partition_point(|rule| key(&rule.prefix) <= key(prefix));
        first..last
    }
}

impl<'a> IntoIterator for &'a RuleSet {
    type Item = &'a Rule;
    type IntoIter = std::slice::Iter<'a, Rule>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// The lowest port on which two rules of one prefix disagree although neither is more specific.
fn contradiction(new: &Rule, old: &Rule) -> Option<u16> {
    let (ports, old_ports) = (new.opinion(), old.opinion());
    if !new.protocol.overlaps(old.protocol) || ports.count() != old_ports.count() {
        return None;
    }
    // What a rule says changes only where one of its ranges begins or ends.
    let edges = [new, old]
        .into_iter()
        .flat_map(|rule| rule.ports.ranges().iter().chain(rule.except.ranges()))
        .flat_map(|(first, last)| [*first, last.saturating_add(1)]);
    edges
        .filter(|port| match (new.target(*port), old.target(*port)) {
            (Some(new), Some(old)) => new != old,
            _ => false,
        })
        .min()
}

#[cfg(test)]
mod tests {
    use anyport_common::flow::Transport;

    use super::{Conflict, RuleSet};
    use crate::rules::{Decision, Origin, PortSet, Protocol, Rule, decide};

    fn rule(prefix: &str, protocol: Protocol, ports: &str, except: &str, service: &str) -> Rule {
        Rule {
            prefix: prefix.parse().unwrap(),
            protocol,
            ports: if ports == "all" { PortSet::all() } else { ports.parse().unwrap() },
            except: except.parse().unwrap(),
            service: service.parse().unwrap(),
            route: true,
            origin: Origin::Added,
        }
    }

    fn tcp(prefix: &str, ports: &str, except: &str, service: &str) -> Rule {
        rule(prefix, Protocol::Tcp, ports, except, service)
    }

    fn set(rules: &[Rule]) -> RuleSet {
        let mut set = RuleSet::default();
        for rule in rules {
            set.insert(rule.clone()).unwrap();
        }
        set
    }

    fn answer(set: &RuleSet, address: &str, port: u16) -> String {
        match decide(set, address.parse().unwrap(), Transport::Tcp, port) {
            Decision::Unmatched => "unmatched".into(),
            Decision::Host(_) => "host".into(),
            Decision::Steer(rule) => rule.service.to_string(),
        }
    }

    #[test]
    fn specific_before_general() {
        let mut rules = vec![
            tcp("192.0.2.0/24", "all", "22", "wide"),
            tcp("192.0.2.0/24", "80", "", "web"),
            tcp("192.0.2.0/24", "8000-8999", "8080", "range"),
            tcp("192.0.2.128/25", "443", "", "half"),
            tcp("192.0.2.200/32", "1-1024", "443", "one"),
            rule("192.0.2.0/24", Protocol::Udp, "all", "", "udp"),
            tcp("2001:db8::/32", "all", "", "six"),
        ];
        for _ in 0..rules.len() {
            rules.rotate_left(1);
            let set = set(&rules);
            for (address, port, expected) in [
                ("192.0.2.1", 1, "wide"),
                ("192.0.2.1", 22, "host"),
                ("192.0.2.1", 80, "web"),
                ("192.0.2.1", 8001, "range"),
                ("192.0.2.1", 8080, "host"),
                ("192.0.2.129", 443, "half"),
                ("192.0.2.129", 444, "wide"),
                ("192.0.2.200", 443, "host"),
                ("192.0.2.200", 1024, "one"),
                ("192.0.2.200", 1025, "wide"),
                ("192.0.2.200", 0, "unmatched"),
                ("192.0.3.1", 80, "unmatched"),
                ("2001:db8::1", 80, "six"),
            ] {
                assert_eq!(answer(&set, address, port), expected, "{address}:{port}");
            }
        }
    }

    #[test]
    fn contradictions_are_named() {
        let mut set = set(&[tcp("192.0.2.0/24", "80,443", "", "a")]);
        let conflict = set.insert(tcp("192.0.2.0/24", "80-81", "", "b")).unwrap_err();
        assert!(matches!(conflict, Conflict::Targets { port: 80, .. }));
        let both = rule("192.0.2.0/24", Protocol::Both, "443,444", "", "b");
        assert!(set.insert(both).is_err());
        assert!(set.insert(tcp("192.0.2.0/24", "80", "443", "a")).is_err());
        // Another size, another protocol, another prefix, or the same target: no contradiction.
        for rule in [
            tcp("192.0.2.0/24", "80", "", "b"),
            rule("192.0.2.0/24", Protocol::Udp, "80-81", "", "b"),
            tcp("192.0.2.0/25", "80-81", "", "b"),
            tcp("192.0.2.0/24", "80-81", "", "a"),
        ] {
            assert_eq!(set.insert(rule), Ok(true));
        }
    }

    #[test]
    fn the_same_again_changes_nothing() {
        let mut set = set(&[tcp("192.0.2.0/24", "80,443", "", "a")]);
        assert_eq!(set.insert(tcp("192.0.2.0/24", "443,80", "", "a")), Ok(false));
        let mut without_route = tcp("192.0.2.0/24", "80,443", "", "a");
        without_route.route = false;
        assert!(matches!(set.insert(without_route), Err(Conflict::Route(_))));
        assert_eq!(set.len(), 1);
    }

    #[test]
    fn removes_what_is_selected() {
        let mut set = set(&[tcp("192.0.2.0/24", "80", "", "a"), tcp("192.0.2.0/25", "80", "", "a")]);
        let prefix = "192.0.2.0/24".parse().unwrap();
        assert_eq!(set.of_prefix(&prefix).len(), 1);
        assert_eq!(set.remove(|rule| rule.prefix == prefix).len(), 1);
        assert_eq!(set.len(), 1);
    }
}
