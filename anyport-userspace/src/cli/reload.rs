//! `anyportctl reload`: has the daemon read its configuration file again.

use super::{Output, path};
use crate::api::{self, Client, Problem, Reloaded};

/// Has the daemon read its configuration file again. What is wrong with it changes nothing.
///
/// Services, rules, `log-level`, `max-rules`, `drain-timeout`, `keep` and `mend` change at once; the answer names what takes a restart.
/// Connections go on.
#[derive(Debug, clap::Args)]
pub(super) struct Reload {
    /// Print the difference and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Go on although most of the rules go, listening sockets are shadowed or the host may be cut off
    #[arg(long)]
    force: bool,
}

impl Reload {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { dry_run, force } = self;
        let answer: Reloaded = client.post(&path("/v1/reload", &api::Reload { dry_run, force })?, &()).await?;
        out.print(&answer, describe)
    }
}

fn describe(answer: &Reloaded) -> String {
    let mut lines: Vec<String> = answer.services.iter().map(|service| format!("  service {service}")).collect();
    lines.extend(answer.difference.iter().map(|rule| format!("  {rule}")));
    lines.extend(answer.settings.iter().map(|setting| format!("  setting {setting}")));
    let Reloaded { added, removed, unchanged, generation, .. } = answer;
    lines.push(if answer.dry_run {
        format!("plan: {added} to add, {removed} to remove, {unchanged} unchanged; nothing was changed")
    } else if *added + *removed + answer.services.len() + answer.settings.len() == 0 {
        format!("nothing to do, it is so already (generation {generation})")
    } else {
        format!("reloaded: {added} added, {removed} removed, {unchanged} unchanged (generation {generation})")
    });
    lines.extend(answer.takes_restart.iter().map(|setting| format!("takes a restart: {setting}")));
    lines.extend(answer.notes.iter().map(|note| format!("note: {note}")));
    lines.join("\n")
}
