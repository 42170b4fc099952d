//! The sample file and the tables of the documents are those of the declaration.

#[cfg(feature = "fleet")]
use std::num::NonZeroU8;
use std::{env, fs, path::Path};

use clap::{Arg, CommandFactory as _};

use super::{Announce, ChangesBy, Config, ConfigTable, DaemonConfig, Options, Setting, Settings};

/// Have the test write what it would otherwise only compare.
const WRITE: &str = "ANYPORT_WRITE_DOCS";
/// Where comments of the sample file end.
const COLUMNS: usize = 98;

/// A part of a document that is made of a declaration, between two lines that name it.
struct Part {
    document: &'static str,
    table: &'static str,
    text: String,
}

fn parts() -> Vec<Part> {
    let part = |document, table, text| Part { document, table, text };
    let mut parts = vec![
        part("anyport.toml", "daemon", sample::<DaemonConfig>("[daemon]")),
        part("anyport.toml", "announce", sample::<Announce>("#[announce]")),
        part("configuration.md", "daemon", options()),
        part("announce.md", "announce", keys::<Announce>()),
    ];
    #[cfg(feature = "fleet")]
    parts.extend([
        part("anyport.toml", "fleet", sample::<super::FleetSettings>("#[fleet]")),
        part("configuration.md", "fleet", keys::<super::FleetSettings>()),
    ]);
    parts
}

/// A table as it stands in the sample file: commented out, each setting below its help.
fn sample<T: ConfigTable>(head: &str) -> String {
    let setting = |it: &Setting<T>| {
        let help = if has_default_as_sample(it) { it.help.to_owned() } else { it.help_text() };
        let words = words::<T>(it.name);
        let one_of = if words.is_empty() { String::new() } else { format!(": {}", words.join(", ")) };
        format!("{}#{} = {}\n", comment(&(help + &one_of)), it.name, it.sample)
    };
    let settings: Vec<_> = T::SETTINGS.iter().map(setting).collect();
    format!("{head}\n{}", settings.join("\n"))
}

/// The words that a setting may be, where the command line knows them and there are more than true and false.
fn words<T: ConfigTable>(name: &str) -> Vec<String> {
    let command = Options::command();
    let arg = command.get_arguments().find(|it| T::PREFIX.is_empty() && it.get_long() == Some(name));
    let words = arg.map(Arg::get_possible_values).unwrap_or_default();
    words.iter().map(|it| it.get_name().to_owned()).filter(|it| it != "true" && it != "false").collect()
}

fn comment(text: &str) -> String {
    let mut lines = vec![String::from("#")];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("a line");
        if line.chars().count() + 1 + word.chars().count() > COLUMNS {
            lines.push(format!("# {word}"));
        } else {
            *line = format!("{line} {word}");
        }
    }
    lines.join("\n") + "\n"
}

/// The table of a document for a table that is in the file only.
fn keys<T: ConfigTable>() -> String {
    markdown(["in the file", "default", "changes by", "what"], T::SETTINGS.iter().map(key))
}

fn key<T>(setting: &Setting<T>) -> [String; 4] {
    let text = (setting.default)();
    let default = if has_default_as_sample(setting) { code(&text) } else { cell(&text) };
    let changes_by = match setting.changes_by {
        ChangesBy::Reload => "reload",
        ChangesBy::Restart => "restart",
    };
    let see = setting.see.map(|link| format!(". See {link}")).unwrap_or_default();
    let in_file = code(&format!("{} = {}", setting.name, setting.sample));
    [in_file, default, changes_by.to_owned(), cell(setting.help) + &see]
}

/// As [`key`], for an option that can't stand in the file.
fn option_only(option: &Arg) -> [String; 4] {
    let help = option.get_help().map(ToString::to_string).unwrap_or_default();
    let (help, default) = help.trim_end_matches(']').split_once(" [default: ").expect("a default");
    [String::new(), cell(default), "restart".to_owned(), cell(help)]
}

/// The table of all options that have a name in the environment.
fn options() -> String {
    let command = Options::command();
    let mut rows = Vec::new();
    for arg in command.get_arguments() {
        let Some(environment) = arg.get_env().and_then(|it| it.to_str()) else { continue };
        let by = if arg.get_value_delimiter().is_some() { ", by commas" } else { "" };
        let (option, environment) = (code(&usage(arg)), code(environment) + by);
        let setting = DaemonConfig::SETTINGS.iter().find(|it| Some(it.name) == arg.get_long());
        let [in_file, default, changes_by, what] = setting.map_or_else(|| option_only(arg), key);
        rows.push([option, environment, in_file, default, changes_by, what]);
    }
    markdown(["option", "environment", "in the file", "default", "changes by", "what"], rows.into_iter())
}

/// As `anyportd --help` shows it, with the words that the value can be.
fn usage(arg: &Arg) -> String {
    let name = arg.get_long().unwrap_or_default();
    let words: Vec<_> = arg.get_possible_values().iter().map(|it| it.get_name().to_owned()).collect();
    let value = match arg.get_value_names() {
        Some([value]) if words.is_empty() => value.to_string(),
        _ => words.join("|"),
    };
    let is_optional = arg.get_num_args().is_some_and(|it| it.min_values() == 0);
    if is_optional { format!("--{name} [{value}]") } else { format!("--{name} {value}") }
}

fn has_default_as_sample<T>(setting: &Setting<T>) -> bool {
    setting.sample.trim_matches('"') == (setting.default)()
}

fn code(text: &str) -> String {
    format!("`{}`", cell(text))
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn markdown<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let row = |cells: &[String]| format!("| {} |\n", cells.join(" | ")).replace("|  |", "| |");
    let rows: String = rows.map(|cells| row(&cells)).collect();
    format!("{}|{}\n{rows}", row(&head.map(str::to_owned)), "---|".repeat(N))
}

/// The document with the part in its place.
fn with_part(document: &str, Part { document: name, table, text }: &Part) -> String {
    let find = |what: &str, after: usize| {
        let found = document[after..].find(&format!("{what} [{table}]"));
        found.unwrap_or_else(|| panic!("docs/{name} has no line with \"{what} [{table}]\"")) + after
    };
    let end_of_line = |at: usize| at + document[at..].find('\n').expect("another line") + 1;
    let begin = end_of_line(find("begin of", 0));
    let end = document[..find("end of", begin)].rfind('\n').expect("a line") + 1;
    // Markdown wants an empty line between a comment and a table.
    let margin = if name.split('.').next_back() == Some("md") { "\n" } else { "" };
    format!("{}{margin}{text}{margin}{}", &document[..begin], &document[end..])
}

#[test]
fn documents_are_those_of_the_declaration() {
    let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs"));
    for part in parts() {
        let file = directory.join(part.document);
        let found = fs::read_to_string(&file).unwrap();
        let wanted = with_part(&found, &part);
        if env::var_os(WRITE).is_some() {
            fs::write(&file, wanted).unwrap();
        } else {
            assert!(
                found == wanted,
                "docs/{} differs from the declaration of [{}]; {WRITE}=1 cargo test -p anyport-userspace --lib \
                 config::documents writes it",
                part.document,
                part.table
            );
        }
    }
}

/// Each line that is commented out can be used as it stands.
#[test]
fn samples_are_right() {
    let uncommented = |text: &str| -> String {
        let line = |line: &str| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
            _ => format!("{line}\n"),
        };
        text.lines().map(line).collect()
    };
    let text = sample::<DaemonConfig>("[daemon]") + &sample::<Announce>("#[announce]");
    let config = Config::parse(&Settings::default(), &uncommented(&text)).unwrap();
    assert_eq!((config.interface.len(), config.announce.unwrap().rules_within.len()), (1, 1));
    #[cfg(feature = "fleet")]
    {
        let text = uncommented(&sample::<super::FleetSettings>(""));
        let fleet: super::FleetSettings = toml::from_str(&text).unwrap();
        assert_eq!(fleet.max_removal, NonZeroU8::new(50));
    }
}
