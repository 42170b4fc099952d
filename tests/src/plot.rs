//! Plots as SVG: panels side by side, both axes logarithmic. Colours are such that they show on light and dark backgrounds.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};

use crate::numbers::count;

/// Size of a panel's field, and the room around it for labels.
const FIELD: (f64, f64) = (340.0, 220.0);
const LEFT: f64 = 64.0;
const TOP: f64 = 40.0;
const PANEL: (f64, f64) = (LEFT + FIELD.0 + 24.0, TOP + FIELD.1 + 56.0);
const LEGEND: f64 = 28.0;
const COLUMNS: usize = 2;
/// For backgrounds of either kind.
const INK: &str = "#808890";
const COLOURS: [&str; 6] = ["#e07b00", "#2f81f7", "#2da44e", "#bf5af2", "#e5484d", "#00a3a3"];

/// Points that belong together: how many there were of something, and what was measured.
#[derive(Debug)]
pub struct Line {
    /// What stands in the legend.
    pub name: String,
    /// Both above zero.
    pub points: Vec<(f64, f64)>,
}

/// A field with lines. The lines of all panels have their colours by their place.
#[derive(Debug)]
pub struct Panel {
    /// What stands above it.
    pub title: String,
    /// What stands below the horizontal axis.
    pub x: &'static str,
    /// What stands above the vertical axis.
    pub y: &'static str,
    /// What is drawn.
    pub lines: Vec<Line>,
}

/// Writes panels to a file, two in a row.
pub fn write(path: &Path, title: &str, panels: &[Panel]) -> Result<()> {
    let rows = panels.len().div_ceil(COLUMNS);
    let (width, height) = (PANEL.0 * count(COLUMNS), PANEL.1 * count(rows));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
         height=\"{height:.0}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"{INK}\">\n<title>{title}</title>\n"
    );
    for (at, panel) in panels.iter().enumerate() {
        let (x, y) = (PANEL.0 * count(at % COLUMNS) + LEFT, PANEL.1 * count(at / COLUMNS) + TOP);
        writeln!(svg, "<g transform=\"translate({x:.0} {y:.0})\">")?;
        draw(&mut svg, panel)?;
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    fs::write(path, svg).with_context(|| format!("write {}", path.display()))
}

fn draw(svg: &mut String, Panel { title, x, y, lines }: &Panel) -> Result<()> {
    let all = || lines.iter().flat_map(|line| &line.points);
    let xs = Axis::of(all().map(|point| point.0), FIELD.0);
    let ys = Axis::of(all().map(|point| point.1), FIELD.1);
    let (width, height) = FIELD;
    writeln!(svg, "<text x=\"0\" y=\"-24\" font-weight=\"bold\">{title}</text>")?;
    writeln!(svg, "<text x=\"-{LEFT}\" y=\"-8\">{y}</text>")?;
    writeln!(svg, "<text x=\"{width}\" y=\"{}\" text-anchor=\"end\">{x}</text>", height + 34.0)?;
    for power in xs.first..=xs.last {
        let (at, label) = (xs.place(10_f64.powi(power)), label(power));
        writeln!(svg, "<path d=\"M{at:.1} 0V{height}\" stroke=\"{INK}\" stroke-opacity=\"0.25\"/>")?;
        writeln!(svg, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>", height + 18.0)?;
    }
    for power in ys.first..=ys.last {
        let (at, label) = (height - ys.place(10_f64.powi(power)), label(power));
        writeln!(svg, "<path d=\"M0 {at:.1}H{width}\" stroke=\"{INK}\" stroke-opacity=\"0.25\"/>")?;
        writeln!(svg, "<text x=\"-6\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", at + 4.0)?;
    }
    for (at, (line, colour)) in lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let points: Vec<_> = line.points.iter().map(|(x, y)| (xs.place(*x), height - ys.place(*y))).collect();
        let path = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect::<Vec<_>>().join(" ");
        writeln!(svg, "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>")?;
        for (x, y) in &points {
            writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>")?;
        }
        let (x, y) = (10.0, 16.0 + 16.0 * count(at));
        writeln!(svg, "<path d=\"M{x} {:.0}h{}\" stroke=\"{colour}\" stroke-width=\"2\"/>", y - 4.0, LEGEND - 8.0)?;
        writeln!(svg, "<text x=\"{}\" y=\"{y:.0}\">{}</text>", x + LEGEND, line.name)?;
    }
    Ok(())
}

/// A logarithmic axis from one power of ten to another.
struct Axis {
    first: i32,
    last: i32,
    length: f64,
}

impl Axis {
    fn of(values: impl Iterator<Item = f64>, length: f64) -> Self {
        let (low, high) = values.fold((f64::MAX, f64::MIN), |(low, high), it| (low.min(it), high.max(it)));
        let power = |value: f64| {
            #[expect(clippy::cast_possible_truncation, reason = "a power of ten")]
            let power = value as i32;
            power
        };
        let (first, last) = (power(low.log10().floor()), power(high.log10().ceil()));
        Self { first, last: last.max(first + 1), length }
    }

    fn place(&self, value: f64) -> f64 {
        let (first, last) = (f64::from(self.first), f64::from(self.last));
        (value.log10() - first) / (last - first) * self.length
    }
}

fn label(power: i32) -> String {
    match power {
        0..3 => format!("{}", 10_f64.powi(power)),
        3..6 => format!("{}k", 10_f64.powi(power - 3)),
        6.. => format!("{}M", 10_f64.powi(power - 6)),
        _ => format!("{:.*}", usize::try_from(-power).unwrap_or_default(), 10_f64.powi(power)),
    }
}
