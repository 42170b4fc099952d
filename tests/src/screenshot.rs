//! A screen of a terminal as SVG: its lines as they were sent to it.

use std::fmt::Write as _;

/// Of a character, in units of the picture.
const CELL: (usize, usize) = (8, 18);
const MARGIN: usize = 14;
const FONT: &str = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
const PAPER: &str = "#161b22";
const INK: &str = "#d0d7de";
/// How lines are shown that begin with these orders to the terminal.
const TONES: [(&str, &str); 5] = [
    ("\x1b[1m", "font-weight=\"bold\""),
    ("\x1b[2m", "fill=\"#8b949e\""),
    ("\x1b[31m", "fill=\"#ff7b72\""),
    ("\x1b[32m", "fill=\"#7ee787\""),
    ("\x1b[33m", "fill=\"#e3b341\""),
];

/// Lines of a screen that has so many columns, as a picture.
pub fn svg(title: &str, columns: usize, lines: &[String]) -> String {
    let (width, height) = (columns * CELL.0 + 2 * MARGIN, lines.len() * CELL.1 + 2 * MARGIN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"{FONT}\" font-size=\"13\" fill=\"{INK}\">\n<title>{title}</title>\n\
         <rect width=\"{width}\" height=\"{height}\" rx=\"8\" fill=\"{PAPER}\"/>\n"
    );
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| !line.is_empty()) {
        let toned = TONES.iter().find_map(|(order, tone)| Some((line.strip_prefix(order)?, *tone)));
        let (line, tone) = toned.unwrap_or((line, ""));
        let text = line.trim_end_matches("\x1b[0m");
        let y = MARGIN + at * CELL.1 + CELL.1 * 3 / 4;
        // Whichever font there is, columns stand below each other.
        let length = text.chars().count() * CELL.0;
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        writeln!(
            svg,
            "<text x=\"{MARGIN}\" y=\"{y}\" textLength=\"{length}\" lengthAdjust=\"spacingAndGlyphs\" \
             xml:space=\"preserve\" {tone}>{text}</text>"
        )
        .expect("room");
    }
    svg + "</svg>\n"
}
