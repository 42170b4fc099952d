//! `anyportctl`: one file a verb.

mod apply;
mod completion;
mod doctor;
mod drain;
mod events;
mod examples;
mod explain;
#[cfg(feature = "fleet")]
mod fleet;
mod lists;
mod offline;
mod output;
mod prefixes;
mod register;
mod reload;
mod services;
mod shells;
mod show;
#[cfg(test)]
mod snapshots;
mod status;
mod table;
mod tone;
mod top;

use std::{io::Write, path::PathBuf};

use clap::{Parser, Subcommand};
use serde::Serialize;

pub use self::completion::{complete, scripts};
use self::output::{Format, Output, Reader};
use crate::{
    api::{Client, Problem, ProblemKind},
    paths::{DEFAULT_SOCKET, DEFAULT_STATE_DIR},
    text::visible,
    usage::When,
};

/// What the options of all verbs stand under in the help.
const GLOBAL: &str = "Global options";

/// Controls anyportd, which steers whole prefixes to one socket.
#[derive(Debug, Parser)]
#[command(
    name = "anyportctl",
    version,
    after_help = examples::EXIT_STATUS
)]
pub struct Cli {
    /// Control socket of the daemon
    #[arg(long, global = true, env = "ANYPORT_SOCKET", value_name = "PATH", default_value = DEFAULT_SOCKET, help_heading = GLOBAL)]
    socket: PathBuf,
    /// Print JSON, errors included: the same as -o json
    #[arg(long, global = true, help_heading = GLOBAL)]
    json: bool,
    /// How answers are printed
    #[arg(long, short = 'o', global = true, value_enum, value_name = "FORMAT", default_value_t, help_heading = GLOBAL)]
    output: Format,
    /// Whether what is wrong is shown in colours
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t, help_heading = GLOBAL)]
    color: When,
    /// Print long lists at once, rather than through $PAGER
    #[arg(long, global = true, help_heading = GLOBAL)]
    no_pager: bool,
    /// Have remove-prefix edit the state directory of an anyportd that does not run, such as one that a rule keeps from starting
    #[arg(long, help_heading = GLOBAL)]
    offline: bool,
    /// That directory
    #[arg(long, env = "ANYPORT_STATE_DIR", value_name = "DIR", default_value = DEFAULT_STATE_DIR, help_heading = GLOBAL)]
    state_dir: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Steer prefixes to a service
    #[command(visible_aliases = ["add"], after_help = examples::ADD_PREFIX)]
    AddPrefix(prefixes::Add),
    /// Stop steering prefixes; established connections go on
    #[command(visible_aliases = ["rm", "del", "remove"], after_help = examples::REMOVE_PREFIX)]
    RemovePrefix(prefixes::Remove),
    /// List the rules in order of precedence, with counters
    #[command(visible_aliases = ["ls", "list", "show"], after_help = examples::PREFIXES)]
    Prefixes(prefixes::List),
    /// Make the applied rules equal to a file, in one step
    #[command(after_help = examples::APPLY)]
    Apply(apply::Apply),
    /// Keep what was applied with --confirm
    #[command(after_help = examples::CONFIRM)]
    Confirm,
    /// Have the daemon read its configuration file again
    #[command(after_help = examples::RELOAD)]
    Reload(reload::Reload),
    /// Open a new service
    #[command(after_help = examples::ADD_SERVICE)]
    AddService(Box<services::Add>),
    /// Close a service that no rule steers to
    #[command(after_help = examples::REMOVE_SERVICE)]
    RemoveService(services::Remove),
    /// List the services with their sockets and counters
    #[command(after_help = examples::SERVICES)]
    Services,
    /// Hand a process's sockets to a service
    #[command(after_help = examples::REGISTER)]
    Register(register::Add),
    /// Give up sockets that were registered; they stay open
    #[command(after_help = examples::UNREGISTER)]
    Unregister(register::Remove),
    /// Take this node out of service, or a part of it; established connections go on
    #[command(after_help = examples::DRAIN)]
    Drain(drain::Drain),
    /// End a drain
    #[command(after_help = examples::UNDRAIN)]
    Undrain(drain::UndrainOptions),
    /// Say what becomes of a packet, and why
    #[command(after_help = examples::EXPLAIN)]
    Explain(explain::Explain),
    /// Print connections and flows as they begin
    #[command(after_help = examples::EVENTS)]
    Events(events::Events),
    /// Show the back end, the generation, totals, and what is degraded
    #[command(after_help = examples::STATUS)]
    Status(status::Status),
    /// Show rates by service and prefix, live
    #[command(after_help = examples::TOP)]
    Top(top::Top),
    /// Check this host for what silently breaks steering
    ///
    /// Works without a daemon, and then names what any back end would need. It looks at the network namespace that
    /// it is run in, and needs root to see everything.
    #[command(after_help = examples::DOCTOR)]
    Doctor(doctor::Doctor),
    /// Publish rules to many machines, and see what they make of them
    #[cfg(feature = "fleet")]
    Fleet(Box<fleet::Fleet>),
}

impl Cli {
    /// Whether answers and errors are printed as JSON.
    pub fn is_json(&self) -> bool {
        self.json || self.output == Format::Json
    }

    /// Carries the verb out and prints to `out`.
    ///
    /// # Errors
    /// Why it was not carried out.
    pub async fn run(self, out: &mut dyn Write) -> Result<(), Problem> {
        let Self { socket, json, output, color, no_pager, offline, state_dir, verb } = self;
        let client = Client::new(socket);
        let format = if json { Format::Json } else { output };
        let out = &mut Output::new(out, format, color, !no_pager);
        match verb {
            Verb::RemovePrefix(remove) if offline => offline::remove_prefixes(&state_dir, &remove.into(), out),
            _ if offline => Err(Problem::new(ProblemKind::Invalid, "--offline is for remove-prefix alone")
                .hint("leave it out; everything else is asked of the daemon")),
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
            Verb::Status(status) => status.run(&client, out).await,
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
