//! What is recorded of a command: its verb, what it is about, and what it has changed.

use crate::{
    api::{AddPrefixes, Applied, Changed, DrainView, Reloaded},
    rules::{Prefix, RuleSpec, ServiceName},
    text::list_of,
};

/// A command, as it is recorded.
#[derive(Debug)]
pub(super) struct Verb {
    /// As `anyportctl` calls it.
    pub(super) name: &'static str,
    /// What it is about; empty where the answer says it all.
    pub(super) subject: String,
}

impl Verb {
    pub(super) fn new(name: &'static str, subject: impl Into<String>) -> Self {
        Self { name, subject: subject.into() }
    }

    /// What has changed, in a line however much that is; nothing if it was so already.
    pub(super) fn what(&self, answer: &impl Done) -> Option<String> {
        let done = answer.done()?;
        let parts = [self.subject.as_str(), &done];
        Some(parts.into_iter().filter(|it| !it.is_empty()).collect::<Vec<_>>().join(": "))
    }
}

/// The rules that a request adds.
pub(super) fn rules(request: &AddPrefixes) -> String {
    let AddPrefixes { prefixes, protocol, ports, except, source, service, route, force: _ } = request.clone();
    format!("{} {}", list_of(&prefixes), RuleSpec { protocol, ports, except, source, service, route })
}

/// What a request drains, or serves again.
pub(super) fn scope(service: Option<&ServiceName>, prefixes: &[Prefix]) -> String {
    let service = service.map(|service| format!("service {service}"));
    let prefixes = (!prefixes.is_empty()).then(|| list_of(prefixes));
    let parts: Vec<String> = service.into_iter().chain(prefixes).collect();
    if parts.is_empty() { "the node".to_owned() } else { parts.join(", ") }
}

/// An answer that tells what has changed.
pub(super) trait Done {
    /// In words; nothing if nothing has changed.
    fn done(&self) -> Option<String>;
}

impl Done for Changed {
    fn done(&self) -> Option<String> {
        (self.changed > 0).then(|| format!("{} changed", self.changed))
    }
}

impl Done for Applied {
    fn done(&self) -> Option<String> {
        let Self { added, removed, services, confirm_within, .. } = self;
        let has_changed = !self.dry_run && added + removed + services.len() > 0;
        let confirm = confirm_within.map(|seconds| format!(", rolled back in {seconds} s unless it is confirmed"));
        has_changed.then(|| counts(*added, *removed, &[services]) + &confirm.unwrap_or_default())
    }
}

impl Done for Reloaded {
    fn done(&self) -> Option<String> {
        let Self { added, removed, services, settings, .. } = self;
        let has_changed = !self.dry_run && added + removed + services.len() + settings.len() > 0;
        has_changed.then(|| counts(*added, *removed, &[services, settings]))
    }
}

impl Done for Vec<DrainView> {
    fn done(&self) -> Option<String> {
        Some(String::new())
    }
}

fn counts(added: usize, removed: usize, others: &[&Vec<String>]) -> String {
    let first = [format!("{added} rules added"), format!("{removed} removed")];
    let others = others.iter().filter(|it| !it.is_empty()).map(|it| list_of(it));
    first.into_iter().chain(others).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::{Applied, Changed, Verb, rules, scope};

    #[test]
    fn a_change_is_one_line_however_much_it_is() {
        let request = serde_json::from_str(
            r#"{"prefixes": ["192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5"], "ports": "80"}"#,
        );
        let verb = Verb::new("add-prefix", rules(&request.unwrap()));
        let changed = |changed| Changed { generation: 1, changed, notes: Vec::new() };
        assert_eq!(
            verb.what(&changed(5)).unwrap(),
            "192.0.2.1/32, 192.0.2.2/32, 192.0.2.3/32 and 2 more tcp ports 80 -> default: 5 changed"
        );
        assert_eq!(verb.what(&changed(0)), None);
        let applied = |dry_run| Applied { dry_run, added: 7, services: vec!["+ web".into()], ..Applied::default() };
        let apply = Verb::new("apply", "");
        assert_eq!(apply.what(&applied(false)).unwrap(), "7 rules added, 0 removed, + web");
        assert_eq!(apply.what(&applied(true)), None);
        assert_eq!(scope(None, &[]), "the node");
        assert_eq!(scope(Some(&"web".parse().unwrap()), &["::/0".parse().unwrap()]), "service web, ::/0");
    }
}
