//! What several verbs need for printing.

use std::{borrow::Cow, time::Duration};

/// Columns under their headers, without lines, so that `awk` and `grep` can work on it. There may be very many rows.
pub(super) fn table<'a, const N: usize>(header: [&'a str; N], rows: impl Iterator<Item = [Cow<'a, str>; N]>) -> String {
    let rows: Vec<[Cow<'a, str>; N]> = [header.map(Cow::from)].into_iter().chain(rows).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::with_capacity(rows.len() * widths.iter().map(|width| width + 2).sum::<usize>());
    for row in &rows {
        let mut padding = 0;
        for (width, cell) in widths.iter().zip(row) {
            text.extend(std::iter::repeat_n(' ', padding));
            text.push_str(cell);
            padding = width - cell.len() + 2;
        }
        text.push('\n');
    }
    // The caller that prints the text ends its last line.
    text.pop();
    text
}

/// How long something has been so.
pub(super) fn ago(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

#[cfg(test)]
mod tests {
    use super::table;

    #[test]
    fn columns_stand_below_their_headers() {
        let rows = [["192.0.2.0/24", "tcp"], ["::/0", "both"]].map(|row| row.map(Into::into));
        let text = table(["PREFIX", "PROTOCOL"], rows.into_iter());
        assert_eq!(text, "PREFIX        PROTOCOL\n192.0.2.0/24  tcp\n::/0          both");
    }
}
