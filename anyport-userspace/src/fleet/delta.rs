//! What makes one set out of another, line by line: nodes that have the one fetch little for the other, and have little to read.
//!
//! It is a text with a line for each step through the lines of the first set: `=N` has N of them stay, `-N` leaves N of
//! them out, `+LINE` puts a line in, and `\LINE` one that has no end, as only the last one can be. Those behind the last
//! step stay. Nodes need not trust it: what comes out has the hash that the pointer says, or is thrown away; and as lines are kept whole,
//! the lines that go and come are those by which the two texts differ.

use std::fmt::Write as _;

use imara_diff::{Algorithm, Diff, InternedInput};

use super::pack::{LARGEST, deflate, inflate};
use crate::{fleet::LineEdits, rules::InvalidText};

/// Steps from one set to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delta(String);

impl Delta {
    /// From one text to another.
    pub fn between(before: &str, after: &str) -> Self {
        let input = InternedInput::new(before, after);
        let mut steps = String::new();
        let mut at = 0;
        for hunk in Diff::compute(Algorithm::Histogram, &input).hunks() {
            for (sign, count) in [('=', hunk.before.start - at), ('-', hunk.before.end - hunk.before.start)] {
                if count > 0 {
                    let _ = writeln!(steps, "{sign}{count}");
                }
            }
            at = hunk.before.end;
            for token in &input.after[hunk.after.start as usize..hunk.after.end as usize] {
                let line = input.interner[*token];
                match line.strip_suffix('\n') {
                    Some(line) => _ = writeln!(steps, "+{line}"),
                    None => _ = writeln!(steps, "\\{line}"),
                }
            }
        }
        Self(steps)
    }

    /// As it is stored.
    ///
    /// # Errors
    /// It can't be compressed.
    pub fn pack(&self) -> Result<Vec<u8>, InvalidText> {
        deflate(&self.0)
    }

    /// One that was stored.
    ///
    /// # Errors
    /// It is spoilt, or larger than any set.
    pub fn unpack(packed: &[u8]) -> Result<Self, InvalidText> {
        let spoilt = |why: String| InvalidText(format!("decompress what makes one set out of another: {why}"));
        let text = inflate(packed, LARGEST).map_err(|error| spoilt(error.to_string()))?;
        if text.len() > LARGEST {
            return Err(spoilt(format!("it has more than {LARGEST} bytes")));
        }
        String::from_utf8(text).map(Self::of_steps).map_err(|error| spoilt(error.to_string()))
    }

    /// One with these steps, whatever they are.
    pub fn of_steps(steps: String) -> Self {
        Self(steps)
    }

    /// The text that it makes out of another one, and the lines by which they differ.
    ///
    /// # Errors
    /// It makes no sense, joins lines, or makes more than a set may have.
    pub fn apply(&self, before: &str) -> Result<(String, LineEdits), InvalidText> {
        let mut rest = before;
        let (mut after, mut edits) = (String::with_capacity(before.len() + self.0.len()), LineEdits::default());
        for step in self.0.split_inclusive('\n') {
            let wrong =
                || InvalidText(format!("what makes one set out of another has a step that makes no sense: {step:?}"));
            let line = step.strip_suffix('\n').ok_or_else(wrong)?;
            let (sign, what) = line.split_at_checked(1).ok_or_else(wrong)?;
            match sign {
                "=" | "-" => {
                    let lines = take(&mut rest, what.parse().map_err(|_| wrong())?).ok_or_else(wrong)?;
                    let text = if sign == "=" { &mut after } else { &mut edits.removed };
                    extend(text, lines).ok_or_else(wrong)?;
                }
                "+" => {
                    extend(&mut after, &step[1..]).ok_or_else(wrong)?;
                    edits.added.push_str(&step[1..]);
                }
                "\\" if !what.is_empty() => {
                    extend(&mut after, what).ok_or_else(wrong)?;
                    edits.added.push_str(&step[1..]);
                }
                _ => return Err(wrong()),
            }
        }
        let joined = || InvalidText("what makes one set out of another joins two lines at its end".into());
        extend(&mut after, rest).ok_or_else(joined)?;
        if after.len() > LARGEST {
            return Err(InvalidText(format!("the set would have more than {LARGEST} bytes")));
        }
        if !edits.removed.is_empty() && !edits.removed.ends_with('\n') {
            edits.removed.push('\n');
        }
        Ok((after, edits))
    }
}

/// Puts lines behind others. A line without an end stays the last one: the next would be joined with it, so that the text had one line
/// where the edits have two.
fn extend(text: &mut String, lines: &str) -> Option<()> {
    let fits = lines.is_empty() || text.is_empty() || text.ends_with('\n');
    fits.then(|| text.push_str(lines))
}

/// Takes so many lines from the front of a text, if there are so many.
fn take<'a>(text: &mut &'a str, count: usize) -> Option<&'a str> {
    let mut end = 0;
    for _ in 0..count {
        let line = text[end..].split_inclusive('\n').next()?;
        end += line.len();
    }
    let (taken, rest) = text.split_at(end);
    *text = rest;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Delta;
    use crate::fleet::LineEdits;

    fn there_and_back(before: &str, after: &str) -> LineEdits {
        let delta = Delta::between(before, after);
        assert_eq!(Delta::unpack(&delta.pack().unwrap()).unwrap(), delta);
        let (made, edits) = delta.apply(before).unwrap();
        assert_eq!(made, after, "{delta:?}");
        edits
    }

    #[test]
    fn steps_are_as_documented() {
        let (before, after) = ("a\nb\nc\nd\n", "a\nx\nc\nd\ny");
        assert_eq!(Delta::between(before, after), Delta("=1\n-1\n+x\n=2\n\\y\n".into()));
        let edits = there_and_back(before, after);
        assert_eq!((&*edits.removed, &*edits.added), ("b\n", "x\ny\n"));
        assert_eq!(there_and_back("a\nb", "a\n").removed, "b\n");
        for text in ["", "a", "a\n", "\n\n", "=1\n-1\n", "\\\n+\n", "a\r\nb\r\n"] {
            assert_eq!(there_and_back(text, text), LineEdits::default());
            there_and_back(text, "");
            there_and_back("", text);
        }
    }

    #[test]
    fn a_small_change_of_a_large_set_is_small() {
        let line = |number: u32| format!("2001:db8:{:x}::/48 both\n", number * 7 % 65_521);
        let before: String = (0..50_000).map(line).collect();
        let after: String = (0..50_000).map(|it| if it % 1_000 == 5 { line(it + 60_000) } else { line(it) }).collect();
        let edits = there_and_back(&before, &after);
        assert_eq!((edits.removed.lines().count(), edits.added.lines().count()), (50, 50));
        assert!(Delta::between(&before, &after).pack().unwrap().len() < 2_000);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for steps in ["=3\n", "-3\n", "=1\n=2\n", "=x\n", "=-1\n", "=99999999999999999999\n", "?\n", "\n", "+a", "ä\n"]
        {
            assert!(Delta(steps.into()).apply("a\nb\n").is_err(), "{steps:?}");
        }
        // Two lines in the edits, one in the text.
        for (before, steps) in
            [("a\nb\n", "\\#\n+a\n"), ("a\nb\n", "\\#\n=1\n"), ("a\nb\n", "\\#\n"), ("a\nb", "=2\n+c\n")]
        {
            assert!(Delta(steps.into()).apply(before).is_err(), "{before:?} {steps:?}");
        }
        assert!(Delta::unpack(b"nonsense").is_err());
    }

    proptest! {
        #[test]
        fn any_text_out_of_any_other(before in "[abc\n]{0,40}", after in "[abc\n]{0,40}") {
            there_and_back(&before, &after);
        }

        /// Whatever the steps are: what the edits say is what the text says.
        #[test]
        fn edits_are_the_difference_of_the_texts(
            steps in prop::collection::vec("=[0-3]|-[0-3]|[+][ab#\r]{0,2}|\\\\[ab#]{0,2}|[-=+\\\\0-9a]{0,4}", 0..8),
            before in "[ab#\n]{0,10}",
        ) {
            let steps: String = steps.into_iter().map(|step| step + "\n").collect();
            if let Ok((after, LineEdits { removed, added })) = Delta(steps).apply(&before) {
                let sorted = |texts: [&str; 2]| {
                    let mut lines: Vec<String> = texts.iter().flat_map(|text| text.lines().map(str::to_owned)).collect();
                    lines.sort_unstable();
                    lines
                };
                prop_assert_eq!(sorted([&before, &added]), sorted([&after, &removed]));
            }
        }
    }
}
