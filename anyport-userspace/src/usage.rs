//! What the programs say of a wrong command line, and when they do so in colours.

use std::{
    env,
    ffi::OsString,
    io::{IsTerminal as _, stderr},
};

use clap::{
    Arg, Command,
    error::{ContextKind, ContextValue, ErrorKind},
};

use crate::plain_words::plain;

/// When colours are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum When {
    /// On a terminal, unless `NO_COLOR` is set
    #[default]
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

impl When {
    /// Whether they are, for what goes to a terminal or elsewhere.
    pub fn holds(self, is_terminal: bool) -> bool {
        let is_set = |name| env::var_os(name).is_some_and(|it| !it.is_empty());
        let is_dumb = env::var_os("TERM").is_some_and(|it| it == "dumb");
        match self {
            Self::Auto => is_terminal && !is_set("NO_COLOR") && !is_dumb,
            Self::Always => true,
            Self::Never => false,
        }
    }
}

/// Whether it is a mistake; otherwise help or the version was asked for.
pub fn is_mistake(error: &clap::Error) -> bool {
    !matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion)
}

/// Shows a mistake, or what was asked for, in colours where a terminal shows them.
#[expect(clippy::print_stderr, reason = "mistakes are told there")]
pub fn show(error: &clap::Error, command: &Command) {
    if is_mistake(error) {
        eprint!("{}", message(error, command, When::Auto.holds(stderr().is_terminal())));
    } else {
        // Where standard output is closed, nobody reads the help.
        error.print().ok();
    }
}

/// The message of a mistake. A value that comes from the environment is said to.
pub fn message(error: &clap::Error, command: &Command, in_colours: bool) -> String {
    let styled = error.render();
    let text = if in_colours { styled.ansi().to_string() } else { styled.to_string() };
    let plain = plain(&text);
    match variable_of(error, command, &env::args_os().collect::<Vec<_>>()) {
        Some(variable) => without_option(&plain, error, &variable),
        None => plain.into_owned(),
    }
}

/// The environment variable that the wrong value is of, where the command line does not give it.
fn variable_of(error: &clap::Error, command: &Command, arguments: &[OsString]) -> Option<String> {
    let Some(ContextValue::String(wrong)) = error.get(ContextKind::InvalidArg) else { return None };
    // Options are shown only when they are complete.
    let mut command = command.clone();
    command.build();
    let option = find(&command, wrong)?;
    let long = format!("--{}", option.get_long()?);
    let is_given = arguments.iter().map(|it| it.to_string_lossy()).any(|it| is_option(&it, &long));
    let variable = option.get_env()?.to_string_lossy().into_owned();
    (!is_given).then_some(variable)
}

fn is_option(argument: &str, long: &str) -> bool {
    argument.strip_prefix(long).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
}

/// The option that is shown so, of the command or of one below it.
fn find<'a>(command: &'a Command, shown: &str) -> Option<&'a Arg> {
    let below = || command.get_subcommands().find_map(|it| find(it, shown));
    command.get_arguments().find(|it| it.to_string() == shown).or_else(below)
}

/// Names the variable where the option is named.
fn without_option(text: &str, error: &clap::Error, variable: &str) -> String {
    let Some(ContextValue::String(option)) = error.get(ContextKind::InvalidArg) else { return text.to_owned() };
    text.replacen(option.as_str(), variable, 1).replacen(
        &format!("for '{variable}'"),
        &format!("of the environment variable '{variable}'"),
        1,
    )
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser};

    use super::{is_mistake, variable_of, without_option};

    #[derive(Debug, Parser)]
    struct Program {
        /// How many.
        #[arg(long, env = "ANYPORT_TEST_OF_USAGE")]
        workers: Option<u32>,
    }

    #[test]
    fn a_wrong_value_is_of_where_it_comes_from() {
        let command = Program::command();
        let error = Program::try_parse_from(["program", "--workers", "abc"]).unwrap_err();
        assert!(is_mistake(&error));
        for given in [&["program", "--workers", "abc"][..], &["program", "--workers=abc"]] {
            let given: Vec<_> = given.iter().map(Into::into).collect();
            assert_eq!(variable_of(&error, &command, &given), None, "{given:?}");
        }
        let variable = variable_of(&error, &command, &["program".into(), "--workers-of".into()]).unwrap();
        let shown = without_option(&error.to_string(), &error, &variable);
        assert!(shown.contains("'abc' of the environment variable 'ANYPORT_TEST_OF_USAGE'"), "{shown}");
        let help = Program::try_parse_from(["program", "--help"]).unwrap_err();
        assert!(!is_mistake(&help));
    }
}
