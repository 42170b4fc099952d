//! Lists as other tools show their own: ipset, nft and ip route.

use super::{Mistake, lines};
use crate::{rules::Prefix, text::excerpt};

/// A rule a line, and what there is to say of what was left out.
type Converted = Result<(String, Option<String>), Vec<Mistake>>;

/// Prefixes that were found, and mistakes.
#[derive(Default)]
struct Found {
    rules: String,
    mistakes: Vec<Mistake>,
}

impl Found {
    /// A prefix, an address or a range, at a place of the text.
    fn element(&mut self, line: usize, of: &str, word: &str) {
        let found = match word.split_once('-') {
            Some((first, last)) => lines::range(first, last),
            None => lines::prefix(word).map(|prefix| vec![prefix]),
        };
        match found {
            Ok(prefixes) => self.take(&prefixes),
            Err(why) => self.wrong(line, of, word, why),
        }
    }

    fn take(&mut self, prefixes: &[Prefix]) {
        self.rules.extend(prefixes.iter().map(|prefix| format!("{prefix}\n")));
    }

    fn wrong(&mut self, line: usize, of: &str, word: &str, why: String) {
        let offset = (word.as_ptr() as usize).saturating_sub(of.as_ptr() as usize);
        let column = of.get(..offset).map_or(1, |before| before.chars().count() + 1);
        self.mistakes.push(Mistake { line, column, why });
    }

    fn done(self, skipped: Option<String>) -> Converted {
        if self.mistakes.is_empty() { Ok((self.rules, skipped)) } else { Err(self.mistakes) }
    }
}

/// `ipset save`: `create` lines, and a line `add SET ELEMENT …` for each element.
pub(super) fn ipset(text: &str) -> Converted {
    let mut found = Found::default();
    for (number, line) in (1..).zip(text.lines()) {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words.as_slice() {
            [] | ["create" | "#" | "COMMIT", ..] => {}
            [first, ..] if first.starts_with('#') => {}
            ["add", _, element, rest @ ..] if rest.contains(&"nomatch") => {
                found.wrong(
                    number,
                    line,
                    element,
                    "nomatch takes addresses out of the set; leave that to --except or a rule".into(),
                );
            }
            ["add", _, element, ..] if element.contains(',') => {
                let why = "the set has more than addresses; hash:net and hash:ip can be read".to_owned();
                found.wrong(number, line, element, why);
            }
            ["add", _, element, ..] => found.element(number, line, element),
            [first, ..] => found.wrong(number, line, first, format!("{} is no line of ipset save", excerpt(first))),
        }
    }
    found.done(None)
}

/// A set or a table as `nft list` shows it: what stands in `elements = { … }`, of all sets.
pub(super) fn nft(text: &str) -> Converted {
    let mut found = Found::default();
    let mut is_within = false;
    for (number, line) in (1..).zip(text.lines()) {
        let mut rest = line;
        if !is_within {
            let Some((_, behind)) = line.split_once("elements") else { continue };
            let Some((_, behind)) = behind.split_once('{') else { continue };
            (rest, is_within) = (behind, true);
        }
        if let Some((before, _)) = rest.split_once('}') {
            (rest, is_within) = (before, false);
        }
        for element in rest.split(',') {
            let mut words = element.split_ascii_whitespace();
            let Some(word) = words.next() else { continue };
            if words.next() == Some(".") {
                found.wrong(
                    number,
                    line,
                    word,
                    "the set has more than addresses; one of addresses alone can be read".into(),
                );
            } else {
                found.element(number, line, word);
            }
        }
    }
    if found.rules.is_empty() && found.mistakes.is_empty() {
        found.wrong(1, text, text, "there are no elements = { … } in it".into());
    }
    found.done(None)
}

/// `ip route show`: the destinations, without the default route and those of the host itself.
pub(super) fn routes(text: &str) -> Converted {
    let (mut found, mut skipped) = (Found::default(), 0);
    for (number, line) in (1..).zip(text.lines()) {
        // What begins with blanks goes on with a route.
        if line.starts_with([' ', '\t']) {
            continue;
        }
        let mut words = line.split_ascii_whitespace();
        let destination = match words.next() {
            None => continue,
            Some("local" | "broadcast" | "anycast" | "multicast" | "default") => None,
            Some("unicast" | "blackhole" | "unreachable" | "prohibit" | "throw") => words.next(),
            first => first,
        };
        match destination {
            None | Some("default") => skipped += 1,
            Some(word) => found.element(number, line, word),
        }
    }
    let note = format!("{skipped} routes were left out: the default route, and those to the host itself");
    found.done((skipped > 0).then_some(note))
}

#[cfg(test)]
mod tests {
    use super::{Converted, ipset, nft, routes};

    fn rules(converted: Converted) -> String {
        converted.unwrap().0
    }

    #[test]
    fn what_ipset_saves() {
        let text = "create x hash:net family inet hashsize 1024 maxelem 65536\nadd x 192.0.2.0/25\nadd x 192.0.2.200 timeout 7\n\
                    add x 198.51.100.0-198.51.100.3\n";
        assert_eq!(rules(ipset(text)), "192.0.2.0/25\n192.0.2.200/32\n198.51.100.0/30\n");
        for (text, why) in [
            ("add x 192.0.2.1 nomatch\n", "--except"),
            ("add x 192.0.2.1,tcp:80\n", "more than addresses"),
            ("swap x y\n", "no line of ipset save"),
        ] {
            assert!(ipset(text).unwrap_err()[0].why.contains(why), "{text}");
        }
    }

    #[test]
    fn what_nft_lists() {
        let text = "table ip filter {\n\tset x {\n\t\ttype ipv4_addr\n\t\tflags interval\n\t\telements = { 192.0.2.0/25,\n\t\t\t     192.0.2.130-192.0.2.131 timeout 1h expires 3s, 198.51.100.7 comment \"a\" }\n\t}\n}\n";
        assert_eq!(rules(nft(text)), "192.0.2.0/25\n192.0.2.130/31\n198.51.100.7/32\n");
        assert_eq!(rules(nft("elements = { 2001:db8::/32 }")), "2001:db8::/32\n");
        assert!(nft("table ip x {\n}\n").unwrap_err()[0].why.contains("no elements"));
        let mistake = &nft("elements = { 192.0.2.1 . 80 }").unwrap_err()[0];
        assert_eq!((mistake.line, mistake.column), (1, 14));
    }

    #[test]
    fn what_ip_route_shows() {
        let text = "default via 198.51.100.1 dev eth0\n192.0.2.0/24 via 198.51.100.1 dev eth0 proto bgp metric 20\n\
                    blackhole 198.51.100.128/25 proto static\nlocal 203.0.113.1 dev lo\n2001:db8::/32 proto bgp\n\
                    \tnexthop via fe80::1 dev eth0\n203.0.113.9 dev eth0\n";
        let (rules, note) = routes(text).unwrap();
        assert_eq!(rules, "192.0.2.0/24\n198.51.100.128/25\n2001:db8::/32\n203.0.113.9/32\n");
        assert!(note.unwrap().starts_with("2 routes were left out"));
    }
}
