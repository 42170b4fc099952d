//! What was seen on which kernel, as a part of `docs/kernels.md`.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use super::{
    outcome::{Case, Outcome},
    versions::ALL,
};
use crate::process::stdout;

/// The page.
const PAGE: &str = "docs/kernels.md";
/// Lines between which the page is written by `--record`.
const MARKERS: [&str; 2] = ["<!-- begin: written by `cargo xtask test --kernel VERSION --record` -->", "<!-- end -->"];
const BACK_ENDS: [&str; 3] = ["sk-lookup", "tc", "tproxy"];
/// The column of cases that choose their back end themselves.
const OTHER: &str = "other";
const HEADER: &str = "| kernel | release and version | pass | sk-lookup | tc | tproxy | other | seen |";

/// A kernel as it was named, and what came out.
pub(crate) type Seen = (String, Outcome);

/// Rewrites the page's part: what was seen now takes the place of what was seen on the same kernels, and the rest stays.
pub(crate) fn write(root: &Path, seen: &[Seen], is_brief: bool) -> Result<()> {
    let date = stdout(Command::new("date").args(["--utc", "+%F"]))?;
    let path = root.join(PAGE);
    let page = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let page = update(&page, seen, is_brief, date.trim()).with_context(|| format!("{PAGE} lacks its markers"))?;
    fs::write(&path, page).with_context(|| format!("write {}", path.display()))
}

fn update(page: &str, seen: &[Seen], is_brief: bool, date: &str) -> Option<String> {
    let (before, rest) = page.split_once(MARKERS[0])?;
    let (part, after) = rest.split_once(MARKERS[1])?;
    let mut record = Record::read(part);
    for (name, outcome) in seen {
        record.note(name, outcome, is_brief, date);
    }
    Some(format!("{before}{}\n{}{}{after}", MARKERS[0], record.tables(), MARKERS[1]))
}

/// What the tables say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Record {
    /// The further cells of each kernel's row.
    kernels: BTreeMap<Kernel, Vec<String>>,
    /// Of each case, what is in the columns of kernels.
    cases: BTreeMap<String, BTreeMap<Kernel, String>>,
}

/// A kernel's name, which sorts as `--kernel all` has them, with others behind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kernel(usize, String);

impl Kernel {
    fn new(name: &str) -> Self {
        Self(ALL.iter().position(|it| *it == name).unwrap_or(ALL.len()), name.to_owned())
    }
}

impl Record {
    /// Reads the tables again.
    fn read(part: &str) -> Self {
        let mut record = Self::default();
        let mut columns: Vec<Kernel> = Vec::new();
        for line in part.lines().filter(|line| line.starts_with('|') && !line.starts_with("|-")) {
            let mut cells = line.trim_matches('|').split('|').map(str::trim);
            let first = cells.next().unwrap_or_default();
            match first {
                "kernel" => {}
                "case" => columns = cells.map(Kernel::new).collect(),
                _ if columns.is_empty() => {
                    record.kernels.insert(Kernel::new(first), cells.map(str::to_owned).collect());
                }
                _ => {
                    let shown = columns.iter().cloned().zip(cells.map(str::to_owned));
                    record.cases.insert(first.to_owned(), shown.filter(|(_, shown)| !shown.is_empty()).collect());
                }
            }
        }
        record
    }

    /// Notes what came out now, and nothing of before.
    fn note(&mut self, name: &str, outcome: &Outcome, is_brief: bool, date: &str) {
        let kernel = Kernel::new(name);
        let pass = if is_brief { "brief" } else { "whole" };
        let mut row = vec![outcome.kernel.clone(), pass.to_owned()];
        row.extend(BACK_ENDS.into_iter().chain([OTHER]).map(|back_end| count(outcome, back_end)));
        row.push(date.to_owned());
        self.kernels.insert(kernel.clone(), row);
        for kernels in self.cases.values_mut() {
            kernels.remove(&kernel);
        }
        let mut cases: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for case in &outcome.cases {
            let (back_end, name) = parts(case);
            let shown = if back_end == OTHER { "yes" } else { back_end };
            let shown = if case.passed { shown.to_owned() } else { format!("{shown} **failed**") };
            cases.entry(name).or_default().push(shown);
        }
        for (name, mut shown) in cases {
            shown.sort();
            self.cases.entry(name.to_owned()).or_default().insert(kernel.clone(), shown.join(", "));
        }
        self.cases.retain(|_, kernels| !kernels.is_empty());
    }

    /// A table of kernels, and one of cases.
    fn tables(&self) -> String {
        let mut text = format!("\n{HEADER}\n|{}\n", "---|".repeat(HEADER.matches('|').count() - 1));
        for (Kernel(_, name), cells) in &self.kernels {
            // Writing to a string does not fail.
            writeln!(text, "| {name} | {} |", cells.join(" | ")).ok();
        }
        text.push_str("\n| case |");
        text.extend(self.kernels.keys().map(|Kernel(_, name)| format!(" {name} |")));
        text.push_str("\n|---|");
        text.push_str(&"---|".repeat(self.kernels.len()));
        text.push('\n');
        for (name, kernels) in &self.cases {
            write!(text, "| {name} |").ok();
            for kernel in self.kernels.keys() {
                write!(text, " {} |", kernels.get(kernel).map_or("", String::as_str)).ok();
            }
            text.push('\n');
        }
        text.push('\n');
        text
    }
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
    use super::{MARKERS, Seen, update};
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

    fn page(part: &str) -> String {
        format!("above\n{}\n{part}{}\nbelow\n", MARKERS[0], MARKERS[1])
    }

    #[test]
    fn shows_kernels_back_ends_and_cases() {
        let all = [
            seen("6.1", &[("sk-lookup::a b", true), ("tproxy::a b", false), ("takeover", true)]),
            seen("6.12", &[("tc::a b", true)]),
        ];
        let expected = page(
            "
| kernel | release and version | pass | sk-lookup | tc | tproxy | other | seen |
|---|---|---|---|---|---|---|---|
| 6.1 | 6.1.0 #1 | brief | 1 passed | – | 0 passed, **1 failed** | 1 passed | 2026-01-02 |
| 6.12 | 6.12.0 #1 | brief | – | 1 passed | – | – | 2026-01-02 |

| case | 6.1 | 6.12 |
|---|---|---|
| a b | sk-lookup, tproxy **failed** | tc |
| takeover | yes |  |

",
        );
        assert_eq!(update(&page("old\n"), &all, true, "2026-01-02"), Some(expected));
        assert_eq!(update("no markers", &all, true, "2026-01-02"), None);
    }

    #[test]
    fn what_was_seen_on_other_kernels_stays() {
        let before =
            [seen("6.1", &[("sk-lookup::a b", true), ("takeover", true)]), seen("newest", &[("tc::a b", true)])];
        let before = update(&page(""), &before, true, "2026-01-02").unwrap();
        let now = [seen("6.1", &[("tproxy::a b", true)]), seen("5.10", &[("tc is refused", true)])];
        let expected = page(
            "
| kernel | release and version | pass | sk-lookup | tc | tproxy | other | seen |
|---|---|---|---|---|---|---|---|
| 5.10 | 5.10.0 #1 | whole | – | – | – | 1 passed | 2026-02-03 |
| 6.1 | 6.1.0 #1 | whole | – | – | 1 passed | – | 2026-02-03 |
| newest | newest.0 #1 | brief | – | 1 passed | – | – | 2026-01-02 |

| case | 5.10 | 6.1 | newest |
|---|---|---|---|
| a b |  | tproxy | tc |
| tc is refused | yes |  |  |

",
        );
        assert_eq!(update(&before, &now, false, "2026-02-03"), Some(expected));
    }
}
