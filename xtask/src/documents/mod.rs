//! What `cargo xtask test` asks of the documents: links that lead somewhere, narrow lines, and the field's own words.

mod links;
mod prose;
mod words;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use crate::{packages, test::Session};

/// Pages at the top of the repository. All others are below `docs`.
pub(crate) const TOP: [&str; 4] = ["CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md"];

/// Markdown by its path, and the other files that it may link to.
struct Documents {
    pages: BTreeMap<PathBuf, String>,
    files: Vec<PathBuf>,
}

/// The checks of the documents.
pub(crate) fn checks(session: &mut Session, root: &Path) {
    session.check("links of the documents", || {
        let documents = Documents::in_repository(root)?;
        complain(&links::broken(&documents), "links lead nowhere")
    });
    session.check("links of the packages' documents", || {
        let documents = Documents::in_packages(root)?;
        complain(&links::broken(&documents), "links lead nowhere in /usr/share/doc")
    });
    session.check("width of the documents' lines", || {
        let documents = Documents::in_repository(root)?;
        complain(&documents.each(prose::too_wide), "lines are wider than 100 columns")
    });
    session.check("words of the documents", || {
        let documents = Documents::in_repository(root)?;
        complain(&documents.each(words::in_markdown), "words are not those of docs/glossary.md")
    });
    session.check("words of the comments", || {
        complain(&words_of_comments(root)?, "words are not those of docs/glossary.md")
    });
}

/// Complaints about the comments of all sources, but for those that list the words.
fn words_of_comments(root: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for directory in ["anyport-userspace", "tests/e2e", "tests/src", "xtask/src"] {
        collect(root, Path::new(directory), &mut files)?;
    }
    let is_checked = |path: &&PathBuf| path.extension().is_some_and(|it| it == "rs") && !path.ends_with(words::SOURCE);
    let mut complaints = Vec::new();
    for path in files.iter().filter(is_checked) {
        let text = fs::read_to_string(root.join(path)).with_context(|| format!("read {}", path.display()))?;
        let found = words::in_comments(&text);
        complaints.extend(found.into_iter().map(|(line, what)| format!("{}:{line}: {what}", path.display())));
    }
    Ok(complaints)
}

/// Prints all complaints and fails if there are any.
fn complain(complaints: &[String], what: &str) -> Result<()> {
    for complaint in complaints {
        println!("{complaint}");
    }
    ensure!(complaints.is_empty(), "{} {what}", complaints.len());
    Ok(())
}

impl Documents {
    fn in_repository(root: &Path) -> Result<Self> {
        let mut files = Vec::new();
        collect(root, Path::new("docs"), &mut files)?;
        files.extend(TOP.map(PathBuf::from));
        let paths = files.into_iter().map(|path| (path.clone(), root.join(path)));
        Self::of(paths)
    }

    /// As they are laid out below `/usr/share/doc/anyport`.
    fn in_packages(root: &Path) -> Result<Self> {
        let files = packages::documents(root)?;
        Self::of(files.into_iter().map(|(from, to)| (PathBuf::from(to), root.join(from))))
    }

    /// Files by the path that they have for a reader, and where they are.
    fn of(paths: impl Iterator<Item = (PathBuf, PathBuf)>) -> Result<Self> {
        let mut documents = Self { pages: BTreeMap::new(), files: Vec::new() };
        for (path, from) in paths {
            if is_markdown(&path) {
                let text = fs::read_to_string(&from).with_context(|| format!("read {}", from.display()))?;
                documents.pages.insert(path.clone(), text);
            }
            documents.files.push(path);
        }
        Ok(documents)
    }

    /// Complaints about each page, with its path and the number of the line.
    fn each(&self, look: impl Fn(&str) -> Vec<(usize, String)>) -> Vec<String> {
        let complaints = self.pages.iter().flat_map(|(path, text)| {
            look(text).into_iter().map(move |(line, complaint)| format!("{}:{line}: {complaint}", path.display()))
        });
        complaints.collect()
    }
}

/// All files below a directory of the repository, by their path there.
pub(crate) fn collect(root: &Path, directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let absolute = root.join(directory);
    for entry in fs::read_dir(&absolute).with_context(|| format!("list {}", absolute.display()))? {
        let entry = entry?;
        let path = directory.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            collect(root, &path, files)?;
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

pub(crate) fn is_markdown(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "md")
}

/// The number of the line that a byte of a text is in, from 1 on.
fn line_of(text: &str, byte: usize) -> usize {
    text[..byte].matches('\n').count() + 1
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Documents, line_of, links, prose, words, words_of_comments};
    use crate::packages;

    #[test]
    fn lines_are_counted_from_one() {
        let text = "one\ntwo\nthree";
        assert_eq!([0, 3, 4, 8].map(|byte| line_of(text, byte)), [1, 1, 2, 3]);
    }

    #[test]
    fn every_document_of_the_repository_is_in_the_packages() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let installed = packages::documents(root).unwrap();
        for page in Documents::in_repository(root).unwrap().pages.keys() {
            assert!(installed.iter().any(|(from, _)| from == page), "{} is not installed", page.display());
        }
    }

    #[test]
    fn documents_have_links_widths_and_words_as_they_should() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let documents = Documents::in_repository(root).unwrap();
        let none = Vec::<String>::new();
        assert_eq!(links::broken(&documents), none);
        assert_eq!(documents.each(prose::too_wide), none);
        assert_eq!(documents.each(words::in_markdown), none);
    }

    #[test]
    fn comments_have_the_words_of_the_glossary() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        assert_eq!(words_of_comments(root).unwrap(), Vec::<String>::new());
    }
}
