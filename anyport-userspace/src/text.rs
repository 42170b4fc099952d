//! Texts: lists for people, positions in files, and characters that are not shown.

use std::{
    borrow::Cow,
    fmt::{self, Display, Write as _},
};

use serde::de::DeserializeOwned;

use crate::plain_words::plain;

/// A text in which every character is seen: others may have put in some that give a terminal orders, that are invisible or that change the
/// direction of what follows (such as U+202E). These are written as in JSON, `\u202e`. Line feeds and tabs stay.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_visible) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for it in text.chars() {
        if is_visible(it) {
            shown.push(it);
        } else {
            for unit in it.encode_utf16(&mut [0; 2]) {
                // Writing to a string does not fail.
                write!(shown, "\\u{unit:04x}").ok();
            }
        }
    }
    Cow::Owned(shown)
}

/// Whether a character is one that people see where it stands; of those that join others to one, only in the text's own script.
fn is_visible(it: char) -> bool {
    match it {
        '\n' | '\t' | '\'' | '"' | '\\' => true,
        _ if it.is_ascii() => !it.is_ascii_control(),
        // What Rust does not escape in debug output is a letter, a number, a sign or a mark.
        _ => it.escape_debug().len() == 1 || it.is_alphanumeric(),
    }
}

/// The beginning of a text that another process has made, in quotes, on one line and with every character seen: what is quoted in a
/// message must not fill a log or a terminal.
pub(crate) fn excerpt(text: &str) -> String {
    const MOST: usize = 100;
    let (shown, rest) = text.split_at(text.char_indices().nth(MOST).map_or(text.len(), |(at, _)| at));
    let quoted = format!("\"{}\"", one_line(shown));
    if rest.is_empty() { quoted } else { format!("{quoted} and {} more bytes", rest.len()) }
}

/// What another process says, on one line, at most so long, and with every character seen.
pub(crate) fn remark(text: &str) -> String {
    const MOST: usize = 1_000;
    match text.char_indices().nth(MOST) {
        None => one_line(text),
        Some((at, _)) => format!("{}… and {} more bytes", one_line(&text[..at]), text.len() - at),
    }
}

fn one_line(text: &str) -> String {
    visible(text).replace('\n', "\\n").replace('\t', "\\t")
}

/// Reads TOML. What is wrong is said with its line as it stands there, unless that would fill a log or a terminal.
pub(crate) fn from_toml<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    const WIDEST: usize = 200;
    toml::from_str(text).map_err(|error| {
        let shown = error.to_string();
        let shown = plain(&shown);
        if shown.lines().all(|line| line.chars().count() <= WIDEST) {
            return visible(&shown).into_owned();
        }
        let place = Positions::of(text).at(error.span().unwrap_or_default().start);
        format!("{place}: {}", remark(&plain(error.message())))
    })
}

/// The first few of many.
pub(crate) fn list_of(items: &[impl Display]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<String> = items.iter().take(SHOWN).map(ToString::to_string).collect();
    match items.len().checked_sub(SHOWN) {
        None | Some(0) => shown.join(", "),
        Some(more) => format!("{} and {more} more", shown.join(", ")),
    }
}

/// Line and column in a text, as editors count them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    pub(crate) line: u32,
    column: usize,
}

impl Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// Finds positions in a text, each from the previous one: there may be a million of them.
#[derive(Debug)]
pub(crate) struct Positions<'a> {
    text: &'a str,
    line: u32,
    offset: usize,
}

impl<'a> Positions<'a> {
    pub(crate) fn of(text: &'a str) -> Self {
        Self { text, line: 1, offset: 0 }
    }

    /// The position of an offset in bytes. Offsets have to ascend.
    pub(crate) fn at(&mut self, offset: usize) -> Position {
        let between = self.text.get(self.offset..offset).unwrap_or_default();
        let lines = between.bytes().filter(|byte| *byte == b'\n').count();
        self.line = self.line.saturating_add(u32::try_from(lines).unwrap_or(u32::MAX));
        self.offset = self.offset.max(offset);
        let before = self.text.get(..offset).unwrap_or_default();
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Position { line: self.line, column }
    }
}

#[cfg(test)]
mod tests {
    use super::{excerpt, from_toml, remark, visible};

    #[test]
    fn what_is_wrong_in_a_file_is_said_in_few_words() {
        let complaint = |text: &str| from_toml::<toml::Table>(text).unwrap_err();
        let shown = complaint("one = 1\ntwo = \u{1b}[2J\n");
        assert!(shown.contains("line 2, column") && shown.contains("two = \\u001b[2J"), "{shown}");
        let long = complaint(&format!("one = 1\n{} = ?\n", "x".repeat(3_000_000)));
        assert!(long.starts_with("line 2, column ") && long.len() < 300, "{long}");
    }

    #[test]
    fn what_others_say_stays_short_and_on_its_line() {
        assert_eq!(excerpt("a\nb\u{1b}[2J"), "\"a\\nb\\u001b[2J\"");
        let long = "é".repeat(1_001);
        assert!(excerpt(&long).ends_with("é\" and 1802 more bytes"), "{}", excerpt(&long));
        assert!(remark(&long).ends_with("é… and 2 more bytes"), "{}", remark(&long));
        assert_eq!(remark("a\tb"), "a\\tb");
    }

    #[test]
    fn what_is_not_seen_is_written_out() {
        for text in ["", "plain\ttext\n", "größer, 日本, \"quoted\" \\ it's"] {
            assert_eq!(visible(text), text);
        }
        for (text, shown) in [
            ("a\u{202e}b", "a\\u202eb"),
            ("\u{200b}\u{2066}\u{feff}\u{ad}", "\\u200b\\u2066\\ufeff\\u00ad"),
            ("\u{1b}[2J\r\u{7f}\u{9b}", "\\u001b[2J\\u000d\\u007f\\u009b"),
            ("\u{e0041}", "\\udb40\\udc41"),
            ("\u{2028}\u{a0}", "\\u2028\\u00a0"),
        ] {
            assert_eq!(visible(text), shown);
        }
    }
}
