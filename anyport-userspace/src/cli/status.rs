//! `anyportctl status`: the daemon's state on one page.

use super::{
    Output,
    drain::subject,
    show::{bytes, count, thousands, wrapped},
    tone::Tone,
};
use crate::{
    api::AnnounceState,
    api::{
        AnnounceView, AnnouncedPrefix, BackEndView, Client, DrainState, DrainView, FleetView, Problem, ProblemKind,
        RepairView, StatusView,
    },
    text::list_of,
};

/// Shows the back end, the generation, totals, and what is degraded.
#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// End with exit status 6 if anything is degraded
    #[arg(long)]
    exit_code: bool,
}

impl Status {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let view: StatusView = client.get("/v1/status").await?;
        let width = out.width();
        out.print(&view, |view| text(view, width))?;
        match view.degraded.len() {
            count if self.exit_code && count > 0 => Err(Problem::new(
                ProblemKind::Degraded,
                format!("degraded: {count} of what status shows does not work as it should"),
            )),
            _ => Ok(()),
        }
    }
}

/// Where what a line says begins, behind its label.
const INDENT: usize = 12;

/// For people, in lines of at most so many characters.
pub(super) fn text(view: &StatusView, width: Option<usize>) -> String {
    let text = lines(view).join("\n");
    let Some(width) = width else { return text };
    text.split('\n').map(|line| wrapped(line, width, INDENT)).collect::<Vec<_>>().join("\n")
}

fn lines(view: &StatusView) -> Vec<String> {
    let mut lines =
        vec![format!("anyportd {}, pid {}", view.version, view.pid), format!("back end    {}", view.backend)];
    lines.extend(view.backends.iter().map(back_end));
    if !view.interfaces.is_empty() {
        lines.push(format!("interfaces  {}", view.interfaces.join(", ")));
    }
    lines.push(format!(
        "generation  {}: {} of at most {}, {}",
        view.generation,
        count(view.rules, "rule"),
        thousands(view.max_rules as u64),
        count(view.services, "service")
    ));
    lines.push(format!("memory      {} of the kernel's for rules and counters", bytes(view.bytes)));
    lines.push(format!("workers     {}", view.workers));
    lines.push(format!(
        "descriptors {} of {} for clients in use",
        thousands(view.client_descriptors_in_use as u64),
        thousands(view.client_descriptors as u64)
    ));
    let totals = view.totals;
    lines.push(format!(
        "totals      {} steered, {} dropped, {} unmatched, {} connections open",
        thousands(totals.steered),
        thousands(totals.dropped),
        thousands(totals.unmatched),
        thousands(totals.active)
    ));
    if totals.denied > 0 {
        lines.push(format!("denied      {} of sources that services do not take", thousands(totals.denied)));
    }
    if totals.refused > 0 {
        lines.push(format!("limits      {} connections and flows refused", thousands(totals.refused)));
    }
    // The kernel counts all that a listening socket drops as one.
    let full = totals.listen_drops.min(totals.queue_full);
    if full + totals.receive_drops > 0 {
        lines.push(format!(
            "full queues {} attempts to connect and {} datagrams dropped",
            thousands(full),
            thousands(totals.receive_drops)
        ));
    }
    if totals.listen_drops > full {
        let others = thousands(totals.listen_drops - full);
        lines.push(format!("unanswered  {others} attempts to connect, and not for a full queue: see no route"));
    }
    if totals.no_route > 0 {
        lines.push(format!(
            "no route    for {} packets of this host, answers among them: `explain --from CLIENT` shows the way of one",
            thousands(totals.no_route)
        ));
    }
    if !view.draining.is_empty() {
        lines.push(format!("draining    {}", list_of(&view.draining)));
    }
    for RepairView { kind, times, last, at } in &view.mended {
        lines.push(format!("repaired    {kind}: {times} times, last at {at}: {last}"));
    }
    lines.extend(view.announce.iter().flat_map(announced));
    lines.extend(view.drained.iter().map(|it| format!("drained     {}: {}", subject(it), how_far(it))));
    if let Some(seconds) = view.unconfirmed {
        lines.push(format!(
            "unconfirmed what was applied is rolled back in {seconds} s unless you type: anyportctl confirm"
        ));
    }
    if let Some(view) = &view.fleet {
        lines.push(format!("fleet       {}", fleet(view)));
    }
    match view.degraded.as_slice() {
        [] => lines.push(Tone::Good.line("all is well")),
        degraded => lines.extend(degraded.iter().map(|what| Tone::Bad.line(&format!("DEGRADED    {what}")))),
    }
    lines
}

fn fleet(view: &FleetView) -> String {
    let FleetView { ring, node, etcd, connected, sequence, set, since, .. } = view;
    let in_force = match (set, since) {
        (Some(set), Some(since)) => format!("sequence {sequence}, set {}, since {since}", set.get(..12).unwrap_or(set)),
        _ => "no set yet".to_owned(),
    };
    let answers = if *connected { "answers" } else { "does not answer" };
    format!("ring {ring} as {node}: {in_force}; etcd at {} {answers}", list_of(etcd))
}

/// What is announced, and the first of those that are not.
fn announced(AnnounceView { file, reload, told, prefixes, .. }: &AnnounceView) -> Vec<String> {
    const SHOWN: usize = 10;
    let by = reload.as_ref().unwrap_or(file).display();
    let others = || prefixes.iter().filter(|it| it.state != AnnounceState::Announced);
    let (all, left) = (prefixes.len(), others().count());
    let announced = all - left;
    let mut lines = vec![if *told {
        format!("announced   {announced} of {all} prefixes, by {by}")
    } else {
        format!("announced   unknown, {announced} of {all} prefixes are to be: {by} can't be told")
    }];
    lines.extend(others().take(SHOWN).map(|AnnouncedPrefix { prefix, state, since, why }| {
        let what = match state {
            AnnounceState::Announced => "announced",
            AnnounceState::Held => "served, held down",
            AnnounceState::Unserved => "not served",
            AnnounceState::Drained => "drained",
        };
        let why = why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        format!("  withdrawn {prefix} {what} since {since}{why}")
    }));
    if left > SHOWN {
        lines.push(format!("  withdrawn {} more", left - SHOWN));
    }
    lines
}

fn how_far(view: &DrainView) -> String {
    match view.state {
        DrainState::Withdrawing => "the router has yet to withdraw it".to_owned(),
        DrainState::Waiting => format!("new connections are refused in {} s", view.left.unwrap_or_default()),
        DrainState::Refusing => "new connections are refused; anyportctl undrain ends that".to_owned(),
    }
}

fn back_end(view: &BackEndView) -> String {
    let mark = match view.usable {
        Some(true) => "in use",
        Some(false) => "passed over",
        None => "unused",
    };
    format!("  {:<10}{mark}: {}", view.name.to_string(), view.reason.replace('\n', "\n            "))
}
