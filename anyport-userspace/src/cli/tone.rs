//! How lines are shown: in colours where a terminal shows them, and as what they are everywhere else.
//!
//! A line says what it is by its first character, one that no text has (noncharacters of Unicode), so that what others have put into a
//! text can give the terminal no orders, whatever it is.

use crate::text::visible;

/// What a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    /// Like most.
    Plain,
    /// Above others.
    Head,
    /// As it should be.
    Good,
    /// Not as it should be, and nothing is lost yet.
    Doubtful,
    /// Wrong.
    Bad,
    /// Beside the point.
    Dim,
}

impl Tone {
    const MARKED: [(Self, &'static str, &'static str); 5] = [
        (Self::Head, "\u{fdd0}", "1"),
        (Self::Good, "\u{fdd1}", "32"),
        (Self::Doubtful, "\u{fdd2}", "33"),
        (Self::Bad, "\u{fdd3}", "31"),
        (Self::Dim, "\u{fdd4}", "2"),
    ];

    /// What a line of this tone begins with.
    pub(super) fn mark(self) -> &'static str {
        Self::MARKED.iter().find(|(tone, ..)| *tone == self).map_or("", |(_, mark, _)| mark)
    }

    /// A line of this tone.
    pub(super) fn line(self, text: &str) -> String {
        format!("{}{text}", self.mark())
    }
}

/// The mark of a line, if it has one, and the rest of it.
pub(super) fn apart(line: &str) -> (&str, &str) {
    let is_mark = |it: &char| ('\u{fdd0}'..='\u{fdef}').contains(it);
    line.split_at(line.chars().next().filter(is_mark).map_or(0, char::len_utf8))
}

/// A text of lines with their marks, as a terminal is to get it.
pub(super) fn painted(text: &str, in_colours: bool) -> String {
    let mut shown = String::with_capacity(text.len() + 16);
    for (at, line) in text.split('\n').enumerate() {
        if at > 0 {
            shown.push('\n');
        }
        let marked = Tone::MARKED.iter().find_map(|(_, mark, code)| Some((line.strip_prefix(mark)?, *code)));
        let (line, code) = marked.unwrap_or((line, ""));
        match &visible(line) {
            line if in_colours && !code.is_empty() => shown.extend(["\x1b[", code, "m", line, "\x1b[0m"]),
            line => shown.push_str(line),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::{Tone, painted};

    #[test]
    fn only_the_marks_of_lines_become_colours() {
        let text = format!("plain\n{}\n{}", Tone::Bad.line("wrong \x1b[2J"), Tone::Good.line("right"));
        assert_eq!(painted(&text, false), "plain\nwrong \\u001b[2J\nright");
        assert_eq!(painted(&text, true), "plain\n\x1b[31mwrong \\u001b[2J\x1b[0m\n\x1b[32mright\x1b[0m");
        // Within a line a mark is a character like others that are not seen.
        assert_eq!(painted("a\u{fdd3}b", true), "a\\ufdd3b");
        assert_eq!(painted("", true), "");
    }
}
