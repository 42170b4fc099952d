//! Sets as rules and services: whether they make sense, and how two of them differ.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{
    api::{Problem, ProblemKind},
    rule_file::RuleFile,
    rules::{
        Conflict, Origin, Prefix, PrefixRules, Rule, RuleSet, RuleSpec, ServiceName,
        lines::{LineRule, RuleLine},
    },
    service::ServiceConfig,
};

/// What a set says.
#[derive(Debug, Default)]
pub struct Content {
    services: BTreeMap<ServiceName, ServiceConfig>,
    rules: RuleSet,
}

/// What one set has and another one has not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Rules that come.
    pub added: usize,
    /// Rules that go.
    pub removed: usize,
    /// Rules that stay.
    pub unchanged: usize,
    /// Services that come (`+ name`), go (`- name`) or get other settings (`~ name`).
    pub services: Vec<String>,
    /// A line for each rule that comes (`+ rule`) or goes (`- rule`), in order of precedence.
    pub rules: Vec<String>,
}

impl Content {
    /// Reads a set and checks all that can be checked without a node: as `apply` does, but for services that nodes have of
    /// their own, limits, and what a host has to be protected from.
    ///
    /// # Errors
    /// Something in it is wrong: says where and what.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let invalid = |why: String| Problem::new(ProblemKind::Invalid, why);
        let file = RuleFile::parse(text, Arc::new).map_err(|error| invalid(error.to_string()))?;
        let services = file.services.unwrap_or_default().into_iter().map(|it| (it.name.clone(), it)).collect();
        let rule = |(prefix, terms): &LineRule| Rule {
            prefix: *prefix,
            terms: Arc::clone(terms),
            origins: Origin::Applied.into(),
        };
        let mut rules = RuleSet::default();
        rules.extend(file.rules.iter().map(|(it, _)| rule(it))).map_err(|conflict| {
            let (Conflict::Targets { new: last, .. } | Conflict::Route(last)) = &conflict;
            let same = |it: &&(LineRule, u32)| it.0.0 == last.prefix && it.0.1.precedence() == last.terms.precedence();
            let line = file.rules.iter().filter(same).map(|(_, line)| *line).max().unwrap_or_default();
            let (what, hint) = describe(&conflict);
            invalid(format!("line {line}: {what}")).hint(hint)
        })?;
        Ok(Self { services, rules })
    }

    /// Number of rules.
    pub fn rules(&self) -> usize {
        self.rules.len()
    }

    /// Services that rules steer to and that the set does not have: nodes must have them, as all have the default one.
    pub fn foreign_services(&self) -> Vec<&ServiceName> {
        let named: BTreeSet<&ServiceName> = self.rules.iter().map(|it| &it.terms.service).collect();
        let default = ServiceName::default_service();
        named.into_iter().filter(|name| **name != default && !self.services.contains_key(name)).collect()
    }

    /// What changes where these take the place of others.
    pub fn since(&self, before: &Self) -> Difference {
        let mut difference = Difference { services: self.services_since(before), ..Difference::default() };
        let prefixes: BTreeSet<&Prefix> =
            before.rules.prefixes().chain(self.rules.prefixes()).map(|(prefix, _)| prefix).collect();
        for prefix in prefixes {
            difference.tell(prefix, before.rules.of_prefix(prefix), self.rules.of_prefix(prefix));
        }
        difference
    }

    fn services_since(&self, before: &Self) -> Vec<String> {
        let names: BTreeSet<&ServiceName> = before.services.keys().chain(self.services.keys()).collect();
        let sign = |name: &ServiceName| match (before.services.get(name), self.services.get(name)) {
            (Some(old), Some(new)) if old == new => None,
            (Some(_), Some(_)) => Some('~'),
            (Some(_), None) => Some('-'),
            (None, _) => Some('+'),
        };
        names.into_iter().filter_map(|name| Some(format!("{} {name}", sign(name)?))).collect()
    }
}

impl Difference {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.added + self.removed + self.services.len() == 0
    }

    fn tell(&mut self, prefix: &Prefix, before: Option<&PrefixRules>, after: Option<&PrefixRules>) {
        let terms = |rules: Option<&PrefixRules>| -> Vec<Arc<RuleSpec>> {
            rules.into_iter().flatten().map(|held| Arc::clone(&held.terms)).collect()
        };
        let (was, is) = (terms(before), terms(after));
        for terms in was.iter().filter(|it| !is.contains(it)) {
            self.removed += 1;
            self.rules.push(format!("- {}", RuleLine(prefix, terms)));
        }
        for terms in &is {
            if was.contains(terms) {
                self.unchanged += 1;
            } else {
                self.added += 1;
                self.rules.push(format!("+ {}", RuleLine(prefix, terms)));
            }
        }
    }
}

/// Without where rules came from, which is the set itself.
fn describe(conflict: &Conflict) -> (String, &'static str) {
    match conflict {
        Conflict::Targets { new, old, port } => (
            format!(
                "{} {} contradicts {}: both cover the same number of ports of the same prefix and disagree about port {port}",
                new.prefix, new.terms, old.terms
            ),
            "give one of them fewer ports or a longer prefix, or take one out",
        ),
        Conflict::Route(rule) => (
            format!("{} {} is there twice, with a local route and without one", rule.prefix, rule.terms),
            "take one out",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::Content;

    fn parse(text: &str) -> Content {
        Content::parse(text).unwrap()
    }

    #[test]
    fn tells_what_comes_and_goes() {
        let before = "[[service]]\nname = \"a\"\nhandler = \"echo\"\n\n[[service]]\nname = \"b\"\nhandler = \"echo\"\n\n\
                      [[rule]]\nprefix = \"192.0.2.0/24\"\nservice = \"a\"\n\n[[rule]]\nprefix = \"198.51.100.0/24\"\n";
        let after = "[[service]]\nname = \"b\"\nhandler = \"hello\"\n\n[[service]]\nname = \"c\"\nhandler = \"echo\"\n\n\
                     [[rule]]\nprefix = \"192.0.2.0/24\"\nservice = \"c\"\n\n[[rule]]\nprefix = \"198.51.100.0/24\"\n";
        let difference = parse(after).since(&parse(before));
        assert_eq!(difference.services, ["- a", "~ b", "+ c"]);
        assert_eq!(difference.rules, ["- 192.0.2.0/24 tcp 1-65535 service=a", "+ 192.0.2.0/24 tcp 1-65535 service=c"]);
        assert_eq!((difference.added, difference.removed, difference.unchanged), (1, 1, 1));
        assert!(parse(after).since(&parse(after)).is_empty());
        assert_eq!(parse("").since(&parse(before)).removed, 2);
    }

    #[test]
    fn says_which_services_nodes_must_have() {
        let content = parse("192.0.2.0/24 service=edge\n198.51.100.0/24\n");
        assert_eq!(content.foreign_services().iter().map(|it| it.as_str()).collect::<Vec<_>>(), ["edge"]);
        assert_eq!(content.rules(), 2);
    }

    #[test]
    fn says_where_rules_contradict() {
        for (text, wanted) in [
            (
                "192.0.2.0/24 service=a\n\n192.0.2.0/24 service=b\n",
                "line 3: 192.0.2.0/24 tcp ports 1-65535 -> b contradicts",
            ),
            ("192.0.2.0/24\n192.0.2.0/24 route=no\n", "line 2: "),
            ("192.0.2.0/24 ports\n", "line 1"),
            ("[[rule]]\nprefix = 1\n", "prefix"),
        ] {
            let problem = Content::parse(text).unwrap_err();
            assert_eq!(problem.kind.exit_status(), 2, "{problem:?}");
            assert!(problem.error.contains(wanted), "{text:?}: {problem:?}");
        }
    }
}
