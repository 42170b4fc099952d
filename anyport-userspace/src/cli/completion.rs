//! What the shells ask when Tab is pressed: the verbs and options, and the names that the daemon has at that moment.

use std::{
    env,
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::CommandFactory as _;
use clap_complete::{
    CompleteEnv,
    engine::{ArgValueCompleter, CompletionCandidate},
    env::{EnvCompleter, Fish, Shells},
};
use serde::Deserialize;
use tokio::{runtime::Builder, time::timeout};

use super::{
    Cli, path,
    shells::{Bash, Zsh, whole_words},
};
use crate::{
    api::{Client, ListPrefixes, Problem},
    paths::DEFAULT_SOCKET,
    rules::{Prefix, ServiceName},
};

/// The variable by which a shell asks. A shell's own `COMPLETE` may mean something else.
const VARIABLE: &str = "ANYPORTCTL_COMPLETE";
/// The program that the scripts complete, and that they ask.
const PROGRAM: &str = "anyportctl";
/// How long a person at a terminal waits for names.
const PATIENCE: Duration = Duration::from_millis(500);
/// Candidates that are offered.
const MOST: usize = 200;
/// Rules that are looked through for them: there may be a million.
const MOST_RULES: usize = 10_000;

/// The shells, and the files in which they look for the script of a program.
const SHELLS: [(&dyn EnvCompleter, &str); 3] =
    [(&Bash, "anyportctl.bash"), (&Zsh, "_anyportctl"), (&Fish, "anyportctl.fish")];

/// Answers a shell that asks, and ends the process then. To be called before anything is printed, and before there is a second thread.
pub fn complete() {
    let shells = SHELLS.map(|(shell, _)| shell);
    CompleteEnv::with_factory(Cli::command).var(VARIABLE).completer(PROGRAM).shells(Shells(&shells)).complete();
}

/// The scripts that make shells ask: the name of the file, and what is in it.
///
/// # Errors
/// A script can't be written.
pub fn scripts() -> io::Result<Vec<(&'static str, Vec<u8>)>> {
    let script = |(shell, file): (&dyn EnvCompleter, _)| {
        let mut text = Vec::new();
        shell.write_registration(VARIABLE, PROGRAM, PROGRAM, PROGRAM, &mut text)?;
        Ok((file, text))
    };
    SHELLS.into_iter().map(script).collect()
}

/// Names of services.
pub(super) fn services() -> ArgValueCompleter {
    ArgValueCompleter::new(|typed: &OsStr| {
        let is_name = |name: &str| name.parse::<ServiceName>().is_ok();
        offered(typed, is_name, |_| vec![Ok("/v1/services".into())])
    })
}

/// Prefixes that have rules.
pub(super) fn prefixes() -> ArgValueCompleter {
    let listed = |within| path("/v1/prefixes", &ListPrefixes { within, limit: Some(MOST_RULES), ..Default::default() });
    ArgValueCompleter::new(move |typed: &OsStr| {
        let is_prefix = |name: &str| name.parse::<Prefix>().is_ok();
        // Of a million rules, those that are likely to be meant.
        let paths = |typed: &str| [None].into_iter().chain(around(typed).map(Some)).map(listed).collect();
        offered(typed, is_prefix, paths)
    })
}

/// The prefix of the numbers of an address that are complete.
fn around(typed: &str) -> Option<Prefix> {
    let address = typed.split('/').next()?;
    let prefix = match address.rsplit_once([':', '.'])?.0 {
        numbers if address.contains(':') => {
            let groups = numbers.trim_end_matches(':');
            format!("{groups}::/{}", 16 * groups.split(':').count())
        }
        numbers => {
            let count = numbers.split('.').count();
            format!("{numbers}{}/{}", ".0".repeat(4_usize.saturating_sub(count)), 8 * count)
        }
    };
    prefix.parse().ok()
}

/// Something with a name, in an answer of the daemon.
#[derive(Deserialize)]
struct Named {
    #[serde(alias = "prefix")]
    name: String,
}

/// What the daemon names and begins as typed. Nothing where no daemon answers in time. What it says goes into a line that a shell
/// reads, so only what is a name is taken.
fn offered(
    typed: &OsStr,
    is_name: impl Fn(&str) -> bool,
    paths: impl FnOnce(&str) -> Vec<Result<String, Problem>>,
) -> Vec<CompletionCandidate> {
    let Some(typed) = typed.to_str() else { return Vec::new() };
    let names = asked(paths(typed)).unwrap_or_default();
    fitting(names, typed, is_name).into_iter().map(CompletionCandidate::new).collect()
}

fn fitting(mut names: Vec<String>, typed: &str, is_name: impl Fn(&str) -> bool) -> Vec<String> {
    names.retain(|name| name.starts_with(typed) && is_name(name));
    names.sort_unstable();
    names.dedup();
    names.truncate(MOST);
    names
}

/// Asks for one path after the other, as long as there may be more than was told.
fn asked(paths: Vec<Result<String, Problem>>) -> Option<Vec<String>> {
    let client = Client::new(socket(&whole_words(env::args_os())));
    let answers = async {
        let mut names = Vec::new();
        for path in paths {
            let told: Vec<Named> = client.get(&path?).await?;
            let is_cut = told.len() == MOST_RULES;
            names.extend(told.into_iter().map(|it| it.name));
            if !is_cut {
                break;
            }
        }
        Ok::<_, Problem>(names)
    };
    let runtime = Builder::new_current_thread().enable_all().build().ok()?;
    let names = runtime.block_on(async { timeout(PATIENCE, answers).await });
    // A connection that is not accepted is not waited for.
    runtime.shutdown_background();
    names.ok()?.ok()
}

/// The control socket that is meant: as typed, as set, or the usual one.
fn socket(typed: &[OsString]) -> PathBuf {
    let mut words = typed.iter();
    while let Some(word) = words.next() {
        let given = match word.to_str() {
            Some("--socket") => words.next().map(OsString::as_os_str),
            Some(word) => word.strip_prefix("--socket=").map(OsStr::new),
            None => None,
        };
        if let Some(path) = given {
            return path.into();
        }
    }
    let set = env::var_os("ANYPORT_SOCKET").filter(|path| !path.is_empty());
    set.map_or_else(|| Path::new(DEFAULT_SOCKET).to_owned(), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_narrows_what_is_asked() {
        for (typed, prefix) in [
            ("", None),
            ("19", None),
            ("x.", None),
            ("192.0", Some("192.0.0.0/8")),
            ("192.0.2.", Some("192.0.2.0/24")),
            ("192.0.2.0/2", Some("192.0.2.0/24")),
            ("2001:db", Some("2001::/16")),
            ("2001:db8::", Some("2001:db8::/32")),
            ("2001:db8::/3", Some("2001:db8::/32")),
        ] {
            assert_eq!(around(typed), prefix.map(|it| it.parse().unwrap()), "{typed:?}");
        }
    }

    #[test]
    fn only_names_are_offered() {
        let told = ["edge", "edge", "e$(reboot)", "e b", "e\n", "E", "other"].map(ToOwned::to_owned).to_vec();
        assert_eq!(fitting(told, "e", |name| name.parse::<ServiceName>().is_ok()), ["edge"]);
    }

    #[test]
    fn a_socket_that_is_typed_is_asked() {
        for (typed, expected) in [
            ("anyportctl --socket /a services", "/a"),
            ("anyportctl services --socket=/a", "/a"),
            ("anyportctl services --socket = /a", "/a"),
        ] {
            assert_eq!(socket(&whole_words(typed.split(' ').map(OsString::from))), PathBuf::from(expected));
        }
    }
}
