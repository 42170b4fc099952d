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
/// What stands in the cells of those that choose their back end themselves, and behind what failed.
const YES: &str = "yes";
const FAILED: &str = " **failed**";
/// The column of cases that choose their back end themselves.
const OTHER: &str = "other";
const HEADER: &str = "| kernel | release and version | pass | sk-lookup | tc | tproxy | other | seen |";

/// A kernel as it was named, and what came out.
pub(crate) type Seen = (String, Outcome);

/// How many cases were run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    Brief,
    Whole,
    /// Those that a filter has let pass, which take the place of the same ones of an earlier pass.
    Some,
}

/// Rewrites the page's part: what was seen now takes the place of what was seen on the same kernels, and the rest stays.
pub(crate) fn write(root: &Path, seen: &[Seen], extent: Extent) -> Result<()> {
    let date = stdout(Command::new("date").args(["--utc", "+%F"]))?;
    let path = root.join(PAGE);
    let page = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let page = update(&page, seen, extent, date.trim())?;
    fs::write(&path, page).with_context(|| format!("write {}", path.display()))
}

fn update(page: &str, seen: &[Seen], extent: Extent, date: &str) -> Result<String> {
    let lacking = || format!("{PAGE} lacks its markers");
    let (before, rest) = page.split_once(MARKERS[0]).with_context(lacking)?;
    let (part, after) = rest.split_once(MARKERS[1]).with_context(lacking)?;
    let mut record = Record::read(part);
    for (name, outcome) in seen {
        record.note(name, outcome, extent, date)?;
    }
    Ok(format!("{before}{}\n{}{}{after}", MARKERS[0], record.tables(), MARKERS[1]))
}

/// What the tables say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Record {
    kernels: BTreeMap<Kernel, Pass>,
    /// Of each case and kernel, which back ends passed.
    cases: BTreeMap<String, BTreeMap<Kernel, Results>>,
}

/// By back end.
type Results = BTreeMap<String, bool>;

/// The last pass of a kernel.
#[derive(Debug, PartialEq, Eq)]
struct Pass {
    release: String,
    extent: String,
    date: String,
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
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            match cells[..] {
                ["kernel", ..] | [] => {}
                ["case", ref kernels @ ..] => columns = kernels.iter().copied().map(Kernel::new).collect(),
                [name, release, extent, .., date] if columns.is_empty() => {
                    let [release, extent, date] = [release, extent, date].map(str::to_owned);
                    record.kernels.insert(Kernel::new(name), Pass { release, extent, date });
                }
                [name, ref shown @ ..] => {
                    let shown = columns.iter().cloned().zip(shown.iter().copied().map(results));
                    record.cases.insert(name.to_owned(), shown.filter(|(_, results)| !results.is_empty()).collect());
                }
            }
        }
        record
    }

    /// Notes what came out now, and nothing of before but cases that were not chosen.
    fn note(&mut self, name: &str, outcome: &Outcome, extent: Extent, date: &str) -> Result<()> {
        let kernel = Kernel::new(name);
        if extent != Extent::Some {
            self.cases.values_mut().for_each(|kernels| drop(kernels.remove(&kernel)));
        }
        let extent = match extent {
            Extent::Brief => "brief".to_owned(),
            Extent::Whole => "whole".to_owned(),
            Extent::Some => {
                let pass = self.kernels.get(&kernel).filter(|pass| pass.release == outcome.kernel);
                let pass = pass.with_context(|| {
                    format!(
                        "{PAGE} has no pass on this version of the kernel {name}, {}: record one first",
                        outcome.kernel
                    )
                })?;
                pass.extent.clone()
            }
        };
        let pass = Pass { release: outcome.kernel.clone(), extent, date: date.to_owned() };
        self.kernels.insert(kernel.clone(), pass);
        for case in &outcome.cases {
            let (back_end, name) = parts(case);
            let of_kernel = self.cases.entry(name.to_owned()).or_default().entry(kernel.clone()).or_default();
            of_kernel.insert(back_end.to_owned(), case.passed);
        }
        self.cases.retain(|_, kernels| !kernels.is_empty());
        Ok(())
    }

    /// A table of kernels, and one of cases.
    fn tables(&self) -> String {
        let mut text = format!("\n{HEADER}\n|{}\n", "---|".repeat(HEADER.matches('|').count() - 1));
        for (kernel, Pass { release, extent, date }) in &self.kernels {
            let counts: Vec<String> =
                BACK_ENDS.into_iter().chain([OTHER]).map(|back_end| self.count(kernel, back_end)).collect();
            // Writing to a string does not fail.
            writeln!(text, "| {} | {release} | {extent} | {} | {date} |", kernel.1, counts.join(" | ")).ok();
        }
        text.push_str("\n| case |");
        text.extend(self.kernels.keys().map(|Kernel(_, name)| format!(" {name} |")));
        text.push_str("\n|---|");
        text.push_str(&"---|".repeat(self.kernels.len()));
        text.push('\n');
        for (name, kernels) in &self.cases {
            write!(text, "| {name} |").ok();
            for kernel in self.kernels.keys() {
                write!(text, " {} |", kernels.get(kernel).map(shown).unwrap_or_default()).ok();
            }
            text.push('\n');
        }
        text.push('\n');
        text
    }

    /// `43 passed`, `41 passed, 2 failed`, or nothing where no case was chosen.
    fn count(&self, kernel: &Kernel, back_end: &str) -> String {
        let results = self.cases.values().filter_map(|kernels| kernels.get(kernel)?.get(back_end));
        let (passed, failed): (Vec<bool>, Vec<bool>) = results.partition(|passed| **passed);
        match (passed.len(), failed.len()) {
            (0, 0) => "–".to_owned(),
            (passed, 0) => format!("{passed} passed"),
            (passed, failed) => format!("{passed} passed, **{failed} failed**"),
        }
    }
}

/// What the cell of a case and a kernel says.
fn shown(results: &Results) -> String {
    let shown = results.iter().map(|(back_end, passed)| {
        let name = if back_end == OTHER { YES } else { back_end };
        if *passed { name.to_owned() } else { format!("{name}{FAILED}") }
    });
    shown.collect::<Vec<_>>().join(", ")
}

/// The reverse of [`shown`].
fn results(shown: &str) -> Results {
    let of_each = shown.split(", ").filter(|it| !it.is_empty()).map(|it| {
        let (name, passed) = it.strip_suffix(FAILED).map_or((it, true), |name| (name, false));
        (if name == YES { OTHER } else { name }.to_owned(), passed)
    });
    of_each.collect()
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
    use super::{Extent, MARKERS, Seen, update};
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
        assert_eq!(update(&page("old\n"), &all, Extent::Brief, "2026-01-02").unwrap(), expected);
        assert!(update("no markers", &all, Extent::Brief, "2026-01-02").is_err());
    }

    #[test]
    fn what_was_seen_on_other_kernels_stays() {
        let before =
            [seen("6.1", &[("sk-lookup::a b", true), ("takeover", true)]), seen("newest", &[("tc::a b", true)])];
        let before = update(&page(""), &before, Extent::Brief, "2026-01-02").unwrap();
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
        assert_eq!(update(&before, &now, Extent::Whole, "2026-02-03").unwrap(), expected);
    }

    #[test]
    fn cases_that_are_run_once_more_take_the_place_of_the_same_ones() {
        let before = [seen("6.1", &[("sk-lookup::a b", true), ("tproxy::a b", false), ("takeover", false)])];
        let before = update(&page(""), &before, Extent::Whole, "2026-01-02").unwrap();
        let again = [seen("6.1", &[("tproxy::a b", true), ("takeover", true)])];
        let after = update(&before, &again, Extent::Some, "2026-02-03").unwrap();
        assert!(
            after.contains("| 6.1 | 6.1.0 #1 | whole | 1 passed | – | 1 passed | 1 passed | 2026-02-03 |"),
            "{after}"
        );
        assert!(after.contains("| a b | sk-lookup, tproxy |\n| takeover | yes |"), "{after}");
        // Neither of a kernel that has no pass, nor of another version.
        for kernel in ["5.10", "6.1"] {
            let mut other = seen(kernel, &[("takeover", true)]);
            other.1.kernel.push_str(" another");
            assert!(update(&before, &[other], Extent::Some, "2026-02-03").is_err());
        }
    }
}
