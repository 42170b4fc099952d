//! What bash, zsh and fish make of a line when Tab is pressed.

use std::{fs, path::Path, process::Command};

use anyport_tests::{
    host::Outcome,
    prerequisites::{path_with, program, scratch},
};
use libtest_mimic::Trial;

use crate::cases::{Lab, trial};

/// What is typed, and what the last word is after Tab.
const LINES: [(&str, &str); 10] = [
    ("anyportctl remove-s", "remove-service"),
    ("anyportctl remove-service e", "edge"),
    ("anyportctl unregister e", "edge"),
    ("anyportctl add-prefix 192.0.2.0/24 --service=e", "--service=edge"),
    ("anyportctl remove-prefix 192.0.2", "192.0.2.0/24"),
    ("anyportctl remove-prefix 192.0.2.0/24 2001:db8:a", "2001:db8:a::/48"),
    ("anyportctl drain 2001:db8:b::", "2001:db8:b::/48"),
    ("anyportctl prefixes --after=2001:db8:b", "--after=2001:db8:b::/48"),
    ("anyportctl --socket /nowhere remove-service e", "e"),
    ("anyportctl --socket=/nowhere remove-service e", "e"),
];

/// A shell in a terminal, by zsh's own: presses Tab behind each line, and has the shell say what has become of it.
const TERMINAL: &str = r#"
zmodload zsh/zpty
zpty it "$IT"
zpty -w it "$SETUP; echo rea''dy"
zpty -r -m it seen '*ready*'
for line in "${(f)TYPED}"; do
    zpty -w it "$line"$'\t\x01echo \x05 >>"$SHOWN"'
done
zpty -w it exit
zpty -r -m it seen '*never*'
"#;

pub(crate) fn trials() -> Vec<Trial> {
    ["bash", "zsh", "fish"].map(|shell| trial(format!("completion::{shell}"), move || complete(shell))).into()
}

fn complete(shell: &str) {
    let lab = Lab::new("sk-lookup");
    lab.daemon.ok("add-service edge --handler hello");
    lab.daemon.ok("add-prefix 192.0.2.0/24 2001:db8:a::/48 2001:db8:b::/48");
    let directory = scratch();
    let asked = |command: &mut Command| {
        let client = program("anyportctl").unwrap_or_else(|missing| panic!("{missing}"));
        command.env("PATH", path_with(client.parent().expect("its directory")));
        command.env("ANYPORT_SOCKET", lab.daemon.socket()).env("HOME", directory.path()).env("TERM", "xterm");
        Outcome::of(command.current_dir(directory.path()))
    };
    let outcome = asked(Command::new("anyportctl").env("ANYPORTCTL_COMPLETE", shell));
    assert_eq!(outcome.status, 0, "{outcome}");
    // The name by which zsh finds it.
    fs::write(directory.path().join("_anyportctl"), outcome.stdout).expect("a script");
    let words = match shell {
        "fish" => asked(Command::new("fish").args(["--no-config", "--command", &fish()])).stdout,
        shell => in_terminal(shell, directory.path(), asked),
    };
    let words: Vec<&str> = words.lines().collect();
    assert_eq!(words, LINES.map(|(_, word)| word));
}

/// Says the first candidate for each line, or its last word where there is none.
fn fish() -> String {
    let words = LINES.map(|(line, _)| {
        let typed = line.rsplit(' ').next().unwrap_or_default();
        format!("complete -C '{line}' | cut -f1 | string match -v -r '^_' | head -n 1 | read -l found; or set found {typed}; echo $found")
    });
    format!("source _anyportctl; {}", words.join("; "))
}

/// The last words of the lines.
fn in_terminal(shell: &str, directory: &Path, asked: impl Fn(&mut Command) -> Outcome) -> String {
    let (it, setup) = match shell {
        "bash" => ("bash --norc --noprofile -i", "source _anyportctl"),
        _ => ("zsh -f -i", "bindkey -e; fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -D"),
    };
    let shown = directory.join("shown");
    let mut command = Command::new("timeout");
    command.args(["60", "zsh", "-f", "-c", TERMINAL]).env("IT", it).env("SETUP", setup).env("SHOWN", &shown);
    let outcome = asked(command.env("TYPED", LINES.map(|(line, _)| line).join("\n")));
    let shown = fs::read_to_string(&shown).unwrap_or_else(|error| panic!("{shell} wrote nothing, {error}: {outcome}"));
    let last = |line: &str| format!("{}\n", line.split_whitespace().next_back().unwrap_or_default());
    shown.lines().map(last).collect()
}
