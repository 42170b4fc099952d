//! What has to change so that the rules of one origin are those of a file, and what is said of it. Pure: knows rules and nothing else.

use std::{cmp::Ordering, collections::HashSet, sync::Arc};

use crate::{
    api::{Applied, Problem, ProblemKind},
    rules::{
        Change, Conflict, Origin, Prefix, PrefixRules, Rule, RuleEntry, RuleSet, RuleSpec, ServiceName,
        lines::{LineRule, RuleLine},
    },
};

/// What has to change so that the rules of this origin are these, which are sorted by prefix.
pub(super) fn difference(
    rules: &RuleSet,
    wanted: &[(LineRule, u32)],
    origin: Origin,
    prune: bool,
    answer: &mut Applied,
) -> Result<Change, Problem> {
    let mut change = Change::default();
    let mut here = rules.prefixes().peekable();
    let mut there = wanted.chunk_by(|a, b| a.0.0 == b.0.0).peekable();
    loop {
        let next = match (here.peek(), there.peek()) {
            (None, None) => break,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((prefix, _)), Some(new)) => (*prefix).cmp(&new[0].0.0),
        };
        let before = if next == Ordering::Greater { None } else { here.next() };
        let new = if next == Ordering::Less { None } else { there.next() };
        let Some(prefix) = before.map(|(prefix, _)| *prefix).or(new.map(|new| new[0].0.0)) else { break };
        let before = before.map(|(_, rules)| rules);
        answer.change_prefix(&mut change, prefix, before, new.unwrap_or_default(), (origin, prune))?;
    }
    Ok(change)
}

/// No rule that stays may steer to a service that goes.
pub(super) fn expect_unused(rules: &RuleSet, closed: &[ServiceName], change: &Change) -> Result<(), Problem> {
    if closed.is_empty() {
        return Ok(());
    }
    let goes = |prefix: &Prefix| change.removed.binary_search_by_key(prefix, |(it, _)| *it).is_ok();
    let stay = rules.prefixes().filter(|(prefix, _)| !goes(prefix)).map(|(prefix, rules)| (*prefix, rules));
    let come = change.added.iter().map(|(prefix, rules)| (*prefix, rules));
    let mut all = stay.chain(come).flat_map(|(prefix, rules)| rules.numbered(prefix));
    match all.find(|rule| closed.contains(&rule.terms.service)) {
        None => Ok(()),
        Some(rule) => Err(Problem::new(
            ProblemKind::Conflict,
            format!(
                "there would be no service {} any more, but a rule stays that steers to it: {}",
                rule.terms.service,
                rule.to_rule()
            ),
        )
        .hint("keep the service in the file, or remove that rule first")),
    }
}

/// Whether each of the rules of a prefix is there once.
pub(super) fn has_no_double(rules: &[(LineRule, u32)]) -> bool {
    let mut seen = HashSet::new();
    rules.len() == 1 || rules.iter().all(|((_, terms), _)| seen.insert(terms))
}

/// Whether the rules of this origin of a prefix are these already.
fn is_same(before: &PrefixRules, new: &[(LineRule, u32)], origin: Origin, prune: bool) -> bool {
    let mut applied = before.iter().filter(|it| it.origins.contains(origin));
    let is_pruned = prune && before.iter().any(|it| it.origins.contains(Origin::Added));
    !is_pruned
        && new.len() <= 1
        && applied.next().map(|it| &it.terms) == new.first().map(|((_, terms), _)| terms)
        && applied.next().is_none()
}

/// The rules of a prefix once those of this origin are these.
fn after(
    prefix: Prefix,
    before: Option<&PrefixRules>,
    new: &[(LineRule, u32)],
    origin: Origin,
    prune: bool,
) -> Result<PrefixRules, Problem> {
    let mut after = before.cloned().unwrap_or_default();
    after.remove_origin(origin);
    if prune {
        after.remove_origin(Origin::Added);
    }
    let held = new.iter().map(|((_, terms), _)| RuleEntry { terms: Arc::clone(terms), origins: origin.into() });
    after.extend(prefix, held).map_err(|conflict| {
        let line_of = |rule: &Rule| new.iter().find(|((_, terms), _)| *terms == rule.terms).map(|(_, line)| line);
        let line = match &conflict {
            Conflict::Targets { new, old, .. } => line_of(new).max(line_of(old)),
            Conflict::Route(_) => new.first().map(|(_, line)| line),
        };
        let Problem { kind, error, hint } = conflict_problem(&conflict);
        let error = format!("{}{error}", at_line(line.copied().unwrap_or_default()));
        Problem { kind, error, hint }
    })?;
    Ok(after)
}

/// What is said of two rules that contradict each other.
pub(super) fn conflict_problem(conflict: &Conflict) -> Problem {
    Problem::new(ProblemKind::Conflict, conflict.to_string())
        .hint("remove the rule that is there first, or change the ports")
}

/// Where a rule stands, to begin a message with. Line 0 is nowhere.
pub(super) fn at_line(line: u32) -> String {
    if line == 0 { String::new() } else { format!("line {line}: ") }
}

impl Applied {
    /// Gives a prefix these rules of an origin, in place of those of it that it has and, if asked to, of those that were added by
    /// hand. Prefixes come in order.
    pub(super) fn change_prefix(
        &mut self,
        change: &mut Change,
        prefix: Prefix,
        before: Option<&PrefixRules>,
        new: &[(LineRule, u32)],
        (origin, prune): (Origin, bool),
    ) -> Result<(), Problem> {
        if let Some(before) = before.filter(|before| is_same(before, new, origin, prune)) {
            self.unchanged += new.len();
            self.count_others(Some(before), origin, new.len());
            return Ok(());
        }
        let after = after(prefix, before, new, origin, prune)?;
        self.note_change(prefix, before, &after, origin);
        if before.is_none_or(|before| *before != after) {
            change.removed.extend(before.map(|before| (prefix, before.clone())));
            if !after.is_empty() {
                change.added.push((prefix, after));
            }
        }
        Ok(())
    }

    /// Notes what becomes of a prefix's rules.
    fn note_change(&mut self, prefix: Prefix, before: Option<&PrefixRules>, after: &PrefixRules, origin: Origin) {
        let was: HashSet<&RuleSpec> = before.into_iter().flatten().map(|held| &*held.terms).collect();
        let is: HashSet<&RuleSpec> = before.into_iter().flat_map(|_| after).map(|held| &*held.terms).collect();
        for held in before.into_iter().flatten() {
            if !is.contains(&*held.terms) {
                self.removed += 1;
                self.note_difference(|| format!("- {}", RuleLine(&prefix, &held.terms)));
            }
        }
        for held in after {
            if !was.contains(&*held.terms) {
                self.added += 1;
                self.note_difference(|| format!("+ {}", RuleLine(&prefix, &held.terms)));
            } else if held.origins.contains(origin) {
                self.unchanged += 1;
            }
        }
        let of_origin = after.iter().filter(|it| it.origins.contains(origin)).count();
        self.count_others(Some(after), origin, of_origin);
    }

    fn note_difference(&mut self, line: impl FnOnce() -> String) {
        if self.dry_run {
            self.difference.push(line());
        }
    }

    /// Counts the rules that stay though the file does not have them.
    fn count_others(&mut self, rules: Option<&PrefixRules>, origin: Origin, of_origin: usize) {
        let Some(rules) = rules.filter(|rules| rules.len() > of_origin) else { return };
        for held in rules.iter().filter(|it| !it.origins.contains(origin)) {
            if held.origins.contains(Origin::Config) {
                self.kept_of_config += 1;
            } else if held.origins.contains(Origin::Fleet) {
                self.kept_of_fleet += 1;
            } else {
                self.kept_added += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Applied, LineRule, Problem, difference, expect_unused, has_no_double};
    use crate::{
        engine::tests::fixtures::rule,
        rules::{Change, Origin, RuleSet},
    };

    fn set(rules: &[(&str, &str, Origin)]) -> RuleSet {
        let mut set = RuleSet::default();
        for (prefix, ports, origin) in rules {
            set.insert(&rule(prefix, ports, *origin)).unwrap();
        }
        set
    }

    /// Rules of a file, a line for each.
    fn lines(rules: &[(&str, &str)]) -> Vec<(LineRule, u32)> {
        let mut lines: Vec<_> = (1..)
            .zip(rules)
            .map(|(line, (prefix, ports))| {
                let rule = rule(prefix, ports, Origin::Applied);
                ((rule.prefix, rule.terms), line)
            })
            .collect();
        lines.sort_by_key(|((prefix, _), _)| *prefix);
        lines
    }

    fn change(set: &RuleSet, wanted: &[(&str, &str)], prune: bool) -> Result<(Change, Applied), Problem> {
        let mut answer = Applied { dry_run: true, ..Applied::default() };
        let change = difference(set, &lines(wanted), Origin::Applied, prune, &mut answer)?;
        Ok((change, answer))
    }

    #[test]
    fn what_differs_is_all_that_changes() {
        use Origin::{Added, Applied, Config};
        let set = set(&[
            ("192.0.2.1", "80", Applied),
            ("192.0.2.2", "80", Applied),
            ("192.0.2.3", "80", Config),
            ("192.0.2.4", "80", Added),
        ]);
        let (change, answer) = change(&set, &[("192.0.2.2", "80"), ("192.0.2.5", "443")], false).unwrap();
        let counts = (answer.added, answer.removed, answer.unchanged, answer.kept_of_config, answer.kept_added);
        assert_eq!(counts, (1, 1, 1, 1, 1));
        assert_eq!(
            change.prefixes().iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["192.0.2.1/32", "192.0.2.5/32"]
        );
        assert_eq!(answer.difference.len(), 2);
    }

    #[test]
    fn pruning_takes_what_was_added_by_hand() {
        let set = set(&[("192.0.2.3", "80", Origin::Config), ("192.0.2.4", "80", Origin::Added)]);
        let (change, answer) = change(&set, &[], true).unwrap();
        assert_eq!((change.removed.len(), answer.removed, answer.kept_of_config), (1, 1, 1));
    }

    #[test]
    fn a_contradiction_names_the_line() {
        let set = set(&[("192.0.2.1", "80", Origin::Config)]);
        let mut wanted = lines(&[("192.0.2.9", "80"), ("192.0.2.1", "80")]);
        std::sync::Arc::make_mut(&mut wanted[0].0.1).service = "web".parse().unwrap();
        let problem = difference(&set, &wanted, Origin::Applied, false, &mut Applied::default()).unwrap_err();
        assert!(problem.error.starts_with("line 2: "), "{}", problem.error);
    }

    #[test]
    fn a_service_that_goes_is_not_steered_to() {
        let set = set(&[("192.0.2.1", "80", Origin::Applied)]);
        let closed = ["default".parse().unwrap()];
        assert!(expect_unused(&set, &[], &Change::default()).is_ok());
        let problem = expect_unused(&set, &closed, &Change::default()).unwrap_err();
        assert!(problem.error.contains("a rule stays that steers to it"), "{}", problem.error);
        let (change, _) = change(&set, &[], false).unwrap();
        assert!(expect_unused(&set, &closed, &change).is_ok());
        // A rule that comes steers there too.
        assert!(expect_unused(&RuleSet::default(), &closed, &change.inverse()).is_err());
    }

    #[test]
    fn doubles_are_found() {
        assert!(has_no_double(&lines(&[("192.0.2.1", "80"), ("192.0.2.1", "443")])));
        assert!(!has_no_double(&lines(&[("192.0.2.1", "80"), ("192.0.2.1", "80")])));
    }
}
