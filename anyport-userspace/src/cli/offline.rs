//! `anyportctl --offline`: rules leave the state directory of a daemon that does not run, such as one that they keep from starting.

use std::{io, path::Path};

use serde::Serialize;

use super::{Output, show::count};
use crate::{
    api::{Problem, ProblemKind, RemovePrefixes},
    lock,
    privileges::act_as_owner_of,
    rules::{Origin, Rule, lines::RuleLine},
    store::{State, Store},
};

/// What was removed.
#[derive(Debug, Serialize)]
struct Removed {
    removed: Vec<String>,
    notes: Vec<String>,
}

/// Removes every rule that was added or applied and that the request selects, and says which.
///
/// # Errors
/// A daemon has the directory, the state can't be read or written, or a prefix has no such rule in it. Nothing has changed.
pub(super) fn remove_prefixes(directory: &Path, request: &RemovePrefixes, out: &mut Output<'_>) -> Result<(), Problem> {
    act_as_owner_of(directory).map_err(to_problem)?;
    let Some(_lock) = lock::lock_directory(directory).map_err(to_problem)? else {
        let error = format!("remove rules from {}: an anyportd is at work there", directory.display());
        return Err(Problem::new(ProblemKind::Conflict, error).hint("leave --offline out: it removes them itself"));
    };
    let (mut store, mut state) = Store::open(directory).map_err(to_problem)?;
    let removed = take_out(&mut state, request)?;
    let applied = removed.iter().find(|rule| rule.origins.contains(Origin::Applied));
    let line = |it: &Rule| format!("{}\n", RuleLine(&it.prefix, &it.terms));
    let lines = applied.map(|_| state.applied_rules.iter().map(line).collect::<Vec<_>>().concat());
    store.save(&state, lines.as_deref()).map_err(to_problem)?;
    let note = applied.map(|it| format!("{it} was applied from a file and comes back when that is applied again"));
    let answer =
        Removed { removed: removed.iter().map(ToString::to_string).collect(), notes: note.into_iter().collect() };
    out.print(&answer, |Removed { removed, notes }| {
        let rules = removed.iter().map(|rule| format!("\n  {rule}"));
        let notes = notes.iter().map(|note| format!("\nnote: {note}"));
        let lines: String = rules.chain(notes).collect();
        format!("removed {} from {}:{lines}", count(removed.len(), "rule"), directory.display())
    })
}

/// Takes the rules that are meant out of the state; each prefix must have one.
fn take_out(state: &mut State, request: &RemovePrefixes) -> Result<Vec<Rule>, Problem> {
    let is_meant = |rule: &mut Rule| request.prefixes.contains(&rule.prefix) && request.selects(&rule.terms);
    let mut removed: Vec<Rule> = state.rules.extract_if(.., is_meant).collect();
    removed.extend(state.applied_rules.extract_if(.., is_meant));
    let is_missing = |prefix: &_| removed.iter().all(|rule| rule.prefix != *prefix);
    let Some(missing) = request.prefixes.iter().find(|it| is_missing(it)) else { return Ok(removed) };
    let others = state.rules.iter().chain(&state.applied_rules).filter(|rule| rule.prefix == *missing);
    let others: Vec<String> = others.map(|rule| rule.terms.to_string()).collect();
    let hint = if others.is_empty() {
        "only what was added or applied is there; rules of the configuration are in its file".to_owned()
    } else {
        format!("its rules are: {}", others.join("; "))
    };
    Err(Problem::new(ProblemKind::NotFound, format!("{missing} has no such rule in the state directory")).hint(hint))
}

fn to_problem(error: anyhow::Error) -> Problem {
    let mut kinds = error.chain().filter_map(|it| it.downcast_ref::<io::Error>()).map(io::Error::kind);
    let known = kinds.find_map(|kind| match kind {
        io::ErrorKind::PermissionDenied => Some((ProblemKind::NotPermitted, "become root")),
        io::ErrorKind::NotFound => {
            Some((ProblemKind::NotFound, "--state-dir names the directory of the daemon's state"))
        }
        _ => None,
    });
    match known {
        Some((kind, hint)) => Problem::new(kind, format!("{error:#}")).hint(hint),
        None => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::take_out;
    use crate::{
        api::{ProblemKind, RemovePrefixes},
        rules::{Origin, RuleText},
        store::State,
    };

    #[test]
    fn takes_out_what_is_meant_or_nothing() {
        let rule = |text: &str, origin| serde_json::from_str::<RuleText>(text).unwrap().into_rule(origin);
        let kept = || State {
            rules: vec![
                rule(r#"{"prefix": "192.0.2.0/24", "ports": "80"}"#, Origin::Added),
                rule(r#"{"prefix": "192.0.2.0/24", "ports": "443"}"#, Origin::Added),
            ],
            applied_rules: vec![rule(r#"{"prefix": "192.0.2.0/24", "ports": "22"}"#, Origin::Applied)],
            ..State::default()
        };
        let take = |request: &str| {
            let (mut state, request) = (kept(), serde_json::from_str::<RemovePrefixes>(request).unwrap());
            let taken = take_out(&mut state, &request);
            taken.map(|taken| (taken.len(), state.rules.len(), state.applied_rules.len()))
        };
        assert_eq!(take(r#"{"prefixes": ["192.0.2.0/24"]}"#), Ok((3, 0, 0)));
        assert_eq!(take(r#"{"prefixes": ["192.0.2.0/24"], "ports": "443"}"#), Ok((1, 1, 1)));
        for (request, hint) in [
            (r#"{"prefixes": ["192.0.2.0/24", "192.0.2.0/25"]}"#, "was added or applied"),
            (r#"{"prefixes": ["192.0.2.0/24"], "protocol": "udp"}"#, "its rules are: tcp ports 80"),
        ] {
            let problem = take(request).unwrap_err();
            assert!(problem.kind == ProblemKind::NotFound && problem.hint.contains(hint), "{problem:?}");
        }
    }
}
