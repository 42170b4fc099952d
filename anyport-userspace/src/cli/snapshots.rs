//! What people see: whole lists at several widths of the terminal, without and with colours, made of what a daemon has answered
//! (`snapshots/*.json`) and compared with `snapshots/*.txt`, which `ANYPORT_WRITE_DOCS=1` writes again.

use std::{env, fmt::Write as _, fs, path::Path};

use serde_json::from_str;

use super::{prefixes, services, status, tone::painted};

const WIDTHS: [usize; 4] = [40, 80, 120, 200];

/// Compares what `shown` makes at each width with the file of that name.
fn compare(name: &str, shown: impl Fn(Option<usize>) -> String) {
    let mut text = String::new();
    for width in WIDTHS {
        for (how, in_colours) in [("", false), (", in colours", true)] {
            let screen = painted(&shown(Some(width)), in_colours).replace('\x1b', "\\e");
            writeln!(text, "=== {width} columns{how}\n{screen}\n").expect("room");
        }
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/snapshots").join(name).with_extension("txt");
    if env::var_os("ANYPORT_WRITE_DOCS").is_some() {
        fs::write(&file, &text).expect("a snapshot");
    }
    let before = fs::read_to_string(&file).unwrap_or_default();
    assert!(text == before, "{} differs from this; ANYPORT_WRITE_DOCS=1 writes it:\n{text}", file.display());
}

#[test]
fn prefixes_at_each_width() {
    let views = from_str::<Vec<_>>(include_str!("snapshots/prefixes.json")).expect("rules");
    compare("prefixes", |width| prefixes::List::default().text(&views, width));
}

#[test]
fn services_and_upstreams_at_each_width() {
    let views = from_str::<Vec<_>>(include_str!("snapshots/services.json")).expect("services");
    compare("services", |width| services::lists(&views, width));
}

#[test]
fn status_at_each_width() {
    let view = from_str(include_str!("snapshots/status.json")).expect("a status");
    compare("status", |width| status::text(&view, width));
    let view = from_str(include_str!("snapshots/degraded.json")).expect("a status");
    compare("degraded", |width| status::text(&view, width));
}
