//! What was seen on which kernel, as a part of `docs/kernels.md`.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use super::outcome::{Case, Outcome};
use crate::process::stdout;

/// The page.
const PAGE: &str = "docs/kernels.md";
/// Lines between which the page is written by `--record`.
const MARKERS: [&str; 2] = ["<!-- begin: written by `cargo xtask test --kernel all --record` -->", "<!-- end -->"];
const BACK_ENDS: [&str; 3] = ["sk-lookup", "tc", "tproxy"];
/// The column of cases that choose their back end themselves.
const OTHER: &str = "other";

/// A kernel as it was named, and what came out.
pub(crate) type Seen = (String, Outcome);

/// Rewrites the page's part.
pub(crate) fn write(root: &Path, seen: &[Seen]) -> Result<()> {
    let date = stdout(Command::new("date").args(["--utc", "+%F"]))?;
    let path = root.join(PAGE);
    let page = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let page = replace(&page, &tables(seen, date.trim())).with_context(|| format!("{PAGE} lacks its markers"))?;
    fs::write(&path, page).with_context(|| format!("write {}", path.display()))
}

fn replace(page: &str, part: &str) -> Option<String> {
    let (before, rest) = page.split_once(MARKERS[0])?;
    let (_, after) = rest.split_once(MARKERS[1])?;
    Some(format!("{before}{}\n{part}{}{after}", MARKERS[0], MARKERS[1]))
}

/// A table of kernels, and one of cases.
pub(crate) fn tables(seen: &[Seen], date: &str) -> String {
    let mut text = String::from("\n| kernel | release and version | sk-lookup | tc | tproxy | other | seen |\n");
    text.push_str("|---|---|---|---|---|---|---|\n");
    for (name, outcome) in seen {
        let counts = BACK_ENDS.into_iter().chain([OTHER]).map(|back_end| count(outcome, back_end));
        let counts = counts.collect::<Vec<_>>().join(" | ");
        let _ = writeln!(text, "| {name} | {} | {counts} | {date} |", outcome.kernel);
    }
    let mut cases: BTreeMap<&str, BTreeMap<usize, Vec<String>>> = BTreeMap::new();
    for (at, (_, outcome)) in seen.iter().enumerate() {
        for case in &outcome.cases {
            let (back_end, name) = parts(case);
            let shown = if back_end == OTHER { "yes" } else { back_end };
            let shown = if case.passed { shown.to_owned() } else { format!("{shown} **failed**") };
            cases.entry(name).or_default().entry(at).or_default().push(shown);
        }
    }
    text.push_str("\n| case |");
    text.extend(seen.iter().map(|(name, _)| format!(" {name} |")));
    text.push_str("\n|---|");
    text.push_str(&"---|".repeat(seen.len()));
    text.push('\n');
    for (name, kernels) in cases {
        let _ = write!(text, "| {name} |");
        for at in 0..seen.len() {
            let mut shown = kernels.get(&at).cloned().unwrap_or_default();
            shown.sort();
            let _ = write!(text, " {} |", shown.join(", "));
        }
        text.push('\n');
    }
    text.push('\n');
    text
}

/// `43 passed`, `41 passed, 2 failed`, or nothing where no case was chosen.
fn count(outcome: &Outcome, back_end: &str) -> String {
    let of = |passed| outcome.cases.iter().filter(|case| parts(case).0 == back_end && case.passed == passed).count();
    match (of(true), of(false)) {
        (0, 0) => "–".to_owned(),
        (passed, 0) => format!("{passed} passed"),
        (passed, failed) => format!("{passed} passed, **{failed} failed**"),
    }
}

/// The back end, and the rest of a case's name.
fn parts(case: &Case) -> (&str, &str) {
    match case.name.split_once("::") {
        Some((back_end, rest)) if BACK_ENDS.contains(&back_end) => (back_end, rest),
        _ => (OTHER, &case.name),
    }
}

#[cfg(test)]
mod tests {
    use super::{MARKERS, Seen, replace, tables};
    use crate::{
        kernel::outcome::{Case, Outcome},
        tally::Tally,
    };

    fn seen(kernel: &str, cases: &[(&str, bool)]) -> Seen {
        let cases = cases.iter().map(|&(name, passed)| Case { name: name.to_owned(), passed }).collect();
        let outcome =
            Outcome { kernel: format!("{kernel}.0 #1"), cases, tally: Tally::default(), troubles: Vec::new() };
        (kernel.to_owned(), outcome)
    }

    #[test]
    fn shows_kernels_back_ends_and_cases() {
        let all = [
            seen("6.1", &[("sk-lookup::a b", true), ("tproxy::a b", false), ("takeover", true)]),
            seen("6.12", &[("tc::a b", true)]),
        ];
        let expected = "
| kernel | release and version | sk-lookup | tc | tproxy | other | seen |
|---|---|---|---|---|---|---|
| 6.1 | 6.1.0 #1 | 1 passed | – | 0 passed, **1 failed** | 1 passed | 2026-01-02 |
| 6.12 | 6.12.0 #1 | – | 1 passed | – | – | 2026-01-02 |

| case | 6.1 | 6.12 |
|---|---|---|
| a b | sk-lookup, tproxy **failed** | tc |
| takeover | yes |  |

";
        assert_eq!(tables(&all, "2026-01-02"), expected);
    }

    #[test]
    fn rewrites_its_part_of_the_page_only() {
        let page = format!("above\n{}\nold\n{}\nbelow\n", MARKERS[0], MARKERS[1]);
        let expected = format!("above\n{}\nnew\n{}\nbelow\n", MARKERS[0], MARKERS[1]);
        assert_eq!(replace(&page, "new\n"), Some(expected.clone()));
        assert_eq!(replace(&expected, "new\n"), Some(expected));
        assert_eq!(replace("no markers", "new"), None);
    }
}
