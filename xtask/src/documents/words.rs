//! Words of a private language, and what docs/glossary.md says instead.

use super::{line_of, prose};

/// This file, which has all of them.
pub(super) const SOURCE: &str = "xtask/src/documents/words.rs";

/// A word or words in lower case, and what to write. They are compared letter by letter, whole words only.
const PRIVATE: [(&str, &str); 21] = [
    ("whoever", "name the client, user or process"),
    ("whom", "name the client, user or process"),
    ("somebody", "name the client, user or process"),
    ("newcomer", "new connection"),
    ("newcomers", "new connections"),
    ("the one before", "the previous …"),
    ("opinion", "match"),
    ("opinions", "matches"),
    ("anew", "rebuilt, reset, again"),
    ("in force", "active"),
    ("into force", "active"),
    ("mend", "repair"),
    ("mended", "repaired"),
    ("mends", "repairs"),
    ("others learn", "withdrawal is converging"),
    ("laboratory", "test harness"),
    ("first words", "initial data"),
    ("dialled address", "original destination"),
    ("what was dialled", "the original destination"),
    ("speaks of", "matches, names"),
    ("speak of", "match, name"),
];

/// Private words of a page, each with its line.
pub(super) fn in_markdown(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (line, part) in prose::paragraphs(text) {
        found.extend(of(&part).into_iter().map(|(below, complaint)| (line + below - 1, complaint)));
    }
    found
}

/// Private words of the comments of a source file, each with its line. What stands in backticks is code.
pub(super) fn in_comments(source: &str) -> Vec<(usize, String)> {
    let comments: Vec<String> = source.lines().map(|line| without_code(comment_of(line))).collect();
    of(&comments.join("\n"))
}

/// The comment of a line, unless the `//` is in a text.
fn comment_of(line: &str) -> &str {
    let begins = |at: &usize| line[..*at].matches('"').count().is_multiple_of(2);
    let at = line.match_indices("//").map(|(at, _)| at).find(begins);
    at.map_or("", |at| line[at..].trim_start_matches(['/', '!']).trim())
}

fn without_code(comment: &str) -> String {
    comment.split('`').step_by(2).collect()
}

/// Private words of any text, each with its line. Line breaks count as spaces.
fn of(text: &str) -> Vec<(usize, String)> {
    let plain = text.to_ascii_lowercase().replace('\n', " ");
    let mut found = Vec::new();
    for (word, instead) in PRIVATE {
        for (at, _) in plain.match_indices(word) {
            let is_letter = |it: char| it.is_alphanumeric() || it == '_';
            let is_inside = plain[..at].ends_with(is_letter) || plain[at + word.len()..].starts_with(is_letter);
            if !is_inside {
                found.push((line_of(text, at), format!("`{word}`: {instead}")));
            }
        }
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::{in_comments, in_markdown, of};

    #[test]
    fn whole_words_are_found_with_their_line() {
        let found = of("Whoever comes\nis told of the one\nbefore, recommended.");
        let expected = [(1, "`whoever`: name the client, user or process"), (2, "`the one before`: the previous …")];
        assert_eq!(found, expected.map(|(line, text)| (line, text.to_owned())));
    }

    #[test]
    fn code_may_have_any_words() {
        assert!(in_markdown("`mend = false`\n\n```\nwhom\n```\n").is_empty());
        assert_eq!(in_markdown("one\n\n| a |\n|---|\n| is in force |\n").len(), 1);
        assert_eq!(in_markdown("what is in\nforce").len(), 1);
    }

    #[test]
    fn comments_are_read_and_nothing_else() {
        let source =
            "//! What is in\n//! force.\nlet url = \"http://whom\"; // whoever\n/// `whom` is a name\nlet whom = 1;\n";
        let expected = [(1, "`in force`: active"), (3, "`whoever`: name the client, user or process")];
        assert_eq!(in_comments(source), expected.map(|(line, text)| (line, text.to_owned())));
    }
}
