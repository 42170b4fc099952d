//! Words of a private language, and what docs/glossary.md says instead.

use super::{line_of, prose};

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
    use super::{in_markdown, of};

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
}
