//! `anyportctl top`: rates, live.

mod screen;
mod shown;

use std::{
    io::{IsTerminal as _, stdout},
    pin::pin,
    time::Duration,
};

use tokio::time::sleep;

use self::{
    screen::{Screen, Size},
    shown::{Shown, Sort},
};
use super::{Output, Reader};
use crate::api::{Client, LiveView, Problem, ProblemKind};

/// The daemon counts no more often.
const SHORTEST: Duration = Duration::from_secs(1);

/// Shows rates of packets, connections and bytes by service and prefix, the highest first.
///
/// On a terminal it goes on until q is typed; ? names the other keys. Elsewhere it prints plain tables, and with --json a JSON object a
/// line.
#[derive(Debug, clap::Args)]
pub(super) struct Top {
    /// By what to sort
    #[arg(long, value_enum, value_name = "COLUMN", default_value_t)]
    sort: Sort,
    /// Time between two looks, such as 2s; not below 1s
    #[arg(long, value_name = "TIME", value_parser = interval, default_value = "2s")]
    interval: Duration,
    /// Look so many times, and end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "once")]
    count: Option<u64>,
    /// Look once, at the rates of one interval, and end; prints a plain table on a terminal, too
    #[arg(long)]
    once: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = crate::human_duration::parse(text).map_err(|error| error.0)?;
    if interval < SHORTEST { Err("the daemon counts once a second".into()) } else { Ok(interval) }
}

impl Top {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        if self.once || !out.is_for_people() || !stdout().is_terminal() {
            return self.print(client, out).await;
        }
        let mut screen =
            Screen::open().map_err(|error| Problem::new(ProblemKind::Failed, format!("use the terminal: {error}")))?;
        self.draw(client, &mut screen, out.is_in_colours()).await
    }

    /// Prints one look after the other.
    async fn print(&self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        let shown = Shown::new(self.sort);
        // So that the first one has the rates of this interval, or of a longer one where counting takes long.
        look(client).await?;
        let mut left = if self.once { Some(1) } else { self.count };
        while left != Some(0) {
            sleep(self.interval).await;
            let view = look(client).await?;
            if view.window.is_none() {
                continue;
            }
            let width = out.width();
            let text = |view: &_| shown.tables(view, width) + if left == Some(1) { "" } else { "\n" };
            if out.print_one(&view, text)? == Reader::Gone {
                return Ok(());
            }
            left = left.map(|left| left - 1);
        }
        Ok(())
    }

    /// Draws on the terminal until the user has seen enough. A daemon that is being restarted is waited for.
    async fn draw(&self, client: &Client, screen: &mut Screen, in_colours: bool) -> Result<(), Problem> {
        let drawing = |error| Problem::new(ProblemKind::Failed, format!("draw on the terminal: {error}"));
        let mut shown = Shown::new(self.sort);
        let mut view = look(client).await;
        let mut left = self.count;
        loop {
            left = left.map(|left| left - 1);
            let mut looking = pin!(async {
                sleep(self.interval).await;
                look(client).await
            });
            view = loop {
                let size = Size::of_terminal().map_err(drawing)?;
                let text = shown.screen(view.as_ref().map_err(|problem| problem.error.as_str()), size);
                size.draw(&text, in_colours).map_err(drawing)?;
                tokio::select! {
                    key = screen.key() => if !shown.goes_on_after(key.map_err(drawing)?) { return Ok(()) },
                    view = &mut looking, if left != Some(0) && !shown.is_paused() => break view,
                    () = sleep(self.interval), if left == Some(0) => return Ok(()),
                }
            };
        }
    }
}

async fn look(client: &Client) -> Result<LiveView, Problem> {
    client.get("/v1/live").await
}
