//! Tables for people: columns under their headers, as many as the terminal is wide enough for.

use std::borrow::Cow;

use super::{
    show::{columns_of, wrapped},
    tone::Tone,
};

/// Blanks between two columns.
const GAP: usize = 2;
/// No column is cut below this.
const NARROWEST: usize = 8;

/// A column.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    name: &'static str,
    is_number: bool,
    rank: u8,
    least: usize,
}

/// A column of texts, which stand at its left.
pub(super) const fn text(name: &'static str) -> Column {
    Column { name, is_number: false, rank: 0, least: usize::MAX }
}

/// A column of numbers, which stand at its right.
pub(super) const fn number(name: &'static str) -> Column {
    Column { name, is_number: true, rank: 0, least: usize::MAX }
}

impl Column {
    /// Where the terminal is too narrow, the columns with the highest rank are left out first; those with 0 never are.
    pub(super) const fn rank(self, rank: u8) -> Self {
        Self { rank, ..self }
    }

    /// Where the terminal is too narrow, texts of this column are cut to so many characters before others are left out.
    pub(super) const fn least(self, least: usize) -> Self {
        Self { least, ..self }
    }
}

/// The cells of a row, and how it is shown.
#[derive(Debug)]
pub(super) struct Row<'a, const N: usize> {
    /// One for each column.
    pub(super) cells: [Cow<'a, str>; N],
    /// For the whole row.
    pub(super) tone: Tone,
}

impl<'a, const N: usize> From<[Cow<'a, str>; N]> for Row<'a, N> {
    fn from(cells: [Cow<'a, str>; N]) -> Self {
        Self { cells, tone: Tone::Plain }
    }
}

/// Columns under their headers, without lines, so that `awk` and `grep` can work on it. There may be very many rows. What does not fit in
/// `width` characters is left out, which a last line says.
pub(super) fn table<'a, const N: usize, R: Into<Row<'a, N>>>(
    columns: &[Column; N],
    rows: impl Iterator<Item = R>,
    width: Option<usize>,
) -> String {
    let (mut text, left_out) = rows_of(columns, rows, width);
    if !left_out.is_empty() {
        let note = format!("left out for want of room, -o wide shows them: {}", left_out.join(", "));
        text.push('\n');
        text.push_str(&wrapped(&Tone::Dim.line(&note), width.unwrap_or(usize::MAX), 0));
    }
    text
}

/// As [`table`], with the names of the columns that are left out apart.
pub(super) fn rows_of<'a, const N: usize>(
    columns: &[Column; N],
    rows: impl Iterator<Item = impl Into<Row<'a, N>>>,
    width: Option<usize>,
) -> (String, Vec<&'static str>) {
    let header = Row { cells: columns.map(|column| column.name.into()), tone: Tone::Head };
    let rows: Vec<Row<'a, N>> = [header].into_iter().chain(rows.map(Into::into)).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(&row.cells) {
            *width = columns_of(cell).max(*width);
        }
    }
    let is_shown = width.map_or([true; N], |width| fit(columns, &says_nothing(&rows), &mut widths, width));
    let mut text = String::with_capacity(rows.len() * widths.iter().map(|width| width + GAP).sum::<usize>());
    for Row { cells, tone } in &rows {
        text.push_str(tone.mark());
        push_cells(&mut text, columns, &widths, &is_shown, cells);
        text.push('\n');
    }
    // The caller that prints the text ends its last line.
    text.pop();
    let left_out = columns.iter().zip(is_shown).filter(|(_, is_shown)| !is_shown).map(|(column, _)| column.name);
    (text, left_out.collect())
}

fn push_cells<const N: usize>(
    text: &mut String,
    columns: &[Column; N],
    widths: &[usize; N],
    is_shown: &[bool; N],
    cells: &[Cow<'_, str>; N],
) {
    // Blanks that are owed: none stand at the end of a line.
    let mut padding = 0;
    for (((column, width), is_shown), cell) in columns.iter().zip(widths).zip(is_shown).zip(cells) {
        if !is_shown {
            continue;
        }
        let cell = cut(cell, *width);
        if cell.is_empty() {
            padding += width + GAP;
            continue;
        }
        let room = width - columns_of(&cell);
        let (before, after) = if column.is_number { (room, 0) } else { (0, room) };
        text.extend(std::iter::repeat_n(' ', padding + before));
        text.push_str(&cell);
        padding = after + GAP;
    }
}

/// The columns in which no row has more than a dash: of a table that is too wide they go first.
fn says_nothing<const N: usize>(rows: &[Row<'_, N>]) -> [bool; N] {
    let mut says_nothing = [true; N];
    // Behind the header.
    for row in &rows[1..] {
        for (says_nothing, cell) in says_nothing.iter_mut().zip(&row.cells) {
            *says_nothing &= matches!(&**cell, "-" | "");
        }
    }
    says_nothing
}

/// Cuts texts that may be cut, leaves columns out, and then cuts the widest texts, until a row fits. Which columns are shown.
fn fit<const N: usize>(
    columns: &[Column; N],
    says_nothing: &[bool; N],
    widths: &mut [usize; N],
    width: usize,
) -> [bool; N] {
    let mut is_shown = [true; N];
    let total = |widths: &[usize; N], is_shown: &[bool; N]| {
        let shown = || widths.iter().zip(is_shown).filter(|(_, is_shown)| **is_shown);
        shown().map(|(width, _)| width + GAP).sum::<usize>().saturating_sub(GAP)
    };
    let whole = *widths;
    for (width, column) in widths.iter_mut().zip(columns) {
        *width = column.least.max(column.name.len()).min(*width);
    }
    while total(widths, &is_shown) > width {
        let may_go = (0..N).filter(|at| is_shown[*at] && columns[*at].rank > 0);
        let Some(last) = may_go.max_by_key(|at| (says_nothing[*at], columns[*at].rank, *at)) else { break };
        is_shown[last] = false;
    }
    for at in (0..N).filter(|at| is_shown[*at]) {
        let spare = width.saturating_sub(total(widths, &is_shown));
        widths[at] = whole[at].min(widths[at] + spare);
    }
    loop {
        let excess = total(widths, &is_shown).saturating_sub(width);
        let texts = (0..N).filter(|at| is_shown[*at] && !columns[*at].is_number && widths[*at] > NARROWEST);
        let Some(widest) = texts.max_by_key(|at| widths[*at]).filter(|_| excess > 0) else { return is_shown };
        widths[widest] = widths[widest].saturating_sub(excess).max(NARROWEST);
    }
}

/// The beginning of a text that is too long, which its last character shows.
fn cut(text: &str, width: usize) -> Cow<'_, str> {
    if columns_of(text) <= width {
        return text.into();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::{Column, Row, Tone, number, table, text};
    use crate::cli::tone::painted;

    const COLUMNS: [Column; 5] =
        [text("PREFIX"), text("PORTS").rank(1), text("ORIGIN").rank(3), number("STEERED"), text("SERVICE").rank(2)];

    fn rows() -> Vec<Row<'static, 5>> {
        let rows = [
            (["192.0.2.0/24", "1-65535", "added", "7", "web"], Tone::Plain),
            (["2001:db8:1234:5678:9abc:def0::/96", "80,443", "config", "1234567", "größer"], Tone::Bad),
        ];
        rows.map(|(cells, tone)| Row { cells: cells.map(Into::into), tone }).into()
    }

    fn at(width: Option<usize>, in_colours: bool) -> String {
        painted(&table(&COLUMNS, rows().into_iter(), width), in_colours)
    }

    #[test]
    fn numbers_stand_at_the_right_and_nothing_at_the_end_of_lines() {
        assert_eq!(
            at(None, false),
            "PREFIX                             PORTS    ORIGIN  STEERED  SERVICE\n\
             192.0.2.0/24                       1-65535  added         7  web\n\
             2001:db8:1234:5678:9abc:def0::/96  80,443   config  1234567  größer"
        );
        assert_eq!(at(Some(200), false), at(None, false));
        assert_eq!(at(Some(80), false), at(None, false));
    }

    #[test]
    fn a_narrow_terminal_shows_what_matters() {
        assert_eq!(
            at(Some(60), false),
            "PREFIX                             PORTS    STEERED  SERVICE\n\
             192.0.2.0/24                       1-65535        7  web\n\
             2001:db8:1234:5678:9abc:def0::/96  80,443   1234567  größer\n\
             left out for want of room, -o wide shows them: ORIGIN"
        );
        assert_eq!(
            at(Some(40), false),
            "PREFIX                           STEERED\n\
             192.0.2.0/24                           7\n\
             2001:db8:1234:5678:9abc:def0::…  1234567\n\
             left out for want of room, -o wide shows\n\
             them: PORTS, ORIGIN, SERVICE"
        );
        for width in 0..120 {
            let text = at(Some(width), false);
            let longest = text.lines().take(3).map(|line| line.chars().count()).max().unwrap();
            assert!(longest <= width.max(17), "{width}: {text}");
        }
    }

    #[test]
    fn columns_without_content_go_first_and_lists_are_cut() {
        let columns = [text("NAME"), text("LIST").rank(1).least(6), text("EXCEPT").rank(1), text("ORIGIN").rank(2)];
        let rows = || [["a", "1,2,3,4,5,6,7", "-", "added"], ["b", "1", "-", "config"]].map(|it| it.map(Cow::from));
        let at = |width| {
            let shown = painted(&table(&columns, rows().into_iter(), Some(width)), false);
            shown.lines().take(2).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(at(40), "NAME  LIST           EXCEPT  ORIGIN\na     1,2,3,4,5,6,7  -       added");
        assert_eq!(at(28), "NAME  LIST    EXCEPT  ORIGIN\na     1,2,3…  -       added");
        assert_eq!(at(27), "NAME  LIST           ORIGIN\na     1,2,3,4,5,6,7  added");
        assert_eq!(at(20), "NAME  LIST    ORIGIN\na     1,2,3…  added");
    }

    #[test]
    fn an_empty_cell_at_the_end_leaves_no_blanks() {
        let rows = [["a", ""], ["b", "note"]].map(|it| it.map(Cow::from));
        let shown = table(&[text("NAME"), text("NOTE")], rows.into_iter(), None);
        assert_eq!(painted(&shown, false), "NAME  NOTE\na\nb     note");
    }

    #[test]
    fn rows_have_the_colour_of_what_is_wrong() {
        let text = at(Some(40), true);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("\x1b[1mPREFIX ") && lines[0].ends_with("STEERED\x1b[0m"), "{text}");
        assert!(!lines[1].contains('\x1b'), "{text}");
        assert!(lines[2].starts_with("\x1b[31m2001:") && lines[2].ends_with("\x1b[0m"), "{text}");
    }
}
