//! A rule a line, with the liberties that published lists take: ranges, netmasks, comments behind `;`, brackets, capitals.

use std::net::IpAddr;

use super::{Mistake, no_address};
use crate::rules::Prefix;

/// Mistakes that are looked for; the rest of the file may be of another kind.
const MOST: usize = 100;

/// Makes each line one that the daemon reads; a range becomes several. Files of tables stay as they are.
pub(super) fn normalize(text: String) -> Result<String, Vec<Mistake>> {
    let first = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
    // A table, and no address in brackets.
    let is_table = |line: &str| line.starts_with('[') && !line.contains(':');
    if first.is_some_and(is_table) || text.lines().all(is_plain) {
        return Ok(text);
    }
    let mut normal = String::with_capacity(text.len());
    let mut mistakes = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        match rules(line) {
            Ok(rules) => {
                normal.push_str(&rules.join("\n"));
                normal.push('\n');
            }
            Err((offset, why)) => {
                mistakes.push(Mistake { line: number, column: line[..offset].chars().count() + 1, why });
                if mistakes.len() == MOST {
                    break;
                }
            }
        }
    }
    if mistakes.is_empty() { Ok(normal) } else { Err(mistakes) }
}

/// Whether the daemon is to look at a line as it is, and complain about it if need be.
fn is_plain(line: &str) -> bool {
    let line = line.split('#').next().unwrap_or_default().trim();
    let mut words = line.split_ascii_whitespace();
    let prefix = words.next().unwrap_or_default();
    let is_second_of_list = |word: &str| word == "-" || netmask(word).is_some() || word == "to";
    !line.contains(';')
        && !prefix.contains(['-', '[', '%'])
        && !words.next().is_some_and(is_second_of_list)
        && !line.bytes().any(|it| it.is_ascii_uppercase())
}

/// The rules of a line; where it is wrong, the offset and why.
fn rules(line: &str) -> Result<Vec<String>, (usize, String)> {
    let content = line.split(['#', ';']).next().unwrap_or_default();
    let words: Vec<&str> = content.split_ascii_whitespace().collect();
    let offset = |word: &str| word.as_ptr() as usize - line.as_ptr() as usize;
    let at = |word: &str| {
        let start = offset(word);
        move |why: String| (start, why)
    };
    let (prefixes, rest) = match words.as_slice() {
        [] => return Ok(vec![String::new()]),
        [first, "-" | "to", last, rest @ ..] => (range(first, last).map_err(at(first))?, rest),
        [address, mask, rest @ ..] if netmask(mask).is_some() => {
            let length = netmask(mask).unwrap_or_default();
            (vec![prefix(&format!("{address}/{length}")).map_err(at(address))?], rest)
        }
        [word, rest @ ..] => match word.split_once('-') {
            Some((first, last)) => (range(first, last).map_err(at(word))?, rest),
            None => (vec![prefix(word).map_err(at(word))?], rest),
        },
    };
    // Capitals of protocols and names of settings; names of services have none.
    let rest = rest.join(" ").to_ascii_lowercase();
    Ok(prefixes.iter().map(|prefix| format!("{prefix} {rest}").trim_end().to_owned()).collect())
}

/// The length of a netmask of IPv4, such as 255.255.255.0.
fn netmask(word: &str) -> Option<u32> {
    let mask = u32::from(word.parse::<std::net::Ipv4Addr>().ok()?);
    let length = mask.leading_ones();
    (length > 0 && mask.count_ones() == length).then_some(length)
}

/// A prefix, also in brackets.
pub(super) fn prefix(text: &str) -> Result<Prefix, String> {
    let plain = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, length)) => format!("{address}{length}"),
        None => text.to_owned(),
    };
    let is_address = plain.split('/').next().is_some_and(|it| it.parse::<IpAddr>().is_ok());
    if !is_address {
        return Err(no_address(text));
    }
    plain.parse::<Prefix>().map_err(|error| error.to_string())
}

/// The fewest prefixes that have the addresses from the first to the last, both included.
pub(super) fn range(first: &str, last: &str) -> Result<Vec<Prefix>, String> {
    let address = |text: &str| {
        let text = text.trim().trim_start_matches('[').trim_end_matches(']');
        text.parse::<IpAddr>().map_err(|_| no_address(text))
    };
    let (first, last) = (address(first)?, address(last)?);
    if first.is_ipv4() != last.is_ipv4() {
        return Err(format!("the range {first} - {last} is of two IP versions"));
    }
    let (is_ipv4, number) = (first.is_ipv4(), |address| Prefix::host(address).bounds().0);
    let (mut from, to, width) = (number(first), number(last), if is_ipv4 { 32 } else { 128 });
    if from > to {
        return Err(format!("the range {first} - {last} ends before it begins"));
    }
    let mut prefixes = Vec::new();
    loop {
        // As large as the alignment of its beginning and what is left allow.
        let aligned = from.trailing_zeros().min(width);
        let left = (to - from).checked_add(1).map_or(128, |count| count.ilog2());
        let bits = aligned.min(left);
        prefixes.push(Prefix::from_bits(is_ipv4, from, u8::try_from(width - bits).unwrap_or(u8::MAX)));
        let next = 1_u128.checked_shl(bits).and_then(|step| from.checked_add(step));
        match next.filter(|next| *next <= to) {
            Some(next) => from = next,
            None => return Ok(prefixes),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{normalize, range};

    #[test]
    fn liberties_are_taken() {
        for (text, rules) in [
            ("192.0.2.0 - 192.0.2.255\n", "192.0.2.0/24\n"),
            ("192.0.2.1-192.0.2.4 tcp 80\n", "192.0.2.1/32 tcp 80\n192.0.2.2/31 tcp 80\n192.0.2.4/32 tcp 80\n"),
            ("192.0.2.0 255.255.255.128 # a\n", "192.0.2.0/25\n"),
            ("1.10.16.0/20 ; SBL256894\n; a comment\n", "1.10.16.0/20\n\n"),
            ("[2001:db8::1]\n[2001:db8:1::]/48 TCP\n", "2001:db8::1/128\n2001:db8:1::/48 tcp\n"),
            ("2001:DB8:: - 2001:db8::ffff:ffff:ffff:ffff\n", "2001:db8::/64\n"),
            // What needs nothing stays as it is.
            ("192.0.2.0/24 udp 53 # x\n\n", "192.0.2.0/24 udp 53 # x\n\n"),
            ("[[rule]]\nprefix = \"192.0.2.0/24\"\n", "[[rule]]\nprefix = \"192.0.2.0/24\"\n"),
            ("nonsense\n", "nonsense\n"),
        ] {
            assert_eq!(normalize(text.into()).as_deref(), Ok(rules), "{text:?}");
        }
    }

    #[test]
    fn mistakes_are_placed() {
        for (text, line, column, why) in [
            ("192.0.2.9 - 192.0.2.1\n", 1, 1, "ends before it begins"),
            ("192.0.2.0/24\n  192.0.2.1-2001:db8::1\n", 2, 3, "two IP versions"),
            ("192.0.2.1 255.255.255.0\n", 1, 1, "has bits set"),
            ("fe80::1%eth0\n", 1, 1, "leave the zone"),
            ("192.0.2.0/24;\nExample.org\n", 2, 1, "not looked up"),
        ] {
            let mistakes = normalize(text.into()).unwrap_err();
            let first = &mistakes[0];
            assert_eq!((first.line, first.column), (line, column), "{text:?}: {first:?}");
            assert!(first.why.contains(why), "{text:?}: {first:?}");
        }
    }

    proptest! {
        #[test]
        fn a_range_has_its_addresses_and_no_others(first: u32, length in 0_u32..70_000) {
            let last = first.saturating_add(length);
            let text = |it: u32| std::net::Ipv4Addr::from(it).to_string();
            let prefixes = range(&text(first), &text(last)).unwrap();
            let mut next = u128::from(first);
            for prefix in &prefixes {
                let [from, to] = [prefix.bounds().0, prefix.bounds().1];
                prop_assert_eq!(from, next);
                next = to + 1;
            }
            prop_assert_eq!(next, u128::from(last) + 1);
            prop_assert!(prefixes.len() <= 62);
        }
    }
}
