//! What several verbs need for printing.

use super::tone::apart;

/// How long something has been so, in its two largest units.
pub(super) fn ago(seconds: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let mut left = seconds;
    let parts: Vec<String> = UNITS
        .iter()
        .filter_map(|(unit, name)| {
            let count = left / unit;
            left %= unit;
            (count > 0).then(|| format!("{count} {name}"))
        })
        .collect();
    if parts.is_empty() { "0 s".into() } else { parts[..parts.len().min(2)].join(" ") }
}

/// So many of something.
pub(super) fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{} {what}s", thousands(number as u64)) }
}

/// A number with its thousands set apart.
pub(super) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut shown = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

/// Bytes, in the unit that suits them.
pub(super) fn bytes(number: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if number < 1024 {
        return count(usize::try_from(number).unwrap_or(usize::MAX), "byte");
    }
    // Tenths, without the limits of floating point.
    let (mut tenths, mut unit) = (u128::from(number) * 10 / 1024, 0);
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// Characters of a terminal. Names, addresses and numbers are ASCII; others count one each.
pub(super) fn columns_of(text: &str) -> usize {
    if text.is_ascii() { text.len() } else { text.chars().count() }
}

/// A line in lines of at most so many characters, as far as its words allow. Those behind the first are indented by so many, and
/// have its mark.
pub(super) fn wrapped(line: &str, width: usize, indent: usize) -> String {
    let (mark, mut rest) = apart(line);
    let mut text = mark.to_owned();
    let mut used = 0;
    while !rest.is_empty() {
        // A word with the blanks before it.
        let blanks = rest.len() - rest.trim_start_matches(' ').len();
        let end = rest[blanks..].find(' ').map_or(rest.len(), |at| blanks + at);
        let (word, after) = rest.split_at(end);
        if used > indent && used + columns_of(word) > width {
            let word = &word[blanks..];
            text.extend(["\n", mark, &" ".repeat(indent), word]);
            used = indent + columns_of(word);
        } else {
            text.push_str(word);
            used += columns_of(word);
        }
        rest = after;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{ago, bytes, count, thousands, wrapped};
    use crate::cli::tone::Tone;

    #[test]
    fn lines_are_wrapped_between_words() {
        assert_eq!(wrapped("label    one two three", 17, 9), "label    one two\n         three");
        assert_eq!(wrapped("label    a-word-that-is-longer b", 10, 4), "label\n    a-word-that-is-longer\n    b");
        assert_eq!(
            wrapped(&Tone::Bad.line("one two"), 3, 0),
            [Tone::Bad.line("one"), Tone::Bad.line("two")].join("\n")
        );
        for text in ["", "one", "    one", "one  two"] {
            assert_eq!(wrapped(text, 8, 4), text);
        }
    }

    #[test]
    fn numbers_are_for_people() {
        assert_eq!([ago(0), ago(59), ago(1_140), ago(90_061)], ["0 s", "59 s", "19 min", "1 d 1 h"]);
        assert_eq!([count(0, "rule"), count(1, "rule"), count(1_000, "rule")], ["0 rules", "1 rule", "1,000 rules"]);
        assert_eq!([thousands(0), thousands(999), thousands(1_234_567)], ["0", "999", "1,234,567"]);
        assert_eq!(
            [bytes(1), bytes(1_023), bytes(1_536), bytes(5 << 20)],
            ["1 byte", "1,023 bytes", "1.5 KiB", "5.0 MiB"]
        );
        assert_eq!(bytes(u64::MAX), "16777215.9 TiB");
    }
}
