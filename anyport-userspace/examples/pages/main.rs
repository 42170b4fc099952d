//! Writes the manual pages of the programs and their files, and the shell completions, for `cargo xtask dist`: `pages DIRECTORY` fills
//! `DIRECTORY/man5`, `DIRECTORY/man8` and `DIRECTORY/completions`.

mod files;
mod roff;

use std::{collections::BTreeMap, env, fs, io::Write, path::PathBuf};

use anyhow::Context as _;
use anyport::{
    cli::{Cli, scripts},
    config::Options,
};
use clap::{Command, CommandFactory as _};
use clap_complete::Shell;
use clap_mangen::Man;

use self::roff::{escaped, reference};

/// How the examples of a verb begin in its help.
const EXAMPLES: &str = "Examples:\n";

const FILES: [(&str, &str); 4] = [
    ("/etc/anyport/anyport.toml", "The configuration: services, rules, and the daemon's settings."),
    ("/run/anyport/anyportd.sock", "The control socket."),
    ("/var/lib/anyport", "What was added and applied, and counters."),
    ("/sys/fs/bpf/anyport", "The pinned BPF maps and programs, for bpftool(8)."),
];

const EXIT_STATUS: [(&str, &str); 7] = [
    ("0", "Done."),
    ("1", "It failed, or what was named is not there."),
    ("2", "Wrong usage, or invalid input."),
    ("3", "No daemon answers."),
    ("4", "Not permitted."),
    ("5", "Refused for safety; the message names the flag that overrides."),
    ("6", "Something is degraded: with `anyportctl status --exit-code` alone."),
];

const EXIT_STATUS_OF_DAEMON: [(&str, &str); 3] = [
    ("0", "It was told to stop, and nothing is left in the kernel."),
    ("1", "It failed."),
    ("2", "Wrong usage, or a wrong configuration."),
];

fn main() -> anyhow::Result<()> {
    let directory = PathBuf::from(env::args_os().nth(1).context("say where to write to")?);
    let [of_files, manual, completions] = ["man5", "man8", "completions"].map(|name| directory.join(name));
    for directory in [&of_files, &manual, &completions] {
        fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
    }
    for command in [Options::command(), Cli::command()] {
        let name = command.get_name().to_owned();
        let mut command = command.disable_help_subcommand(true);
        // Names the verbs' pages, such as anyportctl-add-prefix.8.
        command.build();
        for page in with_verbs(&command) {
            let path = manual.join(Man::new(page.clone()).section("8").get_filename());
            let text = page_of(page, &name).with_context(|| format!("write {}", path.display()))?;
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
    }
    for (name, text) in [("anyport.toml.5", files::configuration()?), ("anyport-rules.5", files::rules()?)] {
        let path = of_files.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Options::command(), "anyportd", &completions)
            .with_context(|| format!("write the completions of anyportd for {shell}"))?;
    }
    // Those of the client ask it, since it knows the daemon's names.
    for (file, script) in scripts().context("write the completions of anyportctl")? {
        let path = completions.join(file);
        fs::write(&path, script).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// A command, its verbs, and theirs.
fn with_verbs(command: &Command) -> Vec<&Command> {
    let verbs = command.get_subcommands().flat_map(with_verbs);
    [command].into_iter().chain(verbs).collect()
}

/// A page with all the sections that readers look for.
fn page_of(command: &Command, program: &str) -> anyhow::Result<Vec<u8>> {
    let man = Man::new(command.clone().after_help("")).section("8");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        man.render_options_section(&mut page)?;
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    if let Some(examples) = help.strip_prefix(EXAMPLES) {
        writeln!(page, ".SH EXAMPLES")?;
        for line in examples.lines() {
            write!(page, ".PP\n.nf\n{}\n.fi\n", escaped(line.trim_start()))?;
        }
    }
    let status = if program == "anyportd" { &EXIT_STATUS_OF_DAEMON[..] } else { &EXIT_STATUS };
    list(&mut page, "EXIT STATUS", status.iter().copied())?;
    let variables = variables(command);
    list(&mut page, "ENVIRONMENT", variables.iter().map(|(name, help)| (name.as_str(), help.as_str())))?;
    list(&mut page, "FILES", FILES.into_iter())?;
    write!(page, ".SH \"SEE ALSO\"\n{}\n", see_also(command, program))?;
    Ok(page)
}

fn list<'a>(page: &mut Vec<u8>, title: &str, items: impl Iterator<Item = (&'a str, &'a str)>) -> anyhow::Result<()> {
    for (at, (name, text)) in items.enumerate() {
        if at == 0 {
            writeln!(page, ".SH \"{title}\"")?;
        }
        write!(page, ".TP\n\\fB{}\\fR\n{}\n", escaped(name), escaped(text))?;
    }
    Ok(())
}

/// The environment variables that stand for options.
fn variables(command: &Command) -> BTreeMap<String, String> {
    let named = command.get_arguments().filter_map(|argument| {
        let variable = argument.get_env()?.to_string_lossy().into_owned();
        Some((variable, format!("Stands for --{}.", argument.get_long()?)))
    });
    named.collect()
}

/// The pages beside it.
fn see_also(command: &Command, program: &str) -> String {
    let verbs = command.get_subcommands().map(|verb| verb.get_display_name().unwrap_or_default().to_owned());
    let names = [program.to_owned(), "anyportd".into(), "anyportctl".into()].into_iter().chain(verbs);
    let mut names: Vec<String> = names.filter(|name| Some(name.as_str()) != command.get_display_name()).collect();
    names.sort();
    names.dedup();
    let files = ["anyport.toml", "anyport-rules"].map(|name| reference(name, "5"));
    let pages = names.iter().map(|name| reference(name, "8"));
    let others = [("bpftool", "8"), ("ip-route", "8")].map(|(name, section)| reference(name, section));
    files.into_iter().chain(pages).chain(others).collect::<Vec<_>>().join(", ")
}
