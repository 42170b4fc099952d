//! `anyportctl`: one file a verb.

mod apply;
mod doctor;
mod drain;
mod events;
mod explain;
#[cfg(feature = "fleet")]
mod fleet;
mod lists;
mod prefixes;
mod register;
mod reload;
mod services;
mod show;
mod status;
mod top;

use std::{io::Write, path::PathBuf};

use clap::{Parser, Subcommand};
use serde::Serialize;

use crate::{
    api::{Changed, Client, Problem, ProblemKind},
    paths::DEFAULT_SOCKET,
    text::visible,
};

/// Controls anyportd, which steers whole prefixes to one socket.
#[derive(Debug, Parser)]
#[command(
    name = "anyportctl",
    version,
    after_help = "Exit status: 0 done; 1 failed; 2 wrong usage or invalid input; 3 no daemon answers; \
                  4 not permitted; 5 refused for safety (the message names the flag that overrides)."
)]
pub struct Cli {
    /// Control socket of the daemon
    #[arg(long, global = true, env = "ANYPORT_SOCKET", value_name = "PATH", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Print JSON, errors included
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Steer prefixes to a service
    AddPrefix(prefixes::Add),
    /// Stop steering prefixes; established connections go on
    RemovePrefix(prefixes::Remove),
    /// List the rules in order of precedence, with counters
    Prefixes(prefixes::List),
    /// Make the applied rules equal to a file, in one step
    Apply(apply::Apply),
    /// Keep what was applied with --confirm
    Confirm,
    /// Have the daemon read its configuration file again
    Reload(reload::Reload),
    /// Open a new service
    AddService(Box<services::Add>),
    /// Close a service that no rule steers to
    RemoveService(services::Remove),
    /// List the services with their sockets and counters
    Services,
    /// Hand a process's sockets to a service
    Register(register::Add),
    /// Give up sockets that were registered; they stay open
    Unregister(register::Remove),
    /// Take this node out of service, or a part of it; established connections go on
    Drain(drain::Drain),
    /// End a drain
    Undrain(drain::UndrainOptions),
    /// Say what becomes of a packet, and why
    Explain(explain::Explain),
    /// Print connections and flows as they begin
    Events(events::Events),
    /// Show the back end, the generation, totals, and what is degraded
    Status,
    /// Show rates by service and prefix, live
    Top(top::Top),
    /// Check this host for what silently breaks steering
    ///
    /// Works without a daemon, and then names what any back end would need. It looks at the network namespace that
    /// it is run in, and needs root to see everything.
    Doctor(doctor::Doctor),
    /// Publish rules to many machines, and see what they make of them
    #[cfg(feature = "fleet")]
    Fleet(Box<fleet::Fleet>),
}

impl Cli {
    /// Carries the verb out and prints to `out`.
    ///
    /// # Errors
    /// Why it was not carried out.
    pub async fn run(self, out: &mut dyn Write) -> Result<(), Problem> {
        let Self { socket, json, verb } = self;
        let client = Client::new(socket);
        let out = &mut Output { out, json };
        match verb {
            Verb::AddPrefix(add) => add.run(&client, out).await,
            Verb::RemovePrefix(remove) => remove.run(&client, out).await,
            Verb::Prefixes(list) => list.run(&client, out).await,
            Verb::Apply(apply) => apply.run(&client, out).await,
            Verb::Confirm => apply::confirm(&client, out).await,
            Verb::Reload(reload) => reload.run(&client, out).await,
            Verb::AddService(add) => add.run(&client, out).await,
            Verb::RemoveService(remove) => remove.run(&client, out).await,
            Verb::Services => services::list(&client, out).await,
            Verb::Register(add) => add.run(&client, out),
            Verb::Unregister(remove) => remove.run(&client, out),
            Verb::Drain(drain) => drain.run(&client, out).await,
            Verb::Undrain(end) => end.run(&client, out).await,
            Verb::Explain(explain) => explain.run(&client, out).await,
            Verb::Events(events) => events.run(&client, out).await,
            Verb::Status => status::show(&client, out).await,
            Verb::Top(top) => top.run(&client, out).await,
            Verb::Doctor(doctor) => doctor.run(&client, out).await,
            #[cfg(feature = "fleet")]
            Verb::Fleet(fleet) => Box::pin(fleet.run(out)).await,
        }
    }
}

/// A path of the API with its query.
fn path(path: &str, query: &impl Serialize) -> Result<String, Problem> {
    let query = serde_urlencoded::to_string(query)
        .map_err(|error| Problem::new(ProblemKind::Failed, format!("write the request: {error}")))?;
    Ok(format!("{path}?{query}"))
}

/// Whether a program or a user reads what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    There,
    /// Such as head, which has had enough.
    Gone,
}

/// A problem as it is printed: as JSON, or as text for people.
pub fn text_of(problem: &Problem, is_json: bool) -> String {
    let Problem { error, hint, .. } = problem;
    let text = match (is_json, hint.as_str()) {
        (true, _) => serde_json::to_string(problem).unwrap_or_else(|_| error.clone()),
        (false, "") => format!("anyportctl: {error}"),
        (false, hint) => format!("anyportctl: {error}\nhint: {hint}"),
    };
    visible(&text).into_owned()
}

/// Where answers are printed, and how.
struct Output<'a> {
    out: &'a mut dyn Write,
    json: bool,
}

impl Output<'_> {
    /// Prints the answer as JSON, or as the text that `human` makes of it.
    fn print<T: Serialize>(&mut self, answer: &T, human: impl FnOnce(&T) -> String) -> Result<(), Problem> {
        let text = if self.json {
            serde_json::to_string_pretty(answer)
                .map_err(|error| Problem::new(ProblemKind::Failed, format!("write the answer as JSON: {error}")))?
        } else {
            human(answer)
        };
        self.print_text(&text)
    }

    /// Prints one of several answers, as a line of JSON or as text.
    fn print_one<T: Serialize>(&mut self, answer: &T, human: impl FnOnce(&T) -> String) -> Result<Reader, Problem> {
        let text = if self.json {
            serde_json::to_string(answer)
                .map_err(|error| Problem::new(ProblemKind::Failed, format!("write the answer as JSON: {error}")))?
        } else {
            human(answer)
        };
        self.print_line(&text)
    }

    fn print_text(&mut self, text: &str) -> Result<(), Problem> {
        self.print_line(text).map(drop)
    }

    /// Prints one of several texts.
    fn print_line(&mut self, text: &str) -> Result<Reader, Problem> {
        match writeln!(self.out, "{}", visible(text)).and_then(|()| self.out.flush()) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
            written => {
                written.map_err(|error| Problem::new(ProblemKind::Failed, format!("print the answer: {error}")))?;
                Ok(Reader::There)
            }
        }
    }

    fn print_change(&mut self, answer: &Changed, done: String) -> Result<(), Problem> {
        self.print(answer, |answer| {
            let what = if answer.changed == 0 { "nothing to do, it is so already".into() } else { done };
            let notes = answer.notes.iter().map(|note| format!("\nnote: {note}"));
            format!("{what} (generation {}){}", answer.generation, notes.collect::<String>())
        })
    }
}
