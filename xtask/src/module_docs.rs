//! Checks that each source file begins with `//!`, which says what the file is for.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

/// The directories whose files are looked at.
const SOURCES: [&str; 6] =
    ["anyport-common/src", "anyport-ebpf/src", "anyport-userspace/src", "tests/e2e", "tests/src", "xtask/src"];

/// Fails if a file says nothing, and names all such files.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut silent = Vec::new();
    for directory in SOURCES {
        collect(&root.join(directory), &mut silent)?;
    }
    if !silent.is_empty() {
        silent.sort();
        let names: Vec<_> = silent.iter().map(|it| it.strip_prefix(root).unwrap_or(it).display().to_string()).collect();
        bail!("say in a first line `//! …` what the file is for: {}", names.join(", "));
    }
    Ok(())
}

/// Adds the files below a directory that say nothing.
fn collect(directory: &Path, silent: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))? {
        let path = entry.with_context(|| format!("list {}", directory.display()))?.path();
        if path.is_dir() {
            collect(&path, silent)?;
        } else if path.extension().is_some_and(|it| it == "rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            if !says_what_it_is_for(&text) {
                silent.push(path);
            }
        }
    }
    Ok(())
}

fn says_what_it_is_for(text: &str) -> bool {
    text.strip_prefix("//! ").is_some_and(|rest| rest.lines().next().is_some_and(|line| !line.trim().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::says_what_it_is_for;

    #[test]
    fn says_what_it_is_for_wants_a_sentence_in_the_first_line() {
        assert!(says_what_it_is_for("//! Counts.\n\nuse std::fs;\n"));
        for silent in ["", "//!\n", "//! \n//! Counts.\n", "// Counts.\n", "use std::fs;\n\n//! Counts.\n"] {
            assert!(!says_what_it_is_for(silent), "{silent:?}");
        }
    }
}
