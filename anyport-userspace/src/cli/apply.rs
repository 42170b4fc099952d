//! `anyportctl apply`: makes the applied rules equal to a file.

use std::{
    fs,
    io::{IsTerminal as _, Read as _, stderr, stdin},
    path::PathBuf,
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

use super::{
    Output,
    lists::{Reading, Source},
    path,
};
use crate::api::{self, Applied, Changed, Client, Problem, ProblemKind, ProgressView};

/// Makes the applied rules equal to a file. Rules of the configuration and rules that were added by hand stay.
///
/// The file has the tables `[[service]]` and `[[rule]]` of the configuration, or a rule a line:
/// PREFIX [tcp|udp|both] [PORTS] [except=PORTS] [source=CIDR] [service=NAME] [route=no]
/// Lists as others publish them are read, too: ranges, netmasks, ipset save, nft list, ip route, JSON, gzip.
#[expect(rustdoc::broken_intra_doc_links, reason = "it is the text of --help, in which brackets are no links")]
#[derive(Debug, clap::Args)]
pub(super) struct Apply {
    #[command(flatten)]
    source: Source,
    /// Print the difference and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Go back to the rules before by itself unless `anyportctl confirm` follows within this time, such as 60s or 5m
    #[arg(long, value_name = "TIME", value_parser = crate::human_duration::parse, conflicts_with = "dry_run")]
    confirm: Option<Duration>,
    /// Remove the rules that were added by hand, too
    #[arg(long)]
    prune: bool,
    /// Go on although most of the rules go, listening sockets are shadowed or the host may be cut off
    #[arg(long)]
    force: bool,
}

impl Apply {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let Self { source, dry_run, confirm, prune, force } = self;
        let Reading { text, notes } = source.read()?;
        let confirm = confirm.map(|it| it.as_secs());
        let options = api::Apply { dry_run, confirm, prune, force };
        let path = path("/v1/apply", &options)?;
        let request = client.post_file(&path, text.into_bytes());
        let mut answer: Applied = tokio::select! {
            answer = request => answer?,
            never = show_progress(client) => match never {},
        };
        answer.notes.splice(0..0, notes);
        out.print(&answer, |answer| describe(answer, prune))
    }
}

pub(super) async fn confirm(client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
    let answer: Changed = client.post("/v1/confirm", &()).await?;
    out.print_change(&answer, "confirmed".into())
}

/// The bytes of a file or of standard input.
pub(super) fn read(file: &PathBuf) -> Result<Vec<u8>, Problem> {
    let mut text = Vec::new();
    let result = if file.as_os_str() == "-" {
        stdin().read_to_end(&mut text).map(drop)
    } else {
        fs::read(file).map(|read| text = read)
    };
    result.map_err(|error| Problem::new(ProblemKind::Invalid, format!("read {}: {error}", file.display())))?;
    Ok(text)
}

/// Draws a bar on a terminal where the command takes longer than a second. Never ends.
async fn show_progress(client: &Client) -> std::convert::Infallible {
    const PATIENCE: Duration = Duration::from_secs(1);
    const INTERVAL: Duration = Duration::from_millis(200);
    tokio::time::sleep(PATIENCE).await;
    if !stderr().is_terminal() {
        return std::future::pending().await;
    }
    let bar = ProgressBar::new(1);
    bar.set_style(
        ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {msg}").unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    loop {
        if let Ok(ProgressView { doing, step, steps }) = client.get("/v1/progress").await {
            bar.set_length(steps.into());
            bar.set_position(step.saturating_sub(1).into());
            bar.set_message(doing);
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

fn describe(answer: &Applied, prune: bool) -> String {
    let mut lines: Vec<String> = answer.services.iter().map(|service| format!("  service {service}")).collect();
    lines.extend(answer.difference.iter().map(|rule| format!("  {rule}")));
    let Applied { added, removed, unchanged, kept_of_config, kept_of_fleet, kept_added, generation, .. } = answer;
    let counts = format!("{added} to add, {removed} to remove, {unchanged} unchanged");
    lines.push(if answer.dry_run {
        format!("plan: {counts}; nothing was changed")
    } else if *added + *removed + answer.services.len() == 0 {
        format!("nothing to do, it is so already (generation {generation})")
    } else {
        format!("applied: {added} added, {removed} removed, {unchanged} unchanged (generation {generation})")
    });
    if *kept_of_config > 0 {
        lines.push(format!("note: {kept_of_config} rules of the configuration stay beside these"));
    }
    if *kept_of_fleet > 0 {
        lines.push(format!("note: {kept_of_fleet} rules of the fleet stay beside these"));
    }
    if *kept_added > 0 && !prune {
        lines.push(format!("note: {kept_added} rules that were added by hand stay beside these; --prune removes them"));
    }
    lines.extend(answer.notes.iter().map(|note| format!("note: {note}")));
    if let Some(seconds) = answer.confirm_within {
        lines.push(format!("the rules before come back in {seconds} s unless you type: anyportctl confirm"));
    }
    lines.join("\n")
}
