//! Files of rules and services, in either form.

use std::{collections::HashSet, sync::Arc};

use serde::Deserialize;
use toml::Spanned;

use crate::{
    rules::{
        InvalidText, Origin, Rule, RuleSpec, RuleText,
        lines::{self, LineRule},
    },
    service::ServiceConfig,
    text::{Position, Positions, from_toml},
};

/// What a file says.
#[derive(Debug)]
pub struct RuleFile {
    /// The services, unless the form of the file has none.
    pub services: Option<Vec<ServiceConfig>>,
    /// The rules, each with the number of its line.
    pub rules: Vec<(LineRule, u32)>,
}

/// `[[service]]` and `[[rule]]`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Tables {
    service: Vec<Spanned<ServiceConfig>>,
    rule: Vec<Spanned<RuleText>>,
}

impl RuleFile {
    /// Reads TOML, which begins with a table, or lines. `share` is that of [`lines::parse`].
    ///
    /// # Errors
    /// Something in it is wrong: says where and what.
    pub fn parse(text: &str, mut share: impl FnMut(RuleSpec) -> Arc<RuleSpec>) -> Result<Self, InvalidText> {
        let first = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
        if !first.is_some_and(|line| line.starts_with('[')) {
            return Ok(Self { services: None, rules: lines::parse(text, share)? });
        }
        let tables: Tables = from_toml(text).map_err(InvalidText)?;
        let mut problems = Vec::new();
        let services = services(tables.service, text, &mut problems);
        let mut rules = Vec::with_capacity(tables.rule.len());
        let mut places = Positions::of(text);
        for table in tables.rule {
            let place = places.at(table.span().start);
            let Rule { prefix, terms, .. } = table.into_inner().into_rule(Origin::Applied);
            match terms.validate(&prefix) {
                Ok(()) => rules.push(((prefix, share(Arc::unwrap_or_clone(terms))), place.line)),
                Err(error) => problems.push(format!("{place}: {error}")),
            }
        }
        lines::expect_none(problems)?;
        Ok(Self { services: Some(services.into_iter().map(|(_, service)| service).collect()), rules })
    }
}

/// Services, each with its place. What is wrong with them is added to the problems, as is a second one of a name, which is left out.
pub(crate) fn services(
    tables: Vec<Spanned<ServiceConfig>>,
    text: &str,
    problems: &mut Vec<String>,
) -> Vec<(Position, ServiceConfig)> {
    let mut names = HashSet::new();
    let mut services = Vec::with_capacity(tables.len());
    let mut places = Positions::of(text);
    for table in tables {
        let place = places.at(table.span().start);
        let service = table.into_inner();
        if let Err(error) = service.validate() {
            problems.push(format!("{place}: {error}"));
        }
        if names.insert(service.name.clone()) {
            services.push((place, service));
        } else {
            problems.push(format!("{place}: there is a second service {}", service.name));
        }
    }
    services
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::RuleFile;

    #[test]
    fn reads_both_forms() {
        let toml = "# c\n\n[[service]]\nname = \"a\"\nhandler = \"echo\"\n\n[[rule]]\nprefix = \"192.0.2.0/24\"\n\
                    \n[[rule]]\nprefix = \"2001:db8::/32\"\nservice = \"a\"\n";
        let file = RuleFile::parse(toml, Arc::new).unwrap();
        assert_eq!(file.services.unwrap().len(), 1);
        assert_eq!(file.rules.iter().map(|(_, line)| *line).collect::<Vec<_>>(), [7, 10]);
        let lines = RuleFile::parse("# c\n192.0.2.0/24\n", Arc::new).unwrap();
        assert!(lines.services.is_none() && lines.rules.len() == 1);
        assert!(RuleFile::parse("", Arc::new).unwrap().rules.is_empty());
    }

    #[test]
    fn says_where_and_what() {
        for (text, wanted) in [
            ("[daemon]\nworkers = 1\n", "daemon"),
            ("[[rule]]\nprefix = \"192.0.2.1/24\"\n", "has bits set"),
            ("[[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"\"\n", "line 1, column 1"),
            (
                "[[service]]\nname = \"a\"\nhandler = \"echo\"\n\n[[service]]\nname = \"a\"\nhandler = \"echo\"\n",
                "line 5, column 1",
            ),
            ("x\n", "line 1"),
            (
                "[[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"\"\n[[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"\"\n",
                "line 4, column 1",
            ),
        ] {
            let error = RuleFile::parse(text, Arc::new).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text:?}: {error}");
        }
    }
}
