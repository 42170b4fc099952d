//! Files of rules and services, in either form.

use std::{collections::HashSet, sync::Arc};

use serde::Deserialize;
use toml::Spanned;

use super::{
    InvalidText, Origin, Rule, RuleText, Terms,
    lines::{self, LineRule},
};
use crate::service::ServiceConfig;

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
    pub fn parse(text: &str, mut share: impl FnMut(Terms) -> Arc<Terms>) -> Result<Self, InvalidText> {
        let first = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
        if !first.is_some_and(|line| line.starts_with('[')) {
            return Ok(Self { services: None, rules: lines::parse(text, share)? });
        }
        let tables: Tables = toml::from_str(text).map_err(|error| InvalidText(error.to_string()))?;
        let mut rules = Vec::with_capacity(tables.rule.len());
        let mut line = Line { number: 1, offset: 0 };
        for table in tables.rule {
            let number = line.of(text, table.span().start);
            let Rule { prefix, terms, .. } = table.into_inner().into_rule(Origin::Applied);
            terms.validate(&prefix).map_err(|InvalidText(why)| InvalidText(format!("line {number}: {why}")))?;
            rules.push(((prefix, share(Arc::unwrap_or_clone(terms))), number));
        }
        Ok(Self { services: Some(services(tables.service, text)?), rules })
    }
}

/// Checks services and that no two have the same name.
pub(crate) fn services(tables: Vec<Spanned<ServiceConfig>>, text: &str) -> Result<Vec<ServiceConfig>, InvalidText> {
    let mut names = HashSet::new();
    let mut services = Vec::with_capacity(tables.len());
    let mut line = Line { number: 1, offset: 0 };
    for table in tables {
        let number = line.of(text, table.span().start);
        let service = table.into_inner();
        service.validate().map_err(|InvalidText(why)| InvalidText(format!("line {number}: {why}")))?;
        if !names.insert(service.name.clone()) {
            return Err(InvalidText(format!("line {number}: there is a second service {}", service.name)));
        }
        services.push(service);
    }
    Ok(services)
}

/// A place in a text, from which later ones are found.
#[derive(Debug)]
pub(crate) struct Line {
    number: u32,
    offset: usize,
}

impl Line {
    /// The number of the line in which an offset lies. Offsets have to ascend.
    fn of(&mut self, text: &str, offset: usize) -> u32 {
        let between = text.get(self.offset..offset).unwrap_or_default();
        let lines = between.bytes().filter(|byte| *byte == b'\n').count();
        self.number = self.number.saturating_add(u32::try_from(lines).unwrap_or(u32::MAX));
        self.offset = self.offset.max(offset);
        self.number
    }
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
            ("[[rule]]\nprefix = \"192.0.2.0/24\"\nports = \"\"\n", "line 1"),
            (
                "[[service]]\nname = \"a\"\nhandler = \"echo\"\n\n[[service]]\nname = \"a\"\nhandler = \"echo\"\n",
                "line 5",
            ),
            ("x\n", "line 1"),
        ] {
            let error = RuleFile::parse(text, Arc::new).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text:?}: {error}");
        }
    }
}
