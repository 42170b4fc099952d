//! Which parts of a page are prose, and how wide its lines are.

use std::ops::Range;

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

use super::line_of;

/// Columns of a line of prose.
const WIDTH: usize = 100;

/// Lines that are wider, with their numbers. Code and tables may be, and what has no space to break it at.
pub(super) fn too_wide(text: &str) -> Vec<(usize, String)> {
    let mut kept: Vec<Range<usize>> = Vec::new();
    for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
        if matches!(event, Event::Start(Tag::CodeBlock(_) | Tag::Table(_) | Tag::HtmlBlock)) {
            kept.push(line_of(text, range.start)..line_of(text, range.end.saturating_sub(1)) + 1);
        }
    }
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let columns = line.chars().count();
        let is_kept = kept.iter().any(|lines| lines.contains(&number));
        if columns > WIDTH && !is_kept && line.trim_start().trim_start_matches("- ").contains(' ') {
            found.push((number, format!("{columns} columns")));
        }
    }
    found
}

/// Each paragraph, heading or cell of a table, with the line where it begins and without its inline code. Code is left
/// out, and so is what a program writes into the page between `<!-- begin` and `<!-- end`.
pub(super) fn paragraphs(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut paragraph: Option<(usize, String)> = None;
    let (mut is_code, mut is_generated) = (false, false);
    for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
        match event {
            Event::Text(_) | Event::Code(_) | Event::SoftBreak | Event::HardBreak if is_code || is_generated => {}
            Event::Text(part) => {
                paragraph.get_or_insert_with(|| (line_of(text, range.start), String::new())).1.push_str(&part);
            }
            Event::Code(_) => {
                paragraph.get_or_insert_with(|| (line_of(text, range.start), String::new())).1.push('`');
            }
            Event::SoftBreak | Event::HardBreak => {
                if let Some((_, paragraph)) = &mut paragraph {
                    paragraph.push('\n');
                }
            }
            Event::Html(html) if html.starts_with("<!-- begin") => is_generated = true,
            Event::Html(html) if html.starts_with("<!-- end") => is_generated = false,
            Event::Start(tag) if !is_inline(tag.to_end()) => {
                found.extend(paragraph.take());
                // The labels of a picture are language too.
                is_code = matches!(&tag, Tag::CodeBlock(kind) if !is_picture(kind));
            }
            Event::End(tag) if !is_inline(tag) => {
                found.extend(paragraph.take());
                is_code = false;
            }
            _ => {}
        }
    }
    found
}

fn is_inline(tag: TagEnd) -> bool {
    matches!(tag, TagEnd::Emphasis | TagEnd::Strong | TagEnd::Link | TagEnd::Image)
}

fn is_picture(kind: &CodeBlockKind<'_>) -> bool {
    matches!(kind, CodeBlockKind::Fenced(language) if &**language == "mermaid")
}

#[cfg(test)]
mod tests {
    use super::{WIDTH, paragraphs, too_wide};

    #[test]
    fn lines_of_prose_are_narrow_and_code_and_tables_are_as_they_are() {
        let wide = "word ".repeat(WIDTH / 5 + 1);
        let text = format!("# Title\n\n{wide}\n\n```text\n{wide}\n```\n\n| a |\n|---|\n| {wide} |\n\n{wide}\n");
        let found: Vec<usize> = too_wide(&text).into_iter().map(|(line, _)| line).collect();
        assert_eq!(found, [3, 13]);
    }

    #[test]
    fn columns_are_characters_and_a_long_word_stays_whole() {
        assert!(too_wide(&"é".repeat(WIDTH)).is_empty());
        assert!(too_wide(&format!("- {}", "x".repeat(2 * WIDTH))).is_empty());
        assert_eq!(too_wide(&format!("{} x", "é".repeat(WIDTH))), [(1, "102 columns".to_owned())]);
    }

    #[test]
    fn paragraphs_are_prose_cells_and_labels_of_pictures() {
        let page = "one `two` [a\nlink](b.md)\n\n```\nthree\n```\n\n```mermaid\nfour\n```\n\n\
                    <!-- begin: x -->\n\nfive\n\n<!-- end -->\n\n| six |\n|---|\n";
        let found: Vec<_> = paragraphs(page).into_iter().map(|(line, text)| (line, text.trim().to_owned())).collect();
        let expected = [(1, "one ` a\nlink"), (9, "four"), (18, "six")];
        assert_eq!(found, expected.map(|(line, text)| (line, text.to_owned())));
    }
}
