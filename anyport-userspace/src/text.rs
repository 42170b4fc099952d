//! Texts: lists for people, and positions in files.

use std::fmt::{self, Display};

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
