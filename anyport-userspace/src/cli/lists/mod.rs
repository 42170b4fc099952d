//! Lists of prefixes as the world publishes them, made into the rules a line that `apply` takes.

mod json;
mod lines;
mod others;

#[cfg(feature = "fleet")]
use std::path::Path;
use std::{io::Read as _, path::PathBuf};

use super::apply::read;
use crate::{
    api::{Problem, ProblemKind},
    rules::{InvalidText, Prefix},
    text::excerpt,
};

/// Bytes of the largest file: what the daemon takes.
const LARGEST: u64 = 256 << 20;

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// Services and rules as in the configuration, or a rule a line; lines may begin with a range or a netmask
    Rules,
    /// What `ipset save` writes
    Ipset,
    /// A set as `nft list` shows it
    Nft,
    /// What `ip route` shows
    Routes,
    /// JSON with prefixes anywhere in it
    Json,
}

/// Which file, and how to read it.
#[derive(Debug, clap::Args)]
pub(super) struct Source {
    /// The file, also compressed by gzip; - for standard input
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// How the file is written [default: by what it looks like]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Of JSON, only prefixes within objects that have this, such as region=eu-west-1; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    select: Vec<json::Selector>,
}

/// What was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reading {
    /// Services and rules, or a rule a line.
    pub(super) text: String,
    /// What there is to say of it.
    pub(super) notes: Vec<String>,
}

/// A mistake in a file.
#[derive(Debug, PartialEq, Eq)]
struct Mistake {
    line: usize,
    column: usize,
    why: String,
}

impl Source {
    /// A file that says itself how it is written.
    pub(super) fn of(file: PathBuf) -> Self {
        Self { file, format: None, select: Vec::new() }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// It can't be read, or makes no sense: says where and why.
    pub(super) fn read(&self) -> Result<Reading, Problem> {
        let name = self.file.display();
        let wrong = |why: String| Problem::new(ProblemKind::Invalid, format!("{name}: {why}"));
        let text = decode(read(&self.file)?).map_err(|InvalidText(why)| wrong(why))?;
        self.convert(text).map_err(|mistakes| wrong(describe(&mistakes)))
    }

    /// Reads the file, which has prefixes and nothing else.
    ///
    /// # Errors
    /// As [`Self::read`], or something else stands there: says where.
    pub(super) fn prefixes(&self) -> Result<Vec<Prefix>, Problem> {
        let Reading { text, .. } = self.read()?;
        let mut prefixes = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let word = line.split('#').next().unwrap_or_default().trim();
            if word.is_empty() {
                continue;
            }
            prefixes.push(lines::prefix(word).map_err(|why| {
                let mistake = Mistake { line: number, column: 1, why };
                let what = format!("{}: {}", self.file.display(), describe(&[mistake]));
                Problem::new(ProblemKind::Invalid, what).hint("rules with ports and more are for anyportctl apply")
            })?);
        }
        Ok(prefixes)
    }

    /// Its name, for messages.
    #[cfg(feature = "fleet")]
    pub(super) fn name(&self) -> &Path {
        &self.file
    }

    fn convert(&self, text: String) -> Result<Reading, Vec<Mistake>> {
        let format = self.format.unwrap_or_else(|| detect(&text));
        if !self.select.is_empty() && format != Format::Json {
            let why = "--select is for JSON, and this is none; --format json takes it for that".to_owned();
            return Err(vec![Mistake { line: 1, column: 1, why }]);
        }
        let (text, skipped) = match format {
            Format::Rules => (lines::normalize(text)?, None),
            Format::Ipset => others::ipset(&text)?,
            Format::Nft => others::nft(&text)?,
            Format::Routes => others::routes(&text)?,
            Format::Json => (json::prefixes(&text, &self.select)?, None),
        };
        let what = match format {
            Format::Rules => None,
            Format::Ipset => Some("what ipset save writes"),
            Format::Nft => Some("a set of nft"),
            Format::Routes => Some("what ip route shows"),
            Format::Json => Some("JSON"),
        };
        let read = what
            .map(|what| format!("{} was read as {what}, with {} prefixes", self.file.display(), text.lines().count()));
        Ok(Reading { text, notes: read.into_iter().chain(skipped).collect() })
    }
}

fn describe(mistakes: &[Mistake]) -> String {
    const SHOWN: usize = 5;
    let shown = mistakes.iter().take(SHOWN);
    let mut text: Vec<String> =
        shown.map(|Mistake { line, column, why }| format!("line {line}, column {column}: {why}")).collect();
    if let Some(more) = mistakes.len().checked_sub(SHOWN).filter(|more| *more > 0) {
        text.push(format!("and {more} more"));
    }
    text.join("; ")
}

/// The text of a file: unpacked, and in UTF-8 without a mark in front.
fn decode(mut bytes: Vec<u8>) -> Result<String, InvalidText> {
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut unpacked = Vec::new();
        let read = flate2::read::MultiGzDecoder::new(bytes.as_slice()).take(LARGEST + 1).read_to_end(&mut unpacked);
        read.map_err(|error| InvalidText(format!("decompress it: {error}")))?;
        if unpacked.len() as u64 > LARGEST {
            return Err(InvalidText(format!("it has more than {LARGEST} bytes when decompressed")));
        }
        bytes = unpacked;
    }
    let utf16 = |rest: &[u8], of: fn([u8; 2]) -> u16| {
        if !rest.len().is_multiple_of(2) {
            return Err(InvalidText("it begins as UTF-16 and ends within a character".into()));
        }
        let units: Vec<u16> = rest.chunks_exact(2).map(|pair| of([pair[0], pair[1]])).collect();
        String::from_utf16(&units).map_err(|error| InvalidText(format!("it begins as UTF-16 and is none: {error}")))
    };
    match bytes.as_slice() {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        [0xef, 0xbb, 0xbf, ..] => text_of(bytes.split_off(3)),
        _ => text_of(bytes),
    }
}

fn text_of(bytes: Vec<u8>) -> Result<String, InvalidText> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let before = &error.as_bytes()[..at];
        let line = String::from_utf8_lossy(before).matches('\n').count() + 1;
        InvalidText(format!("line {line}: it is no text in UTF-8 from its byte {at} on"))
    })
}

/// What a file looks like, by its first lines.
fn detect(text: &str) -> Format {
    const LOOKED_AT: usize = 100;
    let is_json = |line: &str| {
        let rest = line.strip_prefix('[').map(str::trim_start);
        line.starts_with('{') || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['"', '{', ']']))
    };
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';']));
    for (number, line) in lines.take(LOOKED_AT).enumerate() {
        let words: Vec<&str> = line.split_ascii_whitespace().take(3).collect();
        match words.as_slice() {
            _ if number == 0 && is_json(line) => return Format::Json,
            ["table" | "set" | "map", ..] | ["elements", "=", ..] => return Format::Nft,
            ["create" | "add", _, _] => return Format::Ipset,
            [
                "default" | "unicast" | "local" | "broadcast" | "blackhole" | "unreachable" | "prohibit" | "throw",
                ..,
            ]
            | [_, "via" | "dev" | "proto" | "scope" | "nhid" | "metric" | "src", ..] => return Format::Routes,
            _ => {}
        }
    }
    Format::Rules
}

/// What is no address, with what the writer may have meant.
fn no_address(text: &str) -> String {
    let hint = if text.contains('%') {
        "; leave the zone behind % out: it is this machine's name for a link"
    } else if text.contains("://") || text.bytes().any(|it| it.is_ascii_alphabetic() && !it.is_ascii_hexdigit()) {
        "; names and URLs are not looked up"
    } else {
        ""
    };
    format!("{} is no address, prefix or range{hint}", excerpt(text))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::{Format, Source, decode, describe, detect};

    pub(super) fn source(format: Option<Format>, select: &[&str]) -> Source {
        let select = select.iter().map(|it| it.parse().unwrap()).collect();
        Source { file: "list".into(), format, select }
    }

    #[test]
    fn files_are_recognized() {
        for (text, format) in [
            ("", Format::Rules),
            ("# x\n192.0.2.0/24 tcp 80\n", Format::Rules),
            ("[[rule]]\nprefix = \"192.0.2.0/24\"\n", Format::Rules),
            ("192.0.2.1 - 192.0.2.9\n", Format::Rules),
            ("1.10.16.0/20 ; SBL256894\n", Format::Rules),
            ("{\"prefixes\": []}", Format::Json),
            ("[\"192.0.2.0/24\"]", Format::Json),
            ("[\n  \"192.0.2.0/24\"\n]", Format::Json),
            ("[]", Format::Json),
            ("create x hash:net family inet\nadd x 192.0.2.0/24\n", Format::Ipset),
            ("add x 192.0.2.0/24\n", Format::Ipset),
            ("table ip filter {\n\tset x {\n", Format::Nft),
            ("elements = { 192.0.2.0/24 }", Format::Nft),
            ("default via 198.51.100.1 dev eth0\n", Format::Routes),
            ("192.0.2.0/24 dev eth0 proto kernel\n", Format::Routes),
            ("blackhole 192.0.2.0/24\n", Format::Routes),
        ] {
            assert_eq!(detect(text), format, "{text:?}");
        }
    }

    #[test]
    fn bytes_become_text() {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(b"\xef\xbb\xbf192.0.2.0/24\n").unwrap();
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        for bytes in [
            b"192.0.2.0/24\n".to_vec(),
            b"\xef\xbb\xbf192.0.2.0/24\n".to_vec(),
            packed.finish().unwrap(),
            utf16("\u{feff}192.0.2.0/24\n"),
        ] {
            assert_eq!(decode(bytes).unwrap(), "192.0.2.0/24\n");
        }
        assert!(decode(b"\xff\xfe\0".to_vec()).unwrap_err().0.contains("UTF-16"));
        assert!(decode(b"a\n\xffb".to_vec()).unwrap_err().0.contains("line 2"));
        assert!(decode(b"\x1f\x8bnonsense".to_vec()).unwrap_err().0.contains("decompress"));
    }

    #[test]
    fn what_was_recognized_is_said() {
        let read = source(None, &[]).convert("[\"192.0.2.0/24\", \"2001:db8::/32\"]".into()).unwrap();
        assert_eq!(read.notes, ["list was read as JSON, with 2 prefixes"]);
        assert_eq!(source(None, &[]).convert("192.0.2.0/24\n".into()).unwrap().notes, [""; 0]);
        let why = describe(&source(None, &["a=b"]).convert("192.0.2.0/24\n".into()).unwrap_err());
        assert!(why.contains("--format json"), "{why}");
    }

    #[test]
    fn mistakes_have_a_place_and_stay_short() {
        let long = "x".repeat(100_000);
        for format in [Format::Rules, Format::Ipset, Format::Nft, Format::Routes, Format::Json] {
            let text = match format {
                Format::Rules => format!("192.0.2.0/24\n {long}-{long}\n"),
                Format::Ipset => format!("add x {long}\n"),
                Format::Nft => format!("elements = {{ {long} }}"),
                Format::Routes => format!("{long} dev eth0\n"),
                Format::Json => format!("[\"{long}"),
            };
            let why = describe(&source(Some(format), &[]).convert(text).unwrap_err());
            assert!(why.starts_with("line ") && why.contains("column ") && why.len() < 400, "{format:?}: {why}");
        }
    }
}
