//! Links between documents, by what a Markdown parser finds: files that are there, headings that are there.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Component, Path, PathBuf},
};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

use super::{Documents, line_of};

/// A link of a page.
#[derive(Debug, PartialEq, Eq)]
struct Link {
    line: usize,
    target: String,
}

/// A complaint for each link that leads to no file or to no heading.
pub(super) fn broken(documents: &Documents) -> Vec<String> {
    let anchors: BTreeMap<&Path, HashSet<String>> =
        documents.pages.iter().map(|(path, text)| (path.as_path(), anchors(text))).collect();
    let mut complaints = Vec::new();
    for (page, text) in &documents.pages {
        for Link { line, target } in links(text) {
            let (path, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let to = if path.is_empty() { Some(page.clone()) } else { resolve(page, path) };
            let complaint = match to {
                Some(to) if !is_there(&to, &documents.files) => "there is no such file",
                None => "this leads out of the documents",
                Some(to) if !anchor.is_empty() && anchors.get(to.as_path()).is_none_or(|all| !all.contains(anchor)) => {
                    "there is no such heading"
                }
                Some(_) => continue,
            };
            complaints.push(format!("{}:{line}: {target}: {complaint}", page.display()));
        }
    }
    complaints
}

/// A file, or a directory that has some.
fn is_there(path: &Path, files: &[PathBuf]) -> bool {
    files.iter().any(|file| file.starts_with(path))
}

/// Where a relative link of a page leads; nothing if that is outside of all documents.
fn resolve(page: &Path, target: &str) -> Option<PathBuf> {
    let mut path = page.parent()?.to_owned();
    for component in Path::new(target).components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                if !path.pop() {
                    return None;
                }
            }
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

/// All links and images of a page that lead to no other site.
fn links(text: &str) -> Vec<Link> {
    let mut found = Vec::new();
    for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
        let Event::Start(Tag::Link { dest_url: target, .. } | Tag::Image { dest_url: target, .. }) = event else {
            continue;
        };
        let is_elsewhere = ["https:", "http:", "mailto:"].iter().any(|scheme| target.starts_with(scheme));
        if !is_elsewhere {
            found.push(Link { line: line_of(text, range.start), target: target.into_string() });
        }
    }
    found
}

/// The names by which the headings of a page can be linked to, as repository sites make them.
fn anchors(text: &str) -> HashSet<String> {
    let mut found = HashSet::new();
    let mut times: HashMap<String, usize> = HashMap::new();
    let mut heading: Option<String> = None;
    for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
        match event {
            Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
            Event::Text(part) | Event::Code(part) => {
                if let Some(heading) = &mut heading {
                    heading.push_str(&part);
                }
            }
            Event::End(TagEnd::Heading(_)) => {
                let name = anchor(&heading.take().unwrap_or_default());
                let before = times.entry(name.clone()).or_default();
                found.insert(if *before == 0 { name } else { format!("{name}-{before}") });
                *before += 1;
            }
            _ => {}
        }
    }
    found
}

/// Letters, digits, hyphens and underscores of a heading in lower case, with hyphens for spaces.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|it| it.is_alphanumeric() || [' ', '-', '_'].contains(it));
    kept.flat_map(char::to_lowercase).map(|it| if it == ' ' { '-' } else { it }).collect()
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::{Documents, Link, anchor, anchors, broken, links};
    use crate::documents::is_markdown;

    fn documents(files: &[(&str, &str)]) -> Documents {
        Documents {
            pages: files
                .iter()
                .filter(|(path, _)| is_markdown(Path::new(path)))
                .map(|&(path, text)| (PathBuf::from(path), text.to_owned()))
                .collect(),
            files: files.iter().map(|&(path, _)| PathBuf::from(path)).collect(),
        }
    }

    #[test]
    fn links_and_images_are_found_and_other_sites_are_not() {
        let text = "[a](b.md)\n\n| x |\n|---|\n| ![c](d.svg) [e](https://example.org/) |\n\n```\n[f](g.md)\n```\n";
        let expected = [("b.md", 1), ("d.svg", 5)].map(|(target, line)| Link { line, target: target.to_owned() });
        assert_eq!(links(text), expected);
    }

    #[test]
    fn headings_are_named_as_repository_sites_do() {
        assert_eq!(anchor("What is wrong with this host?"), "what-is-wrong-with-this-host");
        assert_eq!(anchor("`anyportctl doctor --json`"), "anyportctl-doctor---json");
        assert_eq!(anchor("BIRD 2"), "bird-2");
        let twice = anchors("# Drain\n\n## Drain\n");
        assert!(twice.contains("drain") && twice.contains("drain-1"), "{twice:?}");
    }

    #[test]
    fn links_that_lead_somewhere_are_right() {
        let readme = "[a](docs/a.md#two-words) [b](docs) [c](#here) ![d](docs/d.svg)\n\n# Here\n";
        let a = "# A\n\n## Two words\n\n[up](../README.md) [beside](./d.svg)\n";
        assert_eq!(broken(&documents(&[("README.md", readme), ("docs/a.md", a), ("docs/d.svg", "")])), [""; 0]);
    }

    #[test]
    fn links_that_lead_nowhere_are_named_with_their_line() {
        let readme = "[a](docs/a.md#no)\n[b](b.md)\n[c](../c.md)\n[d](#no)\n[e](docs/e.svg#no)\n";
        let expected = [
            "README.md:1: docs/a.md#no: there is no such heading",
            "README.md:2: b.md: there is no such file",
            "README.md:3: ../c.md: this leads out of the documents",
            "README.md:4: #no: there is no such heading",
            "README.md:5: docs/e.svg#no: there is no such heading",
        ];
        assert_eq!(broken(&documents(&[("README.md", readme), ("docs/a.md", "# A"), ("docs/e.svg", "")])), expected);
    }
}
