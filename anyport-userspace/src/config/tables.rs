//! `[[service]]` and `[[rule]]` of the configuration file.

use toml::Spanned;

use crate::{
    rule_file,
    rules::{Origin, RuleSet, RuleText, ServiceName},
    service::{HandlerKind, ServiceConfig},
    text::Positions,
};

/// The services, and what is wrong with them and their fallbacks.
pub(super) fn services(
    tables: Vec<Spanned<ServiceConfig>>,
    text: &str,
    problems: &mut Vec<String>,
) -> Vec<ServiceConfig> {
    let placed = rule_file::services(tables, text, problems);
    for (at, service) in &placed {
        let Some(fallback) = &service.fallback else { continue };
        match placed.iter().find(|(_, other)| other.name == *fallback) {
            Some((_, other)) if other.handler == HandlerKind::Registered => {
                problems.push(format!("{at}: the fallback {fallback} has the handler registered itself"));
            }
            None if *fallback != ServiceName::default_service() => {
                problems.push(format!("{at}: there is no [[service]] with the name {fallback} for a fallback"));
            }
            _ => {}
        }
    }
    placed.into_iter().map(|(_, service)| service).collect()
}

/// Those that are right; what is wrong with the others is added to the problems.
pub(super) fn rules(
    tables: Vec<Spanned<RuleText>>,
    services: &[ServiceConfig],
    text: &str,
    problems: &mut Vec<String>,
) -> RuleSet {
    let mut rules = RuleSet::default();
    let mut places = Positions::of(text);
    for table in tables {
        let at = places.at(table.span().start);
        let rule = table.into_inner().into_rule(Origin::Config);
        let service = &rule.terms.service;
        if let Err(error) = rule.terms.validate(&rule.prefix) {
            problems.push(format!("{at}: {error}"));
        } else if *service != ServiceName::default_service() && services.iter().all(|it| it.name != *service) {
            problems.push(format!("{at}: there is no [[service]] with the name {service}"));
        } else if let Err(conflict) = rules.insert(&rule) {
            problems.push(format!("{at}: {conflict}"));
        }
    }
    rules
}
