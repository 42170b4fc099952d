//! How answers are printed: for people, as wide as their terminal, or for programs.

use std::{
    env,
    io::{self, ErrorKind, IsTerminal as _, Write, stdout},
    process::{Command, Stdio},
};

use rustix::termios::tcgetwinsize;
use serde::Serialize;
use serde_json::Value;

use super::tone::painted;
use crate::{
    api::{Changed, Problem, ProblemKind},
    usage::When,
};

/// How answers are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// For people, as wide as the terminal
    #[default]
    Text,
    /// For people, with all columns
    Wide,
    /// Names alone, one a line
    Name,
    /// JSON
    Json,
    /// YAML
    Yaml,
}

/// Whether a program or a user reads what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    There,
    /// Such as head, which has had enough.
    Gone,
}

/// Where answers are printed, and how.
pub(super) struct Output<'a> {
    out: &'a mut dyn Write,
    format: Format,
    in_colours: bool,
    /// Rows and columns of the terminal, if it is one.
    terminal: Option<(usize, usize)>,
    /// Whether a list that is longer than the terminal goes through a pager.
    has_pager: bool,
}

impl<'a> Output<'a> {
    /// Prints to `out`, which is standard output or what stands for it.
    pub(super) fn new(out: &'a mut dyn Write, format: Format, colours: When, has_pager: bool) -> Self {
        let is_terminal = stdout().is_terminal();
        let size = tcgetwinsize(stdout()).ok().filter(|it| is_terminal && it.ws_row > 0 && it.ws_col > 0);
        let terminal = size.map(|it| (it.ws_row.into(), it.ws_col.into()));
        Self { out, format, in_colours: colours.holds(is_terminal), terminal, has_pager }
    }

    /// Whether what is printed is for programs, which take it as the daemon wrote it.
    pub(super) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Whether what is printed is for people.
    pub(super) fn is_for_people(&self) -> bool {
        matches!(self.format, Format::Text | Format::Wide)
    }

    /// Whether lines are shown in colours.
    pub(super) fn is_in_colours(&self) -> bool {
        self.in_colours
    }

    /// Columns that a table may take, if there is a limit.
    pub(super) fn width(&self) -> Option<usize> {
        self.terminal.map(|(_, columns)| columns).filter(|_| self.format != Format::Wide)
    }

    /// Prints the answer as programs want it, or as the text that `human` makes of it.
    pub(super) fn print<T: Serialize>(&mut self, answer: &T, human: impl FnOnce(&T) -> String) -> Result<(), Problem> {
        let text = match self.format {
            Format::Json => serde_json::to_string_pretty(answer).map_err(|error| not_written(&error))?,
            Format::Yaml => yaml(answer)?,
            Format::Name => names(answer)?,
            Format::Text | Format::Wide => human(answer),
        };
        self.print_text(&text)
    }

    /// Prints one of several answers, as a line of JSON, a document of YAML or as text.
    pub(super) fn print_one<T: Serialize>(
        &mut self,
        answer: &T,
        human: impl FnOnce(&T) -> String,
    ) -> Result<Reader, Problem> {
        let text = match self.format {
            Format::Json => serde_json::to_string(answer).map_err(|error| not_written(&error))?,
            Format::Yaml => format!("---\n{}", yaml(answer)?),
            Format::Name => names(answer)?,
            Format::Text | Format::Wide => human(answer),
        };
        self.print_line(&text)
    }

    /// Prints a text; through a pager where it is longer than the terminal.
    pub(super) fn print_text(&mut self, text: &str) -> Result<(), Problem> {
        let is_long = self.terminal.is_some_and(|(rows, _)| text.lines().count() >= rows);
        if is_long && self.has_pager && self.is_for_people() && page(&painted(text, self.in_colours)).is_ok() {
            return Ok(());
        }
        self.print_line(text).map(drop)
    }

    /// Prints one of several texts.
    pub(super) fn print_line(&mut self, text: &str) -> Result<Reader, Problem> {
        match writeln!(self.out, "{}", painted(text, self.in_colours)).and_then(|()| self.out.flush()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(Reader::Gone),
            written => {
                written.map_err(|error| Problem::new(ProblemKind::Failed, format!("print the answer: {error}")))?;
                Ok(Reader::There)
            }
        }
    }

    pub(super) fn print_change(&mut self, answer: &Changed, done: String) -> Result<(), Problem> {
        self.print(answer, |answer| {
            let what = if answer.changed == 0 { "nothing to do, it is so already".into() } else { done };
            let notes = answer.notes.iter().map(|note| format!("\nnote: {note}"));
            format!("{what} (generation {}){}", answer.generation, notes.collect::<String>())
        })
    }
}

fn not_written(error: &dyn std::fmt::Display) -> Problem {
    Problem::new(ProblemKind::Failed, format!("write the answer: {error}"))
}

fn yaml(answer: &impl Serialize) -> Result<String, Problem> {
    let value = serde_json::to_value(answer).map_err(|error| not_written(&error))?;
    let text = serde_saphyr::to_string(&value).map_err(|error| not_written(&error))?;
    Ok(text.trim_end().to_owned())
}

/// What the things in an answer are called, one a line.
fn names(answer: &impl Serialize) -> Result<String, Problem> {
    const NAMES: [&str; 5] = ["name", "prefix", "ring", "node", "sequence"];
    let name = |of: &Value| {
        let found = NAMES.iter().find_map(|name| of.get(name))?;
        Some(found.as_str().map_or_else(|| found.to_string(), ToOwned::to_owned))
    };
    let value = serde_json::to_value(answer).map_err(|error| not_written(&error))?;
    let found: Option<Vec<String>> = match &value {
        Value::Array(all) => all.iter().map(name).collect(),
        one => name(one).map(|name| vec![name]),
    };
    found.map(|names| names.join("\n")).ok_or_else(|| {
        Problem::new(ProblemKind::Invalid, "what this verb answers has no names")
            .hint("leave -o name out, or take -o json")
    })
}

/// Has the user's pager show a text.
fn page(text: &str) -> io::Result<()> {
    let given = env::var("PAGER").ok().filter(|it| !it.trim().is_empty());
    let mut pager = Command::new("sh");
    pager.arg("-c").arg(given.as_deref().unwrap_or("less")).stdin(Stdio::piped());
    if env::var_os("LESS").is_none() {
        // Less ends at once where all fits, shows colours and leaves the text on the screen.
        pager.env("LESS", "FRX");
    }
    let mut pager = pager.spawn()?;
    if let Some(mut input) = pager.stdin.take() {
        // Who has seen enough ends the pager.
        input.write_all(text.as_bytes()).and_then(|()| input.write_all(b"\n")).ok();
    }
    match pager.wait()?.code() {
        // The shell has not found it.
        Some(126 | 127) => Err(ErrorKind::NotFound.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Format, Output, When, names, yaml};

    fn printed(format: Format) -> String {
        let mut out = Vec::new();
        let answer = json!([{"prefix": "192.0.2.0/24", "ports": ""}, {"prefix": "::/0", "ports": "yes"}]);
        Output::new(&mut out, format, When::Never, false).print(&answer, |_| "for people".into()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn each_format_has_the_same_content() {
        assert_eq!(printed(Format::Text), "for people\n");
        assert_eq!(printed(Format::Name), "192.0.2.0/24\n::/0\n");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&printed(Format::Json)).unwrap()[1]["ports"], "yes");
        let yaml = printed(Format::Yaml);
        // Quoted, since it would be a truth value without.
        assert!(
            yaml.starts_with("- ") && yaml.contains("prefix: 192.0.2.0/24") && yaml.contains("ports: \"yes\""),
            "{yaml}"
        );
    }

    #[test]
    fn what_has_no_names_says_so() {
        assert_eq!(names(&json!({"name": "web"})).unwrap(), "web");
        assert_eq!(names(&json!([{"sequence": 7}])).unwrap(), "7");
        assert!(names(&json!({"generation": 7})).unwrap_err().error.contains("no names"));
        assert_eq!(names(&json!([])).unwrap(), "");
        assert_eq!(yaml(&json!([])).unwrap(), "[]");
    }
}
