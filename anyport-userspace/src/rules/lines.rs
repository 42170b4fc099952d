//! The line-oriented form of large rule sets: one rule a line,
//! `PREFIX [PROTOCOL] [PORTS] [except=PORTS] [source=CIDR] [service=NAME] [route=no]`; `#` starts a comment.

use std::{collections::HashMap, fmt, panic::resume_unwind, sync::Arc, thread};

use super::{InvalidText, PortSet, Prefix, Protocol, RuleSpec};

/// How many mistakes are reported at once.
const MAX_REPORTED: usize = 10;

/// A rule as a line says it.
pub type LineRule = (Prefix, Arc<RuleSpec>);

/// Lines that are worth a thread of their own.
const PORTION: usize = 1 << 20;

/// Reads rules, each with the number of its line, from 1 on; in order of precedence, or nearly so. `share` returns one
/// shared rule spec for rules whose specs are equal.
///
/// # Errors
/// Lines that make no sense: says where and why, of the first few.
pub fn parse(
    text: &str,
    mut share: impl FnMut(RuleSpec) -> Arc<RuleSpec>,
) -> Result<Vec<(LineRule, u32)>, InvalidText> {
    let read: Vec<Portion<'_>> = match portions(text)[..] {
        [all] => vec![Portion::read(all)],
        ref portions => thread::scope(|scope| {
            let threads: Vec<_> = portions.iter().map(|text| scope.spawn(|| Portion::read(text))).collect();
            threads.into_iter().map(|it| it.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        }),
    };
    let mut rules = Vec::with_capacity(read.iter().map(|it| it.rules.len()).sum());
    let mut mistakes = Vec::new();
    let mut before = 0;
    let mut shared: HashMap<&str, Arc<RuleSpec>> = HashMap::new();
    for Portion { rules: read, terms, mistakes: wrong, lines } in read {
        let terms: Vec<Arc<RuleSpec>> = terms
            .into_iter()
            .map(|(tail, terms)| Arc::clone(shared.entry(tail).or_insert_with(|| share(terms))))
            .collect();
        rules.extend(
            read.into_iter().map(|(prefix, at, line)| ((prefix, Arc::clone(&terms[at as usize])), before + line)),
        );
        mistakes.extend(wrong.into_iter().map(|(line, why)| format!("line {}: {why}", before + line)));
        before += lines;
    }
    expect_none(mistakes)?;
    Ok(rules)
}

/// Refuses a file with mistakes, and reports the first few.
pub(crate) fn expect_none(mut mistakes: Vec<String>) -> Result<(), InvalidText> {
    if mistakes.is_empty() {
        return Ok(());
    }
    if mistakes.len() > MAX_REPORTED {
        mistakes.truncate(MAX_REPORTED);
        mistakes.push("and more".into());
    }
    Err(InvalidText(mistakes.join("; ")))
}

/// Cuts a text between lines, so that each processor has a part of it.
fn portions(text: &str) -> Vec<&str> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(text.len() / PORTION + 1);
    let mut portions = Vec::new();
    let mut rest = text;
    for left in (1..=threads).rev() {
        let end = rest.as_bytes()[rest.len() / left..].iter().position(|byte| *byte == b'\n');
        let at = end.map_or(rest.len(), |end| rest.len() / left + end + 1);
        let (portion, behind) = rest.split_at(at);
        portions.push(portion);
        rest = behind;
    }
    portions
}

/// What some lines say.
#[derive(Default)]
struct Portion<'a> {
    /// Prefixes, each with the place of its rule spec and the number of its line in the portion.
    rules: Vec<(Prefix, u32, u32)>,
    /// As they are written, each once.
    terms: Vec<(&'a str, RuleSpec)>,
    mistakes: Vec<(u32, String)>,
    lines: u32,
}

impl<'a> Portion<'a> {
    fn read(text: &'a str) -> Self {
        let mut portion = Self { rules: Vec::with_capacity(text.len() / 24), ..Self::default() };
        let mut known: HashMap<&str, u32> = HashMap::new();
        let mut last = ("", u32::MAX);
        for line in text.lines() {
            portion.lines += 1;
            let rule = line.split('#').next().unwrap_or_default().trim();
            if rule.is_empty() || portion.mistakes.len() > MAX_REPORTED {
                continue;
            }
            let (prefix, tail) = rule.split_once(|it: char| it.is_ascii_whitespace()).unwrap_or((rule, ""));
            // Most lines end as the previous one.
            let place =
                if last.1 != u32::MAX && last.0 == tail { Ok(last.1) } else { portion.place_of(tail, &mut known) };
            let read = place.and_then(|place| {
                let prefix: Prefix = prefix.parse()?;
                portion.terms[place as usize].1.validate(&prefix)?;
                Ok((prefix, place))
            });
            match read {
                Ok((prefix, place)) => {
                    last = (tail, place);
                    portion.rules.push((prefix, place, portion.lines));
                }
                Err(InvalidText(why)) => portion.mistakes.push((portion.lines, why)),
            }
        }
        // Sorted here, on a thread of its own, so that the whole is sorted sooner.
        if !portion.rules.is_sorted_by_key(|(prefix, ..)| *prefix) {
            portion.rules.sort_by_key(|(prefix, ..)| *prefix);
        }
        portion
    }

    fn place_of(&mut self, tail: &'a str, known: &mut HashMap<&'a str, u32>) -> Result<u32, InvalidText> {
        if let Some(place) = known.get(tail) {
            return Ok(*place);
        }
        let place =
            u32::try_from(self.terms.len()).map_err(|_| InvalidText("there are too many kinds of rules".into()))?;
        self.terms.push((tail, terms(tail)?));
        known.insert(tail, place);
        Ok(place)
    }
}

/// What follows the prefix.
fn terms(text: &str) -> Result<RuleSpec, InvalidText> {
    let mut terms = RuleSpec::default();
    let (mut has_protocol, mut has_ports) = (false, false);
    for word in text.split_ascii_whitespace() {
        match word.split_once('=') {
            Some(("except", ports)) => terms.except = ports.parse()?,
            Some(("source", source)) => terms.source = Some(source.parse()?),
            Some(("service", name)) => terms.service = name.parse()?,
            Some(("route", "yes")) => terms.route = true,
            Some(("route", "no")) => terms.route = false,
            None if word.starts_with(|it: char| it.is_ascii_digit()) && !has_ports => {
                terms.ports = word.parse::<PortSet>()?;
                has_ports = true;
            }
            None if !has_protocol && !has_ports => {
                terms.protocol = protocol(word)?;
                has_protocol = true;
            }
            _ => return Err(unknown(word)),
        }
    }
    Ok(terms)
}

fn protocol(word: &str) -> Result<Protocol, InvalidText> {
    let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Both];
    protocols.into_iter().find(|it| it.to_string() == word).ok_or_else(|| unknown(word))
}

fn unknown(word: &str) -> InvalidText {
    InvalidText(format!(
        "{word:?} is not understood; a line is PREFIX [tcp|udp|both] [PORTS] [except=PORTS] [source=CIDR] \
         [service=NAME] [route=no]"
    ))
}

/// Writes a rule as a line.
#[derive(Debug)]
pub struct RuleLine<'a>(pub &'a Prefix, pub &'a RuleSpec);

impl fmt::Display for RuleLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(prefix, RuleSpec { protocol, ports, except, source, service, route }) = self;
        write!(f, "{prefix} {protocol} {ports}")?;
        if !except.is_empty() {
            write!(f, " except={except}")?;
        }
        if let Some(source) = source {
            write!(f, " source={source}")?;
        }
        write!(f, " service={service}")?;
        if !route {
            write!(f, " route=no")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::{RuleLine, parse};
    use crate::rules::tests::arbitrary::rule;

    #[test]
    fn reads_what_people_write() {
        let text = "# all of it\n192.0.2.0/24\n\n 192.0.2.0/24\tudp  53,123 # some\n\
                    2001:db8::/32 both except=22 source=2001:db8:1::/48 service=a route=no\n192.0.2.7 80\r\n";
        let rules = parse(text, Arc::new).unwrap();
        let lines: Vec<_> =
            rules.iter().map(|((prefix, terms), line)| format!("{line}: {}", RuleLine(prefix, terms))).collect();
        assert_eq!(
            lines,
            [
                // Sorted, as the longest prefix comes first.
                "6: 192.0.2.7/32 tcp 80 service=default",
                "2: 192.0.2.0/24 tcp 1-65535 service=default",
                "4: 192.0.2.0/24 udp 53,123 service=default",
                "5: 2001:db8::/32 both 1-65535 except=22 source=2001:db8:1::/48 service=a route=no",
            ]
        );
    }

    #[test]
    fn says_where_and_what() {
        for (text, wanted) in [
            ("192.0.2.1/24", "line 1: prefix \"192.0.2.1/24\": has bits set"),
            ("\n192.0.2.0/24 sctp", "line 2: \"sctp\" is not understood"),
            ("192.0.2.0/24 80 tcp", "\"tcp\" is not understood"),
            ("192.0.2.0/24 80 81", "\"81\" is not understood"),
            ("192.0.2.0/24 port=80", "\"port=80\" is not understood"),
            ("192.0.2.0/24 0", "not a port"),
            ("192.0.2.0/24 service=X", "lower-case"),
            ("192.0.2.0/24 source=2001:db8::/32", "same IP version"),
            ("192.0.2.0/24 route=maybe", "not understood"),
        ] {
            let error = parse(text, Arc::new).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text:?}: {error}");
        }
        let many = parse(&"x\n".repeat(100), Arc::new).unwrap_err().to_string();
        assert!(many.contains("line 10:") && many.ends_with("and more"), "{many}");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(rule in rule()) {
            let line = RuleLine(&rule.prefix, &rule.terms).to_string();
            let read = parse(&line, Arc::new).unwrap();
            prop_assert_eq!(&read[0].0, &(rule.prefix, rule.terms));
        }
    }
}
