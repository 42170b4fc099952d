//! `anyportctl top`: rates, live.

mod screen;

use std::{
    cmp::Reverse,
    io::{IsTerminal as _, stdout},
    pin::pin,
    time::Duration,
};

use tokio::time::sleep;

use self::screen::{Key, Screen};
use super::{Output, show::table};
use crate::{
    api::{Client, LivePrefix, LiveService, LiveView, PrefixCounts, Problem, ProblemKind, ServiceCounts},
    text::list_of,
};

/// The daemon counts no more often.
const SHORTEST: Duration = Duration::from_secs(1);
/// Prefixes in a table that nobody's screen limits.
const ROWS: usize = 20;

/// Shows rates of packets, connections and bytes by service and prefix, the highest first.
///
/// On a terminal it goes on until q is typed. Elsewhere it prints plain tables, and with --json a JSON object a line.
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

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Sort {
    /// Packets handed to sockets, per second
    #[default]
    Steered,
    /// Packets dropped, per second
    Dropped,
    /// Connections accepted per second; prefixes by packets
    Connections,
    /// Bytes per second; prefixes by packets
    Bytes,
    /// By name
    Name,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if interval < SHORTEST { Err("the daemon counts once a second".into()) } else { Ok(interval) }
}

impl Top {
    pub(super) async fn run(self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        if self.once || out.json || !stdout().is_terminal() {
            return self.print(client, out).await;
        }
        let mut screen =
            Screen::open().map_err(|error| Problem::new(ProblemKind::Failed, format!("use the terminal: {error}")))?;
        self.draw(client, &mut screen).await
    }

    /// Prints one look after the other.
    async fn print(&self, client: &Client, out: &mut Output<'_>) -> Result<(), Problem> {
        // So that the first one has the rates of this interval, or of a longer one where counting takes long.
        look(client).await?;
        let mut left = if self.once { Some(1) } else { self.count };
        while left != Some(0) {
            sleep(self.interval).await;
            let view = look(client).await?;
            if view.window.is_none() {
                continue;
            }
            let text = |view: &_| self.text(view, None) + if left == Some(1) { "" } else { "\n" };
            if out.print_one(&view, text)? == super::Reader::Gone {
                return Ok(());
            }
            left = left.map(|left| left - 1);
        }
        Ok(())
    }

    /// Draws on the terminal until the user has seen enough. A daemon that is being restarted is waited for.
    async fn draw(&self, client: &Client, screen: &mut Screen) -> Result<(), Problem> {
        let drawing = |error| Problem::new(ProblemKind::Failed, format!("draw on the terminal: {error}"));
        let mut view = look(client).await;
        let mut left = self.count;
        loop {
            left = left.map(|left| left - 1);
            let mut looking = pin!(async {
                sleep(self.interval).await;
                look(client).await
            });
            view = loop {
                let rows = Screen::size().map_err(drawing)?.0;
                let text =
                    view.as_ref().map_or_else(|problem| problem.error.clone(), |view| self.text(view, Some(rows)));
                Screen::show(&text).map_err(drawing)?;
                tokio::select! {
                    key = screen.key() => if key.map_err(drawing)? == Key::Quit { return Ok(()) },
                    view = &mut looking, if left != Some(0) => break view,
                    () = sleep(self.interval), if left == Some(0) => return Ok(()),
                }
            };
        }
    }

    /// Tables of services and prefixes, of both as many as fit on a screen of so many rows, if there is one.
    fn text(&self, view: &LiveView, screen: Option<usize>) -> String {
        let LiveView { services, prefixes, prefixes_omitted, .. } = view;
        let head = head(view);
        // Beside rows there are two empty lines, two headers, and two lines about what is left out.
        let room = screen.map(|rows| rows.saturating_sub(head.lines().count() + 6));
        let services_shown = room.map_or(services.len(), |room| services.len().min((room / 2).max(1)));
        let prefixes_shown = room.map_or(ROWS, |room| (room - services_shown.min(room)).max(1)).min(prefixes.len());
        let left_out = |count: usize, what: &str| {
            if count == 0 { String::new() } else { format!("\nand {count} more {what}") }
        };
        format!(
            "{head}\n\n{}{}\n\n{}{}",
            self.services(services, services_shown),
            left_out(services.len() - services_shown, "services"),
            self.prefixes(prefixes, prefixes_shown),
            left_out(prefixes_omitted + prefixes.len() - prefixes_shown, "prefixes"),
        )
    }

    fn services(&self, services: &[LiveService], shown: usize) -> String {
        let mut services: Vec<_> = services.iter().map(|it| (it, it.rates.unwrap_or_default())).collect();
        services.sort_by_key(|(_, rates)| {
            Reverse(in_order(match self.sort {
                Sort::Steered => rates.steered,
                Sort::Dropped => rates.dropped,
                Sort::Connections => rates.accepted,
                Sort::Bytes => rates.bytes_from_clients + rates.bytes_to_clients,
                Sort::Name => 0.0,
            }))
        });
        let header =
            ["SERVICE", "HANDLER", "STEERED/S", "DROPPED/S", "CONN/S", "REFUSED/S", "DGRAM/S", "IN/S", "OUT/S", "OPEN"];
        table(header, services.into_iter().take(shown).map(|(it, rates)| service_row(it, &rates).map(Into::into)))
    }

    fn prefixes(&self, prefixes: &[LivePrefix], shown: usize) -> String {
        let mut prefixes: Vec<_> = prefixes.iter().map(|it| (it, it.rates.unwrap_or_default())).collect();
        match self.sort {
            Sort::Name => prefixes.sort_by(|(one, _), (other, _)| one.prefix.cmp(&other.prefix)),
            Sort::Dropped => prefixes.sort_by_key(|(_, rates)| Reverse(in_order(rates.dropped))),
            // As the daemon has sorted them, by all packets.
            Sort::Connections | Sort::Bytes => {}
            Sort::Steered => prefixes.sort_by_key(|(_, rates)| Reverse(in_order(rates.steered))),
        }
        let header = ["PREFIX", "PROTOCOL", "SERVICE", "STEERED/S", "DROPPED/S", "STEERED", "DROPPED"];
        table(header, prefixes.into_iter().take(shown).map(|(it, rates)| prefix_row(it, rates).map(Into::into)))
    }
}

async fn look(client: &Client) -> Result<LiveView, Problem> {
    client.get("/v1/live").await
}

/// Rates are finite and not negative, so that their bits are in their order.
fn in_order(rate: f64) -> u64 {
    rate.to_bits()
}

fn head(view: &LiveView) -> String {
    let LiveView { version, pid, backend, generation, rules, degraded, window, .. } = view;
    let over = window.map_or_else(|| "no rates yet".into(), |window| format!("rates over {window:.1} s"));
    let mut head = format!("anyportd {version}, pid {pid}, {backend}, generation {generation}, {rules} rules; {over}");
    if !degraded.is_empty() {
        head.push_str("\nDEGRADED  ");
        head.push_str(&list_of(degraded));
    }
    head
}

fn service_row(service: &LiveService, rates: &ServiceCounts<f64>) -> [String; 10] {
    let ServiceCounts { steered, dropped, accepted, refused, datagrams, bytes_from_clients, bytes_to_clients } = rates;
    let [steered, dropped, accepted, refused, datagrams] =
        [steered, dropped, accepted, refused, datagrams].map(|it| short(*it, 1000.0));
    let [received, sent] = [bytes_from_clients, bytes_to_clients].map(|it| short(*it, 1024.0));
    [
        service.name.to_string(),
        service.handler.to_string(),
        steered,
        dropped,
        accepted,
        refused,
        datagrams,
        received,
        sent,
        service.active.to_string(),
    ]
}

fn prefix_row(row: &LivePrefix, PrefixCounts { steered, dropped }: PrefixCounts<f64>) -> [String; 7] {
    let LivePrefix { prefix, protocol, service, counts, .. } = row;
    [
        prefix.clone(),
        protocol.to_string(),
        service.to_string(),
        short(steered, 1000.0),
        short(dropped, 1000.0),
        counts.steered.to_string(),
        counts.dropped.to_string(),
    ]
}

/// A number in few characters: with a unit of so many, or so many of them.
fn short(number: f64, unit: f64) -> String {
    const UNITS: [&str; 5] = ["", "k", "M", "G", "T"];
    let mut number = number;
    let mut at = 0;
    // What would be rounded to a whole unit is shown as such.
    while number >= unit - 0.5 && at + 1 < UNITS.len() {
        number /= unit;
        at += 1;
    }
    let digits = usize::from(number < 9.95 && number > 0.0);
    let binary = if unit > 1000.0 && at > 0 { "i" } else { "" };
    format!("{number:.digits$}{}{binary}", if binary.is_empty() { UNITS[at] } else { ["", "K", "M", "G", "T"][at] })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{LiveView, Sort, Top, short};

    fn view() -> LiveView {
        let prefix = |prefix: &str, steered: f64, dropped: f64| {
            json!({"prefix": prefix, "protocol": "tcp", "service": "web", "counts": {"steered": 70, "dropped": 7},
                   "rates": {"steered": steered, "dropped": dropped}})
        };
        let counts = json!({"steered": 70, "dropped": 7, "accepted": 60, "refused": 1, "datagrams": 10,
                            "bytes_from_clients": 5000, "bytes_to_clients": 70000});
        let mut rates = counts.clone();
        rates["bytes_to_clients"] = json!(7_340_032.0);
        let service = |name: &str, rates| json!({"name": name, "handler": "hello", "rules": 3, "sockets": 8, "active": 12, "counts": counts, "rates": rates});
        serde_json::from_value(json!({
            "version": "1.2.3", "pid": 42, "backend": "tc", "generation": 9, "rules": 3, "unready": null,
            "degraded": ["this", "that"], "age": 0.1, "window": 2.04,
            "services": [service("idle", json!(null)), service("web", rates)],
            "prefixes": [prefix("192.0.2.0/24", 2.0, 9.0), prefix("2001:db8::/32", 3.0, 0.0), prefix("0.0.0.0/0", 1234.0, 0.1)],
            "prefixes_omitted": 5
        }))
        .unwrap()
    }

    fn top(sort: Sort) -> Top {
        Top { sort, interval: super::SHORTEST, count: None, once: true }
    }

    #[test]
    fn tables_are_sorted_as_asked() {
        let text = top(Sort::Steered).text(&view(), None);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "anyportd 1.2.3, pid 42, tc, generation 9, 3 rules; rates over 2.0 s");
        assert_eq!(lines[1], "DEGRADED  this, that");
        assert_eq!(
            lines[4].split_whitespace().collect::<Vec<_>>(),
            ["web", "hello", "70", "7.0", "60", "1.0", "10", "4.9Ki", "7.0Mi", "12"]
        );
        assert!(lines[5].starts_with("idle ") && lines[5].contains("  0 "));
        let order = |text: &str| -> Vec<String> {
            let prefixes = text.lines().skip_while(|line| !line.starts_with("PREFIX")).skip(1).take(3);
            prefixes.map(|line| line.split_whitespace().next().unwrap().to_owned()).collect()
        };
        assert_eq!(order(&text), ["0.0.0.0/0", "2001:db8::/32", "192.0.2.0/24"]);
        assert_eq!(order(&top(Sort::Dropped).text(&view(), None))[0], "192.0.2.0/24");
        assert_eq!(order(&top(Sort::Name).text(&view(), None))[1], "192.0.2.0/24");
        assert_eq!(lines.last(), Some(&"and 5 more prefixes"));
    }

    #[test]
    fn a_small_screen_has_fewer_prefixes() {
        for (rows, services, prefixes) in [(11, 1, 2), (9, 1, 1), (20, 2, 3)] {
            let text = top(Sort::Steered).text(&view(), Some(rows));
            assert!(text.lines().count() <= rows.max(10), "{text}");
            assert_eq!(text.matches("  hello  ").count(), services, "{text}");
            assert_eq!(text.matches("  tcp  ").count(), prefixes, "{text}");
            assert_eq!(text.contains("and 1 more services"), services == 1, "{text}");
            assert!(text.ends_with(&format!("and {} more prefixes", 8 - prefixes)), "{text}");
        }
    }

    #[test]
    fn numbers_are_short() {
        for (number, expected) in [
            (0.0, "0"),
            (0.26, "0.3"),
            (9.94, "9.9"),
            (9.97, "10"),
            (999.4, "999"),
            (999.6, "1.0k"),
            (1234.0, "1.2k"),
            (5e10, "50G"),
            (5e17, "500000T"),
        ] {
            assert_eq!(short(number, 1000.0), expected, "{number}");
        }
        for (number, expected) in [(1023.0, "1023"), (1024.0, "1.0Ki"), (7.0 * 1024.0 * 1024.0, "7.0Mi")] {
            assert_eq!(short(number, 1024.0), expected, "{number}");
        }
    }
}
