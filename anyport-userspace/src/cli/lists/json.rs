//! JSON in which prefixes stand anywhere, as clouds publish theirs.

use std::{collections::BTreeSet, str::FromStr};

use serde_json::Value;

use super::{Mistake, lines};
use crate::{
    rules::{InvalidText, Prefix},
    text::{excerpt, remark},
};

/// What an object must have for the prefixes within it to count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selector {
    key: String,
    value: String,
}

impl FromStr for Selector {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Self { key: key.to_owned(), value: value.to_owned() }),
            _ => Err(InvalidText(format!("{}: use KEY=VALUE, such as region=eu-west-1", excerpt(text)))),
        }
    }
}

/// All texts that are prefixes or addresses, in objects that have what is selected, each once.
pub(super) fn prefixes(text: &str, select: &[Selector]) -> Result<String, Vec<Mistake>> {
    let at = |line, column, why| vec![Mistake { line, column, why }];
    let value: Value = serde_json::from_str(text)
        .map_err(|error| at(error.line().max(1), error.column().max(1), remark(&error.to_string())))?;
    let mut found = BTreeSet::new();
    collect(&value, select, &mut vec![false; select.len()], &mut found);
    if found.is_empty() {
        let what = if select.is_empty() { "no prefixes in it" } else { "no prefixes in what --select names" };
        return Err(at(1, 1, format!("there are {what}")));
    }
    let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
    Ok(lines.join("\n") + "\n")
}

/// `met` says which selectors an object around the value meets.
fn collect(value: &Value, select: &[Selector], met: &mut Vec<bool>, found: &mut BTreeSet<Prefix>) {
    match value {
        // Other texts stand there too: names, times, versions.
        Value::String(text) if met.iter().all(|it| *it) && text.contains(['.', ':']) => {
            found.extend(lines::prefix(text));
        }
        Value::Array(values) => values.iter().for_each(|it| collect(it, select, met, found)),
        Value::Object(fields) => {
            let before = met.clone();
            for (selector, met) in select.iter().zip(met.iter_mut()) {
                *met |= fields.get(&selector.key).is_some_and(|it| is(it, &selector.value));
            }
            fields.values().for_each(|it| collect(it, select, met, found));
            *met = before;
        }
        _ => {}
    }
}

fn is(value: &Value, wanted: &str) -> bool {
    match value {
        Value::String(text) => text == wanted,
        Value::Number(number) => number.to_string() == wanted,
        Value::Bool(flag) => flag.to_string() == wanted,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{Selector, prefixes};

    fn select(all: &[&str]) -> Vec<Selector> {
        all.iter().map(|it| it.parse().unwrap()).collect()
    }

    #[test]
    fn prefixes_of_clouds_are_found() {
        let amazon = r#"{"syncToken": "1", "createDate": "2026-01-01-00-00-00", "prefixes": [
            {"ip_prefix": "192.0.2.0/25", "region": "a", "service": "S3"},
            {"ip_prefix": "192.0.2.128/25", "region": "b", "service": "S3"}],
            "ipv6_prefixes": [{"ipv6_prefix": "2001:db8::/40", "region": "a", "service": "EC2"}]}"#;
        let microsoft = r#"{"values": [{"name": "Storage", "properties": {"region": "", "addressPrefixes":
            ["198.51.100.0/25", "2001:db8:1::/48"]}}, {"name": "Other", "properties": {"addressPrefixes": ["203.0.113.0/24"]}}]}"#;
        for (text, selected, rules) in [
            ("[\"192.0.2.0/24\", \"192.0.2.0/24\", \"2001:db8::1\"]", &[][..], "192.0.2.0/24\n2001:db8::1/128\n"),
            (amazon, &["region=a"][..], "192.0.2.0/25\n2001:db8::/40\n"),
            (amazon, &["region=a", "service=S3"], "192.0.2.0/25\n"),
            (microsoft, &["name=Storage"], "198.51.100.0/25\n2001:db8:1::/48\n"),
        ] {
            assert_eq!(prefixes(text, &select(selected)).as_deref(), Ok(rules), "{selected:?}");
        }
    }

    #[test]
    fn what_can_not_be_read_has_a_place() {
        let mistake = &prefixes("[\n  \"192.0.2.0/24\",\n  x]", &[]).unwrap_err()[0];
        assert_eq!((mistake.line, mistake.column), (3, 3));
        for (text, select, why) in [
            ("{\"a\": 1}", &[][..], "no prefixes in it"),
            ("[\"192.0.2.0/24\"]", &select(&["region=a"])[..], "--select"),
        ] {
            assert!(prefixes(text, select).unwrap_err()[0].why.contains(why));
        }
        assert!("region".parse::<Selector>().is_err());
    }
}
